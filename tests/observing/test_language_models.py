"""Language models of transformers: a step is one forward, and generation is what it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import noesis
from helpers.language_models import CACHES, MODELS, build, generate, prompts

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 5


def statistics(x: torch.Tensor) -> list[float]:
    x = x.double()
    return [x.numel(), x.mean(), x.std(), x.abs().mean(), x.min(), x.max(), 0]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_generation_is_what_it_was_and_every_forward_is_a_step(name, cache):
    ids = prompts()
    bare = generate(build(name), ids, NEW_TOKENS, **CACHES[cache])

    model = build(name)
    seen: list[list[list[float]]] = []
    blocks = [
        module for path, module in model.named_modules() if path.rpartition(".")[0] in ("model.layers", "transformer.h")
    ]
    for index, block in enumerate(blocks):

        def hook(module, args, output, index=index):
            if index == 0:
                seen.append([])
            seen[-1].append(statistics(output[0] if isinstance(output, tuple) else output))

        block.register_forward_hook(hook)
    wrapped = noesis.wrap(model, layers="blocks")
    observed = generate(wrapped, ids, NEW_TOKENS, **CACHES[cache])

    assert torch.equal(bare.sequences, observed.sequences)
    assert all(torch.equal(one, other) for one, other in zip(bare.logits, observed.logits, strict=True))
    trace = wrapped.trace()
    assert trace.steps.tolist() == list(range(NEW_TOKENS))  # the prompt, then each token but the last
    assert trace.batches.tolist() == [2] * NEW_TOKENS
    assert trace.layers == [f"{'transformer.h' if name == 'gpt2' else 'model.layers'}.{index}" for index in range(3)]
    assert trace["count"].tolist() == [[2 * 7 * 32] * 3] + [[2 * 32] * 3] * (NEW_TOKENS - 1)
    np.testing.assert_allclose(trace.values, np.array(seen, dtype=np.float64), rtol=2e-5, atol=1e-7)
    assert wrapped.unwrap() is model


@pytest.mark.parametrize("name", MODELS)
def test_forwards_and_hidden_states_are_bitwise_equal(name):
    ids = prompts()
    bare = build(name)(ids, output_hidden_states=True)
    wrapped = noesis.wrap(build(name), layers="all")
    observed = wrapped(ids, output_hidden_states=True)
    assert torch.equal(bare.logits, observed.logits)
    assert all(torch.equal(one, other) for one, other in zip(bare.hidden_states, observed.hidden_states, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_bitwise_equal_and_recomputation_is_no_call(name):
    ids = prompts()
    calls = []
    for checkpointing in (False, True):
        gradients = []
        for wrapping in (False, True):
            model = build(name).train()
            if checkpointing:
                # transformers 5.23 renamed it.
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable()
            called = noesis.wrap(model, layers="all") if wrapping else model
            called(ids, labels=ids, use_cache=False).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        bare, observed = gradients
        assert sum(grad is not None for grad in bare) > 20
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(bare, observed, strict=True))
        trace = called.trace()
        calls.append(dict(zip(trace.layers, trace.calls[0].tolist(), strict=True)))
    assert calls[0] == calls[1]
    assert sum(calls[0].values()) > 20
