"""Trace: what happened, as steps x layers x statistics on the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import BadValue, MissingFile, WrongState
from ..files import v01
from ..kernels import layout, rows
from ..numerics import Floats, Ints
from .columns import COLUMNS, from_file, to_arrays, to_header, to_table, whole
from .saved import Saved
from .showing import draw_trace, first_ran, text_of
from .soulprint import Soulprint
from .statistics import ALWAYS, OPTIONAL, fields_of, stats_of
from .tabular import Cells, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .surprise import Surprise


@dataclass(eq=False, repr=False)
class Trace(Saved, Tabular):
    """The statistics of every observed layer at every step of a run.

    As a table (`to_csv`, `to_dataframe`) it has a row per step and layer; samples have tables of their own.

    Attributes:
        values: float64 [steps, layers, stats]. Statistics are over the finite elements of a layer's
            output; `std` is unbiased. Where a layer did not run, counts are 0 and the others NaN.
        layers: dotted names, in the order of `named_modules()`.
        stats: names of the last axis.
        steps: int [steps], the number of the forward each step was, from 0.
        timesteps: float64 [steps], the denoiser's timestep; NaN where the model has none.
        branches: guidance branch of each step, or None.
        seconds: float64 [steps], from the begin of the run to that of the step, by the clock of the host, which
            may run ahead of a GPU; NaN where it is not known, as of the replays of a CUDA graph.
        batches: int [steps], the batch size of each forward.
        order: int [steps, layers], when a layer first ran within the step, from 1; 0 if it did not.
        calls: int [steps, layers], how often it ran within the step.
        totals: float64 [layers, stats] over all numbers of the whole run, also of steps the ring dropped; what `print`
            shows. A soulprint averages over the steps instead.
        averages: float64 [layers, 3]: steps run, and sums over them of the means and of the stds.
        dropped_steps: how many steps at the start of the run are only in `totals` and `averages`.
        unmeasured: layers that ran with an output that cannot be measured, and why.
        samples: with `per_sample=True`, one trace per element of the batch.
        meta: what is known of the run.
        surprise: from `forward_with_trace` with a codebook, the scores of that call; in no file.

    Examples:
        >>> import torch, noesis
        >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()))
        >>> _ = wrapped(torch.ones(2, 4))
        >>> trace = wrapped.trace()
        >>> trace.values.shape, trace.layers
        ((1, 2, 7), ['0', '1'])
        >>> trace["count"]
        array([[16., 16.]])
    """

    kind: ClassVar[str] = "trace"
    numbers: ClassVar[tuple[str, ...]] = ("arrays",)

    values: Floats
    layers: list[str]
    stats: tuple[str, ...]
    steps: Ints
    order: Ints
    calls: Ints
    totals: Floats
    averages: Floats
    timesteps: Floats
    batches: Ints
    branches: list[str | None]
    seconds: Floats
    dropped_steps: int = 0
    unmeasured: dict[str, str] = field(default_factory=dict)
    samples: list[Trace] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    surprise: Surprise | None = None

    # ------------------------------------------------------------ access

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, stat: str) -> Floats:
        """One statistic as float64 [steps, layers]."""
        return self.values[:, :, self._stat(stat)]

    def layer(self, name: str) -> Floats:
        """One layer as float64 [steps, stats]."""
        return self.values[:, self._layer(name), :]

    @property
    def never_ran(self) -> list[str]:
        """Selected layers that did not run in the whole run."""
        called = self._ran | (self.calls > 0).any(0)
        return [name for name, yes in zip(self.layers, called, strict=True) if not (yes or name in self.unmeasured)]

    @property
    def _ran(self) -> NDArray[np.bool_]:
        """Which layers gave any element at all, finite or not."""
        return (self.averages[:, 0] > 0) | (self.totals[:, self._stat("nonfinite")] > 0)

    def first_nonfinite(self) -> tuple[int, str] | None:
        """Step and layer of the first NaN or infinity, in order of execution; None if there is none.

        Examples:
            >>> import torch, noesis
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
            >>> _ = torch.nn.init.constant_(model[1].bias, float("nan"))
            >>> wrapped = noesis.wrap(model)
            >>> _ = wrapped(torch.ones(1, 2))
            >>> wrapped.trace().first_nonfinite()
            (0, '1')
        """
        for index, bad in enumerate(self["nonfinite"] > 0):
            if bad.any():
                layer = min(np.flatnonzero(bad), key=lambda at: self.order[index, at])
                return int(self.steps[index]), self.layers[layer]
        return None

    def at(self, keep: Iterable[bool]) -> Trace:
        """The trace of some of its steps alone; `keep` is a mask over the steps."""
        mask = np.asarray(list(keep), dtype=bool)
        kept = {each.name: each.at(getattr(self, each.name), mask) for each in COLUMNS if each.axes[0] == "steps"}
        return Trace.of(
            kept.pop("values"),
            self.layers,
            self.stats,
            unmeasured=self.unmeasured,
            samples=[sample.at(mask) for sample in self.samples],
            meta=self.meta,
            **kept,
        )

    def soulprint(self, step: int | None = None) -> Soulprint:
        """The run as one vector: each layer's mean and std, averaged over the steps it ran in.

        Layers that never ran are left out. A layer without a finite element has NaN.

        Args:
            step: a step's number, for the soulprint of that step alone.

        Raises:
            NoesisError: when nothing ran, or there is no such step.
        """
        if step is not None:
            if step not in self.steps:
                raise BadValue(f"step={step} is not in the trace", f"one of {_span(self.steps)}", "See trace.steps")
            return self.at(self.steps == step).soulprint()
        times = self.averages[:, 0]
        ran = self._ran
        if not ran.any():
            raise WrongState(
                "The trace has no steps in which an observed layer ran", "at least one forward", "Run the model first"
            )
        with np.errstate(invalid="ignore", divide="ignore"):
            means, stds = self.averages[:, 1] / times, self.averages[:, 2] / times
        return Soulprint(
            means=means[ran],
            stds=stds[ran],
            layers=[name for name, yes in zip(self.layers, ran, strict=True) if yes],
            steps=int(times.max()),
            meta=dict(self.meta),
            order=first_ran(self.order)[ran] if len(self) else None,
        )

    def _stat(self, name: str) -> int:
        if name not in self.stats:
            raise BadValue(f"{name!r} is not in the trace", f"one of {', '.join(self.stats)}", _wrap_hint(name))
        return self.stats.index(name)

    def _layer(self, name: str) -> int:
        if name not in self.layers:
            raise BadValue(
                f"layer {name!r} is not in the trace", f"one of its {len(self.layers)} layers", "See trace.layers"
            )
        return self.layers.index(name)

    # ------------------------------------------------------------ making one

    @classmethod
    def of(
        cls,
        values: Floats,
        layers: list[str],
        stats: tuple[str, ...],
        *,
        steps: Ints,
        unmeasured: dict[str, str] | None = None,
        samples: list[Trace] | None = None,
        meta: dict[str, Any] | None = None,
        **columns: Any,
    ) -> Trace:
        """A trace whose steps are all of its run, so that totals follow; `columns` are its other arrays with steps."""
        ran = values[:, :, stats.index("count")] > 0
        parts = fields_of(values, stats)
        with np.errstate(over="ignore", invalid="ignore"):  # numbers in files of v0.1 may be anything
            totals = rows.combine(parts) if len(values) else np.zeros((len(layers), len(layout.FIELDS)))
            mean, std = (np.where(ran, values[:, :, stats.index(name)], 0.0).sum(0) for name in ("mean", "std"))
        absent = {each.name: each.absent(ran) for each in COLUMNS if each.absent is not None}
        return cls(
            values=values,
            layers=list(layers),
            stats=stats,
            steps=np.asarray(steps, dtype=np.int64),
            totals=stats_of(totals, stats),
            averages=np.stack([ran.sum(0).astype(np.float64), mean, std], axis=-1),
            unmeasured=dict(unmeasured or {}),
            samples=samples or [],
            meta=dict(meta or {}),
            **{**absent, **columns},
        )

    # ------------------------------------------------------------ files

    def save_v01(self, folder: files.PathLike, *, single_file: bool = False, compress: bool = True) -> list[Path]:
        """Write the files of noesis v0.1 into a folder: one per step, or a single one."""
        kept = [self.stats.index(name) for name in v01.STATS]
        run = v01.Run(
            run_id=str(self.meta.get("run", "noesis")),
            meta=self.meta,
            layers=self.layers,
            steps=self.steps.tolist(),
            values=self.values[:, :, kept],
            counts=self["count"],
        )
        return v01.write_run(run, folder, single_file=single_file, compress=compress)

    @classmethod
    def load(cls, path: files.PathLike, run: str | None = None) -> Trace:
        """Read what `save` wrote, or a trace of noesis v0.1.

        Args:
            path: a file, or a folder that holds `trace.safetensors`, `trace.json` or files of v0.1.
            run: which run, where files of v0.1 of several runs share the folder.

        Raises:
            NoesisError: when it is not there, broken, of another format or version, or of several runs.
        """
        path = Path(path)
        if path.is_dir():
            for name in ("trace.safetensors", "trace.json", "trace.json.gz"):
                if (path / name).is_file():
                    return cls.load(path / name)
            if not v01.trace_files(path):
                raise MissingFile(
                    f"{path} holds no trace", "trace.safetensors, trace.json or v0.1 files", "Check the path"
                )
            return cls._from_v01(v01.read_run(path, run))
        return cls._read(files.read_contents(path, cls.kind, numbers=cls.numbers), run)

    @classmethod
    def _read(cls, contents: files.Contents, run: str | None = None) -> Trace:
        if v01.looks_like(contents.header):
            return cls._from_v01(v01.run_of(contents.header, Path(contents.path), run))
        return cls._of(contents)

    def _header(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "stats": list(self.stats),
            **to_header(self),
            "dropped_steps": self.dropped_steps,
            "unmeasured": self.unmeasured,
            "samples": len(self.samples),
            "sample_meta": self.sample_meta(),
            "meta": self.meta,
        }

    def _arrays(self, prefix: str = "") -> files.Arrays:
        arrays = {prefix + name: array for name, array in to_arrays(self).items()}
        for index, sample in enumerate(self.samples):
            arrays |= sample._arrays(f"sample{index}.")
        return arrays

    def sample_meta(self) -> list[dict[str, Any]]:
        """Of each sample what its meta has beyond, or otherwise than, that of the run."""
        whole = self.meta
        return [{k: v for k, v in each.meta.items() if k not in whole or whole[k] is not v} for each in self.samples]

    def after(self, earlier: Trace) -> Trace:
        """The same run with what came before it, of which only the totals are kept; layers and statistics are alike."""
        places = {name: at for at, name in enumerate(earlier.layers)}
        order = [places[name] for name in self.layers]
        stats = [earlier.stats.index(name) for name in self.stats]
        parts = [fields_of(totals, self.stats) for totals in (earlier.totals[np.ix_(order, stats)], self.totals)]
        return replace(
            self,
            totals=stats_of(rows.combine(np.stack(parts)), self.stats),
            averages=earlier.averages[order] + self.averages,
            dropped_steps=earlier.dropped_steps + self.dropped_steps,
            meta={**self.meta, "resumed": earlier.meta.get("run")},
        )

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), "arrays": {name: array.tolist() for name, array in self._arrays().items()}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Trace:
        given = dict(payload["arrays"])
        # One by one, so that lists of numbers are gone when the next array is made.
        return cls._from_arrays({name: np.asarray(given.pop(name), dtype=np.float64) for name in list(given)}, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any], prefix: str = "") -> Trace:
        layers, stats = [str(name) for name in header["layers"]], tuple(str(name) for name in header["stats"])
        if not set(ALWAYS) <= set(stats) or len(set(layers)) != len(layers):
            raise ValueError("stats or layers do not fit")
        columns = from_file(arrays, header, len(layers), stats, prefix)
        whole(columns["averages"][:, 0], "averages")
        return cls(
            layers=layers,
            stats=stats,
            dropped_steps=max(0, int(header["dropped_steps"])),
            unmeasured={str(name): str(why) for name, why in header["unmeasured"].items()},
            meta=dict(header["meta"]),
            samples=[
                cls._from_arrays(arrays, each, f"sample{index}.") for index, each in enumerate(_sample_headers(header))
            ],
            **columns,
        )

    @classmethod
    def _from_v01(cls, run: v01.Run) -> Trace:
        values = np.full((*run.counts.shape, len(ALWAYS)), np.nan)
        values[:, :, ALWAYS.index("count")] = run.counts
        values[:, :, ALWAYS.index("nonfinite")] = 0.0
        for index, name in enumerate(v01.STATS):
            values[:, :, ALWAYS.index(name)] = run.values[:, :, index]
        meta = {**run.meta, "run": run.run_id, "source": "noesis v0.1"}
        return cls.of(values, run.layers, ALWAYS, steps=np.array(run.steps, dtype=np.int64), meta=meta)

    # ------------------------------------------------------------ showing

    def _columns(self) -> dict[str, Cells]:
        return to_table(self)

    def plot(
        self,
        stat: str = "std",
        path: files.PathLike | None = None,
        *,
        scale: Literal["all", "layer"] = "all",
        order: Literal["run", "names"] = "run",
    ) -> Figure:
        """A heat map of one statistic, steps across and layers down; needs the extra `viz`.

        Where a layer gave NaN or infinity the cell is red and crossed, were it one element in a million; where it did
        not run, it is grey. Steps of a denoiser have their timesteps.

        Args:
            stat: one of `stats`.
            path: where to write it too, as `.png`, `.svg` or `.pdf`.
            scale: of colours: `"all"` for one, or `"layer"` for one per layer, which shows what changes in each.
            order: of the layers: `"run"` as they run, or `"names"` as in `layers`.

        Raises:
            NoesisError: for an unknown statistic, scale, order or suffix, when there are no steps, or matplotlib is
                missing.
        """
        return draw_trace(self, stat, path, scale, order)

    def __repr__(self) -> str:
        return text_of(self)


def _span(steps: Ints) -> str:
    return f"steps {steps.min()} to {steps.max()}" if len(steps) else "no steps"


def _wrap_hint(name: str) -> str:
    return f"Pass wrap(..., stats=[{name!r}]) before the run" if name in OPTIONAL else "Check the name"


def _sample_headers(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    number, alone = int(header["samples"]), {**header, "samples": 0, "sample_meta": []}
    own = header.get("sample_meta")
    if own is not None and len(own) != number:
        raise ValueError(f"{number} samples, and meta of {len(own)}")
    # One by one: a file may claim any number, and the first that is not there is an error.
    for each in repeat({}, number) if own is None else own:  # older files have none
        yield {**alone, "meta": {**header["meta"], **each}}
