"""Kurtosis and skewness of a row: measured by every backend, merged over calls, steps and ranks, kept in files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import noesis
from by_hand import State, play
from noesis import distributed
from noesis.errors import NoesisError
from noesis.kernels import rows
from noesis.kernels.layout import COUNT, FIELDS, KURTOSIS, REQUIRED, SKEWNESS
from noesis.kernels.moments import _numpy, reference
from noesis.kernels.moments import op as moments

CUDA = torch.cuda.is_available()
PATHS = ["reference", "numpy", "numba", pytest.param("triton", marks=[] if CUDA else pytest.mark.slow)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seen(path: str, *calls: torch.Tensor, samples: int = 0) -> np.ndarray:
    """The rows [1 + samples, fields] that calls of one layer leave."""
    device = torch.device("cuda", 0) if path == "triton" and CUDA else torch.device("cpu")
    state = State(layers=1, samples=samples, device=device, fields=len(FIELDS))
    for x in calls:
        if path == "reference":
            reference.observe_reference(x, torch.tensor(0), samples, False, state.slab, state.control)
        elif path == "numpy":
            _numpy.observe(x, samples, False, 0, state.slab.numpy(), state.control.numpy())
        elif path == "numba":
            moments.observe_cpu(x, 0, samples, False, state.slab.numpy(), state.control.numpy())
        else:
            triton_moments = pytest.importorskip("noesis.kernels.moments._triton")
            place = torch.tensor(0, device=device)
            triton_moments.observe_triton(x.to(device), place, samples, False, state.slab, state.control, state.scratch)
    return rows.unpack(state.slab[-1, :, 0].cpu().numpy().astype(np.float64), np.zeros((1 + samples, len(FIELDS))))


def by_definition(*calls: torch.Tensor) -> tuple[float, float]:
    """Skewness, and kurtosis that is not in excess, of all finite elements, in float64 (as `scipy.stats` has them)."""
    values = np.concatenate([x.detach().double().flatten().numpy() for x in calls])
    values = values[np.isfinite(values)]
    centred = values - values.mean()
    squares = (centred**2).mean()
    return (centred**3).mean() / squares**1.5, (centred**4).mean() / squares**2


def check(row: np.ndarray, *calls: torch.Tensor, tolerance: float = 1e-4) -> None:
    skewness, kurtosis = by_definition(*calls)
    assert row[KURTOSIS] == pytest.approx(kurtosis, rel=tolerance)
    assert row[SKEWNESS] == pytest.approx(skewness, rel=tolerance, abs=tolerance * max(1.0, kurtosis**0.75))


def laplace(size: int) -> torch.Tensor:
    u = torch.rand(size, dtype=torch.float64) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs())).float()


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("path", PATHS)
class TestMeasured:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [2, 3, 63, 9001])
    def test_sizes_and_dtypes(self, path, dtype, size):
        x = (torch.randn(size) ** 3 + 0.5).to(dtype)
        check(seen(path, x)[0], x)

    def test_two_points(self, path):
        """Half and half has the least kurtosis there is, 1; a point of weight p has 1 / (p (1 - p)) - 3."""
        row = seen(path, torch.tensor([-1.0, 1.0] * 500))[0]
        assert row[[SKEWNESS, KURTOSIS]] == pytest.approx([0, 1], abs=1e-6)
        row = seen(path, torch.tensor([5.0, *[3.0] * 9]))[0]
        assert row[KURTOSIS] == pytest.approx(1 / 0.09 - 3, rel=1e-5)
        assert row[SKEWNESS] == pytest.approx(0.8 / 0.3, rel=1e-5)

    @pytest.mark.parametrize("shift", [0.0, 1e3, -1e4])
    @pytest.mark.parametrize("make", [torch.randn, torch.rand, laplace])
    def test_a_mean_far_from_zero(self, path, shift, make):
        x = make(20_000) + shift
        check(seen(path, x)[0], x, tolerance=1e-3)

    @pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e36])
    def test_scales_whose_fourth_powers_leave_float32(self, path, scale):
        x = laplace(9001) * scale
        check(seen(path, x)[0], x)

    def test_a_planted_outlier(self, path):
        x = torch.randn(8192)
        assert seen(path, x)[0, KURTOSIS] < 4
        x[5000] = 200.0
        row = seen(path, x)[0]
        assert row[KURTOSIS] > 1000
        check(row, x)

    @pytest.mark.parametrize("value", [0.0, 0.1, -7e30])
    def test_equal_elements_have_none(self, path, value):
        for size in (1, 5, 9001):
            row = seen(path, torch.full((size,), value), torch.full((3,), value))[0]
            assert row[[SKEWNESS, KURTOSIS]].tolist() == [0, 0]

    def test_what_is_not_finite_is_left_out(self, path):
        x = torch.randn(5001) ** 3
        x[7], x[4500], x[-1] = math.nan, math.inf, -math.inf
        check(seen(path, x)[0], x)
        nothing = seen(path, torch.full((9,), math.nan))[0]
        assert nothing[[COUNT, SKEWNESS, KURTOSIS]].tolist() == [0, 0, 0]
        check(seen(path, torch.full((9,), math.nan), x)[0], x)

    def test_empty_and_gaps(self, path):
        assert seen(path, torch.zeros(0))[0, KURTOSIS] == 0
        x = (torch.randn(4, 6, 31, 33) ** 3)[:, ::2, :, 3:20]
        check(seen(path, x)[0], x)

    def test_calls_of_different_scales_merge(self, path):
        calls = [torch.randn(300) * 1e-3, torch.rand(5000) + 40, laplace(70) * 9, torch.full((20,), 3.0)]
        check(seen(path, *calls)[0], *calls)
        check(seen(path, *reversed(calls))[0], *calls)

    @pytest.mark.parametrize("size", [50, 6000])
    def test_samples(self, path, size):
        x = torch.randn(3, size) ** 3 * torch.tensor([[1.0], [50.0], [1e-3]])
        found = seen(path, x, x * 2 + 1, samples=3)
        for sample in range(3):
            check(found[1 + sample], x[sample], x[sample] * 2 + 1)


def test_float64_beyond_float32() -> None:
    x = laplace(5000).double() * 1e20
    check(seen("numpy", x)[0], x)
    check(seen("reference", x)[0], x)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
def test_steps_and_totals_agree(path, samples) -> None:
    """The ring wraps, so that the totals have what left it."""
    device = "cuda" if path == "triton" and CUDA else "cpu"
    one = State(samples=samples, device=device, fields=len(FIELDS))
    other = State(samples=samples, fields=len(FIELDS))
    play(one, path, samples)
    play(other, "reference", samples)
    for mine, theirs in zip(one.all(), other.all(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-5, atol=2e-5)
    assert other.totals[..., KURTOSIS].any()


def test_rows_merge_in_any_split() -> None:
    x = torch.randn(10_000).double() ** 3 + 1000
    for pieces in (2, 3, 200):
        parts = torch.stack([reference.measure_reference(part[None], False, 12)[0] for part in x.chunk(pieces)])
        check(rows.combine(parts.numpy()), x, tolerance=1e-10)
        check(rows.combine(parts, torch).numpy(), x, tolerance=1e-10)
    nested = rows.combine(np.stack([rows.combine(parts[:70].numpy()), rows.combine(parts[70:].numpy())]))
    check(nested, x, tolerance=1e-10)


# ---------------------------------------------------------------- as a statistic of a trace


def observed(*inputs: torch.Tensor, **options):
    model = nn.Sequential(nn.Identity())
    wrapped = noesis.wrap(model, layers="all", **{"stats": ["kurtosis"], **options})
    for x in inputs:
        wrapped(x)
    return wrapped.trace()


@pytest.mark.parametrize(
    ("make", "excess", "sigma"),
    # The standard errors: for normal elements sqrt(24 / n); the others as tried, with room.
    [(torch.randn, 0.0, 0.01), (torch.rand, -1.2, 0.003), (laplace, 3.0, 0.1)],
)
def test_excess_of_known_distributions(make, excess, sigma) -> None:
    torch.manual_seed(0)
    assert observed(make(300_000))["kurtosis"][0, 0] == pytest.approx(excess, abs=4 * sigma)


def test_asked_for_alone_it_comes_with_skewness() -> None:
    trace = observed(torch.randn(100))
    assert trace.stats[-2:] == ("skewness", "kurtosis")
    assert "kurtosis" in str(trace)
    plain = observed(torch.randn(100), stats=[])
    assert "kurtosis" not in plain.stats
    with pytest.raises(NoesisError, match="kurtosis"):
        plain["kurtosis"]


def test_without_it_rows_are_no_longer() -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Identity()), layers="all", stats=["zeros", "rms"])
    assert rows.width(wrapped._recorder.banks[0].slab) == REQUIRED == len(FIELDS) - 2


def test_undefined_where_elements_are_equal_or_none() -> None:
    trace = observed(torch.full((50,), 3.0), torch.tensor([1.0]), torch.full((5,), math.nan), torch.tensor([1.0, 2.0]))
    assert np.isnan(trace["kurtosis"][:3]).all()
    assert np.isnan(trace["skewness"][:3]).all()
    assert trace["kurtosis"][3, 0] == pytest.approx(-2)
    check(totals(trace), torch.tensor([*[3.0] * 50, 1.0, 1.0, 2.0]))


def totals(trace) -> np.ndarray:
    """The whole run as a row, but for what does not matter here."""
    row = np.zeros(len(FIELDS))
    row[SKEWNESS] = trace.totals[0, trace.stats.index("skewness")]
    row[KURTOSIS] = trace.totals[0, trace.stats.index("kurtosis")] + 3
    return row


def test_the_whole_run_also_past_the_ring_and_after_merging() -> None:
    torch.manual_seed(1)
    first = [torch.randn(500) * (step + 1) for step in range(7)]
    second = [laplace(400) + step for step in range(5)]
    a, b = observed(*first, capacity=3), observed(*second)
    check(totals(a), *first)
    check(totals(b), *second)
    merged = distributed.merge([a, b])
    check(totals(merged), *first, *second)
    assert merged.stats == a.stats
    same = distributed.merge([observed(*first), observed(*second)])
    for step in range(5):
        excess = same["kurtosis"][step, 0]
        assert excess + 3 == pytest.approx(by_definition(first[step], second[step])[1], rel=1e-5)


def test_files_round_trip_and_both_kinds(tmp_path) -> None:
    trace = observed(torch.randn(500) ** 3, torch.full((5,), 1.0))
    for name in ("a.safetensors", "a.json"):
        trace.save(tmp_path / name)
        again = noesis.Trace.load(tmp_path / name)
        assert again.stats == trace.stats
        np.testing.assert_array_equal(again.values, trace.values)
        np.testing.assert_array_equal(again.totals, trace.totals)
    assert "kurtosis" in trace.to_csv().splitlines()[0]


def test_where_two_runs_part() -> None:
    """In units of kurtosis itself, not of the layer's scale, which says nothing of it."""
    x = torch.randn(1000) * 1e6
    assert noesis.compare(observed(x), observed(x)).first_divergence is None
    one, other = observed(x), observed(x)
    other.values[0, 0, other.stats.index("kurtosis")] += 0.5
    found = noesis.compare(one, other).first_divergence
    assert found is not None
    assert found.stat == "kurtosis"
