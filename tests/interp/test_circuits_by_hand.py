"""The circuits that other tests find are what they say they are."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.circuits import Circuit, Pairs, indirect_object, induction
from noesis import interp

SEEDS = range(6)
MAKERS = {"induction": induction, "indirect object": indirect_object}
WAYS = [("induction", "before"), ("induction", "answer"), ("indirect object", "swap"), ("indirect object", "third")]


@functools.cache
def circuit(kind: str, seed: int) -> Circuit:
    return MAKERS[kind](seed)


def answers(circuit: Circuit, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits = circuit.model(**inputs).logits
    return logits[torch.arange(len(logits)), inputs["attention_mask"].sum(1) - 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kind", "way"), WAYS)
@pytest.mark.parametrize("ragged", [False, True])
def test_every_answer_is_right_and_no_corrupted_one(kind: str, way: str, seed: int, ragged: bool) -> None:
    made = circuit(kind, seed)
    pairs = made.sample(24, seed, way, ragged)
    clean = answers(made, pairs.clean_inputs)
    assert torch.equal(clean.argmax(1), pairs.right)
    corrupted = answers(made, pairs.corrupted_inputs)
    rows = torch.arange(24)
    torch.testing.assert_close(clean[rows, pairs.right] - clean[rows, pairs.wrong], torch.full((24,), 8.0))
    expected = -8.0 if way in ("answer", "swap") else 0.0
    torch.testing.assert_close(
        corrupted[rows, pairs.right] - corrupted[rows, pairs.wrong], torch.full((24,), expected), atol=1e-3, rtol=0
    )


def pattern(made: Circuit, head: str, pairs: Pairs) -> Tensor:
    return interp.run(made.model, pairs.clean_inputs, keep=made.site("pattern", head))[made.site("pattern", head)]


@pytest.mark.parametrize("seed", SEEDS)
def test_patterns_of_induction(seed: int) -> None:
    made = circuit("induction", seed)
    pairs = made.sample(8, seed)
    length = pairs.clean.shape[1]
    previous = pattern(made, "previous", pairs)
    expected = torch.zeros(length, length)
    expected[range(1, length), range(length - 1)] = 1
    expected[0, 0] = 1
    assert (previous - expected).abs().max() < 1e-6
    found = pattern(made, "induction", pairs)
    for row in range(8):
        assert found[row, pairs.at["end"][row], pairs.at["answer"][row]] > 0.999
        assert (found[row, : pairs.at["end"][row], 0] > 0.999).all()  # no match: BOS


@pytest.mark.parametrize("seed", SEEDS)
def test_patterns_of_the_indirect_object(seed: int) -> None:
    made = circuit("indirect object", seed)
    pairs = made.sample(8, seed)
    duplicate, inhibition, mover = (pattern(made, head, pairs) for head in made.heads)
    for row in range(8):
        first, second, again, end = (int(pairs.at[name][row]) for name in ("first", "second", "again", "end"))
        ids = pairs.clean[row]
        earlier, other = (first, second) if ids[first] == ids[again] else (second, first)
        assert duplicate[row, again, earlier] > 0.999
        assert (duplicate[row, [at for at in range(len(ids)) if at != again], 0] > 0.999).all()
        assert inhibition[row, end, again] > 0.999
        assert mover[row, end, other] > 0.999


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_edges_are_what_the_weights_connect(kind: str, seed: int) -> None:
    made = circuit(kind, seed)
    model = made.model
    heads, d = model.config.n_head, model.config.n_embd
    width = d // heads
    writing: dict[str, Tensor] = {"embed": torch.cat([model.transformer.wte.weight, model.transformer.wpe.weight])}
    reading: dict[str, Any] = {"logits": model.lm_head.weight.T}
    order: dict[str, float] = {"embed": -1, "logits": 99}
    for layer, block in enumerate(model.transformer.h):
        assert not any(parameter.any() for parameter in block.mlp.parameters())
        assert not block.attn.c_attn.bias.any()
        assert not block.attn.c_proj.bias.any()
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            value = block.attn.c_attn.weight[:, 2 * d : 3 * d][:, own]
            writing[f"z.{layer}.{head}"] = value @ block.attn.c_proj.weight[own]
            order[f"z.{layer}.{head}"] = layer
            for part, name in enumerate("qkv"):
                reading[f"{name}.{layer}.{head}"] = block.attn.c_attn.weight[:, part * d : (part + 1) * d][:, own]
                order[f"{name}.{layer}.{head}"] = layer
    connected = {
        (sender, receiver)
        for sender, written in writing.items()
        for receiver, read in reading.items()
        if order[sender] < order[receiver] and (written @ read).abs().max() > 0
    }
    assert connected == made.edges
    assert {receiver[2:] for _, receiver in made.edges if receiver != "logits"} == {
        "{}.{}".format(*place) for place in made.heads.values()
    }


def test_sizes_places_and_sharpness_are_those_of_the_seed() -> None:
    for kind, make in MAKERS.items():
        several = [circuit(kind, seed) for seed in SEEDS]
        assert len({tuple(each.heads.values()) for each in several}) > 2
        assert len({each.model.config.n_embd for each in several}) > 2
        assert len({each.sharpness for each in several}) > 2
        again = make(3)
        for a, b in zip(again.model.parameters(), circuit(kind, 3).model.parameters(), strict=True):
            assert torch.equal(a, b)
