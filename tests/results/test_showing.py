"""A trace as a picture: layers as they run, timesteps, what is not finite, what did not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import nn

import noesis
from noesis.errors import BadFile, BadValue
from noesis.plots import style


class Backwards(nn.Module):
    """Runs its layers in another order than that of their names; `spare` runs from the third forward on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.last, self.first = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.forwards = 0

    def forward(self, x: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        self.forwards += 1
        if self.forwards > 2:
            x = self.spare(x)
        return self.last(self.first(x))


def labels(figure: Figure, axis: str = "y") -> list[str]:
    return [label.get_text() for label in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def trace_of(steps: int = 2, timesteps: list[float] | None = None, **options: Any) -> noesis.Trace:
    wrapped = noesis.wrap(Backwards(), layers="leaves", **options)
    for step in range(steps):
        extra = {} if timesteps is None else {"timestep": torch.tensor(timesteps[step])}
        wrapped(torch.randn(64, 64), **extra)
    return wrapped.trace()


def test_layers_stand_as_they_run_or_as_they_are_named(tmp_path: Path) -> None:
    trace = trace_of(3)
    assert trace.layers == ["spare", "last", "first"]
    figure = trace.plot("mean", path=tmp_path / "p.png")
    assert labels(figure) == ["spare", "first", "last"]
    assert figure.axes[0].get_ylabel() == "layer, in the order they run"
    drawn = figure.axes[0].images[0].get_array()
    assert np.array_equal(drawn[1:], trace["mean"].T[[2, 1]])
    assert drawn.mask.tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["did not run"]
    named = trace.plot("mean", order="names")
    assert labels(named) == trace.layers
    assert " ".join(named.axes[0].get_ylabel().split()) == "layer, in the order of the model's modules"
    assert labels(trace_of(2).plot()) == ["first", "last", "spare"], "what never ran comes last"


def test_a_container_stands_after_what_is_in_it() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.ReLU()), layers=["0", "leaves"])
    wrapped(torch.randn(2, 2))
    assert wrapped.trace().layers == ["0", "0.0", "0.1", "1"]
    assert labels(wrapped.trace().plot()) == ["0.0", "0.1", "0", "1"]


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_soulprint_knows_and_keeps_the_order(suffix: str, tmp_path: Path) -> None:
    soulprint = trace_of(3).soulprint()
    assert soulprint.order is not None
    assert soulprint.order.tolist() == [1, 2, 1]
    again = noesis.Soulprint.load(soulprint.save(tmp_path / f"s.{suffix}"))
    assert again.order is not None
    assert np.array_equal(again.order, soulprint.order)
    figure = again.plot()
    assert labels(figure) == ["spare", "first", "last"]
    assert figure.axes[0].get_ylabel() == "layer, in the order they run"
    assert labels(again.plot(order="names")) == again.layers
    unknown = noesis.Soulprint([0.0], [1.0], ["a"])
    assert unknown.plot().axes[0].get_ylabel() == "layer"
    assert "order" not in unknown.to_json()


def test_an_order_that_does_not_fit() -> None:
    with pytest.raises(BadValue, match=r"order int64 \(2,\) of 1 layers"):
        noesis.Soulprint([0.0], [1.0], ["a"], order=np.array([1, 2]))
    broken = noesis.Soulprint([0.0], [1.0], ["a"], order=np.array([1])).to_json().replace("[1]", '["x"]')
    with pytest.raises(BadFile, match="not a valid soulprint"):
        noesis.Soulprint.from_json(broken)


def test_a_few_nan_among_many_numbers_are_seen() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))

    def spoil(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output[:, 0] = float("nan")

    handle = model[0].register_forward_hook(spoil)
    wrapped = noesis.wrap(model, layers="leaves")
    wrapped(torch.randn(64, 64))
    handle.remove()
    wrapped(torch.randn(64, 64))
    trace = wrapped.trace()
    assert trace["nonfinite"][0].tolist() == [64, 64, 4096]
    for options in ({}, {"scale": "layer"}):
        figure = trace.plot("std", **options)  # type: ignore[arg-type]
        assert figure.axes[0].images[1].get_array().mask.tolist() == [[False, True]] * 3
        assert len(figure.axes[0].collections[0].get_offsets()) == 3
        texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert texts == ["NaN or infinity"], "NaN is no missing value"
        assert [text.get_text() for text in figure.axes[0].texts] == ["first NaN or infinity: step 0, layer 0"]
    counts = trace.plot("nonfinite")
    assert len(counts.axes[0].images) == 1, "their number is shown where it was asked for"
    assert counts.axes[1].get_ylabel() == "NaN and infinite elements"


def test_timesteps_are_on_the_axis_where_a_sampler_goes_through_them() -> None:
    figure = trace_of(3, [999.0, 500.0, 0.5]).plot()
    assert figure.axes[0].get_xlabel() == "timestep"
    assert labels(figure, "x") == ["999", "500", "0.5"]
    assert figure.axes[0].get_title(loc="left") == "std by layer and timestep"
    for timesteps in ([10.0, 700.0, 30.0], [5.0, 5.0, 5.0], None):  # of training, or none
        figure = trace_of(3, timesteps).plot()
        assert figure.axes[0].get_xlabel() == "step"
        assert labels(figure, "x") == ["0", "1", "2"]


def test_branches_that_take_turns_are_named() -> None:
    trace = trace_of(4, [9.0, 9.0, 5.0, 5.0])
    trace.branches = ["cond", "uncond"] * 2
    assert labels(trace.plot(), "x") == ["9 cond", "9 uncond", "5 cond", "5 uncond"]


def test_a_scale_for_each_layer_has_its_range_beside_it() -> None:
    trace = trace_of(3)
    figure = trace.plot("max", scale="layer")
    (beside,) = figure.axes[0].child_axes
    ranges = [label.get_text() for label in beside.get_yticklabels()]
    first = trace["max"][:, 2]
    assert ranges[1] == f"{first.min():.3g} … {first.max():.3g}"
    assert " ".join(figure.axes[1].get_ylabel().split()) == "max of the layer's output, each row by itself"


def test_an_explosion_from_zero_is_seen() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU()), layers="leaves")
    for step in range(10):
        wrapped(torch.randn(16, 8) * 1e-6 * 8**step)
    assert isinstance(wrapped.trace().plot().axes[0].images[0].norm, LogNorm)
    wrapped(torch.zeros(16, 8))
    image = wrapped.trace().plot().axes[0].images[0]
    drawn = image.norm(image.get_array())
    assert (drawn[0, -1], drawn[0, 0] > 0.05) == (0, True)
    assert (np.diff(drawn[0, :-1]) > 0.05).all()


def test_bad_options(tmp_path: Path) -> None:
    trace = trace_of()
    for options, message in (
        ({"scale": "row"}, 'scale=\'row\'. Expected "all" or "layer"'),
        ({"order": "size"}, 'order=\'size\'. Expected "run" or "names"'),
        ({"path": tmp_path / "p.jpg"}, "suffix"),
        ({"stat": "median"}, "'median' is not in the trace"),
    ):
        with pytest.raises(BadValue, match=message):
            trace.plot(**options)  # type: ignore[arg-type]
    with pytest.raises(BadValue, match="The trace has 0 steps and 3 layers. Expected at least one of each"):
        trace_of(0).plot()
    with pytest.raises(BadValue, match="order='size'"):
        trace.soulprint().plot(order="size")  # type: ignore[arg-type]


@pytest.mark.data
def test_the_middle_of_a_unet_is_in_the_middle(data: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(data / "fashion_t2i")
    pipe.set_progress_bar_config(disable=True)
    wrapped = noesis.wrap(pipe)
    pipe("a coat", num_inference_steps=4, guidance_scale=4.0, output_type="np")
    figure = wrapped.trace().plot()
    parts = [label.split("_")[0] for label in labels(figure)]
    assert parts == sorted(parts, key=["down", "mid", "up"].index)
    assert figure.axes[0].get_xlabel() == "timestep"
    assert style.MISSING not in str(figure.axes[0].get_legend())
