"""The container of a pipeline is the pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import noesis

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def pipe() -> Any:
    """A small pipeline without a prompt."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    made = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def image(run: Any) -> Any:
    return run(num_inference_steps=2, generator=torch.Generator().manual_seed(7), output_type="np").images


def test_calling_the_container_runs_the_pipeline(pipe: Any) -> None:
    expected = image(pipe)
    wrapped = noesis.wrap(pipe)
    assert (image(wrapped) == expected).all()
    trace = wrapped.trace()
    assert (len(trace), trace.meta["seed"], trace.meta["scheduler"]) == (2, 7, "DDPMScheduler")
    assert isinstance(wrapped, diffusers.DDPMPipeline)
    assert wrapped.unet is pipe.unet
    wrapped.scheduler = diffusers.DDIMScheduler()
    assert pipe.scheduler is wrapped.scheduler
    assert wrapped.observed_model is pipe
    assert {"unet", "scheduler", "save_pretrained", "trace"} <= {*dir(wrapped)}


def test_what_the_pipeline_lacks_is_its_denoisers(pipe: Any) -> None:
    wrapped = noesis.wrap(pipe)
    assert list(wrapped.state_dict()) == list(pipe.unet.state_dict())
    assert wrapped.eval() is wrapped
    assert not pipe.unet.training
    assert wrapped.to("cpu") is wrapped
    with pytest.raises(AttributeError, match="'UNet2DModel' object has no attribute 'depth'"):
        _ = wrapped.depth


def test_unwrap_gives_the_pipeline_back(pipe: Any) -> None:
    wrapped = noesis.wrap(pipe)
    image(wrapped)
    assert wrapped.unwrap() is pipe
    assert type(pipe) is diffusers.DDPMPipeline
    assert type(pipe.unet) is diffusers.UNet2DModel
    assert len(wrapped.trace()) == 2


def test_unwrap_without_the_container(pipe: Any) -> None:
    noesis.wrap(pipe)
    assert noesis.unwrap(pipe) is pipe
    assert type(pipe) is diffusers.DDPMPipeline
    assert not any(isinstance(module, noesis.Observed) for module in pipe.unet.modules())
    image(noesis.wrap(pipe, layers="conv"))


def test_a_block_unwrapped(pipe: Any) -> None:
    wrapped = noesis.wrap(pipe)
    image(wrapped)
    with noesis.unwrapped(wrapped) as bare:
        assert bare is pipe
        assert type(pipe) is diffusers.DDPMPipeline
        assert type(pipe.unet) is diffusers.UNet2DModel
        image(bare)
    assert len(wrapped.trace()) == 2
    image(wrapped)
    assert len(wrapped.trace()) == 2
    assert isinstance(pipe.unet, noesis.Observed)


def test_the_trace_of_one_call_of_the_pipeline(pipe: Any) -> None:
    wrapped = noesis.wrap(pipe)
    image(wrapped)
    images, trace = wrapped.forward_with_trace(
        num_inference_steps=3, generator=torch.Generator().manual_seed(1), output_type="np"
    )
    assert images.images.shape == (1, 8, 8, 3)
    assert trace.steps.tolist() == [0, 1, 2]
    with wrapped.run(note="two calls"):
        image(wrapped)
        _, trace = wrapped.forward_with_trace(num_inference_steps=3, output_type="np")
    assert trace.steps.tolist() == [0, 1, 2]
    assert len(wrapped.trace()) == 5
