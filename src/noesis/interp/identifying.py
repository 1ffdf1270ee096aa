"""What the parts of one block are, by the numbers of one run."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..internals import SOFTMAX, TORCH_SDPA
from ..layers import is_attention, is_leaf, is_linear
from .attention import PATTERN, Attention, pattern_of
from .checks import Check, check_equal, check_sum, same
from .recording import BlockRun, Call
from .sites import CROSS, HEADED

#: More sums of candidates than this are not tried.
MOST_SUMS = 4096
BLOCK, HEADS = "block = input + attention + mlp", "sum over heads = attention output"
UNSEEN = (
    "its attention goes neither through transformers' attention interface nor through functions of torch that are known"
)
BY_SHAPES = "batch and heads are one dimension, which only shapes tell apart"


@dataclass
class Core:
    """One attention of a block, by dotted names. None where nothing was found."""

    name: str  # of the block
    attention: str | None = None  # the module that attends
    implementation: str = ""
    heads: int = 0
    kv_heads: int = 0
    width: int = 0  # of a head's queries and keys; 0 where they are not told
    value_width: int = 0
    out: str | None = None  # the output projection, whose input is z, bit for bit
    attn: str | None = None  # whose output is added to the residual stream


@dataclass
class Block(Core):
    """What one block is made of, and what was verified: its attention, that of its own tokens where it has two."""

    cross: Core | None = None  # its second attention, which looks at other tokens
    added: tuple[str, ...] = ()  # what is added to the stream before the mlp, in order: `attn` of one attention or two
    mlp: str | None = None  # likewise
    mid: str | None = None  # whose input is the residual stream between attention and mlp
    down: str | None = None  # the mlp's down projection, whose input are the neurons
    post_norms: tuple[str, ...] = ()  # between a part and the sum
    checks: list[Check] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # component -> why

    def core(self, component: str) -> Core:
        """The attention that a component is of."""
        return self.cross if component in CROSS and self.cross is not None else self

    def check(self, identity: str) -> Check | None:
        """The check of an identity, if there was something to check."""
        return next((check for check in self.checks if check.identity == identity), None)


def identify(run: BlockRun) -> Block:
    """Find the parts of a block by what was added up in it, and where the heads are."""
    block = Block(run.name)
    cores = list(dict.fromkeys(name for name, _, _ in run.attention)) or _named_attention(run)
    _heads(block, run, cores)
    if run.call.given is None:
        _refuse(block, "the block is given no dense floating tensor", "resid_pre")
    if run.call.output is None:
        _refuse(block, "the block returns no dense floating tensor", "resid_post")
    if run.call.given is None or run.call.output is None or run.call.given.shape != run.call.output.shape:
        return _refuse(block, "the block's input and output are no hidden states of one shape")
    if not cores:
        return _refuse(block, "no attention was seen in the block, beside which the mlp could be told")
    _sum(block, run, cores)
    return block


def _refuse(block: Block, why: str, *components: str) -> Block:
    cross = ["cross_attn"] if block.cross is not None else []
    for component in components or ("resid_mid", "attn", *cross, "mlp", "neurons"):
        block.refused.setdefault(component, why)
    return block


def _named_attention(run: BlockRun) -> list[str]:
    """Modules that are called attention, the innermost."""
    found = [call.name for call in run.inside if is_attention(call.name, call.module)]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


# ---------------------------------------------------------------- heads


def _heads(block: Block, run: BlockRun, cores: list[str]) -> None:
    if len(cores) == 1:
        block.attention = cores[0]
    if not run.attention:
        _refuse(block, UNSEEN if cores else "no attention was seen", *HEADED)
        return
    order = _own_and_cross(run, cores)
    if isinstance(order, str):
        _refuse(block, order, *HEADED)
        return
    for place in order:
        name, _, call = run.attention[place]
        core: Core = block
        if place != order[0]:
            core = block.cross = Core(block.name)
        core.attention = name
        _core(block, core, run, call)


def _own_and_cross(run: BlockRun, cores: list[str]) -> list[int] | str:
    """The attention of the block's own tokens, and where there is another, that of others; or why they are not told."""
    count = len(run.attention)
    if count == 1:
        return [0]
    if count > 2 or len(cores) != count or any(_within(a, b) for a, b in itertools.permutations(cores, 2)):
        where = f" in {len(cores)} module{'s' * (len(cores) > 1)}" if len(cores) != count else ""
        return f"the block attends {count} times{where}"
    calls = [call for _, _, call in run.attention]
    if len({call.implementation in (TORCH_SDPA, SOFTMAX) for call in calls if isinstance(call, Attention)}) > 1:
        return f"the block attends {count} times, by an interface and by functions of torch"
    marks = [[run.elsewhere.get(name, False) for name in cores]]
    marks.append([isinstance(call, Attention) and call.k is not None and _others(call) for call in calls])
    for mark in marks:
        if sum(mark) == 1:
            return [mark.index(False), mark.index(True)]
    return "the block attends twice, and nothing tells which attention looks at other tokens than its own"


def _others(call: Attention) -> bool:
    """Whether there are other keys than queries."""
    return call.z.shape[1] != call.v.shape[2]


def _core(block: Block, core: Core, run: BlockRun, call: Attention | str) -> None:
    """The heads of one attention."""
    prefix = "" if core is block else "cross_"

    def refuse(why: str, *components: str) -> None:
        _refuse(block, why, *(f"{prefix}{component}" for component in components))

    if isinstance(call, str):
        refuse(call, *HEADED)
        return
    core.implementation = call.implementation
    core.heads, core.kv_heads, core.value_width = call.z.shape[2], call.v.shape[1], call.v.shape[3]
    core.width = 0 if call.q is None else call.q.shape[3]
    if call.q is None:
        refuse("what goes into its softmax is not one product of queries and keys", "q", "k")
    pattern = pattern_of(call)
    if isinstance(pattern, str):
        refuse(pattern, "pattern")
    else:
        block.checks.append(pattern.check._replace(identity=f"{prefix}{PATTERN}"))
    found = _projection(core, run, call)
    if isinstance(found, str):
        refuse(found, "result")
    else:
        block.checks.append(found._replace(identity=f"{prefix}{HEADS}"))
        if not found.holds:
            refuse(f"{HEADS} does not hold", "result")
    if core.out is None and call.by_shapes:
        refuse(f"{BY_SHAPES}, and {found}", *HEADED)
    if core.out is None and call.pattern is not None and not _of_tokens(call, run):
        refuse("its softmax weighs something else than tokens", *HEADED)


def _of_tokens(call: Attention, run: BlockRun) -> bool:
    """Whether there are as many queries as the block is given tokens, or an image points."""
    given = run.call.given
    if given is None or given.dim() < 3:
        return False
    return call.z.shape[0] * call.z.shape[1] in (given.numel() // given.shape[-1], given.numel() // given.shape[1])


def _projection(core: Core, run: BlockRun, call: Attention) -> Check | str:
    """The module that reads z, by what it makes of each head; or why there is none."""
    reading = [inner for inner in _once(run) if is_leaf(inner.module) and same(inner.given, call.z)]
    # Dropout reads it, too, and changes nothing; nor does a linear layer, where z is nought.
    reading = [inner for inner in reading if is_linear(inner.module) or not same(inner.output, call.z)]
    if len(reading) > 1:
        names = ", ".join(inner.name.removeprefix(f"{run.name}.") for inner in reading)
        return f"several modules read z: {names}"
    projection = next(iter(reading), None)
    if projection is None or projection.output is None or projection.given is None:
        return "no module's input is z, bit for bit, so there is no output projection to go by"
    try:
        each, nothing = results(projection.module, call.z, projection.given.shape)
    except Exception as error:  # of a stranger's forward, which may want more than its input
        return f"{projection.name} cannot be asked for one head at a time: {type(error).__name__}: {error}"
    core.out = projection.name
    return check_equal(HEADS, projection.output, each.float().sum(2) + nothing.float())


def results(projection: nn.Module, z: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What each head adds to the output of attention, z_h W_O^h, and what is added without any head, the bias.

    Whatever kind of layer the projection is (LoRA, quantised, Conv1D), it is asked with one head at a time.

    Args:
        projection: the output projection.
        z: `[batch, tokens, heads, width]`.
        shape: of the projection's input.

    Returns:
        Tensors `[batch, tokens, heads, model width]` and `[batch, tokens, model width]`.
    """

    def projected(heads: Tensor) -> Tensor:
        out: Tensor = projection.forward(heads.reshape(tuple(shape)))  # not a call of the model's own
        return out.reshape(*z.shape[:2], -1)

    nothing = projected(torch.zeros_like(z))
    each = []
    for head in range(z.shape[2]):
        alone = torch.zeros_like(z)
        alone[:, :, head] = z[:, :, head]
        each.append(projected(alone) - nothing)
    return torch.stack(each, dim=2), nothing


# ---------------------------------------------------------------- what is added up


def _sum(block: Block, run: BlockRun, cores: list[str]) -> None:
    x, y = run.call.given, run.call.output
    assert x is not None
    assert y is not None
    chains = [_attention_outputs(run, core, x) for core in cores]
    follows = {id(call) for chain in chains for call in chain}
    holding = {name for core in cores for name in _ancestors(core)}
    others = [
        call
        for call in _once(run)
        if call.name not in holding and _fits(call, x) and not any(_within(call.name, core) for core in cores)
    ]
    order = {id(call): place for place, call in enumerate(run.inside)}
    options = [_distinct(chain) for chain in chains]
    options.append(_distinct(others))
    count = math.prod(map(len, options))
    if count > MOST_SUMS:
        _refuse(block, f"it has too many parts to try what adds up: {count} sums")
        return
    sums = [
        parts
        for parts in itertools.product(*options)
        if id(parts[-1]) not in follows or order[id(parts[-1])] > max(order[id(part)] for part in parts[:-1])
    ]
    tried = [(check_sum(BLOCK, y, [x, *_outputs(parts)]), parts) for parts in sums]
    if not any(check.holds for check, _ in tried):  # without an mlp
        tried += [(check_sum(BLOCK, y, [x, *_outputs(parts)]), parts) for parts in itertools.product(*options[:-1])]
    best = min(tried, key=lambda each: each[0].error, default=None)
    if best is None or not best[0].holds:
        block.checks += [best[0]] if best else []
        _refuse(block, f"{BLOCK} does not hold: the block normalises or scales the sum, or adds otherwise")
        return
    check, parts = best
    if sum(other.holds for other, _ in tried) > 1:
        _refuse(block, "several of its modules would make up the block's output within rounding")
        return
    block.checks.append(check)
    attention, mlp = parts[: len(cores)], next(iter(parts[len(cores) :]), None)
    _added(block, cores, attention, order)
    _mid(block, run, x, attention, mlp)
    _mlp(block, run, mlp)
    changed = [call for call in parts if _changes(call) and not any(_within(call.name, core) for core in cores)]
    block.post_norms = tuple(call.name for call in changed)


def _added(block: Block, cores: Sequence[str], attention: Sequence[Call], order: dict[int, int]) -> None:
    """What each attention adds, by the modules whose outputs they are."""
    if len(cores) > 1 and block.cross is None:
        _refuse(block, f"the block attends {len(cores)} times", "attn")
        return
    for name, call in zip(cores, attention, strict=True):
        core = block.cross if block.cross is not None and block.cross.attention == name else block
        core.attn = call.name
    block.added = tuple(call.name for call in sorted(attention, key=lambda call: order[id(call)]))


def _mid(block: Block, run: BlockRun, x: Tensor, attention: Sequence[Call], mlp: Call | None) -> None:
    """The module that reads the residual stream after attention."""
    parts = [x, *_outputs(attention)]
    for call in reversed(_once(run) if mlp is not None else []):
        given = call.given
        if given is None or given.numel() != x.numel() or same(given, x) or not is_leaf(call.module):
            continue
        check = check_sum(f"input of {call.name} = input + attention", given.reshape(x.shape), parts)
        if check.holds:
            block.mid = call.name
            block.checks.append(check)
            return
    _refuse(block, "no module reads input + attention alone, as where attention and mlp run in parallel", "resid_mid")


def _mlp(block: Block, run: BlockRun, mlp: Call | None) -> None:
    if mlp is None:
        _refuse(block, "attention alone adds up to the block's output", "mlp", "neurons")
        return
    block.mlp = mlp.name
    target = mlp.output
    for call in reversed(run.inside):
        if is_leaf(call.module) and same(call.output, target):
            if is_linear(call.module) and any(call is other for other in _once(run)):
                block.down = call.name
                return
            target = call.given
    _refuse(block, _why_no_neurons(run, mlp), "neurons")


def _why_no_neurons(run: BlockRun, mlp: Call) -> str:
    """Why the input of no one linear layer is the neurons of all tokens; most often, experts share the tokens."""
    start = len(run.name) + 1
    called = {call.name: call.module for call in run.inside}
    batched = [
        f"{name}.{key}"[start:]
        for name, module in called.items()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
    ]
    if batched:
        few = ", ".join(batched[:2])
        return f"the mlp has experts in parameters of three dimensions ({few}), whose neurons pass no module"
    rows = _rows(mlp.output)
    linear = [call for call in run.inside if is_linear(call.module)]
    routed = [call.name[start:] for call in linear if _rows(call.output) not in (0, rows)]
    if routed:
        few = ", ".join(routed[:2])
        return f"the mlp has experts, and each is given the tokens of its own route ({few}): keep these by name"
    return "what the mlp returns is not the output of one linear layer"


def _rows(tensor: Tensor | None) -> int:
    return 0 if tensor is None or not tensor.numel() else tensor.numel() // tensor.shape[-1]


def _attention_outputs(run: BlockRun, core: str, x: Tensor) -> list[Call]:
    """What attention may have added: outputs of the module, of those in and around it, and of those that follow."""
    around = [name for name in _ancestors(core) if _within(name, run.name) and name != run.name]
    chain: list[Call] = []
    for call in run.inside:
        begun = _within(call.name, core) or call.name in around
        # Zeros are what many a module is given, and tell nothing of whose they are.
        if begun or any(same(call.given, before.output) and _some(before.output) for before in chain):
            chain.append(call)
    once = {id(call) for call in _once(run)}
    return [call for call in chain if _fits(call, x) and id(call) in once]


def _some(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(tensor.any())


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _once(run: BlockRun) -> list[Call]:
    """Calls of modules that were called once, by which a site can be told: a ViT has one dropout for two parts."""
    count = Counter(call.module for call in run.inside)
    return [call for call in run.inside if count[call.module] == 1]


def _fits(call: Call, x: Tensor) -> bool:
    return call.output is not None and call.output.numel() == x.numel()


def _distinct(calls: Sequence[Call]) -> list[Call]:
    """Of calls that returned the same, the last: the nearest to the sum."""
    return [
        call
        for index, call in enumerate(calls)
        if not any(same(call.output, later.output) for later in calls[index + 1 :])
    ]


def _outputs(calls: Sequence[Call]) -> list[Tensor]:
    return [call.output for call in calls if call.output is not None]


def _changes(call: Call) -> bool:
    leaf = is_leaf(call.module) and not is_linear(call.module)
    return leaf and call.given is not None and call.given.numel() > 0 and not same(call.given, call.output)
