"""Direct logit attribution of one run, beside what the same parts add to random pairs of tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadType, BadValue, WrongState
from ..internals import compiled
from .anatomy import Anatomy, anatomy_of, called_and_root, check_eval, is_compiled, logits_of, no_step
from .checks import Check, check_equal
from .contributions import SUM, Contributions
from .padding import counted_positions
from .places import check_anatomy
from .recording import arguments, spare
from .streams import BY, Stream, pick, push_back, read_stream, refuse, rounding
from .visiting import STOPS


def contributions(
    model: Any,
    inputs: Any,
    target: int | tuple[int, int] | Sequence[Sequence[int]] | Tensor,
    *,
    by: Literal["layer", "head", "neuron"] = "layer",
    position: int | Sequence[int] = -1,
    anatomy: Anatomy | None = None,
    controls: int = 100,
    seed: int = 0,
) -> Contributions:
    """How much each part of the residual stream adds, directly, to the difference of two logits.

    A part c adds (D c) . (w_a - w_b), with the rows w of the unembedding and the final norm as the linear map D that it
    is in this run, its scale frozen (Elhage et al. 2021; Wang et al. 2022, "Interpretability in the Wild").
    Heads and neurons go through output projections and post-norms in the same way. Weights are not folded, and no layer
    is known by its kind: directions are pushed back through each as its gradient. What was embedded and all biases
    have rows of their own, so that the rows add up to the model's own difference; the error of the sum is shown.

    Its control: the same parts, along random pairs of tokens of the vocabulary. A part that is merely large tells any
    two tokens apart.

    Examples:
        >>> import torch
        >>> from noesis import interp
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
        >>> found = interp.contributions(model, torch.tensor([[5, 6, 7, 8]]), target=(3, 4))
        >>> found.parts
        ['embed', 'attn.0', 'mlp.0', 'attn.1', 'mlp.1']
        >>> found.check.holds
        True

    Args:
        model: an `nn.Module` in eval mode, or the result of `noesis.wrap`.
        inputs: a mapping of arguments, a tuple of them, or one; caches that are given are not written to.
        target: two token ids, whose logit difference is meant; such a pair for each row; or one token id, for its logit
            less the mean over the vocabulary, as logits alone have a free constant.
        by: "layer" (attention and mlp of each), "head", or "neuron".
        position: whose logits, counted from the first token, or from the last where negative; or one for each row.
        anatomy: of this model, from `interp.anatomy` or an earlier run; without it, it is found by one more forward.
        controls: how many random pairs.
        seed: by which they are drawn.

    Raises:
        NoesisError: (a ValueError) where the stream does not add up (BERT, Granite), with the reason; for a token or
            position that is not there, or is padding; (a RuntimeError) for a model in training mode, or
            one that is being edited.
    """
    if by not in BY:
        raise BadValue(f"by is {by!r}", f"one of {', '.join(map(repr, BY))}", 'Pass by="head", for example')
    if not isinstance(controls, int) or isinstance(controls, bool) or controls < 1:
        raise BadValue(f"controls is {controls!r}", "a whole number of random pairs, at least 1", "Pass 100")
    called, root = called_and_root(model)
    check_eval(root)
    if any(map(compiled, root.modules())):
        raise is_compiled(root)
    if any(STOPS in module.__dict__ for module in root.modules()):
        raise WrongState(
            "the model is being edited, and what its parts add is read before edits change it",
            "a model that is not",
            "Leave interp.editing first; interp.logit_lens shows edited models",
        )
    args, kwargs = arguments(inputs)
    if anatomy is None:
        anatomy = anatomy_of(model, args, kwargs)
    else:
        check_anatomy(anatomy, root)
    own_args, own_kwargs = spare(args, kwargs)
    with no_step(model):
        stream = read_stream(functools.partial(called, *own_args, **own_kwargs), root, anatomy, by, position)
    _check_padding(root, args, kwargs, stream)
    return _contributions(stream, anatomy, target, by, controls, seed)


def _contributions(stream: Stream, anatomy: Anatomy, target: Any, by: str, controls: int, seed: int) -> Contributions:
    batch, vocabulary = stream.unembedded.shape
    targets = _targets(target, batch, vocabulary)
    factor, before = _last_step(stream, anatomy)
    # Over the vocabulary [batch, 1 + controls, vocabulary], what of the logits is meant.
    drawn = _drawn(len(targets[0]), controls, vocabulary, seed)
    meant = torch.stack([_meant(tokens, vocabulary) for tokens in (*targets, *drawn)])
    try:
        pushed = push_back(stream.unembed, stream.normed, meant)
    except RuntimeError as error:  # torch's, of a layer without a gradient
        raise refuse(anatomy, f"{anatomy.unembed} gives no gradient ({error})") from None
    with torch.no_grad():
        offset = stream.unembed.forward(torch.zeros_like(stream.normed[:1])).cpu().double()[0]
    directions, bias = (_by_row(each, batch) for each in (pushed, meant @ offset))
    before_norm = directions if stream.norm is None else stream.norm.back(directions)

    names: list[str] = []
    rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(found: list[str], along: Tensor) -> None:
        along = factor * along
        value, others = along[..., 0], along[..., 1:]
        reached = (others.abs() >= value.abs()[..., None]).sum(-1)
        names.extend(found)
        rows.append((value, others.square().mean(-1).sqrt(), (1 + reached) / (1 + controls)))

    magnitude = bias[:, 0].abs()
    for part in stream.parts:
        add(*part.along(before_norm))
        magnitude = magnitude + (part.rows.cpu().double() * before_norm[:, 0]).abs().sum(-1)
    if stream.norm is not None and stream.norm.bias.any():
        add([f"{anatomy.norm} bias"], (directions * stream.norm.bias).sum(-1)[None])
    if offset.any():
        add([f"{anatomy.unembed} bias"], bias[None])
    values, control, share = (torch.cat(each).numpy() for each in zip(*rows, strict=True))
    own = meant[:batch]
    difference = factor * (own * stream.unembedded.cpu().double()).sum(-1)
    residual = (torch.from_numpy(values).sum(0) - difference).abs() / (abs(factor) * magnitude)
    whole = {part.site: part.why for part in stream.parts if part.why}
    if by != "layer" and not any(part.split and not part.why for part in stream.parts):
        site, why = next(iter(whole.items()), ("the stream", "it has no such parts"))
        raise BadValue(f"by is {by!r}, and {site} cannot be told apart: {why}", "parts of that kind", 'Pass by="layer"')
    return Contributions(
        names,
        values,
        control,
        share,
        difference.numpy(),
        final=(own * _final(stream).cpu().double()).sum(-1).numpy(),
        check=Check(SUM, float(residual.amax()), rounding(stream.unembedded.dtype)),
        target=targets,
        positions=stream.positions,
        by=by,
        controls=controls,
        whole=whole,
        before=before,
        meta={"model": anatomy.model, "seed": seed},
    )


def _by_row(each: Tensor, batch: int) -> Tensor:
    """Of those of the rows, and then those that all rows share: `[batch, 1 + shared, ...]`."""
    shared = each[batch:].expand(batch, *each[batch:].shape)
    return torch.cat([each[:batch, None], shared], dim=1)


def _meant(tokens: Sequence[int], vocabulary: int) -> Tensor:
    """By what the logits are multiplied: +1 and -1, or +1 less the mean."""
    found = torch.zeros(vocabulary, dtype=torch.float64)
    found[tokens[0]] = 1.0
    if len(tokens) == 1:
        return found - 1 / vocabulary
    found[tokens[1]] -= 1.0
    return found


def _drawn(size: int, controls: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random tokens, or pairs of different ones."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(vocabulary, (controls,), generator=generator)
    step = torch.randint(1, max(2, vocabulary), (controls,), generator=generator)
    pairs: list[list[int]] = torch.stack([first, (first + step) % vocabulary], dim=1)[:, :size].tolist()
    return pairs


def _targets(target: Any, batch: int, vocabulary: int) -> list[list[int]]:
    """The token, or the two tokens, of each row.

    Raises:
        NoesisError: (a ValueError or TypeError) for anything else.
    """
    listed: Any = target.tolist() if isinstance(target, (Tensor, np.ndarray)) else target
    found: list[list[int]]
    if _is_token(listed):
        found = [[int(listed)]] * batch
    elif _is_pair(listed):
        found = [[int(token) for token in listed]] * batch
    elif isinstance(listed, Sequence) and listed and all(map(_is_pair, listed)):
        found = [[int(token) for token in row] for row in listed]
    else:
        raise BadType(
            f"target is {target!r}", "a token id, a pair of them, or a pair for each row", "Pass (right, wrong)"
        )
    wrong = [token for row in found for token in row if not 0 <= token < vocabulary]
    same = [row for row in found if len(row) == 2 and row[0] == row[1]]
    if wrong or same or len(found) != batch:
        raise BadValue(
            f"target is {target!r}, for {batch} rows and a vocabulary of {vocabulary}",
            f"two different tokens from 0 to {vocabulary - 1}, or such a pair for each row",
            "Pass (right, wrong)",
        )
    return found


def _is_token(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_is_token, value))


def _last_step(stream: Stream, anatomy: Anatomy) -> tuple[float, str]:
    """By what the model multiplies what its unembedding returns; and what is said where it does anything else to it."""
    final, unembedded = _final(stream).cpu().double(), stream.unembedded.cpu().double()
    factor = float((final * unembedded).sum() / unembedded.square().sum())
    if check_equal("", stream.unembedded, _final(stream)).holds:
        return 1.0, ""
    if check_equal("", final, factor * unembedded).error <= 1e-5:
        return factor, ""
    return 1.0, f"before the model's last step, as the model changes what {anatomy.unembed} returns (such as a softcap)"


def _final(stream: Stream) -> Tensor:
    """The logits that the model returned, `[batch, vocabulary]`."""
    logits = logits_of(stream.output)
    batch, vocabulary = stream.unembedded.shape
    assert logits is not None
    found = pick(logits, batch, logits.numel() // (batch * vocabulary), stream.positions)
    assert found is not None
    return found


def _check_padding(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Stream) -> None:
    """Check that no position is padding.

    Raises:
        NoesisError: (a ValueError) for one that is, with the last that is not.
    """
    counts = counted_positions(root, args, kwargs, *stream.shape)
    if counts is None:
        return
    padding = [row for row, at in enumerate(stream.positions) if not counts[row, at]]
    if padding:
        last = (counts * torch.arange(1, counts.shape[1] + 1, device=counts.device)).argmax(1).tolist()
        raise BadValue(
            f"position {stream.positions[padding[0]]} is padding in {'rows' if len(padding) > 1 else 'row'} "
            + ", ".join(map(str, padding[:6])),
            "positions of tokens that count",
            f"Pass one for each row, such as the last that counts: position={last}",
        )
