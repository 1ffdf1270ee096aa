"""Top and quantile examples of neurons, against what all activations at once say."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers import trained_toys
from helpers.families import family, inputs
from helpers.language_models import build
from noesis import interp
from noesis.interp.neurons import PER_QUANTILE, WINDOW


def corpus(rows: int = 12, length: int = 80) -> Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(0))


def whole(model: nn.Module, ids: Tensor, site: str) -> Tensor:
    return interp.run(model, {"input_ids": ids}, keep=site)[site]


def test_the_most_active_places_one_of_each_stretch() -> None:
    model, ids = build("llama"), corpus()
    found = interp.neurons(model, [{"input_ids": part} for part in ids.split(5)], k=6)
    assert list(found.sites) == ["neurons.0", "neurons.1", "neurons.2"]
    x = whole(model, ids, "neurons.1")
    for channel in (0, 7, 39):
        best: dict[tuple[int, int], tuple[float, int]] = {}
        for row in range(12):
            for position in range(80):
                key = (row, position // WINDOW)
                best[key] = max(best.get(key, (-torch.inf, 0)), (float(x[row, position, channel]), -position))
        expected = sorted(((value, row, -place) for (row, _), (value, place) in best.items()), reverse=True)[:6]
        examples = found.top("neurons.1", channel)
        assert [(each.row, each.position) for each in examples] == [(row, place) for _, row, place in expected]
        assert np.allclose([each.value for each in examples], [value for value, _, _ in expected], atol=1e-5)
        for each in examples:
            start = each.position - each.position % WINDOW
            assert each.tokens == ids[each.row, start : start + WINDOW].tolist()
            assert each.tokens[each.place] == ids[each.row, each.position]


def test_batches_make_no_difference() -> None:
    model, ids = build("gpt2"), corpus()
    one, other = (interp.neurons(model, ids.split(size), k=4, quantiles=4) for size in (12, 3))
    for site in one.sites:
        for name in ("top_places", "sample_places"):
            assert np.array_equal(getattr(one[site], name), getattr(other[site], name))
        assert np.allclose(one[site].sample, other[site].sample, atol=1e-5)
        assert np.allclose(one[site].moments, other[site].moments, atol=1e-5)


def test_moments_and_quantiles() -> None:
    model, ids = build("gpt2"), corpus(rows=40)
    found = interp.neurons(model, ids.split(8), quantiles=10)["neurons.2"]
    x = whole(model, ids, "neurons.2").flatten(0, 1).double().numpy()
    expected = [x.mean(0), x.std(0, ddof=1), x.min(0), x.max(0), (x > 0).mean(0)]
    assert np.allclose(found.moments, expected, atol=1e-5)
    assert found.positions == len(x)
    assert len(found.sample) == 10 * PER_QUANTILE
    assert len(np.unique(found.sample_places, axis=0)) == len(found.sample)
    rows, positions = found.sample_places.T
    assert np.allclose(found.sample, x[rows * 80 + positions], atol=1e-5)
    # An even sample: its quantiles are those of the whole, within what a thousand draws allow.
    shares = (x[:, None, :] <= np.quantile(found.sample, [0.1, 0.5, 0.9], axis=0)).mean(0)
    assert np.abs(shares - np.array([0.1, 0.5, 0.9])[:, None]).max() < 0.07


def test_examples_of_each_quantile_lie_within_it() -> None:
    found = interp.neurons(build("gpt2"), corpus(rows=40).split(8), quantiles=5)
    edges = found.edges("neurons.0", 3)
    for part in range(5):
        examples = found.quantile("neurons.0", 3, part, k=10)
        assert len(examples) == 10
        assert all(edges[part] - 1e-6 <= each.value <= edges[part + 1] + 1e-6 for each in examples)
        assert all(len(each.tokens) in (WINDOW, 80 % WINDOW) for each in examples)


def test_the_corpus_is_never_held() -> None:
    """Of a corpus ten times as long, no more stretches are kept; and it is read once, a batch at a time."""
    model = build("gpt2")
    alive: list[int] = []

    def batches(count: int) -> Iterator[Tensor]:
        for number in range(count):
            alive.append(number)
            yield torch.randint(3, 99, (8, 64), generator=torch.Generator().manual_seed(number))

    found = [interp.neurons(model, batches(count), layers="neurons.0", k=1, quantiles=1) for count in (20, 200)]
    assert len(alive) == 220
    most = 128 + PER_QUANTILE  # one stretch for each neuron and for each sampled position
    assert all(len(each.windows) <= most for each in found)
    assert found[1]["neurons.0"].positions == 10 * found[0]["neurons.0"].positions


def test_what_is_held_while_reading_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("noesis.interp.neurons")
    held: list[int] = []
    needed = module._needed
    monkeypatch.setattr(module, "SPARE", 50)
    monkeypatch.setattr(
        module, "_needed", lambda windows, streams: held.append(len(windows)) or needed(windows, streams)
    )
    interp.neurons(build("gpt2"), corpus(rows=400, length=64).split(4), layers="neurons.0", k=1, quantiles=1)
    assert len(held) > 5
    assert max(held) <= 128 + PER_QUANTILE + 50 + 8


def test_padding_takes_no_part() -> None:
    model = build("llama")
    ids = corpus(rows=4, length=20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = mask[3, 5:] = 0
    found = interp.neurons(model, [{"input_ids": ids, "attention_mask": mask}])
    assert found["neurons.0"].positions == 20 + 12 + 20 + 5
    for places in (found["neurons.0"].top_places, found["neurons.0"].sample_places[None]):
        rows, positions = places[places[..., 0] >= 0].T
        assert mask[rows, positions].all()


# Which of them matter.


def planted(seed: int = 0) -> nn.Module:
    """Channel 2 of six is read, and no other."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 1))
    with torch.no_grad():
        model[2].weight.zero_()[0, 2] = 1.0
    return model.eval()


def test_the_one_neuron_that_is_read_is_the_one_that_matters() -> None:
    model, x = planted(), torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    found = interp.neurons(model, x.split(10), layers="1")
    with torch.no_grad():
        active = model[1](model[0](x))[:, 2].double().numpy()
    for to, value in (("mean", active.mean()), ("zero", 0.0)):
        effects = interp.importance(model, found, x, lambda y: y[:, 0], site="module:1", to=to)
        assert np.allclose(effects.effects[2], value - active, atol=1e-6)
        assert np.abs(np.delete(effects.effects, 2, axis=0)).max() == 0
        assert effects.top(1)[0].channel == 2
    assert effects.q_values[2] < 0.001
    assert np.delete(effects.q_values, 2).min() == 1.0
    assert interp.Importance.from_json(effects.to_json()).top(3) == effects.top(3)


def test_importance_of_the_neurons_of_a_transformer_and_of_a_convolution() -> None:
    model, ids = build("llama"), corpus(rows=4, length=12)
    found = interp.neurons(model, [ids], layers="neurons.1")

    def last(output: object) -> Tensor:
        return output.logits[:, -1, 5]  # type: ignore[attr-defined]

    effects = interp.importance(model, found, ids, last, site="neurons.1", channels=[3, 8])
    down = model.model.layers[1].mlp.down_proj
    weight = down.weight.detach().clone()
    with torch.no_grad():
        before = model(ids).logits[:, -1, 5]
        down.weight[:, 8] = 0  # and what it adds on average
        down.bias = nn.Parameter(weight[:, 8] * float(found["neurons.1"].moments[0, 8]))
        after = model(ids).logits[:, -1, 5]
    assert np.allclose(effects.effects[1], after - before, atol=1e-6)
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)).eval()
    images = torch.randn(5, 1, 4, 4)
    seen = interp.neurons(conv, [images], layers="1")
    zeroed = interp.importance(conv, seen, images, lambda y: y[:, 0], site="module:1", channels=[2], to="zero")
    with torch.no_grad():
        x = conv[1](conv[0](images))
        x[:, 2] = 0
        assert np.allclose(zeroed.effects[0], conv[3](x.flatten(1))[:, 0] - conv(images)[:, 0], atol=1e-6)


def test_importance_needs_a_number_per_example() -> None:
    model, x = planted(), torch.ones(4, 3)
    found = interp.neurons(model, [x], layers="1")
    with pytest.raises(ValueError, match="Do not take the mean"):
        interp.importance(model, found, x, lambda y: y.mean(), site="module:1")
    with pytest.raises(ValueError, match="channel 6 of module:1"):
        interp.importance(model, found, x, lambda y: y[:, 0], site="module:1", channels=[6])
    with pytest.raises(ValueError, match="'mean' or 'zero'"):
        interp.importance(model, found, x, lambda y: y[:, 0], site="module:1", to="median")


# Any model, any channels.


def test_channels_of_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 7))
    images = torch.randn(9, 3, 8, 8)
    labels = torch.zeros(9)
    found = interp.neurons(model, list(zip(images.split(3), labels.split(3), strict=True)), layers=["1", "linear"], k=4)
    with torch.no_grad():
        x = model[1](model[0](images)).flatten(2)  # [image, channel, place]
    assert found["module:1"].top_values.shape == (5, 4)
    best = x.amax(2).topk(4, dim=0)
    assert np.allclose(found["module:1"].top_values, best.values.T, atol=1e-6)
    assert np.array_equal(found["module:1"].top_places[:, :, 0], best.indices.T)
    assert found["module:3"].top_values.shape == (7, 4)
    assert found.top("module:1", 0)[0].tokens == []


def test_channels_last_are_known_of_some_layers() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 5), nn.GELU())
    images = torch.randn(2, 4, 6, 3)
    found = interp.neurons(model, [images], layers=["0", "1", "2"])
    assert [len(site.top_values) for site in found.sites.values()] == [3, 5, 4]


def test_vision_transformer() -> None:
    model, given = family("vit"), inputs("vit")
    found = interp.neurons(model, [given])
    x = interp.run(model, given, keep="neurons.1")["neurons.1"]
    assert np.allclose(found["neurons.1"].moments[3], x.amax((0, 1)), atol=1e-5)
    assert found["neurons.1"].top_places[:, :2, 0].tolist() != []


def test_heads_can_be_looked_at_as_channels() -> None:
    found = interp.neurons(build("llama"), [corpus(rows=2)], layers=["z.0", "blocks.1.hook_resid_post"])
    assert {name: len(site.top_values) for name, site in found.sites.items()} == {"z.0": 32, "resid_post.1": 32}


def test_opt_reads_all_tokens_in_one_row() -> None:
    model = family("opt")
    found = interp.neurons(model, [inputs("opt")])
    assert found["neurons.0"].text
    assert found["neurons.0"].top_places[:, :, 1].max() < inputs("opt")["input_ids"].shape[1]


@pytest.mark.slow
def test_waves_of_modular_addition(modular_addition: nn.Module) -> None:
    """Each neuron of a model that adds modulo a prime responds to one frequency of a sum's parts."""
    pairs, _ = trained_toys.all_pairs()
    with torch.no_grad():
        assert float((modular_addition(pairs).argmax(-1) == pairs.sum(1) % trained_toys.MODULUS).float().mean()) > 0.99
    energy = trained_toys.frequencies(modular_addition)
    assert float(energy.sort(descending=True).values[:5].sum()) > 2 * 5 / len(energy)
    found = interp.neurons(modular_addition, pairs.split(500), layers="act", k=8)
    alive = found["module:act"].moments[3] > 0
    assert alive.mean() > 0.5
    assert found.top("module:act", int(alive.argmax()))[0].value == pytest.approx(
        float(found["module:act"].moments[3][alive.argmax()])
    )


def test_not_finite_takes_no_part_and_is_counted() -> None:
    x = torch.arange(12.0).reshape(6, 2)
    x[3, 0] = torch.nan
    x[4, 1] = torch.inf
    found = interp.neurons(nn.Sequential(nn.Identity()), [x], layers="0", k=3)
    assert found["module:0"].nonfinite == 2
    assert found["module:0"].top_values.tolist() == [[10.0, 8.0, 4.0], [11.0, 7.0, 5.0]]
    assert "not finite: 2 values of module:0" in repr(found)


def test_files_and_tables(tmp_path: Path) -> None:
    found = interp.neurons(build("llama"), corpus(rows=3).split(2), k=2, quantiles=2)
    for name in ("neurons.safetensors", "neurons.json"):
        read = interp.Neurons.load(found.save(tmp_path / name))
        assert repr(read) == repr(found)
        assert read.top("neurons.1", 5) == found.top("neurons.1", 5)
        assert read.quantile("neurons.1", 5, 1) == found.quantile("neurons.1", 5, 1)
    frame = found.to_dataframe()
    assert len(frame) == 3 * 40
    assert frame["max"][45] == found["neurons.1"].moments[3][5]
    assert found.plot("neurons.0", 1).axes


def test_the_model_stays_what_it_was() -> None:
    wrapped = noesis.wrap(build("gpt2").train())
    interp.neurons(wrapped, [corpus(rows=2)], layers="resid_post")
    assert wrapped.training
    assert len(wrapped.trace().steps) == 0


def test_bad_input_says_what_to_do() -> None:
    model, ids = build("gpt2"), corpus(rows=2)
    with pytest.raises(ValueError, match="has no neurons of an mlp"):
        interp.neurons(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), [torch.ones(2, 4)])
    with pytest.raises(TypeError, match=r"\[batch\]"):
        interp.neurons(model, ids)
    with pytest.raises(ValueError, match="no batches"):
        interp.neurons(model, [])
    with pytest.raises(ValueError, match="k is 0"):
        interp.neurons(model, [ids], k=0)
    with pytest.raises(ValueError, match="Patterns are scored by interp.heads"):
        interp.neurons(model, [ids], layers="pattern")
    with pytest.raises(ValueError, match="selects nothing|no layer|matches"):
        interp.neurons(model, [ids], layers="mpl.*")
    found = interp.neurons(model, [ids], layers="neurons.0")
    with pytest.raises(ValueError, match="one of 0 to 127"):
        found.top("neurons.0", 128)
    with pytest.raises(ValueError, match="one of neurons.0"):
        found.top("neurons.1", 0)
    with pytest.raises(ValueError, match="one of 0 to 9"):
        found.quantile("neurons.0", 0, 10)
