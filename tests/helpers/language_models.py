"""Small language models of transformers with random weights, built in code: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCABULARY = 99
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **TOKENS,
}
# Sizes divisible by 4: the default experts want strides that are multiples of 16 bytes.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options))


def mistral(**options: Any) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=16, **options))


def gpt2(**options: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **TOKENS, **options))


def mixtral(**options: Any) -> Any:
    """Four experts; weights of the two chosen sum to 1."""
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **options))


def qwen3_moe(**options: Any) -> Any:
    """Eight experts; weights of the two chosen are left as they are."""
    sizes = {**SIZES, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **options))


def olmoe(**options: Any) -> Any:
    """Eight experts; weights of the two chosen are left as they are."""
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SIZES, **EXPERTS, **options))


DENSE = {"llama": llama, "mistral": mistral, "gpt2": gpt2}
MOE = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "olmoe": olmoe}
MODELS: dict[str, Callable[..., Any]] = {**DENSE, **MOE}


def build(name: str, seed: int = 0, **options: Any) -> Any:
    """A model by its name, in eval mode; equal seeds give equal weights.

    Routers get weights ten times those of the default initialisation, under which all experts are
    about equally likely.
    """
    torch.manual_seed(seed)
    model = MODELS[name](**options).eval()
    for name_, parameter in model.named_parameters():
        if name_.endswith(".gate.weight"):
            parameter.data.mul_(10)
    return model


def prompts(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length] without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, new_tokens: int = 5, **options: Any) -> Any:
    """Greedy generation of a fixed number of tokens; one forward for the prompt, one per further token."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


#: How `generate` may keep keys and values. `disable_compile`: on a GPU a static cache compiles by itself.
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
