"""Models that are trained once for all tests of a session."""

from __future__ import annotations

import pytest
from torch import nn

from helpers import trained_toys


@pytest.fixture(scope="session")
def induction() -> nn.Module:
    """GPT-2's class, two layers, with induction heads."""
    return trained_toys.induction()


@pytest.fixture(scope="session")
def rotary_induction() -> nn.Module:
    """Llama's class, two layers, with induction heads."""
    return trained_toys.rotary_induction()


@pytest.fixture(scope="session")
def one_layer() -> nn.Module:
    """One layer, which can have no induction head."""
    return trained_toys.one_layer()


@pytest.fixture(scope="session")
def fixed_period() -> nn.Module:
    """Repeats by looking a fixed way back."""
    return trained_toys.fixed_period()


@pytest.fixture(scope="session")
def modular_addition() -> nn.Module:
    """Adds modulo a prime, by waves."""
    return trained_toys.modular_addition()
