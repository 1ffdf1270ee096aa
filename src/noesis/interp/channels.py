"""Which dimension of a site's tensor its channels are."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import BadValue
from ..layers import is_conv, is_linear
from .sites import HEADED, MODULE


def channels_last(root: nn.Module, site: str, x: Tensor) -> Tensor:
    """A view of a site's tensor with its channels in the last dimension; those of heads are one row.

    Channels are the second dimension of what a convolution returns and of four dimensions or more, but for layers that
    are known to work on the last; else the last.

    Raises:
        NoesisError: (a ValueError) for a tensor of fewer than two dimensions.
    """
    if x.dim() < 2:
        raise BadValue(f"{site} is of shape {list(x.shape)}", "[batch, ..., channels]", "Choose other layers")
    component, _, name = site.partition(":")
    if component.partition(".")[0] in HEADED and x.dim() == 4:
        return x.flatten(2)
    if component != MODULE:
        return x
    module = root.get_submodule(name.partition("@")[0])
    last = is_linear(module) or isinstance(module, nn.LayerNorm)
    return x.movedim(1, -1) if not last and (x.dim() > 3 or is_conv(module)) else x
