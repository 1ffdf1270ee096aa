"""The container that answers questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from loguru import logger
from torch import nn

from ..distributed import merge_over
from ..errors import BadValue, NoesisError, WrongState
from ..files import writer
from ..internals import compiled, passed_over, rebind, undisturbed, untraced
from ..layers import named_layers
from ..observing import Recorder, Weights, detach, site_of
from ..results import STATS, ParameterNorms, Routes, Soulprint, Trace, scalars, under
from .with_codebooks import WithCodebooks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Wrapped(WithCodebooks, nn.Module):  # type: ignore[override]  # forward is the model's
    """A model under observation: runs as the model does, and tells what happened.

    Everything that is not noesis' own is the model's: attributes, parameters, `state_dict()` with the model's keys,
    `train()`, `to()`, `generate()`, and `len()`, indexing, `with` where the model has them. noesis' own are the public
    methods below, `every`, `observed_model` and `observed_layers`; `model`, `layers`, `codebooks` and `calibration` are
    noesis' where the model has no attribute of that name. Around a pipeline, what the pipeline lacks is its denoiser's.

    Attributes:
        observed_model: the model itself, the very object that was given.
        observed_layers: names of the observed layers.

    Examples:
        >>> import torch, noesis
        >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()))
        >>> list(wrapped.state_dict())
        ['0.weight', '0.bias']
        >>> with wrapped.run(note="first"):
        ...     _ = wrapped(torch.ones(1, 4))
        >>> wrapped.trace().meta["note"]
        'first'
    """

    def __init__(self, model: nn.Module, root: nn.Module, recorder: Recorder, pipeline: Any = None) -> None:
        # No nn.Module.__init__: parameters, buffers, children and hooks are the model's, not copies.
        self.__dict__.update(observed_model=model, _root=root, _recorder=recorder, _pipeline=pipeline)
        self._take_class()
        if pipeline is not None:
            pipeline.attach(recorder)

    # ------------------------------------------------------------ answers

    @property
    def observed_layers(self) -> list[str]:
        """Names of the observed layers, in the order of `named_modules()`."""
        return list(self._recorder.names)

    @property
    def layers(self) -> Any:
        """The model's own attribute `layers`; where it has none, `observed_layers`."""
        return self._yield("layers", lambda: self.observed_layers)

    @property
    def model(self) -> Any:
        """The model's own attribute `model`; where it has none, `observed_model`."""
        return self._yield("model", lambda: self.observed_model)

    @property
    def every(self) -> int:
        """Every n-th forward is observed; may be set at any time, and recompiles nothing.

        Raises:
            NoesisError: when set to less than 1.
        """
        every: int = self._recorder.every
        return every

    @every.setter
    def every(self, every: int) -> None:
        check_numbers(every=every)
        self._recorder.set_every(every)

    @untraced
    def trace(self, *, group: ProcessGroup | None = None, timeout: float = 60.0) -> Trace:
        """What happened since the run began: statistics per step and layer.

        Args:
            group: merge over the ranks of this process group, each of which has to make the same call; all get the
                same trace, see `noesis.distributed.merge`. By default nothing is sent, and the trace is this
                process' own; `torch.distributed.group.WORLD` is all ranks.
            timeout: seconds to wait for the other ranks.

        Raises:
            NoesisError: when ranks do not come in time, by number.
        """
        return self._told(self._recorder.trace(), self._recorder.earlier, group, timeout)

    @untraced
    def gradients(self, *, group: ProcessGroup | None = None, timeout: float = 60.0) -> Trace:
        """The same of the gradients by each layer's output, with `wrap(..., gradients=True)`.

        A step is a forward, as in `trace()`; its row is of all backward passes through it. Layers whose output no
        gradient was asked for are among `never_ran`. With a `GradScaler`, gradients are those of the scaled loss.

        Args:
            group: merge over these ranks, as in `trace`.
            timeout: seconds to wait for the other ranks.

        Raises:
            NoesisError: without `gradients=True`.

        Examples:
            >>> import torch, noesis
            >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), gradients=True)
            >>> wrapped(torch.ones(3, 4)).sum().backward()
            >>> wrapped.gradients().layer("1")[0, 1].item()  # the mean of the first step
            1.0
        """
        if self._recorder.gradients is None:
            raise WrongState(
                "Gradients are not observed", "a model that is wrapped for it", "wrap(..., gradients=True)"
            )
        trace: Trace = self._recorder.gradients.trace()
        trace.meta |= {**self._recorder.meta, "of": "gradients"}
        names = [f"{name}." for name, module in self._root.named_modules() if compiled(module)]
        for name in trace.never_ran:
            if name in self._recorder.unmeasured:
                trace.unmeasured[name] = self._recorder.unmeasured[name]
            elif self._recorder.runs_compiled() or name.startswith(tuple(names)):
                trace.unmeasured[name] = "no gradient that eager code gave: compiled code gives none"
        if self._recorder.runs_compiled():
            calls = dict(zip(trace.layers, self._recorder.trace().calls.sum(0).tolist(), strict=True))
            for name, given in zip(trace.layers, trace.calls.sum(0).tolist(), strict=True):
                if 0 < given < calls[name]:
                    why = f"{given} gradients of {calls[name]} calls: compiled code gives none"
                    trace.unmeasured.setdefault(name, why)
        return self._told(trace, self._recorder.gradients.earlier, group, timeout)

    def weigh(self, every: int = 10) -> None:
        """Measure all parameters, their gradients and their updates, with `wrap(..., parameters=True)`.

        In a training loop the place is after `optimiser.step()` and before `zero_grad()`, and at most of the steps it
        does nothing: of the calls in a run the first measures, and every n-th after it. An update is the difference
        to the call before, of which a copy of the trainable parameters is kept on their device. Nothing waits
        for the device; of parameters that are sharded (FSDP2) each rank measures its part.

        Args:
            every: the calls from one measuring to the next; 1 to measure now, at a cost that the guide to costs tells.

        Raises:
            NoesisError: without `parameters=True`, or when `every` is no whole number from 1.
        """
        weights = self._weights()
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise BadValue(f"every={every!r}", "a whole number from 1", "Pass every=1 to measure at each call")
        if not self._recorder.paused:
            weights.ask(dict(self._root.named_parameters()), self._recorder.forwards, every)

    def parameter_norms(self) -> ParameterNorms:
        """Norms of parameters and gradients, and update-to-weight ratios, at the times of this run that were weighed.

        Raises:
            NoesisError: without `parameters=True`.
        """
        return self._weights().norms(self._recorder.meta)

    def _weights(self) -> Weights:
        weights = self._recorder.weights
        if not isinstance(weights, Weights):
            raise WrongState(
                "Parameters are not measured", "a model that is wrapped for it", "wrap(..., parameters=True)"
            )
        return weights

    def _told(self, trace: Trace, earlier: Trace | None, group: ProcessGroup | None, timeout: float) -> Trace:
        for name in self._replaced():
            trace.unmeasured[name] = "another module took its place after wrapping; unwrap and wrap again"
        if group is None:
            return trace if earlier is None else trace.after(earlier)
        with undisturbed():
            return merge_over(trace, earlier, group, timeout)

    @untraced
    def routes(self) -> Routes:
        """Where the routers of a Mixture-of-Experts model sent the run's tokens.

        Raises:
            NoesisError: when no router is observed (wrap with `layers="routers"`), or nothing ran.
        """
        routes: Routes = self._recorder.routes()
        return routes

    def _replaced(self) -> list[str]:
        """Layers whose observed module has left the model: an adapter took its place, say."""
        if not self._recorder.attached:
            return []
        sites = [site for _, module in named_layers(self._root) if (site := site_of(module)) is not None]
        there = {row.name for site in sites if site.recorder is self._recorder for row in site.rows}
        return [name for name in self._recorder.names if name not in there and name not in self._recorder.unmeasured]

    def soulprint(self, *, group: ProcessGroup | None = None, timeout: float = 60.0) -> Soulprint:
        """The run as one vector; see `Trace.soulprint`, and `trace` for the arguments."""
        return self.trace(group=group, timeout=timeout).soulprint()

    def forward_with_trace(self, *args: Any, **kwargs: Any) -> tuple[Any, Trace]:
        """Run the model once; returns its output and the trace of this call alone, with its scores if there are codes.

        Where there can be no scores yet, `trace.surprise` is None, and `surprise()` says why.

        Raises:
            NoesisError: while paused, or when `every` leaves this forward out.
        """
        forwards, _ = self._recorder.forward_counts()
        run = self._recorder.meta["run"]
        output = self.observed_model(*args, **kwargs)
        fresh = self._recorder.meta["run"] != run  # a pipeline begins one at every call
        latest = self._recorder.trace(since=0 if fresh else forwards)
        if not len(latest):
            raise WrongState(
                "This forward was not observed", "a forward that is", "Leave paused(), or wrap with every=1"
            )
        latest.steps = latest.steps - latest.steps[0]  # this call's first step is step 0
        if self._recorder.scorer is not None:
            try:
                latest.surprise = self.surprise()
            except NoesisError as error:  # the output is not lost for that
                logger.warning("There are no scores of this forward: {}", error)
        return output, latest

    @untraced
    def log_to(
        self,
        target: Any,
        step: int | None = None,
        *,
        layers: Literal["aggregate", "each"] | Sequence[str] = "aggregate",
        stats: Sequence[str] = STATS,
    ) -> dict[str, float]:
        """Write what the latest forward came down to: statistics, code lengths, usage of codes, quantiles of surprise.

        Reading it waits for the device. Forwards that `every` leaves out write nothing; after a forward inside
        `paused()` the one before is written again.

        Args:
            target: a path ending in `.csv` or `.jsonl`, or an object with `log(dict, step=...)` (Weights & Biases,
                Trackio), `log_metrics` (MLflow, Lightning) or `add_scalar` (TensorBoard).
            step: number of the step for the logger; by default that of the forward.
            layers: `"aggregate"` over all layers, `"each"` of them, or the names of some; see `noesis.results.scalars`.
            stats: which statistics.

        Returns:
            What was written, by keys such as `noesis/<layer>/<stat>`.

        Raises:
            NoesisError: for a target, a layer or a statistic that is not known, or a CSV whose columns are others.

        Examples:
            >>> import tempfile, torch, noesis
            >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8)))
            >>> _ = wrapped(torch.ones(2, 4))
            >>> path = tempfile.mkdtemp() + "/run.jsonl"
            >>> wrapped.log_to(path)["noesis/layers/ran"]
            1.0
        """
        write, forwards = writer(target), self._forwards()
        trace = self._latest(self._recorder, forwards)
        if not len(trace):
            return {}
        scorer, channels = self._recorder.scorer, self._recorder.channels
        books = {} if scorer is None else scorer.books
        judged = channels is not None and channels.left(forwards) and all(book.ready for book in books.values())
        found = scalars(trace, self.surprise() if judged else None, books, layers=layers, stats=stats)
        if self._recorder.gradients is not None:
            gradients = self._latest(self._recorder.gradients, forwards)
            if len(gradients) and gradients.calls.any():
                found |= under("gradients", scalars(gradients, layers=layers, stats=stats))
        if isinstance(weights := self._recorder.weights, Weights):
            if weights.asked_at != self._recorder.forwards and not self._recorder.paused:
                weights.weigh(dict(self._root.named_parameters()), self._recorder.forwards)
            if weights.weighed_at == self._recorder.forwards:
                found |= self.parameter_norms().scalars(layers)
        write(found, forwards - 1 if step is None else step)
        return found

    @staticmethod
    def _latest(recorder: Recorder, forwards: int) -> Trace:
        """The step of the latest forward, if it was observed, and not what was called since."""
        trace: Trace = recorder.trace(since=forwards - 1)
        return trace.at(trace.steps == forwards - 1)

    # ------------------------------------------------------------ runs

    def reset(self) -> None:
        """Forget what was recorded and begin afresh; inside `run(**meta)`, with the same meta."""
        self._recorder.reset(self._recorder.given if self._recorder.named_run else {})

    @contextmanager
    def run(self, **meta: Any) -> Iterator[Wrapped]:
        """Begin a fresh run; `meta` is in every trace and soulprint of it.

        Raises:
            NoesisError: inside another run of the same model.
        """
        if self._recorder.named_run:
            raise WrongState("A run of this model is going on", "one run at a time", "Leave its with block first")
        self._recorder.reset(meta)
        self._recorder.named_run = True
        try:
            yield self
        finally:
            self._recorder.named_run = False

    @contextmanager
    def paused(self) -> Iterator[Wrapped]:
        """Observe nothing inside; these forwards are no steps either. Pauses may overlap; a copy is not paused."""
        self._recorder.pauses += 1
        self._recorder.pause(True)
        try:
            yield self
        finally:
            self._recorder.pauses -= 1
            self._recorder.pause(self._recorder.pauses > 0)

    def unwrap(self) -> Any:
        """Give every module its class back; returns the model, or the pipeline. What was recorded can still be read."""
        kept = [module for ref in self._recorder.observed if (module := ref()) is not None]
        detach([*self._root.modules(), *kept], self._recorder.family)  # copies too, and what has left the model since
        self._recorder.attached = False
        rebind(self.observed_model)
        if self._pipeline is not None:
            self._pipeline.detach()
        return self.observed_model

    # ------------------------------------------------------------ being called

    @passed_over
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, or the pipeline."""
        output = self.observed_model(*args, **kwargs)
        if self._recorder.attached and not torch.compiler.is_compiling():
            self._recorder.returned()
        return output

    def __repr__(self) -> str:
        observed, total = len(self._recorder.names), sum(1 for _ in self._root.modules())
        name = type(self._root).__name__
        return f"Wrapped({name}: {observed} of {total} modules observed, {few(self._recorder.names)})"


def check_numbers(**numbers: Any) -> None:
    """Refuse what is no number from 1, by the name of its argument."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
            raise BadValue(
                f"{name}={value!r}", "a whole number from 1, below 2**31", f"Leave {name} out for its default"
            )


def few(names: list[str]) -> str:
    """Names on one line: the first and the last of many."""
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
