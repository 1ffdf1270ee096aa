"""A training loop that can say where its first NaN came from; needs `pip install 'noesis[demo]'`.

python examples/training_loop.py              # trains well
python examples/training_loop.py --lr 1       # explodes, and noesis names the step and the layer
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import nn

import noesis


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16  # [1797, 64]
    labels = torch.tensor(digits.target)

    model = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 10))
    optimiser = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    wrapped = noesis.wrap(model, layers="all")  # the one line that turns noesis on

    for epoch in range(args.epochs):
        with wrapped.run(epoch=epoch):  # each epoch is a run of its own: fresh statistics
            for batch in torch.randperm(len(labels)).split(64):
                loss = nn.functional.cross_entropy(wrapped(images[batch]), labels[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        trace = wrapped.trace()  # read once per epoch; the loop above never waits for it
        print(f"epoch {epoch}  loss {loss.item():.4f}  std of the logits {trace['std'][-1, -1]:.3g}")
        if found := trace.first_nonfinite():
            print(f"first NaN or infinity: epoch {epoch}, step {found[0]}, layer {found[1]}\n\n{trace}")
            return 1

    print(f"\n{trace}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
