"""Two more sets, fixed after the score was finished and before anything was run on them: a test of the default.

5  mnist      vision transformer, 4 blocks   out: MNIST rotated, inverted, Fashion-MNIST, noise
6  passages   character GRU, two authors     out: shuffled words, reversed, code, random characters
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from .classifiers import CharGRU, SmallViT, trained
from .sets import Case, images, noise, normalised, python_code

MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
LENGTH = 100  # characters of a passage
CHARACTERS = 96  # those that ASCII prints, and one for all others
HELD = 0.2  # share of a text, its end, that is not trained on


def mnist(seed: int, data: Path, cache: Path) -> Case:
    """MNIST; the model sees 10,000 images, the detectors the first 5,000 of them."""
    generator = torch.Generator().manual_seed(seed)
    train, train_labels = images(data / "mnist_train.npz")
    pictures, labels = images(data / "mnist_test.npz")
    test, others = pictures[:2000], pictures[2000:4000]
    out = {
        "rotated": others.rot90(1, (2, 3)),
        "fashion": images(data / "fashion_mnist_test.npz")[0][:2000],
        "inverted": 1 - others,
        "noise": noise(1000, (1, 28, 28), generator),
    }

    def ready(x: Tensor) -> Tensor:
        return normalised(x, MNIST_MEAN, MNIST_STD).contiguous()

    torch.manual_seed(seed)
    path = cache / f"mnist-vit-{seed}.safetensors"
    model = trained(SmallViT(), path, ready(train), train_labels, epochs=8, seed=seed, rate=2e-3)
    return Case(
        name="mnist",
        model=model,
        logits="head",
        features="norm",
        blocks=tuple(f"blocks.{block}" for block in range(4)),
        fit=ready(train[:5000]),
        fit_labels=train_labels[:5000],
        test=ready(test),
        test_labels=labels[:2000],
        out={name: ready(x) for name, x in out.items()},
        near=("rotated",),
        seed=seed,
    )


def passages(seed: int, data: Path, cache: Path) -> Case:
    """Passages of Shakespeare and of WikiText-2, which the model tells apart; half of the test set is of each."""
    chooser = random.Random(seed)
    texts = [plain((data / name).read_text(encoding="utf-8")) for name in ("tinyshakespeare.txt", "wikitext2_test.txt")]
    seen, held = zip(*(parts(text) for text in texts), strict=True)
    train, train_labels = drawn(seen, 5000, chooser)
    test, test_labels = drawn(held, 1000, chooser)
    others, _ = drawn(held, 500, chooser)
    out = {
        "shuffled": encoded([shuffled(text, chooser) for text in others]),
        "reversed": encoded([text[::-1] for text in others]),
        "code": encoded(cut(plain(python_code()), 1000, chooser)),
        "characters": torch.randint(0, CHARACTERS, (1000, LENGTH), generator=torch.Generator().manual_seed(seed)),
    }
    inputs = encoded(train)
    torch.manual_seed(seed)
    path = cache / f"passages-gru-{seed}.safetensors"
    model = trained(CharGRU(CHARACTERS, 2), path, inputs, train_labels, epochs=4, seed=seed, rate=2e-3)
    return Case(
        name="passages",
        model=model,
        logits="fc",
        features="last",
        blocks=("embedding", "gru"),
        fit=inputs[:5000],
        fit_labels=train_labels[:5000],
        test=encoded(test),
        test_labels=test_labels,
        out=out,
        near=("shuffled",),
        seed=seed,
    )


def plain(text: str) -> str:
    """A text in one line, without the mark for rare words."""
    return " ".join(text.replace("<unk>", "").split())


def parts(text: str) -> tuple[str, str]:
    """What the model is trained on, and the end of the text, which it is not."""
    border = round(len(text) * (1 - HELD))
    return text[:border], text[border:]


def drawn(texts: Iterable[str], count: int, chooser: random.Random) -> tuple[list[str], Tensor]:
    """`count` passages from random places of each text, in random order, and which text each is of."""
    found = [(passage, label) for label, text in enumerate(texts) for passage in cut(text, count, chooser)]
    chooser.shuffle(found)
    return [passage for passage, _ in found], torch.tensor([label for _, label in found])


def cut(text: str, count: int, chooser: random.Random) -> list[str]:
    """Passages from random places, each from the beginning of a word."""
    starts = [text.index(" ", chooser.randrange(len(text) - 500)) + 1 for _ in range(count)]
    return [text[start : start + LENGTH] for start in starts]


def shuffled(passage: str, chooser: random.Random) -> str:
    """The same words in another order."""
    words = passage.split(" ")
    chooser.shuffle(words)
    return " ".join(words)


def encoded(found: list[str]) -> Tensor:
    """Characters as numbers, [N, LENGTH]."""
    codes = torch.tensor([[ord(character) - 32 for character in passage] for passage in found])
    return torch.where((codes >= 0) & (codes < CHARACTERS - 1), codes, CHARACTERS - 1)


BLIND: dict[int, tuple[Callable[[int, Path, Path], Case], tuple[int, ...]]] = {
    5: (mnist, (0, 1, 2)),
    6: (passages, (0, 1, 2)),
}  # how each is built, and its seeds
