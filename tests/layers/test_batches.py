"""How many samples a forward has, and which outputs have them in front."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from noesis.layers import Batch, batch_of


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("args", "kwargs", "names", "expected"),
    [
        ((ones(3, 7),), {}, (), Batch(3, (), (7,))),
        ((), {}, (), Batch(1)),
        ((ones(),), {}, (), Batch(1)),
        ((ones(1), ones(5, 4)), {}, (), Batch(5, (1,), (4,))),  # a timestep
        ((ones(1),), {}, (), Batch(1)),
        ((ones(1, 9), ones(64, 8)), {}, ("ids", "pixels"), Batch(1, (64,), (9,))),
        ((), {"pixels": ones(64, 8), "ids": ones(2, 9)}, ("ids", "pixels"), Batch(2, (64,), (9,))),
        ((), {"pixels": ones(64, 8), "ids": ones(2, 9), "mask": ones(2, 9)}, (), Batch(2, (64,), (9, 9))),
        ((ones(9, 2, 4), ones(2, 9)), {}, ("src", "src_key_padding_mask"), Batch(2, (9,), (9,))),  # time first
        (([ones(3, 8, 8), ones(3, 6, 6)],), {}, (), Batch(2)),
        (({"x": ones(4, 3)},), {}, (), Batch(4, (), (3,))),
        ((torch.nested.nested_tensor([ones(2, 3), ones(4, 3)], layout=torch.jagged),), {}, (), Batch(2)),
    ],
)
def test_the_batch_of_a_call(args, kwargs, names, expected: Batch) -> None:
    assert batch_of(args, kwargs, names) == expected


@pytest.mark.parametrize(
    ("batch", "shape", "samples"),
    [
        (Batch(4), (4, 3), 4),
        (Batch(4), (4,), 4),
        (Batch(4), (), 0),
        (Batch(4), (0, 3), 0),
        (Batch(0), (4, 3), 0),
        (Batch(4), (6, 3), 0),
        (Batch(4), (64, 16, 3), 4),  # windows
        (Batch(4, (64,)), (64, 3), 0),  # patches
        (Batch(4, (64,)), (16, 3), 0),  # merged ones
        (Batch(4, (64,)), (28, 3), 4),  # words in one row
        (Batch(4, (), (8,)), (8, 4, 3), 0),  # time first
        (Batch(4, (), (8,)), (8, 3), 4),
        (Batch(1, (64,)), (64, 3), 1),
    ],
)
def test_the_samples_of_an_output(batch: Batch, shape: tuple[int, ...], samples: int) -> None:
    assert batch.samples(ones(*shape)) == samples
