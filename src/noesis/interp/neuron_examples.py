"""Neurons: what each neuron responds to most, and across its whole range; as text, table, picture and file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import BadType, BadValue
from ..numerics import Floats, Ints
from ..results import Cells, Saved, Tabular, list_of
from ..text import counted, first_few, plain, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Of each channel, over all positions.
MOMENTS = ("mean", "std", "min", "max", "positive")


class Example(NamedTuple):
    """One place in the corpus, and what a neuron did there."""

    value: float
    row: int  # of the corpus, counted through all batches
    position: int  # in the row
    tokens: list[int]  # around it; none of what is no text
    place: int  # of the position among the tokens


@dataclass(eq=False)
class SiteNeurons:
    """The channels of one site.

    Attributes:
        top_values: float32 [channels, k], the largest first; -inf where there were fewer windows.
        top_places: int64 [channels, k, 2], row and position.
        sample: float32 [sampled, channels], at positions that were drawn evenly from all.
        sample_places: int64 [sampled, 2].
        moments: float64 [5, channels]: mean, std, min, max, and the share of positions that are above zero.
        positions: how many were seen.
        nonfinite: how many values were NaN or infinite, which take no part.
        text: whether its positions are those of the tokens that were read.
    """

    top_values: NDArray[np.float32]
    top_places: Ints
    sample: NDArray[np.float32]
    sample_places: Ints
    moments: Floats
    positions: int
    nonfinite: int
    text: bool

    ARRAYS: ClassVar[tuple[str, ...]] = ("top_values", "top_places", "sample", "sample_places", "moments")

    def __post_init__(self) -> None:
        channels = self.top_values.shape[0]
        fits = (
            self.top_places.shape == (*self.top_values.shape, 2)
            and self.sample.shape == (len(self.sample_places), channels)
            and self.sample_places.shape == (len(self.sample), 2)
            and self.moments.shape == (len(MOMENTS), channels)
        )
        if not fits:
            raise ValueError("its arrays do not fit together")


@dataclass(eq=False, repr=False)
class Neurons(Saved, Tabular):
    """What each neuron responds to; what `interp.neurons` returns.

    The most active examples alone mislead (Bolukbasi et al. 2021, "An interpretability illusion for BERT"): beside them
    stand examples from each quantile of what a neuron does, `quantile(...)`, which say whether an idea of it holds
    across its range. As a table (`to_csv`, `to_dataframe`) it has a row per site and channel.

    Attributes:
        sites: name -> its channels.
        windows: int64 [windows, 2], row and first position of the stretches of text that examples are in.
        window_tokens: int64 [windows, length], their tokens, -1 behind the end.
        quantiles: into how many parts the range of each neuron is cut.
        rows: of the corpus.
        left_out: what was asked for and has no channels, and why.
        meta: of the run.
    """

    kind: ClassVar[str] = "neurons"

    sites: dict[str, SiteNeurons]
    windows: Ints
    window_tokens: Ints
    quantiles: int
    rows: int
    left_out: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.windows.shape != (len(self.window_tokens), 2):
            raise ValueError(f"windows have shape {self.windows.shape}")
        self._found = {(int(row), int(start)): place for place, (row, start) in enumerate(self.windows)}

    def __getitem__(self, site: str) -> SiteNeurons:
        if site not in self.sites:
            raise BadValue(f"site {site!r}", f"one of {first_few(list(self.sites))}", "Look at .sites")
        return self.sites[site]

    def top(self, site: str, channel: int, k: int | None = None) -> list[Example]:
        """The examples to which a channel responds most, at most one of each stretch of text, or of each image.

        Raises:
            NoesisError: (a ValueError) for a site or channel that is not there.
        """
        found = self._channel(site, channel)
        known = np.isfinite(found.top_values[channel])
        pairs = zip(found.top_values[channel][known], found.top_places[channel][known], strict=True)
        return [self._example(found, value, place) for value, place in pairs][:k]

    def edges(self, site: str, channel: int) -> Floats:
        """The quantiles of a channel, `[quantiles + 1]`, as the sample estimates them."""
        values = self._channel(site, channel).sample[:, channel].astype(np.float64)
        found: Floats = np.nanquantile(values, np.linspace(0, 1, self.quantiles + 1))
        return found

    def quantile(self, site: str, channel: int, part: int, k: int = 5) -> list[Example]:
        """Examples drawn evenly from one part of a channel's range, 0 the lowest.

        Raises:
            NoesisError: (a ValueError) for a site, channel or part that is not there.
        """
        found = self._channel(site, channel)
        if isinstance(part, bool) or not 0 <= part < self.quantiles:
            raise BadValue(f"part {part}", f"one of 0 to {self.quantiles - 1}", "0 is the lowest")
        values = found.sample[:, channel]
        order = np.argsort(values, kind="stable")[: int(np.isfinite(values).sum())]
        within = np.sort(np.array_split(order, self.quantiles)[part])[:k]  # in the order of the sample, which is random
        return [self._example(found, values[each], found.sample_places[each]) for each in within]

    def plot(self, site: str, channel: int, path: files.PathLike | None = None) -> Figure:
        """How a channel's activations are spread, and where its top examples are; needs the extra `viz`."""
        from ..plots import histograms

        values = self._channel(site, channel).sample[:, channel]
        top = np.array([each.value for each in self.top(site, channel)])
        return histograms({"all positions": values, "top examples": top}, path, title=f"{site}, channel {channel}")

    def _channel(self, site: str, channel: int) -> SiteNeurons:
        found = self[site]
        if isinstance(channel, bool) or not isinstance(channel, (int, np.integer)):
            raise BadType(f"channel is {channel!r}", "a whole number", "Count from 0")
        if not 0 <= channel < len(found.top_values):
            raise BadValue(f"channel {channel} of {site}", f"one of 0 to {len(found.top_values) - 1}", "Count from 0")
        return found

    def _example(self, site: SiteNeurons, value: Any, place: Ints) -> Example:
        row, position = map(int, place)
        length = self.window_tokens.shape[1]
        start = position - position % length if length else 0
        at = self._found.get((row, start)) if site.text else None
        tokens = [] if at is None else [int(token) for token in self.window_tokens[at] if token >= 0]
        return Example(float(value), row, position, tokens, position - start if tokens else 0)

    # ------------------------------------------------------------ files

    def _header(self) -> dict[str, Any]:
        return {
            "sites": list(self.sites),
            "positions": [each.positions for each in self.sites.values()],
            "nonfinite": [each.nonfinite for each in self.sites.values()],
            "text": [int(each.text) for each in self.sites.values()],
            "quantiles": self.quantiles,
            "rows": self.rows,
            "left_out": self.left_out,
            "meta": self.meta,
        }

    def _arrays(self) -> files.Arrays:
        arrays: files.Arrays = {"windows": self.windows, "window_tokens": self.window_tokens}
        for number, found in enumerate(self.sites.values()):
            arrays |= {f"{number}/{name}": getattr(found, name) for name in SiteNeurons.ARRAYS}
        return arrays

    def _payload(self) -> dict[str, Any]:
        return {**self._header(), **{name: files.number_lists(array) for name, array in self._arrays().items()}}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Neurons:
        return cls._from_arrays(payload, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Neurons:
        names, sites = list_of(str, header["sites"]), {}
        facts = zip(*(list_of(int, header[name]) for name in ("positions", "nonfinite", "text")), strict=True)
        for number, (name, (seen, bad, text)) in enumerate(zip(names, facts, strict=True)):
            values = {each: np.asarray(arrays[f"{number}/{each}"]) for each in SiteNeurons.ARRAYS}
            channels = values["moments"].shape[-1]
            sites[name] = SiteNeurons(
                np.asarray(values["top_values"], np.float32).reshape(channels, -1),
                values["top_places"].astype(np.int64).reshape(channels, -1, 2),
                np.asarray(values["sample"], np.float32).reshape(-1, channels),
                values["sample_places"].astype(np.int64).reshape(-1, 2),
                np.asarray(values["moments"], np.float64),
                seen,
                bad,
                bool(text),
            )
        windows = np.asarray(arrays["windows"]).astype(np.int64).reshape(-1, 2)
        tokens = np.asarray(arrays["window_tokens"]).astype(np.int64)
        left_out = {str(key): str(why) for key, why in dict(header["left_out"]).items()}
        tokens = tokens.reshape(len(windows), -1) if len(windows) else np.zeros((0, 0), np.int64)
        return cls(
            sites, windows, tokens, int(header["quantiles"]), int(header["rows"]), left_out, dict(header["meta"])
        )

    def _columns(self) -> dict[str, Cells]:
        counts = [len(found.top_values) for found in self.sites.values()]
        each = list(self.sites.values())
        found: dict[str, Cells] = {
            "site": [name for name, count in zip(self.sites, counts, strict=True) for _ in range(count)],
            "channel": np.concatenate([np.arange(count) for count in counts]),
        }
        for place, name in enumerate(MOMENTS):
            found[name] = np.concatenate([site.moments[place] for site in each])
        found["top_row"] = np.concatenate([site.top_places[:, 0, 0] for site in each])
        found["top_position"] = np.concatenate([site.top_places[:, 0, 1] for site in each])
        return found

    def __repr__(self) -> str:
        k = max((found.top_values.shape[1] for found in self.sites.values()), default=0)
        head = f"Neurons of {counted(len(self.sites), 'site')} over {counted(self.rows, 'row')}"
        rows = [
            [plain(name), str(len(site.top_values)), str(site.positions), str(int((site.moments[3] <= 0).sum())),
             f"{site.moments[4].mean():.0%}", str(len(site.sample))]
            for name, site in self.sites.items()
        ]  # fmt: skip
        columns = ["site", "channels", "positions", "never above 0", "above 0", "sampled"]
        lines = [head, table(columns, rows), f"top {k} by channel; {self.quantiles} quantiles, estimated by the sample"]
        bad = {name: site.nonfinite for name, site in self.sites.items() if site.nonfinite}
        lines += [f"not finite: {counted(count, 'value')} of {plain(name)}" for name, count in bad.items()]
        return "\n".join(lines + [f"left out: {plain(name)}: {plain(why)}" for name, why in self.left_out.items()])
