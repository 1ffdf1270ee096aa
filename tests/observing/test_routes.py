"""Mixture-of-Experts routing, against routing recomputed by hand from what the routers returned."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import noesis
from helpers.language_models import CACHES, MOE, build, generate, prompts
from helpers.models import TopKRouter
from noesis import NoesisError, Routes
from noesis.kernels import layout, routing
from noesis.observing import route_bank
from noesis.observing.route_bank import RouteBank

pytestmark = pytest.mark.usefixtures("one_thread")

STATISTICS = ("tokens", "expert_load", "entropy", "cv", "idle", "switching")


# ---------------------------------------------------------------- by hand


class Calls:
    """What routers returned, by step and layer, taken with hooks of its own; logits [B, T, E], choices [B, T, k]."""

    def __init__(self, model: nn.Module, routers: list[nn.Module]) -> None:
        self.steps: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.batch = 0
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for router in routers:
            router.register_forward_hook(self._call)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.steps.append([])
        self.batch = len(args[0] if args else kwargs["input_ids"])

    def _call(self, module: nn.Module, args: Any, output: Any) -> None:
        logits, _, indices = output
        rows = [x.detach().double().numpy().reshape(self.batch, -1, x.shape[-1]) for x in (logits, indices)]
        self.steps[-1].append((rows[0], rows[1].astype(int)))

    def layer(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [step[index] for step in self.steps]


def by_hand(calls: list[tuple[np.ndarray, np.ndarray]], before: np.ndarray | None = None) -> dict[str, Any]:
    """Routing of one layer over some forwards, with loops; `before` is each row's choice before the first."""
    experts = calls[0][0].shape[-1]
    tokens = neighbours = switches = 0
    entropies, counts = [], np.zeros(experts)
    together = np.zeros((experts, experts))
    for logits, chosen in calls:
        going_on = before is not None and chosen.shape[1] == 1 and len(before) == len(chosen)
        for row in range(len(chosen)):
            previous = before[row] if going_on else None
            for token in range(chosen.shape[1]):
                tokens += 1
                e = np.exp(logits[row, token] - logits[row, token].max())
                p = e / e.sum()
                entropies.append(-sum(x * np.log(x) for x in p))
                picks = chosen[row, token].tolist()
                assert picks == sorted(picks, key=lambda pick: -logits[row, token, pick])
                for pick in picks:
                    counts[pick] += 1
                    for other in picks:
                        together[pick, other] += pick != other
                if previous is not None:
                    neighbours += 1
                    switches += previous != picks[0]
                previous = picks[0]
        before = chosen[:, -1, 0]
    load = counts / counts.sum()
    return {
        "tokens": tokens,
        "expert_load": load,
        "entropy": np.mean(entropies),
        "cv": load.std() / load.mean(),
        "idle": (counts == 0).mean(),
        "switching": switches / neighbours if neighbours else np.nan,
        "coactivation": together,
        "last": before,
    }


def assert_by_hand(routes: Routes, calls: Calls) -> None:
    assert len(routes) == len(calls.steps)
    for index in range(len(routes.layers)):
        layer = calls.layer(index)
        whole = by_hand(layer)
        np.testing.assert_array_equal(routes.coactivation[index], whole["coactivation"])
        for name in STATISTICS:
            np.testing.assert_allclose(getattr(routes.totals, name)[index], whole[name], rtol=1e-6, err_msg=name)
        before = None
        for step, call in enumerate(layer):
            expected = by_hand([call], before)
            np.testing.assert_array_equal(routes.step_coactivation[step, index], expected["coactivation"])
            before = expected["last"]
            for name in STATISTICS:
                np.testing.assert_allclose(getattr(routes, name)[step, index], expected[name], rtol=1e-6, err_msg=name)


def gates(model: Any) -> list[nn.Module]:
    return [layer.mlp.gate for layer in model.model.layers]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", MOE)
def test_generation_against_routing_by_hand(name, cache):
    ids = prompts(rows=2, length=7)
    bare = generate(build(name), ids, 6, **CACHES[cache])
    model = build(name)
    calls = Calls(model, gates(model))
    wrapped = noesis.wrap(model, layers="routers")
    observed = generate(wrapped, ids, 6, **CACHES[cache])
    routes = wrapped.routes()

    assert torch.equal(bare.sequences, observed.sequences)
    assert all(torch.equal(one, other) for one, other in zip(bare.logits, observed.logits, strict=True))
    assert routes.layers == [f"model.layers.{index}.mlp.gate" for index in range(3)]
    assert routes.steps.tolist() == list(range(6))
    assert routes.tokens[:, 0].tolist() == [14, 2, 2, 2, 2, 2]
    assert routes.experts.tolist() == [4 if name == "mixtral" else 8] * 3
    assert_by_hand(routes, calls)
    # Something to see: neither always nor never the same expert.
    assert 0 < routes.totals.switching.max() < 1
    assert routes.totals.cv.min() > 0.1


def test_the_statistics_of_the_logits_are_still_in_the_trace():
    model = build("qwen3_moe")
    calls = Calls(model, gates(model))
    wrapped = noesis.wrap(model, layers=["blocks", "routers"])
    wrapped(prompts())
    trace = wrapped.trace()
    assert wrapped.routes().layers == [name for name in trace.layers if name.endswith("gate")]
    for index, name in enumerate(wrapped.routes().layers):
        logits = calls.steps[0][index][0]
        count, mean, std = trace.layer(name)[0, :3]
        np.testing.assert_allclose([count, mean, std], [logits.size, logits.mean(), logits.std(ddof=1)], rtol=1e-5)


def test_rows_of_uneven_length_and_forwards_of_other_batch_sizes():
    model = build("olmoe")
    calls = Calls(model, gates(model))
    wrapped = noesis.wrap(model, layers="routers")
    ids = prompts(rows=3, length=6)
    padding = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    wrapped(ids, attention_mask=padding)  # padding is routed like any token
    for rows in (3, 1, 3, 3):  # a token of another batch size follows nothing
        wrapped(ids[:rows, :1])
    wrapped(ids[:1])  # and neither does a new sequence
    routes = wrapped.routes()
    assert_by_hand(routes, calls)
    assert routes.tokens[:, 0].tolist() == [18, 3, 1, 3, 3, 6]
    assert np.isnan(routes.switching[:, 0]).tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_with_checkpointing_counts_every_token_once(reentrant):
    model = build("mixtral").train()
    wrapped = noesis.wrap(model, layers="routers")
    seen: list[int] = []
    gates(model)[0].register_forward_hook(lambda *_: seen.append(1))

    def run(ids: Tensor) -> Tensor:
        # The blocks by hand, since transformers does not checkpoint the reentrant way by itself.
        hidden = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
        for block in model.model.layers:
            hidden = checkpoint(partial(block, position_embeddings=rotary), hidden, use_reentrant=reentrant)
        return hidden.sum()

    run(prompts()).backward()
    assert len(seen) == 2  # recomputed
    assert wrapped.routes().totals.tokens.tolist() == [14, 14, 14]


# ---------------------------------------------------------------- small routers of our own


class MoEBlock(nn.Module):
    """Each token goes through the matrices of its experts."""

    def __init__(self, size: int = 8, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.gate = TopKRouter(size, experts, top_k)
        self.experts = nn.Parameter(torch.randn(experts, size, size) / size**0.5)

    def forward(self, x: Tensor) -> Tensor:
        _, weights, indices = self.gate(x)
        chosen = self.experts[indices]  # [tokens, k, size, size]
        out = torch.einsum("nkij,nj,nk->ni", chosen, x.reshape(-1, x.shape[-1]), weights)
        return x + out.view_as(x)


def small(*experts: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(MoEBlock(experts=number) for number in experts or (4, 4)))


def run(model: Any, steps: int = 5) -> None:
    """A sequence of two rows, then token by token."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        model(torch.randn(2, 3 if step == 0 else 1, 8, generator=generator))


def assert_equal(one: Routes, other: Routes) -> None:
    for name in ("sums", "whole", "coactivation", "steps", "experts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert (one.layers, one.dropped_steps, one.unmeasured) == (other.layers, other.dropped_steps, other.unmeasured)


def test_coactivation_of_the_latest_steps_within_bounds(monkeypatch, tmp_path):
    every = noesis.wrap(small(), layers="routers")
    run(every, 7)
    monkeypatch.setattr(route_bank, "PAIRS_BYTES", 3 * 8 * 2 * 4**2)  # room for three steps
    for capacity in (5, 100):
        latest = noesis.wrap(small(), layers="routers", capacity=capacity)
        run(latest, 7)
        routes = latest.routes()
        np.testing.assert_array_equal(routes.step_coactivation, every.routes().step_coactivation[-3:])
        np.testing.assert_array_equal(routes.coactivation, every.routes().coactivation)
        latest.model[0](torch.ones(1, 2, 8))  # between forwards
        assert latest.routes().step_coactivation[-1].sum() == 2 * 2
    again = Routes.load(routes.save(tmp_path / "routes.safetensors"))
    np.testing.assert_array_equal(again.step_coactivation, routes.step_coactivation)
    assert len(Routes.load(routes.save(tmp_path / "routes.json")).step_coactivation) == 0


def test_layers_of_different_width_are_padded():
    model = small(4, 6)
    calls = Calls(model, [block.gate for block in model])
    wrapped = noesis.wrap(model, layers="routers")
    run(wrapped)
    routes = wrapped.routes()
    assert routes.experts.tolist() == [4, 6]
    load = routes.expert_load
    assert np.isnan(load[:, 0, 4:]).all()
    assert np.isfinite(load[:, 1]).all()
    assert (routes.counts[:, 0, 4:] == 0).all()
    for index, width in enumerate((4, 6)):
        expected = by_hand(calls.layer(index))
        np.testing.assert_allclose(routes.totals.expert_load[index, :width], expected["expert_load"])
        np.testing.assert_allclose(routes.totals.cv[index], expected["cv"])
        np.testing.assert_allclose(routes.totals.idle[index], expected["idle"])
        np.testing.assert_array_equal(routes.coactivation[index, :width, :width], expected["coactivation"])
    assert routes.coactivation[0, 4:].sum() == 0


def test_the_ring_keeps_the_latest_steps_and_the_whole_run():
    roomy, tight = (noesis.wrap(small(), layers="routers", capacity=capacity) for capacity in (256, 3))
    for wrapped in (roomy, tight):
        run(wrapped, 8)
    every, latest = roomy.routes(), tight.routes()
    assert (latest.steps.tolist(), latest.dropped_steps, every.dropped_steps) == ([5, 6, 7], 5, 0)
    np.testing.assert_array_equal(latest.sums, every.sums[5:])
    np.testing.assert_array_equal(latest.whole, every.sums.sum(0))
    np.testing.assert_array_equal(latest.whole, every.whole)
    np.testing.assert_array_equal(latest.coactivation, every.coactivation)
    assert "5 earlier steps" in repr(latest)


def test_every_nth_forward():
    everything, some = noesis.wrap(small(), layers="routers"), noesis.wrap(small(), layers="routers", every=2)
    for wrapped in (everything, some):
        run(wrapped, 5)
    one, other = everything.routes(), some.routes()
    assert other.steps.tolist() == [0, 2, 4]
    np.testing.assert_array_equal(other.counts, one.counts[::2])
    np.testing.assert_array_equal(other.entropy, one.entropy[::2])
    np.testing.assert_array_equal(other.totals.counts, one.counts[::2].sum(0))
    # The token before a decoded one was not seen, so there is nothing to compare it with.
    assert np.isnan(other.switching[1:]).all()


def test_paused_forwards_are_not_counted_and_break_the_sequence():
    wrapped = noesis.wrap(small(), layers="routers")
    run(wrapped, 3)
    before = wrapped.routes()
    with wrapped.paused():
        run(wrapped, 3)
    assert_equal(before, wrapped.routes())
    wrapped(torch.randn(2, 1, 8))
    after = wrapped.routes()
    assert after.tokens[:, 0].tolist() == [6, 2, 2, 2]
    assert np.isnan(after.switching[3]).all()


def test_reset_and_run_begin_afresh():
    wrapped, fresh = noesis.wrap(small(), layers="routers"), noesis.wrap(small(), layers="routers")
    run(wrapped, 4)
    wrapped.reset()
    with wrapped.run(prompt="a moth"):
        run(wrapped, 2)
    run(fresh, 2)
    assert_equal(wrapped.routes(), fresh.routes())
    assert wrapped.routes().meta["prompt"] == "a moth"


def test_copies_and_pickles_count_on_their_own():
    wrapped = noesis.wrap(small(), layers="routers")
    run(wrapped, 2)
    before = wrapped.routes()
    others = [copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))]
    for other in others:
        assert_equal(other.routes(), before)
        other(torch.ones(2, 1, 8))
        assert other.routes().tokens[-1].tolist() == [2, 2]
    assert_equal(wrapped.routes(), before)
    wrapped(torch.ones(2, 1, 8))
    for other in others:
        assert_equal(other.routes(), wrapped.routes())


def test_what_is_called_between_forwards_belongs_to_the_next_one():
    wrapped = noesis.wrap(small(), layers="routers")
    x = torch.randn(2, 3, 8)
    wrapped(x)
    wrapped.observed_model[0](x)
    waiting = wrapped.routes()
    assert waiting.steps.tolist() == [0, 1]
    assert waiting.tokens.tolist() == [[6, 6], [6, 0]]
    wrapped(x)
    routes = wrapped.routes()
    assert routes.tokens.tolist() == [[6, 6], [12, 6]]
    np.testing.assert_array_equal(routes.sums.sum(0), routes.whole)


def test_what_is_called_before_a_forward_left_out_goes_with_it():
    wrapped = noesis.wrap(small(), layers="routers", every=2)
    x = torch.randn(2, 3, 8)
    for _ in range(3):
        wrapped(x)
        wrapped.observed_model[0](x)
    routes = wrapped.routes()
    assert routes.tokens.tolist() == [[6, 6], [12, 6]]
    np.testing.assert_array_equal(routes.sums.sum(0), routes.whole)
    np.testing.assert_array_equal(routes.coactivation.sum((1, 2)), routes.whole[:, routing.TOKENS - routing.FIELDS] * 2)


# ---------------------------------------------------------------- the operation


def state(capacity: int = 4, layers: int = 2, experts: int = 5, device: str = "cpu") -> tuple[RouteBank, Tensor]:
    control = torch.zeros(layout.CONTROL, dtype=torch.int64, device=device)
    control[layout.EVERY] = control[layout.ENABLED] = control[layout.ACTIVE] = control[layout.FORWARDS] = 1
    return RouteBank(torch.device(device), layers, experts, capacity), control


def call(logits: Tensor, indices: Tensor, batch: int, how: Any = routing.routing_reference, **kwargs: Any) -> RouteBank:
    bank, control = state(**kwargs)
    bank.begin(control)
    how(logits, indices, batch, bank.layer[1], bank.sums, bank.pairs, bank.last, control)
    return bank


def test_the_device_path_does_not_wait_for_the_device():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(3).sum().item()  # what waiting would look like
    with FakeTensorMode():
        for batch, tokens in ((2, 6), (2, 2), (0, 6), (5, 6), (2000, 2000), (1, 0)):
            logits = torch.randn(tokens, 5, dtype=torch.bfloat16)
            bank = call(logits, torch.randint(5, (tokens, 2)), batch)
            assert bank.sums.shape == (6, 2, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_operation_is_the_same_behind_every_door(dtype):
    logits = torch.randn(12, 5).to(dtype)
    indices = logits.topk(2).indices.int()
    banks = [
        call(logits, indices, 3, how)
        for how in (routing.routing_reference, routing.routing_cpu, torch.ops.noesis.routing)
    ]
    for bank in banks[1:]:
        for name in ("sums", "pairs", "last"):
            assert torch.equal(getattr(bank, name), getattr(banks[0], name))
    torch.library.opcheck(
        torch.ops.noesis.routing.default,
        (logits, indices, 3, banks[0].layer[1], banks[0].sums, banks[0].pairs, banks[0].last, state()[1]),
    )


def test_nothing_changes_while_inactive():
    for how in (routing.routing_reference, routing.routing_cpu):
        bank, control = state()
        control[layout.ACTIVE] = 0
        for tensor in (bank.sums, bank.pairs, bank.last):
            tensor.random_(0, 9)
        before = copy.deepcopy(bank)
        indices = torch.tensor([[0, 1], [2, 3]])
        how(torch.randn(2, 5), indices, 2, bank.layer[0], bank.sums, bank.pairs, bank.last, control)
        for name in ("sums", "pairs", "last"):
            assert torch.equal(getattr(bank, name), getattr(before, name))


def test_counting_in_parts_is_exact(monkeypatch):
    logits = torch.randn(50, 5)
    indices = logits.topk(3).indices
    whole = call(logits, indices, 2)
    monkeypatch.setattr(routing, "CHUNK", 64)
    parts = call(logits, indices, 2)
    assert torch.equal(whole.sums, parts.sums)
    assert torch.equal(whole.pairs, parts.pairs)


def test_counts_are_exact_under_autocast_and_deterministic_algorithms():
    logits = torch.randn(600, 5)
    indices = logits.topk(2).indices
    plain = call(logits, indices, 2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(logits, indices, 2)
    torch.use_deterministic_algorithms(True)
    try:
        deterministic = call(logits, indices, 2)
    finally:
        torch.use_deterministic_algorithms(False)
    for bank in (cast, deterministic):
        assert torch.equal(bank.sums, plain.sums)
        assert torch.equal(bank.pairs, plain.pairs)


def test_indices_outside_and_logits_without_entropy():
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0, 0.0], [float("nan")] * 5, [1.0, -float("inf"), -float("inf"), 0.0, 0.0]]
    )
    indices = torch.tensor([[0, -1], [1, 7], [0, 3]])  # some routers send a token nowhere
    sums, pairs = (getattr(call(logits, indices, 1), name) for name in ("sums", "pairs"))
    assert sums[-1, 1, :5].tolist() == [2, 1, 0, 1, 0]
    assert pairs[-1, 1].nonzero().tolist() == [[0, 3], [3, 0]]
    fields = sums[-1, 1, 5:]
    assert fields[[routing.TOKENS, routing.MEASURED, routing.NEIGHBOURS, routing.SWITCHES]].tolist() == [3, 2, 2, 2]
    p = torch.tensor([1.0, 0.0, 0.0]).softmax(-1).double()
    expected = np.log(5) + float(-(p * p.log()).sum())
    assert float(fields[routing.ENTROPY]) / routing.UNIT == pytest.approx(expected, rel=1e-6)


def test_the_first_choice_is_the_largest_of_the_chosen_whatever_their_order():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0, 9.0], [3.0, 2.0, 1.0, 0.0, 9.0]])
    bank = call(logits, torch.tensor([[2, 0], [0, 1]]), 1)  # unsorted, and expert 4 is not chosen
    assert bank.sums[-1, 1, 5 + routing.SWITCHES] == 0
    assert bank.last[1, 2] == 0


def test_batches_wider_than_what_is_followed_are_compared_within_forwards_only():
    logits = torch.randn(2 * 1100, 5)
    bank = call(logits, logits.topk(2).indices, 1100)
    assert bank.sums[-1, 1, 5 + routing.NEIGHBOURS] == 1100
    assert bank.last[1].sum() == 0


# ---------------------------------------------------------------- torch.compile


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("order", ["wrap then compile", "compile then wrap"])
@pytest.mark.slow
def test_one_graph_and_the_routes_of_eager(order):
    eager, model = noesis.wrap(small(), layers="routers", capacity=3), small()
    counter = CompileCounterWithBackend("aot_eager")
    called = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    if order == "compile then wrap":
        run(called, 2)
    wrapped = noesis.wrap(called, layers="routers", capacity=3)
    counter.frame_count = 0
    for x in [torch.randn(2, 3, 8), *torch.randn(6, 2, 1, 8)]:
        assert torch.equal(eager(x), called(x))
    assert counter.frame_count == 2  # one for the prompt's shape, one for a token's
    assert_equal(eager.routes(), wrapped.routes())


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_mixtral_compiles_to_one_graph():
    options = {"experts_implementation": "batched_mm"}
    eager, model = noesis.wrap(build("mixtral", **options), layers="routers"), build("mixtral", **options)
    wrapped = noesis.wrap(model, layers="routers")
    counter = CompileCounterWithBackend("eager")
    called = torch.compile(wrapped.observed_model, fullgraph=True, backend=counter)
    for seed in range(3):
        ids = prompts(seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(called(ids, use_cache=False).logits, eager(ids, use_cache=False).logits)
    assert counter.frame_count == 1
    one, other = eager.routes(), wrapped.routes()
    np.testing.assert_array_equal(one.counts, other.counts)
    np.testing.assert_array_equal(one.coactivation, other.coactivation)
    np.testing.assert_allclose(one.entropy, other.entropy, rtol=1e-6)


# ---------------------------------------------------------------- routers of other kinds


class Gate(nn.Sequential):
    """A model with a gate that is a linear layer, and a config."""

    def __init__(self, experts: int = 4, **config: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(8, experts, bias=False)
        self.config = SimpleNamespace(**config)


def test_a_linear_gate_gives_the_largest_of_its_logits():
    model = Gate(num_local_experts=4, num_experts_per_tok=2)
    wrapped = noesis.wrap(model, layers="gate")
    x = torch.randn(2, 5, 8)
    logits = wrapped(x)
    routes = wrapped.routes()
    expected = np.bincount(logits.topk(2).indices.flatten().numpy(), minlength=4)
    assert routes.totals.counts[0].tolist() == expected.tolist()


def test_a_linear_layer_of_another_width_is_no_gate():
    wrapped = noesis.wrap(Gate(experts=3, num_local_experts=4, num_experts_per_tok=2), layers="gate")
    wrapped(torch.randn(2, 5, 8))
    with pytest.raises(NoesisError, match=r"No router is observed.*Pass wrap\(\.\.\., layers=\"routers\"\)"):
        wrapped.routes()


class SwitchRouter(nn.Linear):
    """As in Switch Transformers: a mask with a one for the chosen expert, then the rest."""

    def __init__(self, top_k: int | None = None) -> None:
        super().__init__(8, 4)
        self.num_experts = 4
        if top_k is not None:
            self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return nn.functional.one_hot(logits.argmax(-1), 4), logits


def test_a_mask_is_not_taken_for_indices():
    wrapped = noesis.wrap(nn.Sequential(SwitchRouter(top_k=1)), layers="routers")
    mask, _ = wrapped(torch.randn(2, 5, 8))
    assert wrapped.routes().totals.counts[0].tolist() == mask.sum((0, 1)).tolist()


def test_what_cannot_be_read_is_reported():
    model = nn.Sequential(SwitchRouter())
    wrapped = noesis.wrap(model, layers="routers")
    wrapped(torch.randn(2, 5, 8))
    routes = wrapped.routes()
    assert list(routes.unmeasured) == ["0"]
    assert "no indices in the output, and neither the router nor the config has any of top_k" in routes.unmeasured["0"]
    assert "not measured: 0 (no indices" in repr(routes)

    class UnknownRouter(nn.Linear):
        pass

    wrapped = noesis.wrap(nn.Sequential(UnknownRouter(8, 4)), layers="routers")
    wrapped(torch.randn(2, 8))
    assert "neither the router nor the config has any of" in wrapped.routes().unmeasured["0"]

    wrapped = noesis.wrap(nn.Sequential(TopKRouter(experts=4)), layers="routers")
    wrapped.observed_model[0].weight = nn.Parameter(torch.randn(3, 8))  # not as many as it says
    wrapped(torch.randn(2, 8))
    assert "no logits of 4 experts in an output of type tuple" in wrapped.routes().unmeasured["0"]


def test_routers_that_choose_in_groups_or_keep_logits_elsewhere():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.DeepseekV3Config(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    deepseek = transformers.DeepseekV3ForCausalLM(config)
    llama4 = transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **sizes,
            **heads,
            head_dim=8,
            intermediate_size_mlp=32,
            num_local_experts=4,
            num_experts_per_tok=1,
            pad_token_id=0,
        )
    )
    for model, layers, experts, top_k in ((deepseek, 1, 8, 2), (llama4, 2, 4, 1)):
        wrapped = noesis.wrap(model.eval(), layers="routers")
        wrapped(torch.randint(1, 64, (2, 6)))
        routes = wrapped.routes()
        assert not routes.unmeasured
        assert routes.experts.tolist() == [experts] * layers
        assert routes.totals.counts.sum(-1).tolist() == [12 * top_k] * layers


def test_probabilities_are_taken_as_such():
    from noesis.layers import Router

    p = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    logits, _ = Router("router", 0, experts=4, top_k=2, place=0, probabilities=True).read((p,))
    assert torch.equal(logits.softmax(-1), p)


# ---------------------------------------------------------------- the result


@pytest.fixture
def routes() -> Routes:
    wrapped = noesis.wrap(small(4, 6), layers="routers", capacity=3)
    with wrapped.run(prompt="a moth"):
        run(wrapped)
    return wrapped.routes()


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".json.gz"])
def test_saving_and_loading(routes, tmp_path, suffix):
    path = routes.save(tmp_path / f"routes{suffix}")
    again = Routes.load(path)
    assert_equal(routes, again)
    assert again.meta == routes.meta
    assert repr(again) == repr(routes)


def test_json_says_it_in_numbers(routes):
    payload = json.loads(routes.to_json())
    assert (payload["format"], payload["format_version"]) == ("noesis.routes", 1)
    total = payload["totals"][0]
    assert total["layer"] == "0.gate"
    assert total["tokens"] == 2 * 3 + 4 * 2
    assert total["expert_load"][4:] == [None, None]
    assert sum(total["expert_load"][:4]) == pytest.approx(1)


def test_files_that_are_no_routes(routes, tmp_path):
    with pytest.raises(NoesisError, match=r"has the suffix '\.txt'. Expected \.safetensors"):
        routes.save(tmp_path / "routes.txt")
    with pytest.raises(NoesisError, match="is not there"):
        Routes.load(tmp_path / "nothing.json")
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"format": "noesis.trace", "format_version": 1}))
    with pytest.raises(NoesisError, match="is no noesis routes: its format is 'noesis.trace'"):
        Routes.load(trace)
    broken = json.loads(routes.to_json())
    for change in (
        lambda value: value["arrays"].pop("sums"),
        lambda value: value["arrays"]["experts"].append(3),
        lambda value: value["arrays"]["experts"].__setitem__(0, 7),
        lambda value: value["arrays"]["steps"].__setitem__(0, -1),
        lambda value: value["arrays"]["whole"][0].__setitem__(0, 0.5),
        lambda value: value.__setitem__("arrays", []),
        lambda value: value.pop("layers"),
        lambda value: value["layers"].pop(),
    ):
        value = copy.deepcopy(broken)
        change(value)
        path = tmp_path / "broken.json"
        path.write_text(json.dumps(value))
        with pytest.raises(NoesisError, match="is not valid routes|float64, expected whole ones"):
            Routes.load(path)
    whole = routes.save(tmp_path / "routes.safetensors")
    whole.write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(NoesisError, match="not a readable safetensors file"):
        Routes.load(whole)


def test_repr_is_a_table(routes):
    lines = repr(routes).splitlines()
    assert lines[0] == "Routes of 3 steps x 2 routers, 4 to 6 experts each (2 earlier steps are in the totals only)"
    assert lines[1].split() == ["layer", "tokens", "entropy", "cv", "idle", "switching", "top", "experts"]
    assert lines[2].startswith("0.gate")
    top = int(routes.totals.expert_load[0, :4].argmax())
    assert f"{top}: {routes.totals.expert_load[0, top]:.0%}, " in lines[2]


def test_layers_that_never_ran_are_named():
    class Early(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    wrapped = noesis.wrap(Early(MoEBlock(), MoEBlock()), layers="routers")
    wrapped(torch.randn(1, 2, 8))
    routes = wrapped.routes()
    assert "never ran: 1.gate" in repr(routes)
    for name in STATISTICS[1:]:
        assert np.isnan(getattr(routes.totals, name)[1]).all()


def test_plot(routes, tmp_path):
    pytest.importorskip("matplotlib")
    routes.plot(tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"


def test_asking_too_early_or_without_routers():
    wrapped = noesis.wrap(small(), layers="routers")
    with pytest.raises(NoesisError, match="No step was observed yet. Expected at least one forward"):
        wrapped.routes()
    other = noesis.wrap(nn.Sequential(nn.Linear(2, 2)))
    other(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match='No router is observed.*layers="routers"'):
        other.routes()
