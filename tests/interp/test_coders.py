"""Sparse autoencoders: against the formulas, from folders as SAELens writes them, and in the place of a site."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import noesis
from helpers.language_models import build, prompts
from noesis import interp


def weights(width: int = 6, units: int = 10, seed: int = 0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(width, units, generator=draws),
        "W_dec": torch.randn(units, width, generator=draws),
        "b_enc": torch.randn(units, generator=draws),
        "b_dec": torch.randn(width, generator=draws),
    }


def folder(path: Path, config: dict[str, Any], **more: Tensor) -> Path:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps({"d_in": 6, "d_sae": 10, "dtype": "float32", **config}))
    safetensors.torch.save_file({**weights(), **more}, path / "sae_weights.safetensors")
    return path


def test_standard(tmp_path: Path) -> None:
    w, x = weights(), torch.randn(2, 3, 6)
    config = {"architecture": "standard", "apply_b_dec_to_input": True, "hook_name": "blocks.8.hook_resid_pre"}
    coder = interp.SparseCoder.load(folder(tmp_path / "a", config))
    codes = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert coder.site == "resid_pre.8"
    assert torch.allclose(coder.encode(x), codes)
    assert torch.allclose(coder.reconstruct(x), codes @ w["W_dec"] + w["b_dec"])
    plain = interp.SparseCoder.load(folder(tmp_path / "b", {"architecture": "standard", "apply_b_dec_to_input": False}))
    assert torch.allclose(plain.encode(x), (x @ w["W_enc"] + w["b_enc"]).relu())
    assert plain.site is None


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "topk", "k": 3},
        {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
        {"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": 3}},
    ],
)
def test_topk(tmp_path: Path, config: dict[str, Any]) -> None:
    w, x = weights(), torch.randn(4, 6)
    coder = interp.SparseCoder.load(folder(tmp_path, {"apply_b_dec_to_input": False, **config}))
    before = x @ w["W_enc"] + w["b_enc"]
    least = before.sort(-1).values[:, -3:-2]
    assert torch.allclose(coder.encode(x), torch.where(before >= least, before, 0).relu())


def test_jumprelu_of_a_newer_config(tmp_path: Path) -> None:
    w, x, threshold = weights(), torch.randn(4, 6), torch.rand(10)
    config = {
        "architecture": "jumprelu",
        "metadata": {"hook_name": "blocks.3.attn.hook_z"},
        "apply_b_dec_to_input": False,
    }
    coder = interp.SparseCoder.load(folder(tmp_path, config, threshold=threshold))
    before = x @ w["W_enc"] + w["b_enc"]
    assert torch.allclose(coder.encode(x), torch.where(before > threshold, before, 0))
    assert coder.site == "z.3"
    heads = torch.randn(2, 5, 3, 2)  # of z, flattened
    assert coder.encode(heads).shape == (2, 5, 10)
    assert coder.reconstruct(heads).shape == heads.shape


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_normalised_inputs_are_undone(tmp_path: Path, kind: str) -> None:
    w, x = weights(), 5 + 3 * torch.randn(4, 6)
    coder = interp.SparseCoder.load(folder(tmp_path, {"normalize_activations": kind, "apply_b_dec_to_input": False}))
    if kind == "layer_norm":
        shift, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        normal = (x - shift) / (scale + 1e-5)
    else:
        shift, scale = 0, x.norm(dim=-1, keepdim=True) / 6**0.5
        normal = x / scale
        assert torch.allclose(normal.norm(dim=-1), torch.tensor(6**0.5))
    codes = (normal @ w["W_enc"] + w["b_enc"]).relu()
    assert torch.allclose(coder.encode(x), codes, atol=1e-5)
    assert torch.allclose(coder.reconstruct(x), (codes @ w["W_dec"] + w["b_dec"]) * scale + shift, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"architecture": "transcoder"}, "architecture 'transcoder'"),
        ({"activation_fn_str": "tanh-relu"}, "activation 'tanh-relu'"),
        ({"normalize_activations": "expected_average_only_in"}, "a constant that is not in its files"),
        ({"normalize_activations": "softmax"}, "normalised by 'softmax'"),
        ({"hook_head_index": 3}, "one head, 3"),
        ({"architecture": "topk", "k": 99}, "k is 99"),
        ({"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}, "norms of its decoder"),
        ({"architecture": "jumprelu"}, "threshold has nothing"),
        ({"finetuning_scaling_factor": True}, "fine-tuning"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(noesis.NoesisError, match=message):
        interp.SparseCoder.load(folder(tmp_path, config))


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(noesis.NoesisError, match=r"has no cfg\.json"):
        interp.SparseCoder.load(tmp_path)
    path = folder(tmp_path, {}, b_enc=torch.ones(3))
    with pytest.raises(noesis.NoesisError, match="b_enc has shape"):
        interp.SparseCoder.load(path)
    (path / "sae_weights.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(noesis.NoesisError, match="not a readable safetensors"):
        interp.SparseCoder.load(path)


# ---------------------------------------------------------------- in the place of a site


def test_a_splice_changes_what_its_units_do_and_keeps_the_error() -> None:
    model, ids = build("gpt2"), prompts()
    site = "resid_post.1"
    kept = interp.run(model, ids, keep=site)
    x = kept[site]
    w = weights(x.shape[-1], 48, seed=1)
    coder = interp.SparseCoder(w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"])

    def after(**options: Any) -> Tensor:
        return interp.run(model, ids, keep=site, edits=[interp.Splice(site, coder, **options)], anatomy=kept.anatomy)[
            site
        ]

    codes = coder.encode(x)
    assert torch.allclose(after(units=[3, 5], scale=0.0), x - codes[..., [3, 5]] @ w["W_dec"][[3, 5]], atol=1e-4)
    assert torch.equal(after(units=3, scale=1.0), x)
    lifted = x + (2.0 - codes[..., 7:8]) * w["W_dec"][7]
    assert torch.allclose(after(units=7, value=2.0), lifted, atol=1e-4)
    assert torch.allclose(after(error=False), coder.reconstruct(x), atol=1e-5)
    for options, message in [({}, "changes nothing"), ({"units": 99}, "unit 99"), ({"units": True}, "unit True")]:
        with pytest.raises(noesis.NoesisError, match=message):
            interp.Splice(site, coder, **options)
    with pytest.raises(noesis.NoesisError, match=r"a tensor of shape \(1, 3\)"):
        interp.run(nn.Sequential(nn.Linear(3, 3)), torch.ones(1, 3), edits=[interp.Splice("0", coder, error=False)])


def test_quality_of_one_that_is_perfect_and_of_one_that_is_not(tmp_path: Path) -> None:
    model, site = build("gpt2"), "resid_post.1"
    batches = [{"input_ids": prompts()}, {"input_ids": prompts(seed=1), "attention_mask": torch.ones(2, 7).tril(4)}]
    width = model.config.n_embd
    perfect = interp.SparseCoder(
        torch.cat([torch.eye(width), -torch.eye(width)], 1), torch.cat([torch.eye(width), -torch.eye(width)])
    )
    found = interp.coder_quality(model, batches, perfect, site=site)
    assert found.tokens == 14 + int(batches[1]["attention_mask"].sum())
    assert found.explained_variance == pytest.approx(1)
    assert found.l0 == pytest.approx(width, abs=0.5)
    assert found.spliced == pytest.approx(found.clean, abs=1e-5)
    damaged = dataclasses.replace(found, zeroed=found.clean + 4, averaged=found.clean + 2, spliced=found.clean + 1)
    assert damaged.loss_recovered == pytest.approx(0.75)
    assert damaged.loss_recovered_of_mean == pytest.approx(0.5)
    assert "75.0% recovered" in repr(damaged)
    assert found.dead == 0
    nothing = interp.SparseCoder(torch.zeros(width, 8), torch.zeros(8, width))
    none = interp.coder_quality(model, batches, nothing, site=site)
    assert none.spliced == pytest.approx(none.zeroed)
    assert none.dead == 1
    assert none.explained_variance <= 0
    assert interp.CoderQuality.load(found.save(tmp_path / "quality.json")) == found
    assert math.isnan(dataclasses.replace(found, zeroed=found.clean).loss_recovered)
    assert "nothing can be recovered" in repr(dataclasses.replace(found, zeroed=found.clean))
    with pytest.raises(noesis.NoesisError, match="does not say where it belongs"):
        interp.coder_quality(model, batches, perfect)
    with pytest.raises(noesis.NoesisError, match="loader is empty"):
        interp.coder_quality(model, [], perfect, site=site)
