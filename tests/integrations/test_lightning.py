"""Lightning with a wrapped network: the same training, numbers in its loggers, totals in its checkpoints."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noesis
from noesis.errors import BadValue
from noesis.integrations.lightning import NoesisCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # as it loads
    lightning = pytest.importorskip("lightning")

# Its advice on workers, devices and folders.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(10, 16, 4, generator=generator)
    return [(x, (x.sum(1) > 0).long()) for x in inputs]


def fit(module: Module, folder: Path, *, epochs: int = 1, resume: Any = None, **options: Any) -> Any:
    settings = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(**{**settings, **options})
    loaders = [torch.utils.data.DataLoader(data, batch_size=None) for data in (batches(), batches()[:2])]
    trainer.fit(module, *loaders, ckpt_path=resume)
    return trainer


def test_training_is_that_of_the_bare_model(tmp_path: Path) -> None:
    bare, ours = Module(), Module()
    fit(bare, tmp_path)
    wrapped = noesis.wrap(ours.net, layers="all")
    alarms: list[noesis.Alarm] = []
    path = tmp_path / "run.csv"
    callback = NoesisCallback(wrapped, path, every=5, alarms=noesis.Alarms(wrapped, alarms.append))
    fit(ours, tmp_path, callbacks=[callback])
    assert ours.losses == bare.losses
    assert ours.state_dict().keys() == bare.state_dict().keys()
    trace = wrapped.trace()
    assert len(trace) == 10, "neither the sanity check nor validation is observed"
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["step"] for line in lines] == ["5", "10"]
    assert float(lines[0]["noesis/max_of_layers/std"]) == trace["std"][4].max()
    assert alarms == []


def test_numbers_are_in_the_loggers(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    module = Module()
    wrapped = noesis.wrap(module.net, layers="all")
    logger = CSVLogger(tmp_path, name="a", version="b")
    options = {"logger": logger, "log_every_n_steps": 2, "accumulate_grad_batches": 2}
    fit(module, tmp_path, callbacks=[NoesisCallback(wrapped, layers="each", stats=["std"])], **options)
    with (tmp_path / "a" / "b" / "metrics.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["noesis/2/std"]]
    assert [line["step"] for line in lines] == ["2", "4"]
    assert float(lines[0]["noesis/2/std"]) == wrapped.trace()["std"][3, 2]


def test_totals_are_in_checkpoints(tmp_path: Path) -> None:
    def run(module: Module, folder: str, **options: Any) -> tuple[Any, NoesisCallback]:
        wrapped = noesis.wrap(module.net, layers="all", stats=["zeros", "rms"], capacity=4)
        callback = NoesisCallback(wrapped)
        trainer = fit(module, tmp_path / folder, callbacks=[callback], enable_checkpointing=True, **options)
        trainer.save_checkpoint(tmp_path / f"{folder}.ckpt")
        return trainer, callback

    _, whole = run(Module(), "whole", epochs=2)
    run(Module(), "first", epochs=1)
    _, resumed = run(Module(), "second", epochs=2, resume=tmp_path / "first.ckpt")
    assert resumed.wrapped._forwards() == 10
    ours, theirs = resumed.wrapped.trace(), whole.wrapped.trace()
    np.testing.assert_allclose(ours.totals, theirs.totals, rtol=1e-12)
    np.testing.assert_allclose(ours.averages, theirs.averages, rtol=1e-12)
    assert ours.dropped_steps + len(ours) == theirs.dropped_steps + len(theirs) == 20
    np.testing.assert_allclose(ours.soulprint().vector, theirs.soulprint().vector, rtol=1e-12)
    kept = torch.load(tmp_path / "second.ckpt", weights_only=True)["callbacks"]["noesis.NoesisCallback"]
    assert sorted(kept) == ["codes", "run"]
    assert ours.meta["resumed"] != ours.meta["run"]


def test_a_checkpoint_of_other_layers_is_refused() -> None:
    state = NoesisCallback(noesis.wrap(Module().net, layers="all")).state_dict()
    with pytest.raises(BadValue, match=r"other layers than the wrap: '1' is in one.*Wrap with the same"):
        NoesisCallback(noesis.wrap(Module().net, layers="linear")).load_state_dict(state)
    with pytest.raises(BadValue, match="other stats than the wrap: 'rms'"):
        NoesisCallback(noesis.wrap(Module().net, layers="all", stats=["rms"])).load_state_dict(state)


def test_an_alarm_ends_the_training(tmp_path: Path) -> None:
    module = Module()
    nn.init.constant_(module.net[2].bias, torch.nan)
    wrapped = noesis.wrap(module.net, layers="all")
    callback = NoesisCallback(wrapped, every=3, alarms=noesis.Alarms(wrapped, "raise"))
    with pytest.raises(noesis.NoesisError, match=r"step 0: layer '2' has 32 NaN"):
        fit(module, tmp_path, callbacks=[callback])
    assert len(module.losses) == 3
    assert not wrapped._recorder.paused
