"""The tuned lens: an affine map per layer into the language of the last one, trained on the model's own predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..errors import BadType, BadValue
from ..numerics import Floats
from ..results import Cells, Saved, Tabular, list_of
from ..text import counted, plain, table
from .anatomy import Anatomy, no_step
from .ends import End
from .metrics import kl_divergence
from .recording import arguments

#: Momentum and weight decay of the training (Belrose et al. 2023, and their code's defaults).
MOMENTUM, DECAY = 0.9, 1e-3


@dataclass(eq=False, repr=False)
class TunedLens(Saved, Tabular):
    """For each layer the affine map x + A x + b, after which the model's end says most nearly what the model says.

    As a table (`to_csv`, `to_dataframe`) it has a row per layer.

    Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".

    Attributes:
        layers: all but the last, which needs none.
        weight: float64 [layers, width, width], A.
        bias: float64 [layers, width], b.
        held_out_kl: float64 [layers], the mean KL(final || layer) in nats on rows that were not trained on.
        logit_kl: float64 [layers], the same of the logit lens, on the same rows.
        train_kl: float64 [layers], on the rows that were trained on.
        train_rows: how many.
        held_out_rows: how many.
        meta: of the model, and how it was trained.
    """

    kind: ClassVar[str] = "tuned_lens"
    ARRAYS: ClassVar[tuple[str, ...]] = ("weight", "bias", "held_out_kl", "logit_kl", "train_kl")

    layers: list[str]
    weight: Floats
    bias: Floats
    held_out_kl: Floats
    logit_kl: Floats
    train_kl: Floats
    train_rows: int
    held_out_rows: int
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count, width = len(self.layers), self.bias.shape[-1]
        expected = {"weight": (count, width, width), "bias": (count, width)}
        for name in self.ARRAYS:
            if getattr(self, name).shape != expected.get(name, (count,)):
                raise ValueError(f"{name} has shape {getattr(self, name).shape} for {count} layers {width} wide")

    @classmethod
    def fit(
        cls,
        model: Any,
        loader: Iterable[Any],
        *,
        steps: int = 250,
        lr: float = 0.1,
        start: Literal["ridge", "identity"] = "ridge",
        ridge: float = 1e-2,
        held_out: float = 0.1,
        anatomy: Anatomy | None = None,
    ) -> TunedLens:
        """Train a lens on what a model says of some inputs, and try it on rows that were held out.

        Each step takes one batch and minimises, for every layer, the mean KL(final || layer) over positions that are no
        padding; by SGD with Nesterov's momentum, gradients of norm 1 at most, a rate that falls to 0, and a decay
        towards the logit lens. It starts
        at the logit lens, or at the ridge regression of the last layer's stream on the layer's, which takes one pass
        and is good where inputs are few. Fit it on inputs of the kind that it will be used on.

        Examples:
            >>> import torch
            >>> from noesis.interp import TunedLens
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(
            ...     vocab_size=32,
            ...     hidden_size=16,
            ...     intermediate_size=24,
            ...     num_hidden_layers=2,
            ...     num_attention_heads=2,
            ...     bos_token_id=1,
            ...     eos_token_id=2,
            ...     pad_token_id=0,
            ... )
            >>> _ = torch.manual_seed(0)
            >>> model = LlamaForCausalLM(config).eval()
            >>> lens = TunedLens.fit(model, [torch.randint(3, 32, (10, 12))], steps=5)
            >>> lens.layers, lens.train_rows, lens.held_out_rows
            (['resid_pre.0', 'resid_pre.1'], 9, 1)

        Args:
            model: an `nn.Module` in eval mode that returns logits, or the result of `noesis.wrap`.
            loader: batches, each a mapping of arguments, a tuple of them, or one; read once.
            steps: of training; 0 leaves the start as it is.
            lr: the rate of the first step.
            start: "ridge" or "identity".
            ridge: how strong the regression is drawn to the identity, relative to the variance of the stream.
            held_out: which share of rows, evenly through the loader, is not trained on.
            anatomy: of this model; without it, it is found by one more forward.

        Raises:
            NoesisError: (a ValueError) for too few rows to hold one out, numbers that make no sense, or a model without
                logits or whose blocks cannot be skipped; (a RuntimeError) for a model in training mode.
        """
        _check_numbers(steps, lr, start, ridge, held_out)
        batches = list(loader)
        if not batches:
            raise BadValue("loader gave no batches", "at least one", "A generator can be read once only")
        with no_step(model), torch.inference_mode(False):
            fitting = _Fitting(model, batches, round(1 / held_out), anatomy)
            if start == "ridge":
                fitting.regress(ridge)
            fitting.train(steps, lr)
            tuned, logit = fitting.scores()
        layers, maps = fitting.layers, fitting.maps
        return cls(
            layers,
            np.stack([each.weight.detach().cpu().double().numpy() for each in maps]),
            np.stack([each.bias.detach().cpu().double().numpy() for each in maps]),
            held_out_kl=tuned[:, 1],
            logit_kl=logit[:, 1],
            train_kl=tuned[:, 0],
            train_rows=fitting.rows - fitting.held_out_rows,
            held_out_rows=fitting.held_out_rows,
            meta={"model": fitting.model, "steps": steps, "lr": lr, "start": start, "ridge": ridge},
        )

    def check(self, layers: Sequence[str], width: int) -> None:
        """Check that it is of a model with these layers.

        Raises:
            NoesisError: (a ValueError) when it is not.
        """
        if list(layers[:-1]) != self.layers or width != self.bias.shape[1]:
            raise BadValue(
                f"the lens is of {counted(len(self.layers), 'layer')} {self.bias.shape[1]} wide, from "
                f"{plain(self.layers[0])}, and the model's are {len(layers) - 1}, {width} wide, from {layers[0]}",
                "a lens that was fitted on this model",
                "Fit one with TunedLens.fit",
            )

    def apply(self, layer: str, x: Tensor) -> Tensor:
        """The stream of a layer, `[..., width]`, in the language of the last; of another layer, as it is."""
        if layer not in self.layers:
            return x
        at = self.layers.index(layer)
        own = (torch.from_numpy(each[at]).to(x.device, torch.float32) for each in (self.weight, self.bias))
        return _Map(*own)(x)

    # ------------------------------------------------------------ files and text

    def _header(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("layers", "train_rows", "held_out_rows", "meta")}

    def _arrays(self) -> files.Arrays:
        return {name: getattr(self, name) for name in self.ARRAYS}

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(array) for name, array in self._arrays().items()}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> TunedLens:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> TunedLens:
        return cls(
            list_of(str, header["layers"]),
            **{name: np.asarray(arrays[name], np.float64) for name in cls.ARRAYS},
            train_rows=int(header["train_rows"]),
            held_out_rows=int(header["held_out_rows"]),
            meta=dict(header["meta"]),
        )

    def _columns(self) -> dict[str, Cells]:
        names = ("logit_kl", "held_out_kl", "train_kl")
        return {"layer": list(self.layers), **{name: getattr(self, name) for name in names}}

    def __repr__(self) -> str:
        rows = [
            [name, *(f"{value:.3f}" for value in values)]
            for name, *values in zip(self.layers, self.logit_kl, self.held_out_kl, self.train_kl, strict=True)
        ]
        lines = [
            f"TunedLens of {counted(len(self.layers), 'layer')}, fitted on {counted(self.train_rows, 'row')}",
            table(["layer", "logit lens", "tuned", "tuned, on its own rows"], rows),
            f"KL to the final distribution, in nats, on {counted(self.held_out_rows, 'row')} held out",
        ]
        both = zip(self.layers, self.held_out_kl, self.logit_kl, strict=True)
        worse = [name for name, tuned, logit in both if not tuned < logit]
        if worse:
            lines.append(f"no better than the logit lens at {', '.join(map(plain, worse))}: fit it on more rows")
        return "\n".join(lines)


def _check_numbers(steps: Any, lr: Any, start: Any, ridge: Any, held_out: Any) -> None:
    whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
    for name, value, fits, expected in (
        ("steps", steps, whole, "a whole number, 0 or more"),
        ("lr", lr, isinstance(lr, (int, float)) and lr > 0, "a positive number"),
        ("start", start, start in ("ridge", "identity"), '"ridge" or "identity"'),
        ("ridge", ridge, isinstance(ridge, (int, float)) and ridge > 0, "a positive number"),
        ("held_out", held_out, isinstance(held_out, (int, float)) and 0 < held_out <= 0.5, "a share up to 0.5"),
    ):
        if not fits:
            raise BadValue(f"{name} is {value!r}", expected, "Leave it out for the default")


class _Map(NamedTuple):
    """The affine map of one layer."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def none(cls, width: int, device: torch.device) -> _Map:
        """The identity."""
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() + x.float() @ self.weight.T + self.bias).to(x.dtype)


class _Fitting:
    """Maps while they are trained."""

    def __init__(self, model: Any, batches: list[Any], every: int, anatomy: Anatomy | None) -> None:
        self._model, self._batches, self._every = model, batches, every
        self.rows = 0
        self._begins: list[int] = []  # of each batch, which row it begins with
        for batch in batches:
            self._begins.append(self.rows)
            self.rows += _rows(batch)
        self.held_out_rows = self.rows // every
        if not self.held_out_rows or self.held_out_rows == self.rows:
            raise BadValue(
                f"loader gave {counted(self.rows, 'row')}",
                f"at least {every}, of which one is held out",
                "Give more, or a larger held_out",
            )
        first = End(model, batches[0], anatomy)
        self._anatomy = first.replay.anatomy
        self.model, self.layers = self._anatomy.model, first.layers[:-1]
        *streams, _last = first.stream.values()
        self.maps = [_Map.none(x.shape[-1], x.device) for x in streams]

    def _batch(self, number: int) -> tuple[End, Tensor, Tensor]:
        """A batch through the model; and which positions count of rows trained on, and of those held out."""
        end = End(self._model, self._batches[number], self._anatomy)
        if end.layers[:-1] != self.layers:
            raise BadValue("batches take other ways through the model", "batches of one kind", "Fit a lens for each")
        row = self._begins[number] + torch.arange(end.final.shape[0], device=end.final.device)
        held_out = (row % self._every == self._every - 1)[:, None]
        return end, end.counted & ~held_out, end.counted & held_out

    def regress(self, ridge: float) -> None:
        """Set the maps to the ridge regressions of the way that is left to the last layer's stream, drawn to none.

        With x and the difference d to the last stream, both less their means, A = d'x (x'x + r I)^-1, where r is
        `ridge` times the mean of the diagonal of x'x.
        """
        width = self.maps[0].bias.shape[0]
        device = self.maps[0].bias.device
        device = torch.device("cpu") if device.type == "mps" else device  # where there is no float64
        sums = torch.zeros(len(self.maps), 2 * width, device=device, dtype=torch.float64)
        products = torch.zeros(len(self.maps), width, 2 * width, device=device, dtype=torch.float64)
        count = 0
        for number in range(len(self._batches)):
            end, train, _ = self._batch(number)
            streams = list(end.stream.values())
            if end.pooled:  # all positions stand for the one prediction
                chosen = train.expand(streams[0].shape[:2]).to(device)
            else:
                streams, chosen = [each[:, end.positions] for each in streams], train.to(device)
            *streams, last = streams
            count += int(chosen.sum())
            for layer, stream in enumerate(streams):
                x, y = (each.to(device)[chosen].double() for each in (stream, last))
                both = torch.cat([x, y - x], dim=1)
                sums[layer] += both.sum(0)
                products[layer] += x.T @ both
        for each, total, product in zip(self.maps, sums, products, strict=True):
            mean = total / count
            covariance = product / count - mean[:width, None] * mean
            spread, towards = covariance[:, :width], covariance[:, width:]
            strength = ridge * spread.diagonal().mean() * torch.eye(width, device=device, dtype=torch.float64)
            weight = torch.linalg.solve(spread + strength, towards).T
            each.weight.copy_(weight)
            each.bias.copy_(mean[width:] - weight @ mean[:width])

    def train(self, steps: int, lr: float) -> None:
        """Minimise the mean KL divergence of each layer."""
        parameters = [parameter.requires_grad_() for each in self.maps for parameter in each]
        optimizer = torch.optim.SGD(parameters, lr, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, steps))
        numbers = [number for number in range(len(self._batches)) if self._trained_on(number)]
        for step in range(steps):
            end, train, _ = self._batch(numbers[step % len(numbers)])
            for each, stream in zip(self.maps, end.stream.values(), strict=False):
                with torch.enable_grad():
                    loss = self._kl(end, each(stream), [train])[0]
                each.weight.grad, each.bias.grad = torch.autograd.grad(loss, list(each))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)

    def scores(self) -> tuple[Floats, Floats]:
        """The mean KL of the tuned and of the logit lens, each `[layers, 2]`: on rows trained on, and held out."""
        found = np.zeros((2, len(self.maps), 2))
        count = np.zeros(2)
        for number in range(len(self._batches)):
            end, *chosen = self._batch(number)
            sizes = np.array([int(each.sum()) for each in chosen])
            count += sizes
            for layer, (each, stream) in enumerate(zip(self.maps, end.stream.values(), strict=False)):
                for which, through in enumerate((each(stream), stream)):
                    with torch.no_grad():
                        means = torch.stack(self._kl(end, through, chosen)).cpu().double().numpy()
                    found[which, layer] += np.where(sizes > 0, means * sizes, 0.0)
        return found[0] / count, found[1] / count

    def _trained_on(self, number: int) -> bool:
        begin = self._begins[number]
        end = self._begins[number + 1] if number + 1 < len(self._begins) else self.rows
        return any(row % self._every != self._every - 1 for row in range(begin, end))

    @staticmethod
    def _kl(end: End, through: Tensor, chosen: Sequence[Tensor]) -> list[Tensor]:
        """The mean KL of what a stream says, over each choice of positions; NaN over none."""
        each = [
            kl_divergence(piece.final.float().log_softmax(-1), piece.logits.float().log_softmax(-1))
            for piece in end.pieces(through)
        ]
        return [torch.cat(each, dim=1)[positions].mean() for positions in chosen]


def _rows(batch: Any) -> int:
    """How many rows a batch has: of its first tensor."""
    args, kwargs = arguments(batch)
    first = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim()), None)
    if first is None:
        raise BadType(
            f"a batch of loader is a {type(batch).__name__} without tensors",
            "what the model is called with",
            "Give such",
        )
    return first.shape[0]
