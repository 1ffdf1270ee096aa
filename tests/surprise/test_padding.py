"""A mask is of one sequence: a sample's figures beside longer ones are those it has alone, or the layer is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers import padded
from helpers.padded import Drawn, Samples
from noesis.surprise import DEPENDS, MASKED, UNTOUCHED

transformers = pytest.importorskip("transformers")

from zoo import of_transformers as zoo  # noqa: E402

CALIBRATED, JUDGED = 240, 6
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def logits_of(output: Any) -> Any:
    return output.logits


# ---------------------------------------------------------------- models that are not in the zoo


def made(name: str, **config: Any) -> nn.Module:
    model = getattr(transformers, name)
    return model(model.config_class(**config))


BARTS = {key: value for key, value in zoo.FAMILIES["bart"].config.items() if key != "architectures"}
BLIP = {
    "text_config": {**zoo.TEXT, "encoder_hidden_size": 16, "projection_dim": 16},
    "vision_config": {**zoo.WIDTHS, **zoo.IMAGE},
    "projection_dim": 16,
    "image_text_hidden_size": 16,
}
LAYOUTLM = {
    **zoo.TEXT,
    "max_position_embeddings": 64,
    "input_size": 16,
    "patch_size": 8,
    "coordinate_size": 2,
    "shape_size": 4,
    "max_2d_position_embeddings": 32,
    "rel_pos_bins": 4,
    "rel_2d_pos_bins": 4,
    "max_rel_pos": 8,
}
WAV2VEC2_BERT = {
    **zoo.WIDTHS,
    "vocab_size": 50,
    "feature_projection_input_dim": 8,
    "conv_depthwise_kernel_size": 3,
    "apply_spec_augment": False,
}
PATCH, VISION_START, VISION_END = 46, 47, 48
QWEN2_VL = {
    "text_config": {
        **zoo.GROUPED,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    },
    "vision_config": {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "image_token_id": PATCH,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "video_token_id": 49,
}


def wav2vec2_by_layer() -> nn.Module:
    """Its features are normalised frame by frame, so that padding does not reach them."""
    config = zoo.SOUND | {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    return made("Wav2Vec2ForCTC", **config)


def adapted(kind: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    settings = {
        "prompt": partial(peft.PromptTuningConfig, num_virtual_tokens=5),
        "prefix": partial(peft.PrefixTuningConfig, num_virtual_tokens=5),
        "lora": partial(peft.LoraConfig, r=2, fan_in_fan_out=True),
    }[kind]
    return peft.get_peft_model(zoo.build("gpt2"), settings(task_type="CAUSAL_LM"))


def encoder(batch_first: bool = True, nested: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


class Classifier(nn.Module):
    """As people write them: a mask of their own, from which torch's is made."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed, self.encoder, self.batch_first = nn.Embedding(50, 16), encoder(batch_first), batch_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=attention_mask == 0)


class Translator(nn.Module):
    """One that gives its decoder no mask of its own, and takes one mask only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.between = nn.Embedding(50, 16), encoder(), nn.Linear(16, 16)
        self.decoder = nn.ModuleList([nn.TransformerDecoderLayer(16, 2, 24, batch_first=True) for _ in range(2)])

    def forward(self, source: Tensor, target: Tensor, attention_mask: Tensor) -> Tensor:
        padding = attention_mask == 0
        memory = self.encoder(self.embed(source), src_key_padding_mask=padding)
        y = self.between(self.embed(target))
        for layer in self.decoder:
            y = layer(y, memory, memory_key_padding_mask=padding)
        return y


def translated(drawn: Drawn, length: int) -> Samples:
    plain, targets = padded.text(drawn), torch.stack(drawn.texts([12] * drawn.count))

    def make(chosen: Any) -> dict[str, Any]:
        inputs = plain(chosen)
        return {
            "source": inputs["input_ids"],
            "target": targets[list(chosen)][:, :length],
            "attention_mask": inputs["attention_mask"],
        }

    return make


def laid_out(drawn: Drawn) -> Samples:
    """Words with places on a page, and the page: the mask is shorter than what goes through the blocks."""
    plain, pages = padded.text(drawn), drawn.numbers(drawn.count, 3, 16, 16)

    def make(chosen: Any) -> dict[str, Any]:
        inputs = plain(chosen)
        places = torch.zeros(*inputs["input_ids"].shape, 4, dtype=torch.int64)
        return inputs | {"bbox": places, "pixel_values": pages[list(chosen)]}

    return make


class Pair(nn.Module):
    """Two encoders of two texts, whose masks have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = zoo.build("bert"), zoo.build("roberta")

    def forward(self, query_ids: Tensor, query_mask: Tensor, document_ids: Tensor, document_mask: Tensor) -> Tensor:
        query, document = self.query(query_ids, query_mask), self.document(document_ids, document_mask)
        return query[0].mean() + document[0].mean()


def paired(drawn: Drawn) -> Samples:
    texts = {kind: padded.text(drawn) for kind in ("query", "document")}

    def make(chosen: Any) -> dict[str, Any]:
        inputs = {kind: text(chosen) for kind, text in texts.items()}
        ids = {f"{kind}_ids": found["input_ids"] for kind, found in inputs.items()}
        return ids | {f"{kind}_mask": found["attention_mask"] for kind, found in inputs.items()}

    return make


class Reminded(nn.Module):
    """A decoder whose memory is of another length than its words, and padded too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.between = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, batch_first=True), 2)

    def forward(
        self, ids: Tensor, memory: Tensor, tgt_key_padding_mask: Tensor, memory_key_padding_mask: Tensor
    ) -> Tensor:
        masks = {"tgt_key_padding_mask": tgt_key_padding_mask, "memory_key_padding_mask": memory_key_padding_mask}
        return self.decoder(self.embed(ids), self.between(memory), **masks)


def reminded(drawn: Drawn, equal: bool = False) -> Samples:
    words = drawn.texts()
    lengths = [len(row) for row in words] if equal else drawn.lengths(4, 9)
    memories = [drawn.numbers(length, 16) for length in lengths]

    def make(chosen: Any) -> dict[str, Any]:
        ids, mask = padded.together(padded.picked(words, chosen))
        memory, memory_mask = padded.together(padded.picked(memories, chosen))
        masks = {"tgt_key_padding_mask": mask == 0, "memory_key_padding_mask": memory_mask == 0}
        return {"ids": ids, "memory": memory} | masks

    return make


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A model, inputs for it, and what padding is to do to its layers: where nothing else is said, they are masked."""

    build: Callable[[], nn.Module]
    inputs: Callable[[Drawn], Samples]
    layers: Any = "blocks"
    logits: Any = None
    untouched: tuple[str, ...] = ()  # beginnings of names
    depends: tuple[str, ...] = ()  # ends of names
    settings: dict[str, Any] = field(default_factory=dict)

    def expected(self, name: str) -> str:
        if name.endswith(self.depends or ("?",)):
            return DEPENDS
        return UNTOUCHED if name.startswith(self.untouched or ("?",)) else MASKED


def of_zoo(name: str, inputs: Callable[[Drawn], Samples] = padded.text, **expected: Any) -> Case:
    return Case(partial(zoo.build, name), inputs, **expected)


LEAVES: dict[str, Any] = {"layers": "leaves"}
CASES = {
    **{
        name: of_zoo(name, logits=None if name in ("bert", "electra", "deberta_v2") else logits_of)
        for name in (
            *("gpt2", "llama", "mistral", "qwen3", "opt", "bloom", "falcon", "mixtral", "mamba", "lfm2", "jamba"),
            *("roberta", "distilbert", "albert", "electra", "modernbert", "bert", "deberta_v2"),
        )
    },
    "longformer": Case(
        partial(made, "LongformerForMaskedLM", **{**zoo.TEXT, "attention_window": 4, "max_position_embeddings": 64}),
        padded.text,
        logits=logits_of,
    ),
    # encoder and decoder
    **{name: of_zoo(name, padded.two_texts, logits=logits_of) for name in ("t5", "bart", "switch_transformers")},
    "pegasus": Case(partial(made, "PegasusForConditionalGeneration", **BARTS), padded.two_texts, logits=logits_of),
    "mbart": Case(partial(made, "MBartForConditionalGeneration", **BARTS), padded.two_texts, logits=logits_of),
    "t5, both as long": of_zoo("t5", partial(padded.two_texts, equal=True), logits=logits_of),
    "t5, no decoder mask": of_zoo("t5", partial(padded.two_texts, masked=False), logits=logits_of),
    "bart, no decoder mask": of_zoo("bart", partial(padded.two_texts, masked=False), logits=logits_of),
    "whisper": of_zoo("whisper", padded.spoken, untouched=("model.encoder",)),
    "translator": Case(
        Translator,
        partial(translated, length=9),
        ["encoder.layers.*", "between", "decoder.*"],
        untouched=("between", "decoder"),
    ),
    "translator, both as long": Case(
        Translator,
        partial(translated, length=12),
        ["encoder.layers.*", "between", "decoder.*"],
        untouched=("between", "decoder"),
    ),
    # sound, of which there are fewer frames than samples
    "wav2vec2": Case(wav2vec2_by_layer, padded.sound),
    # two towers, and images in text
    "clip": of_zoo("clip", padded.text_and_image, untouched=("vision_model",)),
    "siglip": of_zoo("siglip", padded.text_and_image, untouched=("vision_model",)),
    "blip": Case(
        partial(made, "BlipForImageTextRetrieval", **BLIP), padded.text_and_image, untouched=("vision_model",)
    ),
    "vilt": of_zoo("vilt", padded.text_and_image),
    "llava": of_zoo("llava", padded.text_with_image, logits=logits_of, untouched=("model.vision_tower",)),
    "qwen2_vl": Case(
        partial(made, "Qwen2VLForConditionalGeneration", **QWEN2_VL),
        partial(padded.patches, image=PATCH, start=VISION_START, end=VISION_END),
        "model.language_model.layers.*",
    ),
    # adapters: a prompt makes the mask shorter than the tokens, a prefix longer
    "prompt tuning": Case(partial(adapted, "prompt"), padded.text),
    "prefix tuning": Case(partial(adapted, "prefix"), padded.text, logits=logits_of),
    "lora": Case(partial(adapted, "lora"), padded.text, logits=logits_of),
    # torch's own, whose masks are true for padding
    "TransformerEncoder": Case(encoder, padded.vectors),
    "TransformerEncoder, added": Case(encoder, partial(padded.vectors, additive=True)),
    "Transformer": Case(
        lambda: nn.Transformer(16, 2, 2, 2, 24, batch_first=True),
        partial(padded.vectors, target=True),
        "decoder.layers.*",
    ),
    "classifier": Case(Classifier, padded.text),
    # masks of several arguments; what was made of the memory has a mask that no module around it is given
    "pair": Case(Pair, paired, ["*.encoder.layer.*", "*.word_embeddings"]),
    "reminded": Case(Reminded, reminded, ["embed", "between", "decoder.layers.*"], depends=("between",)),
    "reminded, both as long": Case(
        Reminded, partial(reminded, equal=True), ["embed", "between", "decoder.layers.*"], depends=("between",)
    ),
    "layoutlmv3": Case(partial(made, "LayoutLMv3Model", **LAYOUTLM), laid_out),
    "wav2vec2_bert": Case(partial(made, "Wav2Vec2BertModel", **WAV2VEC2_BERT), padded.frames),
    # masks of other kinds
    **{f"gpt2, {dtype}": of_zoo("gpt2", partial(padded.text, dtype=dtype)) for dtype in (torch.bool, torch.float32)},
    "llama, seen by query": of_zoo("llama", partial(padded.text_by_query, causal=True, additive=False)),
    "llama, added by query": of_zoo("llama", partial(padded.text_by_query, causal=True, additive=True, left=True)),
    "bert, added by query": of_zoo("bert", partial(padded.text_by_query, causal=False, additive=True)),
    "llama, left": of_zoo("llama", partial(padded.text, left=True)),
    "gpt2, left and numbered": of_zoo("gpt2", partial(padded.text, left=True, numbered=True)),
    "roberta, each position": of_zoo("roberta", settings={"positions": "each"}),
    # what is inside of the blocks; tokens are in one row with the batch in opt and mixtral
    "opt, linear": of_zoo("opt", layers="linear"),
    "mixtral, inside": of_zoo("mixtral", **LEAVES, depends=("experts.act_fn",)),
    "t5, inside": of_zoo("t5", padded.two_texts, **LEAVES, depends=("EncDecAttention.k", "EncDecAttention.v")),
    "llava, inside": of_zoo(
        "llava",
        padded.text_with_image,
        layers=["leaves", "attention"],
        untouched=("model.vision_tower", "model.multi_modal"),
    ),
}


def calibrated(case: Case, make: Samples) -> tuple[noesis.Wrapped, Any]:
    wrapped = noesis.wrap(
        case.build().eval(), case.layers, codebook=noesis.Codebook(**case.settings), logits=case.logits
    )
    batches = [make(range(start, start + 40)) for start in range(0, CALIBRATED, 40)]
    return wrapped, wrapped.calibrate(batches, progress=False)


def judged(wrapped: noesis.Wrapped, inputs: dict[str, Any]) -> noesis.Surprise:
    with torch.no_grad():
        wrapped(**inputs)
    return wrapped.surprise()


def assert_as_alone(together: noesis.Surprise, alone: list[noesis.Surprise]) -> None:
    for name, layer in together.layers.items():
        of_each = np.concatenate([each.layers[name].code_length for each in alone])
        np.testing.assert_allclose(layer.code_length, of_each, rtol=1e-2, atol=1e-3, err_msg=name)
        assert layer.p_value is not None
        np.testing.assert_array_equal(layer.p_value, np.concatenate([each.layers[name].p_value for each in alone]))
    if together.doubt is not None:
        np.testing.assert_allclose(together.doubt, np.concatenate([each.doubt for each in alone]), rtol=1e-4)
    np.testing.assert_allclose(together.score, np.concatenate([each.score for each in alone]), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(together.p_value, np.concatenate([each.p_value for each in alone]))


@pytest.mark.parametrize("name", CASES)
def test_a_sample_beside_longer_ones_is_judged_as_it_is_alone(name: str) -> None:
    case = CASES[name]
    make = case.inputs(Drawn.of(CALIBRATED + JUDGED))
    if case.depends:
        with pytest.warns(noesis.NoesisWarning, match=f"{case.depends[0]}.* cannot be judged in batches with padding"):
            wrapped, calibration = calibrated(case, make)
    else:
        wrapped, calibration = calibrated(case, make)
    assert calibration.padding == {layer: case.expected(layer) for layer in calibration.padding}
    assert set(calibration.layers) == {layer for layer in calibration.padding if case.expected(layer) != DEPENDS} - {
        "logits"
    }
    assert case.layers != "blocks" or set(wrapped.observed_layers) <= set(calibration.padding)
    chosen = range(CALIBRATED, CALIBRATED + JUDGED)
    alone = [judged(wrapped, make([sample])) for sample in chosen]
    assert_as_alone(judged(wrapped, make(chosen)), alone)


# ---------------------------------------------------------------- layers that cannot be judged


def with_group_norm() -> nn.Module:
    """Its first layer normalises over all samples of the sound, padding too."""
    return zoo.build("wav2vec2")


NAMED = {
    "normalised over padding": (with_group_norm, padded.sound, r"wav2vec2.encoder.layers.0: padding changes"),
    "numbered from padding on": (
        partial(zoo.build, "gpt2"), partial(padded.text, left=True), r"transformer.h.0: padding changes",
    ),
    "not told of the mask": (partial(zoo.build, "rwkv"), padded.text, r"rwkv.blocks.0: padding changes"),
    "time first": (partial(encoder, False), partial(padded.vectors, batch_first=False), r"layers.0: an output"),
    "time first inside": (partial(Classifier, batch_first=False), padded.text, r"encoder.layers.0: an output of shape"),
    "xlnet": (
        partial(made, "XLNetLMHeadModel", **{**zoo.WORDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
        padded.text,
        r"transformer.layer.0: an output of shape",
    ),
    "nested": (partial(encoder, nested=True), padded.vectors, r"layers.0: a nested tensor"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* cannot be judged:noesis.NoesisWarning")
@pytest.mark.parametrize("name", NAMED)
def test_what_cannot_be_judged_beside_longer_samples_is_named(name: str) -> None:
    build, inputs, said = NAMED[name]
    with pytest.raises(noesis.NoesisError, match=said):
        calibrated(Case(build, inputs), inputs(Drawn.of(CALIBRATED)))


def test_layers_that_padding_changes_are_judged_without_padding_only() -> None:
    drawn = Drawn.of(CALIBRATED + JUDGED)
    make = padded.sound(drawn)

    def as_long(chosen: Any) -> dict[str, Tensor]:
        return {name: value[:, :120] for name, value in make(chosen).items()}

    wrapped, calibration = calibrated(Case(with_group_norm, padded.sound), as_long)
    assert "padding changes wav2vec2.encoder.layers.0" in repr(calibration)
    chosen = range(CALIBRATED, CALIBRATED + JUDGED)
    alone = [judged(wrapped, as_long([sample])) for sample in chosen]
    assert_as_alone(judged(wrapped, as_long(chosen)), alone)
    with torch.no_grad():
        wrapped(**make(chosen))
    said = "wav2vec2.encoder.layers.0, wav2vec2.encoder.layers.1 cannot be judged in batches with padding"
    with (
        pytest.warns(noesis.NoesisWarning, match=said),
        pytest.raises(noesis.NoesisError, match=r"padding changes its figures\)\. .* Codebook\(mask=None\)"),
    ):
        wrapped.surprise()
    with pytest.raises(noesis.NoesisError, match="padding changes its figures"):  # and warns no more
        wrapped.surprise()


def test_a_layer_that_cannot_be_judged_takes_the_p_value_with_it() -> None:
    """There is a score of the others; the promise of the p-value was made for all of them."""
    drawn = Drawn.of(CALIBRATED + JUDGED)
    make = padded.sound(drawn)
    layers = ["blocks", "wav2vec2.feature_extractor.conv_layers.*.conv"]
    equal = [{"input_values": rows} for rows in drawn.numbers(CALIBRATED, 200).split(40)]
    wrapped = noesis.wrap(wav2vec2_by_layer().eval(), layers, codebook=noesis.Codebook())
    wrapped.calibrate(equal, progress=False)
    with pytest.warns(noesis.NoesisWarning, match="conv_layers.1.conv cannot be judged"):
        surprise = judged(wrapped, make(range(CALIBRATED, CALIBRATED + JUDGED)))
    assert list(surprise.layers) == ["wav2vec2.encoder.layers.0", "wav2vec2.encoder.layers.1"]
    assert np.isfinite(surprise.score).all()
    with pytest.raises(noesis.NoesisError, match=r"conv_layers.0.conv: padding changes its figures; .*in this forward"):
        _ = surprise.p_value
    assert len(judged(wrapped, equal[0]).p_value) == 40


def test_without_a_mask_padding_counts_when_asked_for() -> None:
    make = padded.text(Drawn.of(CALIBRATED + JUDGED))
    wrapped, calibration = calibrated(of_zoo("bert", settings={"mask": None}), make)
    assert calibration.padding == {}
    chosen = range(CALIBRATED, CALIBRATED + JUDGED)
    alone = np.concatenate([judged(wrapped, make([sample])).score for sample in chosen])
    assert np.abs(judged(wrapped, make(chosen)).score - alone).max() > 0.1


# ---------------------------------------------------------------- what calibration sees, and what comes later


def test_calibrated_without_masks_padding_may_come_later() -> None:
    drawn = Drawn.of(CALIBRATED + JUDGED)
    make = padded.text(drawn)
    wrapped = noesis.wrap(zoo.build("gpt2").eval(), codebook=noesis.Codebook(), logits=logits_of)
    calibration = wrapped.calibrate(list(torch.stack(drawn.texts([9] * CALIBRATED)).split(40)), progress=False)
    assert set(calibration.padding.values()) == {MASKED}
    chosen = range(CALIBRATED, CALIBRATED + JUDGED)
    assert_as_alone(judged(wrapped, make(chosen)), [judged(wrapped, make([sample])) for sample in chosen])


def test_padding_on_the_other_side_is_found_when_it_comes() -> None:
    """Without positions that begin with the text, GPT-2 reads a text padded on the left as another one."""
    right, left = (partial(padded.text, left=left)(Drawn.of(CALIBRATED)) for left in (False, True))
    wrapped = noesis.wrap(zoo.build("gpt2").eval(), codebook=noesis.Codebook())
    batches = [right(range(start, start + 40)) for start in range(0, 200, 40)]
    assert set(wrapped.calibrate(batches, progress=False).padding.values()) == {MASKED}
    with (
        pytest.warns(noesis.NoesisWarning, match=r"transformer.h.0, transformer.h.1 cannot be judged"),
        pytest.raises(noesis.NoesisError, match="padding changes its figures"),
    ):
        wrapped.calibrate([*batches, left(range(200, 240))], progress=False)
    assert set(wrapped._channels().padding.found.values()) == {MASKED}  # nothing changed
    chosen = range(200, 206)
    assert_as_alone(judged(wrapped, right(chosen)), [judged(wrapped, right([sample])) for sample in chosen])


def test_what_was_found_survives_a_file(tmp_path: Any) -> None:
    make = padded.two_texts(Drawn.of(CALIBRATED + JUDGED))
    wrapped, calibration = calibrated(of_zoo("t5", padded.two_texts, logits=logits_of), make)
    path = wrapped.save_calibration(tmp_path / "t5.safetensors")
    chosen = range(CALIBRATED, CALIBRATED + JUDGED)
    before = judged(wrapped, make(chosen))
    model = wrapped.unwrap()
    other = noesis.wrap(model, codebook=noesis.Codebook(), logits=logits_of)
    assert other.load_calibration(path).padding == calibration.padding == other._channels().padding.found
    np.testing.assert_array_equal(judged(other, make(chosen)).p_value, before.p_value)


def test_a_layer_that_had_the_mask_s_positions_and_has_others_is_named() -> None:
    class Twice(nn.Module):
        on = False

        def forward(self, x: Tensor) -> Tensor:
            return x.repeat_interleave(2, 1) if self.on else x + 1

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(50, 8), Twice()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(self.embed(input_ids))

    make = padded.text(Drawn.of(CALIBRATED))
    wrapped, calibration = calibrated(Case(Odd, padded.text, ["embed", "layer"]), make)
    assert calibration.padding == {"embed": MASKED, "layer": MASKED}
    wrapped.model.layer.on = True
    surprise = judged(wrapped, make(range(4)))
    assert list(surprise.layers) == ["embed"]
    with pytest.raises(noesis.NoesisError, match=r"layer: an output of shape \(4, \d+, 8\) under a mask of shape"):
        _ = surprise.p_value


def test_before_calibration_layers_with_other_positions_are_named_once() -> None:
    make = padded.sound(Drawn.of(40))
    wrapped = noesis.wrap(wav2vec2_by_layer().eval(), "conv", codebook=noesis.Codebook())
    with torch.no_grad():
        wrapped(**make(range(40)))
        with pytest.warns(noesis.NoesisWarning, match="conv_layers.0.conv.* other positions than the mask around"):
            wrapped.surprise()
        wrapped.surprise()
        wrapped(**{name: value[:, :120] for name, value in make(range(40)).items()})
        wrapped.surprise()


# ---------------------------------------------------------------- ways of running


@pytest.mark.parametrize("name", ["llama, left", "gpt2, left and numbered"])
def test_generated_words_are_judged_as_alone(name: str) -> None:
    """With a cache the model is given one word, and a mask of all words so far."""
    case, drawn = CASES[name], Drawn.of(JUDGED, 1)
    plain = padded.text(drawn, left=True)
    model = case.build().eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False, max_new_tokens=3)
    wrapped = noesis.wrap(model, codebook=noesis.Codebook())

    wrapped.calibrate(list(torch.stack(Drawn.of(160).texts([8] * 160)).split(40)), progress=False)

    def after(chosen: Any) -> noesis.Surprise:
        wrapped.generate(**plain(chosen))
        return wrapped.surprise()

    together, alone = after(range(JUDGED)), [after([sample]) for sample in range(JUDGED)]
    assert_as_alone(together, alone)


LATER = ("t5", "TransformerEncoder", "llama, added by query", "wav2vec2")
COMPILED = ["llama", *LATER]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*Dynamo detected a call to a:UserWarning")  # transformers' own
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.slow
def test_compiled_models_use_the_same_masks(name: str) -> None:
    case = CASES[name]
    make = case.inputs(Drawn.of(CALIBRATED + JUDGED))
    wrapped, _ = calibrated(case, make)
    inputs = make(range(CALIBRATED, CALIBRATED + JUDGED))
    inputs |= {"use_cache": False} if name.startswith(("llama", "t5")) else {}
    expected = judged(wrapped, inputs)
    wrapped._channels().forget()
    with torch.no_grad():
        torch.compile(wrapped.observed_model, backend="aot_eager", fullgraph=True)(**inputs)
    found = wrapped.surprise()
    for layer in expected.layers:
        one, other = (surprise.layers[layer].code_length for surprise in (found, expected))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found.p_value, expected.p_value)


def test_modules_between_the_model_and_its_layers_are_given_back() -> None:
    model = zoo.build("t5").eval()
    before = {name: type(module) for name, module in model.named_modules()}
    inputs = padded.two_texts(Drawn.of(3))(range(3))
    with torch.no_grad():
        expected = model(**inputs).logits
    wrapped = noesis.wrap(model, codebook=noesis.Codebook())
    assert isinstance(model.decoder, noesis.Observed)  # which is given a mask
    with torch.no_grad():
        assert torch.equal(wrapped(**inputs).logits, expected)
    wrapped.unwrap()
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_mask_made_inside_the_model_is_used_and_not_tried() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.encoder = nn.Embedding(50, 16), encoder()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.encoder(self.embed(input_ids), src_key_padding_mask=input_ids == 0)

    plain = padded.text(Drawn.of(CALIBRATED + JUDGED))

    def make(chosen: Any) -> dict[str, Any]:
        return {"input_ids": plain(chosen)["input_ids"]}

    wrapped, calibration = calibrated(Case(Reader, padded.text, "encoder.layers.*"), make)
    assert calibration.padding == {}
    chosen = range(CALIBRATED, CALIBRATED + JUDGED)
    assert_as_alone(judged(wrapped, make(chosen)), [judged(wrapped, make([sample])) for sample in chosen])


def test_modules_around_layers_that_cannot_be_observed_are_passed_over() -> None:
    class Final(type):
        def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("a final class")
            return super().__new__(cls, name, bases, body)

    class Block(nn.Module, metaclass=Final):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x)

    model = nn.Sequential(Block())
    with pytest.raises(noesis.NoesisError, match="0 .Block. cannot be observed: a final class"):
        noesis.wrap(model, layers="0", codebook=noesis.Codebook())
    wrapped = noesis.wrap(model, layers="0.inside", codebook=noesis.Codebook())
    assert len(wrapped.calibrate([torch.randn(200, 3, 8)], progress=False).layers) == 1
    assert not isinstance(model[0], noesis.Observed)
