"""Edits are data: saved, read back and refused like any file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import noesis
from helpers.language_models import build, prompts
from noesis import interp


def edits_of_all_kinds() -> interp.Edits:
    numbers = torch.arange(8.0).reshape(2, 1, 4)
    reference = {"z.1": [numbers, numbers + 1]}
    return interp.Edits(
        [
            interp.Zero("z.1.2", steps="decode", rows=[0, 2], name="first"),
            interp.Scale("mlp.*", 0.5, positions=-1, after="first"),
            interp.Add("resid_post.1", torch.arange(4.0) / 3, 2.0, when=interp.When("norm", ">", 3.0)),
            interp.Project("resid_post.1", torch.eye(4)[:2]),
            interp.Noise("embed", 0.1, seed=7, steps=[0, 3]),
            interp.Patch("z.1", {"z.1": numbers.half()}),
            interp.Freeze("z.1", reference),
            interp.Mean("z.1", reference, by_position=True),
            interp.Resample("z.1", torch.ones(2, 1, 4, dtype=torch.float64), seed=3),
        ]
    )


@pytest.mark.parametrize("suffix", ["safetensors", "json", "json.gz"])
def test_what_is_read_is_what_was_saved(tmp_path: Path, suffix: str) -> None:
    edits = edits_of_all_kinds()
    found = interp.Edits.load(edits.save(tmp_path / f"edits.{suffix}"))
    assert found == edits
    assert [type(edit) for edit in found] == [type(edit) for edit in edits]
    assert found != interp.Edits(list(edits)[2:])
    assert repr(found) == repr(edits)


def test_edits_that_were_read_do_the_same(tmp_path: Path) -> None:
    model, ids = build("gpt2"), prompts()
    kept = interp.run(model, prompts(seed=1), keep=["z.1", "resid_post.0"])
    edits = interp.Edits(
        [
            interp.Patch("z.1.2", kept),
            interp.Project("resid_post.0", torch.randn(kept["resid_post.0"].shape[-1])),
            interp.Resample("resid_post.0@3", kept, seed=2),
            interp.Noise("mlp.2", 0.1),
        ]
    )
    found = interp.Edits.load(edits.save(tmp_path / "edits.safetensors"))
    first, second = (interp.run(model, ids, edits=each).logits for each in (edits, found))
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(first, interp.run(model, ids).logits, atol=1e-3)


def test_functions_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(noesis.NoesisError, match="a function is no data"):
        interp.Edits([interp.Custom("z.1", torch.clone)]).save(tmp_path / "edits.json")
    with pytest.raises(noesis.NoesisError, match="`when` of Zero z.1 is a function"):
        interp.Edits([interp.Zero("z.1", when=lambda x: x > 0)]).to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Custom"},
        {"kind": "os.system"},
        {"site": 3},
        {"steps": "sometimes"},
        {"when": ["norm", "==", 1]},
        {"factor": "lots", "kind": "Unknown"},
        {"unheard": 1},
    ],
)
def test_strange_files_are_refused(change: dict[str, object]) -> None:
    written = json.loads(interp.Edits([interp.Zero("z.1")]).to_json())
    written["edits"][0].update(change)
    with pytest.raises(noesis.NoesisError):
        interp.Edits.from_json(written)
