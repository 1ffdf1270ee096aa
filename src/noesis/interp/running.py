"""One run of a model, of which the sites that were asked for are kept."""

from __future__ import annotations

import difflib
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadValue, WrongState
from ..internals import watching_attention
from ..layers import hidden_state
from ..results import Activations
from ..wrapping import Keeping
from .anatomy import Anatomy, anatomy_of, called_and_root, logits_of
from .attention import Attention, attention_of, pattern_of
from .identifying import Block, results
from .recording import arguments, hidden_input
from .sites import HEADED, MODULE, WHOLE, Asked, Site, numbers, read


class Run:
    """What a run kept, and what the model returned.

    `run["z", 3]` or `run["z.3"]` is the tensor of a site that fired once; `run.activations` has them all, a list per
    site, and saves them.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> interp.run(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.ones(3, 4), keep="0")
        Run that kept Activations of 1 layer, 1 call, 24 bytes
        layer     calls    dtype
        module:0    3x2  float32

    Attributes:
        output: what the model returned, bit for bit what it returns without noesis.
        activations: site -> tensors on the CPU, one per call, as `noesis.Activations`.
        anatomy: of the model, to hand to the next run; None where no site needed it.
    """

    def __init__(self, output: Any, activations: Activations, anatomy: Anatomy | None) -> None:
        self.output, self.activations, self.anatomy = output, activations, anatomy

    @property
    def fired(self) -> dict[str, int]:
        """How often each site was kept."""
        return {site: len(calls) for site, calls in self.activations.items()}

    @property
    def logits(self) -> Tensor:
        """The logits that the model returned, `[batch, tokens, vocabulary]` for a language model.

        Raises:
            NoesisError: (a RuntimeError) when it returned none.
        """
        found = logits_of(self.output)
        if found is None:
            raise WrongState(
                f"the model returned a {type(self.output).__name__} without logits",
                "a model with a head",
                "Use .output",
            )
        return found

    def __getitem__(self, site: str | Site | tuple[str | int, ...]) -> Tensor:
        text = ".".join(map(str, site)) if isinstance(site, tuple) and not isinstance(site, Site) else str(site)
        if text not in self.activations:
            text = _canonical(text) or text
        if text not in self.activations:
            near = difflib.get_close_matches(text, self.activations.layers, n=3) or self.activations.layers[:6]
            raise BadValue(f"{text!r} was not kept", f"a site of keep, such as {', '.join(near)}", "Look at .fired")
        calls = self.activations[text]
        if len(calls) != 1:
            raise BadValue(
                f"{text!r} was kept {len(calls)} times", "a site that fired once", f"Use .activations[{text!r}], a list"
            )
        return calls[0]

    def __repr__(self) -> str:
        return f"Run that kept {self.activations!r}"


def run(
    model: Any,
    inputs: Any,
    *,
    keep: str | Site | Iterable[str | Site] = (),
    anatomy: Anatomy | None = None,
    max_bytes: int = 1 << 30,
) -> Run:
    """Run a model once, without gradients, and keep the sites that are asked for, nothing else.

    | site | tensor |
    |---|---|
    | `resid_pre`, `resid_post` | `[batch, tokens, width]`, what a block is given and what it returns |
    | `resid_mid` | the stream between attention and mlp |
    | `attn`, `mlp` | what is added to the stream, after a post-norm where there is one |
    | `neurons` | `[batch, tokens, neurons]`, the input of the mlp's down projection |
    | `q`, `k`, `v`, `z` | `[batch, tokens, heads, width]`; `q`, `k` after rotary embeddings; `k`, `v` of kv heads |
    | `pattern` | `[batch, heads, queries, keys]` in float32, recomputed from q and k, checked by p v = z |
    | `result` | `[batch, tokens, heads, width]`, z_h W_O of each head; without the bias, before a post-norm |
    | `embed`, `logits` | what the embedding returns, and the model |

    A site is `component.layer.head@position`: `z.3.2@-1`; without a head, all heads, without a position, all; `0-3`
    and `*` stand for several sites, `z` for `z.*`. Any other module is kept by its dotted name, `module:NAME` where it
    could be taken for a component. TransformerLens' names, such as `blocks.3.attn.hook_z`, mean the same. A head or
    position that is given is no dimension any more.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis import interp
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> run = interp.run(model, torch.ones(3, 4), keep=["1", "logits"])
        >>> run["1"].shape, run.fired
        (torch.Size([3, 8]), {'module:1': 1, 'logits': 1})

    Args:
        model: an `nn.Module`, or the result of `noesis.wrap`.
        inputs: a mapping of arguments, a tuple of them, or one.
        keep: sites.
        anatomy: of this model, from `interp.anatomy` or an earlier run; without it, sites of components cost one more
            forward, in which it is found.
        max_bytes: the most bytes of activations to hold.

    Raises:
        NoesisError: (a ValueError) for a site that is not there, with near names, or one that the anatomy refuses, with
            the reason; (a RuntimeError) for one that did not fire; (a MemoryError) when the next tensor would pass
            `max_bytes`.
    """
    called, root = called_and_root(model)
    modules = dict(root.named_modules())
    args, kwargs = arguments(inputs)
    asked = read(keep, [name for name in modules if name])
    if anatomy is not None:
        _check_anatomy(anatomy, modules)
    elif any(each.component not in (MODULE, "logits") for each in asked):
        anatomy = anatomy_of(model, args, kwargs)
    sites = list(dict.fromkeys(site for each in asked for site in _expand(each, anatomy)))
    acts = Activations({str(site): [] for site in sites}, meta={"model": type(root).__name__})
    watching = _Watching(sites, anatomy, modules, Keeping(acts, max_bytes))
    with torch.no_grad(), ExitStack() as leaving:
        watching.attach(leaving)
        output = called(*args, **kwargs)
        watching.ended(output)
    if acts.unmeasured:
        what = ", ".join(f"{site} ({why})" for site, why in acts.unmeasured.items())
        raise BadValue(f"keep has what cannot be kept: {what}", "sites with a dense floating tensor", "Leave it out")
    watching.check_counts()
    if acts.never_ran:
        raise WrongState(
            f"{', '.join(acts.never_ran)} did not fire on these inputs",
            "sites that the model reaches",
            "Give inputs that reach them, leave them out, or give the model as it was before it was compiled",
        )
    return Run(output, acts, anatomy)


def _check_anatomy(anatomy: Anatomy, modules: dict[str, nn.Module]) -> None:
    missing = [block.name for block in anatomy.blocks if block.name not in modules]
    if missing:
        raise BadValue(
            f"anatomy is of another model: this one has no {missing[0]!r}", "the anatomy of this model", "Leave it out"
        )


def _canonical(text: str) -> str | None:
    """The name of one site in our own words, from one in others'."""
    try:
        asked = read(text, [])[0]
    except BadValue:
        return f"{MODULE}:{text}"
    if asked.component in WHOLE:
        return str(Site(asked.component, position=asked.positions[0]))
    single = asked.layers.isdigit() and (not asked.heads or asked.heads.isdigit()) and len(asked.positions) == 1
    head = int(asked.heads) if asked.heads.isdigit() else None
    return str(Site(asked.component, int(asked.layers), head, asked.positions[0])) if single else None


# ---------------------------------------------------------------- what was asked for


def _expand(asked: Asked, anatomy: Anatomy | None) -> list[Site]:
    """The single sites that one string stands for.

    Raises:
        NoesisError: (a ValueError) for a layer or head that is not there, or what the anatomy refuses.
    """
    if asked.component == MODULE:
        return [Site(MODULE, position=position, module=asked.module) for position in asked.positions]
    if asked.component in WHOLE:
        if anatomy is not None and asked.component in anatomy.refused:
            raise _refused(asked.text, asked.component, anatomy.refused[asked.component])
        return [Site(asked.component, position=position) for position in asked.positions]
    assert anatomy is not None
    found = []
    for layer in numbers(asked.layers, len(anatomy.blocks), "layer", asked.text):
        block = anatomy.blocks[layer]
        if asked.component in block.refused:
            raise _refused(asked.text, f"{asked.component}.{layer}", block.refused[asked.component])
        heads: Sequence[int | None] = [None]
        if asked.heads:
            count = block.kv_heads if asked.component in ("k", "v") else block.heads
            heads = numbers(asked.heads, count, "head", asked.text)
        found += [Site(asked.component, layer, head, position) for head in heads for position in asked.positions]
    return found


def _refused(text: str, site: str, why: str) -> BadValue:
    return BadValue(
        f"keep has {text!r}, and {site} is refused: {why}",
        "a site that was verified",
        "print(interp.anatomy(model, ...)) lists what works; modules are kept by their dotted names",
    )


# ---------------------------------------------------------------- keeping it


class _Watching:
    """Reads the sites of one run where they are."""

    def __init__(
        self, sites: list[Site], anatomy: Anatomy | None, modules: dict[str, nn.Module], keeping: Keeping
    ) -> None:
        self.anatomy, self.modules, self.keeping = anatomy, modules, keeping
        self.before: dict[nn.Module, list[Site]] = {}  # of what a module is given
        self.after: dict[nn.Module, list[Site]] = {}  # of what it returns
        self.attending: dict[nn.Module, list[Site]] = {}
        self.attended: dict[nn.Module, Attention] = {}  # by output projection, until it runs
        self.thread = threading.get_ident()  # what others run meanwhile is theirs
        self.open: list[nn.Module] = []  # blocks that run now
        self.runs: Counter[nn.Module] = Counter()  # of blocks
        self.at_the_end = [site for site in sites if site.component == "logits"]
        self.aside = False
        for site in sites:
            for table, name in self._places(site):
                table.setdefault(modules[name], []).append(site)

    def _places(self, site: Site) -> list[tuple[dict[nn.Module, list[Site]], str]]:
        if site.component == MODULE:
            return [(self.after, site.module)]
        if site.component == "logits":
            return []
        assert self.anatomy is not None
        if site.component == "embed":
            return [(self.after, str(self.anatomy.embed))]
        assert site.layer is not None
        block: Block = self.anatomy.blocks[site.layer]
        if site.component == "result":
            return [(self.attending, str(block.attention)), (self.before, str(block.out))]
        if site.component in HEADED:
            return [(self.attending, str(block.attention))]
        table, name = {
            "resid_pre": (self.before, block.name),
            "resid_mid": (self.before, block.mid),
            "resid_post": (self.after, block.name),
            "attn": (self.after, block.attn),
            "mlp": (self.after, block.mlp),
            "neurons": (self.before, block.down),
        }[site.component]
        return [(table, str(name))]

    def attach(self, leaving: ExitStack) -> None:
        """Watch until `leaving` is left."""
        for module in {block for site in self._sites() if (block := self._block(site)) is not None}:
            leaving.callback(module.register_forward_pre_hook(self._opens).remove)
            leaving.callback(module.register_forward_hook(self._closes).remove)
        for module in self.before:
            leaving.callback(module.register_forward_pre_hook(self._begins, with_kwargs=True).remove)
        for module in self.after:
            leaving.callback(module.register_forward_hook(self._ends).remove)
        if self.attending:
            leaving.enter_context(watching_attention(self._attends))

    def _sites(self) -> set[Site]:
        return {
            site for table in (self.before, self.after, self.attending) for sites in table.values() for site in sites
        }

    def _block(self, site: Site) -> nn.Module | None:
        """The block inside of which a site is; a module that blocks share is one site in each."""
        if site.layer is None or self.anatomy is None or site.component in ("resid_pre", "resid_post"):
            return None
        return self.modules[self.anatomy.blocks[site.layer].name]

    def _here(self, site: Site) -> bool:
        block = self._block(site)
        if self.aside or threading.get_ident() != self.thread:
            return False
        return block is None or block in self.open

    def _opens(self, block: nn.Module, _args: Any) -> None:
        if threading.get_ident() == self.thread:
            self.open.append(block)
            self.runs[block] += 1

    def _closes(self, _block: nn.Module, _args: Any, _output: Any) -> None:
        if threading.get_ident() == self.thread:
            self.open.pop()

    def check_counts(self) -> None:
        """Each site of a block has to fire once each time that the block runs.

        Raises:
            NoesisError: (a RuntimeError) when one did not, as where a model takes another way than in its anatomy.
        """
        for site in self._sites():
            block, fired = self._block(site), len(self.keeping.acts[str(site)])
            if block is not None and fired != self.runs[block]:
                raise WrongState(
                    f"{site} fired {fired} times in {self.runs[block]} runs of its block",
                    "a model that takes the way it took in its anatomy",
                    "Leave out anatomy=, so that it is found on these inputs",
                )

    def ended(self, output: Any) -> None:
        """Keep what the model returned."""
        for site in self.at_the_end:
            self._keep(site, logits_of(output))

    def _begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = hidden_input(args, kwargs)
        for site in [site for site in self.before[module] if self._here(site)]:
            if site.component != "result":
                self._keep(site, given)
            elif module in self.attended and given is not None:
                self.aside = True  # what is inside the projection runs once more per head
                try:
                    self._keep(site, results(module, self.attended[module].z, given.shape)[0])
                finally:
                    self.aside = False
        self.attended.pop(module, None)

    def _ends(self, module: nn.Module, _args: Any, output: Any) -> None:
        for site in [site for site in self.after[module] if self._here(site)]:
            self._keep(site, hidden_state(output))

    def _attends(self, module: nn.Module, given: dict[str, Any], implementation: str, result: Any) -> None:
        sites = [site for site in self.attending.get(module, []) if self._here(site)]
        if not sites:
            return
        call = attention_of(module, given, implementation, result)
        if isinstance(call, str):
            raise WrongState(f"{sites[0]} cannot be read: {call}", "attention by heads", "Leave it out")
        pattern = pattern_of(call) if any(site.component == "pattern" for site in sites) else None
        if isinstance(pattern, str):
            raise WrongState(
                f"pattern.{sites[0].layer} cannot be given: {pattern}", "a checked pattern", "Leave it out"
            )
        for site in sites:
            if site.component == "result":
                assert self.anatomy is not None
                assert site.layer is not None
                self.attended[self.modules[str(self.anatomy.blocks[site.layer].out)]] = call
            else:
                self._keep(
                    site, pattern.tensor if pattern and site.component == "pattern" else call.component(site.component)
                )

    def _keep(self, site: Site, tensor: Tensor | None) -> None:
        if tensor is not None and site.position is not None:
            tensor = _at(site, tensor)
        if tensor is not None and site.head is not None:
            axis = 1 if site.component == "pattern" else 2 - (site.position is not None)
            tensor = tensor.select(axis, site.head)
        self.keeping.keep(str(site), tensor)


def _at(site: Site, tensor: Tensor) -> Tensor:
    """One position of a tensor `[batch, tokens, ...]`, or of a pattern's queries."""
    axis = 2 if site.component == "pattern" else 1
    position = site.position or 0
    if tensor.dim() < 3 or not -tensor.shape[axis] <= position < tensor.shape[axis]:
        shape = "x".join(map(str, tensor.shape))
        raise BadValue(
            f"{site} is a position of a tensor of shape {shape}",
            f"[batch, tokens, ...] with {position} among the tokens",
            "Leave out the position",
        )
    return tensor.select(axis, position)
