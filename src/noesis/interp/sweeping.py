"""A sweep over the cells of a model: for each, a forward in which it holds what it held in another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadValue, WrongState
from ..layers import hidden_state, parameters_of
from ..numerics import Floats
from .anatomy import Anatomy, called_and_root, logits_of
from .attending import Look
from .cells import AtPositions, Cells, by_row, whole_of, wholes_of
from .metrics import Metric, one_each
from .pairs import Inputs
from .places import Place, change_of, part_of
from .recording import LOGITS_TO_KEEP as KEEP
from .recording import spare
from .replaying import Replay
from .running import run
from .sites import MODULE, Site
from .visiting import Visiting

#: What a forward costs beside its rows, in cells: on a CPU little, while a small batch leaves an accelerator idle.
FORWARD_ON_CPU, FORWARD = 0.2, 1.0
NO_LIMIT = 1 << 62


class Looking:
    """What a metric says of the logits of some pairs, which are had where it looks alone, if the model can do that."""

    def __init__(self, metric: Metric | Callable[[Tensor], Tensor], inputs: Inputs, root: nn.Module) -> None:
        self.whole = not isinstance(metric, Metric)  # a function of all pairs
        self.metric = metric.bound(inputs.kwargs) if isinstance(metric, Metric) else metric
        self.count = inputs.count
        if isinstance(self.metric, Metric) and self.metric.examples not in (1, self.count):
            raise BadValue(
                f"the metric {self.metric} is of {self.metric.examples} examples, and there are {self.count} pairs",
                "one answer and position per pair, or one for all",
                "Give the metric one per pair, in their order",
            )
        self.places: Tensor | None = None
        tokens = inputs.tokens()
        if isinstance(self.metric, Metric) and tokens is not None and KEEP in parameters_of(root.forward):
            self.places = self.metric.places(self.count, tokens.shape[1])
            self.length = tokens.shape[1]

    def of(self, rows: Tensor) -> Looking:
        """The same of some pairs."""
        part: Looking = object.__new__(Looking)
        part.__dict__ = {**vars(self), "count": len(rows)}
        if isinstance(self.metric, Metric):
            part.metric = self.metric.of(rows)
            part.places = None if self.places is None else self.places[rows]
        return part

    def asking(self) -> dict[str, Any]:
        """Arguments of the model that ask for these logits alone."""
        if self.places is None:
            return {}
        kept = self.places.unique()
        return {KEEP: 1 if kept.tolist() == [self.length - 1] else kept}

    def values(self, output: Any) -> Floats:
        """The metric of several batches in one, float64 `[batches, pairs]`."""
        found: Floats = self.scores(output).detach().cpu().numpy()
        return found

    def scores(self, output: Any) -> Tensor:
        """The same as a tensor, by which it can be differentiated."""
        logits = logits_of(output)
        return self._of(output, 1) if logits is None else self._of(logits, logits.shape[0] // self.count)

    def rounding(self, output: Any) -> Floats:
        """How far the metric of each pair moves when its logits are rounded once more, in half precision."""
        logits = logits_of(output)
        if logits is None or logits.dtype not in (torch.float16, torch.bfloat16):
            return np.zeros(self.count)
        generator = torch.Generator().manual_seed(0)
        signs = 1 - 2 * torch.randint(0, 2, logits.shape, generator=generator)
        moved = logits.float() * (1 + torch.finfo(logits.dtype).eps * signs.to(logits.device))
        found: Floats = np.abs(self.values(moved) - self.values(logits.float()))[0]
        return found

    def _of(self, logits: Any, times: int) -> Tensor:
        if not isinstance(self.metric, Metric):
            batches = [logits] if times == 1 else logits.split(self.count)
            return torch.stack([one_each(self.metric, each, self.count) for each in batches])
        metric = self.metric if times == 1 else self.metric.of(torch.arange(self.count).repeat(times))
        if self.places is not None and logits.dim() == 3:
            kept = self.places.unique()
            if logits.shape[1] == len(kept):
                at = torch.searchsorted(kept, self.places.contiguous()).repeat(times).to(logits.device)
                logits = logits[torch.arange(len(logits), device=logits.device), at]
                return one_each(metric.score, logits, len(logits)).reshape(times, -1)
        return one_each(metric, logits, times * self.count).reshape(times, -1)


class Resuming:
    """Where forwards of a model can be taken up, as tried on a few rows.

    Attributes:
        why_not: why they cannot at all; "" where they can.
        after: layers whose block's output is what the next block is given, or after the last, what comes after.
    """

    def __init__(self, model: Any, few: Inputs, anatomy: Anatomy) -> None:
        self.why_not, self.after = "", set[int]()
        layers = [n for n, block in enumerate(anatomy.blocks) if not {"resid_pre", "resid_post"} & set(block.refused)]
        try:
            replay = Replay(model, few.given(), anatomy=anatomy)
        except BadValue as error:
            self.why_not = str(error)
            return
        kept = run(model, few.given(), keep=[f"resid_post.{n}" for n in layers], anatomy=anatomy, max_bytes=NO_LIMIT)
        streams = {n: kept["resid_post", n] for n in layers}
        last = len(anatomy.blocks) - 1
        self.after = {n for n in layers if n + 1 in layers and torch.equal(streams[n], replay.residuals[n + 1].cpu())}
        with torch.no_grad():
            if last in layers:
                stream = streams[last].to(replay.residuals[last].device)
                if _equal(replay.from_block(last + 1, stream), replay.output):
                    self.after.add(last)
            if layers and not _equal(replay.from_block(layers[-1], replay.residuals[layers[-1]]), replay.output):
                self.why_not = "a forward that was taken up at its last block did not give what the whole one gave"


class Sweep:
    """All cells on some pairs.

    Args:
        model: what to run.
        anatomy: of it.
        base: the inputs of the run that is changed.
        source: of the run from which cells are put into it.
        looking: what the metric says of these pairs.
        sites: of cells, each with or without a position.
        positions: of cells of sites without one.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        base: Inputs,
        source: Inputs,
        looking: Looking,
        sites: Sequence[Site],
        positions: AtPositions,
    ) -> None:
        self.model, self.anatomy, self.looking, self.inputs = model, anatomy, looking, base
        asking = looking.asking()
        wholes = wholes_of(sites)
        runs = [
            run(model, each.with_arguments(asking).given(), keep=wholes, anatomy=anatomy, max_bytes=NO_LIMIT)
            for each in (base, source)
        ]
        held, put = ({site: each[site] for site in wholes} for each in runs)
        self.cells = Cells(sites, positions, held, put, base)
        self.one_by_one = logits_of(runs[0].output) is None  # only a function of one's own knows what that holds
        self.rounding = looking.rounding(runs[0].output)
        self.source_values = looking.values(runs[1].output)[0]

    def run(self, rows: int, resuming: Resuming) -> tuple[Floats, Floats]:
        """The metric of the base run `[pairs]`, and of each cell `[cells, pairs]`.

        Args:
            rows: of a forward, at most.
            resuming: where forwards can be taken up.
        """
        groups: dict[int | None, list[int]] = {}
        for at in self.cells.changed.any(1).nonzero().flatten().tolist():  # the others change nothing
            groups.setdefault(self._start(self.cells.sites[at], resuming), []).append(at)
        most = 1 if self.one_by_one else max(1, rows // self.looking.count)
        fixed = FORWARD_ON_CPU if self.inputs.on_cpu() else FORWARD
        times = cells_at_once([len(group) for group in groups.values()], most, fixed)
        forwards = _Forwards(self, times, resuming)
        base = forwards.base
        patched = np.tile(base[0], (len(self.cells.sites), 1))
        for start in sorted(groups, key=lambda layer: -1 if layer is None else layer):
            for begin in range(0, len(groups[start]), times):
                chosen = groups[start][begin : begin + times]
                found = forwards.patched(start, [self.cells.sites[at] for at in chosen])
                for copy, at in enumerate(chosen):
                    same = (found[copy] == base[copy]) | ~self.cells.changed[at].numpy()
                    patched[at] = np.where(same, base[0], found[copy])  # bit for bit as it was: no effect at all
        patched[self.cells.missing().numpy()] = np.nan
        return base[0], patched

    def _start(self, cell: Site, resuming: Resuming) -> int | None:
        """The block at which a forward with this cell changed can be taken up; None for its begin."""
        if resuming.why_not or cell.component == "embed":
            return None
        if cell.component == MODULE:
            names = [f"{block.name}." for block in self.anatomy.blocks]
            return next((layer for layer, name in enumerate(names) if f"{cell.module}.".startswith(name)), None)
        assert cell.layer is not None
        return cell.layer + (cell.component == "resid_post" and cell.layer in resuming.after)


class _Forwards:
    """Forwards of so many copies of the pairs in one batch, each with another cell changed."""

    def __init__(self, sweep: Sweep, times: int, resuming: Resuming) -> None:
        self.sweep, self.times, self.resuming = sweep, times, resuming
        count = sweep.looking.count
        inputs = sweep.inputs.taken(torch.arange(count).repeat(times)).with_arguments(sweep.looking.asking())
        self.inputs = inputs
        self.replay: Replay | None = None
        self.streams: dict[int, Tensor] = {}
        with torch.no_grad():
            if resuming.why_not:
                output = self._from_the_begin([])
            else:
                self.replay = Replay(sweep.model, inputs.given(), anatomy=sweep.anatomy)
                self.streams, output = dict(self.replay.residuals), self.replay.output
        self.base = sweep.looking.values(output)

    def patched(self, start: int | None, cells: Sequence[Site]) -> Floats:
        """The metric of copies in which a cell each is changed, `[copies, pairs]`; those beyond are as they were."""
        inside = list(enumerate(cells))
        with torch.no_grad():
            if start is None:
                looks = self._looks(inside)
                output = self._from_the_begin(looks)
            else:
                assert self.replay is not None
                stream = self._stream(start).clone()
                for copy, cell in [(copy, cell) for copy, cell in inside if _is_given(cell, start)]:
                    self._write(stream, copy, cell)
                looks = self._looks([(copy, cell) for copy, cell in inside if not _is_given(cell, start)])
                output = self.replay.from_block(start, stream, looks)
        for look, _ in looks:
            if not look.times:
                raise WrongState(
                    f"{look.site} did not fire in a batch of {self.inputs.count} rows, and it did in one of "
                    f"{self.sweep.looking.count}",
                    "a model that takes the same way each time",
                    "Leave the site out, or pass batch=1",
                )
        return self.sweep.looking.values(output)

    def _stream(self, start: int) -> Tensor:
        """What a block is given, or what comes after the last."""
        if start not in self.streams:
            assert self.replay is not None
            look = Look(Site("resid_post", start - 1), lambda whole: self.streams.update({start: whole.clone()}))
            place = change_of(look.site, self.sweep.anatomy)
            self.replay.from_block(start - 1, self.streams[start - 1], [(look, place)])
        return self.streams[start]

    def _looks(self, cells: Sequence[tuple[int, Site]]) -> list[tuple[Look, Place]]:
        """What puts cells into copies, with where that is."""
        wholes: dict[Site, list[tuple[int, Site]]] = {}
        for copy, cell in cells:
            wholes.setdefault(whole_of(cell), []).append((copy, cell))

        def writer(chosen: list[tuple[int, Site]]) -> Callable[[Tensor], Tensor]:
            def write(whole: Tensor) -> Tensor:
                new = whole.clone()
                for copy, cell in chosen:
                    self._write(new, copy, cell)
                return new

            return write

        return [(Look(whole, writer(chosen)), change_of(whole, self.sweep.anatomy)) for whole, chosen in wholes.items()]

    def _write(self, whole: Tensor, copy: int, cell: Site) -> None:
        """Put a cell into the rows of one copy."""
        count = self.sweep.looking.count
        rows = by_row(whole, self.times * count, cell)[copy * count : (copy + 1) * count]
        part_of(cell, rows).copy_(part_of(cell, self.sweep.cells.put[whole_of(cell)]))

    def _from_the_begin(self, looks: Sequence[tuple[Look, Place]]) -> Any:
        called, root = called_and_root(self.sweep.model)
        visiting = Visiting(root, self.sweep.anatomy, own_thread=True)
        for look, place in looks:
            visiting.add(look, place)
        args, kwargs = spare(self.inputs.args, self.inputs.kwargs)
        with ExitStack() as leaving:
            visiting.attach(leaving)
            return called(*args, **kwargs)


def cells_at_once(counts: Sequence[int], most: int, fixed: float) -> int:
    """How many cells a batch has, of groups of so many, where a forward costs a cell each and something fixed.

    The run that is taken up has as many, and is whole: twice what a cell costs in the mean.
    """

    def cost(times: int) -> float:
        return 2 * times + sum(-(-count // times) * (times + fixed) for count in counts)

    return min(range(1, most + 1), key=cost)


def _is_given(cell: Site, start: int) -> bool:
    """Whether a cell is in what a block is given, rather than in the block: the output of one before is."""
    return cell.component == "resid_pre" or (cell.component == "resid_post" and cell.layer != start)


def _equal(a: Any, b: Any) -> bool:
    """Whether two outputs have the same logits, or else the same hidden state, bit for bit."""
    one, other = (hidden_state(each) if logits_of(each) is None else logits_of(each) for each in (a, b))
    return one is not None and other is not None and torch.equal(one, other)
