"""Capturing full activations: what is kept, what it costs the model (nothing), and what goes wrong."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import noesis
from noesis.errors import BadFile, BadType, BadValue, MissingFile, TooLarge, WrongState
from noesis.results import Activations
from noesis.results.activations import UnknownLayerError
from noesis.wrapping import capture


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


class Branching(nn.Module):
    """Calls `used` as often as asked, `spare` never, and has layers with other outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.counter = nn.Linear(4, 4), nn.Linear(4, 4), Counter()

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            x = self.used(x)
        self.counter(x)
        return x


class Counter(nn.Module):
    def forward(self, x: Tensor) -> int:
        return x.numel()


# What is kept.


def test_keeps_what_the_layers_returned() -> None:
    model, x = network(), torch.randn(3, 4)
    with capture(model, "all") as acts:
        model(x)
    assert acts.layers == list(acts) == ["0", "1", "2"]
    assert torch.equal(acts["0"][0], model[0](x))
    assert torch.equal(acts["2"][0], model(x))
    assert acts.nbytes == 4 * (24 + 24 + 6)


def test_calls_are_in_order_and_kept_by_value() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    x, y = torch.randn(2, 1, 4), torch.randn(2, 3, 4)
    with capture(model, "all") as acts, torch.no_grad():
        model(x)
        model(y)
    assert [tuple(call.shape) for call in acts["0"]] == [(2, 1, 4), (2, 3, 4)]
    with torch.no_grad():
        assert torch.equal(acts["0"][1], model[0](y))  # before the in-place ReLU
        assert torch.equal(acts.stacked("1"), torch.cat([model(x), model(y)], dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_dtype_is_the_layers_own(dtype: torch.dtype) -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(dtype)

    model = nn.Sequential(Cast(), Cast())
    with capture(model, "all") as acts:
        model(torch.randn(1, 2, 4))
        model(torch.randn(1, 3, 4))
    assert {call.dtype for calls in acts.values() for call in calls} == {dtype}
    assert acts.stacked("0").dtype == dtype
    assert acts.stacked("0").shape == (1, 5, 4)
    assert acts.nbytes == 2 * 20 * torch.empty(0, dtype=dtype).element_size()


def test_kept_tensors_are_contiguous_detached_and_usable_after_inference_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2)).to(memory_format=torch.channels_last)
    with capture(model, "0") as acts, torch.inference_mode():
        output = model[0](torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last))
    kept = acts["0"][0]
    assert not output.is_contiguous()
    assert kept.is_contiguous()
    assert not kept.requires_grad
    assert not kept.is_inference()
    weight = torch.ones(5, requires_grad=True)
    (kept * weight).sum().backward()  # an inference tensor could not be saved for backward
    assert torch.equal(kept, output)


def test_dual_outputs_keep_the_hidden_state() -> None:
    lstm = nn.Sequential(nn.LSTM(4, 8, batch_first=True))
    with capture(lstm, "0") as acts:
        lstm(torch.randn(2, 5, 4))
    assert acts["0"][0].shape == (2, 5, 8)


def test_never_ran_and_unmeasured_are_listed_by_name() -> None:
    model = Branching()
    with capture(model, "all") as acts:
        assert acts.never_ran == ["used", "spare", "counter"]
        model(torch.randn(2, 4))
    assert acts.never_ran == ["spare"]
    assert acts["spare"] == []
    assert acts.unmeasured == {"counter": "no floating tensor in its output"}
    assert "never ran: spare" in repr(acts)
    assert "not measured: counter (no floating tensor in its output)" in repr(acts)


def test_sparse_and_dataless_outputs_are_unmeasured() -> None:
    class Sparse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to_sparse()

    model = nn.Sequential(nn.Identity(), Sparse())
    with capture(model, "all") as acts:
        model(torch.eye(2))
    assert acts.unmeasured == {"1": "its tensor is sparse, nested or without data"}
    with torch.device("meta"):
        model, x = network(), torch.randn(1, 4)
    with pytest.raises(BadValue, match="No output of the selected layers can be kept: 0, 1, 2"), capture(model, "all"):
        model(x)


def test_checkpoint_recomputation_is_no_call() -> None:
    for reentrant in (False, True):
        model, x = network(), torch.randn(3, 4, requires_grad=True)
        with capture(model, "all") as acts:
            checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        assert [len(calls) for calls in acts.values()] == [1, 1, 1]


def test_repr() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4))
    with capture(model, "all") as acts:
        model(torch.randn(1, 19, 4))
        for _ in range(4):
            model(torch.randn(1, 1, 4))
    assert repr(acts).splitlines() == [
        "Activations of 2 layers, 10 calls, 1.8 KiB",
        "layer                 calls    dtype",
        "0      1x19x16, 4 of 1x1x16  float32",
        "1        1x19x4, 4 of 1x1x4  float32",
    ]
    many = Activations({f"layer{index}": [torch.ones(1)] for index in range(100)})
    assert "more ..." in repr(many)
    assert len(repr(many).splitlines()) < 30


# The model does not notice.


def test_outputs_and_gradients_are_bitwise_the_same() -> None:
    model, x = network(), torch.randn(5, 4)
    model.insert(1, nn.Dropout(0.5))

    def run() -> list[Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        return [output.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    plain = run()
    state = torch.get_rng_state()
    with capture(model, "all"):
        captured = run()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))


def test_transformer_encoder_gives_the_same_on_the_cpu() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 7, 32)
    with torch.no_grad():
        plain = model(x)
        with capture(model) as acts:
            assert torch.equal(model(x), plain)
    assert torch.equal(acts["layers.1"][0], plain)


def test_hooks_go_on_leaving_and_after_an_error() -> None:
    model = network()
    with capture(model, "all"):
        assert hooks(model) == 3
        model(torch.ones(1, 4))
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), capture(model, "all"):  # not WrongState, although nothing ran
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_other_hooks_stay_and_their_output_is_kept() -> None:
    model = network()
    handle = model[0].register_forward_hook(lambda module, args, output: output + 1)
    with capture(model, "0") as acts:
        model(torch.ones(1, 4))
    assert hooks(model) == 1
    handle.remove()
    assert torch.equal(acts["0"][0], model[0](torch.ones(1, 4)) + 1)


def test_nested_captures() -> None:
    model, x = network(), torch.ones(1, 4)
    with capture(model, "all") as outer:
        model(x)
        with capture(model, "0") as inner:
            model(x)
        model(x)
    assert len(inner["0"]) == 1
    assert [len(calls) for calls in outer.values()] == [3, 3, 3]


def test_a_copy_made_inside_does_not_record_after_leaving() -> None:
    model = network()
    with capture(model, "all") as acts:
        model(torch.ones(1, 4))
        twin = copy.deepcopy(model)
    twin(torch.ones(1, 4))
    assert [len(calls) for calls in acts.values()] == [1, 1, 1]


# What can be captured.


def test_a_wrap_is_captured_under_the_models_names() -> None:
    model = network()
    wrapped = noesis.wrap(model, "linear")
    with capture(wrapped, "all") as acts:
        wrapped(torch.ones(1, 4))
    assert acts.layers == ["0", "1", "2"]
    assert [len(calls) for calls in acts.values()] == [1, 1, 1]
    assert acts.meta["model"] == "Sequential"
    assert len(wrapped.trace()) == 1
    assert wrapped.unwrap() is model


def test_a_module_with_a_submodule_called_model_is_itself() -> None:
    outer = nn.Module()
    outer.model = network()
    with capture(outer, "all") as acts:
        outer.model(torch.ones(1, 4))
    assert acts.layers == ["model", "model.0", "model.1", "model.2"]


def test_not_a_model() -> None:
    with (
        pytest.raises(BadType, match=r"model is of type int\. Expected an nn\.Module.*Pass the model itself"),
        capture(3),
    ):
        pass
    with pytest.raises(BadValue, match="selects nothing"), capture(network(), "nothing.here"):
        pass


# Compiled models.


@torch.no_grad()  # with gradients, Dynamo itself warns where a graph breaks
@pytest.mark.slow
def test_compiled_inside_is_seen_and_stays_silent_after_leaving() -> None:
    torch.compiler.reset()
    model, x = network(), torch.randn(3, 4)
    plain = model(x)
    with capture(model, "all") as acts:
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(x), plain)
        with torch._dynamo.config.patch(error_on_recompile=True):  # not from step to step
            for _ in range(2):
                assert torch.equal(compiled(x), plain)
    assert [len(calls) for calls in acts.values()] == [3, 3, 3]
    assert torch.equal(compiled(x), plain)
    assert [len(calls) for calls in acts.values()] == [3, 3, 3]


@torch.no_grad()  # with gradients, Dynamo itself warns where a graph breaks
def test_compiled_but_not_run_yet_is_seen_under_its_own_names() -> None:
    torch.compiler.reset()
    compiled, x = torch.compile(network(), backend="eager"), torch.randn(3, 4)
    with capture(compiled, "all") as acts:
        compiled(x)
    assert acts.layers == ["0", "1", "2"]
    assert acts.never_ran == []


@torch.no_grad()  # with gradients, Dynamo itself warns where a graph breaks
def test_compiled_and_run_before_is_an_error() -> None:
    torch.compiler.reset()
    compiled, x = torch.compile(network(), backend="eager"), torch.randn(3, 4)
    compiled(x)
    message = (
        r"None of the 3 selected layers ran inside the with block\. Expected a forward .* Run the model inside the "
        r"block; if it did run, it was compiled before: enter capture before the first run of a torch\.compile'd model"
    )
    with pytest.raises(WrongState, match=message) as caught, capture(compiled, "all"):
        compiled(x)
    assert isinstance(caught.value, RuntimeError)


def test_nothing_ran_is_an_error() -> None:
    with pytest.raises(WrongState, match="None of the 1 selected layer ran"), capture(network(), "0"):
        pass


# The memory bound.


def test_max_bytes_names_the_layer_and_what_to_do() -> None:
    model, x = network(), torch.randn(3, 4)
    message = (
        r"Keeping 96 bytes of layer '1' would pass max_bytes=100: 96 are held\. "
        r"Expected at most 100 bytes of activations\. "
        r"Select fewer layers, run a shorter input, or pass a larger max_bytes\."
    )
    with pytest.raises(TooLarge, match=message) as caught, capture(model, "all", max_bytes=100) as acts:
        model(x)
    assert isinstance(caught.value, MemoryError)
    assert acts.nbytes == 96
    assert hooks(model) == 0


def test_max_bytes_is_inclusive_and_checked_before_copying() -> None:
    model, x = network(), torch.randn(3, 4)
    with capture(model, "all", max_bytes=216):
        model(x)

    class Huge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.expand(1 << 50)  # a view; a copy would take 4 PiB

    model = nn.Sequential(Huge())
    with pytest.raises(TooLarge, match=f"Keeping {1 << 52} bytes"), capture(model, "0"):
        model(torch.ones(1))


@pytest.mark.parametrize(
    ("value", "error"), [(1e9, BadType), (True, BadType), ("1", BadType), (0, BadValue), (-1, BadValue)]
)
def test_max_bytes_has_to_be_a_positive_int(value: Any, error: type[Exception]) -> None:
    with (
        pytest.raises(error, match=r"max_bytes is .*Pass for example 1 << 30"),
        capture(network(), "0", max_bytes=value),
    ):
        pass


# Reading.


def test_unknown_layer() -> None:
    acts = Activations({"a": [], "b": []})
    with pytest.raises(UnknownLayerError) as caught:
        acts["c"]
    assert str(caught.value) == "layer 'c' was not captured. Expected one of 'a', 'b'. Look at .layers."
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, noesis.NoesisError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert "c" not in acts
    assert acts.get("c") is None
    one, other = (Activations({"a": [torch.ones(2)]}) for _ in range(2))
    assert one != other  # by identity: comparing the tensors would have no truth value


def test_stacked_refuses_what_does_not_fit() -> None:
    acts = Activations(
        {
            "flat": [torch.ones(2, 4)],
            "batch": [torch.ones(2, 3, 4), torch.ones(1, 3, 4)],
            "dtype": [torch.ones(1, 3, 4), torch.ones(1, 3, 4).half()],
            "none": [],
        }
    )
    with pytest.raises(
        BadValue, match=r"layer 'flat' have shapes 2x4 \(float32\)\. Expected .*\[batch, tokens, width\]"
    ):
        acts.stacked("flat")
    with pytest.raises(BadValue, match="2x3x4, 1x3x4"):
        acts.stacked("batch")
    with pytest.raises(BadValue, match="float32, float16"):
        acts.stacked("dtype")
    with pytest.raises(BadValue, match="layer 'none' holds no activations"):
        acts.stacked("none")


# Files.


def mixed() -> Activations:
    nan = torch.tensor([[[float("nan"), -0.0, 1e-40]]])
    return Activations(
        {
            "model.layers.0": [torch.randn(1, 3, 4).bfloat16(), torch.randn(1, 1, 4).bfloat16()],
            "fp8/odd name": [torch.randn(2, 3).to(torch.float8_e4m3fn), torch.randn(2, 3).to(torch.float8_e5m2)],
            "": [nan, torch.empty(0, 4), torch.tensor(2.0), torch.ones(2, 6)[:, ::2]],
            "spare": [],
        },
        unmeasured={"counter": "no floating tensor in its output"},
        meta={"prompt": "Es war einmal …"},
    )


def test_saved_and_loaded_bitwise(tmp_path: Path) -> None:
    acts = mixed()
    assert acts.save(tmp_path / "deep" / "acts.safetensors") == tmp_path / "deep" / "acts.safetensors"
    loaded = Activations.load(tmp_path / "deep" / "acts.safetensors")
    assert loaded.layers == acts.layers
    assert loaded.unmeasured == acts.unmeasured
    assert loaded.meta == acts.meta
    for name, calls in acts.items():
        assert len(loaded[name]) == len(calls)
        for a, b in zip(calls, loaded[name], strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert a.contiguous().flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "acts.safetensors"]


def test_header_has_format_versions_and_layers(tmp_path: Path) -> None:
    data = mixed().save(tmp_path / "acts.safetensors").read_bytes()
    header = json.loads(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]["noesis"])
    assert header["format"] == "noesis.activations"
    assert header["format_version"] == 1
    assert (header["noesis"], header["torch"]) == (noesis.__version__, torch.__version__)
    assert header["layers"] == ["model.layers.0", "fp8/odd name", "", "spare"]


def test_suffix_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"suffix '\.json'"):
        mixed().save(tmp_path / "acts.json")
    with pytest.raises(MissingFile, match="not there"):
        Activations.load(tmp_path / "acts.safetensors")


def rewritten(data: bytes, change: Any) -> bytes:
    """The file with its noesis header changed and its tensors as they were."""
    length = struct.unpack("<Q", data[:8])[0]
    outer = json.loads(data[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["noesis"])
    outer["__metadata__"]["noesis"] = json.dumps(change(inner))
    packed = json.dumps(outer).encode()
    return struct.pack("<Q", len(packed)) + packed + data[8 + length :]


HOSTILE = {
    "another kind": lambda header: {**header, "format": "noesis.trace"},
    "another version": lambda header: {**header, "format_version": 99},
    "no header": lambda header: None,
    "a list": lambda header: [header],
    "no layers": lambda header: {key: value for key, value in header.items() if key != "layers"},
    "layers of numbers": lambda header: {**header, "layers": [1, 2, 3, 4]},
    "a layer twice": lambda header: {**header, "layers": ["model.layers.0"] * 4},
    "a layer less": lambda header: {**header, "layers": header["layers"][:-1]},
    "more calls": lambda header: {**header, "calls": [1 << 60, 2, 4, 0]},
    "fewer calls": lambda header: {**header, "calls": [1, 2, 4, 0]},
    "negative calls": lambda header: {**header, "calls": [-1, 2, 4, 0]},
    "calls of text": lambda header: {**header, "calls": ["2", "2", "4", "0"]},
    "meta of text": lambda header: {**header, "meta": "text"},
    "unmeasured of numbers": lambda header: {**header, "unmeasured": 3},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers(change: Any, tmp_path: Path) -> None:
    path = mixed().save(tmp_path / "acts.safetensors")
    original = path.read_bytes()
    path.write_bytes(rewritten(original, lambda header: header))
    Activations.load(path)  # the rewriting itself breaks nothing
    path.write_bytes(rewritten(original, change))
    with pytest.raises(BadFile, match=r"acts\.safetensors"):
        Activations.load(path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = mixed().save(tmp_path / "acts.safetensors")
    data = path.read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(BadFile, match="not a readable safetensors file"):
            Activations.load(path)


@pytest.mark.slow
def test_any_flipped_byte_gives_a_result_or_a_noesis_error(tmp_path: Path) -> None:
    path = mixed().save(tmp_path / "acts.safetensors")
    data = path.read_bytes()
    header = struct.unpack("<Q", data[:8])[0] + 8
    refused = 0
    for at in range(header):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :])
        try:
            Activations.load(path)
        except BadFile:
            refused += 1
    assert refused > header // 4


# A real language model.


@pytest.mark.data
def test_generation_is_one_prefill_and_one_call_per_token(data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = data / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt").input_ids
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = model.generate(ids, **options)
    with capture(model, "blocks") as acts:
        captured = model.generate(ids, **options)
    assert torch.equal(plain, captured)
    length = ids.shape[1]
    assert acts.layers == [f"model.layers.{index}" for index in range(5)]
    for name in acts:
        assert [call.shape[1] for call in acts[name]] == [length, 1, 1, 1, 1]
        assert acts.stacked(name).shape == (1, length + 4, 64)
    # The cache aside, decoding computes what one forward over all tokens does.
    with capture(model, "blocks") as whole, torch.no_grad():
        model(plain[:, :-1])
    assert torch.allclose(acts.stacked("model.layers.4"), whole["model.layers.4"][0], atol=1e-4)
    loaded = Activations.load(acts.save(tmp_path / "acts.safetensors"))
    assert torch.equal(loaded.stacked("model.layers.2"), acts.stacked("model.layers.2"))
