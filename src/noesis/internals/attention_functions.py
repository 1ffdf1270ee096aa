"""Attention by the functions of torch that a module calls, where it goes through no library's interface."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .attention import Around, Attend

#: How a module attends, beside the names that an interface has.
TORCH_SDPA, SOFTMAX = "torch sdpa", "softmax"
#: Who runs, and the hidden state that it was called with.
Running = Callable[[], tuple[nn.Module | None, Tensor | None]]

_SDPA = functional.scaled_dot_product_attention
_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_RENAMED = {"attn_mask": "attention_mask", "scale": "scaling"}  # as transformers' interface calls them
_MULTI_HEAD = functional.multi_head_attention_forward
_HEADS_AT = 4  # the place of `num_heads` among its arguments

_SOFTMAX = {functional.softmax, torch.softmax, torch.special.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_ADDED_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}
#: What may lie between a softmax and the product: it leaves who looks where, to whatever degree.
_BETWEEN = {
    *(functional.dropout, functional.dropout1d, functional.alpha_dropout, torch.dropout),
    *(Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double),
    *(Tensor.contiguous, Tensor.clone, Tensor.detach, Tensor.nan_to_num, torch.nan_to_num),
    *(Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unflatten, torch.unflatten),
    *(Tensor.masked_fill, torch.masked_fill, Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__getitem__),
    *(Tensor.masked_fill_, Tensor.expand),
}
_IN_PLACE = {getattr(Tensor, name) for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")}


class Unfused(TorchFunctionMode):
    """Has torch's transformer layers call what they are made of, not one fused function, while it lasts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        return func(*args, **(kwargs or {}))


def fusing(holders: Sequence[nn.Module]) -> list[nn.Module]:
    """Of the modules that a module is in, those that have to be `Unfused`, or it may not be called.

    A `nn.TransformerEncoder` calls its layers, fused or not; but where it makes nested tensors, only fused ones.
    """
    layers = [holder for holder in holders if isinstance(holder, (nn.TransformerEncoderLayer, nn.MultiheadAttention))]
    return [holder for holder in holders if holder in layers or (layers and isinstance(holder, nn.TransformerEncoder))]


Make = Callable[[Tensor, Tensor], Tensor]
Orders = tuple[list[int], list[int]]


class Product(NamedTuple):
    """A product of what may be queries and keys, and how it is made of others."""

    query: Tensor  # [..., queries, width]
    key: Tensor  # [..., keys, width]
    make: Make


class Followed(NamedTuple):
    """A tensor that a product, or a softmax, has become."""

    tensor: Tensor
    product: Product | None = None
    steps: tuple[tuple[Any, Any, Any, int], ...] = ()  # from the product: function, arguments, and which is the tensor
    heads: int | None = None  # where it was of four dimensions
    softmaxed: bool = False

    def by(self, func: Any, args: Any, kwargs: Any, place: int, out: Tensor) -> Followed:
        """What a function made of it."""
        return self._replace(tensor=out, steps=(*self.steps, (func, args, kwargs, place)))

    def again(self, query: Tensor, key: Tensor) -> Tensor:
        """What would have become of a product of others."""
        assert self.product is not None
        x = self.product.make(query, key)
        for func, args, kwargs, place in self.steps:
            x = func(*args[:place], x, *args[place + 1 :], **kwargs)
        return x


class AttentionFunctions(TorchFunctionMode):
    """Has each attention by functions of torch go by way of another function, in this thread, while it lasts.

    That is `scaled_dot_product_attention`; and a softmax of what became of a product that, through dropout, casts and
    reshapes, weighs values in another. `around` is called as for transformers' interface, with arguments by the same
    names, all of `[batch, heads, ...]`: `query`, `key`, `value`, `attention_mask`, `is_causal`, `scaling`; or `value`,
    `pattern`, which is left to be what was used, and `query` and `key` if a single product went into the softmax.
    What it runs returns `[batch, tokens, heads, width]`. Where batch and heads were one dimension that only shapes tell
    apart, there is `by_shapes`. Tensors that are not those of heads are given as they are.
    """

    def __init__(self, around: Around, running: Running) -> None:
        super().__init__()
        self._around, self._running = around, running
        self._heads: int | None = None  # of multi_head_attention_forward, while it runs
        self._followed: dict[int, Followed] = {}  # by id of the tensor

    def __exit__(self, *exception: Any) -> None:
        """Leave, and hold nothing."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        if self._heads is None:
            self._followed.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, which may be attention."""
        kwargs = kwargs or {}
        if func is _SDPA:
            return self._sdpa(args, kwargs)
        if func is _MULTI_HEAD and self._heads is None:
            return self._multi_head(args, kwargs)
        if func is torch.einsum:
            return self._einsum(args, kwargs)
        if func in _PRODUCTS and len(args) == 2 and self._weighs(*args):
            return self._weigh(args[0], args[1], lambda p, v: func(p, v, **kwargs))
        before = self._places(args) if self._followed else []
        out = func(*args, **kwargs)
        if func in _PRODUCTS:
            self._multiply(args, out, lambda a, b: func(a, b, **kwargs))
        elif func in _ADDED_PRODUCTS:
            self._add_product(func, args, kwargs, out)
        elif func in _SOFTMAX:
            self._softmax(func, args, kwargs, out)
        elif before:
            self._follow(func, args, kwargs, before, out)
        return out

    # ---------------------------------------------------------------- in one function

    def _sdpa(self, args: Any, kwargs: Any) -> Any:
        given = {**dict(zip(_SDPA_NAMES, args, strict=False)), **kwargs}
        tensors = [given.get(name) for name in _SDPA_NAMES[:3]]
        split = self._split(tensors, tensors[0]) if all(isinstance(each, Tensor) for each in tensors) else None
        named = {_RENAMED.get(name, name): value for name, value in given.items()}
        named["is_causal"] = bool(given.get("is_causal", False))
        if split is None:
            split = Split(None, by_shapes=False)
        mask = given.get("attn_mask")
        for name in _SDPA_NAMES[:3]:
            named[name] = split.apart(given.get(name))
        if isinstance(mask, Tensor) and mask.dim() < 4:
            named["attention_mask"] = split.apart_mask(mask)
        if split.by_shapes:
            named["by_shapes"] = True
        came = {name: (named[name], given.get(name)) for name in _SDPA_NAMES[:3]}

        def run(changed: dict[str, Any]) -> Any:
            own = dict(given)
            for name, (shown, original) in came.items():
                own[name] = original if changed[name] is shown else split.together(changed[name])
            out = _SDPA(**own)
            return split.shown(out)

        return self._through(named, TORCH_SDPA, run, split)

    def _multi_head(self, args: Any, kwargs: Any) -> Any:
        """What calls functions by itself, in one call to a mode: once more, with a look at what it calls."""
        self._heads = kwargs["num_heads"] if "num_heads" in kwargs else args[_HEADS_AT]
        try:
            with self:
                return _seen_inside(_MULTI_HEAD)(*args, **kwargs)
        finally:
            self._heads = None

    # ---------------------------------------------------------------- by a softmax and a product

    def _multiply(self, args: Any, out: Any, make: Make) -> None:
        """A product, which may be that of queries and keys."""
        tensors = [*args, out]
        if len(args) == 2 and all(isinstance(each, Tensor) and each.dim() in (3, 4) for each in tensors):
            product = Product(args[0], args[1].transpose(-2, -1), lambda q, k: make(q, k.transpose(-2, -1)))
            self._note(Followed(out, product))

    def _add_product(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        given = {**dict(zip(("input", "batch1", "batch2"), args, strict=False)), **kwargs}
        rest = {name: value for name, value in given.items() if name not in ("input", "batch1", "batch2")}
        added, a, b = given["input"], given["batch1"], given["batch2"]
        self._multiply((a, b), out, lambda a, b: func(added, a, b, **rest))

    def _softmax(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not isinstance(out, Tensor) or out.dim() < 3:
            return
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        before = self._followed.get(id(args[0])) if args else None
        if before is not None and dim in (-1, out.dim() - 1):  # what is no product's, such as features, are no scores
            self._note(before.by(func, args, kwargs, 0, out)._replace(softmaxed=True))

    def _follow(self, func: Any, args: Any, kwargs: Any, places: list[int], out: Any) -> None:
        """What a function makes of a tensor that is followed, or of several, which is that of no single product."""
        if len(places) > 1:
            if isinstance(out, Tensor):
                self._note(Followed(out))
            return
        before = self._followed[id(args[places[0]])]
        if func is Tensor.__setitem__:  # which cannot be done again to another tensor
            self._note(before._replace(product=None))
        if not isinstance(out, Tensor) or (before.softmaxed and (func not in _BETWEEN or places != [0])):
            return
        fits = out.dim() in (3, 4) and out.shape[-2] == before.tensor.shape[-2]
        if fits and (before.softmaxed or out.numel() == before.tensor.numel()):
            after = before.by(func, args, kwargs, places[0], out)
            self._note(after)
            if func in _IN_PLACE:  # while Dynamo traces, what it returns is not the same object
                self._note(after._replace(tensor=args[places[0]]))
        else:
            self._note(Followed(out))

    def _places(self, args: Any) -> list[int]:
        """Which arguments are followed; one in a list, as `torch.cat` is given them, counts as several."""
        if args and isinstance(args[0], (list, tuple)):
            return [0, 0] if [each for each in args[0] if id(each) in self._followed] else []
        return [place for place, each in enumerate(args) if id(each) in self._followed]

    def _note(self, followed: Followed) -> None:
        if followed.tensor.dim() == 4:
            followed = followed._replace(heads=followed.tensor.shape[1])
        self._followed[id(followed.tensor)] = followed

    def _weighs(self, p: Any, v: Any) -> bool:
        """Whether a product is that of a pattern with values, of which there may be fewer heads."""
        followed = self._followed.get(id(p))
        if followed is None or not followed.softmaxed or not isinstance(v, Tensor):
            return False
        fits = v.dim() == p.dim() and p.dim() in (3, 4)
        return fits and v.shape[0] == p.shape[0] and v.shape[-2] == p.shape[-1]

    def _weigh(self, p: Tensor, v: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Any:
        followed = self._followed[id(p)]
        split = self._split([p, v], p, followed.heads) or Split(None, by_shapes=False)
        given: dict[str, Any] = {"pattern": split.apart(p), "value": split.apart(v)}
        made = followed.product
        inner = Split(None if made is None or made.query.dim() == 4 else split.heads or followed.heads, by_shapes=False)
        if made is not None:
            q, k = inner.apart(made.query), inner.apart(made.key)
            if q.dim() == 4 and q.shape[:3] == given["pattern"].shape[:3] and k.shape[:3] == given["value"].shape[:3]:
                given.update(query=q, key=k)
        came = dict(given)
        if split.by_shapes:
            given["by_shapes"] = True

        def run(changed: dict[str, Any]) -> Any:
            weights, values = p, v if changed["value"] is came["value"] else split.together(changed["value"])
            if any(changed.get(name) is not came.get(name) for name in ("query", "key")):
                weights = followed.again(inner.together(changed["query"]), inner.together(changed["key"]))
                changed["pattern"] = split.apart(weights)
            return split.shown(product(weights, values))

        return self._through(given, SOFTMAX, run, split)

    def _einsum(self, args: Any, kwargs: Any) -> Any:
        """`bhqd,bhkd->bhqk`, `bhqk,bhkd->bqhd` and their kin, in any order of letters and of the two."""
        equation = args[0].replace(" ", "") if args and isinstance(args[0], str) else ""
        operands = list(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else list(args[1:])
        left, arrow, right = equation.partition("->")
        terms = left.split(",")
        if not arrow or "." in equation or len(terms) != 2 or len(operands) != 2:
            return torch.einsum(*args, **kwargs)

        def product(a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = torch.einsum(args[0], a, b)
            return out

        for first in range(2):
            followed = self._followed.get(id(operands[first]))
            weighing = _weighing(terms[first], terms[1 - first], right)
            if followed is not None and followed.softmaxed and weighing is not None:
                return self._weigh_einsum(operands, first, weighing, product)
        out = product(*operands)
        scoring = _scoring(terms, right)
        if scoring is not None:
            first, order_q, order_k = scoring

            def again(q: Tensor, k: Tensor) -> Tensor:
                a, b = _permuted_back(q, order_q), _permuted_back(k, order_k)
                return product(a, b) if first == 0 else product(b, a)

            q, k = operands[first].permute(order_q), operands[1 - first].permute(order_k)
            self._note(Followed(out, Product(q, k, again)))
        return out

    def _weigh_einsum(self, operands: list[Any], first: int, orders: Orders, product: Make) -> Tensor:
        values, outcome = orders

        def weighed(p: Tensor, v: Tensor) -> Tensor:
            own = _permuted_back(v, values)
            return (product(p, own) if first == 0 else product(own, p)).permute(outcome)

        return _permuted_back(self._weigh(operands[first], operands[1 - first].permute(values), weighed), outcome)

    # ---------------------------------------------------------------- batch and heads

    def _split(self, tensors: Sequence[Any], queries: Any, heads: int | None = None) -> Split | None:
        """How batch and heads are told apart; None where they cannot be."""
        if all(each.dim() == 4 for each in tensors):
            return Split(None, by_shapes=False)
        if any(each.dim() != 3 or each.shape[0] != queries.shape[0] for each in tensors):
            return None
        known = self._heads or heads
        if known is None:
            rows = _rows(self._running()[1], queries)
            known = queries.shape[0] // rows if rows and queries.shape[0] % rows == 0 else None
            return None if known is None else Split(known, by_shapes=True)
        return Split(known, by_shapes=False) if queries.shape[0] % known == 0 else None

    def _through(self, given: dict[str, Any], implementation: str, run: Attend, split: Split) -> Any:
        module, _ = self._running()
        z = run(given) if module is None else self._around(module, given, implementation, run)
        return split.own(z)


class Split(NamedTuple):
    """How a dimension `[batch * heads]` is taken apart; heads is None where it need not be."""

    heads: int | None
    by_shapes: bool

    def apart(self, x: Any) -> Any:
        """`[batch, heads, tokens, width]`."""
        return x if self.heads is None else x.unflatten(0, (-1, self.heads))

    def apart_mask(self, mask: Tensor) -> Tensor:
        """A mask of four dimensions, which are broadcast."""
        if mask.dim() == 3 and self.heads is not None and mask.shape[0] > 1:
            mask = mask.unflatten(0, (-1, self.heads))
        return mask[(None,) * (4 - mask.dim())]

    def together(self, x: Any) -> Any:
        """As the function takes it."""
        return x if self.heads is None else x.flatten(0, 1)

    def shown(self, z: Tensor) -> Tensor:
        """What the function returned, `[batch, tokens, heads, width]`."""
        z = self.apart(z)
        return z.transpose(1, 2) if z.dim() == 4 else z

    def own(self, z: Any) -> Any:
        """The same as the function returns it."""
        if not isinstance(z, Tensor) or z.dim() != 4:
            return z
        return self.together(z.transpose(1, 2))


def _rows(hidden: Tensor | None, queries: Tensor) -> int | None:
    """How many rows there are: of `[batch, tokens, width]`, or `[tokens, batch, width]`."""
    if hidden is None or hidden.dim() != 3:
        return None
    tokens = queries.shape[1]
    return hidden.shape[0] if hidden.shape[1] == tokens else hidden.shape[1] if hidden.shape[0] == tokens else None


def _weighing(pattern: str, value: str, right: str) -> Orders | None:
    """Of an einsum of a pattern with values: how values and outcome are permuted to [batch, heads, tokens, width]."""
    new = [letter for letter in value if letter not in pattern]
    wanted = pattern[:-2] + pattern[-1] + "".join(new)
    made = pattern[:-1] + "".join(new)
    if len(pattern) not in (3, 4) or len(new) != 1 or sorted(wanted) != sorted(value) or sorted(made) != sorted(right):
        return None
    return [value.index(letter) for letter in wanted], [right.index(letter) for letter in made]


def _scoring(terms: list[str], right: str) -> tuple[int, list[int], list[int]] | None:
    """Of an einsum of queries and keys: which are the queries, and how both are permuted likewise."""
    if len(right) not in (3, 4):
        return None
    first = 0 if right[-2] in terms[0] else 1
    query, key = terms[first], terms[1 - first]
    width = [letter for letter in query if letter not in right]
    wanted_q, wanted_k = right[:-1] + "".join(width), right[:-2] + right[-1] + "".join(width)
    if len(width) != 1 or sorted(wanted_q) != sorted(query) or sorted(wanted_k) != sorted(key):
        return None
    return first, [query.index(letter) for letter in wanted_q], [key.index(letter) for letter in wanted_k]


def _permuted_back(x: Tensor, order: Sequence[int]) -> Tensor:
    return x.permute([order.index(place) for place in range(len(order))])


def _seen_inside(function: Any) -> Any:
    """A function of torch that hands itself to a mode whole, made anew so that it does not."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    made = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
