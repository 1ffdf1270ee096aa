"""`wrap`: choose layers, have them observed, and hand out the container that answers questions."""

from __future__ import annotations

import copy
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from loguru import logger
from torch import nn

from .._version import __version__
from ..distributed.traces import merge_over
from ..errors import BadType, BadValue, NoesisError, WrongState
from ..internals.compiling import compiled, inside, rebind
from ..internals.libraries import stream_index
from ..internals.modes import undisturbed
from ..layers.selecting import Layers, select
from ..observing.gradients import GradientRecorder
from ..observing.observed import become_observed, restore, site_of
from ..observing.recorder import Recorder
from ..observing.site import Site
from ..results.routes import Routes, routers
from ..results.scalars import STATS, scalars, under
from ..results.soulprint import Soulprint
from ..results.trace import ALWAYS, OPTIONAL, Trace
from ..surprise.codebook import Codebook
from ..surprise.scorer import Coder
from .with_codebooks import Judging, check_codebook, logits_module

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Samples there is room for at first with `per_sample=True`; eager code makes more when a batch needs them.
FIRST_SAMPLES = 8
#: What a denoiser's forward may call its timestep.
TIMESTEPS = ("timestep", "timesteps", "t", "sigma", "sigmas")


def wrap(
    model: Any,
    layers: Layers = "blocks",
    *,
    stats: Sequence[str] = ALWAYS,
    per_sample: bool | int = False,
    every: int = 1,
    capacity: int = 256,
    gradients: bool = False,
    codebook: Codebook | None = None,
    logits: str | Callable[[Any], Any] | None = None,
    output: Callable[[Any], Any] | None = None,
) -> Wrapped:
    """Observe chosen layers of a model, in place and reversibly, without changing what it computes.

    Args:
        model: an `nn.Module`, or a diffusers pipeline (its denoisers are taken).
        layers: what to observe: a preset (`"blocks"`, `"all"`, `"leaves"`, `"linear"`, `"conv"`,
            `"attention"`, `"mlp"`, `"norm"`, `"routers"`, `"unet"`, `"all_linear"`,
            `"first_linear"`), a dotted name, a glob, `"re:..."`, a module class, a predicate
            `(name, module) -> bool`, or a list of these.
        stats: beside count, mean, std, abs_mean, min, max and nonfinite, which are always there,
            any of `"zeros"` (number of zero elements) and `"rms"` (root mean square).
        per_sample: keep a row per batch element too. An int is the largest batch there will be,
            which compiled code has to know; eager code makes room as needed.
        every: observe every n-th forward; `wrapped.every` changes it later.
        capacity: steps the ring holds; totals and soulprint cover the whole run regardless.
        gradients: keep a row for the gradient by each layer's output too, see `wrapped.gradients()`; in eager code.
        codebook: have layers keep what `calibrate`, `surprise` and `coding_loss` need.
        logits: the module whose output are the logits, by name, or a callable from the model's output to them;
            how unsure they are then counts towards surprise.
        output: picks the tensor to measure from what a layer returns; by default its hidden state,
            that is the first floating tensor, or the image stream of dual-stream blocks.

    Returns:
        The container, which runs the model when called.

    Raises:
        NoesisError: when `layers` selects nothing, a statistic is unknown, a number is out of
            range, a layer cannot be observed, or the model is wrapped already with other settings.

    Example:
        >>> import torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> wrapped = noesis.wrap(model, layers="linear")
        >>> wrapped(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        >>> wrapped.trace()["count"]
        array([[24.,  6.]])
        >>> wrapped.unwrap() is model
        True
    """
    kept_stats = _check_stats(stats)
    check_codebook(codebook, logits)
    if output is not None and not callable(output):
        raise BadType(f"output={output!r}", "a callable from a layer's output to a tensor", "Leave output out")
    if not isinstance(gradients, bool):
        raise BadType(f"gradients={gradients!r}", "True or False", "Leave gradients out for none")
    samples = FIRST_SAMPLES if per_sample is True else per_sample
    _check_numbers(every=every, capacity=capacity, per_sample=1 if samples is False else samples)
    called, root, roots, pipeline = resolve(model)
    chosen = select(root, layers)
    settings: dict[str, Any] = {
        "layers": [name for name, _ in chosen],
        "stats": kept_stats,
        "per_sample": per_sample,
        "every": every,
        "capacity": capacity,
        "gradients": gradients,
        "codebook": codebook,
        "logits": logits,
        "output": output,
    }
    found = {id(site.recorder): site.recorder for site in map(site_of, root.modules()) if site is not None}
    if found:
        already = next(iter(found.values()))
        at_roots = [site_of(module) for module in roots]
        ours = all(site is not None and site.root and site.recorder is already for site in at_roots)
        if len(found) > 1 or not ours or already.settings != settings:
            raise WrongState(
                f"{type(root).__name__} is wrapped already, with other settings (layers {_few(already.names)})",
                "a model that is not wrapped, or the same settings",
                "Call unwrap() on the container first",
            )
        return Wrapped(called, root, already, pipeline)
    names, device = settings["layers"], _device(root)
    given: dict[str, Any] = {"capacity": capacity, "samples": int(samples), "every": every, "stats": kept_stats}
    recorder = Recorder(names, device, **given, settings=settings)
    if gradients:
        recorder.gradients = GradientRecorder(names, device, **given, settings={})
    recorder.follow(routers(root, chosen))
    if codebook is not None:
        recorder.coder = Coder(codebook, recorder.banks[0].device, logits if callable(logits) else None)
    _observe(recorder, chosen, roots, output, logits_module(root, logits))
    recorder.evidence.unreached = not rebind(called)
    recorder.base_meta = _describe(root, layers)
    recorder.reset({})
    wrapped = Wrapped(called, root, recorder, pipeline)
    logger.debug("observing {} layers of {}", len(chosen), type(root).__name__)
    return wrapped


def _observe(
    recorder: Recorder,
    chosen: list[tuple[str, nn.Module]],
    roots: list[nn.Module],
    output: Callable[[Any], Any] | None,
    logits: nn.Module | None,
) -> None:
    coder = recorder.coder
    gradients = recorder.gradients if isinstance(recorder.gradients, GradientRecorder) else None
    sites: dict[int, tuple[nn.Module, Site]] = {id(root): (root, Site(recorder)) for root in roots}
    for root, site in sites.values():
        site.root = True
        names = _parameters(root.forward)
        found = [name for name in TIMESTEPS if name in names]
        if found:
            site.timestep_name, site.timestep = found[0], names.index(found[0])
        if coder is not None and coder.settings.mask in names:
            site.mask = names.index(coder.settings.mask)
    by_name = {router.name: router for router in recorder.routers}
    for index, (name, module) in enumerate(chosen):
        _, site = sites.setdefault(id(module), (module, Site(recorder)))
        site.index, site.name, site.places = index, name, recorder.places[index]
        site.pick, site.stream = output, stream_index(module)
        site.gradients = gradients
        site.router = by_name.get(name)
        site.looks = True
        if coder is not None and module is not logits:
            site.channel = coder.add(name, module)
    if coder is not None and (logits is not None or coder.logits is not None):
        _, site = sites.setdefault(id(logits or root), (logits or root, Site(recorder)))
        site.doubt, site.looks = coder.see_logits(), True
        if logits is not None:
            site.head = coder.see_head(recorder.settings["logits"])
    done: list[nn.Module] = []
    try:
        for module, site in sites.values():
            become_observed(module, site)
            done.append(module)
    except Exception:
        for module in done:
            restore(module)
        raise
    recorder.observed = [weakref.ref(module) for module in done]


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (ValueError, TypeError):  # a builtin put in the place of forward
        return []


class Wrapped(Judging, nn.Module):
    """A model under observation: runs as the model does, and tells what happened.

    Everything that is not noesis' own is the model's: attributes, parameters, `state_dict()` with
    the model's keys, `train()`, `to()`, `generate()`.

    Attributes:
        model: the model itself, the very object that was given.
        layers: names of the observed layers.

    Example:
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
        self.__dict__.update(model=model, _root=root, _recorder=recorder, _pipeline=pipeline, _wrapped=True)
        if pipeline is not None:
            pipeline.attach(recorder)

    # ------------------------------------------------------------ answers

    @property
    def layers(self) -> list[str]:
        """Names of the observed layers, in the order of `named_modules()`."""
        return list(self._recorder.names)

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
        _check_numbers(every=every)
        self._recorder.set_every(every)

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

    def gradients(self, *, group: ProcessGroup | None = None, timeout: float = 60.0) -> Trace:
        """The same of the gradients by each layer's output, with `wrap(..., gradients=True)`.

        A step is a forward, as in `trace()`; its row is of all backward passes through it. Layers whose output no
        gradient was asked for are among `never_ran`. With a `GradScaler`, gradients are those of the scaled loss.

        Args:
            group: merge over these ranks, as in `trace`.
            timeout: seconds to wait for the other ranks.

        Raises:
            NoesisError: without `gradients=True`.

        Example:
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
            elif self._recorder.on_device or name.startswith(tuple(names)):
                trace.unmeasured[name] = "no gradient that eager code gave: compiled code gives none"
        return self._told(trace, self._recorder.gradients.earlier, group, timeout)

    def _told(self, trace: Trace, earlier: Trace | None, group: ProcessGroup | None, timeout: float) -> Trace:
        for name in trace.layers:
            if self._replaced(name):
                trace.unmeasured[name] = "another module took its place after wrapping; unwrap and wrap again"
        if group is None:
            return trace if earlier is None else trace.after(earlier)
        with undisturbed():
            return merge_over(trace, earlier, group, timeout)

    def routes(self) -> Routes:
        """Where the routers of a Mixture-of-Experts model sent the run's tokens.

        Raises:
            NoesisError: when no router is observed (wrap with `layers="routers"`), or nothing ran.
        """
        routes: Routes = self._recorder.routes()
        return routes

    def _replaced(self, name: str) -> bool:
        """Whether the module of this name is no longer the one that is observed (an adapter, say)."""
        if name in self._recorder.unmeasured or not self._wrapped:
            return False
        try:
            site = site_of(self._root.get_submodule(name))
        except AttributeError:
            return True
        return site is None or site.recorder is not self._recorder

    def soulprint(self, *, group: ProcessGroup | None = None, timeout: float = 60.0) -> Soulprint:
        """The run as one vector; see `Trace.soulprint`, and `trace` for the arguments."""
        return self.trace(group=group, timeout=timeout).soulprint()

    def forward_with_trace(self, *args: Any, **kwargs: Any) -> tuple[Any, Trace]:
        """Run the model once; returns its output and the trace of this call alone, with its scores if there are codes.

        Where there can be no scores yet, `trace.surprise` is None, and `surprise()` says why.

        Raises:
            NoesisError: while paused, or when `every` leaves this forward out.
        """
        forwards, _ = self._recorder.counted()
        output = self.model(*args, **kwargs)
        latest = self._recorder.trace(since=forwards)
        if not len(latest):
            raise WrongState(
                "This forward was not observed", "a forward that is", "Leave paused(), or wrap with every=1"
            )
        latest.steps = latest.steps - latest.steps[0]  # this call's first step is step 0
        if self._recorder.coder is not None:
            try:
                latest.surprise = self.surprise()
            except NoesisError as error:  # the output is not lost for that
                logger.warning("There are no scores of this forward: {}", error)
        return output, latest

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

        Example:
            >>> import tempfile, torch, noesis
            >>> wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8)))
            >>> _ = wrapped(torch.ones(2, 4))
            >>> path = tempfile.mkdtemp() + "/run.jsonl"
            >>> wrapped.log_to(path)["noesis/layers/ran"]
            1.0
        """
        from ..files import writer

        write, forwards = writer(target), self._forwards()
        trace = self._latest(self._recorder, forwards)
        if not len(trace):
            return {}
        coder = self._recorder.coder
        books = {} if coder is None else coder.books
        judged = coder is not None and coder.left(forwards) and all(book.ready for book in books.values())
        found = scalars(trace, self.surprise() if judged else None, books, layers=layers, stats=stats)
        if self._recorder.gradients is not None:
            gradients = self._latest(self._recorder.gradients, forwards)
            if len(gradients) and gradients.calls.any():
                found |= under("gradients", scalars(gradients, layers=layers, stats=stats))
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

    def unwrap(self) -> nn.Module:
        """Give every module its class back; returns the model. What was recorded can still be read."""
        self.__dict__["_wrapped"] = False
        kept = [module for ref in self._recorder.observed if (module := ref()) is not None]
        for module in [*self._root.modules(), *kept]:  # those too that have left the model since
            site = site_of(module)
            if site is not None and site.recorder is self._recorder and not restore(module):
                logger.warning("{} was given another class after wrapping; it keeps it, unobserved", site.name)
        rebind(self.model)
        if self._pipeline is not None:
            self._pipeline.detach()
        return self.model

    # ------------------------------------------------------------ being the model

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The model's class: the Trainer of transformers, say, reads from it what forward takes and how to save."""
        return type(self.__dict__.get("model", self))  # a copy that is being made has no model yet

    @property
    def forward(self) -> Any:  # type: ignore[override]
        """The model's own, so that its signature shows."""
        return self.model.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        output = self.model(*args, **kwargs)
        if self._wrapped and not torch.compiler.is_compiling():
            self._recorder.returned()
        return output

    def __getattr__(self, name: str) -> Any:
        if "model" not in self.__dict__:  # a copy that is being made
            raise AttributeError(name)
        return getattr(self.__dict__["model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, MethodType) and value.__self__ is self:  # accelerate binds its autocast like this
            value = MethodType(value.__func__, self.model)
        if name == "every":
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.model, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:  # which the model may have one of its own of
        made = memo[id(self)] = _empty()
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (), self.__dict__  # not by `__class__`, which is the model's

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.model)})

    def __repr__(self) -> str:
        observed, total = len(self._recorder.names), sum(1 for _ in self._root.modules())
        name = type(self._root).__name__
        return f"Wrapped({name}: {observed} of {total} modules observed, {_few(self._recorder.names)})"


def _empty() -> Wrapped:
    return object.__new__(Wrapped)


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: Wrapped, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.model, name)(*args, **kwargs)
        return self if result is self.model else result

    method.__name__ = name
    return method


# nn.Module's own methods would act on the container; all of them are the model's.
for _name, _value in vars(nn.Module).items():
    if inspect.isfunction(_value) and not _name.startswith("__") and _name not in vars(Wrapped):
        setattr(Wrapped, _name, _delegate(_name))


# ---------------------------------------------------------------- checks


def _check_stats(stats: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(stats, Iterable):
        raise BadType(f"stats={stats!r}", f"names among {', '.join(ALWAYS + OPTIONAL)}", "Leave stats out")
    given = (stats,) if isinstance(stats, str) else tuple(stats)
    unknown = [name for name in given if name not in ALWAYS + OPTIONAL]
    if unknown:
        raise BadValue(
            f"stats has {unknown[0]!r}",
            f"any of {', '.join(ALWAYS + OPTIONAL)}",
            f"{', '.join(ALWAYS)} are always there; add {' or '.join(OPTIONAL)} if you want them",
        )
    return ALWAYS + tuple(name for name in OPTIONAL if name in given)


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
            raise BadValue(
                f"{name}={value!r}", "a whole number from 1, below 2**31", f"Leave {name} out for its default"
            )


def resolve(model: Any) -> tuple[Any, nn.Module, list[nn.Module], Any]:
    """What to call, where layers are selected, whose forwards are steps, and the pipeline around it."""
    if isinstance(model, Wrapped):
        model = model.model
    if isinstance(model, nn.Module):
        root = inside(model)
        return model, root, [root], None
    if hasattr(model, "components") and callable(model):
        from ..observing.pipelines import Pipeline  # only a pipeline needs it

        pipeline = Pipeline(model)
        root, roots = pipeline.denoisers()
        return root, root, roots, pipeline
    raise BadType(
        f"model is of type {type(model).__name__}", "an nn.Module or a diffusers pipeline", "Pass the model itself"
    )


def _device(root: nn.Module) -> torch.device:
    tensor = next(itertools.chain(root.parameters(), root.buffers()), None)
    return torch.device("cpu") if tensor is None or tensor.device.type == "meta" else tensor.device


def _describe(root: nn.Module, layers: Any) -> dict[str, Any]:
    config: Any = getattr(root, "config", None)
    named = getattr(config, "_name_or_path", None)  # transformers; diffusers keeps it as an entry
    if isinstance(config, Mapping):
        named = named or config.get("_name_or_path")
    return {
        "model": str(named or type(root).__name__),
        "class": type(root).__name__,
        "layers": layers if isinstance(layers, str) else repr(layers),
        "device": str(_device(root)),
        "dtype": str(next((p.dtype for p in root.parameters()), "")).removeprefix("torch."),
        "noesis_version": __version__,
        "torch_version": torch.__version__,
    }


def _few(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
