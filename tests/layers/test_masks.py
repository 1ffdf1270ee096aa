"""What counts by a mask, and whose mask it is, by the calls that lead to a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from noesis.layers import MaskArgument, counting, mask_arguments, mask_within, parameters_of

KEPT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
LEAST = torch.finfo(torch.float32).min


def added(mask: Tensor, least: float = LEAST) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask == 0, least)


def by_query(mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None, :] & torch.ones(4, 4, dtype=torch.bool).tril()


KINDS = {
    "integers": (KEPT, False),
    "bools": (KEPT.bool(), False),
    "shares": (KEPT.float(), False),
    "shares in half": (KEPT.half(), False),
    "added": (added(KEPT), False),
    "padding": (KEPT == 0, True),
    "padding in integers": (1 - KEPT, True),
    "padding, added": (added(KEPT, -torch.inf), True),
    "a row of keys": (KEPT.bool()[:, None, None, :], False),
    "a row of keys, added": (added(KEPT)[:, None, None, :], False),
    "by query": (by_query(KEPT), False),
    "by query, added": (added(by_query(KEPT)), False),
    "two for what sees all": (KEPT * 2, False),
    "added, more for what sees all": (added(KEPT) + torch.tensor([10000.0, 0, 0, 0]), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_which_positions_count(kind: str) -> None:
    mask, marks_padding = KINDS[kind]
    assert torch.equal((counting(mask, marks_padding) != 0).long(), KEPT)


@pytest.mark.parametrize("mask", [torch.zeros(2, 4), torch.zeros(2, 1, 4, 4)], ids=str)
def test_nothing_added_is_no_padding(mask: Tensor) -> None:
    assert counting(mask, False).all()


class NoSync(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "local_scalar" not in str(function)
        assert "nonzero" not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str) -> None:
    mask, marks_padding = KINDS[kind]
    own = MaskArgument("src_key_padding_mask" if marks_padding else "attention_mask", 1)
    with NoSync():
        assert mask_within(None, (torch.ones(2, 4, 8), mask), {}, own, True) is not None


OWN = MaskArgument("attention_mask", 1)
WORDS, IMAGE, FEWER = torch.ones(2, 4, 8), torch.ones(2, 3, 16, 16), torch.ones(2, 3, 8)


def test_arguments_of_a_forward() -> None:
    class Both:
        def forward(self, input_ids, attention_mask=None, *, decoder_attention_mask=None, padding=None):
            pass

    found = [mask.name for mask in mask_arguments(Both().forward, "attention_mask")]
    assert found == ["decoder_attention_mask", "attention_mask"]  # what comes out is the decoder's
    assert next(mask.name for mask in mask_arguments(Both().forward, "padding")) == "padding"
    assert mask_arguments(Both().forward, None) == ()
    assert mask_arguments(Both().forward, "attention_mask")[0].position is None
    assert mask_arguments(dict.fromkeys, "mask") == ()
    assert parameters_of(Both().forward)[0] == "input_ids"


def test_masks_of_other_arguments_are_told_by_their_names() -> None:
    def forward(ids, memory, query_ids, tgt_key_padding_mask=None, memory_key_padding_mask=None, query_mask=None,
                head_mask=None, global_attention_mask=None, bool_masked_pos=None):  # fmt: skip
        pass

    found = [(mask.name, mask.of) for mask in mask_arguments(forward, "attention_mask")]
    assert found == [("tgt_key_padding_mask", ""), ("memory_key_padding_mask", "memory"), ("query_mask", "query")]
    assert mask_arguments(forward, "query_mask")[0] == MaskArgument("query_mask", 5)


def test_a_module_with_a_mask_has_its_own() -> None:
    other = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])
    for args, kwargs in (((WORDS, other), {}), ((WORDS,), {"attention_mask": other})):
        found = mask_within(KEPT, args, kwargs, OWN, False)
        assert found is not None
        assert torch.equal(found, other)
    assert mask_within(KEPT, (WORDS,), {}, OWN, False) is None  # it is given none
    assert mask_within(KEPT, (WORDS, {"full": other}), {}, OWN, False) is KEPT  # one for each kind of layer


@pytest.mark.parametrize(
    ("x", "follows"),
    [
        (WORDS, True),
        (WORDS.transpose(1, 2), True),
        (WORDS.flatten(0, 1), True),
        (KEPT, True),
        (IMAGE, False),
        (torch.ones(2, 4, 4, 4), False),
        (FEWER, False),
        (torch.ones(8, 2, 4), False),
    ],
)
def test_a_module_without_a_mask_goes_on_with_that_around_it(x: Tensor, follows: bool) -> None:
    assert (mask_within(KEPT, (x,), {}, None, False) is KEPT) == follows
    assert (mask_within(KEPT, (), {"x": x}, None, False) is KEPT) == follows
    assert mask_within(None, (x,), {}, None, False) is None


def test_a_mask_by_query_is_what_became_of_the_mask_around() -> None:
    seen = by_query(KEPT)
    assert mask_within(KEPT, (WORDS, seen), {}, OWN, False) is KEPT
    assert mask_within(None, (WORDS, seen), {}, OWN, False) is None
    found = mask_within(None, (WORDS, seen), {}, OWN, True)
    assert found is not None
    assert torch.equal(found.long(), KEPT)
    more = torch.ones(2, 6, 8)  # words and patches, after a mask of words
    patches = torch.cat([KEPT, torch.ones(2, 2)], 1)[:, None, None, :].expand(-1, -1, 6, -1)
    found = mask_within(KEPT, (more, patches), {}, OWN, False)
    assert found is not None
    assert torch.equal(found.long(), patches[:, 0, 0].long())
    assert mask_within(KEPT, (FEWER, torch.ones(2, 1, 3, 9)), {}, OWN, False) is None  # a cache of fixed size


def test_with_a_cache_the_newest_positions_are_given() -> None:
    found = mask_within(None, (torch.ones(2, 1, dtype=torch.int64), KEPT), {}, OWN, True)
    assert found is not None
    assert found.tolist() == [[0], [1]]


def test_one_mask_for_all_samples() -> None:
    found = mask_within(None, (WORDS, KEPT[:1]), {}, OWN, True)
    assert found is not None
    assert found.tolist() == [[1, 1, 0, 0]] * 2
    one = mask_within(None, (), {"pixels": torch.ones(64, 8), "ids": KEPT[:1], "attention_mask": KEPT[:1]}, OWN, True)
    assert one is not None
    assert one.shape == (1, 4)
