"""What the host knows of the forwards of a run, so that those which left no mark on the device are not missed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from ..errors import NoesisWarning
from ..text import counted


@dataclass
class Evidence:
    """Forwards of a run that the host heard of, in other ways than by the marks they leave."""

    inside: bool = False  # whether Dynamo compiled layers inside a forward that the host began
    compiled_at: int | None = None  # eager forwards by the time that Dynamo last traced the model to run it
    passed: dict[str, int] = field(default_factory=dict)  # forwards that were none of ours, by reason
    calls: int = 0  # of the container
    unreached: bool = False  # whether the model was compiled in a way that noesis cannot get in between
    said: bool = False
    told: set[str] = field(default_factory=set)  # layers that were named because they have no rows per sample

    def afresh(self) -> Evidence:
        """That of the next run."""
        return Evidence(inside=self.inside, unreached=self.unreached)

    def passed_by(self, why: str) -> None:
        """A forward of the root was none of ours."""
        self.passed[why] = self.passed.get(why, 0) + 1

    def left_no_mark(self, forwards: int, eager: int, measured: bool) -> str | None:
        """Why forwards that must have been are not among those that the device has counted.

        Args:
            forwards: that the device has counted.
            eager: those of them that the host began.
            measured: whether any layer has a row.

        Returns:
            A reason, or None where nothing is amiss.
        """
        if self.compiled_at == eager == forwards:  # neither eager nor compiled forwards since
            return "the model was compiled, and no forward of what was made of it left a mark"
        if self.inside and forwards and not measured:
            return "layers were compiled, and none of them left a mark"
        if forwards == 0 and self.passed:
            told = ", ".join(f"{times} {what}" for what, times in self.passed.items())
            return f"forwards of the model were left out ({told})"
        if forwards == 0 and self.unreached:
            return "the model was compiled before wrapping, and this torch does not tell how to have it begin steps"
        if forwards == 0 and self.calls:
            return f"the model returned {self.calls} times, but was not called as noesis left it"
        return None

    def say(self, reason: str) -> None:
        """Warn, once in a run, of forwards that left no mark."""
        self._warn(
            f"Not every forward was recorded: {reason}. Wrap before compiling, or run the model uncompiled; "
            'loguru.logger.enable("noesis") tells what this version of torch lacks'
        )

    def say_open(self, layer: str, calls: int) -> None:
        """Warn, once in a run, of layers that ran in no forward."""
        self._warn(
            f"Layers ran by themselves (layer {layer!r} {counted(calls, 'time')}), and no forward of the model or of "
            "one of its parts did: all calls are one step, which stays open until there is one. Wrap the module that "
            "is called"
        )

    def say_without_samples(self, layers: list[str]) -> None:
        """Name layers without rows per sample, each once in a run."""
        fresh = [name for name in layers if name not in self.told]
        if fresh:
            self.told.update(fresh)
            warnings.warn(
                f"There are no rows per sample of {', '.join(fresh)}: the samples of the batch are not what their "
                "outputs have along the first dimension, or nothing says how many there are, as in calls between "
                "forwards. The rows of the whole are right",
                NoesisWarning,
                stacklevel=4,
            )

    def _warn(self, message: str) -> None:
        if not self.said:
            self.said = True
            warnings.warn(message, NoesisWarning, stacklevel=5)
