"""Language models of transformers: a prompt in, its text and its tokens out.

The model may be wrapped or not; what it computes is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import files
from ..errors import BadValue, MissingFile


class Prompt(NamedTuple):
    """A prompt as the model is fed with it: int64 ids [1, tokens], and each token as text."""

    ids: Tensor
    tokens: list[str]


def encode(tokenizer: Any, text: str, device: torch.device | str = "cpu") -> Prompt:
    """A prompt as a batch of one.

    Args:
        tokenizer: a tokenizer of transformers.
        text: the prompt.
        device: where the ids should lie.

    Raises:
        NoesisError: (a ValueError) when the tokenizer makes no token of it.
    """
    ids: list[int] = list(tokenizer(text)["input_ids"])
    if not ids:
        raise BadValue(f"the prompt {text!r} has no tokens", "a prompt with at least one token", "Write something")
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    return Prompt(torch.tensor([ids], device=device), tokens)


class Batch(NamedTuple):
    """Prompts as the model is fed with them: int64 arguments [prompts, tokens] by name, and the tokens as text."""

    inputs: dict[str, Tensor]
    tokens: list[list[str]]


def texts_of(given: str) -> list[str]:
    """A text, or the lines of the file that it names, without those that are blank.

    Raises:
        NoesisError: for a name that ends in `.txt` where no such file is.

    Examples:
        >>> from noesis.cli.prompts import texts_of
        >>> texts_of("Once upon a time")
        ['Once upon a time']
    """
    path = Path(given)
    if given.endswith(".txt") and not path.is_file():
        raise MissingFile(f"{given} is not there", "a file of texts, or a text", "Check the path")
    if len(given) >= 256 or not path.is_file():
        return [given]
    lines = files.read_bytes(path).decode("utf-8", "replace").splitlines()
    return [line for line in lines if line.strip()]


def encode_batch(tokenizer: Any, texts: Sequence[str], device: torch.device | str = "cpu") -> Batch:
    """Prompts as a batch, the shorter ones filled up after their end, which `attention_mask` says.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: the prompts.
        device: where the ids should lie.

    Raises:
        NoesisError: (a ValueError) for no prompt, and for one without tokens.
    """
    if not texts:
        raise BadValue("there is no prompt", "at least one", "Write some")
    prompts = [encode(tokenizer, text) for text in texts]
    size = max(prompt.ids.shape[1] for prompt in prompts)
    # What stands at padding is not looked at: any token will do.
    ids = torch.full((len(prompts), size), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : prompt.ids.shape[1]], mask[row, : prompt.ids.shape[1]] = prompt.ids[0], 1
    return Batch({"input_ids": ids.to(device), "attention_mask": mask.to(device)}, [each.tokens for each in prompts])


def token_of(tokenizer: Any, text: str, what: str) -> int:
    """The one token that a text is.

    Args:
        tokenizer: a tokenizer of transformers.
        text: such as `" Mary"`.
        what: what is said to be wrong otherwise, such as an option.

    Raises:
        NoesisError: (a ValueError) for a text of another number of tokens, with how it is cut, and for an unknown one.
    """
    ids: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    cut = ", ".join(repr(str(token)) for token in tokenizer.convert_ids_to_tokens(ids))
    if len(ids) != 1:
        raise BadValue(
            f"{what} {text!r} is {len(ids)} tokens for this tokenizer: {cut or 'none'}",
            "a text of one token",
            "Take another word, or mind the space before it, which often is a part of the token",
        )
    if ids[0] == tokenizer.unk_token_id:
        raise BadValue(f"{what} {text!r} is unknown to this tokenizer: {cut}", "a token of it", "Take another word")
    return ids[0]


def forward(model: Any, tokenizer: Any, text: str) -> list[str]:
    """Run the model once over a prompt; returns the tokens it was fed.

    Args:
        model: a causal language model, wrapped or not.
        tokenizer: its tokenizer.
        text: the prompt.
    """
    prompt = encode(tokenizer, text, model.device)
    with torch.inference_mode():
        model(input_ids=prompt.ids, attention_mask=torch.ones_like(prompt.ids), use_cache=False)
    return prompt.tokens


def generate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Let the model go on with a prompt; one forward for the prompt, then one per further token.

    Args:
        model: a causal language model, wrapped or not.
        tokenizer: its tokenizer.
        text: the prompt.
        max_new_tokens: the most tokens to add; 0 for the prompt's forward alone.
        temperature: 0 takes the likeliest token each time; above 0, tokens are drawn at this
            temperature, from what the checkpoint's own top_k and top_p leave.
        seed: of the draws, through `torch.manual_seed`.

    Returns:
        What was added to the prompt, as text.

    Raises:
        NoesisError: (a ValueError) when a number is out of range or the prompt has no tokens.
    """
    if max_new_tokens < 0:
        raise BadValue(f"max_new_tokens={max_new_tokens}", "a whole number from 0", "0 runs the prompt alone")
    if not temperature >= 0:
        raise BadValue(f"temperature={temperature}", "a number from 0", "0 takes the likeliest token")
    if max_new_tokens == 0:
        forward(model, tokenizer, text)
        return ""
    prompt = encode(tokenizer, text, model.device)
    # Without sampling, a checkpoint's own sampling options would only be warned about.
    drawing: dict[str, Any] = {"temperature": temperature or None}
    if not temperature:
        drawing |= {"top_p": None, "top_k": None}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else model.generation_config.eos_token_id
    if temperature:
        torch.manual_seed(seed)
    output = model.generate(
        input_ids=prompt.ids,
        attention_mask=torch.ones_like(prompt.ids),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        pad_token_id=padding[0] if isinstance(padding, (list, tuple)) else padding,
        **drawing,
    )
    # Decoded on their own, the added tokens would lose the space in front of the first word.
    before, after = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt.ids[0], output[0]))
    return str(after[len(before) :])
