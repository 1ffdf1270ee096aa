"""Routers of Mixture-of-Experts models, and how to read what they choose.

What a router chose is read from the router itself. Its logits lie where transformers declares them
(`_can_record_outputs["router_logits"]`), its choice is the integer tensor [tokens, k] beside them. Of
a router that returns logits alone the k largest are taken, with k from the router or from the
model's config (`num_experts_per_tok`): right unless the layer adds a bias or limits the choice later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .kinds import is_linear, router_declarations
from .selecting import PRESETS

#: Where a router or a config says how many experts there are; the first that is there counts.
EXPERTS = ("num_router_classes", "n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
#: And how many of them a token is sent to.
TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k")
#: These record the probabilities under the name of logits (transformers 5.23).
PROBABILITIES = ("Gemma4TextRouter", "DiffusionGemmaTextRouter")


@dataclass(frozen=True)
class Router:
    """A layer that chooses experts, and how to read its output.

    Attributes:
        name: the layer's dotted name.
        index: its place among the routers of the wrap.
        experts: how many it chooses from; 0 when that could not be told.
        top_k: how many it chooses, where it says so.
        place: of the logits in its output; None for the first tensor that is as wide as `experts`.
        probabilities: whether probabilities lie there instead.
    """

    name: str
    index: int
    experts: int
    top_k: int | None = None
    place: int | None = None
    probabilities: bool = False

    def read(self, output: Any) -> tuple[Tensor, Tensor] | str:
        """Logits [..., experts] and indices [..., k] from an output, or why there are none.

        Examples:
            >>> import torch
            >>> from noesis.layers import Router
            >>> logits, indices = Router("gate", 0, experts=3, top_k=2).read(torch.tensor([[0.1, 0.7, 0.2]]))
            >>> indices
            tensor([[1, 2]])
        """
        if not self.experts:
            return f"neither the router nor the config has any of {', '.join(EXPERTS)}"
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        candidates = parts if self.place is None else parts[self.place : self.place + 1]
        logits = next(filter(self._are_logits, candidates), None)
        if logits is None:
            where = "" if self.place is None else f" at place {self.place}"
            return f"no logits of {self.experts} experts{where} in an output of type {type(output).__name__}"
        logits = logits.detach()
        indices = next((part for part in parts if self._are_indices(part, logits)), None)
        if indices is None and self.top_k is None:
            return f"no indices in the output, and neither the router nor the config has any of {', '.join(TOP_K)}"
        if indices is None:
            indices = logits.topk(min(self.top_k or 1, self.experts)).indices
        return logits.log() if self.probabilities else logits, indices

    def _are_logits(self, part: Any) -> bool:
        return (
            isinstance(part, Tensor) and part.is_floating_point() and part.dim() > 0 and part.shape[-1] == self.experts
        )

    def _are_indices(self, part: Any, logits: Tensor) -> bool:
        if not isinstance(part, Tensor) or part.dim() < 2 or part.is_floating_point() or part.element_size() == 1:
            return False
        # As wide as the experts it is a mask with a one for each expert chosen.
        masks = part.shape[-1] == self.experts and self.top_k != self.experts
        return not masks and part.numel() // part.shape[-1] == logits.numel() // self.experts


def find_routers(model: nn.Module, chosen: Iterable[tuple[str, nn.Module]]) -> list[Router]:
    """Those of the chosen layers that are routers, and how to read them.

    Args:
        model: the model; its class or its parts may declare their routers.
        chosen: names and modules, as from `select`.

    Returns:
        One for each layer of a declared class. In a model that declares none: for each layer whose
        class is named `...Router` or `...TopKGate`, and for each linear layer named `gate` or
        `router` with as many outputs as the config has experts.
    """
    declared = router_declarations(model)
    is_router = PRESETS["routers"](model)
    found: list[Router] = []
    for name, module in chosen:
        experts = _number(EXPERTS, module, model)
        gate = not declared and is_linear(module) and name.rpartition(".")[2] in ("gate", "router")
        if is_router(name, module) or (gate and getattr(module, "out_features", None) == experts):
            router = Router(
                name,
                len(found),
                experts=experts or 0,
                top_k=_number(TOP_K, module, model),
                place=next((place for cls, place in declared if isinstance(module, cls)), None),
                probabilities=type(module).__name__ in PROBABILITIES,
            )
            found.append(router)
    return found


def _number(names: Sequence[str], module: nn.Module, model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (module, text, getattr(text, "ffn_config", None)):  # DBRX has a config for its experts
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
