"""The logit lens is the model's own end, bit for bit; what it says comes beside what it says elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import noesis
from helpers.families import NAMES, family, inputs
from helpers.language_models import build, prompts
from noesis import interp
from noesis.interp import logit_lens
from noesis.interp.ends import End
from zoo.of_transformers import ZOO


@pytest.mark.parametrize("name", NAMES)
def test_the_last_layer_is_what_the_model_returns(name: str) -> None:
    model, given = family(name), inputs(name)
    with torch.no_grad():
        own = model(**given).logits
        end = End(model, given, None)
        *_, last = end.stream.values()
        (piece,) = end.pieces(last)
    assert torch.equal(piece.logits, own if own.dim() == 3 else own[:, None])
    found = logit_lens(model, given)
    counted = ~np.isnan(found.kl[-1])
    assert (found.kl[-1][counted] == 0).all()
    assert (found.agreement[-1][counted] == 1).all()
    assert np.nanmax(found.kl[0]) > 1e-5


def by_hand(name: str, model: Any, x: Tensor) -> Tensor:
    """What each family's code says comes after its blocks."""
    if name == "gpt2":
        return model.lm_head(model.transformer.ln_f(x))
    if name == "bert":
        return model.cls(x)
    logits = model.lm_head(model.model.norm(x))
    if name == "gemma2":
        return torch.tanh(logits / 30) * 30
    return logits * model.config.logit_scale if name == "cohere" else logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "bert"])
def test_each_layer_goes_through_all_that_comes_after_the_blocks(name: str) -> None:
    """Softcaps, scales and heads of several layers too, of which no name is known."""
    model, given = family(name), inputs(name)
    found = logit_lens(model, given, k=99)
    run = interp.run(model, given, keep=["resid_pre", "resid_post"])
    for at, layer in enumerate(found.layers):
        with torch.no_grad():
            shares = by_hand(name, model, run[layer]).softmax(-1)
        ranked = np.take_along_axis(shares.double().numpy(), np.maximum(found.top_tokens[at], 0), -1)
        assert np.allclose(
            np.nan_to_num(found.top_probabilities[at]), np.where(found.top_tokens[at] < 0, 0, ranked), atol=1e-6
        )


def test_statistics_by_their_definitions() -> None:
    model, ids = family("llama"), prompts(3, 6)
    found = logit_lens(model, ids, tokens=[7, 50], next_tokens=ids[:, 1:], k=3)
    run = interp.run(model, {"input_ids": ids}, keep=["resid_pre", "resid_post.2"])
    final = run.logits.double().log_softmax(-1)
    for at, layer in enumerate(found.layers):
        with torch.no_grad():
            logits = model.lm_head(model.model.norm(run[layer])).double()
        says = logits.log_softmax(-1)
        kl = torch.nn.functional.kl_div(says, final, log_target=True, reduction="none").sum(-1)
        assert np.allclose(found.kl[at], kl.numpy(), atol=1e-5)
        assert (found.agreement[at] == (says.argmax(-1) == final.argmax(-1)).double().numpy()).all()
        nll = -says[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        assert np.allclose(found.nll[at][:, :-1], nll.numpy(), atol=1e-5)
        assert np.isnan(found.nll[at][:, -1]).all()
        order = says.argsort(-1, descending=True)
        assert (found.top_tokens[at] == order[..., :3].numpy()).all()
        for which, token in enumerate((7, 50)):
            assert (found.rank[at, ..., which] == (order == token).nonzero()[:, 2].reshape(3, 6).numpy()).all()
            assert np.allclose(found.probability[at, ..., which], says[..., token].exp().numpy(), atol=1e-6)
        elsewhere = says.flatten(0, 1).roll(9, 0)
        control = torch.nn.functional.kl_div(elsewhere, final.flatten(0, 1), log_target=True, reduction="none").sum(-1)
        assert found.control_kl[at] == pytest.approx(float(control.mean()), rel=1e-4)
        same = (elsewhere.argmax(-1) == final.flatten(0, 1).argmax(-1)).double().mean()
        assert found.control_agreement[at] == pytest.approx(float(same))
    assert found.top(example=1, position=2)[0][0].token == found.top_tokens[0, 1, 2, 0]


def test_padding_is_not_read() -> None:
    model, given = family("llama"), inputs("llama")
    found = logit_lens(model, given, tokens=3, next_tokens=given["input_ids"])
    for name in ("kl", "agreement", "nll", "top_probabilities", "rank", "probability"):
        values = getattr(found, name)
        assert np.isnan(values[:, 1, :2]).all()
        assert not np.isnan(values[:, 1, 2:]).any()
        assert not np.isnan(values[:, 0]).any()
    assert (found.top_tokens[:, 1, :2] == -1).all()
    last = {**given, "attention_mask": given["attention_mask"].flip(1), "logits_to_keep": 1}
    assert np.isnan(logit_lens(model, last).kl[:, :, 0]).tolist() == [[False, True]] * 4


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_in_pieces_it_is_the_same(name: str) -> None:
    """A Llama can be asked for some logits, a BERT not."""
    model, given = family(name), inputs(name)
    whole, pieces = (logit_lens(model, given, tokens=[3], max_bytes=size) for size in (1 << 28, 4 * 2 * 99 * 3))
    assert np.allclose(whole.kl, pieces.kl, atol=1e-5, equal_nan=True)
    assert (whole.top_tokens[..., 0] == pieces.top_tokens[..., 0]).all()
    assert whole.rank.shape == pieces.rank.shape


def test_logits_of_the_last_positions_alone() -> None:
    model, ids = family("llama"), prompts()
    some = logit_lens(model, {"input_ids": ids, "logits_to_keep": 2}, next_tokens=ids)
    whole = logit_lens(model, ids, next_tokens=ids)
    assert some.positions == [5, 6]
    assert np.allclose(some.kl, whole.kl[:, :, 5:], atol=1e-5)
    assert np.allclose(some.nll, whole.nll[:, :, 5:], atol=1e-5)


def test_the_stream_of_an_encoder_is_not_the_decoders() -> None:
    assert logit_lens(family("t5"), inputs("t5")).layers == ["resid_pre.2", "resid_pre.3", "resid_post.3"]
    torch.manual_seed(0)
    entry = next(entry for entry in ZOO if entry.name == "llava")
    assert logit_lens(entry.build().eval(), entry.inputs()).layers == ["resid_pre.2", "resid_pre.3", "resid_post.3"]


def test_one_prediction_for_all_positions() -> None:
    found = logit_lens(family("vit"), inputs("vit"), k=2)
    assert found.kl.shape == (3, 2, 1)
    assert found.positions == [0]


def test_one_number_for_each_token_is_no_distribution() -> None:
    """Electra's discriminator, whose logits [batch, tokens] look like those of classes."""
    entry = next(entry for entry in ZOO if entry.name == "electra")
    with pytest.raises(noesis.NoesisError, match="one number for each token"):
        logit_lens(entry.build().eval(), entry.inputs())


def test_the_model_is_left_as_it_is() -> None:
    model, ids = build("llama"), prompts()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        before = model(input_ids=ids, past_key_values=cache).logits
    classes = [type(module) for module in model.modules()]
    with torch.inference_mode():
        logit_lens(model, ids)
    assert [type(module) for module in model.modules()] == classes
    assert cache.get_seq_length() == ids.shape[1]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_of_a_wrapped_model_it_is_no_step() -> None:
    wrapped = noesis.wrap(build("llama"))
    assert np.array_equal(logit_lens(wrapped, prompts()).kl, logit_lens(build("llama"), prompts()).kl)
    assert len(wrapped.trace()) == 0


def test_of_an_edited_model_it_is_that_ones_end() -> None:
    model, ids = build("llama"), prompts()
    whole = interp.anatomy(model, ids)
    bare = logit_lens(model, ids, anatomy=whole)
    with interp.editing(model, interp.Zero("attn.1")), torch.no_grad():
        edited = logit_lens(model, ids, anatomy=whole, k=99)
        final = model(ids).logits.softmax(-1)
    assert np.allclose(edited.top_probabilities[-1], final.sort(-1, descending=True).values.numpy(), atol=1e-7)
    assert (edited.kl[-1] == 0).all()
    assert not np.allclose(edited.kl[1], bare.kl[1])


@pytest.mark.data
def test_of_a_trained_model_each_layer_knows_more(data: Path) -> None:
    """stories260k on a story of its own: NLL and agreement by layer, as measured elsewhere by other code."""
    folder = data / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    start = transformers.AutoTokenizer.from_pretrained(folder)("Once upon a time, there was", return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(start.input_ids, max_new_tokens=120, min_new_tokens=120, do_sample=True, top_k=50)
    found = logit_lens(model, ids, next_tokens=ids[:, 1:])
    nll, agreement = np.nanmean(found.nll, axis=(1, 2)), found.agreement.mean((1, 2))
    assert np.allclose(nll, [22.2, 12.0, 5.8, 3.1, 1.8, 0.82], rtol=0.15)
    assert np.allclose(agreement, [0, 0.01, 0.03, 0.19, 0.55, 1], atol=0.1)
    # What the first layer says agrees with the model no more than what it says elsewhere; later ones do.
    assert agreement[0] - found.control_agreement[0] < 0.05
    assert agreement[4] - found.control_agreement[4] > 0.4
    assert (found.control_kl[2:] > 2 * found.kl.mean((1, 2))[2:]).all()


# ---------------------------------------------------------------- the result


def lens_of(**options: Any) -> interp.Lens:
    return logit_lens(family("llama"), inputs("llama"), **options)


@pytest.mark.parametrize("name", ["lens.safetensors", "lens.json"])
@pytest.mark.parametrize("tokens", [None, [3, 4]])
def test_files(tmp_path: Path, name: str, tokens: Any) -> None:
    found = lens_of(tokens=tokens)
    again = interp.Lens.load(found.save(tmp_path / name))
    assert repr(again) == repr(found)
    assert all(np.array_equal(getattr(again, a), getattr(found, a), equal_nan=True) for a in found.ARRAYS)
    assert again.top_tokens.dtype == np.int64


def test_broken_files_are_refused() -> None:
    payload = json.loads(lens_of().to_json())
    for change in ({"kl": [[1.0]]}, {"layers": [1]}, {"positions": [0]}, {"shape": [1]}):
        with pytest.raises(noesis.NoesisError, match="valid lens"):
            interp.Lens.from_json({**payload, **change})


def test_as_a_table_and_as_text() -> None:
    found = lens_of(tokens=[3])
    frame = found.to_dataframe()
    assert len(frame) == 4 * 2 * 7
    row = frame[(frame.layer == "resid_pre.1") & (frame.example == 1) & (frame.position == 4)]
    assert row.kl.item() == found.kl[1, 1, 4]
    assert row.rank_3.item() == found.rank[1, 1, 4, 0]
    assert "KL elsewhere" in repr(found)
    assert "NLL" not in repr(found)


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = lens_of(tokens=[3, 4])
    figure = found.plot(tmp_path / "lens.png", stat="rank", token=4, labels=list("abcdefg"))
    assert (tmp_path / "lens.png").stat().st_size > 1000
    assert next(text.get_text() for text in figure.axes[0].get_yticklabels()) == "resid_post.2"
    with pytest.raises(noesis.NoesisError, match="one of those asked for"):
        found.plot(stat="rank", token=5)
    with pytest.raises(noesis.NoesisError, match="'kl', 'agreement'"):
        found.plot(stat="entropy")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, "a number of tokens, at least 1"),
        ({"tokens": [99]}, "from 0 to 98"),
        ({"tokens": ["Paris"]}, "ids of tokens"),
        ({"next_tokens": [1, 2]}, "a tensor of token ids"),
        ({"next_tokens": torch.zeros(2, 3, dtype=torch.int64)}, r"of shape \(2, 7\), or one shorter"),
        ({"next_tokens": torch.full((2, 7), 99)}, "ids below 99"),
    ],
)
def test_bad_input_says_what_to_do(options: dict[str, Any], said: str) -> None:
    with pytest.raises(noesis.NoesisError, match=said):
        logit_lens(build("llama"), prompts(), **options)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(noesis.NoesisError, match="with its head"):
        logit_lens(build("llama").model, {"input_ids": prompts()})
