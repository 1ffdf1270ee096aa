"""Surprise in real architectures: language models, blocks compiled one by one, several processes, trained weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import noesis
from helpers.processes import torchrun

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def texts(count: int, length: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (count, length), generator=generator)


def batches(count: int = 240) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in texts(count).split(40)]


@pytest.fixture
def wrapped(llama):
    made = noesis.wrap(llama, layers="blocks", codebook=noesis.Codebook(), logits="lm_head")
    made.calibrate(batches(), progress=False)
    yield made
    made.unwrap()


def test_padding_does_not_count(wrapped) -> None:
    tokens = texts(3, seed=1)
    wrapped(input_ids=tokens)
    bare = wrapped.surprise()
    padded = torch.cat([tokens, torch.full((3, 5), 63)], 1)
    mask = torch.cat([torch.ones(3, 12), torch.zeros(3, 5)], 1).long()
    wrapped(input_ids=padded, attention_mask=mask)
    np.testing.assert_allclose(wrapped.surprise().score, bare.score, rtol=1e-3, atol=1e-3)
    wrapped(input_ids=padded)
    assert np.abs(wrapped.surprise().score - bare.score).max() > 0.1


def test_other_words_are_strange(wrapped) -> None:
    wrapped(input_ids=torch.cat([texts(4, seed=1), texts(4, seed=1) + 40]))
    surprise = wrapped.surprise()
    assert list(surprise.layers) == ["model.layers.0", "model.layers.1", "model.layers.2", "input of lm_head"]
    assert (surprise.p_value[4:] < 0.05).all()
    assert surprise.score[4:].min() > surprise.score[:4].max()


def test_a_score_per_token(llama) -> None:
    wrapped = noesis.wrap(llama, layers="blocks", codebook=noesis.Codebook(positions="each"), logits="lm_head")
    wrapped.calibrate(batches(), progress=False)
    tokens = texts(4, seed=1)
    tokens[2, 5] = 50  # a word that never came
    mask = torch.ones_like(tokens)
    mask[3, 9:] = 0
    wrapped(input_ids=tokens, attention_mask=mask)
    surprise = wrapped.surprise()
    first = surprise.layers["model.layers.0"].positions
    assert first.shape == (4, 12)
    assert np.isnan(first[3, 9:]).all()
    assert np.isfinite(first).sum() == 45
    assert first[2].argmax() == 5
    assert np.nanargmax(first) == 2 * 12 + 5
    np.testing.assert_allclose(surprise.layers["model.layers.0"].code_length, np.nanmean(first, 1), rtol=1e-5)
    wrapped(input_ids=tokens[:, :7])
    assert wrapped.surprise().layers["model.layers.1"].positions.shape == (4, 7)
    wrapped.unwrap()


def test_a_score_per_position_needs_eager_code() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 6))
    wrapped = noesis.wrap(model, layers="0", codebook=noesis.Codebook(positions="each"))
    wrapped.calibrate([torch.randn(200, 3, 4)], progress=False)
    with torch.no_grad():
        torch.compile(model, backend="aot_eager")(torch.randn(2, 3, 4))
    with pytest.raises(noesis.NoesisError, match='compiled code does with positions="each"'):
        wrapped.surprise()
    torch.compiler.reset()


def test_generated_tokens_are_unlike_texts(wrapped) -> None:
    wrapped.generate(input_ids=texts(2), max_new_tokens=3, do_sample=False, pad_token_id=0)
    surprise = wrapped.surprise()
    assert len(surprise) == 2  # of the last token
    assert (surprise.p_value < 0.05).all()


def test_one_graph_for_all_blocks(wrapped, llama) -> None:
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    tokens = texts(3, seed=1)
    wrapped(input_ids=tokens, use_cache=False)
    expected = wrapped.surprise()
    for block in llama.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        wrapped(input_ids=tokens, use_cache=False)
        found = wrapped.surprise()
        wrapped(input_ids=texts(3, seed=2), use_cache=False)
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    for block in llama.model.layers:
        block._compiled_call_impl = None
    torch.compiler.reset()


@pytest.mark.parametrize("shape", ["swin", "channels first", "conv1d"])
def test_the_channels_are_found(shape: str) -> None:
    layer, x = {
        "swin": (nn.LayerNorm(6), torch.randn(200, 4, 5, 6)),
        "channels first": (nn.Conv2d(3, 6, 1), torch.randn(200, 3, 4, 5)),
        "conv1d": (nn.Conv1d(3, 6, 1), torch.randn(200, 3, 9)),
    }[shape]
    model = nn.Sequential(layer)
    wrapped = noesis.wrap(model, layers="0", codebook=noesis.Codebook())
    wrapped.calibrate([x], progress=False)
    assert wrapped.codebooks["0"].channels == 12  # means and spreads


DISTRIBUTED = """
import sys
sys.modules["numba"] = None  # each rank would compile for seconds
import copy, torch, torch.distributed as dist, noesis
from torch import nn
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(0)
bare = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
model = copy.deepcopy(bare)
wrapped = noesis.wrap(model, layers=["0", "2"], codebook=noesis.Codebook(size=4, dim=2, learn="gradient"))
ours, theirs = DistributedDataParallel(model), DistributedDataParallel(bare)
optimiser = torch.optim.SGD(wrapped.codebook_parameters(), lr=0.1)
for step in range(3):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
    theirs(x).square().mean().backward()
    loss = ours(x).square().mean() + 0.1 * wrapped.coding_loss()
    loss.backward()
    optimiser.step()
assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), bare.parameters()))
assert wrapped.coding_loss().isfinite()
wrapped.calibrate([torch.randn(200, 4)], progress=False)
ours(torch.randn(3, 4))
assert len(wrapped.surprise()) == 3
dist.destroy_process_group()
print("done")
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    done = torchrun(2, script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == 2


@pytest.mark.data
def test_stories_and_other_texts(data: Path) -> None:
    """A trained model: sampled stories are normal, another kind of text is not."""
    model = transformers.AutoModelForCausalLM.from_pretrained(data / "stories260k").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(data / "stories260k")
    torch.manual_seed(0)
    with torch.no_grad():
        stories = model.generate(
            torch.full((160, 1), tokenizer.bos_token_id), do_sample=True, max_length=48, min_length=48, pad_token_id=0
        )
    wrapped = noesis.wrap(model, layers="blocks", codebook=noesis.Codebook(), logits="lm_head")
    wrapped.calibrate(list(stories[:130].split(26)), progress=False)
    text = (data / "tinyshakespeare.txt").read_text(encoding="utf-8")[:6000]
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    strange = torch.cat([torch.full((30, 1), tokenizer.bos_token_id), tokens[: 30 * 47].reshape(30, 47)], 1)
    wrapped(stories[130:])
    normal = wrapped.surprise().score
    wrapped(strange)
    other = wrapped.surprise().score
    assert (other[:, None] > normal).mean() > 0.98
