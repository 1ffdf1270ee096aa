"""What was added up in the residual stream at some positions of one run, and how far it goes along given directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BadType, BadValue
from ..text import counted
from .anatomy import Anatomy
from .checks import check_equal, check_sum, same
from .norms import AffineNorm, measure_norm
from .recording import BlockRun, Call, record

#: How finely parts are told apart.
BY = ("layer", "head", "neuron")


def rounding(dtype: torch.dtype) -> float:
    """What rounding may be, relative to the magnitudes that are added up, where numbers of a dtype are multiplied."""
    return max(1e-5, 8 * torch.finfo(dtype).eps)


def push_back(linear: nn.Module, like: Tensor, directions: Tensor) -> Tensor:
    """Directions before a linear layer for those behind it, whatever kind of layer it is (LoRA, quantised, Conv1D).

    Args:
        linear: the layer; its `forward` is called, which is no call of the model's own.
        like: `[..., inputs]`, of the dtype and on the device of what it is given in the model.
        directions: `[..., outputs]`.

    Returns:
        float64 `[..., inputs]`, on the CPU.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(*directions.shape[:-1], like.shape[-1], dtype=like.dtype, device=like.device)
        x.requires_grad_()
        out = linear.forward(x)
        (found,) = torch.autograd.grad(out, x, directions.to(out))
    return found.cpu().double()


class Split(NamedTuple):
    """The linear layer whose inputs, in equal shares, make up a part of the stream: heads, or neurons."""

    linear: nn.Module
    given: Tensor  # [batch, inputs]
    norm: AffineNorm | None  # between the layer and the stream
    names: list[str]  # of the shares

    def along(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """How far each share goes along directions, `[shares, batch, directions]`, and what is added without any."""
        behind = directions if self.norm is None else self.norm.back(directions)
        each = self.given.cpu().double()[:, None] * push_back(self.linear, self.given, behind)
        with torch.no_grad():
            nothing = self.linear.forward(torch.zeros_like(self.given[:1])).cpu().double()
        bias = (behind * nothing).sum(-1)
        if self.norm is not None:
            bias = bias + (directions * self.norm.bias).sum(-1)
        return each.unflatten(-1, (len(self.names), -1)).sum(-1).movedim(-1, 0), bias


@dataclass
class Part:
    """What was added to the stream at one place, `[batch, width]`, and what it is made of, as far as that is told."""

    site: str
    rows: Tensor
    split: Split | None = None
    why: str = ""  # it is not told apart

    def along(self, directions: Tensor) -> tuple[list[str], Tensor]:
        """How far it goes along directions `[batch, directions, width]`: names, and `[names, batch, directions]`.

        Where it cannot be told apart after all, `why` says so then.
        """
        terms = self.rows.cpu().double()[:, None] * directions
        whole = terms.sum(-1)
        if self.split is None:
            return [self.site], whole[None]
        try:
            shares, bias = self.split.along(directions)
        except RuntimeError as error:  # torch's, of a layer without a gradient
            self.why = f"its layer gives no gradient ({error})"
            return [self.site], whole[None]
        magnitude = terms.abs().sum(-1) + shares.abs().sum(0) + bias.abs()
        if not ((whole - shares.sum(0) - bias).abs() <= rounding(self.rows.dtype) * magnitude).all():
            self.why = "its shares do not add up to it: its layer is not linear"
            return [self.site], whole[None]
        if not bias.any():
            return self.split.names, shares
        return [*self.split.names, f"{self.site} bias"], torch.cat([shares, bias[None]])


class Stream(NamedTuple):
    """The residual stream at one position of each row, from what begins it to what the unembedding returns."""

    parts: list[Part]
    shape: tuple[int, int]  # batch, tokens
    positions: list[int]
    norm: AffineNorm | None
    normed: Tensor  # [batch, width], what the unembedding is given
    unembed: nn.Module
    unembedded: Tensor  # [batch, vocabulary]
    output: Any  # what the model returned


def read_stream(
    call: Callable[[], Any], root: nn.Module, anatomy: Anatomy, by: str, position: int | Sequence[int]
) -> Stream:
    """Run a model, and read what was added to its stream at a position, or at one for each row.

    Raises:
        NoesisError: (a ValueError) where the stream does not add up, or a position is not there.
    """
    if anatomy.unembed is None:
        raise refuse(anatomy, anatomy.refused["final norm and unembedding"])
    modules = dict(root.named_modules())
    reader = _Reader(anatomy, by, position)
    also = [modules[name] for name in (anatomy.embed, anatomy.norm, anatomy.unembed) if name is not None]
    blocks = {block.name: modules[block.name] for block in anatomy.blocks}
    output, around = record(call, root, blocks, reader.ended, also=also)
    runs = reader.stream()
    batch, tokens = runs[-1].shape
    positions = reader.positions(batch, tokens)
    unembed = next((each for each in reversed(around) if each.name == anatomy.unembed), None)
    if unembed is None:
        raise refuse(anatomy, f"{anatomy.unembed} did not run, as it did in the anatomy")
    normed, unembedded = (pick(each, batch, tokens, positions) for each in (unembed.given, unembed.output))
    if normed is None or unembedded is None:
        raise BadValue(
            f"what {anatomy.unembed} returns has not the positions of the blocks",
            "logits of all positions",
            "Leave out what asks for some of them, such as logits_to_keep",
        )
    norm = None if anatomy.norm is None else measure_norm(modules[anatomy.norm], runs[-1].output[:, None])
    if isinstance(norm, str):
        raise refuse(anatomy, norm)
    first = runs[0]
    begin = [
        Part("embed" if each.name == anatomy.embed else each.name, rows)
        for each in around
        if isinstance(each.module, nn.Embedding) or each.name == anatomy.embed
        if (rows := pick(each.output, batch, tokens, positions)) is not None and rows.shape == first.given.shape
    ]
    if not begin or not check_sum("", first.given, [part.rows for part in begin]).holds:
        begin = [Part(f"resid_pre.{first.layer}", first.given)]
    parts = [*begin, *(part for run in runs for part in run.parts)]
    return Stream(parts, (batch, tokens), positions, norm, normed, unembed.module, unembedded, output)


def refuse(anatomy: Anatomy, why: str) -> BadValue:
    """The error for logits that are no sum."""
    return BadValue(
        f"the logits of {anatomy.model} cannot be told apart by parts: {why}",
        "a residual stream that was verified to add up, and a final norm and an unembedding that read it",
        "print(interp.anatomy(model, ...)) lists what holds; interp.logit_lens needs none of it",
    )


def pick(tensor: Tensor | None, batch: int, tokens: int, positions: Sequence[int]) -> Tensor | None:
    """Of a tensor of `batch * tokens` vectors, or of one row for all, the vector at each row's position."""
    if tensor is None or tensor.dim() < 2:
        return None
    rows, width = tensor.numel() // max(1, tensor.shape[-1]), tensor.shape[-1]
    if rows not in (batch * tokens, tokens):
        return None
    return tensor.reshape(-1, tokens, width).expand(batch, -1, -1)[range(batch), list(positions)]


class _Run(NamedTuple):
    """What one run of a block read, added and wrote at the positions."""

    layer: int
    shape: tuple[int, int]  # batch, tokens
    given: Tensor  # [batch, width]
    output: Tensor
    parts: list[Part]
    why: str  # its parts are not known; "" if they are


class _Reader:
    """Reads blocks as they end, so that no more than one is held."""

    def __init__(self, anatomy: Anatomy, by: str, position: int | Sequence[int]) -> None:
        self.anatomy, self.by, self.position = anatomy, by, position
        self.numbers = {block.name: number for number, block in enumerate(anatomy.blocks)}
        self.runs: list[_Run | BadValue] = []  # or why one is none of a stream

    def positions(self, batch: int, tokens: int) -> list[int]:
        """The position of each row, counted from the first.

        Raises:
            NoesisError: (a ValueError) for one that is not there, or not one for each row.
        """
        asked: Any = self.position.tolist() if hasattr(self.position, "tolist") else self.position
        given = [asked] * batch if isinstance(asked, int) else list(asked)
        if not all(type(at) is int for at in given):
            raise BadType(f"position is {self.position!r}", "a whole number, or one for each row", "Pass -1")
        if len(given) != batch or not all(-tokens <= at < tokens for at in given):
            raise BadValue(
                f"position is {self.position}, for {counted(batch, 'row')} of {counted(tokens, 'token')}",
                f"a position from {-tokens} to {tokens - 1}, or one for each row",
                "Pass -1 for the last token",
            )
        return [at % tokens for at in given]

    def ended(self, run: BlockRun) -> None:
        """Read a block; the blocks of another tower, such as one for images, may have other positions."""
        try:
            self.runs.append(self._read(run))
        except BadValue as error:
            self.runs.append(error)

    def _read(self, run: BlockRun) -> _Run:
        layer = self.numbers[run.name]
        block, inside = self.anatomy.blocks[layer], {call.name: call for call in run.inside}
        shape = () if run.call.given is None else run.call.given.shape
        if len(shape) != 3:
            raise refuse(self.anatomy, f"{run.name} is not given [batch, tokens, width]")
        batch, tokens = shape[:2]
        positions = self.positions(batch, tokens)

        def rows(tensor: Tensor | None) -> Tensor:
            found = pick(tensor, batch, tokens, positions)
            if found is None:
                raise refuse(self.anatomy, f"what is in {run.name} has not its positions")
            return found

        def called(name: str) -> Call:
            if name not in inside:
                raise refuse(self.anatomy, f"{name} did not run, as it did in the anatomy")
            return inside[name]

        parts, why = [], block.refused.get("attn", "")
        if block.attn is not None and not why:
            for core, which in ((block, ""), (block.cross, "cross_")):
                if core is None or core.attn is None:
                    continue
                attn = Part(f"{which}attn.{layer}", rows(called(core.attn).output))
                parts.append(attn)
                if self.by == "head":
                    attn.why = block.refused.get(f"{which}result", "")
                    if not attn.why and core.out is not None:
                        names = [f"{which}result.{layer}.{head}" for head in range(core.heads)]
                        _split(attn, called(core.out), called(core.attn).module, rows, names)
            if block.mlp is not None:
                mlp = Part(f"mlp.{layer}", rows(called(block.mlp).output))
                parts.append(mlp)
                if self.by == "neuron":
                    mlp.why = block.refused.get("neurons", "")
                    if not mlp.why and block.down is not None:
                        count = rows(called(block.down).given).shape[-1]
                        names = [f"neurons.{layer}.{neuron}" for neuron in range(count)]
                        _split(mlp, called(block.down), called(block.mlp).module, rows, names)
        return _Run(layer, (batch, tokens), rows(run.call.given), rows(run.call.output), parts, why)

    def stream(self) -> list[_Run]:
        """The blocks that hand on one stream, up to the last.

        Raises:
            NoesisError: (a ValueError) where one of them adds up otherwise than by its parts, or runs twice.
        """
        found: list[_Run] = []
        for run in reversed(self.runs):
            if isinstance(run, BadValue):
                if not found:
                    raise run
                break
            if found and not (run.shape == found[0].shape and same(run.output, found[0].given)):
                break
            found.insert(0, run)
        if len({run.layer for run in found}) < len(found):
            raise refuse(self.anatomy, "a block runs more than once")
        for run in found:
            if run.why:
                raise refuse(self.anatomy, f"in {self.anatomy.blocks[run.layer].name}, {run.why}")
        return found


def _split(
    part: Part, call: Call, last: nn.Module, rows: Callable[[Tensor | None], Tensor], names: Sequence[str]
) -> None:
    """Tell a part apart by the inputs of the linear layer that it comes from, if need be through a norm.

    Args:
        part: what was added.
        call: of the linear layer.
        last: the module that returned the part.
        rows: picks the positions.
        names: of equal shares of the inputs.
    """
    given, made = rows(call.given), rows(call.output)
    norm = None if same(made, part.rows) else measure_norm(last, made[:, None])
    if isinstance(norm, str):
        part.why = norm
    elif norm is not None and not check_equal("", part.rows.cpu(), norm(made.cpu().double()[:, None])[:, 0]).holds:
        part.why = f"something lies between {call.name} and the sum that is no norm"
    else:
        part.split = Split(call.module, given, norm, list(names))
