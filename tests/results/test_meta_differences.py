"""What two runs were asked for differently, as `compare` says it."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import noesis
from helpers.pipelines import build, call
from noesis.results.meta_differences import meta_differences

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build("sd15")


def record(pipe: Any, **given: Any) -> noesis.Trace:
    wrapped = noesis.wrap(pipe)
    call("sd15", pipe, **given)
    trace: noesis.Trace = wrapped.trace()
    wrapped.unwrap()
    return trace


def test_equal_calls_of_a_pipeline_have_no_differences(pipe: Any) -> None:
    found = noesis.compare(record(pipe), record(pipe))
    assert found.meta_differences == {}
    assert "different meta" not in str(found)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"seed": 3}, {"seed"}),
        ({"prompt": ["a lamp"]}, {"prompt"}),
        ({"negative_prompt": "fog"}, {"negative_prompt"}),
        ({"guidance_scale": 3.0}, {"guidance_scale"}),
        ({"steps": 2}, {"num_inference_steps", "timesteps"}),
    ],
)
def test_arguments_of_a_pipeline_that_differ(pipe: Any, given: dict[str, Any], want: set[str]) -> None:
    a, b = record(pipe), record(pipe, **given)
    found = noesis.compare(a, b)
    assert found.meta_differences.keys() == want
    for name in want:
        one, other = (run.timesteps.tolist() if name == "timesteps" else run.meta.get(name) for run in (a, b))
        assert found.meta_differences[name] == (one, other)
        assert name in str(found).splitlines()[1]
    assert json.loads(found.to_json())["meta_differences"].keys() == want
    again = noesis.Comparison.from_json(found.to_json())
    assert (again.meta_differences, str(again)) == (found.meta_differences, str(found))
    prints = noesis.compare(a.soulprint(), b.soulprint())
    assert prints.meta_differences.keys() == want - {"timesteps"}


def test_another_scheduler_and_another_dtype(pipe: Any) -> None:
    before, scheduler = record(pipe), pipe.scheduler
    pipe.scheduler = diffusers.EulerDiscreteScheduler(num_train_timesteps=500, beta_start=0.002)
    found = noesis.compare(before, record(pipe)).meta_differences
    pipe.scheduler = scheduler
    assert found["scheduler"] == (type(scheduler).__name__, "EulerDiscreteScheduler")
    assert found["scheduler_config.beta_start"][1] == 0.002
    assert found["timesteps"][0] == before.timesteps.tolist()

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    traces = []
    for dtype in (torch.float32, torch.bfloat16):
        wrapped = noesis.wrap(model.to(dtype))
        wrapped(torch.ones(2, 4, dtype=dtype))
        traces.append(wrapped.trace())
        wrapped.unwrap()
    both = noesis.compare(*traces)
    assert both.meta_differences == {"dtype": ("float32", "bfloat16")}
    assert "different meta: dtype 'float32' -> 'bfloat16'" in str(both)


def test_several_runs_mappings_and_values_that_do_not_compare() -> None:
    def of(**meta: Any) -> noesis.Soulprint:
        return noesis.Soulprint([0.0], [1.0], ["a"], meta=meta)

    runs = [of(seed=1, run="b", size=(2, 3)), of(seed=2, run="c", size=[2, 3])]
    found = noesis.compare(of(seed=0, run="a", size=[2, 3]), runs, baseline=[of(), of()])
    assert found.meta_differences == {"seed": (0, [1, 2])}
    nan, array = float("nan"), np.arange(3)
    assert (
        meta_differences({"x": nan, "y": array, "z": {"n": 1}}, [{"x": nan, "y": array.copy(), "z": {"n": 1.0}}]) == {}
    )
    changed = meta_differences({"z": {"n": 1, "m": {"k": 0}}}, [{"z": {"n": 1, "m": {"k": 2}}}])
    assert changed == {"z.m.k": (0, 2)}
    many = noesis.compare(of(**{f"k{n}": 0 for n in range(12)}, text="x"), of(text="y\n" * 99))
    line = str(many).splitlines()[1]
    assert line.endswith(" and 5 more")
    assert len(line) < 400


def test_captured_activations_too() -> None:
    x = {"a": [torch.ones(1, 2, 3)]}
    one, other = (noesis.Activations(x, meta={"model": name}) for name in ("old", "new"))
    found = noesis.compare(one, other)
    assert found.meta_differences == {"model": ("old", "new")}
    assert str(found).splitlines()[-1] == "different meta: model 'old' -> 'new'"


@pytest.mark.parametrize("wrong", [3, {"seed": [1]}, {"seed": None}])
def test_files_with_differences_that_are_none(wrong: Any) -> None:
    run = noesis.Soulprint([0.0], [1.0], ["a"])
    payload = json.loads(noesis.compare(run, run).to_json())
    with pytest.raises(noesis.NoesisError):
        noesis.Comparison.from_json(json.dumps({**payload, "meta_differences": wrong}))
