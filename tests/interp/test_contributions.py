"""What each part adds to a logit difference: exact against weights, with its control, refused where nothing adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import noesis
from helpers.families import family, inputs
from helpers.language_models import build, prompts
from noesis import interp
from noesis.interp import contributions
from zoo.of_transformers import ZOO

ADDITIVE = (
    "llama",
    "gpt2",
    "gemma2",
    "qwen3",
    "olmo2",
    "cohere",
    "mixtral",
    "gptoss",
    "neox",
    "opt",
    "bloom",
    "falcon",
)


def model_of(name: str, **options: Any) -> Any:
    """With biases, where a family has some."""
    model = family(name, **options)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any, given: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given).logits.double()
    return found


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
@pytest.mark.parametrize("name", ADDITIVE)
def test_the_parts_add_up_to_the_models_own_difference(name: str, by: Any) -> None:
    if (name, by) in {("mixtral", "neuron"), ("gptoss", "neuron")}:
        with pytest.raises(noesis.NoesisError, match="cannot be told apart: the mlp has experts"):
            contributions(model_of(name), inputs(name), (3, 4), by=by)
        return
    model, given = model_of(name), inputs(name)
    model.config.final_logit_softcapping = None  # Gemma 2's
    found = contributions(model, given, (3, 4), by=by)
    own = logits(model, given)[:, -1]
    assert found.check.holds
    assert not found.before
    assert np.allclose(found.difference, (own[:, 3] - own[:, 4]).numpy(), atol=1e-6 * float(own.abs().max()))
    assert np.abs(found.residual).max() <= 1e-5 * np.abs(found.values).sum(0).max()
    assert found.whole == {}


def test_a_part_that_is_left_out_shows_in_the_error() -> None:
    """The check can fail: a block adds what its anatomy does not know of."""
    model, given = model_of("llama"), inputs("llama")
    found = interp.anatomy(model, **given)
    model.model.layers[1].register_forward_hook(lambda _module, _args, output: output + 0.01)
    broken = contributions(model, given, (3, 4), anatomy=found)
    assert not broken.check.holds
    assert "FAILS" in repr(broken)


def test_against_the_weights() -> None:
    """A Llama's parts by hand: RMSNorm with the scale of the run, and rows of the unembedding."""
    model, given = model_of("llama"), inputs("llama")
    keep = ["resid_pre.0", "attn", "mlp", "result", "resid_post.2", "neurons"]
    run = interp.run(model, given, keep=keep)
    last = run["resid_post.2"][:, -1].double()
    weight = model.model.norm.weight.double()
    scale = weight / (last.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    unembedding = model.lm_head.weight.double()
    direction = (scale * (unembedding[7] - unembedding[11])).detach()

    def along(site: str) -> list[float]:
        return (run[site][:, -1].double() * direction).sum(-1).tolist()

    layers = contributions(model, given, (7, 11))
    by_part = dict(zip(layers.parts, layers.values, strict=True))
    assert by_part["embed"].tolist() == pytest.approx(along("resid_pre.0"), rel=1e-5)
    heads = contributions(model, given, (7, 11), by="head")
    by_head = dict(zip(heads.parts, heads.values, strict=True))
    neurons = contributions(model, given, (7, 11), by="neuron")
    by_neuron = dict(zip(neurons.parts, neurons.values, strict=True))
    for layer in range(3):
        assert by_part[f"attn.{layer}"].tolist() == pytest.approx(along(f"attn.{layer}"), rel=1e-5)
        assert by_part[f"mlp.{layer}"].tolist() == pytest.approx(along(f"mlp.{layer}"), rel=1e-5)
        result = run["result", layer][:, -1].double()
        down = model.model.layers[layer].mlp.down_proj.weight.double()
        for head in range(4):
            expected = (result[:, head] * direction).sum(-1)
            assert by_head[f"result.{layer}.{head}"].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-9)
        for neuron in (0, 17, 39):
            expected = run["neurons", layer][:, -1, neuron].double() * (direction @ down[:, neuron])
            assert by_neuron[f"neurons.{layer}.{neuron}"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("name", ADDITIVE)
def test_heads_make_up_what_attention_adds(name: str) -> None:
    """Through the post-norms of Gemma and OLMo too, and with all biases."""
    model, given = model_of(name), inputs(name)
    layers, heads = (contributions(model, given, (3, 4), by=by) for by in ("layer", "head"))
    for layer in range(model.config.num_hidden_layers):
        of_layer = [
            at for at, part in enumerate(heads.parts) if part.startswith((f"result.{layer}.", f"attn.{layer} "))
        ]
        assert len(of_layer) == 4 + (name in ("gpt2", "gptoss", "neox", "opt", "bloom"))
        whole = layers.values[layers.parts.index(f"attn.{layer}")]
        assert np.allclose(
            heads.values[of_layer].sum(0), whole, atol=1e-5 * np.abs(heads.values[of_layer]).sum(0).max()
        )


def test_embeddings_and_biases_have_rows_of_their_own() -> None:
    found = contributions(model_of("gpt2"), inputs("gpt2"), (3, 4))
    assert found.parts[:3] == ["embed", "transformer.wpe", "attn.0"]
    assert found.parts[-1] == "transformer.ln_f bias"
    model = build("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(99), requires_grad=False)
    found = contributions(model, prompts(), (3, 4))
    assert found.parts[-1] == "lm_head bias"
    assert found.values[-1].tolist() == pytest.approx([float(model.lm_head.bias[3] - model.lm_head.bias[4])] * 2)


def test_a_softcap_is_told_and_what_is_before_it_is_exact() -> None:
    model, given = model_of("gemma2", final_logit_softcapping=0.1), inputs("gemma2")
    found = contributions(model, given, (3, 4))
    own = logits(model, given)[:, -1]
    before = 0.1 * torch.atanh(own / 0.1)
    assert np.allclose(found.values.sum(0), (before[:, 3] - before[:, 4]).numpy(), rtol=1e-3)
    assert np.allclose(found.final, (own[:, 3] - own[:, 4]).numpy(), atol=1e-7)
    assert "softcap" in found.before
    assert "before the model's last step" in repr(found)


def test_a_scale_of_the_logits_is_part_of_the_contributions() -> None:
    model, given = model_of("cohere", logit_scale=0.25), inputs("cohere")
    scaled, plain = (
        contributions(model, given, (3, 4)),
        contributions(model_of("cohere", logit_scale=1.0), given, (3, 4)),
    )
    assert np.allclose(scaled.values, 0.25 * plain.values, rtol=1e-5)
    assert np.allclose(scaled.control, 0.25 * plain.control, rtol=1e-5)
    assert scaled.before == ""


def test_one_token_is_meant_against_the_mean() -> None:
    model, given = model_of("gpt2"), inputs("gpt2")
    own = logits(model, given)[:, -1]
    found = contributions(model, given, 5)
    assert np.allclose(found.values.sum(0), (own[:, 5] - own.mean(-1)).numpy(), atol=1e-6)
    assert "logit 5 less the mean logit" in repr(found)
    assert "random tokens" in repr(found)


def test_pairs_and_positions_of_each_row() -> None:
    model, given = model_of("llama"), inputs("llama")
    own = logits(model, given)
    found = contributions(model, given, torch.tensor([[3, 4], [8, 9]]), position=torch.tensor([2, -1]))
    expected = [float(own[0, 2, 3] - own[0, 2, 4]), float(own[1, -1, 8] - own[1, -1, 9])]
    assert found.difference.tolist() == pytest.approx(expected, rel=1e-5)
    assert (found.positions, found.target) == ([2, 6], [[3, 4], [8, 9]])
    alone = contributions(model, given, (8, 9))
    assert np.array_equal(found.values[:, 1], alone.values[:, 1])
    assert np.array_equal(found.share[:, 1], alone.share[:, 1])


def test_the_control_is_what_the_part_adds_to_random_pairs() -> None:
    model, given = model_of("gpt2"), inputs("gpt2")
    found = contributions(model, given, (3, 4), controls=7, seed=5)
    from noesis.interp.contributing import _drawn

    pairs = _drawn(2, 7, 99, 5)
    assert all(first != second for first, second in pairs)
    others = np.stack([contributions(model, given, tuple(pair), controls=1).values for pair in pairs])
    others = others[:, :-1] if others.shape[1] > len(found.parts) else others
    assert np.allclose(found.control, np.sqrt((others**2).mean(0)), rtol=1e-5)
    reached = (np.abs(others) >= np.abs(found.values)).sum(0)
    assert np.allclose(found.share, (1 + reached) / 8)


def test_a_part_without_a_preference_looks_like_one() -> None:
    """Random weights: over many pairs, shares are as even as chance has them, whatever the size of a part."""
    model, given = model_of("llama"), {"input_ids": prompts(1)}
    model.model.layers[1].mlp.down_proj.weight.data.mul_(50)  # large, and of no meaning
    generator = torch.Generator().manual_seed(3)
    shares = []
    for _ in range(40):
        first, second = torch.randperm(99, generator=generator)[:2].tolist()
        shares.append(contributions(model, given, (first, second), controls=60).share)
    assert np.abs(np.mean(shares, axis=0) - 0.5).max() < 0.2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("granite", "in model.layers.0, block = input"),
        ("bert", "what reads the normed output"),
        ("vit", "no linear layer reads"),
        ("t5", "no linear layer reads"),
    ],
)
def test_what_does_not_add_up_is_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(noesis.NoesisError, match=f"cannot be told apart by parts: {why}.*interp.logit_lens"):
        contributions(model_of(name), inputs(name), (0, 1))


def test_the_stream_of_the_last_tower_is_meant() -> None:
    """Blocks for images, which have other positions, are part of what was embedded."""
    torch.manual_seed(0)
    entry = next(entry for entry in ZOO if entry.name == "llava")
    found = contributions(entry.build().eval(), entry.inputs(), (3, 4))
    assert found.parts[1:] == ["attn.2", "mlp.2", "attn.3", "mlp.3"]
    assert found.check.holds


def test_adapters_are_part_of_the_layers_they_are_around() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["o_proj", "down_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config).eval()
    for by in ("head", "neuron"):
        found = contributions(model, {"input_ids": prompts()}, (3, 4), by=by)
        assert found.check.holds
        assert not found.whole


class NoGradientLinear(nn.Linear):
    """As a quantised layer whose kernel has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class RoundedLinear(nn.Linear):
    """As a layer that rounds what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + (x.mul(8).round() / 8 - x).detach())


@pytest.mark.parametrize(
    ("kind", "why"), [(NoGradientLinear, "gives no gradient"), (RoundedLinear, "its layer is not linear")]
)
def test_layers_whose_inputs_cannot_be_told_apart_are_named(kind: type[nn.Linear], why: str) -> None:
    model = build("llama")
    model.model.layers[1].mlp.down_proj.__class__ = kind
    found = contributions(model, prompts(), (3, 4), by="neuron")
    assert found.check.holds
    assert list(found.whole) == ["mlp.1"]
    assert why in found.whole["mlp.1"]
    assert "not told apart: mlp.1" in repr(found)
    assert len(found.parts) == 1 + 3 + 2 * 40 + 1


def test_half_precision_adds_up_within_its_rounding() -> None:
    found = contributions(build("llama").bfloat16(), prompts(), (3, 4), by="head")
    assert found.check.holds
    assert 1e-5 < found.check.error < found.check.bound


def test_the_model_and_its_inputs_are_left_as_they_are() -> None:
    model, ids = build("llama"), prompts()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    with torch.inference_mode():
        contributions(model, {"input_ids": ids, "past_key_values": cache}, (3, 4), by="head")
    assert cache.get_seq_length() == ids.shape[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_of_a_wrapped_model_it_is_no_step() -> None:
    wrapped = noesis.wrap(build("llama"))
    found = contributions(wrapped, prompts(), (3, 4))
    assert np.array_equal(found.values, contributions(build("llama"), prompts(), (3, 4)).values)
    assert len(wrapped.trace()) == 0


def test_an_edited_model_is_refused() -> None:
    model, ids = build("llama"), prompts()
    with interp.editing(model, interp.Zero("attn.1")):
        with pytest.raises(noesis.NoesisError, match="being edited.*logit_lens"):
            contributions(model, ids, (3, 4))
        model(ids)  # an edit has to fire
    assert contributions(model, ids, (3, 4)).check.holds


# ---------------------------------------------------------------- the result


def found_one(**options: Any) -> interp.Contributions:
    return contributions(model_of("gpt2"), inputs("gpt2"), (3, 4), **options)


def test_the_largest_come_first() -> None:
    found = found_one(by="head")
    top = found.top(3, example=1)
    magnitudes = np.sort(np.abs(found.values[:, 1]))[::-1]
    assert [abs(each.value) for each in top] == magnitudes[:3].tolist()
    assert top[0].control == found.control[found.parts.index(top[0].part), 1]
    with pytest.raises(noesis.NoesisError, match="example is 2"):
        found.top(example=2)


@pytest.mark.parametrize("name", ["found.safetensors", "found.json", "found.json.gz"])
def test_files(tmp_path: Path, name: str) -> None:
    found = found_one(by="head")
    again = interp.Contributions.load(found.save(tmp_path / name))
    assert repr(again) == repr(found)
    assert all(np.array_equal(getattr(again, array), getattr(found, array)) for array in found.ARRAYS)
    assert interp.Contributions.from_json(found.to_json()).check == found.check


def test_broken_files_are_refused() -> None:
    payload = json.loads(found_one().to_json())
    for change in ({"values": [[1.0]]}, {"target": [[1, 2, 3], [1, 2]]}, {"check": {}}, {"parts": [1]}):
        with pytest.raises(noesis.NoesisError, match="not valid contributions"):
            interp.Contributions.from_json({**payload, **change})


def test_as_a_table_it_has_a_row_per_part_and_example() -> None:
    found = found_one()
    frame = found.to_dataframe()
    assert len(frame) == len(found.parts) * 2
    assert frame[frame.example == 1].contribution.tolist() == found.values[:, 1].tolist()
    assert found.to_csv().startswith("part,example,contribution,control,share\nembed,0,")


@pytest.mark.parametrize("by", ["layer", "head"])
def test_pictures(tmp_path: Path, by: Any) -> None:
    pytest.importorskip("matplotlib")
    figure = found_one(by=by).plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert figure.axes[0].get_xlabel() == {"layer": "example", "head": "head"}[by]


def half_compiled(model: Any) -> Any:
    model.model.layers[1].compile(backend="eager")
    return model


def bad(what: str) -> Any:
    model, ids = build("llama"), prompts()
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
    calls: dict[str, Any] = {
        "by": lambda: contributions(model, ids, (3, 4), by="heads"),
        "controls": lambda: contributions(model, ids, (3, 4), controls=0),
        "same": lambda: contributions(model, ids, (3, 3)),
        "large": lambda: contributions(model, ids, (3, 99)),
        "rows": lambda: contributions(model, ids, [(3, 4), (3, 4), (3, 4)]),
        "kind": lambda: contributions(model, ids, "Paris"),
        "position": lambda: contributions(model, ids, (3, 4), position=7),
        "positions": lambda: contributions(model, ids, (3, 4), position=[1]),
        "position of text": lambda: contributions(model, ids, (3, 4), position="last"),
        "padding": lambda: contributions(model, padded, (3, 4)),
        "training": lambda: contributions(model.train(), ids, (3, 4)),
        "anatomy": lambda: contributions(model, ids, (3, 4), anatomy=interp.anatomy(build("gpt2"), ids)),
        "compiled": lambda: contributions(
            half_compiled(model), ids, (3, 4), anatomy=interp.anatomy(build("llama"), ids)
        ),
        "some logits": lambda: contributions(model, {"input_ids": ids, "logits_to_keep": 1}, (3, 4)),
    }
    return calls[what]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("by", "'layer', 'head', 'neuron'"),
        ("controls", "at least 1"),
        ("same", "two different tokens from 0 to 98"),
        ("large", "vocabulary of 99"),
        ("rows", "for 2 rows"),
        ("kind", "a pair for each row"),
        ("position", "2 rows of 7 tokens.*from -7 to 6"),
        ("positions", "or one for each row"),
        ("position of text", "a whole number, or one for each row"),
        ("padding", r"padding in row 1.*position=\[6, 4\]"),
        ("training", r"model.eval\(\)"),
        ("anatomy", "of another model"),
        ("compiled", "before torch.compile"),
        ("some logits", "cannot be told apart by parts|logits of all positions"),
    ],
)
def test_bad_input_says_what_to_do(what: str, said: str) -> None:
    with pytest.raises(noesis.NoesisError, match=said):
        bad(what)()
