"""Where each number of a bank lies: fields of a row, slots of the slab, totals, control, steps."""

from __future__ import annotations

#: Numbers in a control block; `stepping` says which.
CONTROL = 9
FIELDS = ("count", "nonfinite", "zeros", "mean", "std", "abs_mean", "min", "max", "calls", "order")
COUNT, NONFINITE, ZEROS, MEAN, STD, ABS_MEAN, MIN, MAX, CALLS, ORDER = range(len(FIELDS))
COUNTS = (COUNT, NONFINITE, ZEROS)
SLOTS = len(FIELDS) + len(COUNTS)  # the high parts of the counts come last
BASE = float(1 << 24)
#: Forwards counted, steps observed, the flags that tell a layer where its row goes, if anywhere, calls
#: since the step began, or since the last one ended, steps that are in the totals, and how many to add
#: to them at a time once the ring is full (on the CPU, where one call for many costs as much as for one).
FORWARDS, OBSERVED, EVERY, ENABLED, ACTIVE, SLOT, SEQUENCE, FOLDED, FOLD = range(CONTROL)
STEP = 4
NUMBER, TIMESTEP, BRANCH, BATCH = range(STEP)
#: Beside the merged row, totals hold what a soulprint averages: steps, sum of means, sum of stds.
TOTALS = len(FIELDS) + 3
STEPS, SUM_MEAN, SUM_STD = range(len(FIELDS), TOTALS)
