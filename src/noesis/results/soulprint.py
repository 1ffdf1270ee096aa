"""Soulprint: which run it was, as one vector of fixed length."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from .. import files
from ..errors import BadValue
from ..files import v01
from ..numerics import Floats, Ints
from ..text import counted, plain, table
from .comparing import compare
from .comparison import Comparison
from .saved import Saved, list_of
from .tabular import Cells, Tabular

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False, repr=False)
class Soulprint(Saved, Tabular):
    """Each layer's mean and standard deviation, averaged over the steps of a run.

    Each step counts once. So `stds` are not those of `trace.totals`, which are of all numbers of the run: larger where
    means move from step to step, and nearer to the steps with more elements.

    As a table (`to_csv`, `to_dataframe`) it has a row per layer.

    Attributes:
        means: float64 [layers].
        stds: float64 [layers], unbiased.
        layers: dotted names.
        steps: over how many steps was averaged.
        meta: what is known of the run.
        order: int [layers], when each first ran within a step, from 1; None where that is not known.

    Examples:
        >>> import numpy as np, noesis
        >>> print_ = noesis.Soulprint(np.array([0.0, 1.0]), np.array([1.0, 2.0]), ["a", "b"])
        >>> print_.vector
        array([0., 1., 1., 2.])
    """

    kind: ClassVar[str] = "soulprint"
    numbers: ClassVar[tuple[str, ...]] = ("means", "stds")

    means: Floats
    stds: Floats
    layers: list[str]
    steps: int = 1
    meta: dict[str, Any] = field(default_factory=dict)
    order: Ints | None = None

    def __post_init__(self) -> None:
        self.means = np.asarray(self.means, dtype=np.float64)
        self.stds = np.asarray(self.stds, dtype=np.float64)
        self.layers = [str(name) for name in self.layers]
        shapes = {self.means.shape, self.stds.shape, (len(self.layers),)}
        if len(shapes) != 1 or len(set(self.layers)) != len(self.layers):
            raise BadValue(
                f"means {self.means.shape}, stds {self.stds.shape} and {len(self.layers)} layers",
                "one mean and one std per layer, each layer named once",
                "Give arrays of one length and as many names",
            )
        if self.order is not None:
            order = np.asarray(self.order)
            if order.shape != self.means.shape or order.dtype.kind not in "iu":
                raise BadValue(
                    f"order {order.dtype.name} {order.shape} of {len(self.layers)} layers",
                    "a whole number of 64 bits per layer",
                    "Leave out order",
                )
            self.order = order.astype(np.int64)

    @property
    def vector(self) -> Floats:
        """`concat(means[0:L], stds[0:L])`, float64 [2 * layers]."""
        return np.concatenate([self.means, self.stds])

    def compare(self, other: Soulprint, **options: Any) -> Comparison:
        """What changed from this one to the other: `noesis.compare(self, other, **options)`."""
        return compare(self, other, **options)

    def save_v01(self, path: files.PathLike) -> Path:
        """Write the soulprint JSON of noesis v0.1."""
        run = str(self.meta.get("run", "noesis"))
        return v01.write_soulprint(v01.Print(run, self.meta, self.layers, self.means, self.stds, self.steps), path)

    @classmethod
    def load(cls, path: files.PathLike) -> Soulprint:
        """Read what `save` wrote, or a soulprint of noesis v0.1.

        Args:
            path: a file, or a folder that holds `soulprint.safetensors` or `soulprint.json`.

        Raises:
            NoesisError: when it is not there, broken, of another format or of another version.
        """
        path = Path(path)
        if path.is_dir():
            named = [path / f"soulprint{suffix}" for suffix in (".safetensors", ".json", ".json.gz")]
            path = next((name for name in named if name.is_file()), named[0])
        return super().load(path)

    @classmethod
    def _read(cls, contents: files.Contents) -> Soulprint:
        if v01.looks_like(contents.header):
            return cls._from_v01(v01.print_of(contents.header, Path(contents.path)))
        return cls._of(contents)

    @classmethod
    def _from_v01(cls, old: v01.Print) -> Soulprint:
        meta = {**old.meta, "run": old.run_id, "source": "noesis v0.1"}
        return cls(old.means, old.stds, old.layers, old.steps, meta)

    def _header(self) -> dict[str, Any]:
        layout = "concat(means[0:L], stds[0:L])"
        known = {} if self.order is None else {"order": self.order.tolist()}
        return {"layers": self.layers, "steps": self.steps, **known, "vector_layout": layout, "meta": self.meta}

    def _arrays(self) -> files.Arrays:
        return {"means": self.means, "stds": self.stds}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), "means": self.means.tolist(), "stds": self.stds.tolist()}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Soulprint:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Soulprint:
        means, stds = (np.asarray(arrays[name], dtype=np.float64) for name in ("means", "stds"))
        if not isinstance(header["layers"], list) or type(header["steps"]) is not int:
            raise TypeError("layers has to be a list, steps a whole number")
        order = np.array(list_of(int, header["order"])) if "order" in header else None
        return cls(means, stds, header["layers"], header["steps"], dict(header["meta"]), order)

    def _columns(self) -> dict[str, Cells]:
        return {"layer": self.layers, "mean": self.means, "std": self.stds}

    def plot(
        self,
        other: Soulprint | None = None,
        path: files.PathLike | None = None,
        *,
        order: Literal["run", "names"] = "run",
    ) -> Figure:
        """Bars of mean and std per layer, beside those of another run if given; needs the extra `viz`.

        Args:
            other: another run; the two are named by what differs in their meta.
            path: where to write it too, as `.png`, `.svg` or `.pdf`.
            order: of the layers: `"run"` as they run, if that is known, or `"names"` as in `layers`.
        """
        from ..plots import bars

        return bars([self] if other is None else [self, other], path, order=order)

    def __repr__(self) -> str:
        head = f"Soulprint of {counted(len(self.layers), 'layer')} over {counted(self.steps, 'step')}"
        keys = ("model", "prompt", "seed", "sample", "branch", "run")
        known = [f"{key}={plain(str(self.meta[key]))}" for key in keys if self.meta.get(key) is not None]
        lines = [
            [name, f"{mean:.4g}", f"{std:.4g}"]
            for name, mean, std in zip(self.layers, self.means, self.stds, strict=True)
        ]
        return "\n".join([head + (f" ({', '.join(known)})" if known else ""), table(["layer", "mean", "std"], lines)])
