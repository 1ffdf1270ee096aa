"""One run of a model, of which the sites that were asked for are kept."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..errors import BadValue, WrongState
from ..results import Activations
from ..wrapping import Keeping
from .anatomy import Anatomy, anatomy_of, called_and_root, logits_of
from .editing import Editing, editing
from .edits import Edit
from .gradients import Gradients
from .ordering import in_order
from .places import check_anatomy, expanded, needs_anatomy, part_of, place_of
from .recording import arguments
from .sites import Site, canonical, read
from .visiting import Visiting


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
        editing: what the edits of this run have done, as an `Editing`; None without edits.
        grad: of each site, the gradient of the metric that was asked for, as another `Run`; None without one.
    """

    def __init__(
        self,
        output: Any,
        activations: Activations,
        anatomy: Anatomy | None,
        editing: Editing | None = None,
        grad: Activations | None = None,
    ) -> None:
        self.output, self.activations, self.anatomy, self.editing = output, activations, anatomy, editing
        self.grad: Run | None = None if grad is None else Run(output, grad, anatomy)

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
            text = canonical(text) or text
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
    edits: Iterable[Edit] = (),
    grad_of: Callable[[Any], Tensor] | None = None,
    anatomy: Anatomy | None = None,
    max_bytes: int = 1 << 30,
) -> Run:
    """Run a model once, and keep the sites that are asked for, nothing else.

    Without `grad_of`, it runs without gradients.

    | site | tensor |
    |---|---|
    | `resid_pre`, `resid_post` | `[batch, tokens, width]`, what a block is given and what it returns |
    | `resid_mid` | the stream between attention and mlp |
    | `attn`, `mlp` | what is added to the stream, after a post-norm where there is one |
    | `neurons` | `[batch, tokens, neurons]`, the input of the mlp's down projection |
    | `q`, `k`, `v`, `z` | `[batch, tokens, heads, width]`; `q`, `k` after rotary embeddings; `k`, `v` of kv heads |
    | `pattern` | `[batch, heads, queries, keys]` in float32, recomputed from q and k, checked by p v = z |
    | `result` | `[batch, tokens, heads, width]`, z_h W_O of each head; without the bias, before a post-norm |
    | `cross_q`, ... `cross_attn` | the same of a block's second attention, which looks at tokens of an encoder |
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
        edits: changes, applied in their order; what is kept is what is there after them. See `editing`.
        grad_of: a metric of what the model returns, one number per example, such as `interp.logit_difference`; its
            gradient with respect to each site is `run.grad`.
        anatomy: of this model, from `interp.anatomy` or an earlier run; without it, sites of components cost one more
            forward, in which it is found.
        max_bytes: the most bytes of activations to hold.

    Raises:
        NoesisError: (a ValueError) for a site that is not there, with near names, or one that the anatomy refuses, with
            the reason; (a RuntimeError) for one that did not fire; (a MemoryError) when the next tensor would pass
            `max_bytes`.
    """
    called, root = called_and_root(model)
    args, kwargs = arguments(inputs)
    asked, edits = read(keep, root), tuple(in_order(tuple(edits)).values())
    if anatomy is not None:
        check_anatomy(anatomy, root)
    elif needs_anatomy(asked) or any(needs_anatomy(edit.asked(root)) for edit in edits):
        anatomy = anatomy_of(model, args, kwargs)
    sites = expanded(asked, anatomy)
    names = [str(site) for site in sites]
    keeping = Keeping(Activations({name: [] for name in names}, meta={"model": type(root).__name__}), max_bytes)
    visiting = Visiting(root, anatomy, own_thread=True)
    for site, name in zip(sites, names, strict=True):
        visiting.add(_Keeper(site, name, keeping), place_of(site, anatomy))
        if site.layer is not None:
            visiting.block(site.layer).runs = 0
    seen = None if grad_of is None else Gradients(sites, anatomy, visiting)
    at_work = editing(model, *edits, anatomy=anatomy) if edits else None
    with torch.set_grad_enabled(seen is not None), ExitStack() as leaving:
        if at_work is not None:
            leaving.enter_context(at_work)
        visiting.attach(leaving)
        output = called(*args, **kwargs)
    _check(visiting, dict(zip(names, sites, strict=True)), keeping.acts)
    grad = None if seen is None or grad_of is None else seen.of(grad_of, output, max_bytes - keeping.held)
    return Run(output, keeping.acts, anatomy, at_work, grad)


# ---------------------------------------------------------------- keeping it


class _Keeper:
    """Keeps what passes one site."""

    def __init__(self, site: Site, name: str, keeping: Keeping) -> None:
        self.site, self.name, self.keeping = site, name, keeping

    def visit(self, whole: Tensor) -> None:
        """Keep a copy of the site's part."""
        self.keeping.keep(self.name, part_of(self.site, whole))


def _check(visiting: Visiting, sites: dict[str, Site], acts: Activations) -> None:
    """Check that all was kept that was asked for.

    Raises:
        NoesisError: (a ValueError) for what cannot be kept; (a RuntimeError) for a site that did not fire.
    """
    if acts.unmeasured:
        what = ", ".join(f"{site} ({why})" for site, why in acts.unmeasured.items())
        raise BadValue(f"keep has what cannot be kept: {what}", "sites with a dense floating tensor", "Leave it out")
    _check_counts(visiting, sites, acts)
    if acts.never_ran:
        raise WrongState(
            f"{', '.join(acts.never_ran)} did not fire on these inputs",
            "sites that the model reaches",
            "Give inputs that reach them, leave them out, or give the model as it was before it was compiled",
        )


def _check_counts(visiting: Visiting, sites: dict[str, Site], acts: Activations) -> None:
    """Each site of a block has to fire once each time that the block runs.

    Raises:
        NoesisError: (a RuntimeError) when one did not, as where a model takes another way than in its anatomy.
    """
    for name, site in sites.items():
        if site.layer is None:
            continue
        fired, runs = len(acts[name]), visiting.block(site.layer).runs
        if fired != runs:
            raise WrongState(
                f"{name} fired {fired} times in {runs} runs of its block",
                "a model that takes the way it took in its anatomy",
                "Leave out anatomy=, so that it is found on these inputs",
            )
