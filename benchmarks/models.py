"""The models that are measured: real configurations, random weights, nothing downloaded.

Each is a `Bench`: a module, what one step of it is, and which layers noesis observes. Variants of
a model are structural copies that share its parameters (`shared_copy`), so that memory is not
multiplied and all compute the same thing.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from architectures import Add, FeedForward, ResNet50, Stack
from torch import Tensor, nn

Step = Callable[[], Any]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Size:
    """What the command line asks for; None takes the model's default on the device."""

    batch: int | None = None
    tokens: int | None = None
    pixels: int | None = None
    depth: int | None = None  # layers of the stack, blocks of the feed-forward model
    output: str | None = None  # of the stack's layers: a key of OUTPUTS


@dataclass(frozen=True)
class Bench:
    """A model with its inputs."""

    name: str
    module: nn.Module
    step: Callable[[Call], Step]  # prepares what runs one step of a copy of the module, or of what calls it
    outputs: Callable[[nn.Module], list[Tensor]]  # what has to be bitwise equal with and without observing
    layers: dict[str, Any]  # what noesis observes: name of the set -> selector
    sizes: dict[str, int | str]
    dtype: torch.dtype
    trains: bool = False


def build(name: str, device: str, size: Size | None = None) -> Bench:
    """The model of this name, on the device, with its inputs."""
    torch.manual_seed(0)
    return MODELS[name](device, size or Size())


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of a module's structure with the very parameters and buffers of the module."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]})


def is_matrix(name: str, module: nn.Module) -> bool:
    """A layer that nervecode has a wrapper for."""
    return isinstance(module, (nn.Linear, nn.Conv2d))


LEAVES = {"leaves": "leaves", "matrices": is_matrix}

# ---------------------------------------------------------------- SDXL

# `unet/config.json` of stabilityai/stable-diffusion-xl-base-1.0.
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_BLOCKS = r"re:transformer_blocks\.\d+$"
SDXL_LAYERS = {
    "blocks70": SDXL_BLOCKS,
    "sites297": [SDXL_BLOCKS, r"re:transformer_blocks\.\d+\.(attn1|attn2|ff)$", r"re:resnets\.\d+$"],
    **LEAVES,
}


def sdxl_unet() -> nn.Module:
    """SDXL's U-Net without weights, on the meta device."""
    diffusers = needs("diffusers")
    with torch.device("meta"):
        unet: nn.Module = diffusers.UNet2DConditionModel(**SDXL)
    return unet


def sdxl(device: str, size: Size) -> Bench:
    """One denoising call of SDXL's U-Net."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    batch, pixels = (
        (size.batch or 2, size.pixels or 1024) if device == "cuda" else (size.batch or 1, size.pixels or 256)
    )
    unet = materialise(sdxl_unet(), device, dtype)
    made = {"device": device, "dtype": dtype}
    latent = torch.randn(batch, 4, pixels // 8, pixels // 8, **made)
    timestep = torch.tensor(500, device=device)
    text = torch.randn(batch, 77, 2048, **made)
    pooled = torch.randn(batch, 1280, **made)
    ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], **made).expand(batch, -1).contiguous()

    def call(module: Call) -> Tensor:
        conditions = {"text_embeds": pooled, "time_ids": ids}
        return module(latent, timestep, text, added_cond_kwargs=conditions, return_dict=False)[0]

    return inference("sdxl", unet, call, SDXL_LAYERS, {"batch": batch, "pixels": pixels}, dtype)


# ---------------------------------------------------------------- language models


def causal_attention() -> str:
    """The name of torch's attention without a mask.

    With "sdpa", transformers asks the device at every forward whether sequences are packed, and
    while compiling or capturing takes a mask in case they are, which the fast kernels do not have.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("causal", sdpa_attention_forward)
    return "causal"


def llama(device: str, dtype: torch.dtype, positions: int, attention: str) -> nn.Module:
    """A decoder with the configuration of Llama-3.2-1B."""
    transformers = needs("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=positions,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    rotary = type(model.model.rotary_emb)(config)  # the one part with buffers
    model.model.rotary_emb = nn.Module()
    model = materialise(model, device, dtype)
    model.model.rotary_emb = rotary.to(device)
    model.tie_weights()
    return model.eval()


def llama_prefill(device: str, size: Size) -> Bench:
    """A decoder reads its prompts."""
    on_cuda = device == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    batch, tokens = (size.batch or 2, size.tokens or 2048) if on_cuda else (size.batch or 1, size.tokens or 128)
    needs("transformers")
    model = llama(device, dtype, tokens, causal_attention())
    prompt = torch.randint(128256, (batch, tokens), device=device)

    def call(module: Call) -> Tensor:
        return module(prompt, use_cache=False, logits_to_keep=1).logits

    return inference("llama-prefill", model, call, BLOCKS, {"batch": batch, "tokens": tokens}, dtype)


def llama_decode(device: str, size: Size) -> Bench:
    """A decoder reads one more token, with a static cache of what came before."""
    on_cuda = device == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    batch, tokens = size.batch or 1, size.tokens or (1024 if on_cuda else 128)
    model: Any = llama(device, dtype, tokens + 1, "sdpa")  # with a mask for the empty rest of the cache
    prompt, token = torch.randint(128256, (batch, tokens + 1), device=device).split([tokens, 1], dim=1)
    position = torch.full((1, 1), tokens, device=device)

    def step(module: Call) -> Step:
        cache = needs("transformers").StaticCache(config=model.config, max_cache_len=tokens + 1)
        with torch.no_grad():
            model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)  # the bare model's: no step
        lengths = [layer.cumulative_length for layer in cache.layers]
        filled = [length.clone() for length in lengths]

        @torch.no_grad()
        def run() -> Tensor:
            torch._foreach_copy_(lengths, filled)  # the same token again: else the cache would be full soon
            return module(token, past_key_values=cache, position_ids=position, use_cache=True).logits

        return run

    sizes = {"batch": batch, "tokens": tokens}
    return Bench("llama-decode", model, step, lambda module: [step(module)()], BLOCKS, sizes, dtype)


def gpt2_train(device: str, size: Size) -> Bench:
    """One training step of GPT-2 124M: forward, backward, AdamW; bf16 autocast on CUDA."""
    transformers = needs("transformers")
    on_cuda = device == "cuda"
    batch, tokens = (size.batch or 8, size.tokens or 1024) if on_cuda else (size.batch or 1, size.tokens or 128)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**dropout, attn_implementation=causal_attention())
    with torch.device(device):
        model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(config.vocab_size, (batch, tokens), device=device)

    def loss_of(module: Call) -> Tensor:
        # No cache of casts: a CUDA graph could not hold it, and each weight is cast once per step anyway.
        with torch.autocast(device, torch.bfloat16, enabled=on_cuda, cache_enabled=False):
            return module(ids, labels=ids, use_cache=False).loss

    def step(module: Call) -> Step:
        # A rate of zero: the arithmetic of a step, and weights that stay what the other variants compute with.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True, capturable=on_cuda)

        def run() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(module)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    def outputs(module: nn.Module) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        loss = loss_of(module)
        loss.backward()
        found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        model.zero_grad(set_to_none=True)
        return found

    sizes = {"batch": batch, "tokens": tokens}
    return Bench("gpt2-train", model, step, outputs, BLOCKS, sizes, torch.float32, trains=True)


# ---------------------------------------------------------------- small models


def resnet50(device: str, size: Size) -> Bench:
    """ResNet-50 classifies images; channels_last and bf16 on CUDA."""
    on_cuda = device == "cuda"
    dtype, layout = (torch.bfloat16, torch.channels_last) if on_cuda else (torch.float32, torch.contiguous_format)
    batch, pixels = size.batch or (32 if on_cuda else 2), size.pixels or 224
    model = ResNet50().eval().to(device, dtype, memory_format=layout)
    images = torch.randn(batch, 3, pixels, pixels, device=device, dtype=dtype).to(memory_format=layout)
    sizes = {"batch": batch, "pixels": pixels}
    return inference("resnet50", model, lambda module: module(images), BLOCKS, sizes, dtype)


def mlp(device: str, size: Size) -> Bench:
    """A small classifier, where any fixed cost shows."""
    batch = size.batch or 128
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    model = model.eval().to(device)
    x = torch.randn(batch, 784, device=device)
    return inference("mlp", model, lambda module: module(x), LEAVES, {"batch": batch}, torch.float32)


def ffn(device: str, size: Size) -> Bench:
    """Feed-forward blocks 768-3072-768, as in GPT-2."""
    batch, tokens = size.batch or 8, size.tokens or 128
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = nn.Sequential(*(FeedForward(768) for _ in range(size.depth or 4))).eval().to(device, dtype)
    x = torch.randn(batch, tokens, 768, device=device, dtype=dtype)
    layers = {"blocks": FeedForward, **LEAVES}
    return inference("ffn", model, lambda module: module(x), layers, {"batch": batch, "tokens": tokens}, dtype)


OUTPUTS = {
    "4 KB": (1, 32, 32),
    "64 KB": (1, 128, 128),
    "1 MB": (1, 512, 512),
    "4 MB": (1, 1024, 1024),
    "16 MB": (4, 1024, 1024),
    "64 MB": (16, 1024, 1024),
}


def stack(device: str, size: Size) -> Bench:
    """Layers that do next to nothing, with float32 outputs of one size: the cost per layer."""
    output, depth = size.output or "1 MB", size.depth or 8
    x = torch.randn(OUTPUTS[output], device=device)
    sizes = {"output": output, "depth": depth}
    return inference("stack", Stack(depth).to(device), lambda module: module(x), {"layers": Add}, sizes, torch.float32)


BLOCKS = {"blocks": "blocks", **LEAVES}
MODELS: dict[str, Callable[[str, Size], Bench]] = {
    "sdxl": sdxl,
    "llama-prefill": llama_prefill,
    "llama-decode": llama_decode,
    "gpt2-train": gpt2_train,
    "resnet50": resnet50,
    "mlp": mlp,
    "ffn": ffn,
    "stack": stack,
}

# ---------------------------------------------------------------- making them


def inference(
    name: str,
    module: nn.Module,
    call: Callable[[Call], Tensor],
    layers: dict[str, Any],
    sizes: dict[str, int | str],
    dtype: torch.dtype,
) -> Bench:
    """A model whose step is one forward without gradients."""

    def step(module: Call) -> Step:
        @torch.no_grad()
        def run() -> Tensor:
            return call(module)

        return run

    return Bench(name, module, step, lambda module: [step(module)()], layers, sizes, dtype)


def materialise(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """Give a module on the meta device random weights that keep activations near unit size.

    One block of normal numbers is repeated, since drawing billions takes minutes on a CPU. Its
    length is prime, so that no two rows of a matrix are alike.
    """
    left = [name for name, _ in module.named_buffers()]
    if left:
        raise ValueError(f"buffers {left} would stay uninitialised: make them after this, on the device")
    module = nn.Module.to(module, dtype).to_empty(device=device).eval()  # diffusers' own `to` warns
    generator = torch.Generator().manual_seed(1)  # `build` seeds with 0: inputs must not be the weights' numbers
    noise = torch.randn(1_000_003, generator=generator).to(device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            scaled = (noise * (parameter.shape[0] / parameter.numel()) ** 0.5).to(dtype)
            for piece in parameter.view(-1).split(len(scaled)):
                piece.copy_(scaled[: len(piece)])
    return module


def needs(package: str) -> Any:
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise SystemExit(f"This model needs {error.name}: pip install -e '.[benchmark]'") from None
