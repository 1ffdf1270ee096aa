"""Which tokens of two sequences correspond: a longest common subsequence, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Token = str | int


def align(a: Sequence[Token], b: Sequence[Token]) -> tuple[list[int], list[int]]:
    """Positions of a longest common subsequence of `a` and `b`.

    Exact, by dynamic programming, in `len(a) * len(b)` bits once the common beginning and end are taken off.
    Of several longest ones: the common beginning first, then the common end; between them each pair, from the
    last one back, as early as possible in `b`, then in `a`.

    Examples:
        >>> from noesis.numerics import align
        >>> align(["a", "cat", "sat"], ["a", "big", "cat", "sat"])
        ([0, 1, 2], [0, 2, 3])
    """
    codes: dict[Token, int] = {}
    x, y = (np.array([codes.setdefault(token, len(codes)) for token in tokens], np.int64) for tokens in (a, b))
    shortest = min(len(x), len(y))
    head = _common(x[:shortest], y[:shortest])
    tail = _common(x[head:][::-1][: shortest - head], y[head:][::-1][: shortest - head])
    middle_a, middle_b = _subsequence(x[head : len(x) - tail], y[head : len(y) - tail])
    return (
        [*range(head), *(head + i for i in middle_a), *range(len(x) - tail, len(x))],
        [*range(head), *(head + j for j in middle_b), *range(len(y) - tail, len(y))],
    )


def with_substitutions(
    positions_a: list[int], positions_b: list[int], length_a: int, length_b: int
) -> tuple[list[int], list[int]]:
    """Aligned positions and, where as many elements lie between two of them in both sequences, these in order too.

    Examples:
        >>> from noesis.numerics import with_substitutions
        >>> with_substitutions([0, 2], [0, 2], 3, 5)  # one between them, none and two after the last
        ([0, 1, 2], [0, 1, 2])
    """
    both: tuple[list[int], list[int]] = ([], [])
    last_a = last_b = -1
    for i, j in zip([*positions_a, length_a], [*positions_b, length_b], strict=True):
        if i - last_a == j - last_b:
            both[0].extend(range(last_a + 1, i))
            both[1].extend(range(last_b + 1, j))
        if i < length_a:
            both[0].append(i)
            both[1].append(j)
        last_a, last_b = i, j
    return both


def _common(x: NDArray[np.int64], y: NDArray[np.int64]) -> int:
    """How many elements from the start are equal."""
    different = np.flatnonzero(x != y)
    return int(different[0]) if different.size else len(x)


def _subsequence(x: NDArray[np.int64], y: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """A longest common subsequence as positions, early ones where there is a choice.

    With L[i, j] the length for the first i and j elements, each row of L is a running maximum, and grows by 0 or 1
    from j - 1 to j: the bits of this growth are all that the way back needs.
    """
    n, m = len(x), len(y)
    if not n or not m:
        return [], []
    grows = np.zeros((n + 1, (m + 7) // 8), dtype=np.uint8)
    row = np.zeros(m + 1, dtype=np.int64)
    for i in range(1, n + 1):
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], row[:-1] + (y == x[i - 1])))
        grows[i] = np.packbits(row[1:] > row[:-1])

    def grew(i: int, j: int) -> bool:
        return bool(grows[i, (j - 1) >> 3] >> (7 - ((j - 1) & 7)) & 1)

    pairs: list[tuple[int, int]] = []
    i, j = n, m
    while i and j:
        if not grew(i, j):  # L[i, j] = L[i, j - 1]
            j -= 1
        elif grew(i - 1, j):  # L[i, j] = L[i - 1, j]: the lengths are one ahead of L[i - 1, j - 1] in both
            i -= 1
        else:  # neither: element i pairs with element j
            i, j = i - 1, j - 1
            pairs.append((i, j))
    pairs.reverse()
    return [i for i, _ in pairs], [j for _, j in pairs]
