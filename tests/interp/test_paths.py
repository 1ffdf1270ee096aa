"""Path patching: what whole forwards under hooks give, and the truth of circuits by construction."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import noesis
from helpers.circuits import indirect_object, induction
from helpers.families import family, inputs
from helpers.language_models import VOCABULARY, prompts
from helpers.selection import by_default
from noesis import interp
from noesis.interp.sites import Edge, Site

PAIRS, LENGTH = 4, 7
METRIC = interp.logit_difference(right=[5, 6, 7, 8], wrong=[9, 10, 11, 12])
#: Family -> its blocks; in a block: output projection, norm before the sum, queries, what the mlp begins with.
PLACES = {
    "llama": ("model.layers", "self_attn.o_proj", None, "self_attn.{}_proj", "post_attention_layernorm"),
    "qwen3": ("model.layers", "self_attn.o_proj", None, "self_attn.{}_proj", "post_attention_layernorm"),
    "gemma2": (
        "model.layers",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "self_attn.{}_proj",
        "pre_feedforward_layernorm",
    ),
    "olmo2": ("model.layers", "self_attn.o_proj", "post_attention_layernorm", "self_attn.{}_norm", "mlp"),
    "gpt2": ("transformer.h", "attn.c_proj", None, "attn.c_attn", "ln_2"),
    "neox": ("gpt_neox.layers", "attention.dense", None, "attention.query_key_value", "post_attention_layernorm"),
}
PARALLEL = {"neox"}


def ids_of(corrupted: bool) -> Tensor:
    ids = prompts(PAIRS, LENGTH)
    if corrupted:
        ids = ids.clone()
        ids[:, 2:] = (ids[:, 2:] + 1) % VOCABULARY
    return ids


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class Hooked:
    """Forwards under PyTorch's hooks alone."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, family(name).double()
        for block in self.model.get_submodule(PLACES[name][0]).parameters():
            block.data.mul_(5 if block.dim() > 1 else 1)  # so that attention is not all alike
        self.blocks, self.out, self.post, self.reads, self.mid = PLACES[name]

    def module(self, layer: int, name: str | None = None) -> Any:
        return self.model.get_submodule(f"{self.blocks}.{layer}" + (f".{name}" if name else ""))

    def run(self, ids: Tensor, before: dict[Any, Any] | None = None, after: dict[Any, Any] | None = None) -> Any:
        with ExitStack() as leaving, torch.no_grad():
            for module, change in (before or {}).items():

                def given(_module: Any, args: Any, kwargs: Any, change: Any = change) -> Any:
                    if args:
                        return (change(args[0].clone()), *args[1:]), kwargs
                    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"].clone())}

                leaving.callback(module.register_forward_pre_hook(given, with_kwargs=True).remove)
            for module, change in (after or {}).items():

                def returned(_module: Any, _args: Any, output: Any, change: Any = change) -> Any:
                    new = change(first(output).clone())
                    return (new, *output[1:]) if isinstance(output, tuple) else new

                leaving.callback(module.register_forward_hook(returned).remove)
            return self.model(ids, use_cache=False).logits

    def kept(self, ids: Tensor, module: Any, before: bool) -> Tensor:
        seen: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            seen.append(tensor.clone())
            return tensor

        self.run(ids, **{"before" if before else "after": {module: keep}})
        return seen[0]

    def sent(self, sender: Site, base: Tensor, source: Tensor) -> Tensor:
        """What a sender changes in the stream."""
        if sender.component == "embed":
            ends = [self.kept(ids, self.module(0), True) for ids in (base, source)]
            return ends[1] - ends[0]
        assert sender.layer is not None
        if sender.component == "mlp":
            name = "post_feedforward_layernorm" if self.name in ("gemma2", "olmo2") else "mlp"
            ends = [self.kept(ids, self.module(sender.layer, name), False) for ids in (base, source)]
            return ends[1] - ends[0]
        out = self.module(sender.layer, self.out)
        assert sender.head is not None
        z = [self.kept(ids, out, True) for ids in (base, source)]
        width = z[0].shape[-1] // 4
        mixed = z[0].clone()
        mixed[..., sender.head * width : (sender.head + 1) * width] = z[1][
            ..., sender.head * width : (sender.head + 1) * width
        ]
        written = [first(out(each)) for each in (z[0], mixed)]
        if self.post:
            norm = self.module(sender.layer, self.post)
            written = [norm(each) for each in written]
        return written[1] - written[0]

    def path(self, edge: Edge, base: Tensor, source: Tensor) -> np.ndarray:
        """The metric when the receiver alone sees what the sender changes."""
        with torch.no_grad():
            change = self.sent(edge.sender, base, source)
        receiver = edge.receiver
        if receiver.component == "logits":
            layers = len(self.model.get_submodule(self.blocks))
            logits = self.run(base, after={self.module(layers - 1): lambda tensor: tensor + change})
            return METRIC(logits).numpy()
        assert receiver.layer is not None
        block = self.module(receiver.layer)
        if receiver.component == "mlp" and self.name not in PARALLEL:
            logits = self.run(base, before={self.module(receiver.layer, self.mid): lambda tensor: tensor + change})
            return METRIC(logits).numpy()
        if receiver.component == "mlp":
            at, part = self.module(receiver.layer, "mlp"), slice(None)
        else:
            name = self.reads.format(receiver.component)
            at = self.module(receiver.layer, "self_attn.v_proj" if name == "self_attn.v_norm" else name)
            width, head = 8, receiver.head
            assert head is not None
            order = "qkv".index(receiver.component)
            begin = head * width
            if self.name == "gpt2":
                begin = order * 32 + head * width
            if self.name == "neox":
                begin = head * 3 * width + order * width
            part = slice(begin, begin + width)
        seen: list[Tensor] = []

        def see(tensor: Tensor) -> Tensor:
            seen.append(tensor.clone())
            return tensor

        self.run(
            base,
            before={block: lambda tensor: tensor + change},
            after={at: see},
        )

        def put(tensor: Tensor) -> Tensor:
            tensor[..., part] = seen[0][..., part]
            return tensor

        return METRIC(self.run(base, after={at: put})).numpy()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", by_default(3, PLACES))
def test_each_path_is_what_whole_forwards_under_hooks_give(name: str, direction: str) -> None:
    hooked = Hooked(name)
    if name == "olmo2":
        del hooked.model.model.layers[2:]
    clean, corrupted = ids_of(False), ids_of(True)
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    effects = interp.paths(
        hooked.model,
        clean,
        corrupted,
        METRIC,
        senders=["embed", "z.0.1", "z.1.2", "mlp.0"],
        receivers=["q.1.3", "k.1.1", "v.1.0", "mlp.0", "mlp.1", "logits"],
        direction=direction,  # type: ignore[arg-type]
        batch=9,
    )
    assert len(effects) == 3 * 3 + (1 if name in PARALLEL else 2) + (3 if name in PARALLEL else 4) + 4
    for edge, patched in zip(effects.sites, effects.patched, strict=True):
        np.testing.assert_allclose(patched, hooked.path(edge, base, source), atol=1e-9, err_msg=str(edge))
    moved = np.abs(effects.patched - effects.base).max(1)
    still = [str(edge) for edge, much in zip(effects.sites, moved, strict=True) if much < 1e-6]
    assert not still  # or equality would show nothing


def of_head(made: Any, end: str) -> Site:
    """`k.induction` as a site."""
    component, _, head = end.partition(".")
    return Site(component, *made.heads[head])


#: Circuit, what is corrupted -> paths on which all depends, as heads are called.
TRUTH = {
    ("induction", "before"): {("embed", "v.previous"), ("z.previous", "k.induction"), ("z.induction", "logits")},
    ("induction", "answer"): {("embed", "v.induction"), ("z.induction", "logits")},
}


@pytest.mark.parametrize("seed", by_default(1, range(4)))
@pytest.mark.parametrize(("kind", "way"), TRUTH)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_paths_of_a_circuit_by_construction(kind: str, way: str, seed: int, direction: str) -> None:
    made = induction(seed)
    pairs = made.sample(8, seed, way, ragged=True)
    effects = interp.paths(
        made.model,
        pairs.clean_inputs,
        pairs.corrupted_inputs,
        interp.logit_difference(pairs.right, pairs.wrong),
        senders=["embed", "z", "mlp"],
        receivers=["q", "k", "v", "mlp", "logits"],
        direction=direction,  # type: ignore[arg-type]
    )
    truth = {
        str(Edge(*(Site(end) if "." not in end else of_head(made, end) for end in edge))) for edge in TRUTH[kind, way]
    }
    for at, edge in enumerate(map(str, effects.sites)):
        np.testing.assert_allclose(effects.values[at], float(edge in truth), atol=1e-5, err_msg=edge)


def test_paths_of_two_names() -> None:
    """The name is not seen twice where it is: the mover is told not to look there, and its queries alone are."""
    made = indirect_object(1)
    pairs = made.sample(8, 1, "swap")
    effects = interp.paths(
        made.model,
        pairs.clean,
        pairs.corrupted,
        interp.logit_difference(pairs.right, pairs.wrong),
        senders="z",
        receivers=["q", "k", "v", "logits"],
        direction="noise",
    )
    found = {str(each.site) for each in effects.top(len(effects)) if abs(each.mean) > 0.5}
    duplicate, inhibition, mover = (made.site("z", head) for head in ("duplicate", "inhibition", "mover"))
    q, v = made.site("q", "mover"), made.site("v", "inhibition")
    assert found == {f"{duplicate}->{v}", f"{inhibition}->{q}", f"{mover}->logits"}


def test_one_position_is_sent_or_received_alone() -> None:
    made = induction(2)
    pairs = made.sample(6, 2, ragged=True)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    inputs = (made.model, pairs.clean_inputs, pairs.corrupted_inputs, metric)
    receiver = made.site("k", "induction")
    each = interp.paths(*inputs, senders=made.site("z", "previous"), receivers=receiver, positions="each")
    assert len(each) == pairs.clean.shape[1]
    at = torch.tensor([edge.sender.position for edge in each.sites])
    expected = (at[:, None] == pairs.at["answer"]).double().numpy()
    missing = ~pairs.mask.T.bool().numpy()
    assert np.isnan(each.values[missing]).all()
    np.testing.assert_allclose(each.values[~missing], expected[~missing], atol=1e-5)
    row = int(pairs.at["answer"][0])
    received = interp.paths(
        *inputs, senders=made.site("z", "previous"), receivers=[f"{receiver}@{row}", f"{receiver}@0"]
    )
    np.testing.assert_allclose(
        received.values, [(pairs.at["answer"] == row).numpy().astype(float), [0.0] * 6], atol=1e-5
    )
    end = interp.paths(*inputs, senders=made.site("z", "induction"), receivers=["logits@-1", "logits@0"])
    last = (pairs.at["end"] == pairs.clean.shape[1] - 1).numpy().astype(float)
    np.testing.assert_allclose(end.values, [last, [0.0] * 6], atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "qwen3", "olmo2", "cohere", "mixtral", "neox", "opt", "vit"]
)
def test_families(name: str) -> None:
    """All that the embedding changes is all there is to change, to the first block's parts."""
    model, given = family(name), inputs(name)
    other = {key: value if "mask" in key else value.flip(0) for key, value in given.items()}
    effects = interp.paths(
        model, given, other, interp.logit_difference(0, 1), senders=["embed", "z.0"], receivers=["v.1", "mlp", "logits"]
    )
    assert np.isfinite(effects.patched).all()
    assert (effects.patched != effects.corrupted).any()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bert", "normalises or scales the sum"),
        ("granite", "normalises or scales the sum"),
        ("t5", "attends twice"),
    ],
)
def test_streams_that_do_not_add_up_are_refused_by_name(name: str, why: str) -> None:
    given = inputs(name)
    with pytest.raises(noesis.NoesisError, match=why):
        interp.paths(family(name), given, given, interp.logit_difference(5, 6), senders="z", receivers="logits")


def test_bad_input_says_what_to_do() -> None:
    model, clean, corrupted = family("llama"), ids_of(False), ids_of(True)

    def refused(match: str, metric: Any = METRIC, other: Tensor = corrupted, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            interp.paths(model, clean, other, metric, **{"senders": "z.0", "receivers": "logits", **options})

    refused("a single number, such as a mean", metric=lambda logits: logits[:, -1, 5].mean())
    refused("7 tokens and corrupted ones 6", other=corrupted[:, :6])
    refused("senders has 'resid_post.0'", senders="resid_post.0")
    refused("receivers has 'z.1'", receivers="z.1")
    refused("head", receivers="k.1.3")  # of two kv heads
    refused("no sender writes before", senders="z.1", receivers="q.1")
    refused("direction", direction="both")
    model.bfloat16().lm_head.weight.data.add_(2)  # logits of one size, whose differences are near its resolution
    close = clean.clone()
    close[:, 0] = (close[:, 0] + 1) % VOCABULARY
    refused("half precision", other=close)


def test_half_precision_that_tells_them_apart() -> None:
    made = induction(0)
    pairs = made.sample(4, 0, "answer")
    model = made.model.bfloat16()
    head = made.site("z", "induction")
    effects = interp.paths(
        model,
        pairs.clean,
        pairs.corrupted,
        interp.logit_difference(pairs.right, pairs.wrong),
        senders=head,
        receivers="logits",
    )
    np.testing.assert_allclose(effects.values, 1.0, atol=0.05)


def test_files_and_tables(tmp_path: Any) -> None:
    model, clean, corrupted = family("llama"), ids_of(False), ids_of(True)
    wrapped = noesis.wrap(model)
    effects = interp.paths(wrapped, clean, corrupted, METRIC, senders="z.0", receivers=["k.1", "logits"])
    assert effects["z.0.0->k.1.1"].site == Edge(Site("z", 0, 0), Site("k", 1, 1))
    for suffix in ("json", "safetensors"):
        read = interp.Effects.load(effects.save(tmp_path / f"e.{suffix}"))
        assert read.sites == effects.sites
        assert np.array_equal(read.patched, effects.patched)
    assert effects.to_csv().splitlines()[0].startswith("site,sender,receiver,mean")
    assert "z.0.0->k.1.1" in repr(effects) or len(effects) > 12
    assert effects.plot().axes
