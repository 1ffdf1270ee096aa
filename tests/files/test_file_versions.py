"""Files of every kind as version 1 wrote them; whatever is written later, these are read as what they are.

They lie in `v1`, and are never written again: a new version of a kind gets a folder and a test of its own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import noesis
from noesis import interp
from noesis.files import heading
from noesis.files.versions import VERSIONS, check_header
from noesis.results import Flip, WeightChange
from noesis.surprise import LayerSurprise
from noesis.testing.snapshot import Snapshot

FILES = Path(__file__).parent / "v1"
A_QUALITY = interp.CoderQuality("resid_post.1", 100, 3.5, 0.75, 0.125, 1.0, 1.25, 5.0, 2.0)
STATS = ("count", "mean", "std", "abs_mean", "min", "max", "nonfinite", "zeros", "rms")


def a_trace() -> noesis.Trace:
    values = np.arange(1.0, 1 + 2 * 3 * 9).reshape(2, 3, 9)
    values[..., 0], values[..., 6:8] = 8, [1, 2]
    values[0, 1, [0, 6, 7]], values[0, 1, [1, 2, 3, 4, 5, 8]] = 0, np.nan
    more: dict[str, Any] = {"timesteps": np.array([999.0, 1.5]), "batches": np.array([2, 4])}
    return noesis.Trace.of(
        values, ["a", "b.0", "b.1"], STATS, steps=np.array([3, 5]), meta={"run": "one"}, branches=[None, "cond"], **more
    )


def a_routes() -> noesis.Routes:
    from noesis.kernels.routing import FIELDS

    sums = np.arange(2 * 1 * (FIELDS + 4), dtype=np.int64).reshape(2, 1, FIELDS + 4)
    return noesis.Routes(
        sums=sums,
        experts=np.array([4]),
        layers=["gate"],
        steps=np.array([0, 1]),
        whole=sums.sum(0),
        coactivation=np.arange(16, dtype=np.int64).reshape(1, 4, 4),
        step_coactivation=np.zeros((0, 1, 4, 4), dtype=np.int64),
        dropped_steps=0,
        unmeasured={},
        meta={"run": "one"},
    )


def some_activations() -> noesis.Activations:
    calls = {"a": [torch.arange(6.0).reshape(1, 3, 2), torch.ones(1, 1, 2)], "b": [torch.ones(2, dtype=torch.bfloat16)]}
    return noesis.Activations(calls, unmeasured={"c": "no floating tensor in its output"}, meta={"run": "one"})


def some_deltas() -> noesis.TokenDeltas:
    before, after = (noesis.Activations({"a": [torch.arange(6.0).reshape(1, 3, 2) + shift]}) for shift in (0, 1))
    return noesis.token_deltas(before, after, ["x", "y", "z"], ["x", "y", "z"])


def watched() -> noesis.Wrapped:
    """A model without chance in it, with codes for its layer."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    for parameter in model.parameters():
        parameter.data = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
    return noesis.wrap(model, layers="1", codebook=noesis.Codebook(size=4, dim=2))


def a_surprise() -> noesis.Surprise:
    parts = {name: np.array([0.5, np.inf]) for name in ("code_length", "mixture", "residual", "norm")}
    each = LayerSurprise(
        **parts,
        nearest=np.array([[0, 3], [1, 2]]),
        surprisal=np.array([0.25, 8.0]),
        p_value=np.array([0.75, 0.01]),
        positions=np.array([[0.5, np.nan], [np.inf, 1.0]]),
        usual=(0.5, 0.25, 0.0),
    )
    return noesis.Surprise(
        np.array([0.25, np.inf]), {"a": each}, doubt=np.array([np.nan, -1.5]), calibrated=np.array([0.75, 0.01])
    )


def a_monitor() -> noesis.DriftMonitor:
    calibration = noesis.Calibration(["a"], {}, None, (4, 2, 3), np.array([0.0, 1.0, np.inf]))
    monitor = noesis.DriftMonitor(calibration, alpha=0.05, seed=7)
    monitor.update([0.5, 0.25, 1.0])
    return monitor


def a_weighing() -> noesis.ParameterNorms:
    values, gradients, updates = np.arange(12.0).reshape(3, 2, 2)
    updates[0] = np.nan
    return noesis.ParameterNorms(
        ["a.weight", "a.bias"], np.array([0, 1]), values, gradients, updates, {"a.bias": "a reason"}, {"run": "one"}
    )


def a_fidelity() -> noesis.Fidelity:
    numbers = np.array([0.5, np.inf]), np.array([1.0, np.nan]), np.array([0, 3]), np.array([1, 2])
    return noesis.Fidelity(["a", "b"], *numbers, np.array([0.25, np.nan, np.inf]), {"c": "only in a"}, {"a": {}})


def a_diff() -> noesis.ModelDiff:
    a, b = (
        [noesis.Activations({"a": [torch.arange(6.0).reshape(1, 3, 2) + shift + at]}) for at in range(2)]
        for shift in (0, 1)
    )
    found = noesis.diff(a, b)
    found.flips, found.predictions = [Flip(1, 0, "x", "y", 0.5, 0.25)], 3
    found.weights, found.weights_compared = [WeightChange("a.weight", 0.5, float("inf"), estimated=True)], 2
    found.weights_only_in_b, found.renamed = ["b.weight"], {"a": "c"}
    return found


def some_edits() -> interp.Edits:
    numbers = torch.arange(4.0).reshape(1, 2, 2) / 3
    return interp.Edits(
        [
            interp.Zero("z.1.2@-1", steps="decode", rows=[0, 2], name="first", when=interp.When("norm", ">", 3.0)),
            interp.Add("resid_post.1", torch.tensor([1.0, 0.1]), 2.0, after="first"),
            interp.Freeze("z.1", {"z.1": [numbers, numbers.double()]}, positions=[0]),
            interp.Resample("z.*", numbers, seed=3),
        ]
    )


def some_contributions() -> interp.Contributions:
    values = np.array([[1.0, -0.5], [0.25, np.nan]])
    check = interp.Check("parts add up", error=1e-8, bound=1e-6)
    ends = {"target": [[3, 4], [5]], "positions": [6, 5], "by": "layer", "controls": 100, "whole": {"mlp.0": "why"}}
    return interp.Contributions(
        ["embed", "mlp.0"], values, values / 2, values / 4, values.sum(0), values[0], check, **ends, meta={"run": "one"}
    )


def a_lens() -> interp.Lens:
    shape = (2, 1, 3)
    numbers = [np.arange(np.prod(size) * 1.0).reshape(size) for size in ((*shape, 2), shape, shape, shape, (*shape, 1))]
    numbers[3][0, 0, 2] = np.nan
    top = np.arange(12).reshape(*shape, 2)
    by_layer = np.array([1.5, 0.0])
    return interp.Lens(
        ["resid_pre.0", "output"], [0, 1, 2], top, *numbers, numbers[4] / 8, by_layer, by_layer / 2, tokens=[7], meta={}
    )


def a_tuned_lens() -> interp.TunedLens:
    kls = np.array([0.5, 0.25]), np.array([1.0, 0.75]), np.array([0.375, 0.125])
    weight = np.arange(8.0).reshape(2, 2, 2)
    return interp.TunedLens(["resid_pre.0", "resid_pre.1"], weight, weight[0], *kls, 9, 1, meta={"steps": 2})


def some_effects() -> interp.Effects:
    patched = np.array([[1.0, 2.0], [np.nan, 0.5], [-1.0, np.inf]])
    sites = [interp.Site("z", 1, 0), interp.Site("resid_post", 0, None, -1), interp.Site("module", module="a.b")]
    return interp.Effects(
        sites, np.array([1.0, 2.0]), np.array([0.0, -1.0]), patched, "denoise", "logit difference", meta={"run": "one"}
    )


def an_attribution() -> interp.Attribution:
    made = some_effects()
    return interp.Attribution(
        made.sites,
        made.clean,
        made.corrupted,
        made.patched,
        "denoise",
        "logit difference",
        "attribution patching",
        {"run": "one"},
        steps=3,
        checked=made.sites[:1],
        tops=1,
        exact=np.array([[1.0, np.nan]]),
        convergence=0.25,
    )


def some_edges() -> interp.Edges:
    made = an_attribution()
    edges = [interp.Edge(made.sites[0], interp.Site(name, 2, 1)) for name in "qkv"]
    return interp.Edges(
        edges,
        made.clean,
        made.corrupted,
        made.patched,
        "noise",
        "logit difference",
        "edge attribution patching",
        checked=made.checked,
        tops=1,
        exact=made.exact,
        convergence=0.0,
    )


def inputs() -> torch.Tensor:
    return torch.sin(torch.arange(900.0)).reshape(300, 3)


def strangeness(wrapped: noesis.Wrapped) -> np.ndarray:
    wrapped(torch.tensor([[0.1, 0.2, -0.3], [5.0, -5.0, 5.0]]))
    return wrapped.surprise().p_value


def equal(a: Any, b: Any) -> None:
    """The same numbers and names, whatever else the objects hold."""
    for name, value in vars(a).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)
        elif name != "meta":
            assert value == getattr(b, name), name


def write_all() -> None:
    """How the files were made."""
    FILES.mkdir(exist_ok=True)
    trace = a_trace()
    for suffix in ("safetensors", "json"):
        trace.save(FILES / f"trace.{suffix}")
        trace.soulprint().save(FILES / f"soulprint.{suffix}")
        a_routes().save(FILES / f"routes.{suffix}")
        a_surprise().save(FILES / f"surprise.{suffix}")
        a_monitor().save(FILES / f"drift_monitor.{suffix}")
        a_fidelity().save(FILES / f"fidelity.{suffix}")
        a_weighing().save(FILES / f"parameter_norms.{suffix}")
        some_edits().save(FILES / f"edits.{suffix}")
        some_contributions().save(FILES / f"contributions.{suffix}")
        a_lens().save(FILES / f"lens.{suffix}")
        a_tuned_lens().save(FILES / f"tuned_lens.{suffix}")
        some_effects().save(FILES / f"effects.{suffix}")
        an_attribution().save(FILES / f"attribution.{suffix}")
        some_edges().save(FILES / f"edges.{suffix}")
    noesis.compare(trace.soulprint(3), trace.soulprint(5)).save(FILES / "comparison.json")
    Snapshot.of(trace).save(FILES / "snapshot.json")
    some_activations().save(FILES / "activations.safetensors")
    some_deltas().save(FILES / "token_deltas.json")
    a_diff().save(FILES / "model_diff.json")
    A_QUALITY.save(FILES / "coder_quality.json")
    wrapped = watched()
    wrapped.calibrate([inputs()], progress=False)
    wrapped.save_calibration(FILES / "calibration.safetensors")
    wrapped(inputs()[:4])
    noesis.RunState(wrapped).save(FILES / "run_state.json")


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_traces_and_soulprints(suffix: str) -> None:
    equal(a_trace(), noesis.Trace.load(FILES / f"trace.{suffix}"))
    older = a_trace().soulprint()
    older.order = None  # not known when these were written
    equal(older, noesis.Soulprint.load(FILES / f"soulprint.{suffix}"))


def test_comparisons() -> None:
    trace = a_trace()
    equal(noesis.compare(trace.soulprint(3), trace.soulprint(5)), noesis.Comparison.load(FILES / "comparison.json"))


def test_snapshots() -> None:
    found, new = Snapshot.load(FILES / "snapshot.json"), Snapshot.of(a_trace())
    assert found.differences(new) == []
    assert found.to_json() == new.to_json()


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_routes(suffix: str) -> None:
    found = noesis.Routes.load(FILES / f"routes.{suffix}")
    for name in ("sums", "experts", "steps", "whole", "coactivation", "layers"):
        np.testing.assert_array_equal(getattr(found, name), getattr(a_routes(), name))


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_surprises_and_monitors(suffix: str) -> None:
    found, expected = noesis.Surprise.load(FILES / f"surprise.{suffix}"), a_surprise()
    for name, layer in expected.layers.items():
        equal(layer, found.layers.pop(name))
    assert not found.layers
    equal(dataclasses.replace(expected, layers={}), found)
    monitor, other = noesis.DriftMonitor.load(FILES / f"drift_monitor.{suffix}"), a_monitor()
    assert repr(monitor) == repr(other)
    assert monitor.capital == other.capital
    for each in (monitor, other):
        each.update([0.25] * 20)
    assert monitor.capital == other.capital


def test_activations_and_token_deltas() -> None:
    acts, found = some_activations(), noesis.Activations.load(FILES / "activations.safetensors")
    assert list(found) == list(acts)
    assert found.unmeasured == acts.unmeasured
    assert all(
        torch.equal(x, y) and x.dtype == y.dtype for name in acts for x, y in zip(acts[name], found[name], strict=True)
    )
    deltas = noesis.TokenDeltas.load(FILES / "token_deltas.json")
    np.testing.assert_array_equal(deltas.values, some_deltas().values)


def test_calibrations_and_states_of_runs() -> None:
    wrapped = watched()
    wrapped.load_calibration(FILES / "calibration.safetensors")
    p = strangeness(wrapped)
    assert p[0] > 0.1
    assert p[1] < 0.05
    resumed = watched()
    noesis.RunState(resumed).load(FILES / "run_state.json")
    np.testing.assert_array_equal(strangeness(resumed), p)
    assert resumed.trace().totals[0, 0] == 6 * (4 + 2)  # elements of four samples before, and of two now


def test_every_kind_has_a_file_of_version_1() -> None:
    """`codebooks` come inside the state of a run, before calibration."""
    there = {path.name.partition(".")[0] for path in FILES.iterdir()}
    assert there | {"codebooks"} == set(VERSIONS)


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heading("trace") == {"format": "noesis.trace", "format_version": 1}
    monkeypatch.setitem(VERSIONS, "trace", 3)
    for version in (1, 2, 3):
        assert check_header({"format": "noesis.trace", "format_version": version}, "trace", "x")
    for wrong in (0, 4, True, "1", 1.0, None):
        with pytest.raises(noesis.NoesisError, match="has format_version .* Expected a version from 1 to 3"):
            check_header({"format": "noesis.trace", "format_version": wrong}, "trace", "x")
    assert json.loads(a_trace().to_json())["format_version"] == 3


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_fidelity(suffix: str) -> None:
    equal(a_fidelity(), noesis.Fidelity.load(FILES / f"fidelity.{suffix}"))


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_parameter_norms(suffix: str) -> None:
    equal(a_weighing(), noesis.ParameterNorms.load(FILES / f"parameter_norms.{suffix}"))


def test_qualities_of_sparse_autoencoders() -> None:
    assert interp.CoderQuality.load(FILES / "coder_quality.json") == A_QUALITY


def test_model_diffs() -> None:
    equal(a_diff(), noesis.ModelDiff.load(FILES / "model_diff.json"))


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_edits(suffix: str) -> None:
    assert interp.Edits.load(FILES / f"edits.{suffix}") == some_edits()


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_contributions_and_lenses(suffix: str) -> None:
    equal(some_contributions(), interp.Contributions.load(FILES / f"contributions.{suffix}"))
    equal(a_lens(), interp.Lens.load(FILES / f"lens.{suffix}"))
    equal(a_tuned_lens(), interp.TunedLens.load(FILES / f"tuned_lens.{suffix}"))


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_effects(suffix: str) -> None:
    found, expected = interp.Effects.load(FILES / f"effects.{suffix}"), some_effects()
    assert found.meta == expected.meta
    equal(expected, found)


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_attributions(suffix: str) -> None:
    for found, expected in (
        (interp.Attribution.load(FILES / f"attribution.{suffix}"), an_attribution()),
        (interp.Edges.load(FILES / f"edges.{suffix}"), some_edges()),
    ):
        assert found.meta == expected.meta
        assert found.sites == expected.sites
        equal(expected, found)
