"""`noesis demo` tells the truth within a minute."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from helpers.processes import one_thread, python
from noesis import Observed, Soulprint, Trace, compare
from noesis.cli import demo
from noesis.errors import BadValue, Inaccessible, MissingExtra

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Story:
    findings: demo.Findings
    out: Path
    text: str
    seconds: float
    random: tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """One run of the demo as a person starts it."""
    # The folder's name has a space, which the printed commands must survive.
    out, text, threads = tmp_path_factory.mktemp("demo") / "my demo", io.StringIO(), torch.get_num_threads()
    random, start = torch.get_rng_state(), time.perf_counter()
    with contextlib.redirect_stdout(text):
        findings = demo.run(out)
    seconds = time.perf_counter() - start
    assert torch.get_num_threads() == threads
    return Story(findings, out, text.getvalue(), seconds, (random, torch.get_rng_state()))


@pytest.fixture(scope="module")
def network() -> tuple[demo.Network, demo.Digits]:
    with contextlib.redirect_stdout(io.StringIO()):
        training, held_out = demo.load_digits(0)
        with one_thread():
            return demo.train(training, held_out, seed=0, epochs=2)[0], held_out


# ---------------------------------------------------------------- the story


@pytest.mark.slow
def test_it_takes_less_than_a_minute(story: Story) -> None:
    assert story.seconds < 60


@pytest.mark.slow
def test_the_damaged_layer_is_named(story: Story) -> None:
    found = story.findings
    assert found.same.first_divergence is not None
    assert found.same.first_divergence.layer == found.fresh.rows[0].layer == found.layer
    assert found.layer in found.fresh.changed
    assert found.layer.startswith("blocks."), "a layer in the middle"
    assert found.control.changed == []
    assert min(found.accuracies) > 0.9
    assert abs(found.accuracies[0] - found.accuracies[1]) <= 0.01, "the accuracy gives it away"


@pytest.mark.slow
def test_what_it_prints(story: Story) -> None:
    epochs = re.findall(r"^epoch (\d)/6   loss [\d.]+   held-out accuracy ([\d.]+)%$", story.text, re.MULTILINE)
    assert [number for number, _ in epochs] == list("123456")
    assert float(epochs[-1][1]) > float(epochs[0][1]) > 50
    assert "Trace of 192 steps x 10 layers x 7 stats" in story.text
    layer = re.escape(story.findings.layer)
    assert re.search(rf"^first divergence: step 0, layer {layer}$", story.text, re.MULTILINE)
    assert re.search(rf"^same digits, the runs part at +{layer}$", story.text, re.MULTILINE)
    assert re.search(rf"^other digits, strongest evidence at {layer} \(q = .*\)$", story.text, re.MULTILINE)
    assert re.search(rf"^damaged was +{layer}$", story.text, re.MULTILINE)
    assert max(map(len, story.text.splitlines())) <= 120 + len(str(story.out)) * 3


@pytest.mark.slow
def test_nothing_is_told_before_it_is_found(story: Story) -> None:
    before = story.text[: story.text.index("3. The same digits")]
    assert story.findings.layer not in before[before.index("2. Damage a copy") :]


@pytest.mark.slow
def test_the_files_load_back(story: Story) -> None:
    found, out = story.findings, story.out
    training = Trace.load(out / "training.safetensors")
    assert (len(training), training.dropped_steps) == (192, 0)
    assert training.batches.max() == 32, "an evaluation was taken for a step"
    healthy, broken = Trace.load(out / "healthy.safetensors"), Trace.load(out / "broken.safetensors")
    assert compare(healthy, broken).first_divergence == found.same.first_divergence
    suspect = Soulprint.load(out / "suspect.safetensors")
    baseline = [Soulprint.load(path) for path in sorted((out / "baseline").iterdir())]
    assert len(baseline) == 8
    assert compare(healthy, suspect, baseline=baseline).rows == found.fresh.rows
    listed = re.search(r"^Written:\n((?:  .*\n)+)", story.text, re.MULTILINE)
    assert listed
    assert {Path(line.strip().split("  ")[0]) for line in listed[1].splitlines()} == set(out.iterdir())


@pytest.mark.slow
def test_the_picture_is_one(story: Story) -> None:
    image = imread(story.out / "what_changed.png")
    assert image.shape == (660, 2100, 4)
    colours = np.unique((image[..., :3] * 255).round().astype(np.uint8).reshape(-1, 3), axis=0)
    assert len(colours) > 100


@pytest.mark.slow
def test_what_to_try_next_works(story: Story) -> None:
    lines = story.text[story.text.index("Try next:") :].splitlines()[1:]
    commands = [shlex.split(line) for line in lines]
    assert [Path(command[0]).name for command in commands] == ["noesis", "noesis", "python"]
    for command, expected in zip(commands, ["first divergence: step 0", "layers changed", "192 steps"], strict=True):
        module = ["-m", "noesis.cli"] if Path(command[0]).name == "noesis" else []
        done = python(*module, *command[1:])
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_commands_are_those_of_this_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "my env" / "bin"
    home.mkdir(parents=True)
    (home / "noesis").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(home / "python"))
    monkeypatch.setenv("PATH", "")
    assert demo.command("noesis") == "'my env/bin/noesis'"
    assert demo.command("nothing") == "nothing"
    monkeypatch.setenv("PATH", str(home))
    assert demo.command("noesis") == "noesis"


@pytest.mark.slow
def test_the_global_generator_is_left_alone(story: Story) -> None:
    assert torch.equal(*story.random)


# ---------------------------------------------------------------- honest


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "layer"), [(0, "blocks.1.expand"), (1, "blocks.3.project"), (2, "blocks.2.expand")])
def test_other_seeds_and_layers(seed: int, layer: str, capsys: pytest.CaptureFixture[str]) -> None:
    training, held_out = demo.load_digits(seed)
    model, _ = demo.train(training, held_out, seed)
    found = demo.investigate(model, held_out, layer, seed)
    assert found.same.first_divergence is not None
    assert found.same.first_divergence.layer == layer
    assert found.fresh.rows[0].layer == layer
    assert layer in found.fresh.changed


def test_an_undamaged_copy_is_not_accused(
    network: tuple[demo.Network, demo.Digits], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LOST", 0.0)
    found = demo.investigate(*network, "blocks.1.expand", seed=0)
    assert found.same.first_divergence is None
    assert found.same.distance == 0
    assert found.fresh.changed == []
    assert found.accuracies[0] == found.accuracies[1]
    assert "nowhere" in demo._verdict(found)


def test_damage_is_to_one_layer_of_the_copy(network: tuple[demo.Network, demo.Digits]) -> None:
    model, _ = network
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = demo.damaged(model, "blocks.1.project", seed=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    differing = [name for name, value in twin.state_dict().items() if not torch.equal(value, before[name])]
    assert differing == ["blocks.1.project.weight"]
    share = (twin.get_parameter("blocks.1.project.weight") == 0).double().mean()
    assert abs(share - demo.LOST) < 0.05
    assert not any(isinstance(module, Observed) for module in [*model.modules(), *twin.modules()])


def test_the_secret_depends_on_the_seed() -> None:
    model = demo.Network()
    secrets = {demo.secret(model, seed) for seed in range(60)}
    assert secrets == {f"blocks.{block}.{part}" for block in range(4) for part in ("expand", "project")}


def test_the_same_seed_trains_the_same_network(capsys: pytest.CaptureFixture[str]) -> None:
    training, held_out = demo.load_digits(0)
    few = demo.Digits(training.images[:200], training.labels[:200])
    (one, first), (other, second) = (demo.train(few, held_out, seed=5, epochs=1) for _ in range(2))
    assert np.array_equal(first.values, second.values)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not np.array_equal(first.values, demo.train(few, held_out, seed=6, epochs=1)[1].values)


def test_train_and_held_out_digits_are_apart() -> None:
    training, held_out = demo.load_digits(0)
    assert (len(training.labels), len(held_out.labels)) == (997, 800)
    assert training.images.shape[1:] == (1, 8, 8)
    assert {tuple(image.flatten().tolist()) for image in training.images}.isdisjoint(
        tuple(image.flatten().tolist()) for image in held_out.images
    )
    assert not torch.equal(training.labels, demo.load_digits(1)[0].labels)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(("package", "module"), [("sklearn", "sklearn.datasets"), ("matplotlib", "matplotlib")])
def test_a_missing_package_names_the_extra(
    package: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"noesis demo needs .*'{package}.*pip install 'noesis\[demo\]'"):
        demo.run(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(BadValue, match=r"out is a file\. Expected a folder to write to\. Choose another name"):
        demo.run(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["what_changed.png", "training.safetensors", "baseline/7.safetensors"])
def test_an_earlier_run_is_not_overwritten(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(Inaccessible, match=rf"{name} is there already\. .* Change --out, or replace it with --force"):
        demo.run(tmp_path)
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]
