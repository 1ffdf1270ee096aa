"""The part of `Wrapped` that asks whether inputs are normal: calibrate, judge, and learn codes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from torch import Tensor, nn

from .. import files
from ..distributed import calibrate_over
from ..errors import BadType, BadValue, NoesisWarning, NotThere, WrongState
from ..internals import compiled, inside, undisturbed, untraced
from ..kernels.layout import FORWARDS
from ..observing import Channels, GradientRecorder, Recorder, site_of
from ..results import Judgement, Surprise
from ..surprise import (
    Ambiguity,
    Calibration,
    Codebook,
    Collection,
    LayerCodebook,
    Scorer,
    load_calibration,
    save_calibration,
)
from .calibration_loop import collect
from .proxy import ModelProxy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class WithCodebooks(ModelProxy):
    """What a container with a codebook answers about the inputs of its model."""

    _recorder: Recorder

    def calibrate(
        self,
        loader: Iterable[Any],
        labels: bool = False,
        progress: bool = True,
        *,
        by_class: bool = False,
        forward: Callable[[Any, Any], Any] | None = None,
        group: ProcessGroup | None = None,
        timeout: float = 600.0,
    ) -> Calibration:
        """Learn what normal inputs look like inside the model; `surprise()` then has p-values.

        The model runs in eval mode and without gradients, and is afterwards in the mode it was in; these
        forwards are no steps of the trace. Of more than 20,000 samples, or 1 GiB of vectors, a random choice is
        kept. Nothing changes if it fails or is interrupted.

        Args:
            loader: batches of normal inputs that the model was not trained on (on its training data it is too sure
                of itself, and more new inputs than promised look strange): tensors, pairs (inputs, labels), or dicts
                of arguments.
            labels: fit a code per class to the labels of the batches, rather than codes without labels. Not for codes
                that were learned.
            progress: show tqdm's bar where it is installed and stderr is a terminal, or in a notebook.
            by_class: give each predicted class p-values of its own (Mondrian conformal prediction, Vovk et al.
                2003), where it has 20 samples among those for p-values. Needs `logits`.
            forward: called as `forward(model, batch)` for batches of any other kind.
            group: calibrate on what all ranks of this process group load, each its own share; the first fits, and all
                get the same. By default nothing is sent.
            timeout: seconds to wait for the other ranks, once this one's loader is through.

        Returns:
            What was learned: how many samples were used for what, which layers.

        Raises:
            NoesisError: without a codebook, with fewer than 120 samples, or for batches of an unknown kind; with a
                group, on all ranks when any fails.

        Examples:
            >>> import torch, noesis
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
            >>> wrapped = noesis.wrap(model, layers="1", codebook=noesis.Codebook(), logits="2")
            >>> wrapped.calibrate([torch.randn(100, 4) for _ in range(6)])
            Calibration(600 samples: 400 fitted the codes, 100 rank the layers, 100 give the p-values, which start \
at 0.0099; 2 layers and the logits)
        """
        scorer = self._scorer()
        if forward is not None and not callable(forward):
            raise BadType(f"calibrate(forward={forward!r})", "a function of the model and a batch", "Leave it out")
        if labels and scorer.learned():
            raise BadValue(
                "labels=True, and codes that were learned, which calibrate keeps",
                "codes without labels",
                "Leave labels out, or wrap with Codebook(learn=False) for a code per class",
            )
        if by_class and not scorer.logits:
            raise BadValue("by_class=True without logits", "a wrap that sees the logits", 'Pass wrap(..., logits="fc")')

        def collected() -> Collection:
            return collect(
                self._root if self._pipeline is not None else self.observed_model,
                self._root,
                self._recorder,
                self._channels(),
                scorer,
                loader,
                labels=labels,
                progress=progress,
                forward=forward,
            )

        with undisturbed():
            if group is None:
                collection = collected()
                made, seen = collection.fit(by_class), collection.seen
            else:
                made, seen = calibrate_over(scorer, collected, by_class, group, timeout)
        if seen > sum(made.samples):
            logger.info("{} of {} calibration samples were kept", sum(made.samples), seen)
        logger.info("{}", made)
        return made

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` learned; the model's own attribute where it has one of this name.

        Raises:
            AttributeError: (a NoesisError) without a codebook.
        """
        found: Calibration | None = self._yield("calibration", lambda: self._scorer().calibration)
        return found

    @untraced
    def surprise(self) -> Surprise:
        """How strange each sample of the latest forward is; forwards inside `paused()` do not count.

        Calibration is in eval mode. If a module with dropout or batch statistics is in train mode when this is called,
        it warns with a `NoesisWarning`, once; the mode at the forward itself it cannot know.

        Raises:
            NoesisError: without a codebook, or when no layer was observed in the latest forward.
        """
        scorer = self._scorer()
        if scorer.calibration is not None and not scorer.warned:
            self._warn_of_train_mode(scorer)
        with undisturbed():
            channels, forwards = self._channels(), self._forwards()
            kept, logits = channels.kept(forwards), channels.kept_logits(forwards)
            found: Surprise = scorer.surprise(kept, logits, channels.dropped)
        return found

    @untraced
    def judge(self, *args: Any, **kwargs: Any) -> Judgement:
        """Run the model once; returns its output and how strange each sample of this very call is.

        It is `wrapped(*args, **kwargs)` and `surprise()` in one, for threads that share a model: what the call leaves
        inside the model is this thread's own, and the scores are what they would be if nobody else were there. The call
        is no step of the trace, which other threads may be recording; it is judged inside `paused()` too, and whatever
        `every` is. If the call runs the model several times, as that of a pipeline does, the scores are of the last
        time.

        Args:
            args: the model's.
            kwargs: the model's.

        Returns:
            The pair `(output, surprise)`, to be unpacked or read by these names.

        Raises:
            NoesisError: before the model runs, without a codebook or a calibration, or when observed layers are inside
                of compiled modules, which write to places that all threads share; afterwards, when no calibrated
                layer left vectors.

        Examples:
            >>> import torch, noesis
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
            >>> wrapped = noesis.wrap(model, layers="1", codebook=noesis.Codebook())
            >>> calibration = wrapped.calibrate([torch.randn(600, 4)])
            >>> output, surprise = wrapped.judge(torch.full((2, 4), 30.0))
            >>> output.shape, surprise.is_ood(alpha=0.02).tolist()
            (torch.Size([2, 3]), [True, True])
        """
        scorer, recorder = self._scorer(), self._recorder
        scorer.check_calibrated()
        if not recorder.attached:
            raise WrongState("This model is unwrapped", "one that is observed", "Wrap it again")
        self._check_eager()
        if not scorer.warned:
            self._warn_of_train_mode(scorer)
        with recorder.off_the_record() as seen:
            output = self.observed_model(*args, **kwargs)
            with undisturbed():
                kept, logits = seen.channels.kept(seen.forwards), seen.channels.kept_logits(seen.forwards)
                with scorer.lock:
                    scorer.check_calibrated()  # another thread may have gone on learning
                    surprise = scorer.surprise(kept, logits, seen.channels.dropped)
        if isinstance(recorder.gradients, GradientRecorder) and torch.is_grad_enabled():
            recorder.gradients.pass_by()
        return Judgement(output, surprise)

    def _check_eager(self) -> None:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled
            return
        model = self._root if self._pipeline is not None else self.observed_model
        for module in model.modules():
            if compiled(module) and any(site_of(part) for part in module.modules() if part is not module):
                raise WrongState(
                    f"There are observed layers inside of a compiled {type(inside(module)).__name__}, which writes "
                    "what they leave to one place for all threads",
                    "layers in eager code, or that are compiled one by one and observed as a whole",
                    "Give each thread a copy.deepcopy(wrapped), and call wrapped(...) and wrapped.surprise()",
                )

    def _warn_of_train_mode(self, scorer: Scorer) -> None:
        name = next((name for name, module in self._root.named_modules() if module.training and wavers(module)), None)
        if name is not None:
            scorer.warned = True
            warnings.warn(
                f"{name or 'The model'} is in train mode, and calibrate() ran in eval mode: if the latest forward was "
                "in train mode too, its p-values promise nothing. Call wrapped.eval() before the forward.",
                NoesisWarning,
                stacklevel=3,
            )

    @untraced
    def ambiguity(self, **weights: Any) -> Ambiguity:
        """Nervecode's measures of the latest forward; see `Ambiguity` for the arguments."""
        scorer = self._scorer()
        with undisturbed():
            kept = self._channels().kept(self._forwards())
            scorer.ensure_codes(kept)
            return Ambiguity.of({name: (scorer.books[name], found.vectors) for name, found in kept.items()}, **weights)

    def coding_loss(self) -> Tensor:
        """The mean code length per dimension of the latest forward, in nats: a scalar to add to a training loss.

        Gradients flow into codes and projections, and into the model with `Codebook(detach=False)`. The first call
        takes the codes from the vectors at hand.

        Raises:
            NoesisError: without a codebook that learns, or when no layer was observed in the latest forward.

        Examples:
            >>> import torch, noesis
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
            >>> wrapped = noesis.wrap(model, layers="0", codebook=noesis.Codebook(size=4, dim=2, learn="gradient"))
            >>> optimiser = torch.optim.Adam([*model.parameters(), *wrapped.codebook_parameters()])
            >>> loss = wrapped(torch.randn(16, 4)).square().mean() + 0.1 * wrapped.coding_loss()
            >>> loss.backward()
        """
        scorer, channels = self._scorer(), self._channels()
        scorer.check_learning()
        kept = channels.kept(self._forwards())
        scorer.ensure_codes(kept)  # before anything is taken, since it may refuse
        return scorer.loss(kept, channels.take_live())

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Codes and projections for an optimiser; no part of the model's own parameters."""
        scorer = self._scorer()
        scorer.handed_out = True
        return [parameter for book in scorer.books.values() for parameter in book.parameters()]

    @property
    def codebooks(self) -> dict[str, LayerCodebook]:
        """The codebook of each layer, with its usage; the model's own attribute where it has one of this name.

        Raises:
            AttributeError: (a NoesisError) without a codebook.
        """
        found: dict[str, LayerCodebook] = self._yield("codebooks", lambda: dict(self._scorer().books))
        return found

    def save_calibration(self, path: files.PathLike) -> Path:
        """Write codebooks and calibration to a `.safetensors` file.

        Raises:
            NoesisError: before calibration.
        """
        return save_calibration(self._scorer(), path)

    def load_calibration(self, path: files.PathLike) -> Calibration:
        """Take codebooks and calibration from a file that `save_calibration` wrote for the same layers.

        Raises:
            NoesisError: when the file is broken, or is of other layers or widths, which it names; or when its codes are
                of another size than those that `codebook_parameters` gave to an optimiser.
        """
        return load_calibration(self._scorer(), path, self._channels().widths())

    def _scorer(self) -> Scorer:
        scorer: Scorer | None = self._recorder.scorer
        if scorer is None:
            raise NotThere("This wrap has no codebooks", "one that has", "Pass wrap(..., codebook=noesis.Codebook())")
        return scorer

    def _channels(self) -> Channels:
        channels: Channels | None = self._recorder.channels
        assert channels is not None  # wherever there is a scorer
        return channels

    def _forwards(self) -> int:
        return int(self._recorder.banks[0].control[FORWARDS])


def wavers(module: nn.Module) -> bool:
    """Whether a module computes something else in train mode."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    share = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0)
    return isinstance(share, (int, float)) and share > 0


def check_codebook(codebook: Any, logits: Any) -> None:
    """Refuse what is no codebook, and logits that nothing would look at.

    Raises:
        NoesisError: naming what was given.
    """
    if codebook is not None and not isinstance(codebook, Codebook):
        raise BadType(f"codebook={codebook!r}", "a noesis.Codebook", "Pass codebook=noesis.Codebook()")
    if logits is not None and codebook is None:
        raise BadValue(
            f"logits={logits!r} without a codebook", "both", "Pass codebook=noesis.Codebook() too, or leave logits out"
        )
    if logits is not None and not isinstance(logits, str) and not callable(logits):
        raise BadType(
            f"logits={logits!r}", "the name of a module, or a callable from the model's output", 'Pass logits="fc", say'
        )


def logits_module(root: nn.Module, logits: Any) -> nn.Module | None:
    """The module of this name; None for a callable.

    Raises:
        NoesisError: when there is none.
    """
    if not isinstance(logits, str):
        return None
    found: nn.Module | None = dict(root.named_modules()).get(logits)
    if found is None:
        ends = [name for name, module in root.named_modules() if name and not any(True for _ in module.children())]
        raise BadValue(
            f"logits={logits!r}, which is no module of {type(root).__name__}",
            "the name of the module that gives the logits",
            f"The last modules are {', '.join(ends[-3:])}",
        )
    return found
