"""The Trainer of transformers: numbers from inside the model in its log, and alarms."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..errors import NoesisWarning
from ..wrapping import RunState
from .callbacks import Callback


class NoesisCallback(Callback):
    """A callback for the Trainer of transformers, which logs what layers do and looks for alarms.

    Forwards of evaluations during training are not observed. In a run of many processes each looks at its own part
    of the batch, and the first one logs. Checkpoints hold the state of the run (`noesis.RunState`) in `noesis.json`.

    Args:
        wrapped: what `noesis.wrap` returned for the trainer's model.
        target: what `wrapped.log_to` takes; or the Trainer, for all that it reports to
            (`trainer.add_callback(NoesisCallback(wrapped, trainer))`); by default the numbers are in
            `trainer.state.log_history`, which checkpoints hold, beside the trainer's own.
        every: optimizer steps between two readings, each of which waits for the device; by default `logging_steps`.
        alarms: `noesis.Alarms(wrapped)`, checked as often, and when training ends.
        layers: as in `wrapped.log_to`.
        stats: as in `wrapped.log_to`.

    Raises:
        NoesisError: when an argument is of another kind or out of range.

    Examples:
        >>> import torch, noesis
        >>> from noesis.integrations.trainer import NoesisCallback
        >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)))  # or a model of transformers
        >>> callback = NoesisCallback(wrapped, every=50, alarms=noesis.Alarms(wrapped))
        >>> # transformers.Trainer(model=wrapped, ..., callbacks=[callback]).train()
    """

    @staticmethod
    def reports(target: Any) -> bool:
        """Whether a target is a Trainer."""
        return hasattr(target, "callback_handler") and callable(getattr(target, "log", None))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the totals of the run beside the checkpoint; each process its own."""
        RunState(self.wrapped).save(_beside(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint's totals, if training does from the checkpoint."""
        if not state.global_step:
            return
        path = _beside(args, state)
        if path.is_file():
            RunState(self.wrapped).load(path)
        elif self.wrapped._recorder.earlier is None:
            warnings.warn(
                f"{path} is not there, so totals begin at step {state.global_step}. To go on from a checkpoint that "
                "lies elsewhere, call noesis.RunState(wrapped).load(path) before train().",
                NoesisWarning,
                stacklevel=2,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on observing after an evaluation."""
        self.resume()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weigh the parameters while their gradients are there, if this step is one to log."""
        if self._due(state.global_step + 1, state):
            self.weigh()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log and look for alarms, if it is time to."""
        if self._due(state.global_step, state):
            target = self.target
            if target is None or self.reports(target):
                target = _Log(target, state, control)
            self.look(target if state.is_world_process_zero else None, state.global_step)
        self.on_epoch_end(args, state, control)

    def _due(self, step: int, state: Any) -> bool:
        return step % max(1, int(self.every or state.logging_steps)) == 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look away if an evaluation follows."""
        if control.should_evaluate:
            self.pause()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for alarms in the last steps."""
        self.resume()
        self.look(None, state.global_step)


def _beside(args: Any, state: Any) -> Path:
    rank = f"_{args.process_index}" if args.process_index else ""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"noesis{rank}.json"


class _Log:
    """The log of a Trainer, and what it reports to."""

    def __init__(self, trainer: Any, state: Any, control: Any) -> None:
        self.trainer, self.state, self.control = trainer, state, control

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Log as the trainer does."""
        if self.trainer is None:
            self.state.log_history.append({**numbers, "epoch": self.state.epoch, "step": step})
            return
        due = self.control.should_log
        self.trainer.log(numbers)
        self.control.should_log = due  # the trainer's own numbers are still to come
