"""Lightning: numbers from inside the model for its loggers, alarms, and totals that checkpoints carry."""

from __future__ import annotations

from typing import Any

import torch

from ..wrapping import RunState
from .callbacks import Callback


class NoesisCallback(Callback):
    """A callback for the Trainer of Lightning 2.6 and later (`lightning` or `pytorch_lightning`), given in a list.

    It logs what layers do, looks for alarms, and puts the totals of the run into checkpoints. Wrap what `training_step`
    calls, `noesis.wrap(module.net)` say: Lightning does not call the module itself. Forwards of validation during
    training are not observed.

    Args:
        wrapped: what `noesis.wrap` returned.
        target: what `wrapped.log_to` takes; by default the loggers of the trainer.
        every: optimizer steps between two readings, each of which waits for the device; by default
            `log_every_n_steps`.
        alarms: `noesis.Alarms(wrapped)`, checked as often, and when training ends.
        layers: as in `wrapped.log_to`.
        stats: as in `wrapped.log_to`.

    Raises:
        NoesisError: when an argument is of another kind or out of range.

    Examples:
        >>> import torch, noesis
        >>> from noesis.integrations.lightning import NoesisCallback
        >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)))  # module.net
        >>> callback = NoesisCallback(wrapped, every=50, alarms=noesis.Alarms(wrapped))
        >>> # lightning.Trainer(callbacks=[callback]).fit(module)
    """

    state_key = _legacy_state_key = "noesis.NoesisCallback"
    _read_at = 0  # the optimizer's step; those of accumulated gradients come several times

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Log and look for alarms, if it is time to."""
        step = int(trainer.global_step)
        if step != self._read_at and step % max(1, self.every or trainer.log_every_n_steps) == 0:
            self._read_at = step
            target = _Loggers(trainer) if self.target is None else self.target
            self.look(target if trainer.is_global_zero else None, step)

    def on_validation_start(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Look away."""
        if trainer.state.fn == "fit":
            self.pause()

    def on_validation_end(self, *args: Any, **kwargs: Any) -> None:
        """Go on observing."""
        self.resume()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Leave no pause behind."""
        self.resume()

    def on_train_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Look for alarms in the last steps."""
        self.look(None, int(trainer.global_step))

    # ------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint keeps, see `noesis.RunState`; of many processes that of the first, which saves it."""
        return RunState(self.wrapped).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept; of many processes the first has the totals.

        Raises:
            NoesisError: when it is of other layers or statistics.
        """
        RunState(self.wrapped).load_state_dict(state)
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            self.wrapped.reset()


class _Loggers:
    """All loggers of a trainer."""

    def __init__(self, trainer: Any) -> None:
        self.loggers = trainer.loggers

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Hand numbers to each."""
        for logger in self.loggers:
            logger.log_metrics(numbers, step)
