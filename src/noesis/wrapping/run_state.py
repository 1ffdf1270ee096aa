"""What a checkpoint keeps of a run: its totals, what is normal, and codes that were learned."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..errors import BadFile, BadType, BadValue
from ..results import Trace
from ..surprise import pack_codes, unpack_codes
from .wrapped import Wrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


KIND = "run_state"
#: What errors call it.
WHERE = "the checkpoint's state of the run"


class RunState:
    """The state of a wrapped model's run, with `state_dict` and `load_state_dict`, for any checkpoint.

    Totals, averages (and so the soulprint) and the number of steps go on after resuming as if the run had never
    stopped; the steps themselves stay behind. Calibration and codebooks, which `state_dict()` of the model does not
    hold, come along, and so do the totals of `gradients()`. Rows per sample are not kept.

    It is a `Stateful` of `torch.distributed.checkpoint`: put it beside the model and the optimizer. In a run of many
    ranks pass `group`: the totals are merged over it as by `trace(group=...)`, so that they may be resumed on another
    number of ranks.

    Examples:
        >>> import torch, noesis
        >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)))
        >>> _ = wrapped(torch.ones(3, 4))
        >>> checkpoint = {"model": wrapped.state_dict(), "noesis": noesis.RunState(wrapped).state_dict()}
        >>> wrapped.reset()  # or another process
        >>> noesis.RunState(wrapped).load_state_dict(checkpoint["noesis"])
        >>> _ = wrapped(torch.ones(5, 4))
        >>> wrapped.trace().totals[0, 0].item(), wrapped.trace().dropped_steps
        (16.0, 1)
    """

    def __init__(self, wrapped: Wrapped, group: ProcessGroup | None = None, timeout: float = 60.0) -> None:
        """A state that is read when asked for.

        Args:
            wrapped: what `noesis.wrap` returned.
            group: merge the totals over these ranks, each of which has to save and load.
            timeout: seconds to wait for the other ranks.

        Raises:
            NoesisError: when `wrapped` is something else.
        """
        if not isinstance(wrapped, Wrapped):
            raise BadType(f"RunState({type(wrapped).__name__})", "what noesis.wrap returned", "Wrap the model first")
        self.wrapped, self.group, self.timeout = wrapped, group, timeout

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint keeps, as text: JSON, and codebooks in base64; waits for the device, and for the ranks.

        Raises:
            NoesisError: when ranks of the group do not come in time.
        """
        recorder = self.wrapped._recorder
        traces = {"trace": self.wrapped.trace(group=self.group, timeout=self.timeout)}
        if recorder.gradients is not None:
            traces["gradients"] = self.wrapped.gradients(group=self.group, timeout=self.timeout)
        run = {name: json.loads(_without_steps(trace).to_json()) for name, trace in traces.items()}
        codes = {} if recorder.scorer is None else pack_codes(recorder.scorer)
        text = {name: base64.b64encode(data).decode() for name, data in codes.items()}
        return {"run": files.dump_json(run), "codes": files.dump_json(text)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept; the run begins afresh, with these totals behind it.

        Raises:
            NoesisError: when it is something else, or of other layers, statistics or codebooks.
        """
        recorder = self.wrapped._recorder
        run, codes = _read(state)
        earlier = {"trace": (recorder, run.get("trace")), "gradients": (recorder.gradients, run.get("gradients"))}
        for ours, trace in earlier.values():
            if ours is not None and trace is not None:
                _check(trace, "layers", ours.names, shared=self.group is not None)
                _check(trace, "stats", list(ours.stats))
        if codes and recorder.scorer is not None and recorder.channels is not None:
            unpack_codes(recorder.scorer, codes, WHERE, recorder.channels.widths())
        self.wrapped.reset()
        if self.group is not None and self.group.rank() > 0:
            return  # the totals are of all ranks, and are counted once
        for ours, trace in earlier.values():
            if ours is not None:
                ours.earlier = trace

    def save(self, path: files.PathLike) -> Path:
        """Write `state_dict()` to a `.json` or `.json.gz` file, whole or not at all."""
        return files.save_json(path, KIND, self.state_dict())

    def load(self, path: files.PathLike) -> None:
        """Go on from what `save` wrote.

        Raises:
            NoesisError: when it is not there, broken, or of another wrap.
        """
        self.load_state_dict(files.check_header(files.read_json(path), KIND, path))


def _without_steps(trace: Trace) -> Trace:
    none = trace.at([False] * len(trace))
    return replace(
        none,
        totals=trace.totals,
        averages=trace.averages,
        dropped_steps=trace.dropped_steps + len(trace),
        samples=[],
    )


def _read(state: Any) -> tuple[dict[str, Trace], dict[str, bytes]]:
    try:
        run, text = (files.parsed(state[name], len(state[name]), WHERE) for name in ("run", "codes"))
        codes = {name: base64.b64decode(data, validate=True) for name, data in text.items()}
        return {name: Trace.from_json(value, WHERE) for name, value in run.items()}, codes
    except BadFile:
        raise
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise BadFile(
            f"This is no state of a run ({type(error).__name__}: {error})",
            "what RunState.state_dict returned",
            "Pass the same entry of the checkpoint",
        ) from None


def _check(trace: Trace, what: str, ours: list[str], shared: bool = False) -> None:
    theirs = list(getattr(trace, what))
    common = set(ours).intersection(theirs)
    # A rank of a group may have some of all layers.
    other = [name for name in (ours if shared else [*ours, *theirs]) if name not in common]
    if other:
        raise BadValue(
            f"The checkpoint has other {what} than the wrap: {other[0]!r} is in one of them alone",
            f"the same {what}",
            f"Wrap with the same {what}, or resume without the state of the run",
        )
