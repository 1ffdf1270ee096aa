"""Circuits: run exactly, found where they are by construction, and refused where they cannot be known."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import noesis
from helpers.circuits import Circuit, indirect_object, induction
from helpers.families import family, inputs
from helpers.language_models import VOCABULARY, prompts
from helpers.selection import by_default
from noesis import interp
from noesis.interp.between import Between
from noesis.interp.finding import smallest
from noesis.interp.graph import graph_of
from noesis.interp.sites import Site
from noesis.interp.wiring import Wiring, values_of

METRIC = interp.logit_difference(5, 6)
#: Sequential, parallel, norms before the sum, grouped keys and values, experts.
MODELS = ["llama", "gpt2", "gemma2", "olmo2", "neox", "cohere", "mixtral"]


def ids_of(corrupted: bool) -> Tensor:
    ids = prompts(4, 6)
    return (ids + 3) % VOCABULARY if corrupted else ids


def padded(corrupted: bool) -> dict[str, Tensor]:
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 0] = 0
    return {"input_ids": ids_of(corrupted), "attention_mask": mask}


@functools.cache
def wiring_of(name: str, ablation: str = "resample", batch: int = 8) -> Wiring:
    model = family(name)
    between = Between.of(model, ids_of(False), ids_of(True), METRIC, "denoise", batch)
    anatomy = interp.anatomy(model, ids_of(False))
    return Wiring(model, graph_of(model, anatomy, between.few()), between, ablation)  # type: ignore[arg-type]


def metric_of(name: str, ids: Tensor) -> np.ndarray:
    with torch.no_grad():
        return METRIC(family(name)(ids)).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_all_edges_are_the_model_and_none_the_corrupted_run(name: str) -> None:
    wiring = wiring_of(name)
    none = torch.zeros_like(wiring.full)
    full, empty = wiring.run(torch.stack([wiring.full, none]))
    np.testing.assert_allclose(full, metric_of(name, ids_of(False)), atol=2e-6)
    np.testing.assert_allclose(empty, metric_of(name, ids_of(True)), atol=2e-6)
    assert np.abs(full - empty).min() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_without_one_edge_it_is_path_patching(name: str) -> None:
    """Two ways to the same number: circuits that run, and a change that is sent along one path."""
    wiring = wiring_of(name)
    edges = wiring.graph.edges[:: max(1, len(wiring.graph.edges) // 9)]
    without = torch.stack([wiring.full & ~wiring.graph.mask([edge]) for edge in edges])
    effects = interp.paths(
        family(name),
        ids_of(False),
        ids_of(True),
        METRIC,
        senders=[edge.sender for edge in edges],
        receivers=[edge.receiver for edge in edges],
        direction="noise",
    )
    expected = [effects.patched[effects.sites.index(edge)] for edge in edges]
    np.testing.assert_allclose(wiring.run(without), expected, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox"])
def test_without_a_node_it_is_activation_patching(name: str) -> None:
    wiring = wiring_of(name)
    nodes = wiring.graph.senders[1:]
    without = wiring.full.repeat(len(nodes), 1, 1)
    for at in range(len(nodes)):
        without[at, :, 1 + at] = False
    effects = interp.patch(
        family(name), ids_of(False), ids_of(True), METRIC, sites=["z", "mlp"], positions="all", direction="noise"
    )
    expected = [effects.patched[effects.sites.index(node)] for node in nodes]
    np.testing.assert_allclose(wiring.run(without), expected, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_other_ablations(name: str) -> None:
    model = family(name)
    for ablation in ("mean", "zero"):
        wiring = wiring_of(name, ablation)
        full, empty = wiring.run(torch.stack([wiring.full, torch.zeros_like(wiring.full)]))
        np.testing.assert_allclose(full, metric_of(name, ids_of(False)), atol=2e-6)
        if ablation == "mean":
            run = interp.run(model, ids_of(True), keep=["resid_pre.0", "attn.0", "mlp.0"])
            first = wiring.base.streams[0][:4]
            torch.testing.assert_close(first, run["resid_pre.0"].mean(0, keepdim=True).expand_as(first))
            if name == "llama":  # without a norm, means add up
                added = run["attn.0"] + run["mlp.0"]
                torch.testing.assert_close(wiring.base.streams[1][0] - first[0], added.mean(0), atol=1e-6, rtol=0)
        else:
            assert not wiring.base.streams[-1].any()  # there are no biases
            assert np.all(empty == 0)


def test_layers_that_have_all_edges_are_not_run_again() -> None:
    wiring = wiring_of("llama")
    late = wiring.full.clone()
    late[wiring.row[Site("v", 2, 0)]] = False
    assert set(wiring._begun(late[None])) == {0, 1}
    early = wiring.full.clone()
    early[wiring.row[Site("q", 0, 0)]] = False
    assert not wiring._begun(torch.stack([late, early]))
    fresh = wiring_of("llama", batch=4)  # of one copy
    circuits = torch.stack([late, early, late])
    np.testing.assert_allclose(values_of([wiring], circuits), values_of([fresh], circuits), atol=1e-6)


# ---------------------------------------------------------------- circuits by construction


def moved(made: Circuit, count: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], interp.Metric]:
    """Pairs in which all differs: the tokens, and the positions, each of which is called the next."""
    pairs, others = made.sample(count, seed), made.sample(count, seed + 1000)
    length = pairs.clean.shape[1]
    at = torch.arange(length).repeat(count, 1)
    shifted = (at + 1).clamp(max=made.model.config.n_positions - 1)
    # With a mask, as transformers takes positions that do not go up by one for several texts in a row without.
    clean = {"input_ids": pairs.clean, "position_ids": at, "attention_mask": pairs.mask}
    corrupted = {"input_ids": others.clean, "position_ids": shifted, "attention_mask": pairs.mask}
    return clean, corrupted, interp.logit_difference(pairs.right, pairs.wrong)


def needed(made: Circuit) -> set[str]:
    """The edges of induction; keys from positions only say where to look when nothing is found."""
    return {f"{a}->{b}" for a, b in made.edges} - {f"embed->{made.site('k', 'induction')}"}


@functools.cache
def found(seed: int, method: str = "exact") -> tuple[Circuit, interp.Circuit]:
    made = induction(seed)
    return made, interp.circuit(made.model, *moved(made, 16, seed), method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["exact", "acdc"])
@pytest.mark.parametrize("seed", by_default(1, [0, 1, 5]))
def test_induction_is_found_edge_by_edge(seed: int, method: str) -> None:
    made, circuit = found(seed, method)
    assert set(map(str, circuit.edges)) == needed(made)
    assert circuit.faithfulness == pytest.approx(1, abs=1e-5)
    assert circuit.found == pytest.approx(1, abs=1e-5)
    assert set(map(str, circuit.nodes)) == {"embed", made.site("z", "previous"), made.site("z", "induction"), "logits"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("way", ["before", "answer"])
def test_what_differs_alone_is_found_and_it_is_complete_and_minimal(seed: int, way: str) -> None:
    made = induction(seed)
    pairs = made.sample(12, seed, way, ragged=True)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    circuit = interp.circuit(made.model, pairs.clean_inputs, pairs.corrupted_inputs, metric)
    z, k, v = made.site("z", "induction"), made.site("k", "induction"), made.site("v", "induction")
    expected = {
        "before": {f"embed->{made.site('v', 'previous')}", f"{made.site('z', 'previous')}->{k}", f"{z}->logits"},
        "answer": {f"embed->{v}", f"{z}->logits"},
    }[way]
    assert set(map(str, circuit.edges)) == expected
    assert circuit.faithfulness == pytest.approx(1, abs=1e-5)
    complete = circuit.completeness()
    assert len(complete.sets) >= 22
    assert complete.difference.max() < 1e-5
    minimal = circuit.minimality()
    assert [node.component for node in minimal.nodes] == ["z"] * (2 if way == "before" else 1)
    np.testing.assert_allclose(minimal.ratio, 1, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_two_names(seed: int) -> None:
    made = indirect_object(seed)
    pairs = made.sample(12, seed, "swap")
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    circuit = interp.circuit(made.model, pairs.clean, pairs.corrupted, metric)
    assert set(map(str, circuit.edges)) == {
        f"embed->{made.site('q', 'duplicate')}",
        f"{made.site('z', 'duplicate')}->{made.site('v', 'inhibition')}",
        f"{made.site('z', 'inhibition')}->{made.site('q', 'mover')}",
        f"{made.site('z', 'mover')}->logits",
    }
    assert circuit.faithfulness == pytest.approx(1, abs=1e-5)
    assert circuit.completeness().difference.max() < 1e-5
    np.testing.assert_allclose(circuit.minimality().ratio, 1, atol=1e-5)


def test_nodes() -> None:
    made = induction(1)
    pairs = made.sample(10, 1)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    circuit = interp.circuit(made.model, pairs.clean, pairs.corrupted, metric, level="nodes")
    assert set(map(str, circuit.nodes)) == {made.site("z", "previous"), made.site("z", "induction")}
    assert circuit.edges == []
    assert circuit.faithfulness == pytest.approx(1, abs=1e-5)
    assert circuit.plot().axes


@pytest.mark.slow
def test_of_two_heads_that_stand_in_for_each_other_pruning_keeps_one() -> None:
    """Leaving out one of them alone shows nothing: both have a score near 0 by the exact method."""
    made = induction(3)
    layer, head = made.heads["induction"]
    attention = made.model.transformer.h[layer].attn
    width, size = attention.head_dim, attention.num_heads * attention.head_dim
    twin = (head + 1) % attention.num_heads
    weights, out = attention.c_attn.weight.data, attention.c_proj.weight.data
    for begin in range(0, 3 * size, size):
        weights[:, begin + twin * width :][:, :width] = weights[:, begin + head * width :][:, :width]
    out[twin * width :][:width] = out[head * width :][:width]
    pairs = made.sample(12, 3)
    seen = []

    def enough(logits: Tensor) -> Tensor:
        """What one of both gives is enough."""
        seen.append(len(logits))
        return logits[torch.arange(12), -1, pairs.right].clamp(max=3)

    found = {
        method: interp.circuit(made.model, pairs.clean, pairs.corrupted, enough, method=method)  # type: ignore[call-overload]
        for method in ("exact", "acdc")
    }
    assert set(seen) == {12}  # a function sees all pairs, and half of what it says counts
    assert len(found["exact"].clean) == 6
    ends = [f"z.{layer}.{each}->logits" for each in (head, twin)]
    scores = {
        method: sorted(dict(zip(map(str, each.parts), each.scores, strict=True))[end] for end in ends)
        for method, each in found.items()
    }
    assert max(scores["exact"]) < 0.1
    assert scores["acdc"][0] < 0.1
    assert scores["acdc"][1] >= 0.5


# ---------------------------------------------------------------- results


def test_its_repr_names_what_it_depends_on() -> None:
    _, circuit = found(1)
    text = repr(circuit)
    assert "7 of 98 edges" in text
    assert "resampled from the corrupted prompts" in text
    assert "on 8 pairs not used to find it" in text
    assert "exact ablation" in text
    assert "logit difference" in text


def test_the_curve_and_its_areas() -> None:
    _, circuit = found(1)
    curve = circuit.faithfulness_curve
    assert circuit.shares.tolist() == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    full = curve[circuit.shares >= 7 / 98]
    np.testing.assert_allclose(full, 1, atol=1e-5)
    assert circuit.cpr == pytest.approx(sum((curve[1:] + curve[:-1]) / 2 * np.diff(circuit.shares)))
    off = np.abs(1 - curve)
    assert circuit.cmd == pytest.approx(sum((off[1:] + off[:-1]) / 2 * np.diff(circuit.shares)))
    assert circuit.cpr > 0.9


def test_it_is_reported_on_the_other_half() -> None:
    """Of pairs that are all but one alike, it is told which are used for what."""
    made = induction(1)
    pairs = made.sample(10, 1)
    inputs = (made.model, pairs.clean, pairs.corrupted, interp.logit_difference(pairs.right, pairs.wrong))
    circuit = interp.circuit(*inputs, size=3, split=0.3)
    assert len(circuit.clean) == 7
    assert len(circuit.edges) == 3
    again = interp.circuit(*inputs, size=0.03, split=0.3)
    assert len(again.edges) == round(0.03 * len(again.parts)) == 3
    same = circuit.compare(again)
    assert same.jaccard == pytest.approx(len(again.edges) / 3)
    assert set(same.only_a) == set(circuit.edges) - set(again.edges)
    assert same.only_b == []
    assert "Jaccard" in repr(same)


def test_files_tables_and_pictures(tmp_path: Path) -> None:
    _, circuit = found(1)
    for name in ("c.json", "c.safetensors", "c.json.gz"):
        read = interp.Circuit.load(circuit.save(tmp_path / name))
        assert read.edges == circuit.edges
        assert read.nodes == circuit.nodes
        assert repr(read) == repr(circuit)
        with pytest.raises(noesis.NoesisError, match="read from a file"):
            read.completeness()
    assert interp.Circuit.from_json(circuit.to_json()).faithfulness == circuit.faithfulness
    assert len(circuit.to_csv().splitlines()) == 1 + len(circuit.parts)
    figure = circuit.plot(tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"embed", "logits"} <= texts
    assert sum(text.startswith("head ") for text in texts) == 2
    assert len(figure.axes[0].patches) == 7


def test_keys_of_a_group_are_those_of_its_heads() -> None:
    model = family("llama")
    circuit = interp.circuit(model, ids_of(False), ids_of(True), METRIC, size=90)
    assert 20 < len(circuit.edges) <= 90  # what leads nowhere is left out
    keys = [edge.receiver for edge in circuit.edges if edge.receiver.component in ("k", "v")]
    assert keys
    for receiver in keys:
        heads = {node.head // 2 for node in circuit.nodes if node.component == "z" and node.layer == receiver.layer}
        assert receiver.head in heads
    assert circuit.plot().axes


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "attribution"}, "method is 'attribution'.*'exact', 'acdc'"),
        ({"ablation": "none"}, "ablation is 'none'"),
        ({"level": "neurons"}, "level is 'neurons'"),
        ({"size": 0}, "size is 0"),
        ({"size": 1.5}, "size is 1.5"),
        ({"size": 100_000}, "at most the 190"),
        ({"faithfulness": 1.2}, "faithfulness is 1.2"),
        ({"split": 1.0}, "split is 1.0"),
        ({"metric": lambda logits: logits[:, -1, 5].mean()}, "a single number, such as a mean"),
        ({"corrupted": ids_of(True)[:, :5]}, "6 tokens and corrupted ones 5"),
        ({"corrupted": ids_of(False)}, "is the same with everything ablated"),
        (
            {"clean": padded(False), "corrupted": padded(True), "ablation": "mean"},
            "prompts are padded",
        ),
        ({"clean": ids_of(False)[:1], "corrupted": ids_of(True)[:1]}, "at least two"),
    ],
)
def test_bad_input_says_what_to_do(options: dict[str, Any], match: str) -> None:
    given = {"clean": ids_of(False), "corrupted": ids_of(True), "metric": METRIC, **options}
    with pytest.raises(ValueError, match=match):
        interp.circuit(family("llama"), **given)


@pytest.mark.parametrize(("name", "why"), [("bert", "normalises or scales the sum"), ("t5", "attends twice")])
def test_models_that_do_not_add_up_are_refused(name: str, why: str) -> None:
    given = inputs(name)
    with pytest.raises(noesis.NoesisError, match=why):
        interp.circuit(family(name), given, given, METRIC)


def test_half_precision_that_is_too_coarse_is_refused() -> None:
    model = family("llama").to(torch.bfloat16)
    model.lm_head.weight.data.add_(2)  # logits of one size, whose differences are near its resolution
    with pytest.raises(noesis.NoesisError, match=r"model\.float"):
        interp.circuit(model, ids_of(False), ids_of(True), METRIC)


def test_wrapped_models_are_as_bare_ones() -> None:
    bare, wrapped = family("llama"), noesis.wrap(family("llama"))
    one, other = (interp.circuit(each, ids_of(False), ids_of(True), METRIC, size=9) for each in (bare, wrapped))
    assert one.edges == other.edges
    assert one.faithfulness == other.faithfulness


def test_the_smallest_that_passes() -> None:
    for at_once in (1, 2, 5):
        for first in (1, 2, 17, 40):
            assert smallest(lambda sizes, first=first: [size >= first for size in sizes], 40, at_once) == first  # type: ignore[misc]
