"""Attention that goes through no interface: code of one's own, torch's layers, diffusers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import noesis
from helpers.families import family, inputs
from noesis import interp
from noesis.interp.attention import PATTERN
from noesis.interp.identifying import HEADS
from zoo import models as zoo
from zoo.entry import call

WAYS = ("sdpa", "sdpa of three dimensions", "matmul", "bmm", "einsum", "lucid", "modules", "baddbmm")
HEADED = ("q", "k", "v", "z", "pattern", "result")


class Attention(nn.Module):
    """Causal attention with 2 heads, in one of the ways that people write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv, self.out, self.way = nn.Linear(16, 48), nn.Linear(16, 16), way
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (part.view(batch, tokens, 2, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        z = getattr(self, self.way.split()[0])(q, k, v)
        return self.out(z.reshape(batch, 2, tokens, 8).transpose(1, 2).reshape(batch, tokens, 16))

    def mask(self, q: Tensor) -> Tensor:
        return torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.way != "sdpa":
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def matmul(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) * 8**-0.5
        scores = scores.masked_fill(self.mask(q), float("-inf"))
        return functional.dropout(functional.softmax(scores, dim=-1), 0.1, self.training) @ v

    def bmm(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        scores = torch.bmm(q, k.mT)
        scores /= 8**0.5
        scores.masked_fill_(self.mask(q), torch.finfo(scores.dtype).min)
        return torch.bmm(scores.float().softmax(-1).type_as(q), v)

    def baddbmm(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        bias = torch.zeros(1, 1, 1).expand(q.shape[0], q.shape[1], q.shape[1])
        scores = bias.baddbmm(batch1=q, batch2=k.mT, beta=1.0, alpha=8**-0.5).view(-1, 2, *bias.shape[1:])
        scores = scores.masked_fill(self.mask(q), -1e9)
        return torch.bmm(scores.softmax(-1).view(-1, *bias.shape[1:]), v)

    def einsum(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q * 8**-0.5, k) + self.mask(q.transpose(1, 2)) * -1e9
        return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=-1), v).transpose(1, 2)

    def lucid(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 8**-0.5
        scores = scores.masked_fill(self.mask(q), -torch.finfo(scores.dtype).max)
        return torch.einsum("b h j d, b h i j -> b h i d", v, scores.softmax(dim=-1, dtype=torch.float32))

    def modules(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.mT) / 8**0.5
        scores = torch.where(self.mask(q), float("-inf"), scores)
        return torch.matmul(self.dropout(self.softmax(scores)), v)


class Block(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.attn, self.norm, self.norm2 = Attention(way), nn.LayerNorm(16), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.wte, self.norm, self.head = nn.Embedding(9, 16), nn.LayerNorm(16), nn.Linear(16, 9)
        self.h = nn.ModuleList([Block(way), Block(way)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


IDS = torch.stack([torch.arange(8) % 9, torch.arange(3, 11) % 9])


def model(way: str) -> Model:
    torch.manual_seed(0)
    return Model(way).eval()


@pytest.mark.parametrize("way", WAYS)
def test_attention_of_ones_own_in_each_way_it_is_written(way: str) -> None:
    """All ways compute the same with the same weights: what is kept and what edits do has to be the same too."""
    ours, plain = model(way), model("sdpa")
    with torch.no_grad():
        bare = ours(IDS)
    found, known = interp.anatomy(ours, IDS), interp.anatomy(plain, IDS)
    for block in found.blocks:
        assert not block.refused
        assert (block.attention, block.out) == (f"{block.name}.attn", f"{block.name}.attn.out")
        assert (block.heads, block.kv_heads, block.width) == (2, 2, 8)
        assert block.implementation == ("torch sdpa" if "sdpa" in way else "softmax")
        assert all(check is not None and check.error < 1e-6 for check in map(block.check, (HEADS, PATTERN)))
    run = interp.run(ours, IDS, keep=HEADED, anatomy=found)
    assert torch.equal(run.output, bare)
    theirs = interp.run(plain, IDS, keep=HEADED, anatomy=known)
    scale = 8**-0.5 if way == "einsum" else 1  # its queries are scaled before they meet the keys
    for site in run.fired:
        factor = scale if site.startswith("q") else 1
        torch.testing.assert_close(run[site], factor * theirs[site], atol=1e-6, rtol=1e-5)
    for site in HEADED:
        edits = [interp.Scale(f"{site}.1.0", 3.0)]
        changed = interp.run(ours, IDS, edits=edits, keep=["pattern.1", f"{site}.1.0"], anatomy=found)
        truth = interp.run(plain, IDS, edits=edits, keep=["pattern.1", f"{site}.1.0"], anatomy=known)
        assert not torch.allclose(changed.output, bare, atol=1e-4)
        torch.testing.assert_close(changed.output, truth.output, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(changed["pattern.1"], truth["pattern.1"], atol=1e-6, rtol=1e-5)
    assert torch.equal(ours(IDS), bare)
    assert {type(module).__name__ for module in ours.modules()} == {type(module).__name__ for module in plain.modules()}


def test_what_a_scaled_query_does_by_hand() -> None:
    ours = model("matmul")
    truth = model("matmul")
    with torch.no_grad():
        truth.h[1].attn.qkv.weight[:8] *= 3
        truth.h[1].attn.qkv.bias[:8] *= 3
        expected = truth(IDS)
    run = interp.run(ours, IDS, edits=[interp.Scale("q.1.0", 3.0)])
    assert torch.allclose(run.output, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["sdpa", "bmm", "einsum"])
def test_an_edit_is_in_a_compiled_model_too(way: str, fresh_dynamo: None) -> None:
    ours = model(way)
    found = interp.anatomy(ours, IDS)
    fast = torch.compile(ours, backend="eager", fullgraph=True)
    edits = [interp.Scale("z.1.0", 2.0), interp.Scale("q.0.1", 2.0), interp.Scale("pattern.1.1", 0.5)]
    with torch.no_grad():
        bare = fast(IDS)
        with interp.editing(fast, *edits, anatomy=found) as ed:
            changed = [fast(IDS) for _ in range(2)]
        assert torch.equal(fast(IDS), bare)
    expected = interp.run(ours, IDS, edits=edits, anatomy=found).output
    assert all(torch.allclose(out, expected, atol=1e-6) for out in changed)
    assert set(ed.fired.values()) == {2}


class Mixed(Attention):
    """Scores that are the sum of two products, as in DeBERTa: its queries meet two kinds of keys."""

    def matmul(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) + (q @ v.transpose(-2, -1)).roll(1, -1)
        return scores.softmax(-1) @ v


def test_queries_of_two_products_are_not_told() -> None:
    ours = model("matmul")
    for block in ours.h:
        block.attn = Mixed("matmul").eval()
    found = interp.anatomy(ours, IDS)
    assert all(set(block.refused) == {"q", "k"} for block in found.blocks)
    assert "not one product of queries and keys" in repr(found)
    assert torch.equal(interp.run(ours, IDS, keep=["v", "z", "pattern"], anatomy=found).output, ours(IDS))


class Merged(Attention):
    """Heads before rows in one dimension, as the first Transformers had them."""

    def bmm(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z = super().bmm(*(part.transpose(0, 1) for part in (q, k, v)))
        return z.unflatten(0, (2, -1)).transpose(0, 1)


def test_heads_that_only_shapes_tell_have_to_be_confirmed_by_the_output_projection() -> None:
    ours = model("bmm")
    for block in ours.h:
        block.attn = Merged("bmm").eval()
    ids = torch.cat([IDS, IDS[:1] + 1])
    found = interp.anatomy(ours, ids % 9)
    assert all(set(block.refused) == set(HEADED) for block in found.blocks)
    assert "which only shapes tell apart" in repr(found)


def test_a_softmax_over_something_else_is_no_attention() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x).softmax(-1) @ self.experts

    ours = model("sdpa")
    for block in ours.h:
        block.mlp = Gated()
    found = interp.anatomy(ours, IDS)
    assert all(set(block.refused) == {"neurons"} for block in found.blocks)


class OverChannels(Attention):
    """A pattern of channels, as in XCiT: as many as there are, whatever the tokens."""

    def matmul(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.transpose(-2, -1) @ k
        return (scores.softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1)


def test_a_pattern_of_channels_is_refused() -> None:
    ours = model("matmul")
    for block in ours.h:
        block.attn = OverChannels("matmul").eval()
    found = interp.anatomy(ours, IDS[:, :5])
    assert all(set(block.refused) == set(HEADED) for block in found.blocks)
    assert "something else than tokens" in repr(found)


def test_other_threads_are_edited_and_not_kept() -> None:
    """The mode is entered where the module is called, in whatever thread that is."""
    ours = model("matmul")
    found = interp.anatomy(ours, IDS)
    edit = interp.Scale("z.1", 2.0)
    expected = interp.run(ours, IDS, edits=[edit], anatomy=found).output
    outs: list[Tensor] = []
    with torch.no_grad(), interp.editing(ours, edit, anatomy=found):
        thread = threading.Thread(target=lambda: outs.append(ours(IDS).detach()))
        thread.start()
        thread.join()
    assert torch.allclose(outs[0], expected, atol=1e-6)


def test_gradients_of_an_edited_model() -> None:
    ours = model("matmul")
    found = interp.anatomy(ours, IDS)
    with interp.editing(ours, interp.Zero("z.1.0"), anatomy=found):
        ours(IDS).sum().backward()
    weight = ours.h[1].attn.qkv.weight.grad
    assert weight is not None
    assert weight[32:40].abs().max() == 0
    assert weight[40:].abs().max() > 0


# ---------------------------------------------------------------- torch's own layers


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"batch_first": False}], ids=str)
def test_heads_of_torchs_encoder(options: dict[str, Any]) -> None:
    ours, x = encoder(**options), torch.randn(5, 5, 16)[:2]
    if options.get("batch_first") is False:
        x = x.transpose(0, 1)
    found = interp.anatomy(ours, x)
    assert all(block.heads == 4 and {"q", "k", "v", "z", "pattern"}.isdisjoint(block.refused) for block in found.blocks)
    run = interp.run(ours, x, keep=["pattern", "z.0"], anatomy=found)
    attention = ours.layers[0].self_attn
    given = ours.layers[0].norm1(x) if options.get("norm_first") else x
    with torch.no_grad():
        _, weights = attention(given, given, given, average_attn_weights=False)
    assert torch.allclose(run["pattern.0"], weights, atol=1e-6)
    changed = interp.run(ours, x, edits=[interp.Zero("z.1")], keep="z.1", anatomy=found)
    assert changed["z.1"].abs().max() == 0
    assert not torch.allclose(changed.output, run.output, atol=1e-3)


@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention_with_and_without_weights(weights: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)
            self.norm2, self.mlp = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            x = x + self.attn(h, h, h, need_weights=weights)[0]
            return x + self.mlp(self.norm2(x))

    torch.manual_seed(0)
    ours, x = nn.Sequential(Own(), Own()).eval(), torch.randn(2, 5, 16)
    found = interp.anatomy(ours, x)
    assert all(set(block.refused) == {"result"} and block.heads == 4 for block in found.blocks)
    assert {block.implementation for block in found.blocks} == {"softmax" if weights else "torch sdpa"}
    run = interp.run(ours, x, keep=["q", "pattern", "z"], anatomy=found)
    _, expected = ours[0].attn(*[ours[0].norm(x)] * 3, average_attn_weights=False)
    assert torch.allclose(run["pattern.0"], expected, atol=1e-6)
    changed = interp.run(ours, x, edits=[interp.Scale("q.1.2", 0.0)], keep="pattern.1", anatomy=found)
    assert torch.allclose(changed["pattern.1"][:, 2], torch.full((2, 5, 5), 0.2), atol=1e-6)


def test_torchs_encoder_leaves_its_fused_path_while_asked_for_and_no_longer() -> None:
    ours, x = encoder(), torch.randn(2, 5, 16)
    with torch.no_grad():
        bare = ours(x)
    found = interp.anatomy(ours, x)
    assert torch.equal(interp.run(ours, x, keep=["resid_pre", "resid_post"], anatomy=found).output, bare)
    inside = interp.run(ours, x, keep=["pattern", "layers.0.linear1"], anatomy=found)
    assert inside.fired["module:layers.0.linear1"] == 1
    assert (inside.output - bare).abs().max() < 1e-5
    with torch.no_grad():
        assert torch.equal(ours(x), bare)


# ---------------------------------------------------------------- of libraries


def headed(found: interp.Anatomy) -> list[str]:
    """All sites of heads that are there."""
    blocks = enumerate(found.blocks)
    return [f"{site}.{layer}" for layer, block in blocks for site in HEADED if site not in block.refused]


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_models_of_transformers_without_the_interface(name: str) -> None:
    ours, given = family(name), inputs(name)
    found = interp.anatomy(ours, **given)
    keep = [
        f"{site}.{layer}" for layer, block in enumerate(found.blocks) for site in HEADED if site not in block.refused
    ]
    assert len(keep) == 6 * len(found.blocks)
    with torch.no_grad():
        bare = ours(**given).logits
    assert torch.equal(interp.run(ours, given, keep=keep, anatomy=found).logits, bare)
    out = interp.run(ours, given, edits=[interp.Zero("z.1.2")], anatomy=found)
    by_result = interp.run(ours, given, edits=[interp.Zero("result.1.2")], anatomy=found)
    assert torch.allclose(out.logits, by_result.logits, atol=1e-6)


@pytest.mark.parametrize("name", ["UNet2DModel", "SD3", "Flux", "DiT", "CogVideoX", "deberta_v2", "vilt", "swin"])
def test_denoisers_and_others_of_the_zoo(name: str) -> None:
    entry = zoo.ALL[name]
    ours, given = zoo.model_of(entry), entry.inputs()
    torch.manual_seed(0)  # ViLT draws which patches it looks at
    with torch.no_grad():
        bare = call(ours, given)
    found = interp.anatomy(ours, **given) if isinstance(given, dict) else interp.anatomy(ours, *given)
    keep = [
        f"{site}.{layer}" for layer, block in enumerate(found.blocks) for site in HEADED if site not in block.refused
    ]
    assert any(site.startswith("pattern") for site in keep)
    torch.manual_seed(0)
    run = interp.run(ours, given, keep=keep, anatomy=found)
    assert set(run.fired) == set(keep)
    assert torch.equal(noesis.layers.hidden_state(run.output), noesis.layers.hidden_state(bare))
