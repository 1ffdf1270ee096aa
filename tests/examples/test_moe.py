"""The example of experts: which are chosen, with a tokenizer and without."""

from __future__ import annotations

import pytest
import transformers

from helpers.checkout import load_example
from helpers.language_models import build

pytestmark = pytest.mark.usefixtures("one_thread")


def example(*arguments: str) -> None:
    load_example("moe").main(arguments)


def test_text_with_a_tokenizer(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "glass", "moth", "in", "mauve", "twilight"]
    words += [f"word{index}" for index in range(99 - len(words))]
    vocabulary = {word: index for index, word in enumerate(words)}
    whole_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    whole_words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole_words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    build("mixtral").save_pretrained(tmp_path)
    plot = tmp_path / "load.png"
    example("--model", str(tmp_path), "--prompt", "a glass moth", "--new-tokens", "4", "--plot", str(plot))
    out = capsys.readouterr().out
    assert out.startswith("a glass moth word")
    assert "Routes of 4 steps x 3 routers, 4 experts each" in out
    assert "model.layers.2.mlp.gate: experts" in out
    assert "the prompt and its continuation differ most in model.layers." in out
    assert plot.is_file()


def test_token_ids_without_one(tmp_path, capsys):
    build("olmoe").save_pretrained(tmp_path)
    example("--model", str(tmp_path), "--prompt", "5 17 33", "--new-tokens", "3")
    out = capsys.readouterr().out
    assert out.startswith("[5, 17, 33, ")
    assert "Routes of 3 steps x 3 routers, 8 experts each" in out
