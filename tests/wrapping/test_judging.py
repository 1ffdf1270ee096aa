"""`wrapped.judge(x)`: output and scores of one call, whatever other threads do with the same model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import noesis
from helpers.models import Garments
from helpers.processes import in_threads, one_thread
from noesis.errors import NoesisError
from noesis.results import Judgement, Surprise


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh() + x


class Net(nn.Module):
    """Takes what models take: positions, names, dicts; and raises when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Any, scale: float = 1.0, fail: bool = False) -> dict[str, torch.Tensor]:
        x = x["x"] if isinstance(x, dict) else x
        for number, block in enumerate(self.blocks):
            x = block(x)
            if fail and number == 1:
                raise RuntimeError("no more")
        return {"logits": self.head(x) * scale}


def some(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def wrap(net: nn.Module, **settings: Any) -> noesis.Wrapped:
    wrapped = noesis.wrap(net, layers="blocks.*", codebook=noesis.Codebook(), logits="head", **settings)
    wrapped.calibrate([some(100, seed) for seed in range(6)], progress=False)
    return wrapped


@pytest.fixture
def wrapped(net: Net) -> noesis.Wrapped:
    return wrap(net)


def same(one: Surprise, other: Surprise) -> bool:
    """Whether two surprises are equal to the bit, all that a file would hold."""
    ours, theirs = one._arrays(), other._arrays()
    keys = ours.keys() == theirs.keys() and one._header() == other._header()
    return keys and all(np.array_equal(ours[key], theirs[key], equal_nan=True) for key in ours)


# ---------------------------------------------------------------- one call


def test_output_and_scores_are_those_of_a_call_and_surprise(wrapped: noesis.Wrapped, net: Net) -> None:
    bare, x = noesis.unwrap(copy.deepcopy(net)), some(5, 10)
    wrapped(x)
    expected = wrapped.surprise()
    calls = (
        lambda: wrapped.judge(x),
        lambda: wrapped.judge(x=x),
        lambda: wrapped.judge({"x": x}),
        lambda: wrapped.judge(x, 3.0),
        lambda: wrapped.judge(x, scale=3.0),
    )
    for number, call in enumerate(calls):
        output, surprise = judged = call()
        assert isinstance(judged, Judgement)
        assert (judged.output, judged.surprise) == (output, surprise)
        scale = 3.0 if number > 2 else 1.0
        assert torch.equal(output["logits"], bare(x, scale)["logits"])
        assert output["logits"].requires_grad
        if scale == 1.0:
            assert same(surprise, expected)
        assert np.array_equal(surprise.layers["blocks.1"].p_value, expected.layers["blocks.1"].p_value)
    with torch.inference_mode():
        output, surprise = wrapped.judge(x)
    assert output["logits"].is_inference()
    assert same(surprise, expected)


@pytest.mark.parametrize("every", [1, 7])
def test_the_trace_and_the_latest_forward_are_left_alone(net: Net, every: int) -> None:
    wrapped, x = wrap(net, every=every, per_sample=True), some(3, 1)
    wrapped(x)
    before, latest = wrapped.trace().to_json(), wrapped.surprise()
    with wrapped.paused():
        paused = wrapped.judge(some(7, 2)).surprise
    assert same(paused, wrapped.judge(some(7, 2)).surprise)
    assert wrapped.trace().to_json() == before
    assert same(wrapped.surprise(), latest)
    wrapped(x)
    assert wrapped._forwards() == 2


def test_each_call_has_one_forward_and_nothing_of_the_call_before(wrapped: noesis.Wrapped, net: Net) -> None:
    ran: list[int] = []
    handle = net.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    first = wrapped.judge(some(4, 1)).surprise
    assert len(ran) == 1
    handle.remove()
    net.blocks[1].forward = lambda x: x  # type: ignore[method-assign]
    wrapped.judge(some(4, 1))
    net.forward = lambda x: {"logits": net.head(x)}  # type: ignore[method-assign]
    surprise = wrapped.judge(some(4, 1)).surprise
    assert surprise.absent == ["blocks.0", "blocks.1"]  # the head's input stands for the last block
    with pytest.raises(NoesisError, match="blocks.0"):
        _ = surprise.p_value
    del net.forward, net.blocks[1].forward
    assert same(wrapped.judge(some(4, 1)).surprise, first)


def test_an_exception_leaves_everything_as_it_was(wrapped: noesis.Wrapped, net: Net) -> None:
    x = some(4, 1)
    first, before = wrapped.judge(x).surprise, wrapped.trace().to_json()
    with pytest.raises(RuntimeError, match="no more"):
        wrapped.judge(some(2, 5), fail=True)
    assert wrapped.trace().to_json() == before
    assert same(wrapped.judge(x).surprise, first)
    wrapped(x)
    assert len(wrapped.trace()) == 1
    assert same(wrapped.surprise(), first)


def test_judging_inside_of_judging(wrapped: noesis.Wrapped, net: Net) -> None:
    outer, inner = some(4, 1), some(2, 2)
    expected = [wrapped.judge(x).surprise for x in (outer, inner)]
    found: list[Surprise] = []

    def judge(*_: Any) -> None:
        if not found:
            found.append(Surprise(np.zeros(0), {}))  # the inner call comes by here too
            found[0] = wrapped.judge(inner).surprise

    net.blocks[1].register_forward_hook(judge)
    surprise = wrapped.judge(outer).surprise
    assert same(surprise, expected[0])
    assert same(found[0], expected[1])


def test_refused_before_the_model_runs(net: Net) -> None:
    ran: list[int] = []
    net.register_forward_hook(lambda *_: ran.append(1))
    plain = noesis.wrap(net, layers="blocks.*")
    with pytest.raises(NoesisError, match="codebook="):
        plain.judge(some(2, 0))
    plain.unwrap()
    wrapped = noesis.wrap(net, layers="blocks.*", codebook=noesis.Codebook())
    with pytest.raises(NoesisError, match=r"wrapped\.calibrate\(loader\), or wrapped\.load_calibration"):
        wrapped.judge(some(200, 0))
    wrapped.unwrap()
    gone = wrap(net)
    gone.unwrap()
    ran.clear()
    with pytest.raises(NoesisError, match="unwrapped"):
        gone.judge(some(2, 0))
    assert not ran


def test_train_mode_is_warned_of(net: Net) -> None:
    net.add_module("drop", nn.Dropout(0.5))
    wrapped = wrap(net)
    net.train()
    with pytest.warns(noesis.NoesisWarning, match="drop is in train mode"):
        wrapped.judge(some(2, 0))


def test_calibrated_inside_inference_mode(net: Net, wrapped: noesis.Wrapped) -> None:
    x = some(4, 1)
    expected = wrapped.judge(x).surprise
    wrapped.unwrap()
    with torch.inference_mode():
        again = wrap(net)
    assert same(again.judge(x).surprise, expected)


def test_copies_judge_by_themselves(wrapped: noesis.Wrapped) -> None:
    x = some(4, 1)
    expected = wrapped.judge(x).surprise
    for made in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert same(made.judge(x).surprise, expected)


def test_a_judged_forward_takes_part_in_training(net: Net) -> None:
    """With gradients, under checkpointing: none of it is of a step."""
    run = Net.forward
    wrapped, x = wrap(net, gradients=True), some(4, 1)
    net.forward = lambda x: checkpoint(run, net, x, use_reentrant=False)  # type: ignore[method-assign]
    wrapped(x)["logits"].sum().backward()
    before = wrapped.gradients().to_json()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    wrapped.judge(x).output["logits"].sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), expected, strict=True))
    assert wrapped.gradients().to_json() == before


# ---------------------------------------------------------------- threads


@pytest.fixture
def served(data: Path) -> tuple[noesis.Wrapped, list[torch.Tensor]]:
    """A calibrated classifier, and batches of garments, some of them strange."""
    pixels = np.load(data / "fashion_mnist_test.npz", allow_pickle=False)["images"][:1000]
    images = nn.functional.pad(torch.from_numpy(pixels)[:, None] / 127.5 - 1, [2] * 4, value=-1.0).repeat(1, 3, 1, 1)
    model = Garments(load_file(data / "fashion_cnn" / "model.safetensors")).eval()
    layers = ["features.2", "features.6", "features.10", "hidden"]
    wrapped = noesis.wrap(model, layers=layers, codebook=noesis.Codebook(), logits="classifier", every=2)
    wrapped.calibrate(images[:700].split(100), progress=False)
    sizes = [1, 2, 5, 1, 7]
    batches = [images[700 + 10 * i :][: sizes[i % 5]] * (1 if i % 3 else -1) for i in range(25)]
    return wrapped, batches


@pytest.mark.slow
def test_threads_that_share_a_model_get_the_scores_of_their_own_calls(
    served: tuple[noesis.Wrapped, list[torch.Tensor]],
) -> None:
    """Eight judge; a ninth calls as usual, pausing now and then, and has its steps and scores as if it were alone."""
    wrapped, batches = served

    def recorded() -> tuple[np.ndarray, Surprise]:
        with wrapped.run():
            for x, judged in zip(batches, alone, strict=True):
                assert torch.equal(wrapped(x), judged.output)
                with wrapped.paused():
                    wrapped(x)
            return wrapped.trace().values, wrapped.surprise()

    def serve(thread: int) -> None:
        with torch.inference_mode():
            if thread == 8:
                for _ in range(4):
                    values, surprise = recorded()
                    assert np.array_equal(values, expected[0], equal_nan=True)
                    assert same(surprise, expected[1])
                return
            for turn in range(60):
                place = (7 * thread + turn) % len(batches)
                output, surprise = wrapped.judge(batches[place])
                assert torch.equal(output, alone[place].output)
                assert same(surprise, alone[place].surprise)

    with one_thread():
        with torch.inference_mode():
            alone = [wrapped.judge(x) for x in batches]
            expected = recorded()
        in_threads(9, serve)
    assert len(wrapped._recorder.spare) <= 9


def test_calibrating_beside_calls_that_are_judged(net: Net) -> None:
    """Scores are by the old calibration or by the new one, and never by some of each."""
    wrapped, x, others = wrap(net), some(4, 1), [5 + 2 * some(100, seed) for seed in range(6)]
    ours = [some(100, seed) for seed in range(6)]
    expected = []
    for loader in (others, ours):
        wrapped.calibrate(loader, progress=False)
        expected.append(wrapped.judge(x).surprise)
    assert not same(*expected)

    def run(thread: int) -> list[int]:
        if thread == 0:
            for loader in (others, ours) * 2:
                wrapped.calibrate(loader, progress=False)
            return [0, 1]
        found = [wrapped.judge(x).surprise for _ in range(60)]
        return [[same(surprise, one) for one in expected].index(True) for surprise in found]

    with one_thread():
        assert {which for found in in_threads(3, run) for which in found} <= {0, 1}


def test_each_thread_has_the_padding_of_its_own_calls() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    wrapped = noesis.wrap(encoder, layers="layers.*", codebook=noesis.Codebook())

    def batch(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 12, (8, 1), generator=generator)
        return {
            "src": torch.randn(8, 12, 16, generator=generator),
            "src_key_padding_mask": torch.arange(12) >= lengths,
        }

    wrapped.calibrate([batch(seed) for seed in range(40)], progress=False)
    assert set(wrapped.calibration.padding.values()) == {"masked"}
    with one_thread():
        alone = [wrapped.judge(**batch(100 + number)).surprise for number in range(40)]
        beside = in_threads(4, lambda thread: [wrapped.judge(**batch(100 + n)).surprise for n in range(thread, 40, 4)])
    assert all(same(alone[4 * n + thread], one) for thread, found in enumerate(beside) for n, one in enumerate(found))
    other = wrapped.judge(batch(100)["src"]).surprise  # the mask does matter
    assert not np.array_equal(other.score, alone[0].score)


# ---------------------------------------------------------------- compiled code


@torch.no_grad()  # Dynamo looks at the gradients of what blocks are given, which warns
def test_blocks_compiled_one_by_one_are_judged_and_larger_compiled_parts_refused(net: Net) -> None:
    torch.compiler.reset()
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(1)
        return graph.forward

    wrapped, x = wrap(net), some(4, 1)
    expected = wrapped.judge(x)
    for block in net.blocks:
        block.compile(backend=backend)
    output, surprise = wrapped.judge(x)
    assert made
    assert torch.equal(output["logits"], expected.output["logits"])
    assert same(surprise, expected.surprise)
    assert len(wrapped.trace()) == 0
    net.compile(backend=backend)
    with pytest.raises(NoesisError, match=r"inside of a compiled Net.*copy.deepcopy\(wrapped\)"):
        wrapped.judge(x)
    net._compiled_call_impl = None
    net.blocks[1] = torch.compile(net.blocks[1], backend=backend)
    with pytest.raises(NoesisError, match="inside of a compiled Block"):
        wrapped.judge(x)
    torch.compiler.reset()


@torch.no_grad()
def test_compiled_code_that_judges_calls_the_model_in_python(wrapped: noesis.Wrapped) -> None:
    x = some(4, 1)
    expected = wrapped.judge(x)

    def strange(x: torch.Tensor) -> Any:
        return wrapped.judge(x + 0)

    output, surprise = torch.compile(strange, backend="eager")(x)
    assert torch.equal(output["logits"], expected.output["logits"])
    assert same(surprise, expected.surprise)
    torch.compiler.reset()
