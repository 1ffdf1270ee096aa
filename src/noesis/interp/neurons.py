"""What neurons respond to, over a corpus that is read once and never held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from loguru import logger
from torch import Tensor, nn

from ..errors import BadType, BadValue
from ..layers import select
from ..numerics import Ints, Reservoir
from ..wrapping import evaluating, moved_to, unwrapped
from .anatomy import Anatomy, anatomy_of, called_and_root
from .channels import channels_last
from .neuron_examples import Neurons, SiteNeurons
from .recording import arguments
from .repeats import Text, text_of
from .running import run
from .sites import LAYERED, MODULE, WHOLE, Site, read

#: Tokens of a stretch of text, of which the most active one counts.
WINDOW = 32
#: Positions sampled for each quantile.
PER_QUANTILE = 100
#: Stretches of text that may be held beyond those that are needed, before they are gone through.
SPARE = 4096


def neurons(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: str | Site | Iterable[str | Site] = "mlp",
    k: int = 20,
    quantiles: int = 10,
    seed: int = 0,
) -> Neurons:
    """Find what each neuron responds to most, and examples from across its range, over a corpus of any length.

    Of each channel the `k` largest activations are kept, one of each stretch of 32 tokens, or of each image; of the
    corpus as a whole `100 * quantiles` positions, drawn evenly (Vitter 1985), from which come quantiles and examples
    of each. So memory does not grow with the corpus. Padding that `attention_mask` marks takes no part.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
        >>> images = torch.zeros(4, 1, 8, 8)
        >>> images[2, 0, 3, 4] = 1.0
        >>> found = interp.neurons(model, images.split(2), layers="1", k=2)
        >>> found.top("module:1", 0, k=1)[0].row
        2

    Args:
        model: an `nn.Module`, or the result of `noesis.wrap`.
        loader: batches: inputs alone, (inputs, labels), or arguments by name.
        layers: `"mlp"` for the neurons of every mlp, what its down projection reads; or sites of `interp.run`; or
            modules, as in `noesis.wrap`. Channels are the last dimension of `[batch, channels]` and `[batch, tokens,
            channels]`, the second of what a convolution returns and of four dimensions or more.
        k: how many of the most active examples to keep.
        quantiles: into how many parts to cut each range.
        seed: of the sample.

    Raises:
        NoesisError: (a ValueError) for a model without such neurons, with the reasons, for a corpus without batches or
            a site without channels; (a TypeError) for another kind of loader.
    """
    _check(loader, k, quantiles)
    _, root = called_and_root(model)
    device = next((tensor.device for tensor in root.parameters()), torch.device("cpu"))
    streams: dict[str, _Stream] = {}
    windows: dict[tuple[int, int], Ints] = {}
    anatomy: Anatomy | None = None
    keep: list[str] | None = None
    left_out: dict[str, str] = {}
    rows, most = 0, SPARE
    with evaluating(root), unwrapped(root):
        for batch in loader:
            inputs = moved_to(_inputs(batch), device)
            if keep is None:
                keep, anatomy, left_out = _sites(root, layers, inputs)
            kept = run(root, inputs, keep=keep, anatomy=anatomy)
            text, size = text_of(inputs), 0
            for site, calls in kept.activations.items():
                values = _channels(root, site, calls, text)
                size = len(values)
                if site not in streams:
                    streams[site] = _Stream(values.shape[2], k, quantiles * PER_QUANTILE, seed)
                streams[site].add(values, rows, text if _is_text(values, text) else Text(None, None))
            if text.ids is not None:
                windows |= _windows(text.ids.numpy(), rows)
                if len(windows) > most:
                    windows = _needed(windows, streams)
                    most = len(windows) + SPARE
            rows += size
    if keep is None:
        raise BadValue("the loader has no batches", "a corpus", "An iterator can be read once: pass a list")
    windows = _needed(windows, streams)
    logger.debug("neurons of {} sites over {} rows, {} stretches of text kept", len(streams), rows, len(windows))
    tokens = np.stack(list(windows.values())) if windows else np.zeros((0, 0), np.int64)
    places = np.array(list(windows), np.int64).reshape(-1, 2)
    found = {site: stream.found() for site, stream in streams.items()}
    return Neurons(found, places, tokens, quantiles, rows, left_out, {"model": type(root).__name__, "seed": seed})


def _check(loader: Any, k: Any, quantiles: Any) -> None:
    if isinstance(loader, (Tensor, Mapping, str)) or not isinstance(loader, Iterable):
        raise BadType(
            f"loader is a {type(loader).__name__}", "an iterable of batches", "Pass [batch] for a single batch"
        )
    for name, value in (("k", k), ("quantiles", quantiles)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadValue(f"{name} is {value!r}", "a whole number from 1", "Pass for example 10")


def _inputs(batch: Any) -> Any:
    """What the model is called with, of inputs alone, (inputs, labels), or arguments by name."""
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2:
        batch = batch[0]
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, Tensor):
        return batch
    raise BadType(
        f"a batch is a {type(batch).__name__}", "inputs, (inputs, labels), or arguments by name", "Make it one of these"
    )


# ---------------------------------------------------------------- which channels


def _sites(root: nn.Module, layers: Any, inputs: Any) -> tuple[list[str], Anatomy | None, dict[str, str]]:
    """Sites to keep, the anatomy if one is needed, and what is left out of all neurons."""
    args, kwargs = arguments(inputs)
    if isinstance(layers, str) and layers == "mlp":
        anatomy = anatomy_of(root, args, kwargs)
        refused = {f"neurons.{n}": b.refused["neurons"] for n, b in enumerate(anatomy.blocks) if "neurons" in b.refused}
        keep = [f"neurons.{n}" for n in range(len(anatomy.blocks)) if f"neurons.{n}" not in refused]
        if not keep:
            raise BadValue(
                f"{type(root).__name__} has no neurons of an mlp: {next(iter(refused.values()))}",
                "a transformer",
                "Pass layers=, names of modules such as 'conv' or 'layers.*.act'",
            )
        return keep, anatomy, refused
    items: list[Any] = [layers] if isinstance(layers, (str, Site)) or not isinstance(layers, Iterable) else list(layers)
    keep = []
    for item in items:
        component = str(item).partition(".")[0].partition("@")[0]
        if component in (*LAYERED, *WHOLE) or str(item).startswith(f"{MODULE}:") or "hook_" in str(item):
            keep.append(str(item))
        else:
            keep += [f"{MODULE}:{name}" for name, _ in select(root, item)]
    asked = read(keep, root, "layers")
    if any(each.component == "pattern" for each in asked):
        raise BadValue("layers has a pattern", "sites with channels", "Patterns are scored by interp.heads")
    needed = any(each.component not in (MODULE, "logits") for each in asked)
    return keep, anatomy_of(root, args, kwargs) if needed else None, {}


def _channels(root: nn.Module, site: str, calls: list[Tensor], text: Text) -> Tensor:
    """The activations of a site as `[rows, positions, channels]` in float32."""
    if len(calls) != 1:
        raise BadValue(f"{site} runs {len(calls)} times in one forward", "a layer that runs once", "Choose others")
    x = channels_last(root, site, calls[0].float())
    if x.dim() == 2 and text.ids is not None and len(x) == text.ids.numel() != len(text.ids):
        return x.reshape(*text.ids.shape, -1)  # rows that are read one after the other
    return x.flatten(1, -2) if x.dim() > 2 else x[:, None]


def _is_text(values: Tensor, text: Text) -> bool:
    return text.ids is not None and values.shape[:2] == text.ids.shape


# ---------------------------------------------------------------- the corpus as it comes by


class _Stream:
    """The largest activations of each channel, and an even sample of positions, so far."""

    def __init__(self, channels: int, k: int, room: int, seed: int) -> None:
        self.values = torch.full((channels, k), -torch.inf)
        self.places = torch.full((channels, k, 2), -1)
        self.reservoir = Reservoir(room, np.random.default_rng(seed))
        self.sample = torch.zeros(room, channels)
        self.sample_places = torch.zeros(room, 2, dtype=torch.int64)
        self.count = torch.zeros(channels, dtype=torch.float64)
        self.mean, self.squares, self.positive = (torch.zeros_like(self.count) for _ in range(3))
        self.least, self.most = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
        self.positions = self.nonfinite = 0
        self.text = False

    def add(self, x: Tensor, begin: int, text: Text) -> None:
        """Rows `[rows, positions, channels]`, of which the first is number `begin` of the corpus."""
        rows, length, channels = x.shape
        if channels != len(self.values):
            raise BadValue(f"{channels} channels, after {len(self.values)}", "a layer of one width", "Choose others")
        counts = torch.ones(rows, length, dtype=torch.bool) if text.counts is None else text.counts
        finite = x.isfinite()
        self.text = text.ids is not None
        self._add_largest(torch.where(finite & counts[..., None], x, -torch.inf), begin, text)
        places = torch.stack(torch.meshgrid(torch.arange(rows) + begin, torch.arange(length), indexing="ij"), -1)
        x, finite, places = x[counts], finite[counts], places[counts]
        self._add_sample(torch.where(finite, x, torch.nan), places)
        self._add_moments(x, finite)
        self.positions += len(x)
        self.nonfinite += int((~finite).sum())

    def _add_largest(self, x: Tensor, begin: int, text: Text) -> None:
        rows, length, channels = x.shape
        size = WINDOW if text.ids is not None else length
        x = nn.functional.pad(x, (0, 0, 0, -length % size), value=-torch.inf).reshape(rows, -1, size, channels)
        values, offset = x.max(2)  # [rows, windows, channels]
        position = offset + torch.arange(x.shape[1])[:, None] * size
        row = torch.arange(rows)[:, None, None].expand_as(position) + begin
        places = torch.stack([row, position], -1).flatten(0, 1).transpose(0, 1)
        values = torch.cat([self.values, values.flatten(0, 1).T], dim=1)
        places = torch.cat([self.places, places], dim=1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.values.shape[1]]  # the earlier first
        self.values = values.gather(1, order)
        self.places = places.gather(1, order[..., None].expand(-1, -1, 2))

    def _add_sample(self, x: Tensor, places: Tensor) -> None:
        at = torch.from_numpy(self.reservoir.places(len(x)))
        for source in at.ge(0).nonzero().flatten().tolist():  # in order: a later one may take an earlier one's place
            self.sample[at[source]], self.sample_places[at[source]] = x[source], places[source]

    def _add_moments(self, x: Tensor, finite: Tensor) -> None:
        """Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance"."""
        values = torch.where(finite, x, 0.0).double()
        count = finite.sum(0).double()
        mean = values.sum(0) / count.clamp_min(1)
        squares = (torch.where(finite, values - mean, 0.0) ** 2).sum(0)
        total = (self.count + count).clamp_min(1)
        delta = mean - self.mean
        self.squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count += count
        self.positive += (values > 0).sum(0)
        self.least = torch.minimum(self.least, torch.where(finite, x, torch.inf).amin(0))
        self.most = torch.maximum(self.most, torch.where(finite, x, -torch.inf).amax(0))

    def found(self) -> SiteNeurons:
        count = self.count.clamp_min(1)
        std = (self.squares / (self.count - 1).clamp_min(1)).sqrt()
        moments = torch.stack([self.mean, std, self.least.double(), self.most.double(), self.positive / count])
        held = self.reservoir.held
        return SiteNeurons(
            self.values.numpy(),
            self.places.numpy(),
            self.sample[:held].numpy(),
            self.sample_places[:held].numpy(),
            moments.numpy(),
            self.positions,
            self.nonfinite,
            self.text,
        )


def _windows(ids: Ints, begin: int) -> dict[tuple[int, int], Ints]:
    """Row and first position -> tokens, -1 behind the end."""
    padded = np.pad(ids, ((0, 0), (0, -ids.shape[1] % WINDOW)), constant_values=-1)
    stretches = padded.reshape(len(ids), -1, WINDOW)
    return {
        (begin + row, place * WINDOW): stretches[row, place].copy()
        for row in range(len(ids))
        for place in range(stretches.shape[1])
    }


def _needed(windows: dict[tuple[int, int], Ints], streams: dict[str, _Stream]) -> dict[tuple[int, int], Ints]:
    """The stretches in which examples are."""
    needed: set[tuple[int, int]] = set()
    for stream in streams.values():
        places = torch.cat([stream.places.flatten(0, 1), stream.sample_places[: stream.reservoir.held]])
        places = places - places.remainder(WINDOW) * torch.tensor([0, 1])
        needed.update((row, start) for row, start in places.unique(dim=0).tolist())
    return {key: tokens for key, tokens in windows.items() if key in needed}
