"""Calibrate a model, judge its inputs: real forwards of small real models."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import noesis
from noesis.errors import NoesisError


class Net(nn.Module):
    """Two convolutions, a dropout, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 8, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x, shallow: bool = False):
        x = self.norm(self.conv(x)).relu()
        x = self.drop(self.deep(x).relu()).mean((2, 3)) if not shallow else x.mean((2, 3))[:, [0, 1, 2, 3, 4, 5, 0, 1]]
        return self.head(x)


LAYERS = ["conv", "deep"]


def normal(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator).cumsum(2) * 0.3


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def wrapped(net: Net) -> noesis.Wrapped:
    made = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(), logits="head")
    made.calibrate(list(normal(600).split(64)), progress=False)
    return made


# ---------------------------------------------------------------- judging


def test_strange_inputs_are_told_apart_and_located(wrapped: noesis.Wrapped) -> None:
    wrapped(torch.cat([normal(6, seed=1), normal(3, seed=2) * 40, torch.rand(3, 1, 8, 8) * 6]))
    surprise = wrapped.surprise()
    assert len(surprise) == 12
    assert list(surprise.layers) == ["conv", "deep", "input of head"]
    assert surprise.score[6:].min() > surprise.score[:6].max()
    assert (surprise.p_value[6:] == 1 / 101).all()
    assert surprise.is_ood(0.02).tolist() == [False] * 6 + [True] * 6
    assert surprise.is_ood(0.05, method="batch")[6:].all()
    np.testing.assert_allclose(surprise.percentile, 100 * (1 - surprise.p_value))
    reasons = surprise.explain(7)
    assert [reason.surprisal for reason in reasons] == sorted((r.surprisal for r in reasons), reverse=True)
    assert reasons[0].p_value == pytest.approx(1 / 101)
    assert {reason.layer for reason in surprise.explain(7, most=9)} == {*surprise.layers, "logits"}
    assert "norm" in {reason.largest for reason in reasons}
    assert "most surprised layers" in repr(surprise)


def test_no_sample_depends_on_the_others(wrapped: noesis.Wrapped) -> None:
    x = normal(5, seed=3)
    wrapped(x)
    together = wrapped.surprise()
    alone = []
    for row in x:
        wrapped(row[None])
        alone.append(wrapped.surprise().score[0])
    np.testing.assert_allclose(together.score, alone, rtol=1e-4, atol=1e-3)
    bad = torch.cat([x, torch.full((1, 1, 8, 8), torch.nan), x * 1e4])
    wrapped(bad)
    np.testing.assert_allclose(wrapped.surprise().score[:5], together.score, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("distinct", [1, 2, 5, 20])
def test_rounding_makes_no_input_a_stranger(distinct: int) -> None:
    """A batch of one is rounded otherwise than one of 64; with few distinct calibration inputs p is all or nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    wrapped = noesis.wrap(model, layers="blocks", codebook=noesis.Codebook(), logits="4")
    known, other = torch.randn(distinct, 64), torch.randn(9, 64)
    wrapped.calibrate(list(known.repeat(600 // distinct, 1).split(64)), progress=False)

    def judged(x: torch.Tensor, batch: int) -> np.ndarray:
        found = []
        for part in x.split(batch):
            wrapped(part)
            found.append(wrapped.surprise().p_value)
        return np.concatenate(found)

    whole = judged(known.repeat(64, 1)[:64], 64)[:distinct]
    assert whole.mean() > 0.4
    for batch in (1, 3):
        np.testing.assert_allclose(judged(known, batch), whole)
        assert (judged(other, batch) == 1 / 101).all()


def test_coarser_rounding_is_not_allowed_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    wrapped = noesis.wrap(model, layers="blocks", codebook=noesis.Codebook())
    known = torch.randn(2, 64)
    wrapped.calibrate(list(known.repeat(300, 1).split(60)), progress=False)
    wrapped(known)
    assert wrapped.surprise().p_value.min() > 0.3
    with torch.autocast("cpu", torch.bfloat16):
        wrapped(known)
    assert (wrapped.surprise().p_value == 1 / 101).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_never_normal(wrapped: noesis.Wrapped, value: float) -> None:
    x = normal(3, seed=4)
    x[1, 0, 2, 2] = value
    wrapped(x)
    surprise = wrapped.surprise()
    assert surprise.score[1] == np.inf
    assert surprise.p_value[1] == 1 / 101
    assert np.isfinite(surprise.score[[0, 2]]).all()
    assert "inf" in repr(surprise)


def test_scores_rise_as_inputs_grow_or_fade(wrapped: noesis.Wrapped) -> None:
    def median(scale: float) -> float:
        wrapped(normal(50, seed=5) * scale)
        return float(np.median(wrapped.surprise().score))

    growing = [median(scale) for scale in (1, 10, 100, 1000)]
    assert growing == sorted(growing)
    assert median(0.1) > median(1)
    assert median(0.01) > median(0.1)


def test_the_latest_forward_is_judged_and_nothing_stale(wrapped: noesis.Wrapped) -> None:
    wrapped(normal(7, seed=1))
    first = wrapped.surprise()
    np.testing.assert_array_equal(wrapped.surprise().score, first.score)  # asking twice changes nothing
    wrapped(normal(4, seed=2))
    assert len(wrapped.surprise()) == 4
    wrapped(normal(4, seed=2), shallow=True)
    assert "deep" not in wrapped.surprise().layers
    with wrapped.paused():
        wrapped(normal(2, seed=1))
    assert "deep" not in wrapped.surprise().layers  # still of the forward before
    wrapped.reset()
    with pytest.raises(NoesisError, match="No layer left vectors in the latest forward"):
        wrapped.surprise()
    wrapped.every = 2
    wrapped(normal(2, seed=1))
    assert len(wrapped.surprise()) == 2
    wrapped(normal(3, seed=1))
    with pytest.raises(NoesisError, match="every= leave forwards out"):
        wrapped.surprise()


def test_without_a_layer_that_counts_there_is_no_p_value(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook())
    wrapped.calibrate([normal(300)], progress=False)
    wrapped(normal(4), shallow=True)
    partly = wrapped.surprise()
    assert list(partly.layers) == ["conv"]
    assert partly.absent == ["deep"]
    assert len(partly.score) == 4
    with pytest.raises(NoesisError, match="deep did not run in this forward"):
        _ = partly.p_value


def test_before_calibration_there_are_scores_alone(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook())
    with pytest.raises(NoesisError, match="No layer left vectors"):
        wrapped.surprise()
    wrapped(normal(64))
    wrapped.surprise()
    wrapped(torch.cat([normal(2, seed=1), normal(2, seed=1) * 100]))
    surprise = wrapped.surprise()
    assert surprise.score[2:].min() > surprise.score[:2].max()
    assert "no p-values yet" in repr(surprise)
    for ask in (lambda: surprise.p_value, surprise.is_ood, lambda: surprise.explain(0)):
        with pytest.raises(NoesisError, match="calibrate"):
            ask()


def test_a_call_and_its_scores(wrapped: noesis.Wrapped) -> None:
    output, trace = wrapped.forward_with_trace(normal(3, seed=1))
    assert output.shape == (3, 3)
    assert trace.surprise is not None
    assert len(trace.surprise) == 3
    assert set(trace.surprise.layers) == {"conv", "deep", "input of head"}


def test_a_call_too_small_to_be_judged_still_gives_its_output(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(), logits="head")
    output, trace = wrapped.forward_with_trace(normal(3, seed=1))
    assert output.shape == (3, 3)
    assert trace.surprise is None
    assert len(trace) == 1
    with pytest.raises(NoesisError, match="no codes yet, and 3 vectors of conv"):
        wrapped.surprise()
    assert wrapped.forward_with_trace(normal(40))[1].surprise is not None


def test_train_mode_is_warned_of_once(wrapped: noesis.Wrapped, net: Net) -> None:
    def judge() -> list[str]:
        wrapped(normal(3))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped.surprise()
        return [str(warning.message) for warning in caught if warning.category is noesis.NoesisWarning]

    assert judge() == []
    net.train()
    net.norm.eval()
    net.drop.p = 0.0
    assert judge() == []  # nothing in it behaves otherwise
    net.drop.p = 0.5
    (said,) = judge()
    assert said.startswith("drop is in train mode, and calibrate() ran in eval mode")
    assert judge() == []
    fresh = noesis.wrap(Net(), layers=LAYERS, codebook=noesis.Codebook())
    fresh(normal(64))
    fresh.surprise()  # without a calibration there is nothing to differ from
    fresh.calibrate([normal(200)], progress=False)
    fresh(normal(3))
    with pytest.warns(noesis.NoesisWarning, match="norm is in train mode"):
        fresh.surprise()


# ---------------------------------------------------------------- calibrating


def test_calibration_leaves_the_model_as_it_was(net: Net) -> None:
    net.train()
    net.norm.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(), logits="head")
    wrapped(normal(4))
    rng, rows = torch.get_rng_state(), wrapped.trace().values
    calibration = wrapped.calibrate(list(normal(300).split(50)), progress=False)
    assert net.training
    assert net.drop.training
    assert not net.norm.training
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    np.testing.assert_array_equal(wrapped.trace().values, rows)
    assert calibration.samples == (200, 50, 50)
    assert "300 samples: 200 fitted the codes, 50 rank the layers, 50 give the p-values" in repr(calibration)
    assert len(list(wrapped.parameters())) == len(list(net.parameters()))


BATCHES = {
    "tensors": lambda x: list(x.split(64)),
    "pairs": lambda x: [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(64)],
    "lists": lambda x: [[part] for part in x.split(64)],
    "arguments": lambda x: [{"x": part} for part in x.split(64)],
    "generator": lambda x: (part for part in x.split(64)),
    "a DataLoader": lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=64),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_kinds_of_batches(net: Net, kind: str) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook())
    assert sum(wrapped.calibrate(BATCHES[kind](normal(200)), progress=False).samples) == 200


def test_other_batches_need_forward(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook())
    batches = [(part, 1, 2) for part in normal(200).split(50)]
    with pytest.raises(NoesisError, match=r"tuple of 3.*forward=lambda"):
        wrapped.calibrate(batches, progress=False)
    made = wrapped.calibrate(batches, forward=lambda model, batch: model(batch[0]), progress=False)
    assert sum(made.samples) == 200


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ([], "The loader is empty"),
        (list(normal(100).split(50)), "gave 100 samples"),
        (normal(200), r"Pass \[batch\]"),
        (3, "an iterable of batches"),
        (["text"], "A batch is a str"),
        ([normal(200)], r"calibrate\(forward=3\)"),
    ],
)
def test_bad_loaders(net: Net, loader, said: str) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook())
    with pytest.raises(NoesisError, match=said):
        wrapped.calibrate(loader, progress=False, forward=3 if "forward" in said else None)
    assert wrapped.calibration is None


def test_labels_make_a_code_per_class(net: Net) -> None:
    x = normal(300)
    labels = torch.arange(300) % 5
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(), logits="head")
    batches = list(zip(x.split(50), labels.split(50), strict=True))
    wrapped.calibrate(batches, labels=True, progress=False)
    assert {len(book.codes) for book in wrapped.codebooks.values()} == {5}
    wrapped.calibrate(batches, progress=False)
    assert {len(book.codes) for book in wrapped.codebooks.values()} == {28}  # 2 sqrt(200)
    with pytest.raises(NoesisError, match="labels=True, and a batch without labels"):
        wrapped.calibrate(list(x.split(50)), labels=True, progress=False)
    with pytest.raises(NoesisError, match="with labels float32"):
        wrapped.calibrate([(x, torch.zeros(300))], labels=True, progress=False)


def test_classes_that_all_have_enough_are_saved_and_loaded(tmp_path: Path) -> None:
    def made() -> noesis.Wrapped:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2, bias=False))
        with torch.no_grad():
            model[0].bias.zero_()
            model[2].weight[1] = -model[2].weight[0]
        return noesis.wrap(model, layers=["0"], codebook=noesis.Codebook(), logits="2")

    wrapped, again = made(), made()
    calibration = wrapped.calibrate([torch.randn(400, 4)], by_class=True, progress=False)
    assert set(calibration.classes) == {-1, 0, 1}
    assert len(calibration.classes[-1]) == 0
    again(torch.randn(3, 4))
    again.load_calibration(wrapped.save_calibration(tmp_path / "c.safetensors"))
    x = torch.randn(20, 4)
    np.testing.assert_array_equal(*(each.judge(x).surprise.p_value for each in (wrapped, again)))


def test_classes_have_p_values_of_their_own(net: Net) -> None:
    with torch.no_grad():
        net.head.bias.copy_(torch.tensor([0.0, 0.0, -100.0]))
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(), logits="head")
    calibration = wrapped.calibrate([normal(900)], by_class=True, progress=False)
    assert set(calibration.classes or {}) <= {-1, 0, 1}
    assert calibration.classes
    wrapped(normal(400, seed=9))
    assert (wrapped.surprise().p_value <= 0.1).mean() == pytest.approx(0.1, abs=0.06)
    unaware = noesis.wrap(Net(), layers=LAYERS, codebook=noesis.Codebook())
    with pytest.raises(NoesisError, match="by_class=True without logits"):
        unaware.calibrate([normal(200)], by_class=True)


def test_a_forward_before_calibration_is_no_part_of_it(net: Net) -> None:
    scores = []
    for before in (False, True):
        wrapped = noesis.wrap(copy.deepcopy(net), layers=LAYERS, codebook=noesis.Codebook(), logits="head")
        if before:
            wrapped(100 + torch.zeros(64, 1, 8, 8))
        scores.append(wrapped.calibrate(list(normal(300).split(64)), progress=False).scores)
    np.testing.assert_array_equal(*scores)


def test_each_batch_is_one_forward(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook())
    for forward in (lambda model, batch: None, lambda model, batch: [model(part) for part in batch.split(20)]):
        with pytest.raises(NoesisError, match="one forward of the whole batch"):
            wrapped.calibrate(list(normal(200).split(40)), forward=forward, progress=False)


def test_logits_that_do_not_come_are_an_error(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(), logits=lambda output: output["logits"])
    with pytest.raises(NoesisError, match=r"logits of 0 of 200 samples: (IndexError|TypeError)"):
        wrapped.calibrate([normal(200)], progress=False)


def test_a_layer_left_out_of_the_calibration_does_not_matter_later(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook())
    wrapped.calibrate([normal(200)], forward=lambda model, batch: model(batch, shallow=True), progress=False)
    wrapped(normal(3))
    assert list(wrapped.surprise().layers) == ["conv"]


def test_learning_on_makes_the_calibration_void(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(size=8, dim=4, learn="gradient"))
    wrapped(normal(64))
    wrapped.coding_loss()
    wrapped.calibrate([normal(200)], progress=False)
    wrapped(normal(3))
    assert len(wrapped.surprise().p_value) == 3
    wrapped.coding_loss()
    with pytest.raises(NoesisError, match="calibrate"):
        _ = wrapped.surprise().p_value


def test_labels_do_not_go_with_codes_that_were_learned(net: Net) -> None:
    x, labels = normal(300), torch.arange(300) % 5
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(size=8, dim=4, learn="gradient"))
    wrapped.calibrate([(x, labels)], labels=True, progress=False)  # nothing was learned
    assert len(wrapped.codebooks["deep"].codes) == 5
    with pytest.raises(NoesisError, match="labels=True, and codes that were learned"):
        wrapped.calibrate([(x, labels)], labels=True, progress=False)


def test_codes_that_an_optimiser_holds_keep_their_size(net: Net, wrapped: noesis.Wrapped, tmp_path) -> None:
    path = wrapped.save_calibration(tmp_path / "calibration.safetensors")
    wrapped.unwrap()
    learning = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(size=8, dim=4, learn="ema"), logits="head")
    learning(normal(64))
    learning.coding_loss()
    codes = learning.codebooks["conv"].codes
    learning.codebook_parameters()
    with pytest.raises(NoesisError, match=r"codes \[40, 12\] for conv, and an optimiser may hold \[8, 4\]"):
        learning.load_calibration(path)
    assert learning.codebooks["conv"].codes is codes
    assert codes.shape == (8, 4)
    learning.unwrap()
    fresh = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(learn="ema"), logits="head")
    parameters = fresh.codebook_parameters()
    fresh.load_calibration(path)
    assert parameters[1].shape == (40, 12)


@pytest.mark.parametrize("learn", ["gradient", "ema"])
def test_learning_may_begin_with_a_batch_of_one(learn: str) -> None:
    torch.manual_seed(0)
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(16, 300)), codebook=noesis.Codebook(size=8, dim=4, learn=learn))
    optimiser = torch.optim.Adam(wrapped.codebook_parameters(), lr=1e-2)
    losses = []
    for step in range(100):
        wrapped(torch.randn(1 if step == 0 else 4, 16))
        loss = wrapped.coding_loss()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert max(losses) < 100  # one sample says nothing of how far others may be
    assert np.mean(losses[-10:]) < np.mean(losses[1:11])


def test_autocast_and_inference_mode_around_reading_change_nothing(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(size=8, dim=4, learn="ema"))
    with torch.inference_mode():
        wrapped(normal(64))
        wrapped.surprise()
    wrapped(normal(64))
    expected = wrapped.surprise().score
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(wrapped.surprise().score, expected)
        assert wrapped.coding_loss().dtype == torch.float32


def test_what_the_head_is_given_never_stops_the_model() -> None:
    class Prefixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, prefix, x):
            return self.fc(self.a(torch.cat([prefix, x])))

    wrapped = noesis.wrap(Prefixed(), layers="a", codebook=noesis.Codebook(), logits="fc")
    assert wrapped(torch.zeros(0, 4), torch.randn(3, 4)).shape == (3, 3)


def test_batches_inside_arguments() -> None:
    class Dicts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)

        def forward(self, batch):
            return self.a(batch["x"])

    wrapped = noesis.wrap(Dicts(), layers="a", codebook=noesis.Codebook())
    wrapped.calibrate([{"x": torch.randn(200, 4)}], forward=lambda model, batch: model(batch), progress=False)
    wrapped({"x": torch.randn(7, 4)})
    assert len(wrapped.surprise()) == 7


def test_logits_of_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1))
    wrapped = noesis.wrap(model, layers="1", codebook=noesis.Codebook(), logits="2")
    wrapped.calibrate([torch.randn(50, 3, 9, 7) for _ in range(4)], progress=False)
    x = torch.randn(3, 3, 9, 7)
    output = wrapped(x)
    energy = -torch.logsumexp(output, 1).mean((1, 2)).detach().numpy()
    np.testing.assert_allclose(wrapped.surprise().doubt, energy, rtol=1e-5)


def test_an_interruption_changes_nothing(wrapped: noesis.Wrapped, net: Net) -> None:
    before, codes = wrapped.calibration, wrapped.codebooks["deep"].codes.clone()
    net.train()

    def interrupted():
        yield normal(100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrapped.calibrate(interrupted(), progress=False)
    assert wrapped.calibration is before
    assert torch.equal(wrapped.codebooks["deep"].codes, codes)
    assert net.training
    net.eval()
    wrapped(normal(3))
    assert len(wrapped.surprise()) == 3
    assert len(wrapped.trace()) == 1


def test_layers_that_run_now_and_then_are_left_out_by_name(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook())
    said = []
    from loguru import logger

    logger.enable("noesis")
    handler = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    try:
        made = wrapped.calibrate(
            [(part, index % 2 == 0) for index, part in enumerate(normal(300).split(50))],
            forward=lambda model, batch: model(batch[0], shallow=batch[1]),
            progress=False,
        )
    finally:
        logger.remove(handler)
        logger.disable("noesis")
    assert made.layers == ["conv"]
    assert said == ["deep is left out of the calibration: not every forward ran it with every sample"]


def test_of_many_samples_a_random_choice_is_kept(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noesis.surprise.collection.MOST_SAMPLES", 150)
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook())
    assert sum(wrapped.calibrate(list(normal(1000).split(64)), progress=False).samples) == 150


# ---------------------------------------------------------------- files


def test_calibration_survives_a_file(wrapped: noesis.Wrapped, net: Net, tmp_path) -> None:
    path = wrapped.save_calibration(tmp_path / "calibration.safetensors")
    wrapped(normal(9, seed=1))
    expected = wrapped.surprise()
    other = noesis.wrap(copy.deepcopy(wrapped.unwrap()), layers=LAYERS, codebook=noesis.Codebook(), logits="head")
    assert repr(other.load_calibration(path)) == repr(wrapped.calibration)
    other(normal(9, seed=1))
    found = other.surprise()
    np.testing.assert_array_equal(found.score, expected.score)
    np.testing.assert_array_equal(found.p_value, expected.p_value)
    assert [reason.largest for reason in found.explain(0)] == [reason.largest for reason in expected.explain(0)]


def test_files_of_other_models_are_refused_by_name(wrapped: noesis.Wrapped, tmp_path) -> None:
    path = wrapped.save_calibration(tmp_path / "calibration.safetensors")
    fewer = noesis.wrap(Net().eval(), layers="re:^conv$", codebook=noesis.Codebook(), logits="head")
    with pytest.raises(NoesisError, match="of the layer deep, which is not observed here"):
        fewer.load_calibration(path)
    wider = Net().eval()
    wider.deep = nn.Conv2d(6, 12, 3)
    wider.head = nn.Linear(12, 3)
    wider = noesis.wrap(wider, layers=LAYERS, codebook=noesis.Codebook(), logits="head")
    wider(normal(2))
    said = "codes of deep are of 16 numbers a sample, and the layer gives 24"
    with pytest.raises(NoesisError, match=said):
        wider.load_calibration(path)
    wider = noesis.wrap(wider.unwrap(), layers=LAYERS, codebook=noesis.Codebook(), logits="head")
    wider.load_calibration(path)  # nobody knows yet
    wider(normal(2))
    with pytest.raises(NoesisError, match=said):
        wider.surprise()
    blind = noesis.wrap(Net().eval(), layers=LAYERS, codebook=noesis.Codebook())
    with pytest.raises(NoesisError, match="input of head"):
        blind.load_calibration(path)
    each = noesis.wrap(Net().eval(), layers=LAYERS, codebook=noesis.Codebook(positions="each"), logits="head")
    with pytest.raises(NoesisError, match=r"Codebook\(positions='mean'\)"):
        each.load_calibration(path)
    for name in ("trace", "calibration"):
        (tmp_path / f"{name}.bin").write_bytes(b"nonsense")
        with pytest.raises(NoesisError):
            blind.load_calibration(tmp_path / f"{name}.bin")
    with pytest.raises(NoesisError, match="no calibration to save"):
        blind.save_calibration(tmp_path / "none.safetensors")


# ---------------------------------------------------------------- everywhere a model goes


def test_the_model_computes_what_it_did(net: Net) -> None:
    bare = copy.deepcopy(net).train()
    wrapped = noesis.wrap(net.train(), layers=LAYERS, codebook=noesis.Codebook(learn="gradient"), logits="head")
    for one, other in ((bare, bare), (net, wrapped)):
        torch.manual_seed(3)
        loss = other(normal(16)).square().mean()
        if other is wrapped:
            loss = loss + 0.1 * wrapped.coding_loss()
        loss.backward()
        assert one.conv.weight.grad is not None
    for ours, theirs in zip(net.parameters(), bare.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapped.codebook_parameters()[:2])
    assert list(wrapped.state_dict()) == list(bare.state_dict())


def test_training_with_a_coding_loss(net: Net) -> None:
    settings = noesis.Codebook(size=8, dim=4, learn="gradient")
    wrapped = noesis.wrap(net.train(), layers=LAYERS, codebook=settings)
    optimiser = torch.optim.Adam([*wrapped.parameters(), *wrapped.codebook_parameters()], lr=1e-2)
    losses = []
    for step in range(60):
        loss = 0
        for part in normal(64, seed=step).split(32):  # gradient accumulation
            coding = 0
            task = wrapped(part).square().mean()
            coding = wrapped.coding_loss()
            (task + 0.1 * coding).backward()
            loss += coding.item()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    codes = wrapped.codebooks["deep"].codes.clone()
    wrapped.calibrate([normal(300)], progress=False)
    assert torch.equal(wrapped.codebooks["deep"].codes, codes)  # what was learned stays
    wrapped.eval()
    wrapped(torch.cat([normal(3, seed=1), 50 * normal(3, seed=1)]))
    assert (wrapped.surprise().p_value[3:] < 0.05).all()


def test_a_coding_loss_may_shape_the_model(net: Net) -> None:
    settings = noesis.Codebook(size=8, dim=4, learn="gradient", detach=False)
    wrapped = noesis.wrap(net.train(), layers=LAYERS, codebook=settings)
    wrapped(normal(16))
    wrapped.coding_loss().backward()
    assert net.conv.weight.grad is not None
    assert net.conv.weight.grad.abs().sum() > 0
    assert net.conv.weight.grad.isfinite().all()
    with pytest.raises(NoesisError, match="conv left no vectors that gradients flow through"):
        wrapped.coding_loss()  # of the same forward again
    with torch.no_grad():
        wrapped(normal(16))
    with pytest.raises(NoesisError, match="a forward in eager code, with gradients"):
        wrapped.coding_loss()


class Checkpointed(nn.Module):
    """Two layers, recomputed in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(4, 8), nn.Linear(8, 3), reentrant

    def inner(self, x):
        return self.b(self.a(x).relu_())  # in place: what follows a layer may write over its output

    def forward(self, x):
        if self.reentrant is None:
            return self.inner(x)
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_coding_loss_that_shapes_the_model_goes_with_checkpointing(tokens: bool) -> None:
    x = torch.randn(*(16, 5, 4) if tokens else (16, 4))
    gradients = []
    for reentrant in (None, False):
        torch.manual_seed(0)
        model = Checkpointed(reentrant)
        settings = noesis.Codebook(size=4, dim=2, learn="gradient", detach=False)
        wrapped = noesis.wrap(model, layers=["a", "b"], codebook=settings)
        for _ in range(2):
            loss = wrapped(x).square().mean()
            (loss + wrapped.coding_loss()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        bare = Checkpointed(reentrant)
        bare.load_state_dict(model.state_dict())
        bare(x).square().mean().backward()
        assert not torch.equal(bare.a.weight.grad, model.a.weight.grad / 2)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    wrapped = noesis.wrap(Checkpointed(True), layers=["a", "b"], codebook=settings)
    wrapped(x.requires_grad_())
    with pytest.raises(NoesisError, match="a left no vectors.*checkpoint with use_reentrant=False"):
        wrapped.coding_loss()


def test_a_coding_loss_keeps_nothing_longer_than_a_step() -> None:
    model = Calls(nn.Linear(4, 6), lambda x: [x, 2 * x])
    settings = noesis.Codebook(size=4, dim=2, learn="gradient", detach=False)
    wrapped = noesis.wrap(model, layers="layer", codebook=settings)
    channel = wrapped._recorder.channels.layers["layer"]
    for _ in range(3):
        x = torch.randn(40, 4)
        wrapped(x)
        assert len(channel.live) == 2
        both = torch.stack(channel.live).mean(0)
    torch.testing.assert_close(both, model.layer(1.5 * x))
    wrapped.coding_loss()
    assert channel.live == []
    wrapped(x)
    with torch.no_grad():
        wrapped(x)
    assert channel.live == []


def test_codebooks_that_do_not_learn_say_so(wrapped: noesis.Wrapped) -> None:
    wrapped(normal(3))
    with pytest.raises(NoesisError, match='learn="gradient"'):
        wrapped.coding_loss()
    bare = noesis.wrap(Net(), layers="conv")
    for ask in (bare.surprise, bare.coding_loss, bare.codebook_parameters, lambda: bare.calibrate([])):
        with pytest.raises(NoesisError, match=r"codebook=noesis.Codebook\(\)"):
            ask()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_the_model(dtype: torch.dtype) -> None:
    net = Net().eval().to(dtype)
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(), logits="head")
    wrapped.calibrate([normal(300).to(dtype)], progress=False)
    wrapped(torch.cat([normal(3, seed=1), 100 * normal(3, seed=1)]).to(dtype))
    assert wrapped.surprise().score[3:].min() > wrapped.surprise().score[:3].max()
    assert {parameter.dtype for parameter in wrapped.codebook_parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in net.parameters()} == {dtype}


def test_autocast(wrapped: noesis.Wrapped) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        wrapped(normal(3, seed=1))
    assert (wrapped.surprise().p_value > 0.01).any()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_scores_of_their_own(wrapped: noesis.Wrapped, how: str) -> None:
    wrapped(normal(3, seed=1))
    if how == "deepcopy":
        copied = copy.deepcopy(wrapped)
    else:
        file = io.BytesIO()
        torch.save(wrapped, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    expected = wrapped.surprise().score
    copied(50 * normal(4, seed=2))
    assert len(copied.surprise()) == 4
    assert (copied.surprise().p_value < 0.05).all()
    np.testing.assert_array_equal(wrapped.surprise().score, expected)


def test_an_average_of_the_model_has_scores_of_its_own(wrapped: noesis.Wrapped, net: Net) -> None:
    wrapped(normal(3, seed=1))
    expected = wrapped.surprise().score
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    averaged(50 * normal(4, seed=2))
    np.testing.assert_array_equal(wrapped.surprise().score, expected)
    assert list(averaged.module.state_dict()) == list(net.state_dict())


@pytest.mark.slow
def test_compiled_code_keeps_the_same_vectors(wrapped: noesis.Wrapped, net: Net) -> None:
    torch.compiler.reset()
    frames = torch._dynamo.utils.counters["stats"]
    frames.clear()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for seed in range(4):
        x = normal(5, seed=seed) * (1 + 20 * (seed == 3))
        wrapped(x)
        expected = wrapped.surprise()
        with torch.no_grad():
            compiled(x)
        found = wrapped.surprise()
        assert list(found.layers) == list(expected.layers)
        np.testing.assert_allclose(found.score, expected.score, rtol=1e-4, atol=1e-3)
    assert frames["unique_graphs"] == 1
    wrapped.calibrate([normal(200)], progress=False)  # by eager code, though it is compiled
    torch.compiler.reset()


def test_compiled_code_writes_no_vectors_of_another_width() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    wrapped = noesis.wrap(model, layers=["0", "1"], codebook=noesis.Codebook())
    wrapped.calibrate([torch.randn(200, 4)], progress=False)
    channel = wrapped._recorder.channels.layers["1"]
    with torch.no_grad():
        wrapped(torch.randn(3, 4))
        channel.buffer.fill_(7.0)
        torch.compile(model, backend="aot_eager")(torch.randn(3, 5, 4))
    assert (channel.buffer == 7).all()
    with pytest.raises(NoesisError, match="No layer left vectors"):
        wrapped.surprise()
    torch.compiler.reset()


def test_compiled_before_it_ever_ran_it_says_what_to_do(net: Net) -> None:
    torch.compiler.reset()
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook())
    with torch.no_grad():
        torch.compile(net, backend="aot_eager")(normal(2))
    with pytest.raises(NoesisError, match="once in eager code before compiling"):
        wrapped.surprise()
    torch.compiler.reset()


class Calls(nn.Module):
    """One module, called with each of several inputs."""

    def __init__(self, layer: nn.Module, cut: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
        super().__init__()
        self.layer, self.cut = layer, cut

    def forward(self, x):
        return torch.cat([self.layer(part).flatten(1) for part in self.cut(x)], 1)


def vectors_of(wrapped: noesis.Wrapped, name: str = "layer") -> torch.Tensor:
    """What is kept of a layer's latest forward."""
    channels = wrapped._recorder.channels
    kept = channels.kept(wrapped._forwards())[name]
    return kept.vectors if kept.each is None else kept.each


@pytest.mark.parametrize("positions", ["mean", "each"])
def test_calls_of_a_layer_in_one_forward_are_averaged(positions: str) -> None:
    model = Calls(nn.Linear(4, 6), lambda x: [x, 2 * x, x.flip(0)])
    wrapped = noesis.wrap(model, layers="layer", codebook=noesis.Codebook(positions=positions))
    wrapped.calibrate([torch.randn(200, 5, 4)], progress=False)
    for samples in (3, 3, 2):
        x = torch.randn(samples, 5, 4)
        wrapped(x)
        each = torch.stack([model.layer(part) for part in model.cut(x)])
        expected = (
            each.mean(0) if positions == "each" else torch.cat([each.mean(2), each.std(2, correction=0)], 2).mean(0)
        )
        torch.testing.assert_close(vectors_of(wrapped), expected.detach(), rtol=1e-4, atol=1e-5)
        assert len(wrapped.surprise()) == samples


@pytest.mark.parametrize(
    ("positions", "shapes"),
    [
        ("mean", lambda x: [x.flatten(1), x]),
        ("mean", lambda x: [x, x.flatten(1), x]),
        ("each", lambda x: [x, x[:, :3]]),
        ("each", lambda x: [x, x[:, :3], x]),
        ("each", lambda x: [x, x.flatten(1)]),
    ],
)
def test_calls_that_do_not_fit_together_leave_the_layer_out_by_name(positions: str, shapes) -> None:
    model = nn.Sequential(nn.Identity(), Calls(nn.Identity(), lambda x: shapes(x) if x[0, 0, 0] < 50 else [x]))
    wrapped = noesis.wrap(model, layers=["0", "1.layer"], codebook=noesis.Codebook(positions=positions))
    said = []
    from loguru import logger

    logger.enable("noesis")
    handler = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    try:
        made = wrapped.calibrate([torch.randn(60, 5, 4) for _ in range(4)], progress=False)
    finally:
        logger.remove(handler)
        logger.disable("noesis")
    assert made.layers == ["0"]
    why = "its calls in one forward gave outputs of different shapes, which have no mean"
    assert f"1.layer is left out of the calibration: {why}" in said
    for size, layers in ((0, {"0"}), (100, {"0", "1.layer"}), (0, {"0"})):  # of one call alone nothing is amiss
        wrapped(torch.randn(2, 5, 4) + size)
        assert set(wrapped._recorder.channels.kept(wrapped._forwards())) == layers


@pytest.mark.slow
def test_of_long_inputs_evenly_spaced_positions_are_coded_or_all_when_asked(tmp_path) -> None:
    x = torch.randn(3, 400, 4)
    x[1, 151] = 1e6  # one strange token, between those that are coded by default
    found, path = {}, tmp_path / "calibration.safetensors"
    for most in (256, 400):
        wrapped = noesis.wrap(
            nn.Sequential(nn.Identity()), layers="0", codebook=noesis.Codebook(positions="each", most_positions=most)
        )
        if most == 400:
            with pytest.raises(NoesisError, match=r"made with Codebook\(most_positions=256\)"):
                wrapped.load_calibration(path)
        wrapped.calibrate(list(torch.randn(160, 400, 4).split(40)), progress=False)
        wrapped.save_calibration(path)
        wrapped(x)
        found[most] = wrapped.surprise().layers["0"]
        assert found[most].positions.shape == (3, most)
        np.testing.assert_allclose(found[most].code_length, found[most].positions.mean(1))
    assert found[256].p_value[1] > 1 / 27
    assert found[400].p_value[1] == 1 / 27
    assert found[400].positions[1].argmax() == 151
    chosen = np.linspace(0, 399, 256).round().astype(int)
    assert 151 not in chosen


def test_a_number_per_sample_is_a_vector_too() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    wrapped = noesis.wrap(model, layers="1", codebook=noesis.Codebook())
    wrapped.calibrate([torch.randn(200, 4)], progress=False)
    wrapped(torch.cat([torch.randn(3, 4), 100 * torch.ones(1, 4)]))
    assert wrapped.codebooks["1"].channels == 1
    assert len(wrapped.surprise()) == 4


def test_outputs_without_the_batch_in_front_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Identity()

        def forward(self, x):
            return self.b(self.a(x)[:-1])

    wrapped = noesis.wrap(Odd(), layers=["a", "b"], codebook=noesis.Codebook())
    made = wrapped.calibrate([torch.randn(50, 4) for _ in range(4)], progress=False)
    assert made.layers == ["a"]
    only = noesis.wrap(Odd(), layers="b", codebook=noesis.Codebook())
    with pytest.raises(NoesisError, match=r"b: .*an output of shape \(49, 4\) in a forward of 50 samples"):
        only.calibrate([torch.randn(50, 4) for _ in range(4)], progress=False)


def test_a_timestep_of_one_element_does_not_say_how_large_the_batch_is() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, timestep, x):
            return self.layer(x) + timestep[:, None]

    wrapped = noesis.wrap(Denoiser(), layers="linear", codebook=noesis.Codebook())
    wrapped(torch.zeros(1), torch.randn(60, 4))
    assert len(wrapped.surprise()) == 60
    wrapped(timestep=torch.zeros(60), x=torch.randn(60, 4))
    assert len(wrapped.surprise()) == 60


def test_arguments_that_share_something_else_say_how_large_the_batch_is() -> None:
    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nodes, self.whole = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, nodes, weights):
            return self.whole(x) + (self.nodes(nodes) * weights).sum(0)

    wrapped = noesis.wrap(Graphs(), layers="linear", codebook=noesis.Codebook())
    wrapped(torch.randn(60, 4), torch.randn(90, 4), torch.randn(90, 1))
    assert len(wrapped.surprise()) == 90
    assert "shape (60, 4) in a forward of 90 samples" in wrapped._channels().uncoded["whole"]


def test_settings_are_checked() -> None:
    for settings, said in (
        ({"size": 0}, "size=0"),
        ({"dim": 2.5}, "dim=2.5"),
        ({"most_positions": 0}, "most_positions=0"),
        ({"positions": "all"}, "positions='all'"),
        ({"learn": True}, "learn=True"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"positions": "each", "learn": "ema"}, "each position"),
    ):
        with pytest.raises(NoesisError, match=said):
            noesis.Codebook(**settings)
    with pytest.raises(
        NoesisError, match="logits='fc', which is no module of Net.*The last modules are deep, drop, head"
    ):
        noesis.wrap(Net(), layers=LAYERS, codebook=noesis.Codebook(), logits="fc")
    with pytest.raises(NoesisError, match="logits='head' without a codebook"):
        noesis.wrap(Net(), layers=LAYERS, logits="head")
    with pytest.raises(NoesisError, match=r"noesis\.Codebook"):
        noesis.wrap(Net(), layers=LAYERS, codebook=16)
    with pytest.raises(NoesisError, match="logits=3"):
        noesis.wrap(Net(), layers=LAYERS, codebook=noesis.Codebook(), logits=3)


def test_logits_by_a_callable(net: Net) -> None:
    wrapped = noesis.wrap(net, layers=LAYERS, codebook=noesis.Codebook(), logits=lambda output: output * 2)
    wrapped.calibrate([normal(200)], progress=False)
    output = wrapped(normal(3, seed=1))
    np.testing.assert_allclose(wrapped.surprise().doubt, -torch.logsumexp(2 * output, 1).detach().numpy(), rtol=1e-5)


def test_nervecodes_measures(wrapped: noesis.Wrapped) -> None:
    x = normal(4, seed=1)
    wrapped(x)
    ambiguity = wrapped.ambiguity(temperature=2.0, beta_length=1.0, beta_entropy=0.5, beta_distance=0.25)
    soft = ambiguity.layers["deep"]
    np.testing.assert_allclose(soft.assignment.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(soft.code_length, -np.log(soft.assignment.max(1)), rtol=1e-4, atol=1e-6)
    entropy = -(soft.assignment * np.log(np.maximum(soft.assignment, 1e-30))).sum(1)
    np.testing.assert_allclose(soft.entropy, entropy, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(soft.surprise, soft.code_length + 0.5 * soft.entropy + 0.25 * soft.distance, rtol=1e-5)
    np.testing.assert_allclose(ambiguity.score, np.mean([s.surprise for s in ambiguity.layers.values()], 0))
    most = wrapped.ambiguity(reduce="max")
    assert (most.score >= wrapped.ambiguity().score).all()
    with pytest.raises(NoesisError, match="temperature=0"):
        wrapped.ambiguity(temperature=0)
    with pytest.raises(NoesisError, match="reduce='sum'"):
        wrapped.ambiguity(reduce="sum")
