"""Blocks that attend twice: to their own tokens, and to those of an encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import noesis
from helpers.families import family, inputs
from noesis import interp
from noesis.interp.attention import PATTERN
from noesis.interp.identifying import HEADS
from noesis.interp.sites import CROSS, HEADED
from zoo import models as zoo
from zoo.entry import call

CROSSING = ["t5", "bart", "whisper", "switch_transformers", "SD 1.5", "SDXL", "PixArt", "Wan", "Transformer"]


def of(name: str) -> tuple[Any, Any, interp.Anatomy]:
    """A model of the zoo, its inputs and its anatomy."""
    entry = zoo.ALL[name]
    model, given = zoo.model_of(entry), entry.inputs()
    found = interp.anatomy(model, **given) if isinstance(given, dict) else interp.anatomy(model, *given)
    return model, given, found


@pytest.mark.parametrize("name", CROSSING)
def test_both_attentions_are_there_and_outputs_are_those_of_the_bare_model(name: str) -> None:
    model, given, found = of(name)
    crossing = [(layer, block) for layer, block in enumerate(found.blocks) if block.cross is not None]
    assert crossing
    keep = []
    for layer, block in crossing:
        assert block.attention != block.cross.attention
        for identity in (PATTERN, f"cross_{PATTERN}"):
            check = block.check(identity)
            assert check is not None
            assert check.holds
        keep += [f"{site}.{layer}" for site in (*HEADED, *CROSS) if site not in block.refused]
    with torch.no_grad():
        bare = call(model, given)
    run = interp.run(model, given, keep=keep, anatomy=found)
    assert set(run.fired) == set(keep)
    same = torch.equal(noesis.layers.hidden_state(run.output), noesis.layers.hidden_state(bare))
    assert same or name == "Transformer"  # whose fused layers are left


def test_patterns_are_those_that_t5_says_it_used() -> None:
    model = family("t5")
    given = {**inputs("t5"), "decoder_input_ids": inputs("t5")["decoder_input_ids"][:, :4]}
    run = interp.run(model, given, keep=["pattern.2-3", "cross_pattern"])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**given, output_attentions=True)
    for layer in range(2):
        assert run["cross_pattern", layer + 2].shape == (2, 4, 4, 7)
        assert torch.allclose(run["pattern", layer + 2], out.decoder_attentions[layer], atol=1e-6)
        assert torch.allclose(run["cross_pattern", layer + 2], out.cross_attentions[layer], atol=1e-6)


def test_own_and_other_tokens_are_told_apart_where_there_are_as_many() -> None:
    found = interp.anatomy(family("t5"), **inputs("t5"))
    for block in found.blocks[2:]:
        assert (block.attention, block.cross.attention) == (
            f"{block.name}.layer.0.SelfAttention",
            f"{block.name}.layer.1.EncDecAttention",
        )
        assert block.check(f"cross_{HEADS}").holds
    assert all(block.cross is None for block in found.blocks[:2])


def test_parts_of_the_stream_add_up_and_can_be_edited() -> None:
    model, given = family("t5"), inputs("t5")
    found = interp.anatomy(model, **given)
    parts = ("resid_pre", "attn", "cross_attn", "resid_mid", "mlp", "resid_post")
    kept = interp.run(model, given, keep=[f"{part}.2-3" for part in parts], anatomy=found)
    for layer in (2, 3):
        pre, attn, cross, mid, mlp, post = (kept[part, layer] for part in parts)
        assert torch.allclose(pre + attn + cross, mid, atol=1e-5)
        assert torch.allclose(mid + mlp, post, atol=1e-5)
    direction = torch.randn(32)
    keep = ["resid_mid.2", "mlp.2", "resid_post.2"]
    run = interp.run(model, given, edits=[interp.Add("resid_mid.2", direction)], keep=keep, anatomy=found)
    assert torch.allclose(run["resid_mid.2"], kept["resid_mid.2"] + direction, atol=1e-5)
    assert torch.allclose(run["resid_mid.2"] + run["mlp.2"], run["resid_post.2"], atol=1e-5)
    scale = interp.Scale("attn.2", 2.0)
    scaled = interp.run(model, given, edits=[scale], keep="resid_mid.2", anatomy=found)["resid_mid.2"]
    both = [scale, interp.Add("resid_mid.2", direction)]
    run = interp.run(model, given, edits=both, keep="resid_mid.2", anatomy=found)
    assert torch.allclose(run["resid_mid.2"], scaled + direction, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("site", CROSS)
def test_edits_of_the_second_attention_are_of_that_alone(site: str) -> None:
    model, given = family("t5"), inputs("t5")
    found = interp.anatomy(model, **given)
    with torch.no_grad():
        bare = model(**given).logits
    same = interp.run(model, given, edits=[interp.Custom(f"{site}.3", torch.clone)], anatomy=found)
    assert torch.allclose(same.logits, bare, atol=0 if site != "cross_result" else 1e-6)
    keep = [f"{site}.3", "z.3", "cross_z.3"]
    kept = interp.run(model, given, keep=keep, anatomy=found)
    run = interp.run(model, given, edits=[interp.Scale(f"{site}.3", 2.0)], keep=keep, anatomy=found)
    assert torch.allclose(run[f"{site}.3"], 2 * kept[f"{site}.3"], atol=1e-4)
    assert torch.equal(run["z.3"], kept["z.3"])
    assert not torch.equal(run.logits, bare)


def test_cross_attention_in_a_generation_with_its_cache() -> None:
    model, given = family("t5"), inputs("t5")
    found = interp.anatomy(model, **given)
    model.generation_config.update(decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)

    def generated() -> Tensor:
        out = model.generate(
            given["input_ids"], max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return torch.stack(out.logits)

    bare = generated()
    with interp.editing(model, interp.Zero("cross_z.3.1", steps="decode", name="zero"), anatomy=found) as ed:
        changed = generated()
    assert ed.fired["zero"] == 3
    assert torch.equal(changed[0], bare[0])
    assert not torch.equal(changed[1], bare[1])


def test_names_of_transformer_lens_for_decoders() -> None:
    model, given = family("t5"), inputs("t5")
    run = interp.run(model, given, keep=["blocks.3.cross_attn.hook_pattern", "blocks.3.hook_cross_attn_out"])
    assert set(run.fired) == {"cross_pattern.3", "cross_attn.3"}


def test_what_has_no_second_attention_says_so() -> None:
    model, given = family("t5"), inputs("t5")
    assert set(interp.run(model, given, keep="cross_z").fired) == {"cross_z.2", "cross_z.3"}
    with pytest.raises(noesis.NoesisError, match=r"cross_z.1 is refused: the block has no second attention"):
        interp.run(model, given, keep="cross_z.1")
    with pytest.raises(noesis.NoesisError, match=r"cross_z.0 is refused: the block has no second attention"):
        interp.run(family("gpt2"), inputs("gpt2"), keep="cross_z")
    with pytest.raises(noesis.NoesisError, match="head 4"):
        interp.run(model, given, keep="cross_z.2.4")


class Twice(nn.Module):
    """Two attentions to the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, x, x, need_weights=False)[0]
        return x + self.second(x, x, x, need_weights=False)[0]


def test_two_attentions_that_nothing_tells_apart_are_refused() -> None:
    torch.manual_seed(0)
    found = interp.anatomy(nn.Sequential(Twice(), Twice()).eval(), torch.randn(2, 5, 16))
    assert all("nothing tells which" in block.refused[site] for block in found.blocks for site in HEADED)


def test_contributions_have_the_second_attention_too() -> None:
    model, given, _ = of("whisper")
    found = interp.contributions(model, given, (3, 4), by="head")
    assert found.check.holds
    assert {part.partition(".")[0] for part in found.parts} >= {"result", "cross_result", "mlp"}


def test_whisper_hears_by_its_second_attention() -> None:
    """Keys of the cross-attention are as many as frames, and an edit of them changes what is said."""
    model, given, found = of("whisper")
    assert isinstance(model, transformers.PreTrainedModel)
    layer = next(number for number, block in enumerate(found.blocks) if block.cross is not None)
    run = interp.run(model, given, keep=[f"cross_k.{layer}", f"q.{layer}"], anatomy=found)
    assert run[f"cross_k.{layer}"].shape[1] != run[f"q.{layer}"].shape[1]
