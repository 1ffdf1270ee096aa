"""Alignment of two sequences, against brute force and the textbook's recurrence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from noesis.numerics import align


def longest_by_brute_force(a: list[int], b: list[int]) -> int:
    def subsequences(values: list[int], length: int) -> set[tuple[int, ...]]:
        return set(itertools.combinations(values, length))

    lengths = range(min(len(a), len(b)), -1, -1)
    return next(length for length in lengths if subsequences(a, length) & subsequences(b, length))


few_letters = st.lists(st.integers(0, 3), max_size=9)


@given(few_letters, few_letters)
def test_alignment_is_a_longest_common_subsequence(a: list[int], b: list[int]) -> None:
    positions_a, positions_b = align(a, b)
    assert len(positions_a) == len(positions_b) == longest_by_brute_force(a, b)
    assert [a[i] for i in positions_a] == [b[j] for j in positions_b]
    for positions in (positions_a, positions_b):
        assert positions == sorted(set(positions))


@given(few_letters, few_letters)
def test_alignment_is_symmetric_in_length_and_deterministic(a: list[int], b: list[int]) -> None:
    assert align(a, b) == align(list(a), list(b))
    assert len(align(a, b)[0]) == len(align(b, a)[0])
    assert align(a, a) == (list(range(len(a))), list(range(len(a))))


def test_ties_go_to_the_earliest() -> None:
    assert align("xa", "yaba") == ([1], [3])  # the common end comes first
    assert align("xaz", "yabaw") == ([1], [1])
    assert align("xabaz", "yaw") == ([1], [1])
    assert align(["x", "x"], ["x", "x", "x"]) == ([0, 1], [0, 1])  # the common beginning before the end
    assert align([1, 2], [2, 1]) == ([1], [0])  # in b before in a


def test_tokens_of_different_kinds_are_different() -> None:
    assert align([1, "1"], ["1", 1])[0] in ([0], [1])
    assert align([1], ["1"]) == ([], [])


@pytest.mark.slow
def test_long_sequences_stay_within_bits() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 50, 1500).tolist(), rng.integers(0, 50, 1501).tolist()
    positions_a, positions_b = align(a, b)
    assert [a[i] for i in positions_a] == [b[j] for j in positions_b]
    row = np.zeros(len(b) + 1, dtype=int)  # the textbook recurrence, for the length
    for token in a:
        previous, row = row, row.copy()
        for j in range(1, len(b) + 1):
            row[j] = previous[j - 1] + 1 if b[j - 1] == token else max(previous[j], row[j - 1])
    assert len(positions_a) == row[-1]
