"""A forward that is resumed at a block: what ran before it is given as it was kept, and not computed again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..errors import BadValue, WrongState
from ..layers import hidden_index, hidden_state, parameters_of, unmeasurable
from .anatomy import Anatomy, anatomy_of, called_and_root, check_eval
from .attending import Look, Visitor
from .checks import same
from .places import BEFORE, Place, check_anatomy, with_hidden_input, with_hidden_state
from .recording import arguments, hidden_input, spare
from .sites import Site
from .visiting import Visiting


class Replay:
    """One run of a model, which can be taken up again at any of its blocks, with what that block is given changed.

    The model runs once, without gradients. Blocks before the one at which it is taken up return what they returned
    then, whatever they are; all else, such as masks, rotary embeddings and what blocks of another stream return, as an
    encoder's, the model makes anew. So what comes out is bit for bit what a whole forward gives that is changed at that
    place.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from noesis.interp.replaying import Replay
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)))
        >>> replay = Replay(model.eval(), torch.ones(2, 4))
        >>> torch.equal(replay.from_block(2, replay.residuals[2]), replay.output)
        True

    Args:
        model: an `nn.Module` in eval mode, or the result of `noesis.wrap`.
        inputs: a mapping of arguments, a tuple of them, or one.
        anatomy: of the model; without it, it is found, which costs one more forward.

    Attributes:
        output: what the model returned.
        anatomy: of the model.
        residuals: layer -> what its block was given, `[batch, tokens, width]`.

    Raises:
        NoesisError: (a ValueError) for a model of which a block runs more than once, or is given no hidden state;
            (a RuntimeError) for one in training mode, or of which no block ran.
    """

    def __init__(self, model: Any, inputs: Any, *, anatomy: Anatomy | None = None) -> None:
        self._called, self._root = called_and_root(model)
        args, kwargs = arguments(inputs)
        if anatomy is None:
            anatomy = anatomy_of(model, args, kwargs)
        check_anatomy(anatomy, self._root)
        check_eval(self._root)
        if "use_cache" in parameters_of(self._root.forward) and "past_key_values" not in kwargs:
            kwargs.setdefault("use_cache", False)  # a skipped block writes no keys
        self.anatomy, self._args, self._kwargs = anatomy, args, kwargs
        self.residuals: dict[int, Tensor] = {}
        self._returned: dict[int, Any] = {}
        self._calls: dict[int, tuple[Any, Any]] = {}  # what its block was called with
        self._order: list[int] = []  # of blocks, as they ran
        self._stream: list[int] = []  # of blocks that hand on the stream to the last one
        self.output = self._first()
        self.rows = next(iter(self.residuals.values())).shape[0]

    def _first(self) -> Any:
        visiting = Visiting(self._root, self.anatomy, own_thread=True)
        last: list[tuple[Tensor, Tensor]] = []  # what the block before returned, and the copy of it

        def begins(layer: int) -> Callable[[Any, Any], None]:
            def note(args: Any, kwargs: Any) -> None:
                if layer in self._order:
                    raise BadValue(
                        f"block {self.anatomy.blocks[layer].name!r} runs more than once",
                        "a model whose blocks run once, of which one can be taken up",
                        "Change it by interp.editing, which runs the whole model",
                    )
                self._order.append(layer)
                hidden = hidden_input(args, kwargs)
                if hidden is not None:  # which is not held
                    args, kwargs = with_hidden_input(args, kwargs, hidden.new_zeros(()).expand(hidden.shape))
                self._calls[layer] = args, kwargs

            return note

        def given(layer: int, hidden: Tensor) -> None:
            same = last and last[0][0] is hidden and torch.equal(*last[0])  # it may be changed in place
            self.residuals[layer] = last[0][1] if same else hidden.clone()

        def returned(layer: int, output: Any) -> None:
            hidden = hidden_state(output, hidden_index(self._root.get_submodule(self.anatomy.blocks[layer].name)))
            if unmeasurable(hidden):
                raise BadValue(f"block {layer} returns no hidden state", "a block with one", "Use interp.editing")
            assert hidden is not None
            kept = hidden.clone()
            last[:] = [(hidden, kept)]
            self._returned[layer] = with_hidden_state(output, hidden, kept)

        for layer, block in enumerate(self.anatomy.blocks):
            visiting.add(Look(Site("resid_pre", layer), functools.partial(given, layer)), Place(block.name, BEFORE))
            stop = visiting.stop(block.name)
            stop.begins, stop.ends = begins(layer), functools.partial(returned, layer)
        with torch.no_grad():
            output = self._run(visiting, *spare(self._args, self._kwargs))
        if not self._order:
            raise WrongState("none of its blocks ran", "a model whose blocks run", "Give inputs that reach them")
        for before, layer in zip([None, *self._order], self._order, strict=False):
            if before is not None and not same(self._hidden(before), self.residuals.get(layer)):
                self._stream.clear()  # another one begins
            self._stream.append(layer)
        return output

    def stream(self) -> dict[int, Tensor]:
        """The residual stream that the model's end reads: layer -> what its block was given.

        Under the number of blocks stands what the last one returned. Blocks of other streams, such as those of an
        encoder, are left out.
        """
        found = {layer: self.residuals[layer] for layer in self._stream if layer in self.residuals}
        return {**found, len(self.anatomy.blocks): self._hidden(self._stream[-1])}

    def _hidden(self, layer: int) -> Tensor:
        """The hidden state that a block returned."""
        index = hidden_index(self._root.get_submodule(self.anatomy.blocks[layer].name))
        hidden = hidden_state(self._returned[layer], index)
        assert hidden is not None
        return hidden

    def _run(self, visiting: Visiting, args: Any, kwargs: Any) -> Any:
        with ExitStack() as leaving:
            visiting.attach(leaving)
            return self._called(*args, **kwargs)

    def from_block(
        self, layer: int, resid: Tensor, visitors: Sequence[tuple[Visitor, Place]] = (), **changed: Any
    ) -> Any:
        """Run the model from a block on, which is given another residual stream.

        The batch may be a multiple of the run's: several streams, one after the other, each of all rows. The other
        inputs are repeated likewise.

        Args:
            layer: the block; as many as there are blocks for what comes after the last.
            resid: `[n * batch, tokens, width]`, what the block is given.
            visitors: who else is to see or change what passes from there on.
            **changed: arguments of the model to change, such as `logits_to_keep=1`.

        Returns:
            What the model returned.

        Raises:
            NoesisError: (a ValueError) for a layer that did not run, or a batch that is no multiple.
        """
        count = len(self.anatomy.blocks)
        if layer != count and layer not in self.residuals:
            raise BadValue(f"layer {layer}", f"a layer that ran, or {count} for what comes after", "Look at .residuals")
        times, rest = divmod(resid.shape[0], self.rows)
        if rest or not times:
            raise BadValue(f"resid of {resid.shape[0]} rows", f"a multiple of the run's {self.rows}", "Repeat it")
        visiting = Visiting(self._root, self.anatomy, own_thread=True)
        # Blocks of other streams run again: a model may read what passes between them, as Llava does.
        before = self._order if layer == count else self._order[: self._order.index(layer)]
        skipped = [each for each in before if each in self._stream]
        for each in skipped:
            name = self.anatomy.blocks[each].name
            visiting.stop(name).instead = functools.partial(self._again, each, times, resid if layer == count else None)
        if layer != count:
            put = Look(Site("resid_pre", layer), lambda _hidden: resid.clone())
            visiting.add(put, Place(self.anatomy.blocks[layer].name, BEFORE))
        for visitor, place in visitors:
            visiting.add(visitor, place)
        args, kwargs = spare(self._args, {**self._kwargs, **changed})
        return self._run(visiting, self._repeated(args, times), self._repeated(kwargs, times))

    def block(self, layer: int, resid: Tensor, visitors: Sequence[tuple[Visitor, Place]] = ()) -> None:
        """Run one block alone, as it was called but for the residual stream, for what visitors see there.

        Args:
            layer: the block.
            resid: what it is given, of the run's shape; its other arguments, as masks, are those of the run.
            visitors: who is to see or change what passes.
        """
        name = self.anatomy.blocks[layer].name
        visiting = Visiting(self._root, self.anatomy, own_thread=True)
        visiting.add(Look(Site("resid_pre", layer), lambda _hidden: resid.clone()), Place(name, BEFORE))
        for visitor, place in visitors:
            visiting.add(visitor, place)
        args, kwargs = spare(*self._calls[layer])
        with ExitStack() as leaving, torch.no_grad():
            visiting.attach(leaving)
            self._root.get_submodule(name)(*args, **kwargs)

    def _again(self, layer: int, times: int, resid: Tensor | None) -> Any:
        """What a block returned, or the same with another stream where it was the last of all."""
        returned = self._returned[layer]
        kept = self._hidden(layer)
        if resid is not None and layer == self._order[-1]:
            return with_hidden_state(returned, kept, resid.clone())
        # A copy: the model may go on in place.
        return with_hidden_state(returned, kept, kept.clone() if times == 1 else self._repeated(kept, times))

    def _repeated(self, value: Any, times: int) -> Any:
        """Inputs for several batches in one."""
        if times == 1:
            return value
        if isinstance(value, Tensor):
            fits = value.dim() > 0 and value.shape[0] == self.rows
            return value.repeat(times, *[1] * (value.dim() - 1)) if fits else value
        if isinstance(value, (tuple, list)):
            return type(value)([self._repeated(item, times) for item in value])
        if isinstance(value, dict):
            return {name: self._repeated(item, times) for name, item in value.items()}
        return value
