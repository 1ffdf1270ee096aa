"""JSON within a budget of memory is read as the standard library reads it."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from noesis.errors import NoesisError
from noesis.files import bounded_json
from noesis.files.bounded_json import parsed

STRINGS = ["", "a", "b", "numbers", "\\", '"', "\u0100", "\U0001f980", "x" * 70, "\n", "[1,2", '{"a":', '\\\\"', ","]
CONSTANTS = [None, True, False, 0, 1, -7, 300, 10**20, 0.5, -1e-300, 1e22, math.nan, math.inf, -math.inf]
MARKS = '[]{},:"\\ 0-.eEnNtu'


def some(chance: random.Random, depth: int) -> Any:
    """A value that JSON can hold."""
    kind = chance.randrange(4 if depth else 2)
    if kind < 2:
        return chance.choice(STRINGS if kind else CONSTANTS)
    inner = [some(chance, depth - 1) for _ in range(chance.randrange(5))]
    return inner if kind == 2 else {chance.choice(STRINGS): value for value in inner}


def numbers_of(chance: random.Random, shape: tuple[int, ...]) -> Any:
    if not shape:
        return chance.choice([1, 2.5, None, -3, 1e300, 0.1])
    return [numbers_of(chance, shape[1:]) for _ in range(shape[0])]


def damaged(chance: random.Random, text: str, start: int = 0) -> str:
    for _ in range(chance.randrange(3)):
        at, mark = chance.randrange(start, len(text)), chance.choice(MARKS)
        text = chance.choice([text[:at] + mark + text[at:], text[:at] + text[at + 1 :], text[:at] + mark, text[:at]])
        if len(text) <= start:
            break
    return text


def written(chance: random.Random, value: Any) -> str:
    space = chance.choice([(",", ":"), (", ", ": ")])
    return json.dumps(value, indent=chance.choice([None, 1]), ensure_ascii=chance.random() < 0.5, separators=space)


def same(one: Any, other: Any) -> bool:
    """Equal, of the same types, and in the same order; NaN equals itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


@pytest.mark.parametrize("window", [1, 3, 9, 40, 1 << 13])
def test_json_is_read_as_ever(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fits a window, and broken JSON is refused."""
    monkeypatch.setattr(bounded_json, "_WINDOW", window)
    chance, read = random.Random(window), 0
    for case in range(2000):
        text = damaged(chance, written(chance, some(chance, 4)))
        try:
            expected = json.loads(text)
        except ValueError:
            with pytest.raises(ValueError):  # noqa: PT011  what it says is the library's
                parsed(text, len(text), "x")
            continue
        read += 1
        assert same(parsed(text, len(text), "x"), expected), (case, text)
    assert 500 < read < 1900


@pytest.mark.parametrize("piece", [40, 60, 100, 1 << 16])
def test_arrays_are_those_of_numpy(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_json, "_PIECE", piece)
    chance, read = random.Random(piece), 0
    for case in range(2000):
        shape = tuple(chance.choice([0, 1, 2, 3, 9]) for _ in range(chance.randrange(1, 4)))
        text = written(chance, {"other": [1], "numbers": {"a": numbers_of(chance, shape)}})
        text = damaged(chance, text, text.index('"a"') + 5)
        try:
            expected = np.asarray(json.loads(text)["numbers"]["a"], dtype=np.float64)
        except (ValueError, TypeError):
            expected = np.zeros(())
        if not expected.ndim:
            with pytest.raises((ValueError, TypeError)):
                parsed(text, len(text), "x", numbers=["numbers"])
            continue
        read += 1
        value = parsed(text, len(text), "x", numbers=["numbers"])
        assert value["other"] == [1]
        np.testing.assert_array_equal(value["numbers"]["a"], expected, err_msg=f"{case}: {text}")
        assert value["numbers"]["a"].dtype == np.float64
    assert 500 < read < 1900


def test_whole_numbers_are_exact() -> None:
    value = [[2**62 + 1, -5], [0, 3]]
    text = json.dumps({"arrays": value, "rest": [1.5]})
    read = parsed(text, len(text), "x", numbers=["arrays"], whole=True)
    assert read["arrays"].dtype == np.int64
    assert read["arrays"].tolist() == value
    assert read["rest"] == [1.5]
    for broken in ("[1.5]", "[null]", "[true]"):
        with pytest.raises(ValueError, match="expected whole ones"):
            parsed(f'{{"arrays": {broken}}}', 20, "x", numbers=["arrays"], whole=True)


def test_strings_that_come_again_are_kept_once() -> None:
    text = json.dumps([{"name": "block one", "number": 1000 + number} for number in range(2000)])
    value = parsed(text, len(text), "x")
    assert len({id(one["name"]) for one in value}) == 1
    assert len({id(key) for one in value for key in one}) == 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 3000 + "]" * 3000])
def test_what_is_nested_too_deep(text: str) -> None:
    with pytest.raises((RecursionError, ValueError)):
        parsed(text, len(text), "x")


def test_what_would_take_too_much_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_json, "LEAST_BOUND", 0)
    text = "[" + "[]," * 100_000 + "[]]"
    with pytest.raises(NoesisError, match=f"x would take more than {4 * len(text)} bytes of memory for {len(text)} of"):
        parsed(text, len(text), "x")
    held = json.dumps(["a" * 1000] * 1000)
    assert len(parsed(held, len(held), "x")) == 1000
    with pytest.raises(NoesisError, match="would take more than"):
        parsed(held, len(held), "x", held=2 * len(held))
