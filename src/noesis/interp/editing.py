"""Edits at work: applied in order, at their sites, to every forward inside of a `with` block."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from loguru import logger

from ..errors import BadType, BadValue, WrongState
from ..internals import compiled, rebind
from ..layers import parts_of
from ..observing import plain
from ..text import table
from ..wrapping import resolve
from .anatomy import Anatomy, anatomy_of
from .clock import Clock
from .editor import Editor
from .edits import Edit
from .ordering import in_order, ordered_by
from .pipelines import restarting
from .places import change_of, check_anatomy, expanded, needs_anatomy
from .sites import Asked
from .visiting import Stop, Visiting


class Editing:
    """Edits of a model, and what they have done; made by `editing`.

    Attributes:
        anatomy: of the model, once a forward has run; None where no edit needs it.
    """

    def __init__(self, model: Any, edits: Sequence[Edit], anatomy: Anatomy | None, bound: float | None) -> None:
        self._called, self._root, self._roots, self._pipeline = resolve(model)
        self._edits = in_order(edits)
        self.anatomy = anatomy
        self._bound = bound
        self._clock = Clock()
        self._visiting = Visiting(self._root, anatomy, own_thread=False)
        self._editors: dict[tuple[str, str], Editor] = {}
        self._off: set[str] = set()
        self._suspended = 0
        self._leaving = ExitStack()
        if anatomy is not None:
            check_anatomy(anatomy, self._root)
        self._asked = {name: edit.asked(self._root) for name, edit in self._edits.items()}
        self._check_compiled()

    # ------------------------------------------------------------ what there is

    @property
    def edits(self) -> list[Edit]:
        """The edits, in the order in which they are applied."""
        return list(self._edits.values())

    @property
    def names(self) -> list[str]:
        """Their names; edits without one are called after their kind and site."""
        return list(self._edits)

    @property
    def fired(self) -> dict[str, int]:
        """Name -> in how many calls of its sites an edit has applied somewhere."""
        return {name: sum(editor.fired for editor in self._of(name)) for name in self._edits}

    @property
    def changes(self) -> dict[str, float]:
        """Name -> the largest change of a vector, relative to its norm."""
        return {name: max((editor.largest for editor in self._of(name)), default=0.0) for name in self._edits}

    def _of(self, name: str) -> list[Editor]:
        return [editor for (edit, _), editor in self._editors.items() if edit == name]

    def __repr__(self) -> str:
        rows = []
        for name, edit in self._edits.items():
            editors = self._of(name)
            state = "suspended" if self._suspended else "off" if name in self._off else "on"
            calls, limited = (sum(getattr(each, what) for each in editors) for what in ("calls", "limited"))
            spent = f"{1e3 * sum(editor.seconds for editor in editors):.3g}"
            change = f"{self.changes[name]:.2g}"
            rows.append([name, edit.site, state, str(self.fired[name]), str(calls), change, str(limited), spent])
        header = ["edit", "site", "", "fired", "of calls", "largest change", "limited", "ms"]
        return f"Editing of {type(self._root).__name__}\n{table(header, rows)}"

    # ------------------------------------------------------------ which of them are on

    def on(self, name: str) -> bool:
        """Whether an edit is applied."""
        return not self._suspended and name not in self._off

    @contextmanager
    def suspended(self, *names: str) -> Iterator[None]:
        """Without any of the edits, or without those that are named, inside of the block."""
        self._check_names(names)
        before = set(self._off)
        self._off |= set(names)
        self._suspended += not names
        try:
            yield
        finally:
            self._suspended -= not names
            self._off = before

    def switch(self, name: str, on: bool) -> None:
        """Switch one edit on or off.

        Raises:
            NoesisError: (a ValueError) for a name that is not there.
        """
        self._check_names([name])
        (self._off.discard if on else self._off.add)(name)

    def reorder(self, *names: str) -> None:
        """Apply the edits in another order, all of which are named.

        Raises:
            NoesisError: (a ValueError) when one is missing, not there, or has to come after another.
        """
        self._edits = ordered_by(self._edits, names)
        self._fill()

    def restart(self) -> None:
        """Have the next forward be step 0, where neither `generate` nor a pipeline's call says that one begins."""
        self._clock.restart()

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._edits:
                raise BadValue(f"there is no edit {name!r}", f"one of {', '.join(self._edits)}", "Give edits names")

    # ------------------------------------------------------------ at work

    def __enter__(self) -> Editing:
        for stop in self._clocked():
            stop.generation = self._clock.generation
        if any(edit.steps is not None for edit in self._edits.values()):
            device = next((tensor.device for tensor in self._root.parameters()), None)
            if device is not None and self._is_compiled():
                self._clock.ticks_on(device)
        self._fill()
        with ExitStack() as entering:
            entering.callback(rebind, self._called)  # when the classes are back
            self._visiting.attach(entering)
            rebind(self._called)
            if self._pipeline is not None:
                entering.enter_context(restarting(self._pipeline.pipe, self._clock))
            self._leaving = entering.pop_all()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._leaving.close()
        if kind is None:
            self._check()

    def _clocked(self) -> list[Stop]:
        """The stops of what is called for a step: the model, or what is the model but for layers around it."""
        if self._visiting.clocked:
            return self._visiting.clocked
        parts = [part.module for part in parts_of(self._root, list(self._root.modules())[1:]) if part.whole]
        stops = [self._visiting.stop_of(module) for module in (*self._roots, *parts)]
        for stop in stops:
            stop.open = {}
            stop.begins = functools.partial(self._begins, stop)
        self._visiting.clocked = stops
        return stops

    def _begins(self, stop: Stop, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the model, or of what stands for it."""
        if any(other.running() is not None for other in self._visiting.clocked):
            return  # inside of another
        self._clock.tick(kwargs)
        if self.anatomy is None and any(map(needs_anatomy, self._asked.values())):
            self._look(stop, args, kwargs)

    def _look(self, stop: Stop, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out what the model is made of, on what it is called with first."""
        module = next(module for module, other in self._visiting.stops.items() if other is stop)
        with plain(self._root.modules()):
            self.anatomy = anatomy_of(self._root, args, dict(kwargs), call=module)
        self._visiting.anatomy = self.anatomy
        self._fill()
        self._visiting.attach(self._leaving)

    def _fill(self) -> None:
        """Put the edits where they belong, in their order."""
        self._visiting.clear()
        for name, asked in self._asked_in_order():
            if needs_anatomy(asked) and self.anatomy is None:
                continue
            for site in expanded(asked, self.anatomy):
                editor = self._editors.get((name, str(site)))
                if editor is None:
                    editor = Editor(name, self._edits[name], site, clock=self._clock, switch=self, bound=self._bound)
                    self._editors[name, str(site)] = editor
                self._visiting.add(editor, change_of(site, self.anatomy))

    def _asked_in_order(self) -> list[tuple[str, list[Asked]]]:
        return [(name, self._asked[name]) for name in self._edits]

    def _check(self) -> None:
        """What is to be said when the block is left."""
        idle = [name for name, fired in self.fired.items() if not fired]
        if idle:
            raise WrongState(
                f"{', '.join(idle)} never fired",
                "edits that apply at least once inside of the block",
                "Look at site, steps, positions, rows and when; an edit for some forwards alone needs these to run",
            )
        broken = [name for name in self._edits if any(editor.not_finite for editor in self._of(name))]
        if broken:
            raise WrongState(
                f"{', '.join(broken)} made NaN or Inf of finite numbers, which were left as they were",
                "edits that give finite numbers",
                "Look at their scale, direction or function",
            )
        for name, change in self.changes.items():
            if change == 0:
                logger.warning("the edit {} fired and changed nothing", name)

    # ------------------------------------------------------------ compiled models

    def _is_compiled(self) -> bool:
        return compiled(self._called) or any(map(compiled, self._root.modules()))

    def _check_compiled(self) -> None:
        if not self._is_compiled():
            return
        for name, edit in self._edits.items():
            if needs_anatomy(self._asked[name]) and self.anatomy is None:
                raise BadValue(
                    f"{type(self._root).__name__} is compiled, and {name} is at {edit.site!r}",
                    "the anatomy of a compiled model, found before",
                    "Pass anatomy= of the model before torch.compile, or give a module's dotted name",
                )
            if not edit.traceable:
                raise BadType(
                    f"{name} in a compiled model", "edits without a state in Python", "Run the model in eager mode"
                )


def editing(model: Any, *edits: Edit, anatomy: Anatomy | None = None, bound: float | None = None) -> Editing:
    """Edit what passes sites of a model in every forward inside of a `with` block.

    Edits are applied in their order. They hold for whatever runs the model: `generate`, a training loop, a pipeline,
    other threads, compiled code (which is compiled once more). An edit that never fired is an error when the block is
    left.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> with interp.editing(model, interp.Zero("1"), interp.Scale("2", 2.0)) as ed:
        ...     y = model(torch.ones(3, 2))
        >>> torch.equal(y[0], 2 * model[2].bias), ed.fired
        (True, {'Zero 1': 1, 'Scale 2': 1})

    Args:
        model: an `nn.Module`, the result of `noesis.wrap`, or a diffusers pipeline, of which the denoiser is edited.
        *edits: what to change; see `Zero`, `Scale`, `Add`, `Project`, `Noise`, `Patch`, `Freeze`, `Mean`, `Resample`,
            `Custom`.
        anatomy: of the model; without it, it is found in the first forward, which then costs one more.
        bound: the largest change of a vector (the last dimension of a site), as a multiple of its norm; what goes
            beyond is scaled down to it, and counted.

    Returns:
        An `Editing`, to enter; `print` shows how often each edit fired, how large the change was, and the time it took.

    Raises:
        NoesisError: (a ValueError) for a site that is not there or refused, edits that wait for each other, or what a
            compiled model cannot have; on leaving (a RuntimeError) for an edit that never fired, or made NaN.
    """
    if bound is not None and not bound > 0:
        raise BadValue(f"bound is {bound}", "a positive number, such as 0.5, or None", "Leave it out")
    return Editing(model, edits, anatomy, bound)
