"""Results of `noesis.interp` as version 1 wrote them: what is read back says the same, from tensors and from JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from noesis import interp

FILES = Path(__file__).parent / "v1"
KINDS: dict[str, Any] = {
    "circuit": interp.Circuit,
    "direction": interp.Direction,
    "head_scores": interp.HeadScores,
    "importance": interp.Importance,
    "neurons": interp.Neurons,
    "probe": interp.Probe,
}


def write_all() -> None:
    """How the files were made."""
    from helpers.circuits import induction
    from helpers.language_models import build, prompts

    model, draws = build("gpt2"), torch.Generator().manual_seed(0)
    labels = np.arange(20) % 2
    vectors = torch.randn(20, 3, generator=draws) + torch.from_numpy(labels)[:, None]
    metric = interp.logit_difference(5, 7)
    positive, negative = (torch.cat([prompts(seed=seed + each) for each in range(2)]) for seed in (1, 5))
    found = interp.neurons(model, [prompts()], layers="transformer.h.1.mlp.c_proj", k=1, quantiles=2)
    by_hand = induction(seed=0)
    pairs = by_hand.sample(8)
    answer = interp.logit_difference(pairs.right, pairs.wrong)
    made = {
        "circuit": interp.circuit(by_hand.model, pairs.clean_inputs, pairs.corrupted_inputs, answer, level="nodes"),
        "direction": interp.direction(model, positive, negative, site="resid_post.1"),
        "head_scores": interp.heads(model, seed=0),
        "importance": interp.importance(model, found, prompts(), metric, site=next(iter(found.sites)), channels=[3, 5]),
        "neurons": found,
        "probe": interp.probe(vectors, labels, folds=2),
    }
    for name, result in made.items():
        for suffix in ("safetensors", "json"):
            result.save(FILES / f"{name}.{suffix}")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_says_what_was_written(kind: str) -> None:
    written = json.loads((FILES / f"{kind}.json").read_text())
    for suffix in ("safetensors", "json"):
        path = FILES / f"{kind}.{suffix}"
        if path.exists():
            assert json.loads(KINDS[kind].load(path).to_json()) == written
