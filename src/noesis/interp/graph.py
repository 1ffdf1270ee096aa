"""The graph of a model: what writes into its residual stream, what reads it, and which reads which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadValue
from .anatomy import Anatomy, called_and_root
from .attending import Look
from .checks import check_equal, same
from .pairs import Inputs
from .places import expanded, place_of
from .replaying import Replay
from .running import run
from .sites import HEADED, MODULE, Edge, Site, read
from .sweeping import NO_LIMIT, Resuming

#: What writes: what the first block is given, heads under either name, mlps.
SENDERS = ("embed", "z", "result", "mlp")
#: What has to be known of each block.
NEEDED = ("resid_pre", "resid_post", "q", "k", "v", "z", "result", "attn")
#: What reads: queries, keys and values of heads, mlps, and what comes after the last block.
RECEIVERS = ("q", "k", "v", "mlp", "logits")


@dataclass(frozen=True)
class Graph:
    """What writes and reads the residual stream of a model, each head by itself.

    Attributes:
        anatomy: of the model.
        parallel: layers whose mlp reads the stream before attention.
        posts: layer -> the norm that what attention adds goes through, if there is one.
    """

    anatomy: Anatomy
    parallel: frozenset[int]
    posts: dict[int, str | None]

    @property
    def senders(self) -> list[Site]:
        """In the order in which they write."""
        found = [Site("embed")]
        for layer, block in enumerate(self.anatomy.blocks):
            found += [Site("z", layer, head) for head in range(block.heads)]
            found += [Site("mlp", layer)] if block.mlp else []
        return found

    @property
    def receivers(self) -> list[Site]:
        """In the order in which they read; keys and values are those of kv heads."""
        found = []
        for layer, block in enumerate(self.anatomy.blocks):
            counts = {"q": block.heads, "k": block.kv_heads, "v": block.kv_heads}
            found += [Site(name, layer, head) for name, count in counts.items() for head in range(count)]
            found += [Site("mlp", layer)] if block.mlp else []
        return [*found, Site("logits")]

    @property
    def edges(self) -> list[Edge]:
        """All of them, by receiver."""
        return self.between(self.senders, self.receivers)

    def between(self, senders: Sequence[Site], receivers: Sequence[Site]) -> list[Edge]:
        """From each of the senders to each receiver that reads after it has written."""
        return [Edge(s, r) for r in receivers for s in senders if self._written(s) < self._read(r)]

    def mask(self, edges: Sequence[Edge]) -> Tensor:
        """Which edges there are, bool `[receivers, senders]`."""
        rows = {receiver: at for at, receiver in enumerate(self.receivers)}
        columns = {sender: at for at, sender in enumerate(self.senders)}
        found = torch.zeros(len(rows), len(columns), dtype=torch.bool)
        for edge in edges:
            found[rows[edge.receiver], columns[edge.sender]] = True
        return found

    def _written(self, sender: Site) -> int:
        """When a sender writes: attention of a layer at an even number, its mlp at the next."""
        return -1 if sender.layer is None else 2 * sender.layer + (sender.component == "mlp")

    def _read(self, receiver: Site) -> int:
        """Of when on a receiver does not see what is written."""
        if receiver.layer is None:
            return 2 * len(self.anatomy.blocks)
        late = receiver.component == "mlp" and receiver.layer not in self.parallel
        return 2 * receiver.layer + late


def nodes_of(receiver: Site, heads: int, kv_heads: int) -> list[Site]:
    """The nodes that a receiver is a part of: keys and values of a kv head are those of all heads of its group.

    Args:
        receiver: such as `k.1.0`.
        heads: of its block.
        kv_heads: likewise.
    """
    if receiver.component not in ("q", "k", "v"):
        return [receiver]
    assert receiver.head is not None
    group = 1 if receiver.component == "q" else heads // kv_heads
    return [Site("z", receiver.layer, receiver.head * group + each) for each in range(group)]


def graph_of(model: Any, anatomy: Anatomy, few: Inputs) -> Graph:
    """The graph of a model, verified on a few rows.

    Raises:
        NoesisError: (a ValueError) for a model whose stream is not the sum of what its parts write, with the reason.
    """
    for layer, block in enumerate(anatomy.blocks):
        needed = (*NEEDED, *(["mlp"] if block.mlp else []))
        why = next((block.refused[each] for each in needed if each in block.refused), None)
        why = "it attends twice" if block.cross is not None else why
        if why is not None:
            raise _no_graph(f"block {layer}: {why}")
    resuming = Resuming(model, few, anatomy)
    if resuming.why_not:
        raise _no_graph(resuming.why_not)
    lost = sorted(set(range(len(anatomy.blocks))) - resuming.after)
    if lost:
        raise _no_graph(f"what comes after block {lost[0]} is not given what the block returned")
    return Graph(anatomy, _parallel(model, anatomy, few), _posts(model, anatomy, few))


def _parallel(model: Any, anatomy: Anatomy, few: Inputs) -> frozenset[int]:
    """The layers whose mlp does not see what attention adds, as tried with something else added."""
    unknown = [layer for layer, block in enumerate(anatomy.blocks) if block.mlp and block.mid is None]
    replay = Replay(model, few.given(), anatomy=anatomy) if unknown else None
    found = []
    for layer in unknown:
        assert replay is not None
        seen: list[Tensor] = []
        mlp, attn = Site("mlp", layer), Site("attn", layer)
        look = (Look(mlp, lambda whole, seen=seen: seen.append(whole.clone())), place_of(mlp, anatomy))  # type: ignore[misc]
        other = (
            Look(attn, lambda whole: whole + torch.linspace(0, 1, whole.shape[-1]).to(whole)),
            place_of(attn, anatomy),
        )
        for visitors in ([look], [other, look]):
            replay.block(layer, replay.residuals[layer], visitors)
        found += [layer] if torch.equal(*seen) else []
    return frozenset(found)


def _posts(model: Any, anatomy: Anatomy, few: Inputs) -> dict[int, str | None]:
    """The norms between output projections and the stream."""
    outs = [f"{MODULE}:{block.out}" for block in anatomy.blocks]
    layers = range(len(outs))
    kept = run(model, few.given(), keep=[*outs, *(f"attn.{n}" for n in layers)], anatomy=anatomy, max_bytes=NO_LIMIT)
    found: dict[int, str | None] = {}
    for layer in layers:
        out, attn, name = kept[outs[layer]], kept["attn", layer], str(anatomy.blocks[layer].attn)
        found[layer] = None
        if not same(out, attn):
            found[layer] = name
            norm = called_and_root(model)[1].get_submodule(name)
            given = out.to(next((each.device for each in norm.parameters()), out.device))
            with torch.no_grad():
                normed = norm(given) if name in anatomy.blocks[layer].post_norms else None
            if not isinstance(normed, Tensor) or not check_equal("", attn, normed).holds:
                raise _no_graph(f"block {layer}: between its output projection and the stream is more than a norm")
    return found


def _no_graph(why: str) -> BadValue:
    return BadValue(
        f"the model's stream is not known as a sum of what heads and mlps write: {why}",
        "a model whose blocks add up",
        "Use interp.patch, which takes sites one by one; print(interp.anatomy(model, ...)) shows what works",
    )


def ends_of(asked: str | Site | Iterable[str | Site], graph: Graph, root: nn.Module, which: str) -> list[Site]:
    """Senders or receivers that are asked for, each head by itself.

    Raises:
        NoesisError: (a ValueError) for a site that neither writes nor reads, or is not there.
    """
    allowed = SENDERS if which == "senders" else RECEIVERS
    found: list[Site] = []
    for each in read(asked, root, which):
        if each.component not in allowed:
            raise BadValue(
                f"{which} has {each.text!r}", f"{which} among {', '.join(allowed)}", "interp.patch takes other sites"
            )
        heads = each.heads or ("*" if each.component in HEADED else "")
        if each.component == "embed":  # what the first block is given, however it is made
            found += [Site("embed", position=position) for position in each.positions]
        else:
            found += expanded([each._replace(heads=heads)], graph.anatomy)
    if not found:
        raise BadValue(f"{which} is empty", "at least one site", f"Pass {allowed[0]!r}, for example")
    return list(dict.fromkeys(found))
