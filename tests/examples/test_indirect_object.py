"""The example of names: on a circuit that is known, on one that is none, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from helpers.checkout import load_example
from helpers.circuits import indirect_object
from helpers.language_models import build

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["When", "and", "went", "to", "the", "store", ",", "gave", "a", "drink"]
#: Of the example's prompts, with the token that begins them.
LENGTH = 15
NAMES = ["Mary", "John", "Tom", "James", "Anna", "Paul", "Sarah", "David", "Emma", "Peter"]


def example(*arguments: object) -> None:
    load_example("indirect_object").main([str(each) for each in arguments])


def save(folder: Path, model: Any, vocabulary: dict[str, int]) -> Path:
    """A model, and a tokenizer of whole words that begins with `<s>`."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    begins = [("<s>", vocabulary["<s>"])]
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=begins)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>").save_pretrained(
        folder
    )
    model.save_pretrained(folder)
    return folder


def movers(out: str) -> list[str]:
    return out.splitlines()[-1].split(": ")[1].split(", ")


def test_the_heads_of_a_known_circuit_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = next(made for made in map(indirect_object, range(50)) if made.model.config.n_positions >= LENGTH)
    names, unknown = int(made.sample(200).right.max()), made.model.config.vocab_size - 1
    # All words but names are the same to this model.
    vocabulary = {"<s>": 0, **{name: 1 + at for at, name in enumerate(NAMES[:names])}, "<unk>": unknown}
    picture = tmp_path / "heads.png"
    example("--model", save(tmp_path / "model", made.model, vocabulary), "--plot", picture)
    out = capsys.readouterr().out
    assert "100% of 24 prompts have the name that came once before the other" in out
    assert "does not do the task" not in out
    # Both write where the answer is read; the head that finds the name again does so elsewhere.
    expected = [f"{made.site('z', head)}@-1" for head in ("inhibition", "mover")]
    assert sorted(movers(out)) == sorted(expected)
    assert picture.is_file()


def test_a_model_without_training_is_told_as_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = {word: at for at, word in enumerate(["<s>", "<unk>", *NAMES, *WORDS])}
    example("--model", save(tmp_path, build("gpt2"), vocabulary), "--pairs", 8)
    out = capsys.readouterr().out
    assert "So this model does not do the task" in out
    assert "Effects of 12 cells on logit difference, denoise, 8 pairs" in out


def unable(*arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        example(*arguments)
    return str(stopped.value)


def test_without_weights_it_says_what_it_needs() -> None:
    assert unable().startswith("This example needs weights: pass --model, a folder or an id")


@pytest.mark.data
def test_names_that_are_no_single_tokens_are_told(data: Path) -> None:
    why = unable("--model", data / "stories260k")
    assert why.startswith("Of 24 names, 2 are a single token for this tokenizer (Lily, Tim), and at least 4 are needed")


def test_unknown_names_are_no_tokens(tmp_path: Path) -> None:
    vocabulary = {word: at for at, word in enumerate(["<s>", "<unk>", "Mary", *WORDS])}
    arguments: Sequence[object] = ["--model", save(tmp_path, build("gpt2"), vocabulary), "--names", *NAMES]
    assert "Of 10 names, 1 are a single token for this tokenizer (Mary)" in unable(*arguments)
