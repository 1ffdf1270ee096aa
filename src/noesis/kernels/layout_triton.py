"""Positions in a row and in the control block, as Triton kernels read them: a kernel's globals must be constexprs."""

from __future__ import annotations

import triton.language as tl

from . import layout

COUNT, NONFINITE, ZEROS = (tl.constexpr(field) for field in layout.COUNTS)
MEAN, STD, ABS_MEAN = tl.constexpr(layout.MEAN), tl.constexpr(layout.STD), tl.constexpr(layout.ABS_MEAN)
MIN, MAX = tl.constexpr(layout.MIN), tl.constexpr(layout.MAX)
CALLS, ORDER = tl.constexpr(layout.CALLS), tl.constexpr(layout.ORDER)
SKEWNESS, KURTOSIS = tl.constexpr(layout.SKEWNESS), tl.constexpr(layout.KURTOSIS)
REQUIRED = tl.constexpr(layout.REQUIRED)
#: After the fields of a row: high parts of counts in slots, averages in totals.
HIGHS, AVERAGES = tl.constexpr(len(layout.COUNTS)), tl.constexpr(layout.AVERAGES)
STEPS, SUM_MEAN, SUM_STD = (tl.constexpr(i) for i in (layout.STEPS, layout.SUM_MEAN, layout.SUM_STD))
FORWARDS, OBSERVED, EVERY = (tl.constexpr(i) for i in (layout.FORWARDS, layout.OBSERVED, layout.EVERY))
ENABLED, ACTIVE, SLOT = (tl.constexpr(i) for i in (layout.ENABLED, layout.ACTIVE, layout.SLOT))
SEQUENCE, FOLDED = tl.constexpr(layout.SEQUENCE), tl.constexpr(layout.FOLDED)
STEP = tl.constexpr(layout.STEP)
INFINITY = tl.constexpr(float("inf"))
