"""Effects: closed forms, what is left out, significance over many cells, tables and pictures."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import noesis
from noesis.interp import Effects, Site
from noesis.numerics import Floats, benjamini_hochberg, sign_flip_test

HEADS = [Site("z", layer, head) for layer in range(3) for head in range(4)]


def made(patched: Floats, direction: Any = "denoise", sites: list[Site] | None = None, **options: Any) -> Effects:
    pairs = patched.shape[1]
    sites = [Site("resid_post", cell) for cell in range(len(patched))] if sites is None else sites
    given = {"clean": np.full(pairs, 2.0), "corrupted": np.full(pairs, -2.0), **options}
    return Effects(sites, given.pop("clean"), given.pop("corrupted"), patched, direction, "logit difference", **given)


def test_closed_forms() -> None:
    clean, corrupted = np.array([4.0, 1.0, -2.0]), np.array([0.0, 2.0, 0.0])
    patched = np.array([[4.0, 1.0, -2.0], [0.0, 2.0, 0.0], [2.0, 1.5, -1.0], [6.0, 3.0, 1.0]])
    effects = made(patched, clean=clean, corrupted=corrupted)
    expected = np.array([[1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5], [1.5, -1, -0.5]])
    np.testing.assert_allclose(effects.values, expected)
    np.testing.assert_allclose(effects.mean, expected.mean(1))
    np.testing.assert_allclose(effects.standard_error, expected.std(1, ddof=1) / np.sqrt(3))
    np.testing.assert_allclose(effects.p_value, sign_flip_test(expected.T))
    np.testing.assert_allclose(effects.q_value, benjamini_hochberg(effects.p_value))
    noise = made(patched, "noise", clean=clean, corrupted=corrupted)
    np.testing.assert_allclose(noise.values, 1 - expected)  # 0 is the run that was changed, 1 the other


def test_pairs_that_coincide_are_left_out_and_counted() -> None:
    clean = np.array([1.0, 2.0, 3.0, 1000.0, 1.0, 1.0])
    corrupted = np.array([0.0, 2.0, 1.0, 1000.0001, 1.0 - 1e-4, 2.5])
    effects = made(np.ones((1, 6)), clean=clean, corrupted=corrupted)
    assert effects.dropped == [1, 3, 4]  # equal; within rounding of 1000; far nearer than pairs usually are
    assert effects.counts.tolist() == [3]
    np.testing.assert_allclose(effects.values, [[1.0, np.nan, 0.0, np.nan, np.nan, 1.0]])
    assert effects.mean[0] == pytest.approx(2 / 3)
    assert "left out: 3 pairs whose clean and corrupted metric coincide" in repr(effects)
    with pytest.raises(noesis.NoesisError, match="same metric in all 3 pairs.*Corrupt what the answer depends on"):
        made(np.ones((1, 3)), clean=np.ones(3), corrupted=np.ones(3))


def test_what_has_no_value_counts_for_nothing() -> None:
    patched = np.random.default_rng(0).normal(size=(2, 9))
    patched[0, 6:] = np.nan
    effects, alone = made(patched), made(patched[:1, :6])
    assert effects.mean[0] == pytest.approx(alone.mean[0])
    assert effects.standard_error[0] == pytest.approx(alone.standard_error[0])
    assert effects.p_value[0] == alone.p_value[0]
    assert effects.counts.tolist() == [6, 9]
    assert "no value: 3 of 18 effects" in repr(effects)
    none = made(np.array([[np.nan, np.nan], [1.0, 0.0]]))
    assert np.isnan(none.mean[0])
    assert none.p_value[0] == 1
    assert [str(each.site) for each in none.top()] == ["resid_post.1", "resid_post.0"]


def test_rounding_is_no_effect() -> None:
    """A head that changes the last bits in the same direction each time."""
    patched = np.full((2, 12), -2.0)
    patched[0] *= 1 + 1e-7
    patched[1] *= 1 - 1e-3
    assert made(patched).p_value.tolist() == [1.0, 2 / 2**12]


def test_planted_effects_are_found_and_few_others() -> None:
    """Two heads of 144 with effects, seven times: both found, and of what is called significant few are wrong."""
    sites = [Site("z", layer, head) for layer in range(12) for head in range(12)]
    wrong = found = 0
    for seed in range(7):
        patched = -2.0 + 4.0 * np.random.default_rng(seed).normal(0, 0.1, size=(144, 24))
        patched[17] += 1.2
        patched[100] -= 0.8
        effects = made(patched, sites=sites)
        names = [str(each.site) for each in effects.significant()]
        assert names[:2] == ["z.1.5", "z.8.4"]
        assert [each.site for each in effects.top(2)] == [Site("z", 1, 5), Site("z", 8, 4)]
        wrong, found = wrong + len(names) - 2, found + len(names)
    assert wrong / found < 0.1
    assert effects["z", 8, 4].mean == pytest.approx(-0.2, abs=0.1)
    assert effects["z.1.5"] == effects[Site("z", 1, 5)] == effects.top(1)[0]


def test_nothing_is_found_in_noise() -> None:
    noise = -2.0 + np.random.default_rng(0).normal(size=(144, 24))
    assert made(noise).significant() == []


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (4, "4 pairs: the smallest p is 0.12, so none can be significant at 0.05, which takes 6"),
        (8, "one cell alone among 12 cannot be significant at 0.05, which takes 9"),
        (9, ""),
    ],
)
def test_too_few_pairs_are_told(pairs: int, message: str) -> None:
    effects = made(np.random.default_rng(0).normal(size=(12, pairs)), sites=HEADS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        effects.significant()
    assert [type(each.message) for each in caught] == [noesis.errors.NoesisWarning] * bool(message)
    assert message in (str(caught[0].message) if caught else "")
    assert message in repr(effects)


def test_print() -> None:
    effects = made(np.vstack([np.full((1, 16), 2.0), np.full((11, 16), -2.0)]), sites=HEADS)
    assert repr(effects).splitlines()[:5] == [
        "Effects of 12 cells on logit difference, denoise, 16 pairs",
        "mean metric: clean 2, corrupted -2",
        "1 of 12 cells differ from 0 (false discovery rate 0.05)",
        "cell   effect  error         p         q",
        "z.0.0       1      0  3.05e-05  0.000366",
    ]
    assert "estimated by attribution patching" in repr(made(effects.patched, estimate="attribution patching"))


@pytest.mark.parametrize(
    ("sites", "rows", "columns", "kind"),
    [
        (HEADS, ["z.0", "z.1", "z.2"], ["0", "1", "2", "3"], "head"),
        (
            [Site("resid_post", layer, None, position) for layer in range(2) for position in (0, 5)],
            ["resid_post.0", "resid_post.1"],
            ["0", "5"],
            "position",
        ),
        (
            [Site("z", 0, head, position) for head in range(2) for position in (0, 5)],
            ["z.0.0", "z.0.1"],
            ["0", "5"],
            "position",
        ),
        (
            [Site(part, layer) for layer in range(2) for part in ("attn", "mlp")],
            ["0", "1"],
            ["attn", "mlp"],
            "component",
        ),
    ],
)
def test_pictures(sites: list[Site], rows: list[str], columns: list[str], kind: str) -> None:
    pytest.importorskip("matplotlib")
    patched = np.random.default_rng(0).normal(size=(len(sites), 8))
    effects = made(patched, sites=sites)
    axes = effects.plot().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == rows
    assert [label.get_text() for label in axes.get_xticklabels()] == columns
    assert axes.get_xlabel() == kind
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(np.sort(shown.ravel()), np.sort(effects.mean))
    assert shown[0, 1] == effects.mean[1]
    if kind == "position":
        labels = effects.plot(tokens=list("abcdef")).axes[0].get_xticklabels()
        assert [label.get_text() for label in labels] == ["a 0", "f 5"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made(np.ones((2, 3)), sites=HEADS), r"patched \(2, 3\) of 12 cells"),
        (lambda: made(np.ones((2, 3)), corrupted=np.ones(2)), r"corrupted \(2,\)"),
        (lambda: made(np.ones((2, 3)), "both"), "direction is 'both'"),
        (lambda: made(np.ones((2, 3)), clean=np.array([1, np.nan, 2])), r"pairs \[1\] is not finite"),
        (lambda: made(np.ones((2, 3)))["resid_post.7"], "'resid_post.7' is no cell.*resid_post.0"),
        (lambda: made(np.ones((2, 3))).significant(5), "q is 5"),
    ],
)
def test_what_does_not_fit_says_so(call: Any, message: str) -> None:
    with pytest.raises(noesis.NoesisError, match=message):
        call()


def test_sites_of_strangers_are_checked() -> None:
    text = made(np.ones((1, 3))).to_json()
    for wrong in ('["zz", 0, null, null, ""]', '["z", "0", null, null, ""]', '["z", 0]', "3"):
        with pytest.raises(noesis.NoesisError, match="is not valid effects"):
            Effects.from_json(text.replace('["resid_post", 0, null, null, ""]', wrong))
