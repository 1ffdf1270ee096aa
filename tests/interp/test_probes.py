"""Probes: planted truth is found, nothing is found in nothing, and what is empty looks empty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler
from torch import nn

from helpers import trained_toys
from helpers.processes import python
from noesis import interp

Floats = NDArray[np.float64]


def noise(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape)


# Planted truth.


def test_a_planted_direction_is_found_in_its_layer_alone() -> None:
    x = noise(300, 10)
    labels = np.where(x @ noise(10, seed=1) > 0, "yes", "no")
    found = interp.probe({"blank": noise(300, 10, seed=2), "planted": x}, labels, against={
        "blank": noise(300, 10, seed=3), "planted": noise(300, 10, seed=4)
    })  # fmt: skip
    assert found.scores[1] > 0.93
    assert abs(found.scores[0] - 0.5) < 0.1
    assert found.q_values.tolist() == [pytest.approx(found.p_values[0], rel=1), 0.01]
    assert found.p_values[0] > 0.05
    assert found.gain[1] > 0.4
    assert found.against_q_values[1] < 1e-6
    assert found.against_q_values[0] > 0.01
    assert "planted" in repr(found)


def test_planted_numbers_are_found() -> None:
    x = noise(200, 6)
    found = interp.probe(torch.tensor(x), x @ noise(6, seed=1) + 0.1 * noise(200, seed=2))
    assert found.task == "numbers"
    assert found.scores[0] > 0.98
    assert found.baseline == pytest.approx(0, abs=0.05)
    assert found.p_values[0] == 1 / 200


@pytest.mark.slow
def test_several_classes_of_the_layers_of_a_run() -> None:
    ids, _ = trained_toys.repeated(12, [24], torch.Generator().manual_seed(0))
    run = interp.run(trained_toys.gpt2(2, seed=0).eval(), {"input_ids": ids}, keep="resid_pre")
    found = interp.probe(run.activations, ids // 16, types=ids, folds=3)
    assert found.layers == ["resid_pre.0", "resid_pre.1"]
    assert (found.samples, found.groups, found.task) == (12 * 48, 12, "classes")
    assert found.scores.min() > found.baseline + 0.3


# Controls.


@pytest.mark.slow
def test_what_is_learned_by_heart_is_not_selective() -> None:
    """Each token has a vector of its own: any label of tokens can be read off it."""
    types = np.random.default_rng(0).integers(0, 12, size=400)
    x = noise(12, 32)[types] + 0.01 * noise(400, 32, seed=1)
    found = interp.probe(x, types % 2, types=types)
    assert found.scores[0] > 0.99
    assert found.control[0] > 0.99
    assert abs(found.selectivity[0]) < 0.02
    # And what the vectors have in common, the control task cannot use.
    few = noise(400, 2, seed=2) + 2.0 * (types % 2)[:, None]
    assert interp.probe(few, types % 2, types=types).selectivity[0] > 0.15


def test_the_naive_claim_is_empty_beside_an_untrained_copy(induction: nn.Module) -> None:
    """'The model knows which token it reads': so do random weights. What an attention head does, they do not."""
    ids, _ = trained_toys.repeated(30, [24], torch.Generator().manual_seed(0))
    before = ids.roll(1, 1)
    both = [
        interp.run(each, {"input_ids": ids}, keep="resid_mid.0") for each in (induction, interp.untrained(induction))
    ]
    ours, theirs = (run.activations for run in both)
    naive = interp.probe(ours, ids % 2, against=theirs, folds=3)
    assert naive.scores[0] - naive.baseline > 0.2
    assert naive.p_values[0] == 1 / 200
    assert naive.gain[0] < 0.0
    assert naive.against_q_values[0] > 0.5
    real = interp.probe(ours, before % 2, against=theirs, folds=3)
    assert real.gain[0] > 0.05
    assert real.against_q_values[0] < 0.001


def test_groups_are_never_split() -> None:
    """Rows are near copies, with a label that means nothing: whoever splits them finds it in the copy."""
    groups = np.arange(40).repeat(5)
    x = noise(40, 60)[groups] + 0.01 * noise(200, 60, seed=1)
    labels = np.random.default_rng(2).integers(0, 2, size=40)[groups]
    assert interp.probe(x, labels).scores[0] > 0.95
    whole = interp.probe(x, labels, groups=groups)
    assert abs(whole.scores[0] - 0.5) < 0.2
    assert whole.p_values[0] > 0.05
    by_row = interp.probe(x.reshape(40, 5, 60), labels.reshape(40, 5))  # rows are groups unless said otherwise
    assert by_row.scores.tolist() == whole.scores.tolist()


def test_what_is_held_out_takes_no_part_in_standardising(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fit = StandardScaler.fit
    monkeypatch.setattr(
        StandardScaler, "fit", lambda self, x, *rest, **more: seen.append(len(x)) or fit(self, x, *rest, **more)
    )
    interp.probe(noise(100, 3), noise(100, seed=1), folds=5)
    assert max(seen) == 80
    assert set(seen) == {80, 53, 54}


# Nothing in nothing.


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classes", "numbers", "groups", "rows"])
def test_p_is_uniform_where_there_is_nothing(task: str) -> None:
    from noesis.interp.probes import _data, _p_value

    found = []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        groups = np.arange(48).repeat(1) if task in ("classes", "numbers") else np.arange(12).repeat(4)
        x = generator.normal(size=(48, 5))
        y = generator.normal(size=48) if task == "numbers" else generator.integers(0, 2, size=48)
        if task == "groups":  # what rows have in common, and labels one to each
            x, y = x + 3 * generator.normal(size=(12, 5))[groups], generator.permutation(12)[groups] % 2
        if task == "rows":  # neighbours are alike, in activations and in labels
            x = x + 3 * generator.normal(size=(12, 5))[groups]
            y = (generator.normal(size=12)[groups] + 0.5 * generator.normal(size=48) > 0).astype(int)
        if len(np.unique(y)) > 1:
            found.append(_p_value(x, _data(y, groups, None, 4, seed)))
    p = np.sort(found)
    assert np.abs(p - (np.arange(len(p)) + 0.5) / len(p)).max() < 1.63 / np.sqrt(len(p))  # Kolmogorov, 1 %


# Bad input, files.


def test_padding_is_left_out_and_said() -> None:
    x = noise(6, 10, 4)
    x[2, 7:] = np.nan
    found = interp.probe(x, (noise(6, 10, seed=1) > 0).astype(int), folds=3)
    assert found.samples == 57
    assert "left out: 3 samples that are not finite" in repr(found)


def test_labels_by_position_cannot_be_shuffled_by_rows_and_it_is_said() -> None:
    position = np.broadcast_to(np.arange(8) % 2, (10, 8))
    found = interp.probe(noise(10, 8, 4), position)
    assert np.isnan(found.p_values[0])
    assert "no p: labels are alike in all groups" in repr(found)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"activations": noise(10, 2), "labels": np.zeros(9, int)}, ValueError, r"labels of shape \[9\]"),
        ({"activations": noise(10, 2), "labels": np.zeros(10, int)}, ValueError, "labels that differ"),
        ({"activations": noise(10, 2), "labels": np.arange(10) % 2, "folds": 11}, ValueError, "folds=11 of 10 groups"),
        ({"activations": noise(10, 2, 2, 2), "labels": np.arange(10) % 2}, ValueError, "Reshape them"),
        ({"activations": {"a": [torch.ones(2, 2)] * 2}, "labels": [0, 1]}, TypeError, "a list of 2 calls"),
        ({"activations": noise(10, 2), "labels": np.full(10, 1j)}, TypeError, "dtype complex"),
        (
            {"activations": {"a": noise(10, 2)}, "labels": np.arange(10) % 2, "against": {"b": noise(10, 2)}},
            ValueError,
            "against has b",
        ),
    ],
)
def test_bad_input_says_what_was_expected(given: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        interp.probe(given.pop("activations"), given.pop("labels"), **given)  # type: ignore[arg-type]


def test_without_scikit_learn_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import numpy as np\nfrom noesis import interp\n"
        "try: interp.probe(np.ones((4, 2)), [0, 1, 0, 1])\n"
        "except ImportError as error: print(error)"
    )
    assert "pip install 'noesis[interp]'" in python("-c", code).stdout


def test_files_and_tables(tmp_path: Path) -> None:
    x = noise(60, 4)
    found = interp.probe({"a": x, "b": x + 1}, x[:, 0] > 0, folds=3)
    for name in ("probe.json", "probe.safetensors"):
        read = interp.Probe.load(found.save(tmp_path / name))
        assert repr(read) == repr(found)
        assert np.array_equal(read.fold_scores, found.fold_scores)
    frame = found.to_dataframe()
    assert frame.layer.tolist() == ["a", "b"]
    assert frame.score.tolist() == found.scores.tolist()
    assert found.plot().axes
    again = interp.probe({"a": x, "b": x + 1}, x[:, 0] > 0, folds=3)
    assert again.to_json() == found.to_json()
