"""What a run is to those who compare runs: anything that can tell its averages, or its steps."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from ..numerics import Floats, Ints


@runtime_checkable
class Averaged(Protocol):
    """A run averaged over its steps, as `Soulprint` is: float64 [layers]."""

    means: Floats
    stds: Floats
    layers: list[str]
    meta: dict[str, Any]


class Stepwise(Protocol):
    """The statistics of layers step by step; see `Trace` for the shapes."""

    values: Floats
    layers: list[str]
    stats: tuple[str, ...]
    steps: Ints
    order: Ints
    calls: Ints
    dropped_steps: int
    meta: dict[str, Any]

    def __len__(self) -> int:
        """How many steps there are."""
        ...


@runtime_checkable
class Recorded(Stepwise, Protocol):
    """A run step by step, as `Trace` is."""

    timesteps: Floats

    def at(self, keep: Any) -> Recorded:
        """Some of its steps alone; `keep` is a mask over the steps."""
        ...

    def soulprint(self) -> Averaged:
        """The run as one vector."""
        ...


class Answering(Protocol):
    """Something with a trace, such as what `noesis.wrap` returns."""

    def trace(self) -> Recorded:
        """What happened."""
        ...
