"""Models that are trained in seconds to do one thing that is known, once per session, and the data they are trained on.

Source of the recipes: Olsson et al. 2022, "In-context learning and induction heads"; Nanda et al. 2023, "Progress
measures for grokking via mechanistic interpretability".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, CONTEXT = 48, 48
PERIODS = range(6, 25)
#: A period is fixed in the shortcut, so that looking a fixed way back is enough.
FIXED = 12
MODULUS = 59

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def repeated(
    rows: int, periods: Sequence[int], generator: torch.Generator, length: int = CONTEXT
) -> tuple[Tensor, Tensor]:
    """Rows of distinct tokens that are said again and again, and the period of each row.

    Returns:
        Ids `[rows, length]` and periods `[rows]`.
    """
    period = torch.tensor(periods)[torch.randint(len(periods), (rows,), generator=generator)]
    order = torch.rand(rows, VOCABULARY, generator=generator).argsort(1)
    return order.gather(1, torch.arange(length) % period[:, None]), period


def predictable(logits: Tensor, ids: Tensor, period: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the token that follows, where it was said before."""
    known = torch.arange(ids.shape[1] - 1) >= period[:, None] - 1
    return logits[:, :-1][known], ids[:, 1:][known]


def accuracy(model: nn.Module, period: int) -> float:
    """How often the next token is right where it is predictable."""
    ids, periods = repeated(32, [period], torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, following = predictable(model(ids).logits, ids, periods)
    return float((logits.argmax(-1) == following).float().mean())


def gpt2(layers: int, seed: int, heads: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=64, n_layer=layers, n_head=heads, n_inner=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        tie_word_embeddings=False, **NO_TOKENS,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(layers: int, seed: int) -> nn.Module:
    """With rotary positions, and two query heads to each key head."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, hidden_size=64, intermediate_size=64,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, **NO_TOKENS,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def train(model: nn.Module, periods: Sequence[int], steps: int, seed: int, batch: int = 64) -> nn.Module:
    """Teach a language model to repeat."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warming = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 50))
    model.train()
    for _ in range(steps):
        ids, period = repeated(batch, periods, generator)
        loss = functional.cross_entropy(*predictable(model(ids).logits, ids, period))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        warming.step()
    return model.eval().requires_grad_(False)


@functools.cache
def induction(seed: int = 0) -> nn.Module:
    """GPT-2's class, two layers of four heads, that learned induction."""
    return train(gpt2(2, seed), PERIODS, 250, seed)


@functools.cache
def rotary_induction(seed: int = 0) -> nn.Module:
    """Llama's class with grouped keys, two layers of four heads, that learned induction."""
    return train(llama(2, seed), PERIODS, 400, seed)


@functools.cache
def one_layer(seed: int = 0) -> nn.Module:
    """A control: the same data, and one layer, in which there can be no induction head."""
    return train(gpt2(1, seed), PERIODS, 400, seed)


@functools.cache
def fixed_period(seed: int = 0) -> nn.Module:
    """A control: it repeats as well, by looking a fixed way back, whatever is there."""
    return train(gpt2(2, seed), [FIXED], 400, seed)


class Adder(nn.Module):
    """a + b modulo a prime: two embeddings, one hidden layer."""

    def __init__(self, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(MODULUS, width)
        self.up = nn.Linear(2 * width, hidden)
        self.act = nn.ReLU()
        self.down = nn.Linear(hidden, MODULUS)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.embed(pairs).flatten(1))))


def all_pairs() -> tuple[Tensor, Tensor]:
    """Every pair of numbers, and its sum modulo the prime."""
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    return pairs, pairs.sum(1) % MODULUS


@functools.cache
def modular_addition(seed: int = 0) -> nn.Module:
    """An `Adder` that was taught 60 % of all sums, and has understood the others."""
    torch.manual_seed(seed)
    model = Adder()
    pairs, sums = all_pairs()
    taught = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[: int(0.6 * len(pairs))]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=1.0)
    for _ in range(500):
        loss = functional.cross_entropy(model(pairs[taught]), sums[taught])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


TOYS: dict[str, Callable[[int], nn.Module]] = {
    "induction": induction,
    "rotary_induction": rotary_induction,
    "one_layer": one_layer,
    "fixed_period": fixed_period,
    "modular_addition": modular_addition,
}


def frequencies(adder: nn.Module) -> Tensor:
    """The share of each frequency in the energy of an adder's embedding, without the mean."""
    weight = adder.get_submodule("embed").weight.detach()  # type: ignore[union-attr]
    energy = torch.fft.rfft(weight - weight.mean(0), dim=0).abs().square().sum(1)[1:]
    return energy / energy.sum()
