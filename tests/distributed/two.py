"""One of two ranks that train in parallel, calibrate together, and fail; for tests to judge from what it writes."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import noesis
from noesis.surprise import collection


def small() -> nn.Sequential:
    """A model of two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(step: int, rank: int) -> Tensor:
    """Of four samples on rank 0, of seven on rank 1."""
    return torch.randn(4 + 3 * rank, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def normal() -> list[Tensor]:
    """What both ranks together calibrate on: six batches of 100."""
    return list(torch.randn(600, 6, generator=torch.Generator().manual_seed(5)).split(100))


def coded() -> noesis.Wrapped:
    """A wrap with codebooks."""
    return noesis.wrap(small(), layers=["0", "1"], codebook=noesis.Codebook(size=16), logits="2")


class Words(nn.Module):
    """Word embeddings, and positions that count padding on the left too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.numbered = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.numbered(self.words(ids) + torch.arange(ids.shape[1])[:, None])


def padded(rank: int) -> dict[str, object]:
    """What both ranks know of padding that is on the right on rank 0, and on the left on rank 1."""
    wrapped = noesis.wrap(Words(), layers="leaves", codebook=noesis.Codebook(size=4))
    ids, mask = torch.randint(1, 9, (100, 8)), torch.ones(100, 8, dtype=torch.int64)
    mask[::2, slice(0, 3) if rank else slice(5, 8)] = 0
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        made = wrapped.calibrate(
            [{"ids": ids * mask, "attention_mask": mask}], progress=False, group=dist.group.WORLD, timeout=20
        )
    return {"layers": made.layers, "padding": made.padding, "used": wrapped._channels().padding.found}


def steps(model: nn.Module, rank: int, optimiser: torch.optim.Optimizer | None = None) -> nn.Module:
    """Three of them, with gradients."""
    for step in range(3):
        model.zero_grad()
        model(batch(step, rank)).square().mean().backward()
        if optimiser is not None:
            optimiser.step()
    return model


def error(call) -> str:
    """What a call raises."""
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def data_parallel(rank: int, folder: Path) -> dict[str, bool]:
    """DDP in three ways: around the model, around the container, and inside."""
    bare = DistributedDataParallel(small())
    steps(bare, rank, torch.optim.SGD(bare.parameters(), 0.1))
    same = {}
    for way in ("around the model", "around the container", "inside"):
        model = small()
        if way == "inside":
            wrapped = noesis.wrap(DistributedDataParallel(model), layers="linear")
            ours = wrapped.observed_model
        else:
            wrapped = noesis.wrap(model, layers="linear")
            ours = DistributedDataParallel(model if way == "around the model" else wrapped)
        steps(ours, rank, torch.optim.SGD(model.parameters(), 0.1))
        same[way] = all(
            torch.equal(a, b) and torch.equal(a.grad, b.grad)
            for a, b in zip(model.parameters(), bare.parameters(), strict=True)
        )
        wrapped.trace().save(folder / f"{way}.own{rank}.safetensors")
        wrapped.trace(group=dist.group.WORLD).save(folder / f"{way}.{rank}.safetensors")
    return same


def sharded(rank: int, folder: Path) -> dict[str, bool]:
    """FSDP2, sharded after wrapping and before."""
    mesh = init_device_mesh("cpu", (2,))
    bare = small()
    for part in (bare[0], bare[2], bare):
        fully_shard(part, mesh=mesh)
    steps(bare, rank)
    same = {}
    for way in ("wrap, then shard", "shard, then wrap"):
        model = small()
        if way == "wrap, then shard":
            wrapped = noesis.wrap(model, layers="linear")
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        if way == "shard, then wrap":
            wrapped = noesis.wrap(model, layers="linear")
        steps(wrapped, rank)
        same[way] = all(
            torch.equal(a.grad.to_local(), b.grad.to_local())
            for a, b in zip(model.parameters(), bare.parameters(), strict=True)
        )
        wrapped.trace(group=dist.group.WORLD).save(folder / f"{way}.{rank}.safetensors")
        wrapped.unwrap()
    return same


def tensor_parallel(rank: int, folder: Path) -> tuple[dict[str, bool], dict[str, dict[str, str]]]:
    """Megatron's way: split by columns, then by rows. What layers return is local, or a DTensor where asked for."""
    mesh, x = init_device_mesh("cpu", (2,)), batch(0, 1)  # all ranks get the same seven samples
    plans = {
        "local": {"0": ColwiseParallel(), "2": RowwiseParallel()},
        "dtensor": {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel(use_local_output=False)},
        "rows": {"0": ColwiseParallel(), "2": RowwiseParallel(output_layouts=Shard(0), use_local_output=False)},
        "partial": {"0": ColwiseParallel(), "2": RowwiseParallel(output_layouts=Partial(), use_local_output=False)},
    }
    same, uncoded = {}, {}
    for way, plan in plans.items():
        found = []
        for observed in (False, True):
            model = parallelize_module(small(), mesh, plan)
            settings = {"codebook": noesis.Codebook(), "gradients": True}
            wrapped = noesis.wrap(model, layers="linear", **settings) if observed else None
            y = model(x)
            y = y.full_tensor() if isinstance(y, DTensor) else y * 1.0
            y.square().sum().backward()
            found.append([y, *(parameter.grad.full_tensor() for parameter in model.parameters())])
        same[way] = all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        wrapped.trace(group=dist.group.WORLD).save(folder / f"tensor parallel {way}.{rank}.safetensors")
        wrapped.gradients(group=dist.group.WORLD).save(folder / f"tensor parallel gradients {way}.{rank}.safetensors")
        uncoded[way] = wrapped._recorder.channels.uncoded
    return same, uncoded


def compiled(rank: int, folder: Path) -> bool:
    """A DTensor in compiled code."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    for observed in (False, True):
        plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
        model = parallelize_module(small(), mesh, plan)
        wrapped = noesis.wrap(model, layers="linear") if observed else None
        y = torch.compile(model, backend="aot_eager")(batch(0, 1))
        y.square().sum().backward()
        found.append([y, *(parameter.grad.full_tensor() for parameter in model.parameters())])
    wrapped.trace(group=dist.group.WORLD).save(folder / f"compiled.{rank}.safetensors")
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def calibration(rank: int, folder: Path) -> dict[str, object]:
    """Four batches here and two there; nothing on rank 0; more than are kept; and a loader that breaks."""
    world, told = dist.group.WORLD, {}
    model = coded()
    own = normal()[:4] if rank == 0 else normal()[4:]
    told["shared"] = repr(model.calibrate(own, progress=False, group=world, timeout=20))
    model.save_calibration(folder / f"shared.{rank}.safetensors")
    model(batch(0, 0))
    told["p"] = model.surprise().p_value.tolist()
    model = coded()
    told["one"] = repr(model.calibrate(normal() if rank else [], progress=False, group=world, timeout=20))
    model.save_calibration(folder / f"one.{rank}.safetensors")
    most, collection.MOST_SAMPLES = collection.MOST_SAMPLES, 240
    told["chosen"] = repr(coded().calibrate(own, progress=False, group=world, timeout=20))
    collection.MOST_SAMPLES = most

    def breaking() -> Iterator[Tensor]:
        yield from normal()
        if rank == 1:
            raise ValueError("the disk is gone")

    model = coded()
    told["broken"] = error(lambda: model.calibrate(breaking(), progress=False, group=world, timeout=20))
    told["few"] = error(lambda: model.calibrate([torch.randn(20, 6)], progress=False, group=world, timeout=20))
    told["none"] = error(lambda: model.calibrate([], progress=False, group=world, timeout=20))
    paired = [(part, torch.zeros(100, dtype=torch.long)) for part in normal()]
    told["labels"] = error(lambda: model.calibrate(paired, labels=rank == 0, progress=False, group=world, timeout=20))
    mixed = model.trace if rank else lambda **options: model.calibrate(normal(), progress=False, **options)
    told["mixed"] = error(lambda: mixed(group=world, timeout=20))
    told["untouched"] = model.calibration is None
    if rank == 0:
        told["alone"] = repr(model.calibrate(normal(), progress=False))
    dist.barrier()
    start = time.monotonic()
    told["late"] = error(lambda: model.trace(group=world, timeout=1.0)) if rank == 0 else time.sleep(2)
    told["seconds"] = time.monotonic() - start
    told["too late"] = error(lambda: model.trace(group=world, timeout=1.0)) if rank == 1 else None
    told["again"] = error(lambda: model.trace(group=world, timeout=20))
    return told


def main(folder: Path) -> None:
    """All of it."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    told = {"ddp": data_parallel(rank, folder), "fsdp": sharded(rank, folder)}
    told["tensor parallel"], told["uncoded"] = tensor_parallel(rank, folder)
    told["compiled"] = compiled(rank, folder)
    told |= calibration(rank, folder)
    told["padded"] = padded(rank)
    (folder / f"told.{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
