"""What people put around a model, or do to it, before wrapping and after: one test per row of docs/limitations.md."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import noesis
from helpers.models import Block

Model = Callable[[], nn.Module]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def some(rows: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    """The output, the gradients, and the next random number."""
    torch.manual_seed(1)
    model.train().zero_grad()
    y = model(some() if x is None else x)
    y.float().square().sum().backward()
    return [y.detach(), *gradients(model), torch.rand(1)]


def infer(model: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    with torch.no_grad():
        return [model.eval()(some() if x is None else x)]


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """To the bit."""
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def tensor_of(output: Any) -> Tensor | None:
    """The first floating tensor of an output."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((found for element in output if (found := tensor_of(element)) is not None), None)
    return None


def classes_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


class Seen:
    """What the layers of a bare model return, by ordinary hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda module, args, output, name=name: self.add(name, output))

    def add(self, name: str, output: Any) -> None:
        found = tensor_of(output)
        if found is not None:
            self.outputs.setdefault(name, []).append(found.detach().double().flatten().clone())

    def check(self, trace: noesis.Trace) -> None:
        """The totals of a trace are those of these outputs; what has none is named."""
        for index, name in enumerate(trace.layers):
            outputs = self.outputs.get(name)
            if outputs is None:
                assert name in trace.never_ran or name in trace.unmeasured, name
                continue
            values = torch.cat(outputs)
            count, mean, std = trace.totals[index, :3]
            assert count == len(values), name
            assert mean == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-6), name
            assert std == pytest.approx(values.std().item(), rel=1e-4, abs=1e-6), name


def compare(
    build: Model,
    use: Callable[[nn.Module], list[Tensor]],
    prepare: Callable[[nn.Module], Any] = lambda model: model,
    *,
    layers: Any = "leaves",
    wrap_first: bool = False,
    same_classes: bool = True,
    again: bool = True,
) -> noesis.Trace:
    """Use a bare model and an observed one in the same way: the same results, and the rows they should have.

    Args:
        build: makes a model, each time the same.
        use: runs it, and gives back what has to be equal.
        prepare: does something to it, before wrapping or after, and may give back another model.
        layers: what to observe.
        wrap_first: whether `prepare` comes after wrapping.
        same_classes: whether `unwrap` gives all classes back.
        again: whether `use` leaves the model as it was, so that it can be tried once more after `unwrap`.

    Returns:
        The trace.
    """
    bare = build()
    bare = prepare(bare) or bare
    expected = use(bare)
    listened = build()
    listened = prepare(listened) or listened
    seen = Seen(listened)
    use(listened)

    model = build()
    if not wrap_first:
        model = prepare(model) or model
    classes = classes_of(model)
    wrapped = noesis.wrap(model, layers=layers)
    if wrap_first:
        model = prepare(model) or model
    assert equal(use(model), expected)
    trace = wrapped.trace()
    seen.check(trace)
    assert trace.unmeasured == {}
    wrapped.unwrap()
    if same_classes:
        assert classes_of(model) == classes
    assert not again or equal(use(model), expected)
    return trace


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    def use(model: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            return train(model)

    trace = compare(net, use)
    assert len(trace) == 1
    assert trace.never_ran == []


def test_inference_mode_and_training_after_it() -> None:
    def use(model: nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            first = model.eval()(some())
        return [first, *train(model)]

    trace = compare(net, use, layers="all")
    assert trace.calls[:, trace.layers.index("stem")].tolist() == [1, 1]


def test_grad_scaler() -> None:
    """Three steps in float16, of which the second overflows: the scaler leaves it out."""

    def use(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimiser = torch.optim.SGD(model.train().parameters(), lr=0.1)
        found = []
        for step in range(3):
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(some(seed=step) * (1e8 if step == 1 else 1)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            found += [loss.detach(), torch.tensor(scaler.get_scale()), *gradients(model)]
        return [*(torch.nan_to_num(tensor, nan=-1) for tensor in found), *(p.detach() for p in model.parameters())]

    bare, model = net(), net()
    expected = use(bare)
    wrapped = noesis.wrap(model, layers="leaves")
    assert equal(use(model), expected)
    trace = wrapped.trace()
    assert trace["count"][:, 0].tolist() == [40, 0, 40]
    assert trace["nonfinite"][:, 0].tolist() == [0, 40, 0]
    assert any(tensor.numel() == 1 and tensor == 2.0**9 for tensor in expected)  # halved by the overflow
    wrapped.unwrap()
    assert classes_of(model) == classes_of(bare)


def test_gradient_accumulation() -> None:
    def use(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        optimiser = torch.optim.AdamW(model.train().parameters(), lr=0.1)
        found = []
        for update in range(2):
            optimiser.zero_grad()
            for part in range(3):
                loss = model(some(2, seed=3 * update + part)).square().mean() / 3
                loss.backward()
                found.append(loss.detach())
            found += gradients(model)
            optimiser.step()
        return [*found, *(parameter.detach().clone() for parameter in model.parameters())]

    trace = compare(net, use, again=False)
    assert len(trace) == 6  # each forward is a step, and has its two samples
    assert trace.batches.tolist() == [2] * 6
    assert (trace.calls == 1).all()


def test_torch_func() -> None:
    """Weights from outside are measured; inside a transform nothing is, and the results are the bare model's."""
    bare, model = net().eval(), net().eval()
    wrapped = noesis.wrap(model, layers="leaves")
    weights = {name: 2 * value.detach() for name, value in bare.named_parameters()}

    def loss(of: nn.Module) -> Callable[..., Tensor]:
        return lambda weights, x: torch.func.functional_call(of, weights, (x,)).square().sum()

    assert torch.equal(loss(model)(weights, some()), loss(bare)(weights, some()))
    seen = Seen(bare)
    loss(bare)(weights, some())
    seen.check(wrapped.trace())
    assert wrapped.trace().unmeasured == {}
    wrapped.reset()
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f), (None, 0)), torch.func.jacrev):
        found, expected = transform(loss(model))(weights, some()), transform(loss(bare))(weights, some())
        assert equal(list(found.values()), list(expected.values()))
    trace = wrapped.trace()
    assert trace.totals[:, 0].sum() == 0
    assert list(trace.unmeasured) == trace.layers
    assert all("torch.func" in reason for reason in trace.unmeasured.values())
    wrapped.unwrap()
    assert classes_of(model) == classes_of(bare)


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


# ---------------------------------------------------------------- copies, threads and processes


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
def test_averages_of_a_model(average: Any) -> None:
    def run(model: nn.Module) -> tuple[AveragedModel, list[Tensor]]:
        averaged = AveragedModel(model, multi_avg_fn=average)
        optimiser = torch.optim.SGD(model.train().parameters(), lr=0.1)
        torch.manual_seed(1)
        for step in range(3):
            optimiser.zero_grad()
            model(some(seed=step)).square().mean().backward()
            optimiser.step()
            averaged.update_parameters(model)
        return averaged, [*averaged.parameters(), *model.parameters(), *infer(averaged), *infer(model)]

    bare, expected = run(net())
    wrapped = noesis.wrap(net(), layers="leaves")
    averaged, found = run(wrapped.model)
    assert equal(found, expected)
    assert len(wrapped.trace()) == 4  # the average's forward is none of them
    own = noesis.wrap(averaged.module, layers="leaves")  # the average is a copy, with a trace of its own
    assert len(own.trace()) == 1
    seen = Seen(bare.module)
    infer(bare)
    seen.check(own.trace())
    own.unwrap()
    wrapped.unwrap()
    assert not any(isinstance(module, noesis.Observed) for module in (*averaged.modules(), *wrapped.model.modules()))


def test_threads_that_have_a_copy_each() -> None:
    bare = net().eval()
    wrapped = noesis.wrap(net().eval(), layers="leaves")
    copies = [copy.deepcopy(wrapped) for _ in range(4)]
    found: dict[int, list[Tensor]] = {}

    def serve(number: int) -> None:
        with torch.inference_mode():
            found[number] = [copies[number](some(1 + number, seed=step)) for step in range(20)]

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, own in enumerate(copies):
        seen = Seen(model := copy.deepcopy(bare))
        with torch.inference_mode():
            assert equal(found[number], [model(some(1 + number, seed=step)) for step in range(20)])
        trace = own.trace()
        assert trace["count"][:, 0].tolist() == [8 * (1 + number)] * 20
        seen.check(trace)
        own.unwrap()
        assert classes_of(own.model) == classes_of(bare)
    assert len(wrapped.trace()) == 0
    wrapped.unwrap()
    assert classes_of(wrapped.model) == classes_of(bare)


def test_threads_that_share_a_model_get_its_outputs() -> None:
    bare, model = net().eval(), net().eval()
    wrapped = noesis.wrap(model, layers="leaves", capacity=8)
    found: dict[int, bool] = {}

    def serve(number: int) -> None:
        with torch.inference_mode():
            inputs = [some(1 + number, seed=step) for step in range(50)]
            found[number] = all(torch.equal(wrapped(x), bare(x)) for x in inputs)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)
    assert wrapped.trace().unmeasured == {}
    wrapped.unwrap()
    assert classes_of(model) == classes_of(bare)


METHODS = [
    pytest.param("fork", marks=pytest.mark.skipif(sys.platform == "win32", reason="has no fork")),
    pytest.param("spawn", marks=pytest.mark.slow),
]


class Features(torch.utils.data.Dataset):
    """Features of a wrapped model, computed where the data are loaded, and what its trace says there."""

    def __init__(self, model: noesis.Wrapped) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.model.reset()
        with torch.no_grad():
            y = self.model(some(1 + index, seed=index))
        return y.sum(0), torch.from_numpy(self.model.trace().totals[:, :2])


@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_data_loader(method: str) -> None:
    bare = net().eval()
    wrapped = noesis.wrap(net().eval(), layers="leaves")
    wrapped(some(7))
    before = wrapped.trace().totals
    loader = torch.utils.data.DataLoader(
        Features(wrapped), batch_size=None, num_workers=2, multiprocessing_context=method
    )
    for index, (y, totals) in enumerate(loader):
        seen = Seen(model := copy.deepcopy(bare))
        with torch.no_grad():
            assert torch.equal(y, model(some(1 + index, seed=index)).sum(0))
        for (count, mean), name in zip(totals.tolist(), wrapped.layers, strict=True):
            values = torch.cat(seen.outputs[name])
            assert count == len(values)
            assert mean == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-6)
    np.testing.assert_array_equal(wrapped.trace().totals, before)  # the parent's own
    wrapped(some(2))
    assert wrapped.trace()["count"][:, 0].tolist() == [56, 16]
    assert classes_of(wrapped.unwrap()) == classes_of(net())


def _serve(wrapped: noesis.Wrapped, results: Any) -> None:
    torch.set_num_threads(1)  # as in the workers of a DataLoader: threads of OpenMP do not survive a fork
    with torch.no_grad():
        y = wrapped(some(3))
    results.put((y.tolist(), wrapped.trace()["count"][:, 0].tolist(), len(wrapped.surprise().p_value)))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_handed_to_a_process(method: str) -> None:
    """By torch.multiprocessing, which hands tensors over as shared memory: the steps of each stay its own."""
    context = torch.multiprocessing.get_context(method)
    wrapped = noesis.wrap(net().eval(), layers=["stem", "head"], codebook=noesis.Codebook(size=4))
    wrapped.calibrate([some(200)], progress=False)
    wrapped(some(7))
    expected, code_lengths = wrapped.trace(), wrapped.surprise()
    results = context.SimpleQueue()
    child = context.Process(target=_serve, args=(wrapped, results))
    child.start()
    assert results.get() == (infer(net(), some(3))[0].tolist(), [56, 24], 3)
    child.join(60)
    np.testing.assert_array_equal(wrapped.trace().values, expected.values)
    np.testing.assert_array_equal(wrapped.surprise().p_value, code_lengths.p_value)
    wrapped(some(2))
    assert wrapped.trace()["count"][:, 0].tolist() == [56, 16]
    assert classes_of(wrapped.unwrap()) == classes_of(net())


def test_pickling_for_another_process_leaves_the_memory_where_it_is() -> None:
    wrapped = noesis.wrap(net().eval(), layers="leaves", codebook=noesis.Codebook(size=4))
    wrapped(some(3))
    bank, channel = wrapped._recorder.banks[0], next(iter(wrapped._recorder.channels.layers.values()))
    ForkingPickler.dumps(wrapped)  # moves what it shares
    assert wrapped.stem.weight.is_shared()
    for tensor in (bank.slab, bank.totals, bank.steps, bank.control, channel.buffer, channel.stamp):
        assert not tensor.is_shared()
    wrapped(some(2))
    assert wrapped.trace()["count"][:, 0].tolist() == [24, 16]


def test_pickling_for_another_process_leaves_what_routers_chose_where_it_is() -> None:
    pytest.importorskip("transformers")
    from helpers.language_models import build

    wrapped = noesis.wrap(build("mixtral"), layers="routers")
    wrapped(tokens())
    ForkingPickler.dumps(wrapped)
    routes = wrapped._recorder.banks[0].routes
    assert not any(tensor.is_shared() for tensor in (routes.sums, routes.pairs, routes.last))
    wrapped(tokens())
    assert wrapped.routes().tokens.tolist() == [[14] * 3] * 2


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
