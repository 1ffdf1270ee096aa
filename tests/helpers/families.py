"""Small models of many families with random weights, by the class and configuration of transformers alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .language_models import SIZES, VOCABULARY, build, prompts

ENCODER = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
#: Family -> prefix of the classes, head, options of the configuration.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma2": ("Gemma2", "ForCausalLM", {**SIZES, "head_dim": 8, "sliding_window": 4}),
    "qwen3": ("Qwen3", "ForCausalLM", {**SIZES, "head_dim": 8}),
    "olmo2": ("Olmo2", "ForCausalLM", SIZES),
    "cohere": ("Cohere", "ForCausalLM", SIZES),
    "granite": ("Granite", "ForCausalLM", {**SIZES, "residual_multiplier": 0.5}),
    "mixtral": ("Mixtral", "ForCausalLM", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptoss": (
        "GptOss",
        "ForCausalLM",
        {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
    ),
    "neox": ("GPTNeoX", "ForCausalLM", {**SIZES, "num_key_value_heads": None}),
    "opt": ("OPT", "ForCausalLM", {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 32, "num_key_value_heads": None}),
    "bloom": ("Bloom", "ForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", "ForCausalLM", {"vocab_size": VOCABULARY, **ENCODER}),
    "bert": ("Bert", "ForMaskedLM", {"vocab_size": VOCABULARY, **ENCODER}),
    "vit": ("ViT", "ForImageClassification", {**ENCODER, "image_size": 16, "patch_size": 8}),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4},
    ),
}
NAMES = ["llama", "gpt2", *FAMILIES]


def family(name: str, **options: Any) -> Any:
    """A model with random weights, norms included: those that begin as the identity would hide what they do."""
    if name not in FAMILIES:
        model = build(name, **options)
    else:
        prefix, head, sizes = FAMILIES[name]
        given = {key: value for key, value in {**sizes, **options}.items() if value is not None}
        torch.manual_seed(0)
        config = getattr(transformers, f"{prefix}Config")(**given)
        model = getattr(transformers, f"{prefix}{head}")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "norm" in key.lower() or ".ln_" in key:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(name: str) -> dict[str, Any]:
    """A batch of two rows; where there is a mask, the second begins with two tokens of padding."""
    if name == "vit":
        return {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    ids = prompts()
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def seen_by(name: str) -> torch.Tensor:
    """Which tokens are no padding, `[batch, tokens]`."""
    given = inputs(name)
    return given["attention_mask"].bool()
