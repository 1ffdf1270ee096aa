"""Token by layer deltas: the measure, the threshold, files and the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import noesis
from noesis.errors import BadFile, BadType, BadValue, MissingFile
from noesis.numerics import cosine_delta
from noesis.results import Activations, TokenDeltas, token_deltas
from noesis.results.tokens import NOISE
from noesis.wrapping import capture

BEFORE = "Once upon a time, there was a little girl named Lily. She loved the big dog."
CHANGED = "Once upon a time, there was a little boy named Lily. She loved the big dog."
INSERTED = "Once upon a time, there was a very little girl named Lily. She loved the big dog."


def acts_of(**layers: Tensor) -> Activations:
    return Activations({name: [tensor] for name, tensor in layers.items()})


def random_pair(tokens: int = 6, width: int = 8) -> tuple[Activations, Activations, list[str]]:
    a, b = (acts_of(x=torch.randn(1, tokens, width), y=torch.randn(1, tokens, width)) for _ in range(2))
    return a, b, [f"t{index}" for index in range(tokens)]


# The measure.


def test_cosine_delta_by_hand() -> None:
    x = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    y = np.array([[7.0, 0.0], [0.0, 3.0], [-2.0, 0.0], [1.0, 1.0], [0.0, 0.0], [5.0, 0.0]])
    expected = [0.0, 1.0, 2.0, 1 - 2**-0.5, 0.0, 1.0]
    np.testing.assert_allclose(cosine_delta(x, y), expected, rtol=0, atol=1e-15)
    np.testing.assert_allclose(cosine_delta(y, x), expected, rtol=0, atol=1e-15)


def test_cosine_delta_is_exact_for_equal_and_near_vectors() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 64))
    assert (cosine_delta(x, x) == 0).all()
    assert (cosine_delta(x, 1024 * x) == 0).all()
    angle = 1e-9  # 1 - cos is 5e-19, far below what 1 - x.y could resolve
    near = cosine_delta(np.array([[1.0, 0.0]]), np.array([[np.cos(angle), np.sin(angle)]]))
    np.testing.assert_allclose(near, angle**2 / 2, rtol=1e-6)


def test_cosine_delta_at_the_ends_of_the_range() -> None:
    for scale in (1e-300, 5e-324, 1e300):
        delta = cosine_delta(np.array([[scale, 0.0]]), np.array([[0.0, scale]]))
        np.testing.assert_allclose(delta, 1.0, rtol=1e-15)
    for bad in (np.nan, np.inf, -np.inf):
        assert np.isnan(cosine_delta(np.array([[bad, 1.0]]), np.array([[1.0, 1.0]]))).all()
        assert np.isnan(cosine_delta(np.array([[0.0, 0.0]]), np.array([[bad, 1.0]]))).all()


def test_agrees_with_torch() -> None:
    a, b, tokens = random_pair()
    deltas = token_deltas(a, b, tokens, tokens)
    for column, name in enumerate(deltas.layers):
        cosine = torch.nn.functional.cosine_similarity(a[name][0][0].double(), b[name][0][0].double(), dim=-1)
        np.testing.assert_allclose(deltas.values[:, column], 1 - cosine.numpy(), atol=1e-12)
    assert deltas.values.shape == (6, 2)
    assert deltas.values.dtype == np.float64


def test_sample_chooses_the_batch_element() -> None:
    hidden = torch.randn(3, 5, 8)
    other = hidden.clone()
    other[1] = torch.randn(5, 8)
    a, b, tokens = acts_of(x=hidden), acts_of(x=other), list("abcde")
    assert token_deltas(a, b, tokens, tokens).scores.max() == 0
    assert token_deltas(a, b, tokens, tokens, sample=1).scores.min() > 0
    assert token_deltas(a, b, tokens, tokens, sample=2).scores.max() == 0
    for sample in (3, -1, True, 0.0):
        with pytest.raises(BadValue, match=r"sample is .* and the batch of a has 3\. Expected .* 0 to 2"):
            token_deltas(a, b, tokens, tokens, sample=sample)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_every_floating_dtype(dtype: torch.dtype) -> None:
    hidden = torch.randn(1, 4, 16)
    a, b = (Activations({"x": [h[:, :3].to(dtype), h[:, 3:].to(dtype)]}) for h in (hidden, -hidden))
    deltas = token_deltas(a, b, list("abcd"), list("abcd"))
    np.testing.assert_allclose(deltas.values, 2.0, atol=1e-12)


# Zero vectors and values that are not finite.


def test_zero_vectors() -> None:
    x, y = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    x[0, :2], y[0, 0] = 0, 0
    deltas = token_deltas(acts_of(x=x), acts_of(x=y), list("abc"), list("abc"))
    assert deltas.values[:2, 0].tolist() == [0.0, 1.0]


def test_nonfinite_is_reported_by_position_and_leads_the_divergent() -> None:
    hidden = torch.randn(1, 4, 8)
    broken, worse = hidden.clone(), hidden.clone()
    broken[0, 2, 5] = float("nan")
    worse[0, 3, 0], worse[0, 1] = float("inf"), -worse[0, 1]
    a, b = acts_of(x=hidden, y=hidden), acts_of(x=broken, y=worse)
    deltas = token_deltas(a, b, list("pqrs"), list("pqrs"))
    assert deltas.nonfinite == [(2, 2, "x"), (3, 3, "y")]
    assert [(one.token, one.layer) for one in deltas.divergent] == [("r", "x"), ("s", "y"), ("q", "y")]
    assert np.isnan(deltas.divergent[0].delta)
    assert "not finite: 2 of 8 deltas, first at 2 in a, 2 in b, layer x" in repr(deltas)
    everything = token_deltas(acts_of(x=hidden * float("nan")), a, list("pqrs"), list("pqrs"))
    assert len(everything.nonfinite) == len(everything.divergent) == 4


# The threshold.


def deltas_with(scores: list[float]) -> TokenDeltas:
    """Two runs whose hidden states differ by the given 1 - cosine."""
    angle = torch.tensor(scores, dtype=torch.float64).mul(-1).add(1).acos()
    x = torch.stack([torch.ones_like(angle), torch.zeros_like(angle)], dim=-1)[None]
    y = torch.stack([angle.cos(), angle.sin()], dim=-1)[None]
    tokens = list(range(len(scores)))
    return token_deltas(acts_of(x=x), acts_of(x=y), tokens, tokens)


def test_equal_runs_have_no_divergent_tokens() -> None:
    a, _, tokens = random_pair()
    deltas = token_deltas(a, a, tokens, tokens)
    assert deltas.divergent == []
    assert deltas.threshold == NOISE
    assert (deltas.values == 0).all()


def test_threshold_is_the_robust_outlier_rule() -> None:
    scores = [0.010, 0.012, 0.011, 0.013, 0.012, 0.5, 0.011, 0.3]
    deltas = deltas_with(scores)
    median = np.median(scores)
    mad = np.median(np.abs(np.array(scores) - median))
    assert deltas.threshold == pytest.approx(median + 3 * 1.4826 * mad, rel=1e-9)
    assert [one.token for one in deltas.divergent] == [5, 7]
    assert [one.delta for one in deltas.divergent] == pytest.approx([0.5, 0.3])


def test_threshold_fires_where_the_change_is_too_broad_for_outliers() -> None:
    # Half the tokens moved: median and MAD are 0.25, and the outlier rule alone would ask for more than 1.3.
    deltas = deltas_with([0.0] * 4 + [0.5, 0.49, 0.48, 0.1])
    assert deltas.threshold == pytest.approx(0.25, abs=0.01)
    assert [one.token for one in deltas.divergent] == [4, 5, 6]


@given(st.lists(st.floats(0, 2), min_size=1, max_size=12))
def test_something_is_divergent_exactly_when_something_exceeds_the_noise(scores: list[float]) -> None:
    deltas = deltas_with(scores)
    assert bool(deltas.divergent) == bool(deltas.scores.max() > NOISE)
    found = [one.delta for one in deltas.divergent]
    assert found == sorted(found, reverse=True)


def test_noise_grows_with_the_coarser_dtype() -> None:
    hidden = torch.randn(1, 4, 256)
    tilted = hidden + 1e-2 * torch.randn(1, 4, 256)  # 1 - cosine of about 5e-5
    tokens = list("abcd")
    half = token_deltas(acts_of(x=hidden.bfloat16()), acts_of(x=tilted), tokens, tokens)
    assert half.threshold == torch.finfo(torch.bfloat16).eps ** 2
    assert token_deltas(acts_of(x=hidden), acts_of(x=tilted), tokens, tokens).divergent


def test_fixed_threshold() -> None:
    a, b, tokens = random_pair()
    assert len(token_deltas(a, b, tokens, tokens, threshold=0).divergent) == 6
    assert token_deltas(a, b, tokens, tokens, threshold=2.0).divergent == []
    for value in (-0.1, 2.1, float("nan")):
        with pytest.raises(BadValue, match=r"threshold is .*Expected a number from 0 to 2\. Leave it out"):
            token_deltas(a, b, tokens, tokens, threshold=value)
    with pytest.raises(BadType, match=r"threshold is '0\.1'"):
        token_deltas(a, b, tokens, tokens, threshold="0.1")  # type: ignore[arg-type]


# Layers and tokens that do not match.


def test_layers_are_matched_by_name() -> None:
    hidden = {name: torch.randn(1, 3, 4) for name in "xyz"}
    a = Activations({"x": [hidden["x"]], "y": [hidden["y"]], "idle": []})
    b = Activations({"z": [hidden["z"]], "y": [hidden["y"]], "idle": [hidden["z"]]})
    deltas = token_deltas(a, b, [1, 2, 3], [1, 2, 3])
    assert (deltas.layers, deltas.only_in_a, deltas.only_in_b) == (["y"], ["x"], ["z", "idle"])
    assert deltas.scores.max() == 0
    assert "layers only in b: z, idle" in repr(deltas)


def test_nothing_in_common() -> None:
    a, b, tokens = random_pair()
    with pytest.raises(BadValue, match=r"share no layer: a has x, y, b has q\. Expected .*same layers\."):
        token_deltas(a, acts_of(q=torch.ones(1, 6, 8)), tokens, tokens)
    with pytest.raises(BadValue, match=r"share no token: a begins with \['t0'.*b with \[0, 1, 2, 3\].*same tokenizer"):
        token_deltas(a, b, tokens, list(range(6)))


def test_lengths_that_do_not_fit_say_both_numbers() -> None:
    a, b, tokens = random_pair()
    message = r"tokens_b has 7 tokens and layer 'x' of b saw 6\. Expected one token per position.*special tokens"
    with pytest.raises(BadValue, match=message):
        token_deltas(a, b, tokens, [*tokens, "more"])


def test_widths_and_shapes_that_do_not_fit() -> None:
    a, tokens = acts_of(x=torch.ones(1, 2, 4)), ["s", "t"]
    with pytest.raises(BadValue, match=r"layer 'x' is 4 wide in a and 5 in b"):
        token_deltas(a, acts_of(x=torch.ones(1, 2, 5)), tokens, tokens)
    with pytest.raises(BadValue, match=r"calls of layer 'x' have shapes 1x2x3x4 .*\[batch, tokens, width\]"):
        token_deltas(a, acts_of(x=torch.ones(1, 2, 3, 4)), tokens, tokens)


@pytest.mark.parametrize("tokens", ["text", b"text", [1.5, 2.0], [[1, 2]], 3, torch.ones(1, 2).long(), None])
def test_tokens_of_a_wrong_kind(tokens: Any) -> None:
    a = acts_of(x=torch.ones(1, 2, 4))
    with pytest.raises(BadType, match=r"tokens_a is .*flat sequence of tokens.*convert_ids_to_tokens"):
        token_deltas(a, a, tokens, [1, 2])


def test_ids_may_come_as_arrays() -> None:
    a, b, _ = random_pair(tokens=3)
    expected = token_deltas(a, b, [5, 6, 7], [5, 6, 7])
    for ids in (torch.tensor([5, 6, 7]), np.array([5, 6, 7]), list(np.array([5, 6, 7])), (5, 6, 7)):
        deltas = token_deltas(a, b, ids, ids)  # type: ignore[arg-type]
        assert deltas.tokens == [5, 6, 7]
        assert deltas.to_json() == expected.to_json()


# Showing and files.


def example() -> TokenDeltas:
    hidden = torch.randn(1, 5, 8)
    other = torch.cat([hidden[:, :2], torch.randn(1, 3, 8)], dim=1)
    broken = other.clone()
    broken[0, 4, 0] = float("nan")
    a, b = acts_of(one=hidden, two=hidden, left=hidden), acts_of(one=other, two=broken)
    return token_deltas(a, b, ["<s>", "$a$", "cat", "\n", "."], ["<s>", "$a$", "猫", "\n", "."])


def test_repr() -> None:
    a = acts_of(block=torch.eye(4)[None, :3])
    b = acts_of(block=torch.eye(4)[None, [0, 3, 1, 1]])
    assert repr(token_deltas(a, b, ["a", "cat", "sat"], ["a", "big", "cat", "sat"])).splitlines() == [
        "TokenDeltas of 3 aligned tokens x 1 layer",
        "tokens only in b: 'big' at 1",
        "1 divergent token (mean 1 - cosine above 1e-06)",
        "token  a  b  delta  most at",
        "'sat'  2  3      1    block",
    ]
    many = token_deltas(
        acts_of(x=torch.randn(1, 99, 8)), acts_of(x=torch.randn(1, 99, 8)), range(99), range(99), threshold=0
    )
    assert repr(many).splitlines()[-1] == "... 87 more"


@pytest.mark.parametrize("name", ["deltas.json", "deltas.json.gz"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    deltas = example()
    assert deltas.save(tmp_path / name) == tmp_path / name
    loaded = TokenDeltas.load(tmp_path / name)
    np.testing.assert_array_equal(loaded.values, deltas.values)
    assert np.isnan(loaded.values).any()
    assert repr(loaded) == repr(deltas)
    assert loaded.to_json() == deltas.to_json()
    assert loaded.substituted == deltas.substituted == [False, False, True, False, False]
    assert (loaded.only_in_a, loaded.only_in_b) == (["left"], [])


def test_json_is_strict_and_names_its_format() -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    payload = json.loads(example().to_json(), parse_constant=refuse)
    assert payload["format"] == "noesis.token_deltas"
    assert payload["format_version"] == 1
    assert payload["values"][3] != payload["values"][0]


BROKEN = {
    "another kind": {"format": "noesis.trace"},
    "another version": {"format_version": 2},
    "ragged values": {"values": [[0.0], [0.0, 1.0]]},
    "text values": {"values": "text"},
    "infinite values": {"values": [[float("inf")] * 2] * 4},
    "negative values": {"values": [[-1.0] * 2] * 4},
    "fewer values": {"values": [[0.0, 0.0]]},
    "no positions": {"positions_a": [], "positions_b": [], "values": []},
    "positions beyond": {"positions_a": [0, 1, 3, 9]},
    "positions descending": {"positions_a": [1, 0, 3, 4]},
    "positions negative": {"positions_a": [-1, 1, 3, 4]},
    "positions of text": {"positions_a": ["0", "1", "3", "4"]},
    "unequal tokens": {"positions_a": [0, 1, 2, 4]},
    "tokens of lists": {"tokens_a": [[0], [1], [2], [3], [4]]},
    "layers of numbers": {"layers": [1, 2]},
    "a huge threshold": {"threshold": 1e300},
    "no threshold": {"threshold": None},
    "no layers": {"layers": None},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "deltas.json"
    payload = json.loads(example().to_json())
    path.write_text(json.dumps(payload))
    TokenDeltas.load(path)  # unchanged, it loads
    path.write_text(json.dumps({**payload, **change}))
    with pytest.raises(BadFile, match=r"deltas\.json"):
        TokenDeltas.load(path)


def test_truncated_missing_and_misnamed_files(tmp_path: Path) -> None:
    path = example().save(tmp_path / "deltas.json")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadFile, match="not readable JSON"):
        TokenDeltas.load(path)
    with pytest.raises(MissingFile, match="not there"):
        TokenDeltas.load(tmp_path / "none.json")
    with pytest.raises(BadValue, match=r"suffix '\.safetensors'"):
        example().save(tmp_path / "deltas.safetensors")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    deltas = example()
    figure = deltas.plot(tmp_path / "deltas.png")
    assert (tmp_path / "deltas.png").read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["<s>", "$a$", "'cat' -> '猫'", "·", "."]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    bold = {deltas.tokens[at] for at, label in enumerate(axes.get_xticklabels()) if label.get_fontweight() == "bold"}
    assert bold == {one.token for one in deltas.divergent}
    np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), np.nan), deltas.values.T)
    assert not any(label.get_parse_math() for label in axes.get_xticklabels())  # "$a$" is no formula
    assert not axes.lines  # nothing was left out: "cat" is compared with its rival
    assert axes.get_title(loc="right") == "red: not finite"


def test_plot_marks_what_was_left_out_of_either_run() -> None:
    pytest.importorskip("matplotlib")
    shorter, longer = acts_of(x=torch.ones(1, 3, 4)), acts_of(x=torch.ones(1, 4, 4))
    for a, b in (([1, 2, 3], [1, 9, 2, 3]), ([1, 9, 2, 3], [1, 2, 3])):
        runs = [longer if len(tokens) == 4 else shorter for tokens in (a, b)]
        axes = token_deltas(*runs, a, b).plot().axes[0]
        assert [line.get_xdata()[0] for line in axes.lines] == [0.5]


@pytest.mark.slow
def test_plot_of_many_tokens_equal_runs_and_other_formats(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    hidden = acts_of(x=torch.randn(1, 2000, 4))
    deltas = token_deltas(hidden, hidden, range(2000), range(2000))
    figure = deltas.plot(tmp_path / "deltas.svg")
    assert b"<svg" in (tmp_path / "deltas.svg").read_bytes()
    assert len(figure.axes[0].get_xticklabels()) == 200
    assert figure.get_figwidth() <= 42
    with pytest.raises(BadValue, match=r"suffix '\.exe'"):
        deltas.plot(tmp_path / "deltas.exe")
    assert not (tmp_path / "deltas.exe").exists()


# Real language models.


def run(model: Any, tokenizer: Any, text: str) -> tuple[Activations, list[str]]:
    ids = tokenizer(text, return_tensors="pt").input_ids
    with capture(model, "blocks") as acts, torch.no_grad():
        model(ids)
    return acts, tokenizer.convert_ids_to_tokens(ids[0])


@pytest.fixture(scope="module")
def stories(data: Path) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    folder = data / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.data
def test_the_same_prompt_twice(stories: tuple[Any, Any]) -> None:
    a, tokens = run(*stories, BEFORE)
    b, _ = run(*stories, BEFORE)
    deltas = token_deltas(a, b, tokens, tokens)
    assert deltas.values.shape == (24, 5)
    assert (deltas.values == 0).all()
    assert deltas.divergent == []
    assert deltas.tokens_only_in_a == deltas.tokens_only_in_b == []


@pytest.mark.data
def test_a_changed_word(stories: tuple[Any, Any]) -> None:
    a, tokens_a = run(*stories, BEFORE)
    b, tokens_b = run(*stories, CHANGED)
    deltas = token_deltas(a, b, tokens_a, tokens_b)
    assert deltas.tokens_only_in_a == deltas.tokens_only_in_b == []
    assert np.flatnonzero(deltas.substituted).tolist() == [10, 11, 12]  # "girl", "boy"
    before = np.array(deltas.positions_a) < 10
    assert before.sum() == 10
    assert deltas.values[before].max() < 1e-12  # causal
    assert (deltas.values[~before] > 1e-9).all()
    first = deltas.divergent[0]
    assert deltas.substituted[first.position_a]
    assert len(deltas.divergent) < (~before).sum()  # the threshold picks


@pytest.mark.data
def test_an_inserted_word_does_not_misalign_what_follows(stories: tuple[Any, Any]) -> None:
    a, tokens_a = run(*stories, BEFORE)
    b, tokens_b = run(*stories, INSERTED)
    deltas = token_deltas(a, b, tokens_a, tokens_b)
    assert deltas.tokens_only_in_a == []
    assert deltas.tokens_only_in_b == [(9, "▁very")]
    assert deltas.tokens == tokens_a
    assert [j - i for i, j in zip(deltas.positions_a, deltas.positions_b, strict=True)] == [0] * 9 + [1] * 15
    assert deltas.values[:9].max() < 1e-12
    assert deltas.divergent[0].position_a in (9, 10)
    # By position, every token after the insertion would be compared with its neighbour.
    shifted = cosine_delta(*(acts["model.layers.0"][0][0, 9:24].double().numpy() for acts in (a, b)))
    assert deltas.values[9:, 0].mean() < 0.1 * shifted.mean()


@pytest.mark.data
def test_generated_tokens(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with capture(model) as acts:
        out = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)[0].tolist()
    assert token_deltas(acts, acts, out[:-1], out[:-1]).divergent == []
    with pytest.raises(
        BadValue, match=r"tokens_a has 10 tokens and layer 'model\.layers\.0' of a saw 9\..*last generated"
    ):
        token_deltas(acts, acts, out, out)


def test_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    runs = []
    for ids in ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 60, 6, 7, 8]):
        with noesis.capture(model, layers="blocks") as acts, torch.no_grad():
            model(torch.tensor([ids]))
        runs.append((acts, ids))
    (a, ids_a), (b, ids_b) = runs
    deltas = noesis.token_deltas(a, b, ids_a, ids_b)
    assert deltas.layers == [f"transformer.h.{index}" for index in range(3)]
    assert np.flatnonzero(deltas.substituted).tolist() == [4]
    assert deltas.values[:4].max() < 1e-12
    assert (deltas.values[4:] > 1e-9).all()
    assert {one.token for one in deltas.divergent} <= {5, 6, 7, 8}
    assert deltas.divergent


# Substituted tokens.


def words(a: str, b: str, **options: Any) -> TokenDeltas:
    """Deltas of two texts, in whose hidden states each word has a direction of its own."""
    texts = a.split(), b.split()
    names = sorted({*texts[0], *texts[1]})
    states = [torch.eye(len(names))[None, [names.index(word) for word in text]] for text in texts]
    return token_deltas(*(Activations({"block": [state]}) for state in states), *texts, **options)


@pytest.mark.parametrize(
    ("a", "b", "pairs"),  # upper case: what has no partner or another one
    [
        ("the big DOG", "the big CAT", [(0, 0), (1, 1), (2, 2)]),
        ("A dog saw TWO cats NOW", "ONE dog saw SIX cats THEN", [(n, n) for n in range(6)]),
        ("the DOG ran home", "the CAT ran straight HOME home", [(0, 0), (1, 1), (2, 2), (3, 5)]),
        ("we saw big DOGS there", "we NEVER saw big CATS there", [(0, 0), (1, 2), (2, 3), (3, 4), (4, 5)]),
        ("a B C d", "a X Y d", [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ("a B C d E", "a X d Y", [(0, 0), (3, 2), (4, 3)]),  # two for one are not aligned
        ("DOG", "CAT", [(0, 0)]),
    ],
)
def test_as_many_other_tokens_are_aligned_by_position_and_marked(a: str, b: str, pairs: list[tuple[int, int]]) -> None:
    deltas = words(a, b)
    assert list(zip(deltas.positions_a, deltas.positions_b, strict=True)) == pairs
    marked = [a.split()[i] != b.split()[j] for i, j in pairs]
    assert deltas.substituted == marked
    assert [one.position_a for one in deltas.divergent] == [
        i for (i, _), other in zip(pairs, marked, strict=True) if other
    ]
    assert deltas.scores.tolist() == [float(other) for other in marked]
    back = words(b, a)
    assert list(zip(back.positions_b, back.positions_a, strict=True)) == pairs


def test_substitutions_are_told_drawn_and_saved(tmp_path: Path) -> None:
    deltas = words("the big dog", "the big cat")
    assert "substituted: 'dog' -> 'cat' at 2" in repr(deltas)
    assert "1 divergent token" in repr(deltas)
    again = TokenDeltas.load(deltas.save(tmp_path / "deltas.json"))
    assert (again.substituted, repr(again)) == ([False, False, True], repr(deltas))
    assert deltas.to_csv().splitlines()[-1] == "dog,cat,2,2,block,1.0"
    payload = json.loads(deltas.to_json())
    for wrong in ([False] * 3, [True] * 3, "yes"):
        with pytest.raises(BadFile, match="not said to be substituted"):
            TokenDeltas.from_json(json.dumps({**payload, "substituted": wrong}))
    pytest.importorskip("matplotlib")
    axes = deltas.plot().axes[0]
    assert "'dog' -> 'cat'" in axes.get_xticklabels()[-1].get_text()
    assert axes.get_xticklabels()[-1].get_fontweight() == "bold"
    assert "1 substituted" in axes.get_title(loc="left") + axes.get_title()


def test_alignment_by_position_throughout() -> None:
    deltas = words("a dog sat here", "big dog dog sat here now", by_position=True)
    assert deltas.positions_a == deltas.positions_b == [0, 1, 2, 3]
    assert deltas.substituted == [True, False, True, True]
    assert deltas.tokens_only_in_b == [(4, "here"), (5, "now")]
    assert words("a b", "b a", by_position=True).substituted == [True, True]
