"""A small GPT on a text, with noesis on: trace, log, alarms; its losses are bitwise those without noesis.

python examples/tiny_gpt.py tinyshakespeare.txt                    # learns
python examples/tiny_gpt.py tinyshakespeare.txt --break-at 200     # learning rate x100: caught, and located
python examples/tiny_gpt.py tinyshakespeare.txt --bare             # without noesis
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noesis

WIDTH, HEADS, DEPTH, CONTEXT, BATCH = 64, 4, 3, 32, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, 2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (B, T, V)


def train(
    text: str,
    steps: int = 400,
    break_at: int | None = None,
    bare: bool = False,
    log: Path | None = None,
    seed: int = 0,
) -> tuple[list[float], list[noesis.Alarm], noesis.Trace | None]:
    """Losses, alarms and the trace; training stops at the first alarm."""
    torch.manual_seed(seed)
    numbers = {letter: number for number, letter in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[letter] for letter in text])
    model = GPT(len(numbers))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)

    wrapped, alarms, found = None, None, []
    if not bare:
        wrapped = noesis.wrap(model, layers=["blocks", "linear"], stats=["zeros"], capacity=steps)
        alarms = noesis.Alarms(wrapped, found.append)

    losses = []
    for step in range(steps):
        if step == break_at:
            optimiser.param_groups[0]["lr"] *= 100
        starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,))
        batch = torch.stack([ids[start : start + CONTEXT + 1] for start in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if wrapped is not None and step % 10 == 9:
            if log is not None:
                wrapped.log_to(log, step)
            if alarms.check(step):
                break
    return losses, found, None if wrapped is None else wrapped.trace()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--break-at", type=int, metavar="STEP", help="from here on the learning rate is x100")
    parser.add_argument("--bare", action="store_true", help="without noesis")
    parser.add_argument("--log", type=Path, help="a .csv or .jsonl file for what the layers do")
    args = parser.parse_args(argv)

    text = args.text.read_text(encoding="utf-8")
    losses, alarms, trace = train(text, args.steps, args.break_at, args.bare, args.log)
    print(f"{len(losses)} steps, loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    if trace is not None:
        print("\nstd of each block at five steps of the run")
        shown = [round(at * (len(trace) - 1) / 4) for at in range(5)]
        print(f"{'step':10}", *(f"{trace.steps[at]:>7}" for at in shown))
        for number in range(DEPTH):
            stds = trace["std"][shown, trace.layers.index(f"blocks.{number}")]
            print(f"{f'blocks.{number}':10}", *(f"{std:7.2f}" for std in stds))
    for alarm in alarms[:5]:
        print(alarm)
    return 1 if alarms else 0


if __name__ == "__main__":
    raise SystemExit(main())
