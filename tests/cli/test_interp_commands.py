"""`noesis interp`: what it prints is what the library says of the same inputs, and what it cannot do is told."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpers.checkout import ROOT
from helpers.commands import Run
from helpers.language_models import build
from noesis import interp
from noesis.cli import command_line as cli
from noesis.cli import models
from noesis.cli.prompts import encode_batch

pytestmark = pytest.mark.usefixtures("one_thread")

GIRL = "Lily was a little girl. She had a toy. One day"
BOY = "Timmy was a little boy. He had a toy. One day"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with random weights, and a tokenizer of whole words with an unknown one."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt2")
    words = [
        "<pad>",
        "<unk>",
        *["the", "girl", "boy", "saw", "a", "dog", "and", "went", "home", "with", "her", "his", "toy"],
    ]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)
    build("gpt2").save_pretrained(folder)
    return folder


def loaded(folder: Path) -> tuple[Any, Any]:
    return models.load_language_model(str(folder), "cpu")


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("anatomy --model m --prompt p --device cpu --dtype float32 --json", "interp anatomy"),
        ("lens --model m --prompts f --tokens a b --plot f.png --out f.json --force --json", "interp lens"),
        ("heads --model m --kind first --seed 1 --plot f.png --out f.safetensors --force --json", "interp heads"),
        (
            (
                "patch --model m --clean a --corrupted b --right c --wrong d --sites z attn.3 --positions -1 3 "
                "--direction noise --plot f.png --out f.json --force --json --device cpu --dtype float32"
            ),
            "interp patch",
        ),
        (
            (
                "circuit --model m --clean a --corrupted b --right c --wrong d --method acdc --size 3 --level nodes "
                "--faithfulness 0.9 --ablation mean --seed 1 --plot f.png --out f.json --force --json"
            ),
            "interp circuit",
        ),
    ],
)
def test_commands_and_their_options(line: str, command: str) -> None:
    assert cli._parser().parse_args(["interp", *line.split()]).command == command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("lens --model m", "one of the arguments --prompt --prompts is required"),
        ("lens --model m --prompt a --prompts b", "argument --prompts: not allowed with argument --prompt"),
        ("patch --model m --clean a --corrupted b --right c", "the following arguments are required: --wrong"),
        ("heads --model m --kind fast", "argument --kind: invalid choice: 'fast'"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(run: Run, line: str, message: str) -> None:
    done = run("interp", *line.split())
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_anatomy(run: Run, gpt2: Path) -> None:
    line = ["interp", "anatomy", "--model", gpt2, "--prompt", "the girl saw a dog"]
    model, tokenizer = loaded(gpt2)
    found = interp.anatomy(model, **encode_batch(tokenizer, ["the girl saw a dog"]).inputs)
    assert run(*line).out == f"{found!r}\n"
    listed = json.loads(run(*line, "--json").out)
    assert (listed["norm"], listed["unembed"], listed["refused"]) == ("transformer.ln_f", "lm_head", {})
    assert [block["heads"] for block in listed["blocks"]] == [4, 4, 4]
    assert all(check["holds"] and check["error"] < check["bound"] for check in listed["blocks"][2]["checks"])
    assert listed["blocks"][0]["checks"][0]["identity"] == found.blocks[0].checks[0].identity


@pytest.mark.data
def test_lens_of_prompts_of_two_lengths(run: Run, llama: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n\nLily had\n")
    out, picture = tmp_path / "lens.safetensors", tmp_path / "lens.png"
    line = ["interp", "lens", "--model", llama, "--prompts", prompts, "--tokens", "there", "She"]
    done = run(*line, "--out", out, "--plot", picture)
    assert done.code == 0, done.err
    assert f"noesis: wrote {out}\nnoesis: wrote {picture}\n" in done.err
    model, tokenizer = loaded(llama)
    there, she = tokenizer.convert_tokens_to_ids(["▁there", "▁She"])
    assert f"rank of {there}" in done.out
    assert f"\n{there}: 'there'\n{she}: 'She'\n" in done.out
    assert "after '▁time', the last token of the first prompt:\n" in done.out
    saved = interp.Lens.load(out)
    assert saved.tokens == [there, she]
    # Each prompt is what it is by itself; padding has no value.
    for row, text in enumerate(["Once upon a time", "Lily had"]):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        alone = interp.logit_lens(model, ids, tokens=[there, she], next_tokens=ids[:, 1:], k=3)
        size = ids.shape[1]
        np.testing.assert_allclose(saved.kl[:, row, :size], alone.kl[:, 0], atol=1e-5)
        np.testing.assert_allclose(saved.nll[:, row, :size], alone.nll[:, 0], atol=1e-4)
        assert np.isnan(saved.kl[:, row, size:]).all()
        if row == 0:
            best = tokenizer.decode([alone.top()[-1][0].token])
            assert done.out.splitlines()[-1].split()[1] == repr(best)
    printed = json.loads(run(*line, "--json").out)
    np.testing.assert_array_equal(np.array(printed["rank"], float).ravel(), saved.rank.ravel())


@pytest.mark.data
def test_heads_on_prompts(run: Run, llama: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "heads.json"
    prompts.write_text("Lily had a toy. Lily had a ball.\nTim saw a dog. Tim saw a cat.\n")
    done = run("interp", "heads", "--model", llama, "--prompts", prompts, "--out", out, "--plot", tmp_path / "h.png")
    assert done.code == 0, done.err
    model, tokenizer = loaded(llama)
    expected = interp.heads(model, encode_batch(tokenizer, prompts.read_text().splitlines()).inputs)
    assert done.out == f"{expected!r}\n"
    np.testing.assert_array_equal(interp.HeadScores.load(out)["previous"], expected["previous"])
    assert (tmp_path / "h.png").is_file()


@pytest.mark.data
@pytest.mark.slow
def test_heads_on_random_tokens(run: Run, llama: Path) -> None:
    done = run("interp", "heads", "--model", llama, "--json")
    scores = json.loads(done.out)
    assert scores["rows"] == 16
    assert "random tokens" in scores["meta"]["read"]


@pytest.mark.data
def test_patch(run: Run, llama: Path, tmp_path: Path) -> None:
    clean, corrupted, right = (tmp_path / f"{name}.txt" for name in ("clean", "corrupted", "right"))
    clean.write_text(f"{GIRL}\nLily had a toy\n")
    corrupted.write_text(f"{BOY}\nTim had a toy\n")
    right.write_text("She\nher\n")
    out, picture = tmp_path / "effects.safetensors", tmp_path / "effects.png"
    line = ["interp", "patch", "--model", llama, "--clean", clean, "--corrupted", corrupted, "--right", right]
    line += ["--wrong", "his", "--sites", "z", "--positions", "1", "--direction", "noise"]
    done = run(*line, "--out", out, "--plot", picture)
    assert done.code == 0, done.err
    model, tokenizer = loaded(llama)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("▁She", "▁her", "▁his")}
    one, other = (encode_batch(tokenizer, texts).inputs for texts in ([GIRL, "Lily had a toy"], [BOY, "Tim had a toy"]))
    metric = interp.logit_difference([ids["▁She"], ids["▁her"]], ids["▁his"])
    expected = interp.patch(model, one, other, metric, sites="z", positions=[1], direction="noise")
    assert done.out == f"{expected!r}\n"
    saved = interp.Effects.load(out)
    np.testing.assert_array_equal(saved.patched, expected.patched)
    assert saved.meta["clean"] == [GIRL, "Lily had a toy"]
    assert picture.is_file()
    assert json.loads(run(*line, "--json").out)["direction"] == "noise"


def test_circuit(run: Run, gpt2: Path, tmp_path: Path) -> None:
    clean, corrupted = tmp_path / "clean.txt", tmp_path / "corrupted.txt"
    clean.write_text("the girl saw a dog\nthe girl saw the toy\na girl went\nthe girl went\n")
    corrupted.write_text(clean.read_text().replace("girl", "boy"))
    out, picture = tmp_path / "circuit.safetensors", tmp_path / "circuit.png"
    line = ["interp", "circuit", "--model", gpt2, "--clean", clean, "--corrupted", corrupted, "--right", "her"]
    line += ["--wrong", "his", "--level", "nodes", "--size", 4, "--seed", 3]
    done = run(*line, "--out", out, "--plot", picture)
    assert done.code == 0, done.err
    model, tokenizer = loaded(gpt2)
    texts = [*clean.read_text().splitlines(), *corrupted.read_text().splitlines()]
    inputs = encode_batch(tokenizer, texts).inputs
    one, other = ({name: each[rows] for name, each in inputs.items()} for rows in (slice(4), slice(4, 8)))
    metric = interp.logit_difference(*tokenizer.convert_tokens_to_ids(["her", "his"]))
    expected = interp.circuit(model, one, other, metric, level="nodes", size=4, seed=3)
    assert done.out == f"{expected!r}\n"
    np.testing.assert_array_equal(interp.Circuit.load(out).scores, expected.scores)
    assert picture.is_file()
    assert json.loads(run(*line, "--json").out)["level"] == "nodes"


def patch(run: Run, model: Path, **options: object) -> str:
    """What is said of a patch that cannot be done."""
    given = {"clean": "the girl saw", "corrupted": "the boy saw", "right": "her", "wrong": "his"} | options
    done = run(
        "interp", "patch", "--model", model, *(each for name, value in given.items() for each in (f"--{name}", value))
    )
    assert (done.code, done.out) == (2, "")
    return done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"right": "her dog"},
            "--right 'her dog' is 2 tokens for this tokenizer: 'her', 'dog'. Expected a text of one",
        ),
        ({"wrong": "castle"}, "--wrong 'castle' is unknown to this tokenizer: '<unk>'"),
        (
            {"clean": "the girl saw a dog"},
            "pair 0 has 5 tokens clean and 3 corrupted: ['the', 'girl', 'saw', 'a', 'dog'] and ['the', 'boy', 'saw']",
        ),
        ({"positions": "last"}, "--positions last. Expected each, all, or whole numbers"),
        ({"sites": "zz"}, "zz"),
        ({"right": "her", "wrong": "her"}, "clean and corrupted have the same metric in all 1 pair"),
        ({"clean": "missing.txt"}, "missing.txt is not there"),
    ],
)
def test_pairs_that_cannot_be_patched(run: Run, gpt2: Path, options: dict[str, object], message: str) -> None:
    assert message in patch(run, gpt2, **options)


@pytest.mark.data
@pytest.mark.slow
def test_the_page_shows_what_is_printed(run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for numbers, which round differently on other processors."""
    things = ["toy", "ball", "dog", "cat", "book", "car", "hat", "box"]
    monkeypatch.chdir(tmp_path)
    for name, text in {"clean": GIRL, "corrupted": BOY.replace("Timmy", "Tim")}.items():
        Path(f"{name}.txt").write_text("".join(f"{text.replace('toy', thing)}\n" for thing in things))
    Path("stories260k").symlink_to(llama)
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    shown = re.findall(r"```bash\nnoesis (interp [^`]+)```\n\n```text\n([^`]+)```", page)
    assert len(shown) == 3
    for line, expected in shown:
        done = run(*shlex.split(line.replace("\\\n", "")))
        assert re.findall(r"[^\W\d]+", done.out) == re.findall(r"[^\W\d]+", expected)
    assert {"effects.png", "effects.json", "heads.png"} <= {path.name for path in tmp_path.iterdir()}


def test_files_that_do_not_fit_together(run: Run, gpt2: Path, tmp_path: Path) -> None:
    two, three = tmp_path / "two", tmp_path / "three"
    two.write_text("the girl saw\nthe girl went\n")
    three.write_text("her\nhis\ntoy\n")
    assert "--clean has 2 prompts and --corrupted 1" in patch(run, gpt2, clean=two)
    ragged = tmp_path / "ragged"
    ragged.write_text("the girl saw\nthe girl saw a dog\n")
    why = patch(run, gpt2, clean=ragged, corrupted=ragged, positions=-1)
    assert "--positions -1 of prompts with 3 to 5 tokens" in why
    assert "--right has 3 tokens for 2 pairs" in patch(run, gpt2, clean=two, corrupted=two, right=three)


def test_what_is_there_is_not_replaced(run: Run, gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "lens.json"
    out.write_text("mine")
    line = ["interp", "lens", "--model", gpt2, "--prompt", "the girl saw", "--out", out]
    done = run(*line)
    assert done.code == 2
    assert f"{out} is there already" in done.err
    assert out.read_text() == "mine"
    assert run(*line, "--force").code == 0
    assert interp.Lens.load(out).positions == [0, 1, 2]


def test_prompts_are_a_file_with_something_in_it(run: Run, gpt2: Path, tmp_path: Path) -> None:
    line = ["interp", "anatomy", "--model", gpt2, "--prompts"]
    assert "--prompts the girl saw is no file" in run(*line, "the girl saw").err
    (tmp_path / "empty").write_text("\n")
    assert "there is no prompt" in run(*line, tmp_path / "empty").err


def test_padding_is_told_by_the_mask(gpt2: Path) -> None:
    _, tokenizer = loaded(gpt2)
    batch = encode_batch(tokenizer, ["the girl saw a dog", "the boy"])
    assert batch.inputs["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch.inputs["input_ids"][1].tolist() == [2, 4, 0, 0, 0]
    assert batch.tokens == [["the", "girl", "saw", "a", "dog"], ["the", "boy"]]
    assert batch.inputs["input_ids"].dtype == torch.int64
