"""How layers are coded: the settings of codebooks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import BadType, BadValue


@dataclass(frozen=True)
class Codebook:
    """How layers are coded: pass one to `noesis.wrap(..., codebook=...)`.

    Attributes:
        size: codes per layer at most; fitted to n vectors there are about 2 sqrt(n).
        dim: dimensions of the projection at most; never more than channels, nor than n / 4 beyond 8.
        positions: `"mean"` codes mean and standard deviation over the positions (tokens, pixels) of each sample;
            `"each"` codes every position and takes the mean of the code lengths, in eager code.
        most_positions: with `"each"`, of a sample with more positions so many evenly spaced ones are coded. A forward
            keeps them all in float32, and calibration no more samples than fit into 1 GiB.
        learn: False: `calibrate` fits the codes. `"gradient"`: `coding_loss()` trains codes and projection.
            `"ema"`: `coding_loss()` moves the codes towards the vectors they code.
        detach: whether `coding_loss()` leaves the model alone; False lets it shape the model.
        decay: share that running estimates keep at each loss: of the covariance, the codes' weights and, with
            `"ema"`, the codes.
        mask: an argument that says which positions count (those where it is 0 do not; where its name ends in
            `key_padding_mask`, as in `torch.nn`, those where it is true or -inf). It is looked for in the calls of the
            model and of the modules inside it, as are `attention_mask`, `decoder_attention_mask`,
            `src_key_padding_mask` and `tgt_key_padding_mask` whatever is given, since each is of one sequence.
            None uses no mask: all positions count.
        seed: of the generator that fits the codes; no other random numbers are consumed.

    Examples:
        >>> import torch, noesis
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> wrapped = noesis.wrap(model, layers="1", codebook=noesis.Codebook(), logits="2")
        >>> _ = wrapped.calibrate([torch.randn(50, 4) for _ in range(10)])
        >>> _ = wrapped(torch.full((2, 4), 30.0))
        >>> wrapped.surprise().is_ood(0.05).tolist()
        [True, True]
    """

    size: int = 256
    dim: int = 64
    positions: Literal["mean", "each"] = "mean"
    most_positions: int = 256
    learn: Literal[False, "gradient", "ema"] = False
    detach: bool = True
    decay: float = 0.99
    mask: str | None = "attention_mask"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "dim", "most_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise BadType(f"Codebook({name}={value!r})", "an integer", f"Pass {name}=64, say")
            if value < 1:
                raise BadValue(f"Codebook({name}={value})", "at least 1", f"Pass {name}=64, say")
        for name, known in (("positions", ("mean", "each")), ("learn", (False, "gradient", "ema"))):
            value = getattr(self, name)
            if value not in known:
                raise BadValue(f"Codebook({name}={value!r})", f"one of {known}", "Leave it out for the first")
        if self.mask is not None and not isinstance(self.mask, str):
            raise BadType(f"Codebook(mask={self.mask!r})", "the name of an argument", "Leave it out, or pass None")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise BadValue(f"Codebook(seed={self.seed!r})", "an integer from 0", "Leave it out for 0")
        if not isinstance(self.decay, (int, float)) or not 0 <= self.decay < 1:
            raise BadValue(f"Codebook(decay={self.decay!r})", "from 0 up to 1, without 1", "Pass decay=0.99")
        if self.positions == "each" and self.learn:
            raise BadValue(
                'Codebook(positions="each") that learns', "fitted codes for each position", "Leave learn out"
            )

    def sizes(self, vectors: int, channels: int) -> tuple[int, int]:
        """Codes and dimensions for a number of vectors of some channels."""
        codes = min(self.size, round(2 * math.sqrt(vectors)), vectors // 4)
        dim = min(self.dim, channels, max(8, vectors // 4), vectors - 1)
        return max(1, codes), max(1, dim)
