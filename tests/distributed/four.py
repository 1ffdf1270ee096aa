"""One of several ranks that see different things; what each gets is written to the folder given, for tests to judge."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import noesis


class Sometimes(nn.Module):
    """Layers of which one runs only when asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(self.other(x) if other else x)


def batch(step: int, rank: int, size: int) -> Tensor:
    """What a rank sees at a step: more on higher ranks."""
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(100 * step + rank)) + rank


def uneven(rank: int, **settings) -> noesis.Wrapped:
    """Seven steps, six on rank 1, none on rank 3; one layer runs on rank 2 alone, and then at every other step."""
    wrapped = noesis.wrap(Sometimes(), layers="linear", **settings)
    for step in range({1: 6, 3: 0}.get(rank, 7)):
        wrapped(batch(step, rank, 3 * (rank + 1)), other=rank == 2 and step % 2 == 0)
    return wrapped


def resumed(rank: int, checkpoint: Path) -> noesis.Wrapped:
    """The same seven steps, with a checkpoint after the third, and other processes from there on."""
    wrapped = noesis.wrap(Sometimes(), layers="linear")
    for step in range({3: 0}.get(rank, 3)):
        wrapped(batch(step, rank, 3 * (rank + 1)), other=rank == 2 and step % 2 == 0)
    dcp.save({"noesis": noesis.RunState(wrapped, dist.group.WORLD)}, checkpoint_id=checkpoint)
    wrapped.unwrap()
    wrapped = noesis.wrap(Sometimes(), layers="linear")
    dcp.load({"noesis": noesis.RunState(wrapped, dist.group.WORLD)}, checkpoint_id=checkpoint)
    for step in range(3, {1: 6, 3: 0}.get(rank, 7)):
        wrapped(batch(step, rank, 3 * (rank + 1)), other=rank == 2 and step % 2 == 0)
    return wrapped


def stage(rank: int) -> noesis.Wrapped:
    """A stage of a pipeline, whose layers no other rank has."""
    torch.manual_seed(rank)
    model = nn.Sequential(OrderedDict({f"stage{rank}": nn.Sequential(nn.Linear(6, 6), nn.ReLU())}))
    wrapped = noesis.wrap(model, layers="leaves")
    for step in range(2):
        wrapped(batch(step, rank, 4))
    return wrapped


def main(folder: Path) -> None:
    """All cases, one after the other; the last leaves a rank behind."""
    sys.modules["numba"] = None  # type: ignore[assignment]  # four that compile at once would take most of the time
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.group.WORLD
    told: dict[str, object] = {}

    def keep(case: str, wrapped: noesis.Wrapped) -> None:
        wrapped.trace().save(folder / f"{case}.own{rank}.safetensors")
        wrapped.trace(group=world).save(folder / f"{case}.{rank}.safetensors")

    plain = uneven(rank, stats=["zeros", "rms"])
    if rank == 2:  # alone, and the others do not take part
        start = time.monotonic()
        plain.trace(), plain.soulprint()
        told["alone"] = time.monotonic() - start
    keep("uneven", plain)
    plain.soulprint(group=world).save(folder / f"soulprint.{rank}.safetensors")
    keep("ring", uneven(rank, capacity=4))
    keep("samples", uneven(rank, per_sample=4))
    keep("stages", stage(rank))
    keep("resumed", resumed(rank, folder / "checkpoint"))
    some = dist.new_group([1, 2])
    if rank in (1, 2):
        plain.trace(group=some).save(folder / f"some.{rank}.safetensors")
    else:
        told["outside"] = error(lambda: plain.trace(group=some))
    told["not a group"] = error(lambda: plain.trace(group=[0, 1]))
    told["no time"] = error(lambda: plain.trace(group=world, timeout=0))
    other = noesis.wrap(Sometimes(), layers="linear", stats=["zeros"] if rank == 1 else ["rms"])
    told["stats"] = error(lambda: other.trace(group=world))
    if rank == 2:
        (folder / "told.2.json").write_text(json.dumps(told))
        os._exit(0)  # dead, as far as the others can tell
    if rank == 1:
        time.sleep(1)
    told["missing"] = error(lambda: plain.trace(group=world, timeout=3.0 if rank == 0 else 2.0))
    (folder / f"told.{rank}.json").write_text(json.dumps(told))
    os._exit(0)


def error(call) -> str:
    """What a call raises."""
    try:
        call()
    except noesis.NoesisError as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
