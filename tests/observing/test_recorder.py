"""Steps, the ring, totals, samples, pausing: what the recorder promises over a run."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.models import small
from helpers.processes import python


def batches(count: int, size: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 4, generator=generator) * (1 + index) for index in range(count)]


def test_a_forward_is_a_step():
    wrapped = noesis.wrap(small(), layers="all")
    for x in batches(3):
        wrapped(x)
    trace = wrapped.trace()
    assert trace.steps.tolist() == [0, 1, 2]
    assert trace.order.tolist() == [[1, 2, 3]] * 3
    assert trace.batches.tolist() == [5, 5, 5]
    assert len(trace) == 3


def test_the_ring_drops_steps_and_keeps_totals():
    model = small()
    outputs: list[Tensor] = []
    model[2].register_forward_hook(lambda module, args, out: outputs.append(out.detach().double()))
    wrapped = noesis.wrap(model, layers="all", capacity=4)
    for x in batches(11):
        wrapped(x)
    trace = wrapped.trace()
    assert trace.steps.tolist() == [7, 8, 9, 10]
    assert trace.dropped_steps == 7
    assert "7 earlier steps are in the totals only" in repr(trace)
    everything = torch.cat(outputs)
    totals = dict(zip(trace.stats, trace.totals[2], strict=True))
    assert totals["count"] == everything.numel()
    assert totals["mean"] == pytest.approx(everything.mean().item(), rel=1e-6)
    assert totals["std"] == pytest.approx(everything.std().item(), rel=1e-6)
    assert (totals["min"], totals["max"]) == pytest.approx((everything.min().item(), everything.max().item()))
    print_ = trace.soulprint()
    assert print_.steps == 11
    assert print_.means[2] == pytest.approx(sum(x.mean().item() for x in outputs) / 11, rel=1e-6)
    assert print_.stds[2] == pytest.approx(sum(x.std().item() for x in outputs) / 11, rel=1e-6)


def test_totals_do_not_depend_on_the_capacity():
    traces = []
    for capacity in (1, 3, 100):
        wrapped = noesis.wrap(small(), layers="all", capacity=capacity)
        for x in batches(10):
            wrapped(x)
        traces.append(wrapped.trace())
    for trace in traces[:2]:
        torch.testing.assert_close(torch.tensor(trace.totals), torch.tensor(traces[2].totals), rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.tensor(trace.averages), torch.tensor(traces[2].averages), rtol=1e-12, atol=0)


def test_every_nth_step():
    wrapped = noesis.wrap(small(), layers="all", every=3, capacity=2)
    for x in batches(10):
        wrapped(x)
    trace = wrapped.trace()
    assert trace.steps.tolist() == [6, 9]
    assert trace.dropped_steps == 2
    assert trace.soulprint().steps == 4


@pytest.mark.parametrize("per_sample", [False, 3])
def test_reading_the_latest_steps_alone(per_sample) -> None:
    wrapped = noesis.wrap(small(), layers="all", capacity=4, every=2, per_sample=per_sample)
    for step in range(11):
        wrapped(torch.full((3, 4), float(step)))
    wrapped.observed_model[0](torch.ones(1, 4))  # belongs to the next step
    whole = wrapped.trace()
    for since in (-1, 0, 7, 8, 10, 11, 12):
        latest, want = wrapped._recorder.trace(since=since), whole.at(whole.steps >= since)
        assert latest.steps.tolist() == want.steps.tolist()
        for name in ("values", "calls", "order", "totals", "averages", "batches", "timesteps"):
            np.testing.assert_allclose(getattr(latest, name), getattr(want, name), rtol=1e-12, err_msg=name)
        assert latest.dropped_steps == 6 - (want.steps < 11).sum()


def test_pauses_that_overlap():
    """As of two callbacks, of which the first to enter is the first to leave."""
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 2)))
    one, other = wrapped.paused(), wrapped.paused()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    wrapped(torch.ones(1, 2))
    other.__exit__(None, None, None)
    assert len(wrapped.trace()) == 0
    wrapped(torch.ones(1, 2))
    assert len(wrapped.trace()) == 1


def test_paused_forwards_are_no_steps():
    wrapped = noesis.wrap(small(), layers="all")
    first, second, third = batches(3)
    wrapped(first)
    with wrapped.paused():
        wrapped(second)
        with wrapped.paused():
            wrapped(second)
        wrapped(second)
    wrapped(third)
    assert wrapped.trace().steps.tolist() == [0, 1]
    assert wrapped.trace()["max"][1, 0] == pytest.approx(wrapped.observed_model[0](third).max().item())


def test_run_and_reset_begin_afresh():
    wrapped = noesis.wrap(small(), layers="all", capacity=2)
    for x in batches(5):
        wrapped(x)
    with wrapped.run(prompt="a moth", seed=3) as same:
        assert same is wrapped
        wrapped(batches(1)[0])
    trace = wrapped.trace()
    assert (len(trace), trace.dropped_steps, trace.steps.tolist()) == (1, 0, [0])
    assert trace.meta["prompt"] == "a moth"
    assert trace.soulprint().meta["seed"] == 3
    run = trace.meta["run"]
    wrapped.reset()
    assert len(wrapped.trace()) == 0
    assert wrapped.trace().meta["run"] != run
    assert "prompt" not in wrapped.trace().meta
    assert trace.meta["model"] == "Sequential"


def test_a_trace_without_steps():
    wrapped = noesis.wrap(small(), layers="all")
    trace = wrapped.trace()
    assert trace.values.shape == (0, 3, 7)
    assert trace.never_ran == ["0", "1", "2"]
    assert "never ran: 0, 1, 2" in repr(trace)
    with pytest.raises(RuntimeError, match=r"no steps in which an observed layer ran.*Run the model first"):
        wrapped.soulprint()


def test_calls_between_forwards_belong_to_the_next_step():
    """As an encoder that generate() runs before the first forward of the whole model."""
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    x = batches(1)[0]
    model[0](x)
    assert wrapped.trace()["count"].tolist() == [[30, 0, 0]]
    wrapped(x)
    model[0](x)
    wrapped(x)
    trace = wrapped.trace()
    assert trace.calls.tolist() == [[2, 1, 1], [2, 1, 1]]
    assert trace.order.tolist() == [[1, 3, 4], [1, 3, 4]]


@pytest.mark.slow
def test_same_input_twice_gives_bitwise_the_same_rows():
    wrapped = noesis.wrap(small(), layers="all", per_sample=True)
    x = batches(1, 1000)[0]
    wrapped(x)
    first = wrapped.trace()
    wrapped.reset()
    wrapped(x)
    assert (wrapped.trace().values == first.values).all()
    assert noesis.compare(first, wrapped).first_divergence is None


# ---------------------------------------------------------------- samples


def test_a_row_per_sample():
    model = small()
    wrapped = noesis.wrap(model, layers="all", per_sample=2)  # fewer than the batch: eager code makes room
    x = batches(1, 5)[0]
    wrapped(x)
    wrapped(x[:3] * 2)
    trace = wrapped.trace()
    assert len(trace.samples) == 5
    hidden = model[0](x).detach().double()
    for index, sample in enumerate(trace.samples):
        assert sample["mean"][0, 0] == pytest.approx(hidden[index].mean().item(), rel=1e-6, abs=1e-6)
        assert sample["std"][0, 0] == pytest.approx(hidden[index].std().item(), rel=1e-6)
        assert len(sample.soulprint().layers) == 3
    assert trace.samples[4]["count"].tolist() == [[6, 6, 3], [0, 0, 0]]
    assert trace.calls.tolist() == [[1, 1, 1], [1, 1, 1]]
    # the whole is what it is without samples
    plain = noesis.wrap(small(), layers="all")
    plain(x)
    plain(x[:3] * 2)
    torch.testing.assert_close(torch.tensor(trace.values), torch.tensor(plain.trace().values), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.tensor(trace.totals), torch.tensor(plain.trace().totals), rtol=1e-6, atol=1e-7)


def test_samples_survive_the_ring():
    wrapped = noesis.wrap(small(), layers="all", per_sample=True, capacity=2)
    reference = noesis.wrap(small(), layers="all", per_sample=True)
    for x in batches(7, 3):
        wrapped(x)
        reference(x)
    for one, other in zip(wrapped.trace().samples, reference.trace().samples, strict=True):
        torch.testing.assert_close(torch.tensor(one.totals), torch.tensor(other.totals), rtol=1e-12, atol=0)
        assert one.soulprint().vector == pytest.approx(other.soulprint().vector, rel=1e-12)


def test_tokens_flattened_with_the_batch_are_told_apart():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.odd = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:  # x: (B, T, C)
            self.odd(x.transpose(0, 1)[:3])  # first dimension is not of the batch: no samples
            return self.flat(x.flatten(0, 1))

    x = torch.randn(2, 7, 4)
    wrapped = noesis.wrap(Flat(), layers="leaves", per_sample=True)
    wrapped(x)
    with pytest.warns(noesis.NoesisWarning, match="There are no rows per sample of odd:"):
        trace = wrapped.trace()
    assert [sample["mean"][0, 0] for sample in trace.samples] == pytest.approx(
        x.double().mean((1, 2)).tolist(), rel=1e-5
    )
    assert [sample["count"][0, 1] for sample in trace.samples] == [0, 0]
    assert np.isnan([sample["mean"][0, 1] for sample in trace.samples]).all()
    assert trace["count"][0, 1] == 3 * 2 * 4
    wrapped(x)
    assert len(wrapped.trace()) == 2  # and says so no more


def test_rows_per_sample_do_not_grow_by_what_is_no_batch() -> None:
    """Patches of all images in one tensor, as Qwen2-VL takes them, are as many as they like."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision, self.merge, self.words = nn.Linear(4, 4), nn.Identity(), nn.Embedding(9, 4)

        def image(self, pixels: Tensor) -> Tensor:
            return self.merge(self.vision(pixels)[::4])

        def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
            return self.words(ids) * mask[..., None] + self.image(pixels).mean()

    model = Patches()
    wrapped = noesis.wrap(model, layers="leaves", per_sample=True)
    ids, pixels, room = torch.ones(2, 5, dtype=torch.int64), torch.randn(400, 4), wrapped._recorder.banks[0].samples
    wrapped(pixels=pixels, ids=ids, mask=torch.ones(2, 5))
    model.image(pixels)  # between forwards
    with pytest.warns(noesis.NoesisWarning, match="no rows per sample of vision, merge:"):
        trace = wrapped.trace()
    assert wrapped._recorder.banks[0].samples == room
    assert [sample.calls[0].tolist() for sample in trace.samples] == [[0, 0, 1]] * 2
    assert trace.calls.tolist() == [[1, 1, 1], [1, 1, 0]]
    wrapped.reset()
    wrapped(pixels=pixels, ids=ids, mask=torch.ones(2, 5))
    with pytest.warns(noesis.NoesisWarning, match="no rows per sample of vision, merge:"):  # once a run
        wrapped.trace()


def test_long_samples_are_measured_one_by_one():
    wrapped = noesis.wrap(nn.Sequential(nn.Identity()), layers="all", per_sample=True)
    x = torch.randn(3, 5000)
    wrapped(x)
    assert [s["std"].item() for s in wrapped.trace().samples] == pytest.approx(x.double().std(1).tolist(), rel=1e-6)


# ---------------------------------------------------------------- one call


def test_forward_with_trace_is_this_call_alone():
    wrapped = noesis.wrap(small(), layers="all", capacity=2)
    for x in batches(3):
        y, trace = wrapped.forward_with_trace(x)
        assert len(trace) == 1
        assert trace["max"][0, 2] == pytest.approx(y.max().item())
    with wrapped.paused(), pytest.raises(RuntimeError, match="This forward was not observed"):
        wrapped.forward_with_trace(x)


def test_two_wraps_do_not_see_each_other():
    one, other = noesis.wrap(small(), layers="all"), noesis.wrap(small(), layers="all")
    x = batches(1)[0]
    one(x)
    one(x)
    other(x)
    assert (len(one.trace()), len(other.trace())) == (2, 1)


def test_slab_made_in_inference_mode_can_be_written_outside():
    model = small()
    with torch.inference_mode():
        wrapped = noesis.wrap(model, layers="all", per_sample=2)
        wrapped(batches(1, 6)[0])  # grows here
    wrapped(batches(1)[0]).sum().backward()
    assert len(wrapped.trace()) == 2


def test_an_exception_ends_its_step():
    class Fails(nn.Module):
        on = True

        def forward(self, x):
            if self.on:
                raise KeyboardInterrupt
            return x

    model = nn.Sequential(nn.Linear(2, 2), Fails())
    wrapped = noesis.wrap(model, layers="linear", per_sample=True)
    with pytest.raises(KeyboardInterrupt):
        wrapped(torch.ones(4, 2))
    model[0](torch.ones(3, 2))  # between forwards: of the step to come, with a batch of its own
    model[1].on = False
    wrapped(torch.ones(3, 2))
    trace = wrapped.trace()
    assert trace.calls.tolist() == [[1], [2]]
    assert [sample["count"][1, 0] for sample in trace.samples] == [4, 4, 4, 0]


def test_runs_are_not_nested_and_reset_keeps_their_meta():
    wrapped = noesis.wrap(small(), layers="all")
    with wrapped.run(seed=3):
        with (
            pytest.raises(RuntimeError, match="A run of this model is going on. Expected one run at a time"),
            wrapped.run(),
        ):
            pass
        wrapped.reset()
        wrapped(batches(1)[0])
    assert wrapped.trace().meta["seed"] == 3
    with wrapped.run():
        pass


@pytest.mark.parametrize("setting", ["torch.set_default_dtype(torch.bfloat16)", "torch.set_default_device('meta')"])
@pytest.mark.slow
def test_defaults_of_torch_do_not_matter(setting):
    """In a process of its own, since scratch memory is made once."""
    code = f"""
import torch, noesis
x = torch.randn(2, 5000) + 3
model = torch.nn.Sequential(torch.nn.Identity())
wrapped = noesis.wrap(model, layers="all")
{setting}
wrapped(x)
wrapped(x.bfloat16())
torch.set_default_device("cpu")
got = wrapped.trace()["mean"][:, 0]
want = [x.double().mean().item(), x.bfloat16().double().mean().item()]
assert abs(got - want).max() < 1e-6, (got, want)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated since 2.13
def test_tracing_observes_nothing():
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    torch.jit.trace(model, torch.ones(1, 4), check_trace=False)
    with pytest.warns(noesis.NoesisWarning, match=r"left out \(1 traced by torch\.jit"):
        assert len(wrapped.trace()) == 0


def test_every_can_be_changed_and_keeps_to_its_bounds():
    model = nn.Sequential(nn.Identity())
    wrapped = noesis.wrap(model, layers="all", every=2)
    for bad in (0, -1, 1.5, True, 2**31):
        with pytest.raises(noesis.NoesisError, match=r"every=.* Expected a whole number from 1, below 2\*\*31"):
            wrapped.every = bad
    assert wrapped.every == 2
    wrapped.every = 3
    for _ in range(7):
        wrapped(torch.ones(2))
    assert wrapped.trace().steps.tolist() == [0, 3, 6]
    assert noesis.wrap(model, layers="all", every=3).every == 3
    with pytest.raises(noesis.NoesisError, match="other settings"):
        noesis.wrap(model, layers="all", every=2)


def test_what_runs_after_a_reset_within_a_forward_belongs_to_the_next_step():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    wrapped = noesis.wrap(model, layers="all")
    handle = model[0].register_forward_hook(lambda *_: wrapped.reset())
    wrapped(torch.ones(3))
    handle.remove()
    for _ in range(2):
        wrapped(torch.ones(3))
    assert wrapped.trace().calls.tolist() == [[2, 2], [1, 1]]


def test_the_totals_are_those_of_all_steps_whatever_the_ring_holds():
    steps = [torch.randn(5) * (number + 1) for number in range(150)]
    steps[3][2], steps[140][:] = float("nan"), float("inf")
    values = torch.cat(steps).double().numpy()
    finite = values[np.isfinite(values)]
    size = len(finite)
    expected = [size, finite.mean(), finite.std(ddof=1), abs(finite).mean(), finite.min(), finite.max(), 750 - size]
    for capacity in (1, 2, 3, 63, 64, 65, 149, 150, 151):
        wrapped = noesis.wrap(nn.Sequential(nn.Identity()), layers="0", capacity=capacity)
        for x in steps:
            wrapped(x)
        trace = wrapped.trace()
        np.testing.assert_allclose(trace.totals[0], expected, rtol=1e-5)
        assert trace.steps.tolist() == list(range(max(0, 150 - capacity), 150))


@pytest.mark.slow
def test_adding_steps_to_the_totals_takes_little_memory():
    model = nn.Sequential(*[nn.Identity() for _ in range(300)])
    wrapped = noesis.wrap(model, layers="all", per_sample=8, capacity=70)
    for _ in range(70):
        wrapped(torch.ones(8, 2))
    slab = wrapped._recorder.banks[0].slab
    tracemalloc.start()
    for _ in range(70):
        wrapped(torch.ones(8, 2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * slab.numel() * slab.element_size()


def test_infinite_rows_leave_the_ring_without_a_warning():
    wrapped = noesis.wrap(nn.Sequential(nn.Identity()), layers="0", capacity=2)
    for _ in range(4):
        wrapped(torch.tensor([1e200, -1e200], dtype=torch.float64))
    assert wrapped.trace().totals[0, 0] == 8


def test_forward_with_trace_takes_what_was_called_before():
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    x = torch.ones(2, 4)
    model[0](x)
    _, trace = wrapped.forward_with_trace(x)
    assert trace.calls.tolist() == [[2, 1, 1]]


def test_pausing_inside_a_forward_that_is_left_out():
    model = small()
    wrapped = noesis.wrap(model, layers="all", every=2)

    def blink(*_):
        with wrapped.paused():
            pass

    model[0].register_forward_hook(blink)
    for _ in range(3):
        wrapped(torch.ones(2, 4))
    assert wrapped.trace().calls.tolist() == [[1, 1, 1], [1, 1, 1]]
