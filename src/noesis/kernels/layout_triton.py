"""Positions in a row and in the control block, as Triton kernels read them: a kernel's globals must be constexprs."""

from __future__ import annotations

import triton.language as tl

from . import rows, stepping

SLOTS = tl.constexpr(rows.SLOTS)
COUNT, NONFINITE, ZEROS = (tl.constexpr(field) for field in rows.COUNTS)
MEAN, STD, ABS_MEAN = tl.constexpr(rows.MEAN), tl.constexpr(rows.STD), tl.constexpr(rows.ABS_MEAN)
MIN, MAX = tl.constexpr(rows.MIN), tl.constexpr(rows.MAX)
CALLS, ORDER = tl.constexpr(rows.CALLS), tl.constexpr(rows.ORDER)
HIGH = tl.constexpr(len(rows.FIELDS))  # slots from here on hold the high parts of the counts
TOTALS = tl.constexpr(stepping.TOTALS)
STEPS, SUM_MEAN, SUM_STD = (tl.constexpr(i) for i in (stepping.STEPS, stepping.SUM_MEAN, stepping.SUM_STD))
FORWARDS, OBSERVED, EVERY = (tl.constexpr(i) for i in (stepping.FORWARDS, stepping.OBSERVED, stepping.EVERY))
ENABLED, ACTIVE, SLOT = (tl.constexpr(i) for i in (stepping.ENABLED, stepping.ACTIVE, stepping.SLOT))
SEQUENCE, FOLDED = tl.constexpr(stepping.SEQUENCE), tl.constexpr(stepping.FOLDED)
STEP = tl.constexpr(stepping.STEP)
INFINITY = tl.constexpr(float("inf"))
