"""Edge attribution: the first order of exact path patching, in every kind of block, and the edges of known circuits."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import noesis
from helpers.circuits import induction
from helpers.families import family
from helpers.language_models import prompts
from helpers.selection import by_default
from noesis import interp
from noesis.interp.edge_scores import EdgeScores
from noesis.interp.estimating import Ends
from noesis.interp.pairs import Inputs
from noesis.interp.sweeping import Looking

PAIRS, LENGTH = 2, 6
METRIC = interp.logit_difference(right=[5, 6], wrong=[9, 10])
FAMILIES = ["gpt2", "llama", "gemma2", "olmo2", "qwen3", "neox", "mixtral", "opt", "gptoss", "cohere"]
PARALLEL = {"neox", "cohere"}


def attributed(*args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", noesis.NoesisWarning)
        return interp.attribute(*args, **options)


def embeddings(model: Any, step: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What two runs are given that differ by so little."""
    ids = prompts(PAIRS, LENGTH)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        base, other = embed(ids).clone(), embed(ids.roll(1, 0))
        near = base.clone()
        near[:, 2:4] += step * (other - base)[:, 2:4]
    return {"inputs_embeds": near}, {"inputs_embeds": base}


class ByHand:
    """Exact path patching, an edge at a time, by whole runs."""

    def __init__(self, name: str, step: float) -> None:
        self.name, self.model = name, family(name).double()
        self.clean, self.corrupted = embeddings(self.model, step)
        self.anatomy = interp.anatomy(self.model, **self.corrupted)
        self.keep = ["resid_pre", "attn", "mlp", "z", "resid_post"]
        self.source, self.base = (self.run(inputs, keep=self.keep) for inputs in (self.clean, self.corrupted))
        self.layers = len(self.anatomy.blocks)

    def run(self, inputs: dict[str, Tensor], **options: Any) -> interp.Run:
        return interp.run(self.model, inputs, anatomy=self.anatomy, **options)

    def change(self, sender: interp.Site) -> Tensor:
        """What the stream has more when the sender alone does as in the other run."""
        if sender.component == "resid_pre":  # no embedding ran
            return self.source["resid_pre", 0] - self.base["resid_pre", 0]
        if sender.component == "mlp":
            return self.source[sender] - self.base[sender]
        put = self.source["z", sender.layer][:, :, sender.head]
        run = self.run(self.corrupted, keep=[f"attn.{sender.layer}"], edits=[interp.Custom(str(sender), lambda _: put)])
        return run["attn", sender.layer] - self.base["attn", sender.layer]

    def effect(self, edge: interp.Edge) -> Tensor:
        """How the metric changes when the sender's change reaches the receiver alone, to the first two orders."""
        change = self.change(edge.sender)
        return (self.reaching(edge.receiver, change) - self.reaching(edge.receiver, -change)) / 2

    def reaching(self, receiver: interp.Site, change: Tensor) -> Tensor:
        """The metric when the receiver is given so much more."""
        if receiver.component == "logits":
            return METRIC(self.run(self.corrupted, edits=[self.more(f"resid_post.{self.layers - 1}", change)]).output)
        sequential = receiver.component == "mlp" and self.name not in PARALLEL
        given = f"{'attn' if sequential else 'resid_pre'}.{receiver.layer}"
        reached = self.run(self.corrupted, keep=[str(receiver)], edits=[self.more(given, change)])[str(receiver)]
        return METRIC(self.run(self.corrupted, edits=[interp.Custom(str(receiver), lambda _: reached)]).output)

    @staticmethod
    def more(site: str, change: Tensor) -> interp.Custom:
        return interp.Custom(site, lambda part: part + change.reshape(part.shape))


# transformers' experts know no float64, which the differences need.
@pytest.mark.parametrize("name", by_default(3, [name for name in FAMILIES if name not in ("mixtral", "gptoss")]))
def test_scores_are_the_first_order_of_exact_path_patching(name: str) -> None:
    hand = ByHand(name, 1e-2)
    found = attributed(
        hand.model, hand.clean, hand.corrupted, METRIC, edges=True, steps=0, check=0, anatomy=hand.anatomy
    )
    scores = found.patched - found.corrupted
    rows = np.random.default_rng(0).permutation(len(found))[:40].tolist()
    components = [(edge.sender.component, edge.receiver.component) for edge in found.sites]
    rows += [components.index(kind) for kind in dict.fromkeys(components)]  # one of each kind at least
    expected = np.stack([hand.effect(found.sites[row]).detach().numpy() for row in rows])
    size = np.abs(scores).max()
    np.testing.assert_allclose(scores[rows], expected, rtol=2e-3, atol=1e-3 * size)
    assert found.sites[0].sender == interp.Site("resid_pre", 0)
    assert (np.abs(expected).max(1) > 1e-2 * size).sum() > 10


@pytest.mark.parametrize("name", FAMILIES)
def test_there_is_an_edge_from_each_writer_to_each_later_reader(name: str) -> None:
    model = family(name)
    anatomy = interp.anatomy(model, prompts(PAIRS, LENGTH))
    clean = prompts(PAIRS, LENGTH)
    found = attributed(model, clean, clean.roll(1, 0), METRIC, edges=True, steps=0, check=0)
    writers, expected = ["embed"], set()
    for layer, block in enumerate(anatomy.blocks):
        counts = {"q": block.heads, "k": block.kv_heads, "v": block.kv_heads}
        readers = [f"{part}.{layer}.{head}" for part, count in counts.items() for head in range(count)]
        expected |= {f"{writer}->{reader}" for writer in writers for reader in readers}
        heads = [f"z.{layer}.{head}" for head in range(block.heads)]
        given = writers if name in PARALLEL else writers + heads
        expected |= {f"{writer}->mlp.{layer}" for writer in given}
        writers = [*writers, *heads, f"mlp.{layer}"]
    expected |= {f"{writer}->logits" for writer in writers}
    assert set(map(str, found.sites)) == expected
    assert len(found.sites) == len(expected)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_edges_of_a_writer_add_up_to_the_estimate_of_the_writer(name: str, steps: int) -> None:
    model, ids = family(name).double(), prompts(PAIRS, LENGTH)
    given = (model, ids, ids.roll(1, 0), METRIC)
    edges = attributed(*given, edges=True, steps=steps, check=0)
    nodes = attributed(*given, sites=["embed", "z", "mlp"], positions="all", steps=steps, check=0)
    senders, values = edges.candidates()
    for sender, value in zip(senders, values, strict=True):
        np.testing.assert_allclose(value, nodes.values[list(map(str, nodes.sites)).index(str(sender))], atol=1e-6)


def test_the_way_through_one_heads_outputs_is_that_through_the_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompts(PAIRS, LENGTH)
    for name, alone in (("llama", True), ("gpt2", True), ("qwen3", True), ("olmo2", False)):
        model = family(name).double()
        anatomy = interp.anatomy(model, ids)
        base, source = (Inputs.of(each, model, "") for each in (ids, ids.roll(1, 0)))
        ends = Ends(model, anatomy, base, source, Looking(METRIC, base, model))
        scores = EdgeScores(anatomy, ends)
        # OLMo 2 norms the queries and keys of all heads as one vector: their outputs are of every head.
        made = scores.layers[0].made_by
        assert [made[part] is not None for part in "qkv"] == [alone, alone, True]
        found = scores.estimate(ends, 1).scores
        for layer in scores.layers:
            monkeypatch.setattr(layer, "made_by", dict.fromkeys("qkv"))
        np.testing.assert_allclose(scores.estimate(ends, 1).scores, found, atol=1e-9)


@pytest.mark.parametrize("seed", by_default(1, range(4)))
def test_the_edges_of_an_induction_circuit(seed: int) -> None:
    made = induction(seed, 4.0)
    pairs = made.sample(16, seed)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    found = attributed(made.model, pairs.clean_inputs, pairs.corrupted_inputs, metric, edges=True, steps=20)
    previous, last = ("{}.{}".format(*made.heads[head]) for head in ("previous", "induction"))
    largest = {str(each.site) for each in found.top(3)}
    assert largest == {f"embed->v.{previous}", f"z.{previous}->k.{last}", f"z.{last}->logits"}
    for edge in largest:
        assert found[edge].mean == pytest.approx(1.0, abs=0.25)
        assert found[edge].q_value < 0.05
    assert all(abs(each.mean) < 0.2 for each in found.top(len(found))[3:])
    true = {f"{sender}->{receiver}" for sender, receiver in made.edges}
    assert largest <= true


def test_writers_are_checked_where_no_embedding_ran() -> None:
    model = family("gpt2")
    found = attributed(model, *embeddings(model, 1.0), METRIC, edges=True, steps=2, check=3)
    assert len(found.checked) >= 3
    assert found.sites[0].sender == interp.Site("resid_pre", 0)


def test_saturated_edges_are_not_trusted() -> None:
    made = induction(0, 40.0)
    pairs = made.sample(16)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    with pytest.warns(noesis.NoesisWarning, match="not to be trusted"):
        found = interp.attribute(made.model, pairs.clean_inputs, pairs.corrupted_inputs, metric, edges=True, steps=0)
    assert {str(each.site) for each in found.disagreements} == {"embed", made.site("z", "previous")}
    assert "senders were, and edges were not" in repr(found)


@pytest.mark.parametrize("name", ["bert"])
def test_models_whose_edges_are_not_known(name: str) -> None:
    ids = prompts(PAIRS, LENGTH)
    with pytest.raises(ValueError, match=re.escape("the edges of ") + r"\w+ are not known: \w+\.0 is refused"):
        interp.attribute(family(name), ids, ids.roll(1, 0), METRIC, edges=True)


def test_edges_by_name_and_as_a_table_and_a_picture(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    ids = prompts(PAIRS, LENGTH)
    found = attributed(family("llama"), ids, ids.roll(1, 0), METRIC, edges=True, steps=1, check=1)
    edge = found.sites[7]
    assert found[edge] == found[str(edge)]
    table = found.to_dataframe()
    assert list(table["edge"]) == list(map(str, found.sites))
    assert list(table["magnitude"]) == found.magnitude.tolist()
    found.plot(tmp_path / "edges.png")
    assert (tmp_path / "edges.png").stat().st_size > 1000
