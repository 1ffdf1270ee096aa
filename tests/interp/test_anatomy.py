"""What a model is made of: found by one run, verified, refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import noesis
from helpers.families import NAMES, family, inputs
from helpers.language_models import build, prompts
from noesis import interp
from noesis.interp.attention import PATTERN
from noesis.interp.identifying import BLOCK, HEADS

#: What is known of the families from their papers and code: the block's parts in the residual sum.
PARTS = {
    "llama": ("self_attn", "mlp", "post_attention_layernorm", "mlp.down_proj", "self_attn.o_proj"),
    "gpt2": ("attn", "mlp", "ln_2", "mlp.c_proj", "attn.c_proj"),
    "qwen3": ("self_attn", "mlp", "post_attention_layernorm", "mlp.down_proj", "self_attn.o_proj"),
    "gemma2": (
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
        "mlp.down_proj",
        "self_attn.o_proj",
    ),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", None, "mlp.down_proj", "self_attn.o_proj"),
    "cohere": ("self_attn", "mlp", None, "mlp.down_proj", "self_attn.o_proj"),
    "neox": ("post_attention_dropout", "post_mlp_dropout", None, "mlp.dense_4h_to_h", "attention.dense"),
    "opt": ("self_attn", "fc2", "final_layer_norm", "fc2", "self_attn.out_proj"),
    "vit": ("attention", "mlp", "layernorm_after", "mlp.fc2", "attention.o_proj"),
    "mixtral": ("self_attn", "mlp", "post_attention_layernorm", None, "self_attn.o_proj"),
}
HEADED = ("llama", "gpt2", "gemma2", "qwen3", "olmo2", "cohere", "granite", "mixtral", "gptoss", "neox", "opt", "bert")


@pytest.mark.parametrize("name", PARTS)
def test_the_parts_of_a_block(name: str) -> None:
    found = interp.anatomy(family(name), **inputs(name))
    for block in found.blocks:
        parts = (block.attn, block.mlp, block.mid, block.down, block.out)
        short = tuple(part and part.removeprefix(f"{block.name}.") for part in parts)
        attn, mlp, mid, down, out = PARTS[name]
        if name == "olmo2":  # its mlp reads the stream without a norm
            mid = short[2]
            assert mid is not None
            assert mid.startswith("mlp.")
        assert short == (attn, mlp, mid, down, out)
        check = block.check(BLOCK)
        assert check is not None
        assert check.error < 5e-7


@pytest.mark.parametrize("name", HEADED)
def test_heads_come_from_the_run_and_add_up(name: str) -> None:
    model = family(name)
    found = interp.anatomy(model, **inputs(name))
    config = model.config
    for block in found.blocks:
        assert block.heads == config.num_attention_heads == 4
        assert block.kv_heads == (getattr(config, "num_key_value_heads", None) or 4)
        for identity in (HEADS, PATTERN):
            check = block.check(identity)
            assert check is not None
            assert check.error < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_what_is_found_is_true_of_other_inputs(name: str) -> None:
    """What was found on one batch adds up on another, for every family: nothing was fitted."""
    model = family(name)
    found = interp.anatomy(model, **inputs(name))
    other = inputs(name)
    other = {
        key: value.flip(1) if value.dtype == torch.int64 and key != "attention_mask" else value
        for key, value in other.items()
    }
    layers = [number for number, block in enumerate(found.blocks) if {"attn", "mlp"}.isdisjoint(block.refused)]
    keep = [f"{part}.{layer}" for layer in layers for part in ("resid_pre", "resid_post", "attn", "mlp")]
    keep += [f"cross_attn.{layer}" for layer in layers if found.blocks[layer].cross is not None]
    additive = 0 if name in ("bert", "granite") else len(found.blocks)
    assert layers == list(range(additive))
    run = interp.run(model, other, keep=keep, anatomy=found)
    for layer in layers:
        pre, post = run["resid_pre", layer], run["resid_post", layer]
        total = pre + run["attn", layer].reshape(pre.shape) + run["mlp", layer].reshape(pre.shape)
        total = total + run["cross_attn", layer] if found.blocks[layer].cross is not None else total
        assert (total - post).abs().max() <= 2e-6 * post.abs().max()
        assert run["attn", layer].abs().max() > 1e-4
        assert run["mlp", layer].abs().max() > 1e-5


def test_the_ends_of_a_model() -> None:
    found = interp.anatomy(build("llama"), input_ids=prompts())
    assert (found.embed, found.norm, found.unembed) == ("model.embed_tokens", "model.norm", "lm_head")
    assert [check.error for check in found.checks] == [0.0]


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_logits_that_are_capped_or_scaled_are_told(name: str) -> None:
    found = interp.anatomy(
        family(name, **({"final_logit_softcapping": 0.1} if name == "gemma2" else {})), **inputs(name)
    )
    assert not found.checks[0].holds
    assert "softcap or a scale" in str(found.refused)
    assert "fails" in repr(found)


@pytest.mark.parametrize("name", ["bert", "granite"])
def test_a_block_that_does_not_add_up_is_refused_and_the_rest_works(name: str) -> None:
    model = family(name)
    found = interp.anatomy(model, **inputs(name))
    for block in found.blocks:
        assert {"resid_mid", "attn", "mlp", "neurons"} == set(block.refused)
        assert "does not hold" in block.refused["attn"]
    assert "refused: resid_mid, attn, mlp, neurons of 0-" in repr(found)
    with pytest.raises(noesis.NoesisError, match="attn.0 is refused: block = input"):
        interp.run(model, inputs(name), keep="attn")
    assert interp.run(model, inputs(name), keep=["z.0", "pattern.1", "resid_post"], anatomy=found).fired


def test_a_block_that_attends_three_times_has_no_heads() -> None:
    class Third(Handmade):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.second(self.norm(x)) + self.third(self.norm(x)))

    model = Stack(1.0, nn.Linear(16, 16)).eval()
    for block in model.h:
        block.__class__, block.second, block.third = Third, Attention(), Attention()
    found = interp.anatomy(model, torch.arange(8)[None])
    assert all("attends 3 times" in block.refused[site] for block in found.blocks for site in ("z", "pattern", "attn"))


@pytest.mark.parametrize("name", ["mixtral", "gptoss"])
def test_experts_in_one_parameter_have_no_neurons(name: str) -> None:
    found = interp.anatomy(family(name), **inputs(name))
    assert all(list(block.refused) == ["neurons"] for block in found.blocks)
    assert "experts in parameters of three dimensions (mlp.experts.gate_up_proj, mlp.experts.down_proj" in repr(found)


class Experts(nn.Module):
    """A mixture of experts that are modules: each token goes to one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out, chosen = torch.zeros_like(x), self.gate(x).argmax(-1)
        for number, expert in enumerate(self.experts):
            where = chosen == number
            out[where] = expert(x[where])
        return out


def test_experts_that_are_modules_have_no_neurons_of_tokens_but_are_kept_by_name() -> None:
    model, ids = Stack(1.0, Experts()).eval(), torch.arange(8)[None]
    model.h[1].mlp = Experts()
    found = interp.anatomy(model, ids)
    assert all(list(block.refused) == ["neurons"] for block in found.blocks)
    assert "each is given the tokens of its own route (mlp.experts.0.0, mlp.experts.0.2)" in repr(found)
    run = interp.run(model, ids, keep=["h.0.mlp.experts.0.1"], anatomy=found)
    assert run["h.0.mlp.experts.0.1"].shape[1] == 8


class Attention(nn.Module):
    """As people write it: no interface of a library."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


class Handmade(nn.Module):
    """A block whose parts are added up with a factor."""

    def __init__(self, factor: float, shared: nn.Module) -> None:
        super().__init__()
        self.attn, self.norm, self.norm2, self.factor = Attention(), nn.LayerNorm(16), nn.LayerNorm(16), factor
        self.mlp = shared

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.factor * self.mlp(self.norm2(x))


class Stack(nn.Module):
    def __init__(self, factor: float, mlp: nn.Module) -> None:
        super().__init__()
        self.wte, self.norm, self.head = nn.Embedding(9, 16), nn.LayerNorm(16), nn.Linear(16, 9)
        self.h = nn.ModuleList([Handmade(factor, mlp), Handmade(factor, mlp)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return self.head(self.norm(x))


def test_a_model_of_no_library() -> None:
    model, ids = (
        Stack(1.0, nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))).eval(),
        torch.arange(8)[None],
    )
    found = interp.anatomy(model, ids)
    assert [(block.attn, block.mid) for block in found.blocks] == [("h.0.attn", "h.0.norm2"), ("h.1.attn", "h.1.norm2")]
    assert (found.norm, found.unembed) == ("norm", "head")
    assert all(not block.refused and block.implementation == "torch sdpa" for block in found.blocks)
    # The two blocks share their mlp; what is kept of each is what it did there.
    run = interp.run(model, ids, keep=["mlp", "resid_mid", "resid_post"], anatomy=found)
    assert run.fired["mlp.0"] == run.fired["mlp.1"] == 1
    for layer in range(2):
        assert torch.allclose(run["resid_mid", layer] + run["mlp", layer], run["resid_post", layer], atol=1e-6)


class LinearAttention(nn.Module):
    """Attention without a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        z = q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)
        return self.out(z.transpose(1, 2).flatten(2))


def test_attention_in_no_way_that_is_known_has_no_heads() -> None:
    model = Stack(1.0, nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))).eval()
    for block in model.h:
        block.attn = LinearAttention()
    found = interp.anatomy(model, torch.arange(8)[None])
    for block in found.blocks:
        assert (block.attn, block.mid) == (f"{block.name}.attn", f"{block.name}.norm2")
        assert set(block.refused) == {"q", "k", "v", "z", "pattern", "result"}


def test_a_model_that_takes_another_way_than_in_its_anatomy_is_noticed() -> None:
    model, ids = (
        Stack(1.0, nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))).eval(),
        torch.arange(8)[None],
    )
    found = interp.anatomy(model, ids)
    model.h[1].attn.register_forward_pre_hook(lambda _, args: (model.h[1].norm2(*args), None)[1])
    assert interp.run(model, ids, keep="resid_mid.0", anatomy=found).fired
    with pytest.raises(noesis.NoesisError, match="resid_mid.1 fired 2 times in 1 runs"):
        interp.run(model, ids, keep="resid_mid", anatomy=found)


def test_lora_is_part_of_the_output_projection() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["o_proj", "down_proj", "q_proj"], init_lora_weights=False)
    model, ids = peft.get_peft_model(build("llama"), config).eval(), prompts()
    found = interp.anatomy(model, input_ids=ids)
    run = interp.run(model, {"input_ids": ids}, keep=["result", "attn"], anatomy=found)
    for layer, block in enumerate(found.blocks):
        assert block.out == f"{block.name}.self_attn.o_proj"
        assert torch.allclose(run["result", layer].sum(2), run["attn", layer], atol=1e-6)


class Adapted(nn.Module):
    """A low-rank adapter of one's own, around a layer."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original, self.down, self.up = original, nn.Linear(32, 2), nn.Linear(2, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x) + self.up(self.down(x))


def test_two_modules_that_read_z_are_not_taken_for_one() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = Adapted(layer.self_attn.o_proj)
    found = interp.anatomy(model, input_ids=prompts())
    assert all(list(block.refused) == ["result"] for block in found.blocks)
    assert "several modules read z: self_attn.o_proj.original, self_attn.o_proj.down" in repr(found)


def test_a_small_factor_is_not_overlooked() -> None:
    mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    found = interp.anatomy(Stack(1.0001, mlp).eval(), torch.arange(8)[None])
    assert all("does not hold" in block.refused["mlp"] for block in found.blocks)


def test_half_precision_is_verified_within_its_rounding() -> None:
    """A factor of 1.0001 is below it: float32 tells, bfloat16 cannot, and its bound says so."""
    found = interp.anatomy(build("llama").bfloat16(), input_ids=prompts())
    assert all(not block.refused and all(check.holds for check in block.checks) for block in found.blocks)
    mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    block = interp.anatomy(Stack(1.0001, mlp).eval().bfloat16(), torch.arange(8)[None]).blocks[0]
    check = block.check(BLOCK)
    assert check is not None
    assert check.bound > 0.01


def test_a_cache_that_is_given_is_left_alone() -> None:
    model, ids = build("llama"), prompts()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    interp.anatomy(model, input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1]


def test_no_random_number_is_drawn_from_the_users_generator() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), Noisy(), nn.Linear(4, 4)) for _ in range(2))).eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    interp.anatomy(model, torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), before)


class Odd(nn.Module):
    """Two blocks that hand each other something else than dense floating tensors."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([OddBlock(make), OddBlock(make)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class OddBlock(nn.Module):
    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.make = nn.Linear(4, 4), nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Tensor:
        dense = x.to_dense() if x.is_sparse else x
        return self.make(self.b(self.a(dense.float())))


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.long], ids=["sparse", "integers"])
def test_blocks_without_a_hidden_state_are_refused(make: Callable[[Tensor], Tensor]) -> None:
    first, second = interp.anatomy(Odd(make).eval(), torch.ones(2, 4)).blocks
    assert "resid_pre" not in first.refused
    assert {"resid_pre", "resid_post", "attn", "z"} <= set(second.refused)


def test_nothing_is_verified_on_no_numbers() -> None:
    mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    found = interp.anatomy(Stack(1.0, mlp).eval(), torch.arange(8)[None][:0])
    assert all("mlp" in block.refused for block in found.blocks)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_a_wrapped_model_has_the_same_anatomy() -> None:
    model = build("llama")
    bare = repr(interp.anatomy(model, input_ids=prompts()))
    wrapped = noesis.wrap(model)
    assert repr(interp.anatomy(wrapped, input_ids=prompts())) == bare
    interp.run(wrapped, prompts(), keep=["z.0", "result.1", "resid_post"])
    assert wrapped.trace().steps.tolist() == [0]  # the run, and not what the anatomy took


def bad(what: str) -> Any:
    model = build("llama")
    if what == "compiled":
        return lambda: interp.anatomy(torch.compile(model, backend="eager"), input_ids=prompts())
    if what == "compiled block":
        model.model.layers[1].compile(backend="eager")
        return lambda: interp.run(model, prompts(), keep="resid_post")
    if what == "training":
        return lambda: interp.anatomy(model.train(), input_ids=prompts())
    if what == "inputs":
        return lambda: interp.anatomy(model)
    if what == "pipeline":
        from helpers.pipelines import sd15

        return lambda: interp.anatomy(sd15(), prompts())
    return lambda: interp.anatomy("model", input_ids=prompts())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("training", r"Call model\.eval"),
        ("inputs", "no inputs"),
        ("model", "nn.Module"),
        ("pipeline", "Give its denoiser"),
        ("compiled", "as it was before"),
        ("compiled block", "as it was before"),
    ],
)
def test_what_cannot_be_looked_into_says_why(what: str, said: str) -> None:
    with pytest.raises(noesis.NoesisError, match=said):
        bad(what)()
