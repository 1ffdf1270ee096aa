"""What other libraries find in an observed model: by operations all, by exact class nothing, inside `unwrapped` all.

Libraries that are no dependency of the tests are tried where they are installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import noesis

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*"),  # theirs
    pytest.mark.usefixtures("one_thread"),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers).eval()


def given() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- libraries


def operations(model: nn.Module) -> Any:
    with FlopCounterMode(display=False) as counter:
        model(given())
    return counter.get_total_flops()


def fvcore(model: nn.Module) -> Any:
    return pytest.importorskip("fvcore.nn").FlopCountAnalysis(model, given()).total()


def torchinfo(model: nn.Module) -> Any:
    return pytest.importorskip("torchinfo").summary(model, input_data=given(), verbose=0).total_mult_adds


def calflops(model: nn.Module) -> Any:
    library = pytest.importorskip("calflops")
    return library.calculate_flops(model, input_shape=(2, 3, 8, 8), print_results=False, output_as_string=False)


def ptflops_by_operations(model: nn.Module) -> Any:
    return _ptflops(model, "aten")


def integrated_gradients(model: nn.Module) -> Any:
    return pytest.importorskip("captum.attr").IntegratedGradients(model).attribute(given(), target=1).sum().item()


def ptflops_by_class(model: nn.Module) -> Any:
    return _ptflops(model, "pytorch")


def _ptflops(model: nn.Module, backend: str) -> Any:
    count = pytest.importorskip("ptflops").get_model_complexity_info
    return count(model, (3, 8, 8), as_strings=False, print_per_layer_stat=False, backend=backend)


def thop(model: nn.Module) -> Any:
    library = pytest.importorskip("thop")
    return library.profile(copy.deepcopy(model), inputs=(given(),), verbose=False)  # it leaves attributes in a model


def deep_lift(model: nn.Module) -> Any:
    """How far attributions are from what they have to add up to."""
    library = pytest.importorskip("captum.attr")
    base = torch.zeros_like(given())
    _, apart = library.DeepLift(model).attribute(given(), base, target=1, return_convergence_delta=True)
    return apart.abs().max().item() < 1e-6


def quantised(model: nn.Module) -> Any:
    made = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    return sum("quantized" in type(module).__module__ for module in made.modules())


@pytest.mark.parametrize("ask", [operations, fvcore, torchinfo, calflops, ptflops_by_operations, integrated_gradients])
def test_what_goes_by_operations_finds_the_same(ask: Callable[[nn.Module], Any]) -> None:
    observed = network()
    noesis.wrap(observed, layers="all")
    assert ask(observed) == ask(network())


@pytest.mark.parametrize("ask", [quantised, thop, ptflops_by_class, deep_lift])
def test_what_goes_by_exact_class_finds_the_same_inside_unwrapped_alone(ask: Callable[[nn.Module], Any]) -> None:
    observed = network()
    noesis.wrap(observed, layers="all")
    assert ask(observed) != ask(network())
    with noesis.unwrapped(observed) as plain:
        assert ask(plain) == ask(network())


def test_an_observed_class_is_no_other_classs_equal() -> None:
    """Tables that have to tell the two apart go by it: FSDP2 keeps the class that it made for each."""
    observed = network()
    noesis.wrap(observed, layers="all")
    made: dict[type, str] = {nn.Linear: "of the plain class"}
    for _ in range(2):
        assert made.setdefault(type(observed[3]), "of the observed class") == "of the observed class"
    assert made == {nn.Linear: "of the plain class", type(observed[5]): "of the observed class"}
