"""A row for each stream of a block: real SD3 and Flux, in eager and compiled code, through all that rows go through."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import noesis
from helpers.pipelines import build, call, wrapping

BOTH = ["blocks", "blocks:text"]
TEXT = "transformer_blocks.0:text"
#: The last block of SD3 returns None in its place.
NO_TEXT_LEFT = {"transformer_blocks.1:text": "no floating tensor, in an output of type tuple"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Each pipeline, built once; whoever wraps one unwraps it."""
    return {name: build(name) for name in ("sd3", "flux", "pixart")}


def inputs(name: str, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """What the transformer of a pipeline is given: text of 5 tokens, an image of 16."""
    made = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    if name == "sd3":
        return {
            "hidden_states": randn(batch, 4, 4, 4),
            "encoder_hidden_states": randn(batch, 5, 64),
            "pooled_projections": randn(batch, 64),
            "timestep": torch.full((batch,), 500.0),
        }
    return {
        "hidden_states": randn(batch, 16, 4),
        "encoder_hidden_states": randn(batch, 5, 32),
        "pooled_projections": randn(batch, 32),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def returned(transformer: nn.Module, names: list[str], run: Callable[[], Any]) -> dict[str, list[Tensor]]:
    """The text and the image that blocks return, by plain hooks, in the names of their rows."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name in {name.removesuffix(":text") for name in names}:

        def hook(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
            for row, tensor in ((f"{name}:text", output[0]), (name, output[1])):
                if tensor is not None:
                    seen.setdefault(row, []).append(tensor.detach().double())

        handles.append(transformer.get_submodule(name).register_forward_hook(hook))
    run()
    for handle in handles:
        handle.remove()
    return seen


def check(trace: noesis.Trace, seen: dict[str, list[Tensor]]) -> None:
    """Rows are those of these tensors, step by step."""
    assert {name for name, called in zip(trace.layers, trace.calls.any(0), strict=True) if called} == set(seen)
    for name, tensors in seen.items():
        rows = trace.layer(name)
        assert len(rows) == len(tensors)
        for row, tensor in zip(rows, tensors, strict=True):
            found = dict(zip(trace.stats, row, strict=True))
            assert found["count"] == tensor.numel()
            assert found["mean"] == pytest.approx(tensor.mean().item(), rel=1e-4, abs=1e-6)
            assert found["std"] == pytest.approx(tensor.std().item(), rel=1e-4)
            assert (found["min"], found["max"]) == pytest.approx((tensor.min().item(), tensor.max().item()))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_both_streams_of_a_pipeline(pipelines: dict[str, Any], name: str) -> None:
    """Rows by plain hooks, the image to the bit, and the rows of the image as they are without the text."""
    pipe = pipelines[name]
    bare = call(name, pipe)
    with wrapping(pipe) as wrapped:
        call(name, pipe)
        alone = wrapped.trace()
    classes = {key: type(module) for key, module in pipe.transformer.named_modules()}
    with wrapping(pipe, layers=BOTH) as wrapped:
        names = wrapped.observed_layers
        images: list[Any] = []
        seen = returned(pipe.transformer, names, lambda: images.append(call(name, pipe)))
        trace = wrapped.trace()
    assert {key: type(module) for key, module in pipe.transformer.named_modules()} == classes
    np.testing.assert_array_equal(images[0], bare)
    assert names == [row for layer in alone.layers for row in (layer, f"{layer}:text")]
    check(trace, seen)
    assert len(trace) == 3
    for layer in alone.layers:
        np.testing.assert_array_equal(trace.layer(layer), alone.layer(layer))
    assert trace.timesteps.tolist() == alone.timesteps.tolist()
    assert trace.never_ran == []
    assert trace.unmeasured == (NO_TEXT_LEFT if name == "sd3" else {})


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_text_alone(pipelines: dict[str, Any], name: str) -> None:
    transformer = pipelines[name].transformer
    with wrapping(transformer, layers="transformer_blocks.0:text") as wrapped, torch.no_grad():
        assert wrapped.observed_layers == ["transformer_blocks.0:text"]
        assert isinstance(transformer.transformer_blocks[0], noesis.Observed)
        seen = returned(transformer, wrapped.observed_layers, lambda: wrapped(**inputs(name)))
        trace = wrapped.trace()
    check(trace, {"transformer_blocks.0:text": seen["transformer_blocks.0:text"]})
    assert trace["count"].item() == 2 * 5 * 32


def test_a_block_of_one_stream_is_refused(pipelines: dict[str, Any]) -> None:
    pipe = pipelines["pixart"]
    with pytest.raises(noesis.NoesisError, match="'transformer_blocks.0:text' means a stream 'text'.*These return one"):
        noesis.wrap(pipe, layers="transformer_blocks.0:text")
    with pytest.raises(noesis.NoesisError, match=r"which 'blocks' of PixArtTransformer2DModel has not"):
        noesis.wrap(pipe, layers=BOTH)
    assert not any(isinstance(module, noesis.Observed) for module in pipe.transformer.modules())


def test_per_sample(pipelines: dict[str, Any]) -> None:
    transformer = pipelines["flux"].transformer
    with wrapping(transformer, layers=BOTH, per_sample=True) as wrapped, torch.no_grad():
        seen = returned(transformer, wrapped.observed_layers, lambda: wrapped(**inputs("flux", batch=3)))
        samples = wrapped.trace().samples
    assert len(samples) == 3
    for index, sample in enumerate(samples):
        check(sample, {name: [tensor[0][index]] for name, tensor in seen.items()})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(pipelines: dict[str, Any], checkpointing: bool) -> None:
    """Each stream has its own, in the recomputation of activation checkpointing too; bits are the bare model's."""
    transformer = copy.deepcopy(pipelines["flux"].transformer).train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()

    def loss(model: Any) -> Tensor:
        return model(**inputs("flux")).sample.square().sum()

    loss(transformer).backward()
    bare = [parameter.grad.clone() for parameter in transformer.parameters() if parameter.grad is not None]
    transformer.zero_grad()
    with wrapping(transformer, layers=BOTH, gradients=True) as wrapped:
        kept: dict[str, Tensor] = {}

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            for row, tensor in ((":text", output[0]), ("", output[1])):
                tensor.register_hook(lambda gradient, row=row: kept.update({row: gradient.double()}))

        handle = transformer.transformer_blocks[0].register_forward_hook(keep)
        loss(wrapped).backward()
        handle.remove()
        trace = wrapped.gradients()
        assert (wrapped.trace().calls == 1).all()
    found = [parameter.grad for parameter in transformer.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(bare, found, strict=True))
    for row, gradient in kept.items():
        values = dict(zip(trace.stats, trace.layer(f"transformer_blocks.0{row}")[0], strict=True))
        assert values["count"] == gradient.numel()
        assert values["std"] == pytest.approx(gradient.std().item(), rel=1e-4)
        assert values["abs_mean"] == pytest.approx(gradient.abs().mean().item(), rel=1e-4)
    # Nothing that the loss depends on is left in the text behind the last block.
    assert trace.never_ran == ["single_transformer_blocks.1:text"]


def test_surprise(pipelines: dict[str, Any], tmp_path: Path) -> None:
    """Text that is strange is found in the rows of the text; calibrations are saved, loaded, and of these layers."""
    transformer = copy.deepcopy(pipelines["flux"].transformer)
    codebook = noesis.Codebook(size=2, dim=4)
    layers = ["transformer_blocks.0", "transformer_blocks.0:text"]
    with wrapping(transformer, layers=layers, codebook=codebook) as wrapped:
        wrapped.calibrate(
            [inputs("flux", batch=40, seed=seed) for seed in range(5)],
            progress=False,
            forward=lambda model, batch: model(**batch),
        )
        assert list(wrapped.codebooks) == layers
        path = wrapped.save_calibration(tmp_path / "calibration.safetensors")
        with torch.no_grad():
            strange = inputs("flux", batch=8, seed=9)
            strange["encoder_hidden_states"] = strange["encoder_hidden_states"] * 20 + 30
            wrapped(**strange)
        surprise = wrapped.surprise()
        assert (surprise.p_value < 0.05).all()
        assert "transformer_blocks.0:text" in repr(surprise) or "transformer_blocks.0:text" in surprise.to_json()
    with wrapping(transformer, layers=layers, codebook=codebook) as wrapped, torch.no_grad():
        wrapped.load_calibration(path)
        wrapped(**strange)
        np.testing.assert_allclose(wrapped.surprise().p_value, surprise.p_value)
    with (
        wrapping(transformer, layers=layers[:1], codebook=codebook) as wrapped,
        pytest.raises(noesis.NoesisError, match="transformer_blocks.0:text"),
    ):
        wrapped.load_calibration(path)


def test_captured(pipelines: dict[str, Any]) -> None:
    transformer = pipelines["sd3"].transformer
    with torch.no_grad(), noesis.capture(transformer, ["blocks", "transformer_blocks.0:text"]) as acts:
        seen = returned(transformer, list(acts), lambda: transformer(**inputs("sd3")))
    assert list(acts) == ["transformer_blocks.0", "transformer_blocks.0:text", "transformer_blocks.1"]
    for name in acts:
        assert torch.equal(acts[name][0].double(), seen[name][0])


def test_files_comparisons_pictures_and_logs(pipelines: dict[str, Any], tmp_path: Path) -> None:
    transformer = pipelines["flux"].transformer
    with wrapping(transformer, layers=BOTH) as wrapped, torch.no_grad():
        wrapped(**inputs("flux"))
        first = wrapped.trace()
        logged = wrapped.log_to(tmp_path / "run.csv", layers=["transformer_blocks.0:text"])
        state = noesis.RunState(wrapped).state_dict()
        wrapped.reset()
        noesis.RunState(wrapped).load_state_dict(state)
        other = inputs("flux")
        other["encoder_hidden_states"] = other["encoder_hidden_states"] + 1
        wrapped(**other)
        resumed = wrapped.trace()
        wrapped.reset()
        wrapped(**other)
        second = wrapped.trace()
    assert logged["noesis/transformer_blocks.0:text/std"] == pytest.approx(
        first.layer(TEXT)[0][first.stats.index("std")]
    )
    np.testing.assert_allclose(resumed.totals[:, 0], first.totals[:, 0] + second.totals[:, 0])
    again = noesis.Trace.load(first.save(tmp_path / "trace.safetensors"))
    assert again.layers == first.layers
    np.testing.assert_array_equal(again.values, first.values)
    old = noesis.Trace.load(first.save_v01(tmp_path / "old")[0])
    assert set(old.layers) == set(first.layers)
    soulprint = noesis.Soulprint.load(second.soulprint().save(tmp_path / "soulprint.json"))
    assert soulprint.layers == first.layers
    compared = noesis.compare(first, second)
    assert {row.layer for row in compared.rows} == set(first.layers)
    assert max(compared.rows, key=lambda row: row.salience).layer.endswith(":text")
    for number, result in enumerate((first, compared)):
        path = tmp_path / f"{number}.png"
        result.plot(path=path)
        assert path.stat().st_size > 1000


def test_alarms_name_the_stream(pipelines: dict[str, Any]) -> None:
    transformer = copy.deepcopy(pipelines["flux"].transformer)
    found: list[noesis.Alarm] = []
    with wrapping(transformer, layers=[TEXT, "transformer_blocks.0"]) as wrapped, torch.no_grad():
        watch = noesis.Alarms(wrapped, on_alarm=found.append)
        with torch.no_grad():
            transformer.transformer_blocks[0].ff_context.net[2].bias[3] = torch.nan
        wrapped(**inputs("flux"))
        watch.check()
    assert [alarm.layer for alarm in found] == [TEXT]


def test_copies_pickles_and_wrapping_again(pipelines: dict[str, Any]) -> None:
    transformer = copy.deepcopy(pipelines["sd3"].transformer)
    wrapped = noesis.wrap(transformer, layers=BOTH)
    again = noesis.wrap(transformer, layers=BOTH)
    for other in (again, copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        with torch.no_grad():
            other(**inputs("sd3"))
        trace = other.trace()
        assert trace.layers == wrapped.observed_layers
        assert trace.unmeasured == NO_TEXT_LEFT
        assert trace.layer(TEXT)[-1, 0] == 2 * 5 * 32
    with pytest.raises(noesis.NoesisError, match="wrapped already"):
        noesis.wrap(transformer)
    assert not any(isinstance(module, noesis.Observed) for module in wrapped.unwrap().modules())


def test_a_module_that_took_the_blocks_place_is_named(pipelines: dict[str, Any]) -> None:
    transformer = copy.deepcopy(pipelines["sd3"].transformer)
    wrapped = noesis.wrap(transformer, layers=BOTH)
    fresh = copy.deepcopy(pipelines["sd3"].transformer)
    transformer.transformer_blocks[0] = fresh.transformer_blocks[0]
    with torch.no_grad():
        wrapped(**inputs("sd3"))
    unmeasured = wrapped.trace().unmeasured
    assert "another module took its place" in unmeasured["transformer_blocks.0"]
    assert "another module took its place" in unmeasured[TEXT]


def test_output_is_of_hidden_states_alone(pipelines: dict[str, Any]) -> None:
    """And where it fails, the streams have their rows all the same."""
    transformer = pipelines["flux"].transformer

    def fails(output: Any) -> Any:
        raise KeyError("nothing")

    with torch.no_grad():
        with wrapping(transformer, layers=BOTH, output=lambda output: output[1][:, :2]) as wrapped:
            wrapped(**inputs("flux"))
            trace = wrapped.trace()
            assert trace.layer("transformer_blocks.0")[0, 0] == 2 * 2 * 32
            assert trace.layer(TEXT)[0, 0] == 2 * 5 * 32
        with wrapping(transformer, layers=["transformer_blocks.0", TEXT], output=fails) as wrapped:
            wrapped(**inputs("flux"))
            trace = wrapped.trace()
            assert trace.layer(TEXT)[0, 0] == 2 * 5 * 32
            assert trace.unmeasured == {"transformer_blocks.0": "KeyError: 'nothing'"}


class Chroma(nn.Module):
    """Dual-stream blocks that diffusers' registry does not know, as those of Chroma and AuraFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Unregistered() for _ in range(2))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
        return hidden_states


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = self.image(hidden_states) + encoder_hidden_states.mean()
        encoder_hidden_states = self.text(encoder_hidden_states)
        return encoder_hidden_states, hidden_states


@pytest.mark.usefixtures("fresh_dynamo")
def test_blocks_that_no_registry_knows() -> None:
    model, x, text = Chroma(), torch.randn(2, 7, 4), torch.randn(2, 3, 4)
    wrapped = noesis.wrap(model, layers=BOTH, gradients=True)
    seen = returned(model, wrapped.observed_layers, lambda: wrapped(x, text).sum().backward())
    check(wrapped.trace(), seen)
    assert wrapped.gradients().layer("blocks.0:text")[0, 0] == 2 * 3 * 4
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            compiled(x, text)
    trace = wrapped.trace()
    assert (trace.calls == 1).all()
    np.testing.assert_allclose(trace.values[1:], np.repeat(trace.values[:1], 3, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled(pipelines: dict[str, Any], name: str) -> None:
    """One graph, the rows of eager code; what is not there is never run, as everywhere in compiled code."""
    transformer = copy.deepcopy(pipelines[name].transformer)
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad(), wrapping(transformer, layers=BOTH, per_sample=2) as wrapped:
        eager = wrapped(**inputs(name)).sample
        compiled = torch.compile(transformer, fullgraph=True, backend=counter)
        for _ in range(3):
            assert torch.equal(compiled(**inputs(name)).sample, eager)
        trace = wrapped.trace()
    assert counter.frame_count == 1
    assert len(trace) == 4
    assert trace.unmeasured == (NO_TEXT_LEFT if name == "sd3" else {})
    for each in (trace, *trace.samples):
        np.testing.assert_array_equal(each.calls[1:], np.repeat(each.calls[:1], 3, 0))
        np.testing.assert_allclose(each.values[1:], np.repeat(each.values[:1], 3, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_blocks_compiled_by_themselves_share_their_graph(pipelines: dict[str, Any]) -> None:
    """With two rows each, blocks of one class are compiled as often as with none."""

    def frames(**layers: Any) -> tuple[int, noesis.Trace | None]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        transformer = copy.deepcopy(pipelines["flux"].transformer)
        wrapped = noesis.wrap(transformer, **layers) if layers else None
        transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        with torch.no_grad():
            transformer(**inputs("flux"))
        return counter.frame_count, None if wrapped is None else wrapped.trace()

    bare, _ = frames()
    observed, trace = frames(layers=BOTH)
    assert observed == bare
    assert trace is not None
    assert (trace.calls == 1).all()
