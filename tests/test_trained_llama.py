"""On trained weights: what changed, where, and is it more than noise."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import noesis

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.data

BROKEN = "model.layers.3.mlp.down_proj"
OPENINGS = [
    "Once upon a time, there was a little girl",
    "Tom had a red ball",
    "The cat sat on the mat",
    "One day, a big dog came",
    "Mom said it was time",
    "The sun was bright",
    "Sara and Ben went to the zoo",
    "There was a small boat",
]


@pytest.fixture(scope="module")
def llama(data):
    folder = data / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(llama):
    """24 stories of the model's own kind, each from a seed of its own: 8, 8 and 8."""
    model, tokenizer = llama
    stories = []
    for seed in range(24):
        torch.manual_seed(seed)
        ids = tokenizer(OPENINGS[seed % 8], return_tensors="pt").input_ids
        stories.append(model.generate(ids, max_new_tokens=90, min_new_tokens=90, do_sample=True, top_k=50))
    return stories


def soulprints(model, prompts) -> list[noesis.Soulprint]:
    wrapped = noesis.wrap(model, layers="linear")
    found = []
    for ids in prompts:
        with wrapped.run(), torch.no_grad():
            wrapped(ids)
        found.append(wrapped.soulprint())
    wrapped.unwrap()
    return found


def scaled(model, factor: float):
    changed = copy.deepcopy(model)
    changed.get_submodule(BROKEN).weight.data.mul_(factor)
    return changed


@pytest.fixture(scope="module")
def healthy(llama, prompts):
    return soulprints(llama[0], prompts)


@pytest.fixture(scope="module")
def broken(llama, prompts):
    return soulprints(scaled(llama[0], 1.3), prompts)


def trace_of(model, ids) -> noesis.Trace:
    wrapped = noesis.wrap(model, layers="linear")
    with torch.no_grad():
        wrapped.generate(ids, max_new_tokens=6, do_sample=False)
    trace = wrapped.trace()
    wrapped.unwrap()
    return trace


@pytest.mark.slow
def test_same_input_twice_is_the_same_trace(llama, prompts):
    one, other = (trace_of(llama[0], prompts[0][:, :20]) for _ in range(2))
    assert len(one) == 6
    np.testing.assert_array_equal(one.values, other.values)
    result = noesis.compare(one, other)
    assert result.first_divergence is None
    assert (result.distance, result.cosine) == (0.0, pytest.approx(1.0))


@pytest.mark.slow
def test_one_percent_in_one_weight_is_the_first_divergence(llama, prompts):
    one, other = (trace_of(model, prompts[0][:, :20]) for model in (llama[0], scaled(llama[0], 1.01)))
    where = noesis.compare(one, other).first_divergence
    assert (where.step, where.layer) == (0, BROKEN)
    assert abs(where.b / where.a - 1) == pytest.approx(0.01, rel=1e-3)


def forward(model, ids, layers="leaves") -> noesis.Trace:
    wrapped = noesis.wrap(model, layers=layers, stats=["zeros", "rms"])
    with torch.no_grad():
        wrapped(ids)
    trace = wrapped.trace()
    wrapped.unwrap()
    return trace


COARSE = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("tokens", [3, 80])
@pytest.mark.slow
def test_what_a_dtype_rounds_is_no_divergence(llama, prompts, dtype, tokens):
    for ids in prompts[:3]:
        exact, rounded = (forward(copy.deepcopy(llama[0]).to(kind), ids[:, :tokens]) for kind in (torch.float32, dtype))
        for a, b in ((exact, rounded), (rounded, exact), (exact, exact)):
            assert noesis.compare(a, b).first_divergence is None
        assert noesis.compare(exact, rounded, tolerance=1e-5).first_divergence.layer == "model.embed_tokens"
        assert noesis.compare(exact, rounded, tolerance=1e-2).first_divergence is None


@pytest.mark.slow
def test_autocast_is_a_dtype_too(llama, prompts):
    ids = prompts[0][:, :40]
    exact = forward(llama[0], ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = forward(llama[0], ids)
    assert (rounded.meta["dtype"], rounded.meta["autocast"]) == ("float32", "bfloat16")
    assert noesis.compare(exact, rounded).first_divergence is None
    assert noesis.compare(exact, rounded, tolerance=1e-5).first_divergence is not None
    assert "autocast" not in exact.meta


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize(
    "planted",
    ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "model.layers.4.self_attn.o_proj", BROKEN],
)
def test_a_fault_beside_rounding_is_the_first_divergence(llama, prompts, dtype, planted):
    model, ids = llama[0], prompts[1][:, :80]
    changed = copy.deepcopy(model)
    changed.get_submodule(planted).weight.data.mul_(1.05)
    where = noesis.compare(forward(model, ids), forward(changed.to(dtype), ids)).first_divergence
    assert (where.step, where.layer) == (0, planted)
    assert where.b / where.a == pytest.approx(1.05, abs=0.02)


def test_weights_of_eight_bits_are_no_rounding_of_the_dtype(llama, prompts):
    ids, quantised = prompts[2][:, :80], copy.deepcopy(llama[0])
    for module in quantised.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.data.abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale
    exact, rounded = forward(llama[0], ids), forward(quantised, ids)
    assert noesis.compare(exact, rounded).first_divergence.layer == "model.embed_tokens"  # tied to the head
    assert noesis.compare(exact, rounded, tolerance=0.03).first_divergence is None


def captured(model, ids) -> noesis.Activations:
    with noesis.capture(model, layers="blocks") as kept, torch.no_grad():
        model(ids)
    return kept


def test_a_planted_fault_stands_out_of_what_a_dtype_rounds_in_decibels(llama, prompts):
    ids, model = prompts[1][:, :80], llama[0]
    exact, broken = captured(model, ids), copy.deepcopy(model)
    broken.model.layers[2].mlp.up_proj.weight.data.mul_(1.3)
    rounded, found = (
        noesis.compare(exact, captured(copy.deepcopy(each).bfloat16(), ids)).sqnr for each in (model, broken)
    )
    assert rounded.min() > 25
    assert noesis.compare(exact, captured(copy.deepcopy(model), ids)).relative_error.tolist() == [0.0] * len(rounded)
    assert found[:2] == pytest.approx(rounded[:2])
    assert (found[2:] < rounded[2:] - 6).all()


def test_fresh_prompts_raise_few_alarms(healthy):
    """Over random choices of 8 prompts for the baseline, and 8 fresh ones: rate over layers and runs."""
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(20):
        order = rng.permutation(len(healthy))
        baseline, fresh = [healthy[i] for i in order[:8]], [healthy[i] for i in order[8:16]]
        for run in fresh:
            rows = noesis.compare(baseline[0], run, baseline=baseline).rows
            alarms += [(row.changed, row.p_value <= 0.05) for row in rows]
        together = noesis.compare(baseline[0], fresh, baseline=baseline).rows
        alarms += [(row.changed, row.p_value <= 0.05) for row in together]
    found, raw = np.mean(alarms, axis=0)
    assert found <= 0.05
    assert raw == pytest.approx(0.05, abs=0.02)  # the p-values themselves are what they claim


def test_a_scaled_weight_is_flagged_on_fresh_prompts(healthy, broken):
    baseline = healthy[:8]
    together = noesis.compare(baseline[0], broken[16:], baseline=baseline)
    assert together.changed == [BROKEN]
    assert together.row(BROKEN).z_std > 6
    for run in broken[8:]:  # each alone has less evidence, and the same suspect
        assert noesis.compare(baseline[0], run, baseline=baseline).rows[0].layer == BROKEN
    # Raw cosine cannot tell: healthy runs differ from each other as much.
    cosines = [noesis.compare(baseline[0], run).cosine for run in healthy[8:]]
    assert min(cosines) < noesis.compare(baseline[0], broken[8]).cosine


def test_a_nan_is_found_at_its_layer_and_step(llama, prompts):
    model = copy.deepcopy(llama[0])
    wrapped = noesis.wrap(model, layers="linear")
    layer = model.get_submodule(BROKEN)
    with torch.no_grad():
        for step in range(4):
            if step == 2:
                layer.weight[5, 7] = float("nan")
            wrapped(prompts[0][:, :20])
    trace = wrapped.trace()
    assert trace.first_nonfinite() == (2, BROKEN)
    assert trace["nonfinite"][2, trace.layers.index(BROKEN)] == 20  # one channel, 20 tokens
    assert not trace["nonfinite"][:2].any()
    assert f"first NaN or infinity: step 2, layer {BROKEN}" in repr(trace)
    assert trace.soulprint().layers == trace.layers  # a run with NaN still has a soulprint
