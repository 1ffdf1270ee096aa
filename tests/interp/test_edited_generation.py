"""Edits through `generate`, pipelines, adapters and compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers import pipelines
from helpers.language_models import build, prompts
from noesis import interp


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }
    out = model.generate(ids, pad_token_id=0, **options)
    return torch.stack(out.logits)


OPTIONS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "without": {"use_cache": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_of_a_generation(options: dict[str, Any]) -> None:
    model, ids = build("llama"), prompts()
    bare = generated(model, ids, **options)
    direction = 5 * torch.randn(model.config.hidden_size)

    def edited(steps: Any) -> tuple[Tensor, int]:
        with interp.editing(model, interp.Add("resid_post.1", direction, positions=-1, steps=steps, name="add")) as ed:
            out = generated(model, ids, **options)
            again = generated(model, ids, **options)  # which begins anew
        assert torch.equal(out, again)
        return out, ed.fired["add"] // 2

    prefill, fired = edited("prefill")
    assert fired == 1
    assert not torch.equal(prefill[0], bare[0])
    decode, fired = edited("decode")
    assert fired == 5
    assert torch.equal(decode[0], bare[0])
    assert not torch.equal(decode[1], bare[1])
    third, fired = edited(2)
    assert fired == 1
    assert torch.equal(third[:2], bare[:2])
    assert not torch.equal(third[2], bare[2])
    everything, fired = edited(None)
    assert fired == 6
    assert torch.equal(everything[0], prefill[0])
    assert torch.equal(generated(model, ids, **options), bare)


def test_a_loop_by_hand_counts_from_each_empty_cache() -> None:
    model, ids = build("llama"), prompts()
    with torch.no_grad(), interp.editing(model, interp.Zero("mlp.1", steps="decode", name="zero")) as ed:
        for _ in range(2):
            out = model(ids, past_key_values=None, use_cache=True)
            for _ in range(3):
                out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
    assert ed.fired["zero"] == 6


def test_an_adapter_whose_generate_calls_an_inner_model() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model = model.eval()
    bare = generated(model, prompts())
    with interp.editing(model, interp.Scale("mlp.1", 3.0, steps="decode", name="scale")) as ed:
        out = generated(model, prompts())
    assert ed.fired["scale"] == 5
    assert torch.equal(out[0], bare[0])
    assert not torch.equal(out[1], bare[1])


def test_steps_of_a_pipeline_are_calls_of_its_denoiser() -> None:
    pipe, site = pipelines.build("sd15"), "mid_block"

    def image() -> Any:
        return pipelines.call("sd15", pipe, steps=4, output_type="np")

    bare, cls = image(), type(pipe)
    with interp.editing(pipe, interp.Scale(site, 3.0, steps=[1, 2], name="scale")) as ed:
        out = image()
        again = image()
    assert (out == again).all()
    assert ed.fired["scale"] == 4
    assert (out != bare).any()
    assert (image() == bare).all()
    assert type(pipe) is cls


# ---------------------------------------------------------------- compiled


def test_a_compiled_model_is_compiled_once_more_and_misses_nothing(fresh_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounter

    model, ids = build("llama"), prompts()
    found = interp.anatomy(model, ids)
    counter = CompileCounter()
    fast = torch.compile(model, backend=counter, fullgraph=True)
    sites = ["z.1.2", "pattern.0.1", "resid_mid.1", "mlp.2", "q.0", "result.1.0", "resid_post.1"]
    edits = [interp.Scale(site, 0.5) for site in sites]
    with torch.no_grad():
        bare = fast(ids, use_cache=False).logits
        graphs = counter.frame_count
        with interp.editing(fast, *edits, anatomy=found) as ed:
            edited = [fast(ids, use_cache=False).logits for _ in range(3)]
        after = fast(ids, use_cache=False).logits
        with interp.editing(model, *edits, anatomy=found) as eager:
            truth = model(ids, use_cache=False).logits
    assert torch.equal(bare, after)
    assert counter.frame_count == graphs + 1
    assert all(torch.allclose(out, truth, atol=1e-6) for out in edited)
    assert not torch.allclose(truth, bare, atol=1e-4)
    assert ed.fired == {name: 3 * fired for name, fired in eager.fired.items()}
    assert ed.changes == pytest.approx(eager.changes, rel=1e-3)


def test_steps_in_compiled_code_are_counted_on_the_device(fresh_dynamo: None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    x = torch.randn(3, 2)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), interp.editing(fast, interp.Zero("0", steps=[1, 3], name="zero")) as ed:
        outs = [bool(fast(x).abs().sum() == 0) for _ in range(5)]
    assert outs == [False, True, False, True, False]
    assert ed.fired["zero"] == 2


def test_what_a_compiled_model_cannot_have_is_said() -> None:
    model, ids = build("llama"), prompts()
    fast = torch.compile(model, backend="eager")
    with pytest.raises(noesis.NoesisError, match="is compiled"):
        interp.editing(fast, interp.Zero("z.1"))
    with pytest.raises(noesis.NoesisError, match="without a state in Python"):
        interp.editing(fast, interp.Noise("z.1", 0.1), anatomy=interp.anatomy(model, ids))
    exported = torch.export.export(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.ones(1, 2),)).module()
    with (
        pytest.raises(noesis.NoesisError, match=r"never fired|neither a site nor a module"),
        interp.editing(exported, interp.Zero("0")),
    ):
        exported(torch.ones(1, 2))
