"""Scores of edges: what each writer changes in the residual stream, times the gradient through one reader alone.

Nothing is held per edge but its score: writers are as many tensors of the stream's size as there are of them, readers
are had layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadValue
from ..layers import is_leaf, is_linear
from .anatomy import Anatomy, called_and_root
from .aside import aside
from .checks import check_equal, same
from .estimating import Ends, Estimates, Path, middles
from .identifying import Block
from .places import AFTER, BEFORE, Place, place_of
from .projections import Passed, Projection, find_projection, matrix_of, one_head_each
from .running import Run
from .sites import MODULE, Edge, Site
from .visiting import Visiting

#: Without these components of a block, it has no edges that are known.
NEEDED = ("resid_pre", "resid_post", "q", "k", "v", "z", "result", "attn")
#: Tensors at which the whole gradient is taken first.
WHOLE = ("q", "k", "v", "attn", "mlp", "resid_post")


class EdgeScores:
    """The edges of a model.

    Args:
        anatomy: of the model.
        few: a few pairs, on which is tried what the anatomy does not say.

    Raises:
        NoesisError: (a ValueError) for a model whose blocks were not verified to be sums of heads and an mlp.
    """

    def __init__(self, anatomy: Anatomy, few: Ends) -> None:
        self.anatomy = anatomy
        _, self.root = called_and_root(few.model)
        for at, block in enumerate(anatomy.blocks):
            for component in NEEDED:
                if component in block.refused:
                    raise _refuse(anatomy, f"{component}.{at} is refused: {block.refused[component]}")
        self.layers = [_Layer(self.root, at, block, anatomy.shared) for at, block in enumerate(anatomy.blocks)]
        self.senders = [Path.site(anatomy)]  # what begins the stream
        for layer in self.layers:
            layer.before = len(self.senders)
            self.senders += [Site("z", layer.number, head) for head in range(layer.block.heads)]
            layer.after = len(self.senders)
            self.senders += [Site("mlp", layer.number)] * (layer.block.mlp is not None)
        self._try(few)

    def _try(self, few: Ends) -> None:
        """Find what lies between heads and the stream, and what mlps read, and check that blocks hand the stream on."""
        out = {layer.number: Site(MODULE, module=str(layer.block.out)) for layer in self.layers}
        keep = [Site(name, layer.number) for layer in self.layers for name in ("resid_pre", "resid_post", "attn")]
        seen = few.run(few.base, list(dict.fromkeys([*keep, *out.values(), Path.site(self.anatomy)])))
        for layer in self.layers:
            after = layer.number + 1
            if after < len(self.layers) and not same(seen["resid_post", layer.number], seen["resid_pre", after]):
                raise _refuse(self.anatomy, f"block {after} is given something else than block {layer.number} returns")
            made, added = seen[out[layer.number]], seen["attn", layer.number]
            layer.measure(self.root, made)
            if not same(made, added):
                layer.norm = self.root.get_submodule(str(layer.block.attn))
                with aside(), torch.no_grad():
                    given = made.to(_device(layer.norm))
                    normed: Any = layer.norm.forward(given)
                if not isinstance(normed, Tensor) or not check_equal("", added, normed.cpu()).holds:
                    raise _refuse(
                        self.anatomy,
                        f"what lies between {layer.block.out} and the stream is not one norm of its output",
                    )
        _, graph = self._forward(self._path(few, seen, seen), 0.0)
        for layer in self.layers:
            held = graph[layer.number]
            layer.find_projections(self.root, held)
            layer.sequential = "mlp" in held and _grad([held["mlp"].sum()], [held["attn"]])[0] is not None

    # ------------------------------------------------------------ writers

    def _runs(self, ends: Ends) -> tuple[Run, Run]:
        """Both runs, the one that is changed first."""
        keep = [Site("resid_pre", 0), Path.site(self.anatomy)]
        keep += [Site("z", layer.number) for layer in self.layers]
        keep += [Site("mlp", layer.number) for layer in self.layers if layer.block.mlp is not None]
        keep += [Site(MODULE, module=str(layer.block.out)) for layer in self.layers if layer.norm is not None]
        keep = list(dict.fromkeys(keep))
        return ends.run(ends.base, keep), ends.run(ends.source, keep)

    def _changes(self, base: Run, source: Run) -> Tensor:
        """What each writer changes in the stream, `[pairs, writers, tokens * width]`."""

        def change(site: Site) -> Tensor:
            return _wide(source[site] - base[site])

        first = change(Site("resid_pre", 0))
        pairs, tokens, _ = first.shape
        device = _device(self.root)
        found = torch.empty(pairs, len(self.senders), first[0].numel(), dtype=first.dtype, device=device)
        found[:, 0] = first.flatten(1)
        for layer in self.layers:
            z = change(Site("z", layer.number)).to(device)
            each = torch.einsum("pthv,hvd->phtd", z, layer.out)
            if layer.norm is not None:
                made = base[Site(MODULE, module=str(layer.block.out))].to(device).reshape(pairs, 1, tokens, -1)
                with aside(), torch.no_grad():
                    each = _wide(layer.norm.forward((made + each).to(made))) - _wide(layer.norm.forward(made))
            found[:, layer.before : layer.after] = each.flatten(2)
            if layer.block.mlp is not None:
                found[:, layer.after] = change(Site("mlp", layer.number)).reshape(pairs, -1)
        return found

    # ------------------------------------------------------------ readers

    def _forward(self, path: Path, share: float) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The metric at a point of the path, and the tensors it was computed by: each layer's, and the end's."""
        visiting = path.visiting(share)
        graph: list[dict[str, Tensor]] = [{} for _ in (*self.layers, None)]
        for layer in self.layers:
            layer.add_to(visiting, self.anatomy, graph[layer.number])
        last = Site("resid_post", self.layers[-1].number)
        visiting.add(_Seen(last, graph[-1], "resid_post"), place_of(last, self.anatomy))
        return path.forward(visiting), graph

    def _gradients(self, path: Path, share: float) -> Iterator[tuple[tuple[Site, ...], int, Tensor]]:
        """Of each layer, readers, how many writers precede them, and gradients `[pairs, readers, tokens * width]`."""
        values, graph = self._forward(path, share)
        asked = [(number, name) for number, held in enumerate(graph) for name in held if name in WHOLE]
        found = _grad([values.sum()], [graph[number][name] for number, name in asked])
        total = {
            place: torch.zeros_like(graph[place[0]][place[1]]) if gradient is None else gradient
            for place, gradient in zip(asked, found, strict=True)
        }
        pairs = len(values)
        for layer in self.layers:
            held, number = graph[layer.number], layer.number
            for name in "qkv":
                heads = layer.back(held, name, total[number, name])
                sites = tuple(Site(name, number, head) for head in range(len(heads)))
                yield sites, layer.before, _wide(heads.transpose(0, 1)).flatten(2)
            if layer.block.mlp is not None:
                yield (Site("mlp", number),), *layer.back_of_mlp(held, total[number, "attn"], total[number, "mlp"])
        yield (Site("logits"),), len(self.senders), _wide(total[len(self.layers), "resid_post"]).reshape(pairs, 1, -1)

    def estimate(self, ends: Ends, steps: int) -> Estimates:
        """The scores of all edges; `changed` is of writers."""
        base, source = self._runs(ends)
        changes = self._changes(base, source)
        path = self._path(ends, base, source)
        shares = middles(steps)
        scores: dict[tuple[Site, ...], Tensor] = {}  # of the readers of one layer, [pairs, writers, readers]
        for share in shares:
            for readers, writers, gradients in self._gradients(path, share):
                product = torch.bmm(changes[:, :writers], gradients.transpose(1, 2)).double() / len(shares)
                scores[readers] = scores[readers] + product if readers in scores else product
        edges = [
            Edge(sender, reader)
            for readers, each in scores.items()
            for reader in readers
            for sender in self.senders[: each.shape[1]]
        ]
        flat = torch.cat([each.permute(2, 1, 0).flatten(0, 1) for each in scores.values()])
        source_values, base_values = (ends.looking.values(each.output)[0] for each in (source, base))
        return Estimates(edges, (changes != 0).any(2).T.cpu(), source_values, base_values, flat.cpu().numpy())

    def _path(self, ends: Ends, base: Run, source: Run) -> Path:
        site = Path.site(self.anatomy)
        return Path(ends, base[site], source[site])


class _Layer:
    """A block, as edges know it."""

    def __init__(self, root: nn.Module, number: int, block: Block, shared: frozenset[str]) -> None:
        self.number, self.block = number, block
        self.before = self.after = 0  # how many writers there are before its attention, and before its mlp
        self.sequential = False  # whether the mlp reads what attention added; else both read the same
        self.out = torch.empty(0)  # what each head's z adds to the output projection, [heads, width, model width]
        self.norm: nn.Module | None = None  # between that and the stream
        inside = root.get_submodule(block.name).named_modules(prefix=block.name)
        self.linears = [name for name, module in inside if is_leaf(module) and is_linear(module) and name not in shared]
        self.made_by: dict[str, Projection | None] = {}  # q, k and v

    def measure(self, root: nn.Module, like: Tensor) -> None:
        """Ask the output projection for its matrix."""
        projection = root.get_submodule(str(self.block.out))
        count = self.block.heads * self.block.value_width
        matrix, _ = matrix_of(projection, count, like.to(_device(projection)))
        self.out = _wide(matrix).reshape(self.block.heads, self.block.value_width, -1)

    def add_to(self, visiting: Visiting, anatomy: Anatomy, held: dict[str, Tensor]) -> None:
        """Have the tensors seen by which its readers compute."""
        names = ["resid_pre", "q", "k", "v", "attn"]
        if self.block.mlp is not None:
            names.append("mlp")
        for name in names:
            site = Site(name, self.number)
            visiting.add(_Seen(site, held, name), place_of(site, anatomy))
        for name in self.linears:
            site = Site(MODULE, module=name)
            visiting.add(_Seen(site, held, f"{name} given"), Place(name, BEFORE))
            visiting.add(_Seen(site, held, f"{name} output"), Place(name, AFTER))

    def find_projections(self, root: nn.Module, held: dict[str, Tensor]) -> None:
        """See which linear layers make queries, keys and values."""
        passed = [
            Passed(name, root.get_submodule(name), held[f"{name} given"], held[f"{name} output"])
            for name in self.linears
            if f"{name} output" in held
        ]
        known: dict[str, tuple[Tensor, Tensor]] = {}
        self.made_by = {name: find_projection(held[name], passed, known) for name in "qkv"}
        used = {each.name for each in self.made_by.values() if each is not None}
        self.linears = [name for name in self.linears if name in used]

    def back(self, held: dict[str, Tensor], name: str, gradient: Tensor) -> Tensor:
        """Gradients at the block's input through one head's q, k or v, `[heads, pairs, tokens, width]`."""
        projection, x = self.made_by[name], held["resid_pre"]
        if projection is None:
            return _each(held[name], x, one_head_each(gradient))
        (at_output,) = _grad([held[name]], [held[f"{projection.name} output"]], [gradient])
        return _each(held[f"{projection.name} given"], x, projection.back(at_output))

    def back_of_mlp(self, held: dict[str, Tensor], attn: Tensor, mlp: Tensor) -> tuple[int, Tensor]:
        """How many writers the mlp reads, and the gradient at what it reads through it alone.

        Args:
            held: the tensors of the graph.
            attn: the gradient at what attention adds to the stream.
            mlp: and at what the mlp adds.
        """
        if self.sequential:  # both are added to the stream, and what attention adds goes through the mlp besides
            return self.after, (_wide(attn) - _wide(mlp).reshape(attn.shape)).reshape(len(held["resid_pre"]), 1, -1)
        x = held["resid_pre"]
        (found,) = _grad([held["mlp"]], [x], [mlp])
        return self.before, _wide(torch.zeros_like(x) if found is None else found).reshape(len(x), 1, -1)


class _Seen:
    """Keeps a tensor of the graph; what goes on is another one, which may be changed in place."""

    def __init__(self, site: Site, held: dict[str, Tensor], name: str) -> None:
        self.site, self._held, self._name = site, held, name

    def visit(self, whole: Tensor) -> Tensor | None:
        """Keep what attention is given of q, k and v, and else what passes."""
        if self._name.endswith(" given"):  # which several layers may be given
            self._held[self._name] = whole
            return None
        new = whole.clone()
        self._held[self._name] = new if self._name in "qkv" else whole
        return new


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or more precise where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], given: Sequence[Tensor] | None = None) -> Any:
    return torch.autograd.grad(outputs, inputs, given, retain_graph=True, allow_unused=True)


def _each(output: Tensor, x: Tensor, gradients: Tensor) -> Tensor:
    """Each of several gradients brought back to x."""
    if output is x:
        return gradients
    (found,) = torch.autograd.grad(output, x, gradients, retain_graph=True, is_grads_batched=True, allow_unused=True)
    return gradients.new_zeros(len(gradients), *x.shape) if found is None else found


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _refuse(anatomy: Anatomy, why: str) -> BadValue:
    return BadValue(
        f"the edges of {anatomy.model} are not known: {why}",
        "a residual stream to which heads and mlps were verified to be added",
        "Leave out edges=True, which needs none of it; print(interp.anatomy(model, ...)) lists what holds",
    )
