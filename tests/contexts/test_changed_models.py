"""What people do to a model, before wrapping it or after; one test per row of docs/limitations.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from compared import Net, Seen, classes_of, compare, equal, gradients, infer, net, some, train
from helpers.models import Block

# ---------------------------------------------------------------- adapters and quantisation


def llama() -> Any:
    pytest.importorskip("transformers")
    from helpers.language_models import build

    return build("llama")


def tokens() -> Tensor:
    from helpers.language_models import prompts

    return prompts()


def train_language(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    model.train().zero_grad()
    found = model(input_ids=tokens(), labels=tokens())
    found.loss.backward()
    return [found.loss.detach(), found.logits.detach(), *gradients(model)]


def with_adapter(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_dropout=0.1, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_adapters_before_wrapping() -> None:
    trace = compare(lambda: with_adapter(llama()), train_language, layers="linear")
    assert "base_model.model.model.layers.0.self_attn.q_proj" in trace.layers  # one layer, with its adapter
    assert not any("lora" in name or "base_layer" in name for name in trace.layers)


def infer_language(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [model.eval()(input_ids=tokens()).logits]


@pytest.mark.parametrize("wrap_first", [False, True], ids=["merged, then wrapped", "wrapped, then merged"])
def test_merged_adapters(wrap_first: bool) -> None:
    def build() -> Any:
        return with_adapter(llama())

    trace = compare(build, infer_language, lambda model: model.merge_adapter(), layers="linear", wrap_first=wrap_first)
    apart = compare(build, infer_language, layers="linear")
    np.testing.assert_allclose(trace["mean"], apart["mean"], rtol=1e-3, atol=1e-5)


def test_adapters_merged_and_unloaded_before_wrapping() -> None:
    trace = compare(lambda: with_adapter(llama()).merge_and_unload(), infer_language, layers="linear")
    assert "model.layers.0.self_attn.q_proj" in trace.layers


def test_adapters_merged_and_unloaded_after_wrapping_are_named() -> None:
    model = with_adapter(llama())
    wrapped = noesis.wrap(model, layers="linear")
    plain = model.merge_and_unload()
    bare = with_adapter(llama()).merge_and_unload()
    assert torch.equal(plain(tokens()).logits, bare(tokens()).logits)
    trace = wrapped.trace()
    lost = [name for name in trace.layers if name.endswith(("q_proj", "down_proj"))]
    assert len(lost) == 6
    assert sorted(trace.unmeasured) == sorted(lost)
    assert trace.unmeasured[lost[0]].startswith("another module took its place after wrapping")
    wrapped.unwrap()
    assert not any(isinstance(module, noesis.Observed) for module in (*plain.modules(), *model.modules()))


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*TypedStorage")  # torch's own are deprecated
def test_dynamically_quantised_layers() -> None:
    def build() -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(net().eval(), {nn.Linear})

    trace = compare(build, infer, layers=["linear", "leaves", "blocks"])
    assert trace.layers == compare(net, infer, layers=["linear", "leaves", "blocks"]).layers
    assert trace.never_ran == []
    assert noesis.wrap(build(), layers="blocks").layers == ["blocks.0", "blocks.1"]


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*TypedStorage", "ignore:.*reduce_range")
def test_statically_quantised_layers_return_no_floating_tensors() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        model = torch.ao.quantization.QuantWrapper(model).eval()
        model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
        torch.ao.quantization.prepare(model, inplace=True)
        model(some())
        return torch.ao.quantization.convert(model)

    bare, model = build(), build()
    wrapped = noesis.wrap(model, layers="leaves")
    assert equal(infer(model), infer(bare))
    trace = wrapped.trace()
    assert trace.layers == ["quant", "dequant", "module.0", "module.1", "module.2"]
    assert trace["count"].tolist() == [[0, 15, 0, 0, 0]]
    reason = "no floating tensor, in an output of type Tensor"
    assert trace.unmeasured == dict.fromkeys(["quant", "module.0", "module.1", "module.2"], reason)
    wrapped.unwrap()
    assert classes_of(model) == classes_of(bare)


# ---------------------------------------------------------------- offloading


OFFLOADS: dict[str, Callable[[Any, nn.Module, Path], Any]] = {
    "cpu_offload": lambda accelerate, model, _: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk_offload": lambda accelerate, model, folder: accelerate.disk_offload(
        model, folder, execution_device=torch.device("cpu")
    ),
    "dispatch_model": lambda accelerate, model, folder: accelerate.dispatch_model(
        model, {"stem": "cpu", "blocks": "disk", "head": "cpu"}, main_device="cpu", offload_dir=folder
    ),
    "hooks": lambda accelerate, model, _: accelerate.hooks.attach_align_device_hook(
        model, execution_device=torch.device("cpu"), offload=True
    ),
}


@pytest.mark.parametrize("wrap_first", [False, True], ids=["offloaded, then wrapped", "wrapped, then offloaded"])
@pytest.mark.parametrize("way", OFFLOADS)
def test_offloading_by_accelerate(way: str, wrap_first: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def offload(model: nn.Module) -> None:
        OFFLOADS[way](accelerate, model, tmp_path)
        assert any(parameter.is_meta for parameter in model.parameters())

    trace = compare(net, infer, offload, layers="all", wrap_first=wrap_first)
    assert trace.never_ran == []
    assert len(trace) == 1


@pytest.mark.parametrize("wrap_first", [False, True], ids=["offloaded, then wrapped", "wrapped, then offloaded"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading(level: str, wrap_first: bool) -> None:
    pytest.importorskip("diffusers")
    from helpers.pipelines import build, call

    def run(pipe: Any) -> list[Tensor]:
        return [torch.from_numpy(call("sd15", pipe, steps=2))]

    def prepare(model: Any) -> None:
        model.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=level,
            num_blocks_per_group=1 if level == "block_level" else None,
        )
        assert any(hasattr(module, "_diffusers_hook") for module in model.modules())

    bare = build("sd15")
    prepare(bare.unet)
    seen = Seen(bare.unet)
    expected = run(bare)
    pipe = build("sd15")
    if not wrap_first:
        prepare(pipe.unet)
    classes = classes_of(pipe.unet)
    wrapped = noesis.wrap(pipe, layers="leaves")
    if wrap_first:
        prepare(pipe.unet)
    assert equal(run(pipe), expected)
    trace = wrapped.trace()
    seen.check(trace)
    assert trace.unmeasured == {}
    assert len(trace) == 2
    wrapped.unwrap()
    assert classes_of(pipe.unet) == classes


# ---------------------------------------------------------------- diffusers


def test_a_block_cache_switched_on_before_wrapping() -> None:
    diffusers = pytest.importorskip("diffusers")
    from helpers.pipelines import build, call

    def cached() -> Any:
        pipe = build("flux")
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
        return pipe

    bare, pipe = cached(), cached()
    seen = Seen(bare.transformer)
    expected = call("flux", bare, steps=4)
    wrapped = noesis.wrap(pipe, layers="linear")
    np.testing.assert_array_equal(call("flux", pipe, steps=4), expected)
    trace = wrapped.trace()
    seen.check(trace)
    skipped = [layer.startswith("transformer_blocks.1.") for layer in trace.layers]
    assert trace.calls[:, skipped].sum(1).tolist() == [sum(skipped), 0, 0, 0]
    wrapped.unwrap()
    assert classes_of(pipe.transformer) == classes_of(bare.transformer)


@pytest.mark.parametrize("wrap_first", [False, True], ids=["fused, then wrapped", "wrapped, then fused"])
def test_fused_projections(wrap_first: bool) -> None:
    pytest.importorskip("diffusers")
    from helpers.pipelines import build, call

    bare, pipe = build("sd15"), build("sd15")
    bare.unet.fuse_qkv_projections()
    seen = Seen(bare.unet)
    expected = call("sd15", bare, steps=2)
    if not wrap_first:
        pipe.unet.fuse_qkv_projections()
    classes = {name: type(module) for name, module in pipe.unet.named_modules()}
    wrapped = noesis.wrap(pipe, layers="linear")
    if wrap_first:
        pipe.unet.fuse_qkv_projections()
    np.testing.assert_array_equal(call("sd15", pipe, steps=2), expected)
    trace = wrapped.trace()
    seen.check(trace)
    assert trace.unmeasured == {}
    assert trace.never_ran
    assert all(name.rpartition(".")[2] in ("to_q", "to_k", "to_v") for name in trace.never_ran)
    assert any(name.endswith("to_qkv") for name in trace.layers) == (not wrap_first)
    wrapped.unwrap()
    assert all(type(pipe.unet.get_submodule(name)) is cls for name, cls in classes.items())


# ---------------------------------------------------------------- weights and layers that change


@pytest.mark.parametrize("wrap_first", [False, True], ids=["sharded, then wrapped", "wrapped, then sharded"])
def test_classes_swapped_by_fsdp2(wrap_first: bool, tmp_path: Path) -> None:
    """On one rank; `test_distributed.py` has two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        try:
            fully_shard(bare := net(), mesh=mesh)
            train(bare)
        except AttributeError as error:  # torch 2.6 built for CUDA asks a stream of the CPU to record an event
            pytest.skip(f"FSDP2 itself does not run here: {error}")

        def shard(model: Any) -> None:
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)

        def use(model: nn.Module) -> list[Tensor]:
            return [getattr(tensor, "_local_tensor", tensor) for tensor in train(model)]

        trace = compare(net, use, shard, layers="all", wrap_first=wrap_first, same_classes=not wrap_first)
        assert trace.never_ran == []
    finally:
        torch.distributed.destroy_process_group()


def test_tied_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from helpers.language_models import build

    def tied() -> Any:
        return build("llama", tie_word_embeddings=True)

    trace = compare(tied, train_language)
    assert {"model.embed_tokens", "lm_head"} <= set(trace.layers)
    model = tied()
    wrapped = noesis.wrap(model, layers="leaves")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert wrapped.unwrap().lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_after_wrapping(assign: bool) -> None:
    def load(model: nn.Module) -> None:
        torch.manual_seed(3)
        assert str(model.load_state_dict(Net().state_dict(), assign=assign)) == "<All keys matched successfully>"

    trace = compare(net, train, load, wrap_first=True)
    other = compare(net, train)
    assert (trace["mean"] != other["mean"]).any()


def test_layers_added_after_wrapping_are_not_observed() -> None:
    def grow(model: Any) -> None:
        torch.manual_seed(3)
        model.blocks.append(Block())

    trace = compare(net, train, grow, wrap_first=True, same_classes=False)
    assert not any(name.startswith("blocks.2") for name in trace.layers)
    again = compare(net, train, grow)
    assert "blocks.2.up" in again.layers
