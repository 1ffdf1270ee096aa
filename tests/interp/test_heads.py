"""What attention heads look at, on models of which it is known, and on controls that must not pass."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import noesis
from helpers import trained_toys
from helpers.families import family, inputs
from helpers.language_models import build, prompts
from noesis import interp
from noesis.interp.head_scores import KINDS
from noesis.interp.repeats import Text, beginning, repeated, spoken, targets, vocabulary
from noesis.interp.scoring import score_patterns
from noesis.numerics import benjamini_hochberg

# What is known of trained models.


def test_induction_heads_are_found(induction: nn.Module) -> None:
    assert min(trained_toys.accuracy(induction, period) for period in (6, 12, 16, 23)) > 0.97
    scores = interp.heads(induction)
    found = scores.found("induction")
    assert {layer for layer, _ in found} == {1}
    assert len(found) >= 3
    assert scores["induction"].max() > 0.9
    assert scores["induction"][0].max() < 0.12
    assert {layer for layer, _ in scores.found("previous")} == {0}
    assert scores.found("duplicate") == []
    assert set(found) <= set(scores.found("copying"))
    best = scores.top("induction", 1)[0]
    assert (best.layer, best.head) == found[0]
    assert max(best.uniform, best.by_position, best.untrained) < 0.15
    assert best.q_value < 1e-6


@pytest.mark.slow
def test_induction_heads_with_rotary_positions_and_grouped_keys_are_found(rotary_induction: nn.Module) -> None:
    scores = interp.heads(rotary_induction)
    assert {layer for layer, _ in scores.found("induction")} == {1}
    assert scores["induction"].max() > 0.7
    assert scores.top("previous", 1)[0].layer == 0


@pytest.mark.slow
def test_one_layer_has_no_induction_head(one_layer: nn.Module) -> None:
    scores = interp.heads(one_layer)
    assert scores.found("induction") == []
    assert scores["induction"].max() <= 0.15


@pytest.mark.slow
def test_looking_a_fixed_way_back_is_no_induction(fixed_period: nn.Module) -> None:
    """At the period that it was taught it looks where an induction head does; of other periods it knows nothing."""
    assert trained_toys.accuracy(fixed_period, trained_toys.FIXED) > 0.99
    assert trained_toys.accuracy(fixed_period, 16) < 0.1
    scores = interp.heads(fixed_period)
    assert scores.found("induction") == []
    assert scores.found("induction", least=0.0) == []  # nothing that position does not explain
    ids, _ = trained_toys.repeated(16, [trained_toys.FIXED], torch.Generator().manual_seed(0))
    taught = interp.heads(fixed_period, {"input_ids": ids})
    assert taught["induction"].max() > 0.5
    assert taught.found("induction") == []
    best = taught.top("induction", 1)[0]
    assert best.by_position == pytest.approx(best.score, abs=0.02)


def test_heads_of_trained_weights(data: Path) -> None:
    """stories260k: two heads that look at the token before, and none of induction."""
    model = transformers.AutoModelForCausalLM.from_pretrained(data / "stories260k").eval()
    scores = interp.heads(model)
    first, second = scores.top("previous", 2)
    assert [(each.layer, each.head) for each in (first, second)] == [(3, 6), (1, 3)]
    assert (first.score, second.score) == (pytest.approx(0.74, abs=0.05), pytest.approx(0.62, abs=0.05))
    assert first.uniform == pytest.approx(0.042, abs=0.002)
    assert scores.found("induction") == scores.found("duplicate") == []
    assert scores["induction"].max() < 0.1


# The scores themselves.


def by_hand(pattern: Tensor, ids: Tensor) -> dict[str, float]:
    """Scores of one row and head, token by token."""
    length = len(ids)
    sums: dict[str, list[float]] = {"previous": [], "duplicate": [], "induction": [], "first": [], "entropy": []}
    for i in range(1, length):
        row = pattern[i, : i + 1].double()
        sums["previous"].append(float(row[i - 1]))
        sums["first"].append(float(row[0]))
        sums["entropy"].append(float(-(row * row.log()).sum()))
        copies = [j for j in range(1, i) if ids[j] == ids[i]]
        after = [j for j in range(1, i + 1) if ids[j - 1] == ids[i]]
        if copies:
            sums["duplicate"].append(float(sum(row[j] for j in copies)))
        if after:
            sums["induction"].append(float(sum(row[j] for j in after)))
    return {kind: float(np.mean(each)) for kind, each in sums.items()}


def test_scores_are_what_they_say() -> None:
    model = build("llama")
    ids = torch.randint(3, 12, (3, 20), generator=torch.Generator().manual_seed(0))
    scores = interp.heads(model, {"input_ids": ids})
    patterns = interp.run(model, {"input_ids": ids}, keep="pattern")
    uniform = torch.ones(20, 20).tril() / torch.arange(1, 21)[:, None]
    for layer, head in [(0, 0), (1, 3), (2, 1)]:
        rows = [by_hand(patterns["pattern", layer][row, head], ids[row]) for row in range(3)]
        even = [by_hand(uniform, ids[row]) for row in range(3)]
        for kind in KINDS[:5]:
            assert scores[kind][layer, head] == pytest.approx(np.mean([row[kind] for row in rows]), abs=1e-5)
            expected = np.mean([row[kind] for row in even])
            assert scores.uniform[KINDS.index(kind), layer, head] == pytest.approx(expected, abs=1e-5)


def test_induction_is_to_all_copies_together() -> None:
    """A perfect head may look at any of them: the latest alone would give it half."""
    ids = repeated(torch.arange(50), 48, seed=0)
    visible = torch.ones(48, 48, dtype=torch.bool).tril().expand(len(ids), -1, -1)
    where = targets(ids, visible)["induction"]
    pattern = (where + 1e-9) / (where + 1e-9).sum(2, keepdim=True)
    latest = torch.zeros_like(pattern).scatter_(2, (where * torch.arange(48)).argmax(2, keepdim=True), 1.0)
    both = torch.stack([pattern, latest], dim=1)
    even = visible[:, None].float()
    scored = score_patterns(both, even, even, Text(ids, None))
    assert not isinstance(scored, str)
    assert torch.allclose(scored["induction"].score, torch.ones(len(ids), 2), atol=1e-4)
    assert float(scored["induction"].by_position.max()) < 0.5


def test_random_rows() -> None:
    tokens = torch.arange(3, 99)
    ids = repeated(tokens, 96, seed=1)
    assert torch.equal(ids, repeated(tokens, 96, seed=1))
    assert not torch.equal(ids, repeated(tokens, 96, seed=2))
    assert set(ids.unique().tolist()) <= set(tokens.tolist())
    periods = [len(row.unique()) for row in ids]
    assert len(set(periods)) == len(periods) == 16
    assert all(torch.equal(row[period:], row[:-period]) for row, period in zip(ids, periods, strict=True))


def test_rows_begin_as_the_configuration_says() -> None:
    assert beginning(build("llama")) == 1
    assert beginning(trained_toys.gpt2(1, seed=0)) is None
    ids = repeated(torch.arange(3, 99), 96, seed=1, first=1)
    assert ids.shape == (16, 96)
    assert (ids[:, 0] == 1).all()
    assert torch.equal(ids[:, 1:], repeated(torch.arange(3, 99), 95, seed=1))


def test_tokens_that_the_model_never_expects_are_not_drawn() -> None:
    """Half of a vocabulary was never seen: its embeddings are those of nothing."""
    model = build("llama")
    tokens = vocabulary(model)
    assert torch.equal(spoken(model, tokens, 40, seed=0), tokens)  # random weights expect all alike
    model.lm_head = nn.Linear(32, 99)  # with a bias
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
        model.lm_head.bias[:50] = -20.0
    assert torch.equal(spoken(model, tokens, 40, seed=0), torch.arange(50, 99))


def test_special_tokens_are_not_drawn() -> None:
    model = build("llama")
    assert vocabulary(model).tolist() == list(range(3, 99))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_copying_is_of_the_eigenvalues_of_the_full_circuit(name: str) -> None:
    """Against all vocabulary-by-vocabulary eigenvalues, of a model whose final norm has gains."""
    model = family(name)
    found = interp.heads(model)["copying"]
    tokens = vocabulary(model)
    with torch.no_grad():
        if name == "llama":
            layer, norm, head = model.model.layers[1], model.model.norm, model.lm_head
            x = layer.input_layernorm(model.model.embed_tokens.weight[tokens])
            v = layer.self_attn.v_proj(x).unflatten(-1, (2, 8)).repeat_interleave(2, dim=1)
            o = layer.self_attn.o_proj.weight.T.unflatten(0, (4, 8))
            u = head.weight * norm.weight
        else:
            layer, norm, head = model.transformer.h[1], model.transformer.ln_f, model.lm_head
            x = layer.ln_1(model.transformer.wte.weight[tokens])
            v = layer.attn.c_attn(x)[:, 64:].unflatten(-1, (4, 8))
            o = layer.attn.c_proj.weight.unflatten(0, (4, 8))
            o = o - o.mean(-1, keepdim=True)
            u = head.weight * norm.weight
        for place in range(4):
            circuit = (v[:, place] @ o[place] @ u[tokens].T).double()
            circuit = circuit - circuit.mean(0)
            circuit = circuit - circuit.mean(1, keepdim=True)
            eigenvalues = torch.linalg.eigvals(circuit)
            expected = float(eigenvalues.real.sum() / eigenvalues.abs().sum())
            assert found[1, place] == pytest.approx(expected, abs=0.02)


def test_p_values_are_adjusted_over_the_heads_of_a_kind() -> None:
    scores = interp.heads(build("llama"))
    for place in range(len(KINDS)):
        p = scores.p_values[place].ravel()
        assert np.allclose(scores.q_values[place].ravel(), benjamini_hochberg(p))
    assert all(scores.found(kind) == [] for kind in ("previous", "duplicate", "induction", "first"))


@pytest.mark.slow
def test_random_weights_give_few_small_p_values() -> None:
    """Content that attention does not know is nothing beyond chance, at any seed."""
    found = []
    for seed in range(5):
        scores = interp.heads(build("gpt2", seed=seed), seed=seed)
        found += [scores.p_values[KINDS.index(kind)].ravel() for kind in ("duplicate", "induction", "copying")]
    assert (np.concatenate(found) < 0.05).mean() < 0.1


# Whatever model, and whatever inputs.


def test_the_model_and_the_random_state_stay_what_they_were() -> None:
    model = build("gpt2")
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = interp.heads(model, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    again = interp.heads(model, seed=3)
    assert all(np.array_equal(getattr(first, name), getattr(again, name), equal_nan=True) for name in first.ARRAYS)


def test_a_wrapped_model_records_no_steps() -> None:
    wrapped = noesis.wrap(build("gpt2"))
    wrapped(prompts())
    assert np.isfinite(interp.heads(wrapped)["induction"]).all()
    assert len(wrapped.trace().steps) == 1


def test_a_vision_transformer_has_scores_that_make_sense() -> None:
    scores = interp.heads(family("vit"), inputs("vit"))
    assert np.isfinite(scores["first"]).all()
    assert np.isfinite(scores["entropy"]).all()
    assert {"previous", "duplicate", "induction", "copying"} <= set(scores.left_out)
    assert all(np.isnan(scores[kind]).all() for kind in ("previous", "duplicate", "induction", "copying"))
    assert "left out: induction: what is read has no tokens" in repr(scores)


def test_an_encoder_sees_both_ways_and_padding_counts_for_nothing() -> None:
    given = inputs("bert")  # rows of seven and of five tokens
    scores = interp.heads(family("bert"), given)
    uniform = {kind: scores.uniform[place, 0, 0] for place, kind in enumerate(KINDS)}
    assert [uniform[kind] for kind in ("previous", "first")] == pytest.approx([(1 / 7 + 1 / 5) / 2] * 2, abs=1e-6)
    assert uniform["entropy"] == pytest.approx((np.log(7) + np.log(5)) / 2, abs=1e-6)
    assert "copying" in scores.left_out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "qwen3", "olmo2", "mixtral", "gptoss", "neox", "opt", "cohere"])
def test_families(name: str) -> None:
    model = family(name)
    scores = interp.heads(model)
    for kind in KINDS[:5]:
        for layer, row in enumerate(scores[kind]):  # of Gemma, two layers see four tokens each
            assert np.isfinite(row).all() != (f"{kind} of layer {layer}" in scores.left_out)
    assert np.isfinite(scores["copying"]).all() or any(what.startswith("copying") for what in scores.left_out)


def test_one_row_says_nothing_of_chance() -> None:
    ids = repeated(torch.arange(3, 99), 30, seed=0)[:1]
    scores = interp.heads(build("llama"), {"input_ids": ids})
    assert np.isnan(scores.p_values[:5]).all()
    assert scores.found("induction") == []
    assert "p-values" in scores.left_out


def test_what_cannot_be_scored_says_why() -> None:
    with pytest.raises(ValueError, match="Pass inputs="):
        interp.heads(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval())
    config = transformers.MambaConfig(vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=2)
    with pytest.raises(ValueError, match="no attention pattern of Mamba"):
        interp.heads(transformers.MambaForCausalLM(config).eval())
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        interp.heads(build("gpt2").train())
    with pytest.raises(ValueError, match="one of previous, duplicate"):
        interp.heads(build("gpt2"))["inductive"]


def test_files_and_tables(tmp_path: Path) -> None:
    scores = interp.heads(build("gpt2"))
    for name in ("heads.json", "heads.safetensors"):
        read = interp.HeadScores.load(scores.save(tmp_path / name))
        assert all(np.array_equal(getattr(read, each), getattr(scores, each), equal_nan=True) for each in read.ARRAYS)
        assert repr(read) == repr(scores)
    assert repr(interp.HeadScores.from_json(scores.to_json())) == repr(scores)
    frame = scores.to_dataframe()
    assert len(frame) == 6 * 3 * 4
    row = frame[(frame.kind == "induction") & (frame.layer == 1) & (frame["head"] == 2)]
    assert row.score.item() == scores["induction"][1, 2]
    axes = scores.plot("previous").axes[0]
    assert axes.get_title(loc="left") == f"previous: {len(scores.found('previous'))} of 12 heads"
    np.testing.assert_array_equal(axes.images[0].get_array(), scores.excess[0])


# An untrained copy.


def test_an_untrained_copy_has_learned_nothing_and_keeps_its_ties() -> None:
    model = build("gpt2")
    made, again, other = interp.untrained(model), interp.untrained(model), interp.untrained(model, seed=1)
    assert made.lm_head.weight is made.transformer.wte.weight
    weights = made.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    for name, value in model.state_dict().items():
        if value.dim() > 1:
            assert not torch.equal(value, weights[name]), name
            assert not torch.equal(other.state_dict()[name], weights[name]), name
    shuffled = made.transformer.h[0].attn.c_attn.weight
    assert torch.equal(
        shuffled.flatten().sort().values, model.transformer.h[0].attn.c_attn.weight.flatten().sort().values
    )
