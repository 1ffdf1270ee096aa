"""Families of transformers, made small by their configurations."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import nn

from .entry import Entry, Inputs, numbers, tokens

WORDS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**WORDS, **WIDTHS, "max_position_embeddings": 32}
GROUPED = {**TEXT, "num_key_value_heads": 1}
IMAGE = {"image_size": 16, "patch_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SOUND = {
    **WORDS,
    **WIDTHS,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
TWO_TOWERS = {
    "text_config": TEXT,
    "vision_config": {**WIDTHS, **IMAGE},
    "projection_dim": 16,
}


class Family(NamedTuple):
    """A family by the name of its class in transformers."""

    kind: str
    model: str
    config: dict[str, Any]
    inputs: str
    blocks: dict[str, int]


#: The image token of llava's text, and how many of them an image of 16 x 16 has.
IMAGE_TOKEN, PATCHES = 49, 4


def text() -> Inputs:
    ids = tokens()
    mask = ids.new_ones(ids.shape)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def plain_text() -> Inputs:
    return {"input_ids": tokens(length=8)}


def two_texts() -> Inputs:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=5, seed=1)}


def image() -> Inputs:
    return {"pixel_values": numbers(2, 3, 16, 16)}


def large_image() -> Inputs:
    return {"pixel_values": numbers(2, 3, 32, 32)}


def sound() -> Inputs:
    return {"input_values": numbers(2, 200)}


def spectrogram() -> Inputs:
    return {"input_values": numbers(2, 16, 8)}


def spoken() -> Inputs:
    return {"input_features": numbers(2, 8, 20), "decoder_input_ids": tokens(length=5)}


def text_and_image() -> Inputs:
    return {"input_ids": tokens(), "pixel_values": numbers(2, 3, 16, 16)}


def text_with_image() -> Inputs:
    ids = tokens(below=IMAGE_TOKEN)
    ids[:, 1 : 1 + PATCHES] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape), "pixel_values": numbers(2, 3, 16, 16)}


LAYERS = {"model.layers.N": 2}

FAMILIES = {
    # decoders
    "gpt2": Family(
        "decoder",
        "GPT2LMHeadModel",
        {**WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "text",
        {"transformer.h.N": 2},
    ),
    "llama": Family("decoder", "LlamaForCausalLM", GROUPED, "text", LAYERS),
    "mistral": Family("decoder", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}, "text", LAYERS),
    "gemma2": Family("decoder", "Gemma2ForCausalLM", {**GROUPED, "head_dim": 8}, "text", LAYERS),
    "qwen3": Family("decoder", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, "text", LAYERS),
    "phi": Family("decoder", "PhiForCausalLM", TEXT, "text", LAYERS),
    "gpt_neox": Family("decoder", "GPTNeoXForCausalLM", TEXT, "text", {"gpt_neox.layers.N": 2}),
    "opt": Family(
        "decoder",
        "OPTForCausalLM",
        {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16},
        "text",
        {"model.decoder.layers.N": 2},
    ),
    "bloom": Family(
        "decoder",
        "BloomForCausalLM",
        {**WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        "text",
        {"transformer.h.N": 2},
    ),
    "falcon": Family("decoder", "FalconForCausalLM", TEXT, "text", {"transformer.h.N": 2}),
    # experts
    "mixtral": Family(
        "mixture of experts",
        "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "text",
        LAYERS,
    ),
    "qwen3_moe": Family(
        "mixture of experts",
        "Qwen3MoeForCausalLM",
        {**GROUPED, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 16},
        "text",
        LAYERS,
    ),
    "olmoe": Family("mixture of experts", "OlmoeForCausalLM", {**GROUPED, **EXPERTS}, "text", LAYERS),
    "gpt_oss": Family(
        "mixture of experts",
        "GptOssForCausalLM",
        {
            **GROUPED,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "text",
        LAYERS,
    ),
    "deepseek_v3": Family(
        "mixture of experts",
        "DeepseekV3ForCausalLM",
        {
            **TEXT,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        "text",
        LAYERS,
    ),
    "switch_transformers": Family(
        "mixture of experts",
        "SwitchTransformersForConditionalGeneration",
        {
            **WORDS,
            "d_model": 16,
            "d_ff": 24,
            "d_kv": 8,
            "num_layers": 1,
            "num_decoder_layers": 1,
            "num_sparse_encoder_layers": 0,
            "num_sparse_decoder_layers": 1,
            "num_heads": 2,
            "num_experts": 2,
        },
        "two_texts",
        {"encoder.block.N": 1, "decoder.block.N": 1},
    ),
    # encoders
    "bert": Family("encoder", "BertForSequenceClassification", TEXT, "text", {"bert.encoder.layer.N": 2}),
    "roberta": Family("encoder", "RobertaForMaskedLM", TEXT, "text", {"roberta.encoder.layer.N": 2}),
    "distilbert": Family(
        "encoder",
        "DistilBertForMaskedLM",
        {**WORDS, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
        "text",
        {"distilbert.transformer.layer.N": 2},
    ),
    "albert": Family(
        "encoder",
        "AlbertForMaskedLM",
        {**TEXT, "embedding_size": 8},
        "text",
        {"albert.encoder.albert_layer_groups.N.albert_layers.N": 1},
    ),
    "electra": Family(
        "encoder", "ElectraForPreTraining", {**TEXT, "embedding_size": 8}, "text", {"electra.encoder.layer.N": 2}
    ),
    "deberta_v2": Family(
        "encoder",
        "DebertaV2Model",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "text",
        {"encoder.layer.N": 2},
    ),
    "modernbert": Family(
        "encoder", "ModernBertForMaskedLM", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, "text", LAYERS
    ),
    # encoder and decoder
    "t5": Family(
        "encoder-decoder",
        "T5ForConditionalGeneration",
        {**WORDS, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2},
        "two_texts",
        {"encoder.block.N": 2, "decoder.block.N": 2},
    ),
    "bart": Family(
        "encoder-decoder",
        "BartForConditionalGeneration",
        {
            **WORDS,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 32,
        },
        "two_texts",
        {"model.encoder.layers.N": 2, "model.decoder.layers.N": 2},
    ),
    # vision
    "vit": Family("vision", "ViTForImageClassification", {**WIDTHS, **IMAGE}, "image", {"vit.layers.N": 2}),
    "dinov2": Family("vision", "Dinov2Model", {**WIDTHS, **IMAGE}, "image", {"encoder.layer.N": 2}),
    "swin": Family(
        "vision",
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        "large_image",
        {"swin.encoder.layers.N.blocks.N": 4},
    ),
    "convnext": Family(
        "vision",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2},
        "large_image",
        {"convnext.encoder.stages.N.layers.N": 4},
    ),
    "resnet": Family(
        "vision",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]},
        "large_image",
        {"resnet.encoder.stages.N.layers.N": 4},
    ),
    "segformer": Family(
        "vision",
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [2, 2],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 16],
            "patch_sizes": [3, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        "large_image",
        {"segformer.stages.N.blocks.N": 4},
    ),
    # audio
    "wav2vec2": Family("audio", "Wav2Vec2ForCTC", SOUND, "sound", {"wav2vec2.encoder.layers.N": 2}),
    "hubert": Family("audio", "HubertModel", SOUND, "sound", {"encoder.layers.N": 2}),
    "whisper": Family(
        "audio",
        "WhisperForConditionalGeneration",
        {
            **WORDS,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
        },
        "spoken",
        {"model.encoder.layers.N": 2, "model.decoder.layers.N": 2},
    ),
    "audio_spectrogram_transformer": Family(
        "audio",
        "ASTForAudioClassification",
        {**WIDTHS, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8},
        "spectrogram",
        {"audio_spectrogram_transformer.layers.N": 2},
    ),
    # several kinds of input
    "clip": Family(
        "multimodal",
        "CLIPModel",
        TWO_TOWERS,
        "text_and_image",
        {"text_model.encoder.layers.N": 2, "vision_model.encoder.layers.N": 2},
    ),
    "siglip": Family(
        "multimodal",
        "SiglipModel",
        {key: TWO_TOWERS[key] for key in ("text_config", "vision_config")},
        "text_and_image",
        {"text_model.encoder.layers.N": 2, "vision_model.encoder.layers.N": 2},
    ),
    "llava": Family(
        "multimodal",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **WIDTHS, **IMAGE, "projection_dim": 16},
            "image_token_index": IMAGE_TOKEN,
            "image_seq_length": PATCHES,
        },
        "text_with_image",
        {"model.vision_tower.encoder.layers.N": 2, "model.language_model.layers.N": 2},
    ),
    "vilt": Family("multimodal", "ViltModel", {**TEXT, **IMAGE}, "text_and_image", {"encoder.layer.N": 2}),
    # state spaces and other recurrences
    "mamba": Family(
        "state space",
        "MambaForCausalLM",
        {**WORDS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
        "plain_text",
        {"backbone.layers.N": 2},
    ),
    "mamba2": Family(
        "state space",
        "Mamba2ForCausalLM",
        {
            **WORDS,
            "hidden_size": 16,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
        "plain_text",
        {"backbone.layers.N": 2},
    ),
    "jamba": Family(
        "state space",
        "JambaForCausalLM",
        {
            **GROUPED,
            **EXPERTS,
            "mamba_d_state": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
        "plain_text",
        LAYERS,
    ),
    "rwkv": Family(
        "state space",
        "RwkvForCausalLM",
        {**WORDS, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 16},
        "plain_text",
        {"rwkv.blocks.N": 2},
    ),
    "lfm2": Family(
        "state space",
        "Lfm2ForCausalLM",
        {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "text",
        LAYERS,
    ),
}


def build(name: str) -> nn.Module:
    """A model by its family."""
    import transformers

    family = FAMILIES[name]
    model = getattr(transformers, family.model)
    return model(model.config_class(**family.config))  # type: ignore[no-any-return]


def logits_of(output: Any) -> Any:
    """The logits of an output that has some."""
    return output.logits


def _entry(name: str, family: Family) -> Entry:
    has_logits = "For" in family.model and family.inputs != "large_image"
    return Entry(
        name=name,
        kind=family.kind,
        build=partial(build, name),
        inputs=globals()[family.inputs],
        blocks=family.blocks,
        logits=logits_of if has_logits else None,
        differentiable=name != "rwkv",  # scales its weights in place in eval mode
    )


ZOO = [_entry(name, family) for name, family in FAMILIES.items()]
