"""What a model is made of: found by one run, and verified on its numbers."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..errors import BadType, BadValue, WrongState
from ..internals import compiled
from ..layers import is_linear, select
from ..text import plain, table
from ..wrapping import Wrapped, resolve
from .aside import aside
from .attention import PATTERN
from .checks import Check, check_equal, same
from .identifying import BLOCK, HEADS, Block, Core, identify
from .recording import BlockRun, Call, Recorded, record, spare
from .sites import CROSS, LAYERED

LOGITS = "logits = unembedding(final norm(last resid_post))"


@dataclass
class Anatomy:
    """What a model is made of, by dotted names: what was found and verified, and what is refused and why.

    `print` shows it, with the error of each identity.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)))
        >>> print(interp.anatomy(blocks.eval(), torch.ones(1, 4)))
        Anatomy of Sequential: 2 blocks, verified by one run
        ...

    Attributes:
        model: the class of the model.
        blocks: its blocks, in the order of `named_modules()`; layer numbers count them.
        embed: the module whose output is `embed`, or None.
        norm: the final norm, whose input is what the last block returned.
        unembed: the unembedding, whose input is what the final norm returned.
        checks: the identities of the whole, with their errors.
        shared: modules that are in several blocks, in each of which they are another site.
        refused: of the whole, component -> why; those of a block are in its `refused`.
    """

    model: str
    blocks: list[Block]
    embed: str | None = None
    norm: str | None = None
    unembed: str | None = None
    checks: list[Check] = field(default_factory=list)
    shared: frozenset[str] = frozenset()
    refused: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        refused = _grouped(self)
        works = [name for name in LAYERED if any(name not in block.refused for block in self.blocks)]
        crossing = [block for block in self.blocks if block.cross is not None]
        works += [name for name in CROSS if any(name not in block.refused for block in crossing)]
        works += [name for name in ("embed", "logits") if name not in self.refused]
        ends = {"embed": self.embed, "final norm": self.norm, "unembedding": self.unembed}
        lines = [
            f"Anatomy of {self.model}: {len(self.blocks)} blocks, verified by one run",
            table(
                ["", "block", "attention", "heads", "out", "mlp", "neurons", "post-norms", "sum", "by head", "p v = z"],
                [row for number, block in enumerate(self.blocks) for row in _rows(number, block)],
            ),
            ", ".join(f"{what} {plain(name or '-')}" for what, name in ends.items()),
            *(f"{check.identity}: {_error(check)}" for check in self.checks),
            *(f"refused: {what}: {plain(why)}" for what, why in refused),
            f"sites: {', '.join(works)}; and any module by its dotted name",
        ]
        return "\n".join(lines)


def anatomy(model: Any, *args: Any, **inputs: Any) -> Anatomy:
    """Find what a model is made of by one run, and verify it on the numbers of that run.

    No architecture is known by name. A block's parts are the modules whose outputs add up to its output; heads are
    those of the queries and keys that attention is called with; the output projection is the module whose input is z,
    bit for bit. What does not verify is refused by name, and the rest works.

    The model runs once, without gradients; caches that are given are not written to. Copies of one block's activations
    are held at a time, so a short input of the kind you mean to study is best.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)))
        >>> found = interp.anatomy(model.eval(), torch.ones(1, 4))
        >>> [block.name for block in found.blocks], found.blocks[0].refused["z"]
        (['0', '1'], 'no attention was seen')

    Args:
        model: an `nn.Module` in eval mode, or the result of `noesis.wrap`.
        *args: what to call it with.
        **inputs: likewise, by name.

    Raises:
        NoesisError: (a TypeError) for another kind of model; (a RuntimeError) for a model in training mode, or one of
            which no block ran; (a ValueError) for a call without inputs.
    """
    if not args and not inputs:
        raise BadValue("anatomy was given no inputs", "what the model is called with", "anatomy(model, input_ids=ids)")
    return anatomy_of(model, args, inputs)


def anatomy_of(model: Any, args: tuple[Any, ...], inputs: dict[str, Any], call: nn.Module | None = None) -> Anatomy:
    """The same, of arguments that are given as such; `call` is what to call instead of the whole model."""
    called, root = called_and_root(model)
    called = called if call is None else call
    if any(map(compiled, root.modules())):
        raise is_compiled(root)
    check_eval(root)
    named = dict(select(root, "blocks"))
    blocks: dict[str, Block] = {}
    last: list[BlockRun] = []

    def ended(run: BlockRun) -> None:
        last[:] = [run]
        if run.name not in blocks:  # a block that runs again is made of the same
            blocks[run.name] = identify(run)

    embedding = embedding_of(root)
    args, inputs = spare(args, inputs)
    devices = {tensor.device for tensor in root.parameters() if tensor.is_cuda}
    # The user's own run draws what it would have drawn.
    with aside(), no_step(model), torch.random.fork_rng(devices=devices):
        recorded = record(
            functools.partial(called, *args, **inputs),
            root,
            named,
            ended,
            also=[] if embedding is None else [embedding],
        )
    if not last:
        raise WrongState(
            f"none of the {len(named)} blocks of {type(root).__name__} ran",
            "a model whose blocks run",
            "Give inputs that reach them, and a model that was not compiled",
        )
    found = Anatomy(type(root).__name__, [blocks.get(name) or _idle(name) for name in named])
    found.shared = _shared(root, found.blocks)
    _ends(found, embedding, recorded, last[0])
    logger.debug("anatomy of {}: {} blocks", found.model, len(found.blocks))
    return found


def called_and_root(model: Any) -> tuple[Any, nn.Module]:
    """What to call of a model, and the module whose dotted names count.

    Raises:
        NoesisError: (a TypeError) for a pipeline, or what is no model; (a ValueError) for a compiled one.
    """
    called, root, _, pipeline = resolve(model)
    if pipeline is not None:
        raise BadType(
            f"model is a pipeline, {type(pipeline).__name__}",
            "an nn.Module",
            "Give its denoiser, such as pipe.transformer or pipe.unet, and that one's inputs",
        )
    if compiled(called):
        raise is_compiled(root)
    return called, root


def is_compiled(root: nn.Module) -> BadValue:
    """The error for a model that is compiled, or has a part that is."""
    return BadValue(
        f"{type(root).__name__} is compiled, so that what is inside it need not run as modules",
        "a model in eager mode",
        "Give it as it was before torch.compile",
    )


def _shared(root: nn.Module, blocks: list[Block]) -> frozenset[str]:
    """The modules that several blocks share, by all their names."""
    times = Counter(part for block in blocks for part in root.get_submodule(block.name).modules())
    if max(times.values()) == 1:
        return frozenset()
    return frozenset(name for name, module in root.named_modules(remove_duplicate=False) if times[module] > 1)


def no_step(model: Any) -> AbstractContextManager[Any]:
    """What runs inside is no step of the user's."""
    return model.paused() if isinstance(model, Wrapped) else nullcontext()


def check_eval(root: nn.Module) -> None:
    """Check that a model computes the same each time.

    Raises:
        NoesisError: (a RuntimeError) in training mode.
    """
    if root.training:
        raise WrongState(
            f"{type(root).__name__} is in training mode, in which dropout draws and norms learn",
            "a model that computes the same each time",
            "Call model.eval() first",
        )


def _idle(name: str) -> Block:
    return Block(name, refused=dict.fromkeys(LAYERED, "the block did not run on these inputs"))


def logits_of(output: Any) -> Tensor | None:
    """The logits of what a model returned: by that name, or the tensor that it returned; else None."""
    found = getattr(output, "logits", output)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def embedding_of(root: nn.Module) -> nn.Module | None:
    """What a transformers model says is its input embedding."""
    ask = getattr(root, "get_input_embeddings", None)
    try:
        found = ask() if callable(ask) else None
    except NotImplementedError:  # transformers, of a model without one
        return None
    return found if isinstance(found, nn.Module) else None


def _ends(found: Anatomy, embedding: nn.Module | None, recorded: Recorded, last: BlockRun) -> None:
    """What is before and after the blocks."""
    found.embed = next((call.name for call in recorded.around if call.module is embedding), None)
    if found.embed is None:
        found.refused["embed"] = "the model has no get_input_embeddings() whose module ran"
    logits = logits_of(recorded.output)
    if logits is None:
        found.refused["logits"] = "what the model returns has no logits"
    final = last.call.output
    norm = next((c for c in recorded.around if same(c.given, final) and _norms(c)), None)
    read = final if norm is None else norm.output
    unembed = next((c for c in recorded.around if same(c.given, read) and is_linear(c.module)), None)
    if unembed is None or unembed.output is None:
        found.refused["final norm and unembedding"] = (
            "no linear layer reads what a norm makes of the last block's output: something lies between, or is left out"
        )
        return
    if logits is None or logits.shape != unembed.output.shape:
        found.refused["final norm and unembedding"] = (
            f"what reads the normed output of the last block, {unembed.name}, is not what returns the logits"
        )
        return
    found.norm, found.unembed = norm and norm.name, unembed.name
    check = check_equal(LOGITS, logits, unembed.output)
    found.checks.append(check)
    if not check.holds:
        found.refused[LOGITS] = "the model changes what its unembedding returns, as by a softcap or a scale"


def _norms(call: Call) -> bool:
    """Whether a module may be a norm: it changes numbers and no shape, and is no linear layer."""
    if call.given is None or call.output is None or call.given.shape != call.output.shape:
        return False
    return not same(call.given, call.output) and not is_linear(call.module)


# ---------------------------------------------------------------- print


def _rows(number: int, block: Block) -> list[list[str]]:
    inner = [_short(name, block) for name in (block.mlp, block.down)]
    norms = ", ".join(_short(name, block) for name in block.post_norms) or "-"
    attends, heads, out, *errors = _attends(block, block, "")
    row = [str(number), block.name, attends, heads, out, *inner, norms, _error(block.check(BLOCK)), *errors]
    if block.cross is None:
        return [row]
    attends, heads, out, *errors = _attends(block.cross, block, "cross_")
    return [row, ["", "", attends, heads, out, "", "", "", "", *errors]]


def _attends(core: Core, block: Block, prefix: str) -> list[str]:
    heads = f"{core.heads}/{core.kv_heads} x {core.width or core.value_width}" if core.heads else "-"
    attends = _short(core.attention, block) + (f" ({core.implementation})" if core.implementation else "")
    errors = [_error(block.check(f"{prefix}{identity}")) for identity in (HEADS, PATTERN)]
    return [attends, heads, _short(core.out, block), *errors]


def _short(name: str | None, block: Block) -> str:
    return "-" if name is None else name.removeprefix(f"{block.name}.")


def _error(check: Check | None) -> str:
    if check is None:
        return "-"
    return ("0" if check.error == 0 else f"{check.error:.0e}") + ("" if check.holds else " fails")


def _grouped(found: Anatomy) -> list[tuple[str, str]]:
    """Refusals with one reason together: which components, and of which layers."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for number, block in enumerate(found.blocks):
        why: dict[str, list[str]] = {}
        for component, reason in block.refused.items():
            why.setdefault(reason, []).append(component)
        for reason, components in why.items():
            reasons.setdefault((", ".join(components), reason), []).append(number)
    grouped = [(f"{what} of {_ranges(layers)}", why) for (what, why), layers in reasons.items()]
    return grouped + list(found.refused.items())


def _ranges(layers: Iterable[int]) -> str:
    """Numbers, those in a row together: '0-3, 5'."""
    shown = []
    for _, group in itertools.groupby(enumerate(sorted(layers)), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        shown.append(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]))
    return ", ".join(shown)
