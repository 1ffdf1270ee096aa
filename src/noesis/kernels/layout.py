"""Where each number of a bank lies: fields of a row, slots of the slab, totals, control, steps."""

from __future__ import annotations

#: A row, as float64 fields. `skewness` and `kurtosis` are the third and fourth moments about the mean, over those
#: powers of `std`: they fit float32 however large the elements are. Both are 0 where all elements are equal.
FIELDS = (
    *("count", "nonfinite", "zeros", "mean", "std", "abs_mean", "min", "max", "calls", "order"),
    *("skewness", "kurtosis"),
)
COUNT, NONFINITE, ZEROS, MEAN, STD, ABS_MEAN, MIN, MAX, CALLS, ORDER, SKEWNESS, KURTOSIS = range(len(FIELDS))
#: How many fields a row has at least; it has all where a statistic needs them, see `results.statistics`.
REQUIRED = SKEWNESS

#: A row packed as float32 slots: a count takes two, and the high parts, in units of `BASE`, come last.
COUNTS = (COUNT, NONFINITE, ZEROS)
SLOTS = REQUIRED + len(COUNTS)
BASE = float(1 << 24)

#: The control block: forwards counted, steps observed, the flags that tell a layer where its row goes, if
#: anywhere, calls since the step began, or since the last one ended, steps that are in the totals, and how many
#: to add to them at a time once the ring is full (on the CPU, where one call for many costs as much as for one).
CONTROL = 9
FORWARDS, OBSERVED, EVERY, ENABLED, ACTIVE, SLOT, SEQUENCE, FOLDED, FOLD = range(CONTROL)

#: What is known of each step on the device, and with the host's part.
STEP, KNOWN = 4, 5
NUMBER, TIMESTEP, BRANCH, BATCH, SECONDS = range(KNOWN)

#: After the merged row, totals hold what a soulprint averages: steps, sum of means, sum of stds.
AVERAGES = 3
STEPS, SUM_MEAN, SUM_STD = range(-AVERAGES, 0)
TOTALS = REQUIRED + AVERAGES
