"""Keeping what was asked for, by sites, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import noesis
from helpers.families import NAMES, family, inputs, seen_by
from helpers.language_models import build, prompts
from noesis import interp
from noesis.interp.sites import HEADED, LAYERED

PATTERNS = (
    "llama",
    "gpt2",
    "gemma2",
    "qwen3",
    "olmo2",
    "cohere",
    "granite",
    "mixtral",
    "gptoss",
    "neox",
    "opt",
    "bert",
)


def whatever_works(found: interp.Anatomy) -> list[str]:
    layered = [
        f"{site}.{layer}" for layer, block in enumerate(found.blocks) for site in LAYERED if site not in block.refused
    ]
    return layered + [site for site in ("embed", "logits") if site not in found.refused]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_bit_for_bit_those_of_the_bare_model(name: str) -> None:
    model = family(name)
    with torch.no_grad():
        bare = model(**inputs(name)).logits
    found = interp.anatomy(model, **inputs(name))
    run = interp.run(model, inputs(name), keep=whatever_works(found), anatomy=found)
    assert torch.equal(run.logits, bare)
    assert torch.equal(run["logits"], bare)
    assert list(run.fired) == whatever_works(found)
    assert set(run.fired.values()) == {1}
    with torch.no_grad():
        assert torch.equal(model(**inputs(name)).logits, bare)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    assert "get_interface" not in vars(registry)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_those_of_eager_attention(name: str, implementation: str) -> None:
    """GQA, softcap, sliding windows, sinks, masks, rotary embeddings: against what eager attention says it used."""
    if implementation == "sdpa" and name in ("gemma2", "gptoss"):
        pytest.skip("has a softcap or sinks, which sdpa has not")
    model = family(name, attn_implementation=implementation)
    kept = interp.run(model, inputs(name), keep="pattern")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs(name), output_attentions=True).attentions
    assert len(attentions) == len(kept.fired)
    rows = seen_by(name)
    for layer, eager in enumerate(attentions):
        ours = kept["pattern", layer]
        assert ours.dtype == torch.float32
        assert (ours - eager).transpose(1, 2)[rows].abs().max() < 1e-6
        assert torch.allclose(ours.sum(-1).transpose(1, 2)[rows], torch.ones(()), atol=1e-5) or name == "gptoss"


def test_position_biases_of_t5_are_in_its_patterns() -> None:
    model = family("t5")
    run = interp.run(model, inputs("t5"), keep="pattern.0-1")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(**inputs("t5"), output_attentions=True).encoder_attentions
    assert all((run["pattern", layer] - eager[layer]).abs().max() < 1e-6 for layer in range(2))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_what_the_parts_of_attention_are(name: str) -> None:
    model = family(name)
    run = interp.run(model, inputs(name), keep=HEADED)
    block = run.anatomy.blocks[1]
    q, k, v, z, pattern, result = (run[site, 1] for site in HEADED)
    assert q.shape == z.shape == (2, 7, 4, 8)
    assert k.shape == v.shape == (2, 7, block.kv_heads, 8)
    assert pattern.shape == (2, 4, 7, 7)
    assert result.shape == (2, 7, 4, 32)
    values = v.repeat_interleave(4 // block.kv_heads, dim=2)
    assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", pattern, values), z, atol=1e-5)
    projection = model.get_submodule(block.out)
    with torch.no_grad():
        whole, bias = projection(z.flatten(2)), projection(torch.zeros(1, 1, 32))
    assert torch.allclose(result.sum(2) + bias, whole, atol=1e-6)


def test_the_stream_of_trained_weights(data: Path) -> None:
    """stories260k: the parts add up from the embedding to the last block, and the logits follow."""
    model = transformers.AutoModelForCausalLM.from_pretrained(data / "stories260k").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(data / "stories260k")
    given = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt")
    run = interp.run(model, given, keep=["embed", "attn", "mlp", "resid_post", "pattern"])
    assert (len(run.anatomy.blocks), run.anatomy.blocks[0].heads, run.anatomy.blocks[0].kv_heads) == (5, 8, 4)
    total = run["embed"] + sum(run[part, layer] for part in ("attn", "mlp") for layer in range(5))
    assert torch.allclose(total, run["resid_post", 4], atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(model.lm_head(model.model.norm(total)), run.logits, atol=1e-3)
    # The known heads of these weights: two look at the token before.
    previous = torch.stack([run["pattern", layer].diagonal(-1, 2, 3).mean((0, 2)) for layer in range(5)])
    assert {divmod(int(place), 8) for place in previous.flatten().topk(2).indices} == {(3, 6), (1, 3)}


# What is asked for.


def test_sites_by_head_and_position_are_parts_of_the_whole() -> None:
    model, ids = build("llama"), prompts()
    keep = [
        "z.1",
        "z.1.2@-1",
        "k.1",
        "k.1.*@3",
        "pattern.1",
        "pattern.1.3@5",
        "resid_mid.0-2@0-1",
        "resid_mid",
        "result.0.1",
    ]
    run = interp.run(model, {"input_ids": ids}, keep=keep)
    assert torch.equal(run["z.1.2@-1"], run["z", 1][:, -1, 2])
    assert torch.equal(run["k.1.1@3"], run["k", 1][:, 3, 1])
    assert torch.equal(run["pattern.1.3@5"], run["pattern", 1][:, 3, 5])
    assert all(torch.equal(run[f"resid_mid.2@{place}"], run["resid_mid", 2][:, place]) for place in range(2))
    assert len(run.fired) == 1 + 1 + 1 + 2 + 1 + 1 + 6 + 3 + 1


def test_names_of_transformer_lens_mean_the_same() -> None:
    model, ids = build("gpt2"), prompts()
    theirs = ["hook_embed", *(f"blocks.*.{name}" for name in ("hook_resid_pre", "attn.hook_z", "mlp.hook_post"))]
    run = interp.run(model, ids, keep=[*theirs, "blocks.0-1.hook_attn_out", "blocks.2.attn.hook_pattern"])
    ours = interp.run(model, ids, keep=["embed", "resid_pre", "z", "neurons", "attn.0-1", "pattern.2"])
    assert run.fired == ours.fired
    assert all(torch.equal(run[site], ours[site]) for site in run.fired)
    assert torch.equal(run["blocks.2.attn.hook_pattern"], ours["pattern", 2])


def test_any_module_by_its_name_costs_no_anatomy() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).train()
    run = interp.run(model, torch.ones(3, 4), keep=["0", "module:1"])
    assert run.anatomy is None
    assert torch.equal(run["1"], run["0"].relu())


def test_what_is_kept_is_a_copy_and_saves_as_activations(tmp_path: Path) -> None:
    run = interp.run(build("llama"), prompts(), keep=["z.0", "pattern.0", "logits"])
    loaded = noesis.Activations.load(run.activations.save(tmp_path / "run.safetensors"))
    assert all(torch.equal(loaded[site][0], run[site]) for site in run.fired)
    kept = run["logits"].clone()
    run.logits.zero_()
    assert torch.equal(run["logits"], kept)


def test_in_place_changes_do_not_reach_what_was_kept() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    model = nn.Sequential(nn.Linear(2, 2), InPlace())
    run = interp.run(model, torch.ones(1, 2), keep=["0", "1"])
    assert torch.equal(run["0"] * 2, run["1"])


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("z.9", "layers among 0 to 2"),
        ("pattern.0.7", "heads among 0 to 3"),
        ("k.0.3", "heads among 0 to 1"),
        ("zz.1", "neither a site nor a module"),
        ("resid_pst.1", "Did you mean 'resid_post'"),
        ("model.layers.0.mpl", "'model.layers.0.mlp'"),
        ("blocks.0.attn.hook_zz", "'blocks.0.attn.hook_z'"),
        ("resid_pre.0.1", "a head"),
        ("embed.0", "of no layer"),
        ("z.0@99", "2x7x4x8"),
        ("q.2-1", "from the smaller to the larger"),
        ("z.0@3-1", "from the smaller to the larger"),
        (3, "sites as strings"),
        ([None], "sites as strings"),
    ],
)
def test_a_site_that_is_not_there_is_an_error_that_helps(keep: Any, said: str) -> None:
    with pytest.raises(noesis.NoesisError, match=said):
        interp.run(build("llama"), prompts(), keep=keep)


def test_a_module_that_does_not_run_is_an_error() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Half()
    with pytest.raises(noesis.NoesisError, match="module:idle did not fire"):
        interp.run(model, torch.ones(1, 2), keep=["used", "idle"])


def test_memory_is_bounded() -> None:
    with pytest.raises(MemoryError, match="max_bytes=2000"):
        interp.run(build("llama"), prompts(), keep="resid_post", max_bytes=2000)


def test_an_anatomy_of_another_model_is_refused() -> None:
    with pytest.raises(noesis.NoesisError, match="of another model"):
        interp.run(build("gpt2"), prompts(), keep="z", anatomy=interp.anatomy(build("llama"), prompts()))


def test_a_cache_that_is_given_is_used_once_and_its_keys_are_in_the_pattern() -> None:
    model, ids = build("llama"), prompts()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        model(input_ids=ids[:, :5], past_key_values=cache)
    run = interp.run(model, {"input_ids": ids[:, 5:], "past_key_values": cache}, keep=["pattern", "k", "resid_mid"])
    assert cache.get_seq_length() == 7
    assert run["pattern", 1].shape == (2, 4, 2, 7)
    assert run["k", 1].shape == (2, 7, 2, 8)
    assert torch.allclose(run.logits, whole[:, 5:], atol=1e-5)


def test_padding_is_kept_as_it_is_computed() -> None:
    model, given = build("llama"), inputs("llama")
    run = interp.run(model, given, keep=["resid_post.2", "pattern.0"])
    with torch.no_grad():
        states = model.model(**given, output_hidden_states=True).hidden_states
    assert torch.isfinite(run["resid_post", 2][1, :2]).all()
    assert torch.equal(model.model.norm(run["resid_post", 2]), states[-1])
    assert (run["pattern", 0][1, :, 2:, :2] == 0).all()  # no token looks at it


# The interface is global to the process; what is watched is not.


def test_what_other_threads_run_meanwhile_is_not_kept() -> None:
    model, ids = build("llama"), prompts()
    elsewhere = []

    def once(*_: Any) -> None:
        """Inside the model's forward, another thread runs it too."""
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: elsewhere.append(model(prompts(seed=1))))
            thread.start()
            thread.join()

    alone = interp.run(model, ids, keep=["z", "pattern", "resid_mid", "resid_post"])
    handle = model.model.layers[1].self_attn.register_forward_pre_hook(once)
    beside = interp.run(model, ids, keep=list(alone.fired))
    handle.remove()
    assert len(elsewhere) == 2  # in the run of the anatomy, and in that of the sites
    assert beside.fired == alone.fired
    assert all(torch.equal(beside[site], alone[site]) for site in alone.fired)


def test_a_run_within_a_run_keeps_its_own() -> None:
    model, other, ids = build("llama"), build("gpt2"), prompts()
    inner = []
    found, theirs = interp.anatomy(model, ids), interp.anatomy(other, ids)
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda *_: inner.append(interp.run(other, ids, keep="z", anatomy=theirs))
    )
    run = interp.run(model, ids, keep="z", anatomy=found)
    handle.remove()
    assert run.fired == inner[0].fired == {"z.0": 1, "z.1": 1, "z.2": 1}
    assert torch.equal(inner[0]["z", 2], interp.run(other, ids, keep="z", anatomy=theirs)["z", 2])


def test_a_run_that_fails_leaves_nothing_behind() -> None:
    model = build("llama")
    found = interp.anatomy(model, prompts())
    with pytest.raises(IndexError):
        interp.run(model, torch.full((1, 3), 1000), keep=["z", "result"], anatomy=found)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "get_interface" not in vars(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)


def test_a_pattern_that_does_not_give_what_the_model_computed_is_refused() -> None:
    """Attention that is not what its arguments say, under the name of one that is known."""
    registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    known = registry["sdpa"]

    def odd(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return known(module, 1.1 * query, *args, **kwargs)

    model, found = build("llama"), interp.anatomy(build("llama"), prompts())
    registry["sdpa"] = odd
    try:
        refused = interp.anatomy(model, prompts()).blocks[0].refused
        assert "p v differs from z" in refused["pattern"]
        assert set(refused) == {"pattern"}
        with pytest.raises(noesis.NoesisError, match="p v differs from z"):
            interp.run(model, prompts(), keep="pattern.1", anatomy=found)
    finally:
        del registry["sdpa"]


def test_attention_of_an_unknown_name_has_heads_and_no_pattern() -> None:
    registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    registry["mine"] = registry["sdpa"]
    try:
        model = build("llama", attn_implementation="mine")
        found = interp.anatomy(model, prompts())
        assert all("'mine'" in block.refused["pattern"] for block in found.blocks)
        assert interp.run(model, prompts(), keep=["z", "result"], anatomy=found).fired
    finally:
        del registry["mine"]


def test_without_the_interface_heads_are_seen_by_the_functions_that_attention_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A transformers that has renamed it."""
    model = build("llama")
    by_interface = interp.run(model, prompts(), keep=["q", "v", "z", "pattern"])
    monkeypatch.delattr(transformers.modeling_utils, "ALL_ATTENTION_FUNCTIONS")
    found = interp.anatomy(model, prompts())
    assert all(block.implementation == "torch sdpa" and not block.refused for block in found.blocks)
    run = interp.run(model, prompts(), keep=["q", "v", "z", "pattern"], anatomy=found)
    assert torch.equal(run.logits, by_interface.logits)
    assert all(torch.allclose(run[site], by_interface[site], atol=1e-6) for site in ("q.1", "z.1", "pattern.1"))


@pytest.mark.parametrize("instead", [None, 7], ids=["missing", "other"])
@pytest.mark.parametrize("name", ["ALL_ATTENTION_FUNCTIONS", "get_interface"])
def test_without_these_names_attention_is_seen_by_functions(
    monkeypatch: pytest.MonkeyPatch, name: str, instead: Any
) -> None:
    """What a transformers without these names does: `internals.attention` asks for them."""
    from noesis.internals import attention

    asked: list[str] = []

    def attribute(holder: Any, wanted: str) -> Any:
        asked.append(wanted)
        return instead if wanted == name else getattr(holder, wanted, None)

    monkeypatch.setattr(attention, "attribute", attribute)
    model, given = family("llama"), inputs("llama")
    found = interp.anatomy(model, **given)
    assert name in asked
    assert all(not block.refused and block.implementation == "torch sdpa" for block in found.blocks)
    with torch.no_grad():
        expected = model(**given).logits
    run = interp.run(model, given, keep=["resid_post.0", "mlp.0", "pattern.0"])
    assert torch.equal(run.logits, expected)
    assert set(run.fired.values()) == {1}
