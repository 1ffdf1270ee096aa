"""`noesis demo`: train a small network while it is observed, damage a copy, and find the damage.

Needs the extra `demo`; runs on the CPU in a few seconds and downloads nothing.
"""

# ruff: noqa: T201  what a command has to say, it prints

from __future__ import annotations

import copy
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadValue, require
from ..results import Comparison, Soulprint, Trace, compare
from ..text import table
from ..wrapping import wrap
from .outputs import check_outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS = ["conv", "linear"]
BLOCKS, WIDTH = 4, 16
EPOCHS, BATCH = 6, 32
#: Held-out digits come in groups of 80: eight for the baseline, one to compare on, one that is new.
GROUPS, GROUP, STEP = 10, 80, 8
#: The files that are written, and what they hold.
PICTURE = "what_changed.png"
RESULTS = {
    "training.safetensors": "trace of the training",
    "healthy.safetensors": "trace of the healthy network",
    "broken.safetensors": "trace of the damaged copy, same digits",
    "suspect.safetensors": "soulprint of the damaged copy, other digits",
}
BASELINE = [f"baseline/{number}.safetensors" for number in range(GROUPS - 2)]
#: The part of the damaged layer's weights that is set to zero.
LOST = 0.25


class Digits(NamedTuple):
    """Images float32 [digits, 1, 8, 8] from -1 to 1, and which digit each shows, int64 [digits]."""

    images: Tensor
    labels: Tensor


class Block(nn.Module):
    """A residual block: x + project(relu(expand(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.expand = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.project = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = x + self.project(F.relu(self.expand(self.norm(x))))
        return out


class Network(nn.Module):
    """A small residual network for images of 8 x 8 pixels, ten classes."""

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.norm = nn.GroupNorm(4, width)
        self.head = nn.Linear(width * 16, 10)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = F.relu(self.norm(self.blocks(self.stem(x))))  # [batch, width, 8, 8]
        out: Tensor = self.head(F.max_pool2d(x, 2).flatten(1))
        return out


@dataclass
class Findings:
    """What came of comparing a healthy network with a damaged copy.

    Attributes:
        layer: the layer that was damaged; nothing below was told.
        accuracies: of the healthy network and of the copy, on all held-out digits.
        healthy, broken: traces of both on the same digits.
        baseline: soulprints of the healthy network, each on other digits.
        same: their comparison, on the same digits.
        control: the healthy network on new digits, against the baseline.
        fresh: the damaged copy on new digits, against the baseline.
        suspect: soulprint of the damaged copy on new digits.
    """

    layer: str
    accuracies: tuple[float, float]
    healthy: Trace
    broken: Trace
    baseline: list[Soulprint]
    same: Comparison
    control: Comparison
    fresh: Comparison
    suspect: Soulprint


def run(out: Path, seed: int = 0, quick: bool = False, force: bool = False) -> Findings:
    """Train, damage, compare; print the story and write its files into a folder.

    Args:
        out: the folder.
        seed: of the network, the order of the digits, and the damage.
        quick: train for fewer epochs.
        force: replace files of an earlier run.

    Returns:
        What was found.

    Raises:
        NoesisError: when scikit-learn or matplotlib is missing, `out` is not a folder, or files are there already.
    """
    require("matplotlib", extra="demo", purpose="noesis demo")
    training, held_out = load_digits(seed)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BadValue(f"{out} is a file", "a folder to write to", "Choose another name")
    check_outputs([("--out", out / name) for name in (PICTURE, *RESULTS, *BASELINE)], force)
    with _one_thread():
        return _tell(training, held_out, out, seed, epochs=EPOCHS // 2 if quick else EPOCHS)


def _tell(training: Digits, held_out: Digits, out: Path, seed: int, epochs: int) -> Findings:
    _heading("1. Train a small network on handwritten digits, observed as it runs")
    model, trace = train(training, held_out, seed, epochs)
    print(f"\nThe trace of the training, as print(wrapped.trace()) shows it:\n\n{trace}")
    print(f"\nHow the std of each layer moved, by step:\n\n{_over_time(trace)}")

    _heading(f"2. Damage a copy: {LOST:.0%} of the weights of one layer become zero")
    findings = investigate(model, held_out, secret(model, seed), seed)
    print("held-out accuracy   healthy {:.1%}   damaged {:.1%}".format(*findings.accuracies))
    print("Which layer? The accuracy does not tell; noesis is not told either.")

    _heading("3. The same digits through both: where do they part?")
    first = findings.same.first_divergence
    print(f"first divergence: step {first.step}, layer {first.layer}" if first else "no divergence")

    _heading("4. Other digits: is it more than the noise from digit to digit?")
    print(f"baseline: {len(findings.baseline)} runs of the healthy network, each on other digits")
    print(f"control, the healthy network on new digits: {len(findings.control.changed)} layers changed\n")
    print(findings.fresh)

    _heading("5. The answer")
    print(_verdict(findings))
    written = write(findings, trace, out)
    print("\nWritten:")
    for path, what in written:
        print(f"  {path!s:<{max(len(str(name)) for name, _ in written)}}  {what}")
    names = ("healthy.safetensors", "broken.safetensors", "suspect.safetensors", "baseline")
    healthy, broken, suspect, baseline = (f'"{out / name}"' if " " in str(out) else str(out / name) for name in names)
    print("\nTry next:")
    noesis, python = command("noesis"), command("python")
    print(f"  {noesis} compare {healthy} {broken}")
    print(f"  {noesis} compare {healthy} {suspect} --baseline {baseline}")
    print(f'  {python} -c "import noesis; print(noesis.Trace.load({str(out / "training.safetensors")!r}))"')
    return findings


def command(name: str) -> str:
    """What to type for a program of this environment, which may not be the activated one."""
    beside, found = Path(sys.executable).with_name(name), shutil.which(name)
    if not beside.exists() or (found is not None and Path(found).parent == beside.parent):
        return name
    return shlex.quote(os.path.relpath(beside))


# ---------------------------------------------------------------- the experiment


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """Scikit-learn's handwritten digits, shuffled: 997 to train on and 800 held out."""
    digits = require("sklearn.datasets", extra="demo", purpose="noesis demo").load_digits()
    order = torch.randperm(len(digits.target), generator=_generator(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(digits.target, dtype=torch.int64)[order]
    cut = len(order) - GROUPS * GROUP
    return Digits(images[:cut], labels[:cut]), Digits(images[cut:], labels[cut:])


def train(training: Digits, held_out: Digits, seed: int, epochs: int = EPOCHS) -> tuple[Network, Trace]:
    """A trained network, and the trace of its training; prints a line per epoch."""
    with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global generator
        torch.manual_seed(seed)
        model = Network()
    order = _generator(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    wrapped = wrap(model, layers=LAYERS, capacity=epochs * math.ceil(len(training.labels) / BATCH))
    print(wrapped)
    with wrapped.run(stage="training", seed=seed):
        for epoch in range(epochs):
            total = 0.0
            for chosen in torch.randperm(len(training.labels), generator=order).split(BATCH):
                loss = F.cross_entropy(wrapped(training.images[chosen]), training.labels[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item() * len(chosen)
            with wrapped.paused():  # evaluation is no step of the training
                right = accuracy(model, held_out)
            mean = total / len(training.labels)
            print(f"epoch {epoch + 1}/{epochs}   loss {mean:.4f}   held-out accuracy {right:.1%}", flush=True)
    trace = wrapped.trace()
    wrapped.unwrap()
    return model.eval(), trace


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of digits that are recognised."""
    with torch.inference_mode():
        return float((model(digits.images).argmax(1) == digits.labels).double().mean())


def record(model: nn.Module, images: Tensor, **meta: object) -> Trace:
    """The trace of a model over images, a few at a time."""
    wrapped = wrap(model, layers=LAYERS)
    with wrapped.run(**meta), torch.inference_mode():
        for batch in images.split(STEP):
            wrapped(batch)
    wrapped.unwrap()
    return wrapped.trace()


def secret(model: Network, seed: int) -> str:
    """The layer to damage: one of the convolutions within the blocks, by lot."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    names: list[str] = [name for name in convolutions if name.startswith("blocks.")]
    return names[int(torch.randint(len(names), (), generator=_generator(seed)))]


def damaged(model: nn.Module, layer: str, seed: int) -> nn.Module:
    """A copy of a model in which some of one layer's weights are zero."""
    twin = copy.deepcopy(model)
    weight = twin.get_submodule(layer).get_parameter("weight")
    with torch.no_grad():
        weight.mul_(torch.rand(weight.shape, generator=_generator(seed)) >= LOST)
    return twin


def investigate(model: nn.Module, held_out: Digits, layer: str, seed: int) -> Findings:
    """Damage a layer in a copy and compare it with the original; only the damage knows the layer."""
    twin = damaged(model, layer, seed)
    groups = held_out.images.split(GROUP)
    known, shared, new = groups[:-2], groups[-2], groups[-1]
    baseline = [record(model, images, run=f"baseline {n}", seed=seed).soulprint() for n, images in enumerate(known)]
    healthy = record(model, shared, run="healthy", seed=seed)
    broken = record(twin, shared, run="broken", seed=seed)
    suspect = record(twin, new, run="suspect", seed=seed).soulprint()
    return Findings(
        layer=layer,
        accuracies=(accuracy(model, held_out), accuracy(twin, held_out)),
        healthy=healthy,
        broken=broken,
        baseline=baseline,
        same=compare(healthy, broken),
        control=compare(healthy, record(model, new, run="control"), baseline=baseline),
        fresh=compare(healthy, suspect, baseline=baseline),
        suspect=suspect,
    )


# ---------------------------------------------------------------- telling it


@contextmanager
def _one_thread() -> Iterator[None]:
    """For layers this small, threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _over_time(trace: Trace, columns: int = 6) -> str:
    """The std of every layer at a few steps, from the first to the last."""
    shown = np.unique(np.linspace(0, len(trace) - 1, columns).round().astype(int))
    stds = trace["std"][shown].T  # [layers, columns]
    lines = [[name, *(f"{std:.3g}" for std in row)] for name, row in zip(trace.layers, stds, strict=True)]
    return table(["layer", *(f"step {step}" for step in trace.steps[shown])], lines)


def _verdict(findings: Findings) -> str:
    """What noesis says, beside what was done."""
    first, strongest = findings.same.first_divergence, findings.fresh.rows[0]
    lines = [
        ("same digits, the runs part at", first.layer if first else "nowhere"),
        ("other digits, strongest evidence at", f"{strongest.layer} (q = {strongest.q_value:.1g})"),
        ("damaged was", findings.layer),
    ]
    return "\n".join(f"{what:<36}{which}" for what, which in lines)


# ---------------------------------------------------------------- files


def write(findings: Findings, training: Trace, out: Path) -> list[tuple[Path, str]]:
    """Write traces, soulprints and the picture; returns each path with what it holds."""
    draw(findings, out / PICTURE)
    results = (training, findings.healthy, findings.broken, findings.suspect)
    for result, name in zip(results, RESULTS, strict=True):
        result.save(out / name)
    for each, name in zip(findings.baseline, BASELINE, strict=True):
        each.save(out / name)
    return [
        (out / PICTURE, "what changed, in a picture"),
        *((out / name, what) for name, what in RESULTS.items()),
        (out / "baseline", f"{len(findings.baseline)} soulprints of the healthy network"),
    ]


def draw(findings: Findings, path: Path) -> Figure:
    """Draw effects on other digits beside a heat map of effects on the same digits, step by step."""
    from ..plots import draw_effects, draw_heat_map, new_figure, write_figure

    figure = new_figure(14.0, 4.4)
    left, right = figure.subplots(1, 2)
    draw_effects(left, findings.fresh.rows, title="other digits: effect by layer")
    draw_heat_map(
        right,
        _effects_by_step(findings.healthy, findings.broken),
        findings.healthy.layers,
        findings.healthy.steps.tolist(),
        title="same digits: effect by layer and step",
        row_axis="layer",
        column_axis="step",
        colour_bar="effect",
    )
    write_figure(figure, path)
    return figure


def _effects_by_step(a: Trace, b: Trace) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """How much each layer differs at each step, float64 [layers, steps]."""
    columns = [compare(a.soulprint(step), b.soulprint(step)) for step in a.steps.tolist()]
    return np.array([[each.row(layer).effect for each in columns] for layer in a.layers])
