"""Four sets on which detectors are compared: a trained model, inputs of its own kind, and inputs of others.

    1  cifar10   ResNet-20                     out: CIFAR-100, MNIST, Fashion-MNIST, noise, blur
    2  fashion   small conv net                out: MNIST, inverted, rotated, noise
    3  digits    perceptron, digits 0-7        out: digits 8-9, noise, inverted, permuted
    4  stories   a Llama of 260k parameters    out: WikiText-2, Shakespeare, shuffled words, code

An out set is near if it keeps the local statistics of the model's own inputs (other classes, turned
pictures, the same words in another order), else far.
"""

from __future__ import annotations

import importlib
import os
import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .classifiers import SmallConv, perceptron, resnet20, trained

CACHE = Path.home() / ".cache" / "noesis-benchmarks" / "detection"
DATA = Path(os.environ.get("NOESIS_DATA", Path(__file__).parents[3] / "shared" / "data"))

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FASHION_MEAN, FASHION_STD = (0.286,), (0.353,)
TOKENS = 128  # of a sequence
FIT_STORIES, TEST_STORIES, TEXTS = 500, 200, 200


@dataclass(frozen=True)
class Case:
    """A trained model, inputs of its own kind and of others, all as the model takes them."""

    name: str
    model: nn.Module  # in eval mode
    logits: str  # the module that gives the logits: [N, C], or [N, T, V] of a language model
    features: str  # the module that gives the penultimate features: [N, D], or [N, T, D]
    blocks: tuple[str, ...]  # the modules that are the model's blocks
    fit: Tensor  # in-distribution inputs that a detector may learn from: the model's training data
    fit_labels: Tensor  # [N], or the next tokens [N, T - 1]
    test: Tensor  # in-distribution inputs that nothing has seen
    test_labels: Tensor
    out: dict[str, Tensor]
    near: tuple[str, ...]  # which of `out` are near; the others are far
    seed: int
    sequences: bool = False  # tokens, not pictures


def case(number: int, seed: int = 0, data: Path = DATA, cache: Path = CACHE) -> Case:
    """A set by its number; what is trained or sampled for it is kept in the cache folder."""
    build, _ = CASES[number]
    return build(seed, data, cache)


# ---------------------------------------------------------------- 1


def cifar10(seed: int, data: Path, cache: Path) -> Case:
    """CIFAR-10."""
    generator = torch.Generator().manual_seed(seed)
    fit, fit_labels = images(data / "cifar10_train.npz")
    test, test_labels = images(data / "cifar10_test.npz")
    out = {
        "cifar100": images(data / "cifar100_test.npz")[0],
        "mnist": coloured(images(data / "mnist_test.npz")[0][:2000]),
        "fashion": coloured(images(data / "fashion_mnist_test.npz")[0][:2000]),
        "noise": noise(1000, (3, 32, 32), generator),
        "blur": blurred(test, sigma=3.0),
    }

    def ready(x: Tensor) -> Tensor:
        return normalised(x, CIFAR_MEAN, CIFAR_STD)

    return Case(
        name="cifar10",
        model=resnet20(data / "cifar10_resnet20.safetensors"),
        logits="linear",
        features="flatten",
        blocks=tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)),
        fit=ready(fit),
        fit_labels=fit_labels,
        test=ready(test),
        test_labels=test_labels,
        out={name: ready(x) for name, x in out.items()},
        near=("cifar100",),
        seed=seed,
    )


def images(path: Path) -> tuple[Tensor, Tensor]:
    """Images of a file as float32 in [0, 1], [N, channels, height, width], and their labels."""
    with np.load(path, allow_pickle=False) as file:
        pictures = torch.from_numpy(file["images"]).float() / 255
        labels = torch.from_numpy(file["labels"]).long() if "labels" in file else torch.full((len(pictures),), -1)
    return (pictures.unsqueeze(1) if pictures.dim() == 3 else pictures.permute(0, 3, 1, 2)).contiguous(), labels


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images as the model was trained on them."""
    return (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def coloured(x: Tensor) -> Tensor:
    """Grey 28 x 28 images as 32 x 32 images of three channels."""
    resized = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
    return resized.expand(-1, 3, -1, -1).contiguous()


def noise(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Half uniform noise, half Gaussian noise about grey, in [0, 1]."""
    uniform = torch.rand(count // 2, *shape, generator=generator)
    gaussian = 0.5 + 0.25 * torch.randn(count - count // 2, *shape, generator=generator)
    return torch.cat([uniform, gaussian.clamp(0, 1)])


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Images convolved with a Gaussian of `sigma` pixels."""
    reach = round(3 * sigma)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).repeat(x.shape[1], 1, 1, 1)
    padded = F.pad(x, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=x.shape[1]), kernel.transpose(2, 3), groups=x.shape[1])


# ---------------------------------------------------------------- 2


def fashion(seed: int, data: Path, cache: Path) -> Case:
    """Fashion-MNIST; the model sees 20,000 images, the detectors the first 5,000 of them."""
    generator = torch.Generator().manual_seed(seed)
    train, train_labels = images(data / "fashion_mnist_train.npz")
    pictures, labels = images(data / "fashion_mnist_test.npz")
    test, others = pictures[:2000], pictures[2000:4000]
    out = {
        "mnist": images(data / "mnist_test.npz")[0][:2000],
        "inverted": 1 - others,
        "rotated": others.rot90(1, (2, 3)),
        "noise": noise(1000, (1, 28, 28), generator),
    }

    def ready(x: Tensor) -> Tensor:
        return normalised(x, FASHION_MEAN, FASHION_STD)

    torch.manual_seed(seed)
    path = cache / f"fashion-smallconv-{seed}.safetensors"
    model = trained(SmallConv(), path, ready(train), train_labels, epochs=4, seed=seed)
    return Case(
        name="fashion",
        model=model,
        logits="fc",
        features="flatten",
        blocks=tuple(f"blocks.{block}" for block in range(6)),
        fit=ready(train[:5000]),
        fit_labels=train_labels[:5000],
        test=ready(test),
        test_labels=labels[:2000],
        out={name: ready(x).contiguous() for name, x in out.items()},
        near=("rotated",),
        seed=seed,
    )


# ---------------------------------------------------------------- 3


def digits(seed: int, data: Path, cache: Path) -> Case:
    """scikit-learn's digits: 0-7 known, 60 % to train on and 40 % to test."""
    generator = torch.Generator().manual_seed(seed)
    found = needs("sklearn.datasets").load_digits()
    x = torch.from_numpy(found.data).float() / 16
    labels = torch.from_numpy(found.target).long()
    known = (labels < 8).nonzero().flatten()
    known = known[torch.randperm(len(known), generator=generator)]
    train, held = known.split([round(0.6 * len(known)), len(known) - round(0.6 * len(known))])
    out = {
        "digits89": x[labels >= 8],
        "noise": noise(500, (64,), generator),
        "inverted": 1 - x[held],
        "permuted": x[held][:, torch.randperm(64, generator=generator)],
    }
    torch.manual_seed(seed)
    path = cache / f"digits-perceptron-{seed}.safetensors"
    model = trained(perceptron(), path, x[train], labels[train], epochs=40, seed=seed)
    return Case(
        name="digits",
        model=model,
        logits="4",
        features="3",
        blocks=("1", "3"),
        fit=x[train],
        fit_labels=labels[train],
        test=x[held],
        test_labels=labels[held],
        out=out,
        near=("digits89",),
        seed=seed,
    )


# ---------------------------------------------------------------- 4


def stories(seed: int, data: Path, cache: Path) -> Case:
    """Stories that a Llama of 260k parameters tells, against other texts; sequences begin with bos."""
    transformers = needs("transformers")
    folder = data / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    path = cache / f"stories-{TOKENS}-{seed}.safetensors"
    if path.exists():
        found = load_file(path)
    else:
        found = sequences(model, transformers.AutoTokenizer.from_pretrained(folder), seed, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, path)
    fit, test = found.pop("fit"), found.pop("test")
    return Case(
        name="stories",
        model=model,
        logits="lm_head",
        features="model.norm",
        blocks=tuple(f"model.layers.{layer}" for layer in range(5)),
        fit=fit,
        fit_labels=fit[:, 1:],
        test=test,
        test_labels=test[:, 1:],
        out=found,
        near=("shuffled",),
        seed=seed,
        sequences=True,
    )


def sequences(model: Any, tokenizer: Any, seed: int, data: Path) -> dict[str, Tensor]:
    """The stories to fit on and to test, and the other texts: [N, 128] tokens each."""
    shuffler = random.Random(seed)
    test = told(model, TEST_STORIES, TOKENS + 32, 2 * seed + 1)  # longer, so that shuffled words fill a sequence
    mixed = []
    for story in tokenizer.batch_decode(test, skip_special_tokens=True):
        words = story.split(" ")  # a line break stays with its word
        shuffler.shuffle(words)
        mixed.append(" ".join(words))
    articles = (data / "wikitext2_test.txt").read_text(encoding="utf-8").replace("<unk>", "")  # a token of no story
    return {
        "fit": told(model, FIT_STORIES, TOKENS, 2 * seed),
        "test": test[:, :TOKENS].contiguous(),
        "wikitext": passages(tokenizer, articles, shuffler),
        "shakespeare": passages(tokenizer, (data / "tinyshakespeare.txt").read_text(encoding="utf-8"), shuffler),
        "shuffled": torch.stack([tokens(tokenizer, text) for text in mixed]),
        "code": passages(tokenizer, python_code(), shuffler),
    }


def told(model: Any, count: int, length: int, seed: int) -> Tensor:
    """Stories sampled from the model at temperature 1; those that end before `length` tokens are left out."""
    start = torch.full((100, 1), model.config.bos_token_id)
    kept: list[Tensor] = []
    torch.manual_seed(seed)
    while sum(map(len, kept)) < count:
        given = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 2}
        with torch.no_grad():
            found = model.generate(start, max_length=length, attention_mask=torch.ones_like(start), **given)
        found = F.pad(found, (0, length - found.shape[1]), value=model.config.eos_token_id)
        kept.append(found[(found[:, 1:] > model.config.eos_token_id).all(1)])
    return torch.cat(kept)[:count]


def passages(tokenizer: Any, text: str, chooser: random.Random) -> Tensor:
    """Passages from random places of a text, each from the beginning of a word: [200, 128] tokens."""
    found: list[Tensor] = []
    while len(found) < TEXTS:
        at = chooser.randrange(len(text) - 2000)
        opening = text[at : at + 2000].split(None, 1)[-1]
        found.append(tokens(tokenizer, opening))
    return torch.stack(found)


def tokens(tokenizer: Any, text: str) -> Tensor:
    """The first 128 tokens of a text, bos among them."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
    if len(ids) < TOKENS:
        raise SystemExit(f"{text[:40]!r}...: {len(ids)} tokens, where a sequence needs {TOKENS}")
    return torch.tensor(ids[:TOKENS])


def python_code() -> str:
    """Source files of the standard library, one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))[:60])


def needs(package: str) -> Any:
    """An optional package, or the end with a word on what is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SystemExit(f"{package} is not installed: this set needs it. Install it, or leave the set out.") from error


CASES: dict[int, tuple[Callable[[int, Path, Path], Case], tuple[int, ...]]] = {
    1: (cifar10, (0,)),
    2: (fashion, (0, 1, 2)),
    3: (digits, (0, 1, 2)),
    4: (stories, (0,)),
}  # how each is built, and its seeds
