"""The command line, run as people and scripts run it: real models from disk, files, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
import transformers

import noesis
from helpers.commands import Run
from helpers.language_models import build as build_language_model
from helpers.pipelines import PROMPT, build
from helpers.processes import environment, python
from noesis.cli import command_line as cli
from noesis.cli import models
from noesis.cli import prompts as language_models
from noesis.results import loading

pytestmark = pytest.mark.usefixtures("one_thread")

ONCE = "Once upon a time, there was a little girl"


def kind_of_image(path: Path) -> str | None:
    with PIL.Image.open(path) as image:
        return image.format


@pytest.fixture(scope="module")
def changed_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one weight of layer 3 scaled."""
    model, tokenizer = models.load_language_model(str(llama), "cpu")
    model.get_submodule("model.layers.3.mlp.down_proj").weight.data.mul_(1.3)
    folder = tmp_path_factory.mktemp("changed")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixture-of-Experts model with random weights, and the tokenizer of the trained one."""
    folder = tmp_path_factory.mktemp("mixtral")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    model = build_language_model("mixtral")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion XL with random weights."""
    folder = tmp_path_factory.mktemp("sdxl")
    build("sdxl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def v01(data: Path) -> Path:
    """Two runs written by noesis v0.1."""
    return data / "noesis_v01"


SMALL = ["--prompt", PROMPT, "--steps", 2, "--height", 32, "--width", 32]


# ---------------------------------------------------------------- the package


def test_help_is_instant_and_needs_no_torch() -> None:
    code = "import sys, noesis.cli; noesis.cli.main({}); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    times = []
    for argv in (["--help"], ["compare", "--help"], ["--version"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python("-c", code.format(argv))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # its own seconds, not those of a busy machine
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert "noesis" in done.stdout
    assert min(times) < 0.5


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'noesis' has no attribute 'warp'"):
        noesis.warp  # noqa: B018


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (
            (
                "trace --model m --prompt p --negative-prompt n --steps 3 --guidance 5 --height 64 --width 64 "
                "--seed 1 --device auto --dtype float16 --layers blocks re:^down --per-sample --out d --format json "
                "--single-file --no-gzip --image i.png --max-new-tokens 3 --temperature 1 --json"
            ),
            "trace",
        ),
        ("trace-llm --model m --prompt p", "trace"),
        ("summarize t --out f.json --run r --step 1 --json", "summarize"),
        ("unet-summarize t --out f.json", "summarize"),
        ("compare a b --top 25 --baseline d --csv f --json f.json --plot f.png --fail-over 0.1", "compare"),
        ("compare-unet-soulprints a b --top 10 --csv f", "compare"),
        ("soulprint-compare a b --run-a x --run-b y --json", "compare"),
        (
            (
                "diff a b --prompts p --layers all --dtype-a float32 --dtype-b bfloat16 --adapter-b l --device cpu "
                "--baseline 2 --match-order --seed 1 --steps 3 --plot f.png --force --json --fail-over 0.1"
            ),
            "diff",
        ),
        ("tokens --model m --a x --b y --plot f.png --layers all --threshold 0.1 --json", "tokens"),
        ("routes --model m --prompt p --out f.json --plot f.png --json", "routes"),
        ("trace-moe --model m --prompt p", "routes"),
        ("layers --model m --layers linear --json", "layers"),
        ("demo --out d --force", "demo"),
        ("show t --run r --plot f.png --force --json", "show"),
    ],
)
def test_commands_and_their_options(line: str, command: str) -> None:
    assert cli._parser().parse_args(line.split()).command == command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("compare a b --fail-over -1", "argument --fail-over: '-1' is no number from 0"),
        ("compare a b --fail-over nan", "argument --fail-over: 'nan' is no number from 0"),
        ("compare a b --top 0", "argument --top: '0' is no whole number from 1 to"),
        ("compare --json a b", "argument --json: 'a' does not end in .json or .json.gz; to print, put --json last"),
        ("trace --model m --prompt p --seed 1.5", "argument --seed: '1.5' is no whole number from 0 to"),
        ("trace --model m --prompt p --steps 99999999999", "is no whole number from 1 to 1048576"),
        ("trace --model m", "the following arguments are required: --prompt"),
        ("trace --model m --prompt p --out-dir d", "unrecognized arguments: --out-dir"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(run: Run, line: str, message: str) -> None:
    done = run(*line.split())
    assert (done.code, done.out) == (2, "")
    assert message in done.err


# ---------------------------------------------------------------- trace: language models


@pytest.mark.data
def test_trace_of_a_language_model(run: Run, llama: Path, tmp_path: Path) -> None:
    done = run("trace", "--model", llama, "--prompt", ONCE, "--max-new-tokens", 6, "--out", tmp_path)
    assert done.code == 0
    assert re.match(r"Trace of 6 steps x 5 layers x 7 stats, \S+ m?s per step\n", done.out)
    trace, soulprint = noesis.Trace.load(tmp_path), noesis.Soulprint.load(tmp_path)
    assert f"noesis: wrote {tmp_path / 'trace.safetensors'}" in done.err
    assert f"noesis: wrote {tmp_path / 'soulprint.safetensors'}" in done.err
    np.testing.assert_array_equal(soulprint.vector, trace.soulprint().vector)
    assert trace.batches.tolist() == [1] * 6
    assert trace["count"][:, 0].tolist() == [64 * 13, *[64] * 5]  # the prompt has 13 tokens, of width 64
    meta = trace.meta
    assert (meta["prompt"], meta["model"], meta["seed"]) == (ONCE, str(llama), 0)
    assert (meta["class"], meta["dtype"], meta["layers"]) == ("LlamaForCausalLM", "float32", "blocks")
    assert meta["generated"].startswith(" named")
    assert f"generated: {meta['generated']!r}\n" in done.out
    versions = (meta["noesis_version"], meta["torch_version"], meta["transformers_version"])
    assert versions == (noesis.__version__, torch.__version__, transformers.__version__)


@pytest.mark.data
def test_the_text_is_that_of_the_model_itself(llama: Path) -> None:
    model, tokenizer = models.load_language_model(str(llama), "cpu")
    ids = tokenizer(ONCE, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    before = torch.get_rng_state()
    wrapped = noesis.wrap(model)
    assert ONCE + language_models.generate(wrapped, tokenizer, ONCE, max_new_tokens=12, seed=5) == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.data
def test_no_new_token_is_the_forward_of_the_prompt(run: Run, llama: Path, tmp_path: Path) -> None:
    done = run("trace", "--model", llama, "--prompt", ONCE, "--max-new-tokens", 0, "--out", tmp_path)
    trace = noesis.Trace.load(tmp_path)
    assert (done.code, len(trace), trace.meta["generated"]) == (0, 1, "")
    assert trace["count"].tolist() == [[64 * 13] * 5]


@pytest.mark.data
@pytest.mark.slow
def test_more_tokens_than_the_ring_of_wrap_holds(run: Run, llama: Path, tmp_path: Path) -> None:
    run("trace", "--model", llama, "--prompt", ONCE, "--max-new-tokens", 300, "--layers", "norm", "--out", tmp_path)
    trace = noesis.Trace.load(tmp_path)
    assert (len(trace), trace.dropped_steps) == (300, 0)


@pytest.mark.data
def test_drawn_tokens_follow_the_seed(run: Run, llama: Path, tmp_path: Path) -> None:
    def text(seed: int) -> str:
        options = ["--max-new-tokens", 12, "--temperature", 1.5, "--seed", seed]
        run("trace", "--model", llama, "--prompt", ONCE, "--out", tmp_path, "--force", *options)
        generated: str = noesis.Trace.load(tmp_path).meta["generated"]
        return generated

    assert text(1) == text(1) != text(2)


@pytest.mark.data
def test_trace_prints_json_and_nothing_else(run: Run, llama: Path, tmp_path: Path) -> None:
    done = run("trace", "--model", llama, "--prompt", ONCE, "--max-new-tokens", 2, "--out", tmp_path, "--json")
    path = tmp_path / "printed.json"
    path.write_text(done.out)
    printed, written = noesis.Trace.load(path), noesis.Trace.load(tmp_path / "trace.safetensors")
    np.testing.assert_array_equal(printed.values, written.values)
    assert printed.meta == written.meta


@pytest.mark.data
def test_layers_dtype_and_samples_of_a_trace(run: Run, llama: Path, tmp_path: Path) -> None:
    options = ["--layers", "layers.3.mlp.down_proj", "norm", "--dtype", "bfloat16", "--per-sample"]
    done = run("trace", "--model", llama, "--prompt", ONCE, "--max-new-tokens", 2, "--out", tmp_path, *options)
    assert done.code == 0
    trace = noesis.Trace.load(tmp_path)
    assert trace.layers[6] == "model.layers.3.mlp.down_proj"
    assert len(trace.layers) == 12  # two norms per block, the last one, and the projection
    assert trace.meta["dtype"] == "bfloat16"
    assert len(trace.samples) == 1
    sample = noesis.Soulprint.load(tmp_path / "soulprint_sample0.safetensors")
    np.testing.assert_array_equal(sample.vector, noesis.Soulprint.load(tmp_path).vector)


@pytest.mark.data
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["soulprint.json", *(f"unet_trace_RUN_step00{step}.json.gz" for step in range(3))]),
        (["--no-gzip"], ["soulprint.json", *(f"unet_trace_RUN_step00{step}.json" for step in range(3))]),
        (["--single-file"], ["soulprint.json", "unet_trace_RUN.json.gz"]),
        (["--single-file", "--no-gzip"], ["soulprint.json", "unet_trace_RUN.json"]),
    ],
)
def test_the_files_of_v01(run: Run, llama: Path, tmp_path: Path, options: list[str], names: list[str]) -> None:
    plain, old = tmp_path / "plain", tmp_path / "old"
    for out, form in ((plain, []), (old, ["--format", "json", *options])):
        assert run("trace", "--model", llama, "--prompt", ONCE, "--max-new-tokens", 3, "--out", out, *form).code == 0
    trace, expected = noesis.Trace.load(old), noesis.Trace.load(plain)
    found = sorted(path.name.replace(trace.meta["run"], "RUN") for path in old.iterdir())
    assert found == names
    np.testing.assert_array_equal(trace["std"], expected["std"])
    np.testing.assert_array_equal(noesis.Soulprint.load(old).vector, expected.soulprint().vector)
    assert (trace.layers, trace.meta["prompt"]) == (expected.layers, ONCE)


@pytest.mark.data
def test_two_runs_in_one_folder_are_told_apart(run: Run, llama: Path, tmp_path: Path) -> None:
    for prompt in ("Tom had a ball", "The sun was hot"):
        options = ["--max-new-tokens", 2, "--format", "json", "--force", "--out", tmp_path]  # soulprint.json is one
        assert run("trace", "--model", llama, "--prompt", prompt, *options).code == 0
    done = run("summarize", tmp_path)
    assert done.code == 2
    assert "holds 2 runs" in done.err
    first, second = re.findall(r"'([0-9a-f]{12})'", done.err)
    assert run("summarize", tmp_path, "--run", first).code == 0
    done = run("compare", tmp_path, tmp_path, "--run-a", first, "--run-b", second, "--json")
    assert json.loads(done.out)["distance"] > 0
    assert [json.loads(done.out)["meta"][name]["run"] for name in "ab"] == [first, second]


@pytest.mark.data
def test_files_of_v01_do_not_hide_behind_a_trace(run: Run, llama: Path, tmp_path: Path) -> None:
    line = ["trace", "--model", llama, "--prompt", ONCE, "--max-new-tokens", 1, "--out", tmp_path]
    assert run(*line).code == 0
    done = run(*line, "--format", "json")
    assert done.code == 2
    assert f"{tmp_path} holds trace.safetensors of another run" in done.err


# ---------------------------------------------------------------- trace: diffusion


def test_trace_of_a_pipeline(run: Run, sdxl: Path, tmp_path: Path) -> None:
    image = tmp_path / "moth.png"
    options = [*SMALL, "--negative-prompt", "blurry", "--guidance", 4, "--seed", 7, "--image", image]
    done = run("trace", "--model", sdxl, "--out", tmp_path / "out", *options)
    assert done.code == 0
    assert done.out.startswith("Trace of 2 steps x 16 layers x 7 stats\n")
    trace = noesis.Trace.load(tmp_path / "out")
    known = {
        "prompt": PROMPT,
        "negative_prompt": "blurry",
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "height": 32,
        "width": 32,
        "seed": 7,
        "model": str(sdxl),
        "pipeline": "StableDiffusionXLPipeline",
        "scheduler": "EulerDiscreteScheduler",
        "diffusers_version": diffusers.__version__,
    }
    assert {name: trace.meta.get(name) for name in known} == known
    assert trace.branches == ["uncond+cond"] * 2
    assert np.isfinite(trace.timesteps).all()

    pipe = models.load_pipeline(str(sdxl), "cpu")
    asked = {"negative_prompt": "blurry", "num_inference_steps": 2, "guidance_scale": 4.0, "height": 32, "width": 32}
    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(7), **asked).images[0]
    with PIL.Image.open(image) as written:
        assert np.array_equal(np.asarray(written), np.asarray(expected))


def test_seeds_and_samples_of_a_pipeline(run: Run, sdxl: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in "abc"]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        assert run("trace", "--model", sdxl, *SMALL, "--per-sample", "--seed", seed, "--out", out).code == 0
    a, b, c = (noesis.Trace.load(out) for out in outs)
    assert noesis.compare(a, b).first_divergence is None
    assert noesis.compare(a, c).first_divergence is not None
    halves = [noesis.Soulprint.load(outs[0] / f"soulprint_sample{index}.safetensors") for index in range(2)]
    assert noesis.compare(*halves).distance > 0  # with and without the prompt


def test_a_pipeline_writes_the_files_of_v01(run: Run, sdxl: Path, tmp_path: Path) -> None:
    done = run("trace", "--model", sdxl, *SMALL, "--layers", "unet", "--format", "json", "--out", tmp_path)
    assert done.code == 0
    steps = sorted(path.name[-15:] for path in tmp_path.glob("unet_trace_*"))
    assert steps == ["step000.json.gz", "step001.json.gz"]
    assert json.loads((tmp_path / "soulprint.json").read_text())["type"] == "sdxl_unet_soulprint"


def test_options_a_pipeline_does_not_take(run: Run, tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    done = run("trace", "--model", tmp_path, "--prompt", "x")
    assert done.code == 2
    assert "--prompt is given, and DDPMPipeline takes no prompt." in done.err


def test_what_a_pipeline_refuses_is_told_in_one_line(run: Run, sdxl: Path, tmp_path: Path) -> None:
    done = run("trace", "--model", sdxl, "--prompt", "x", "--steps", 1, "--height", 33, "--out", tmp_path)
    assert done.code == 2
    assert "error: StableDiffusionXLPipeline cannot run with these options (`height` and `width` have to be" in done.err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def runs(llama: Path, changed_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the model over eight of its stories (`baseline/`), of the changed one over others (`fresh/`).

    And of both over the same prompt: `a` and `again`, `b`.
    """
    folder = tmp_path_factory.mktemp("runs")
    loaded = {
        name: models.load_language_model(str(path), "cpu") for name, path in (("ok", llama), ("bad", changed_llama))
    }
    model, tokenizer = loaded["ok"]
    torch.manual_seed(0)
    ids = model.generate(
        **tokenizer("The", return_tensors="pt"), max_new_tokens=90, num_return_sequences=12, do_sample=True
    )
    stories = tokenizer.batch_decode(ids, skip_special_tokens=True)
    for name, texts in (("ok", stories[:8]), ("bad", stories[8:])):
        model, tokenizer = loaded[name]
        wrapped = noesis.wrap(model, layers="linear")
        for index, text in enumerate(texts):
            with wrapped.run(prompt=text):
                language_models.forward(wrapped, tokenizer, text)
            wrapped.trace().save(folder / ("baseline" if name == "ok" else "fresh") / str(index) / "trace.safetensors")
    for model, name in ((llama, "a"), (llama, "again"), (changed_llama, "b")):
        options = ["--max-new-tokens", "4", "--layers", "linear", "--out", str(folder / name)]
        assert cli.main(["trace", "--model", str(model), "--prompt", ONCE, *options]) == 0
    return folder


@pytest.mark.data
def test_compare_names_the_layer_that_changed(run: Run, runs: Path) -> None:
    done = run("compare", runs / "a", runs / "b", "--top", 3)
    assert done.code == 0
    assert "first divergence: step 0, layer model.layers.3.mlp.down_proj (" in done.out
    assert "different meta: model " in done.out
    assert len(done.out.splitlines()) == 3 + 1 + 3
    same = run("compare", runs / "a", runs / "again")
    assert "distance 0," in same.out
    assert "first divergence" not in same.out


@pytest.mark.data
def test_compare_with_a_baseline(run: Run, runs: Path) -> None:
    fresh = sorted((runs / "fresh").iterdir())
    line = ["compare", runs / "baseline" / "0", *fresh, "--baseline", runs / "baseline"]
    done = run(*line, "--json")
    assert "noesis: the baseline has 8 runs" in done.err
    result = json.loads(done.out)
    assert result["baseline"] == 8
    assert [row["layer"] for row in result["rows"] if row["changed"]] == ["model.layers.3.mlp.down_proj"]
    assert "(false discovery rate 0.01)" in run(*line, "--alpha", 0.01).out
    assert "b is 4 runs. Expected one run, or several together with baseline" in run(*line[:-2]).err


@pytest.mark.data
def test_fail_over(run: Run, runs: Path) -> None:
    distance = json.loads(run("compare", runs / "a", runs / "b", "--json").out)["distance"]
    assert run("compare", runs / "a", runs / "b", "--fail-over", distance).code == 0
    done = run("compare", runs / "a", runs / "b", "--fail-over", 0.9 * distance)
    assert done.code == 1
    assert f"noesis: the distance {distance:.4g} is over {0.9 * distance:g}" in done.err
    assert run("compare", runs / "a", runs / "again", "--fail-over", 0).code == 0


def test_fail_over_lets_no_nan_through(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = noesis.Soulprint([0.0], [1.0], ["conv"]).save(tmp_path / "a.json")
    # No pair of soulprints is known to give NaN; if one ever does, CI has to go red.
    monkeypatch.setattr("noesis.cli.commands.compare", lambda *_, **__: noesis.Comparison([], 1.0, float("nan")))
    assert run("compare", path, path, "--fail-over", 1).code == 1


@pytest.mark.data
def test_what_compare_writes(run: Run, runs: Path, tmp_path: Path) -> None:
    files = {flag: tmp_path / name for flag, name in (("--json", "c.json"), ("--csv", "c.csv"), ("--plot", "c.png"))}
    done = run("compare", runs / "a", runs / "b", *(each for pair in files.items() for each in pair))
    assert done.code == 0
    assert done.out.startswith("Comparison of 36 layers")
    assert all(f"noesis: wrote {path}" in done.err for path in files.values())
    assert noesis.Comparison.load(files["--json"]).rows[0].layer in done.out
    assert len(files["--csv"].read_text().splitlines()) == 1 + 36
    assert kind_of_image(files["--plot"]) == "PNG"


@pytest.mark.data
@pytest.mark.parametrize("name", ["", "soulprint.json"])
def test_compare_runs_of_v01(run: Run, v01: Path, name: str) -> None:
    done = run("compare", v01 / "run_a" / name, v01 / "run_b" / name)
    assert done.code == 0
    assert done.out.startswith("Comparison of 403 layers: distance 0.0201, cosine 0.99991\n")
    assert ("first divergence" in done.out) == (name == "")  # a soulprint has no steps


def test_a_soulprint_against_a_trace(run: Run, tmp_path: Path) -> None:
    wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    wrapped(torch.randn(8, 4))
    wrapped.trace().save(tmp_path / "a.json.gz")
    wrapped.soulprint().save(tmp_path / "b.safetensors")
    done = run("compare", tmp_path / "a.json.gz", tmp_path / "b.safetensors", "--fail-over", 0)
    assert done.code == 0
    assert "first divergence" not in done.out


def test_the_runs_of_a_folder(tmp_path: Path) -> None:
    def soulprint(run: str | None) -> noesis.Soulprint:
        return noesis.Soulprint([0.0], [1.0], ["conv"], meta={} if run is None else {"run": run})

    wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    wrapped(torch.randn(8, 4))
    trace = wrapped.trace()
    trace.save(tmp_path / "one" / "trace.safetensors")
    trace.soulprint().save(tmp_path / "one" / "soulprint.safetensors")  # no run of its own
    trace.save(tmp_path / "one" / "copy.json")  # nor this
    trace.meta["run"] = "old"
    trace.save_v01(tmp_path / "two")
    trace.meta["run"] = "older"
    trace.save_v01(tmp_path / "two")
    soulprint("x").save(tmp_path / "x.json")
    soulprint(None).save(tmp_path / "y.safetensors")
    soulprint(None).save(tmp_path / "z.safetensors")
    soulprint("deep").save(tmp_path / "one" / "two" / "deep.json")  # too deep
    noesis.compare(soulprint("a"), soulprint("b")).save(tmp_path / "comparison.json")  # no run
    (tmp_path / "notes.txt").write_text("no run")
    (tmp_path / "config.json").write_text('{"values": {"a": "b"}, "means": null}')  # numbers of another kind
    found = loading.load_runs(tmp_path)
    assert [(type(each).__name__, each.meta.get("run") in ("old", "older")) for each in found] == [
        *[("Soulprint", False)] * 3,
        ("Trace", False),
        *[("Trace", True)] * 2,
    ]


# ---------------------------------------------------------------- show


def a_run() -> noesis.Trace:
    wrapped = noesis.wrap(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    with wrapped.run(prompt="moth\n" * 60, nested={"seeds": [1, 2], "scale": float("nan")}):
        wrapped(torch.ones(3, 2))
    return wrapped.trace()


@pytest.mark.parametrize("name", ["trace.safetensors", "trace.json.gz", "soulprint.json"])
def test_show_prints_what_print_prints_and_the_meta(run: Run, tmp_path: Path, name: str) -> None:
    saved = a_run() if name.startswith("trace") else a_run().soulprint()
    path = saved.save(tmp_path / name)
    for given in (path, tmp_path):
        done = run("show", given)
        assert done.code == 0
        shown, _, meta = done.out.partition("\n\nmeta:\n")
        assert shown == repr(saved)
        lines = dict(line.strip().split(": ", 1) for line in meta.splitlines())
        assert lines["run"] == saved.meta["run"]
        assert lines["prompt"] == "moth\\n" * 60
        assert lines["nested"] == '{"seeds": [1, 2], "scale": null}'
        assert list(lines) == list(saved.meta)
    assert json.loads(run("show", path, "--json").out) == json.loads(saved.to_json())


def test_show_draws(run: Run, tmp_path: Path) -> None:
    for saved, name in ((a_run(), "a.json"), (a_run().soulprint(), "b.json")):
        done = run("show", saved.save(tmp_path / name), "--plot", tmp_path / f"{name}.png")
        assert (done.code, done.err) == (0, f"noesis: wrote {tmp_path / name}.png\n")
        assert kind_of_image(tmp_path / f"{name}.png") == "PNG"
    assert run("show", noesis.Soulprint([0.0], [1.0], ["a"]).save(tmp_path / "c.json")).out.endswith("\n\nmeta: none\n")


@pytest.mark.data
def test_show_one_of_several_runs(run: Run, v01: Path, tmp_path: Path) -> None:
    for name in ("run_a", "run_b"):
        for path in (v01 / name).glob("unet_trace_*"):
            shutil.copy(path, tmp_path)
    assert "holds 2 runs" in run("show", tmp_path).err
    assert "\n  run: 1795207854\n" in run("show", tmp_path, "--run", "1795207854").out


# ---------------------------------------------------------------- files that are there


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_that_are_there_are_replaced_by_force_alone(run: Run, tmp_path: Path) -> None:
    """Of commands that read saved runs; those that run models are below."""
    a = a_run().save(tmp_path / "in" / "trace.json")
    out = tmp_path / "out"
    lines = {
        "s.json": ["summarize", a, "--out"],
        "shown.png": ["show", a, "--plot"],
        "c.csv": ["compare", a, a, "--csv"],
        "c.json": ["compare", a, a, "--json"],
        "c.png": ["compare", a, a, "--plot"],
    }
    for name, line in lines.items():
        path = write(out / name, "mine")
        done = run(*line, path)
        assert (done.code, done.out, path.read_text()) == (2, "", "mine"), line
        assert f"{path} is there already. Expected a name that is free. Change {line[-1]}, or" in done.err
        done = run(*line, path, "--force")
        assert done.code == 0, done.err
        assert path.read_bytes() != b"mine"
        assert f"noesis: wrote {path}" in done.err
    assert set(contents(out)) == set(lines)


def test_two_outputs_into_one_file(run: Run, tmp_path: Path) -> None:
    a = a_run().save(tmp_path / "trace.json")
    done = run("compare", a, a, "--csv", tmp_path / "c.json", "--json", tmp_path / "c.json", "--force")
    assert (done.code, (tmp_path / "c.json").exists()) == (2, False)
    assert f"--csv and --json both name {tmp_path / 'c.json'}" in done.err


@pytest.mark.data
def test_runs_of_models_are_not_overwritten(run: Run, llama: Path, mixtral: Path, tmp_path: Path) -> None:
    text = ["--prompt", ONCE, "--max-new-tokens", 1]
    trace = ["trace", "--model", llama, *text, "--out", tmp_path]
    lines: list[tuple[list[Any], str]] = [
        (trace, "trace.safetensors"),
        (trace, "soulprint.safetensors"),
        ([*trace, "--per-sample"], "soulprint_sample7.safetensors"),
        ([*trace, "--format", "json"], "soulprint.json"),
        (["routes", "--model", mixtral, *text, "--out", tmp_path / "routes.json"], "routes.json"),
        (["routes", "--model", mixtral, *text, "--plot", tmp_path / "routes.png"], "routes.png"),
        (["tokens", "--model", llama, "--a", "x", "--b", "y", "--plot", tmp_path / "t.png"], "t.png"),
    ]
    for line, name in lines:
        write(tmp_path / name, "mine")
        done = run(*line)
        assert (done.code, contents(tmp_path)) == (2, {name: b"mine"}), line
        assert f"{tmp_path / name} is there already" in done.err
        if name != "soulprint_sample7.safetensors":  # of which this run has none
            assert run(*line, "--force").code == 0
            assert (tmp_path / name).read_bytes() != b"mine"
        for path in tmp_path.iterdir():
            path.unlink()


def test_images_are_not_overwritten(run: Run, sdxl: Path, tmp_path: Path) -> None:
    line = ["trace", "--model", sdxl, *SMALL, "--out", tmp_path, "--image"]
    write(tmp_path / "image.png", "mine")
    done = run(*line)
    assert (done.code, contents(tmp_path)) == (2, {"image.png": b"mine"})
    assert f"{tmp_path / 'image.png'} is there already" in done.err
    assert run(*line, "--force").code == 0
    assert kind_of_image(tmp_path / "image.png") == "PNG"


# ---------------------------------------------------------------- summarize


@pytest.mark.data
def test_summarize(run: Run, v01: Path, tmp_path: Path) -> None:
    out = tmp_path / "soulprint.safetensors"
    done = run("summarize", v01 / "run_a", "--out", out, "--run", "1795207852")
    assert done.code == 0
    assert done.out.startswith("Soulprint of 403 layers over 4 steps")
    expected = noesis.Soulprint.load(v01 / "run_a" / "soulprint.json")
    np.testing.assert_allclose(noesis.Soulprint.load(out).vector, expected.vector, rtol=1e-9, atol=1e-12)
    printed = json.loads(run("summarize", v01 / "run_a", "--json").out)
    assert printed["means"] == noesis.Soulprint.load(out).means.tolist()


@pytest.mark.data
def test_summarize_one_step(run: Run, v01: Path) -> None:
    printed = json.loads(run("summarize", v01 / "run_a", "--step", 2, "--json").out)
    assert printed["means"] == noesis.Trace.load(v01 / "run_a")["mean"][2].tolist()


# ---------------------------------------------------------------- diff


PROMPTS = ("Once upon a time", "Tom was happy because", "Lily went to the park", "The dog ran", "One day a cat")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.txt", "\n".join([*PROMPTS, "", ""]))


@pytest.mark.data
def test_diff_names_what_changed(run: Run, llama: Path, changed_llama: Path, prompts: Path, tmp_path: Path) -> None:
    line = ["diff", llama, changed_llama, "--prompts", prompts]
    done = run(*line, "--plot", tmp_path / "diff.png")
    assert done.code == 0
    assert "first divergence: model.layers.3 (relative error " in done.out
    assert "weights: 1 of 49 changed\n" in done.out
    assert "model.layers.3.mlp.down_proj.weight" in done.out
    assert kind_of_image(tmp_path / "diff.png") == "PNG"
    found = noesis.ModelDiff.from_json(run(*line, "--layers", "mlp", "--baseline", 2, "--json").out)
    assert (found.labels, found.repeats) == (list(PROMPTS), 2)
    assert found.changed == ["model.layers.3.mlp", "model.layers.4.mlp", "(output)"]
    assert found.weights[0].relative == pytest.approx(0.3, rel=1e-5)


@pytest.mark.data
@pytest.mark.slow
def test_diff_fails_over_a_bound(run: Run, llama: Path, changed_llama: Path, prompts: Path) -> None:
    line = ["diff", llama, changed_llama, "--prompts", prompts]
    distance = noesis.ModelDiff.from_json(run(*line, "--json").out).distance
    assert run(*line, "--fail-over", distance).code == 0
    done = run(*line, "--fail-over", 0.9 * distance)
    assert done.code == 1
    assert f"noesis: the relative error {distance:.4g} is over" in done.err
    done = run("diff", llama, llama, "--prompts", prompts, "--fail-over", 0)
    assert (done.code, done.out.partition(":")[0]) == (0, "no difference")


@pytest.mark.data
@pytest.mark.slow
def test_diff_of_dtypes_and_adapters(run: Run, llama: Path, prompts: Path, tmp_path: Path) -> None:
    done = run("diff", llama, llama, "--dtype-b", "bfloat16", "--prompts", prompts)
    assert "different meta: dtype 'float32' -> 'bfloat16'" in done.out
    assert "first divergence: none beyond rounding (relative error 0.031) and control" in done.out
    model, _ = models.load_language_model(str(llama), "cpu")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[2], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    done = run("diff", llama, llama, "--adapter-b", tmp_path / "adapter", "--prompts", prompts)
    assert "first divergence: model.layers.2 (relative error " in done.out
    assert "model.layers.2.self_attn.q_proj.weight" in done.out


@pytest.mark.data
@pytest.mark.slow
def test_diff_of_pipelines(run: Run, data: Path) -> None:
    folder = data / "fashion_t2i"
    done = run("diff", folder, folder, "--prompts", "a coat", "a bag", "--steps", 2, "--dtype-b", "bfloat16")
    assert done.code == 0
    assert "over 2 inputs: relative error up to " in done.out
    assert "mid_block.resnets.0" in done.out


@pytest.mark.slow
def test_diff_of_classifiers_takes_tensors(run: Run, tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3, layer_type="basic"
    )
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / name)
    pixels = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "x.npz", pixel_values=pixels.numpy())
    torch.save({"pixel_values": pixels, "labels": torch.zeros(4, dtype=torch.long)}, tmp_path / "x.pt")
    safetensors.torch.save_file({"pixel_values": pixels}, tmp_path / "x.safetensors")
    found = []
    for suffix in ("npz", "pt", "safetensors"):
        done = run("diff", tmp_path / "a", tmp_path / "b", "--prompts", tmp_path / f"x.{suffix}", "--json")
        found.append(noesis.ModelDiff.from_json(done.out))
    assert [(len(each.labels), each.predictions) for each in found] == [(4, 4)] * 3
    assert found[0].errors.tolist() == found[2].errors.tolist()
    assert all(flip.a.startswith("LABEL_") for flip in found[0].flips)
    done = run("diff", tmp_path / "a", tmp_path / "a", "--prompts", tmp_path / "x.npz", "--fail-over", 0)
    assert (done.code, done.out.partition(":")[0]) == (0, "no difference")


@pytest.mark.data
def test_diff_of_saved_captures(run: Run, llama: Path, changed_llama: Path, prompts: Path, tmp_path: Path) -> None:
    for name, folder in (("a", llama), ("b", changed_llama)):
        model, tokenizer = models.load_language_model(str(folder), "cpu")
        for number, text in enumerate(PROMPTS):
            with noesis.capture(model) as acts:
                language_models.forward(model, tokenizer, text)
            acts.save(tmp_path / name / f"{number}.safetensors")
    done = run("diff", tmp_path / "a", tmp_path / "b")
    assert "ModelDiff of 5 layers over 5 inputs" in done.out
    assert "control: none" in done.out
    assert "first divergence: model.layers.3 (relative error " in done.out
    live = run("diff", tmp_path / "a", changed_llama, "--prompts", prompts)
    assert "first divergence: model.layers.3 (relative error " in live.out
    one = run("diff", tmp_path / "a" / "0.safetensors", tmp_path / "b" / "0.safetensors")
    assert "one input: nothing is said of how surely" in one.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a b", "--prompts is not given"),
        ("a b --prompts missing.txt", "missing.txt is not there"),
        ("a b --prompts bad.npz", "bad.npz cannot be read"),
        ("a b --prompts uneven.pt", "as many rows in each"),
        ("a b --prompts other.pt", "other.pt holds something else than tensors"),
        ("a b --prompts empty.txt", "--prompts holds no input"),
        ("a b --prompts text --steps 3", "neither model is a pipeline"),
        ("a b --prompts text --fail-over -1", "argument --fail-over: '-1' is no number from 0"),
        ("missing/x/y b --prompts text", "missing/x/y is not there"),
    ],
)
def test_diff_says_what_is_wrong(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "config.json", '{"model_type": "llama"}')
    write(tmp_path / "bad.npz", "no archive")
    write(tmp_path / "empty.txt", "\n\n")
    torch.save({"x": torch.ones(2, 3), "y": torch.ones(3, 3)}, tmp_path / "uneven.pt")
    torch.save([1, 2], tmp_path / "other.pt")
    done = run("diff", *line.split())
    assert (done.code, done.out) == (2, "")
    assert message in done.err


# ---------------------------------------------------------------- tokens, routes, layers


@pytest.mark.data
def test_tokens(run: Run, llama: Path, tmp_path: Path) -> None:
    plot = tmp_path / "deltas.png"
    prompts = ["--a", "Tom had a red ball. He was happy.", "--b", "Tom had a big ball. He was happy."]
    done = run("tokens", "--model", llama, *prompts, "--plot", plot)
    assert done.code == 0
    assert "only in a: '▁r' at 5, 'ed' at 6" in done.out
    assert kind_of_image(plot) == "PNG"
    found = json.loads(run("tokens", "--model", llama, *prompts, "--layers", "attention", "--json").out)
    assert found["layers"] == [f"model.layers.{index}.self_attn" for index in range(5)]
    before = found["positions_a"].index(4)
    assert found["values"][: before + 1] == [[0.0] * 5] * (before + 1)  # a causal model does not look ahead
    assert max(map(max, found["values"])) > 0


@pytest.mark.data
def test_equal_prompts_have_no_divergent_token(run: Run, llama: Path) -> None:
    done = run("tokens", "--model", llama, "--a", ONCE, "--b", ONCE)
    assert (done.code, "0 divergent" in done.out) == (0, True)


@pytest.mark.data
def test_routes(run: Run, mixtral: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "routes.safetensors", tmp_path / "routes.png"
    line = ["routes", "--model", mixtral, "--prompt", ONCE, "--max-new-tokens", 4]
    done = run(*line, "--out", out, "--plot", plot)
    assert done.code == 0
    assert "model.layers.1.mlp.gate" in done.out
    assert done.out.rstrip("\n") == repr(noesis.Routes.load(out))
    assert kind_of_image(plot) == "PNG"
    printed = json.loads(run(*line, "--json").out)
    assert printed["layers"] == [f"model.layers.{index}.mlp.gate" for index in range(3)]


@pytest.mark.data
def test_a_model_without_experts_has_no_routes(run: Run, llama: Path) -> None:
    done = run("routes", "--model", llama, "--prompt", "x")
    assert done.code == 2
    assert f"{llama} has no routers: no layer of LlamaForCausalLM is one" in done.err
    assert "layers=" not in done.err


@pytest.mark.data
def test_layers_are_listed_without_weights(run: Run, llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    done = run("layers", "--model", tmp_path)
    assert done.code == 0
    assert done.out.splitlines()[0] == "5 layers"
    assert done.out.splitlines()[2].split() == ["model.layers.0", "LlamaDecoderLayer", "45,440"]
    found = json.loads(run("layers", "--model", tmp_path, "--layers", "layers.3.mlp.*", "norm", "--json").out)
    assert found["selector"] == ["layers.3.mlp.*", "norm"]
    assert {"layer": "model.layers.3.mlp.down_proj", "class": "Linear", "parameters": 172 * 64} in found["layers"]
    assert len(found["layers"]) == 4 + 11


@pytest.mark.parametrize("name", ["sdxl", "wan"])
def test_layers_of_a_pipeline_are_those_that_wrap_selects(run: Run, name: str, tmp_path: Path) -> None:
    pipe = build(name)
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    found = json.loads(run("layers", "--model", tmp_path, "--layers", "attention", "--json").out)
    assert [row["layer"] for row in found["layers"]] == noesis.wrap(pipe, layers="attention").layers


# ---------------------------------------------------------------- errors


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_one_line_for_every_error(run: Run, tmp_path: Path) -> None:
    noesis.Soulprint([0.0], [1.0], ["conv"]).save(tmp_path / "a.json")
    noesis.Soulprint([0.0], [1.0], ["head"]).save(tmp_path / "b.json")
    whole = noesis.Soulprint([0.0], [1.0], ["conv"]).save(tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "new.json", '{"format": "noesis.soulprint", "format_version": 99}')
    write(tmp_path / "other.json", '{"format": "noesis.activations"}')
    write(tmp_path / "text.json", "no JSON")
    write(tmp_path / "unet" / "config.json", '{"_class_name": "UNet2DConditionModel"}')
    write(tmp_path / "bert" / "config.json", '{"model_type": "t5"}')
    write(tmp_path / "strange" / "config.json", '{"model_type": "no such model"}')
    (tmp_path / "empty").mkdir()
    a, model = tmp_path / "a.json", tmp_path / "bert"
    cases: list[tuple[list[Any], str]] = [
        (["compare", a, tmp_path / "nothing.json"], "nothing.json is not there. Expected a file. Check the path."),
        (["compare", a, tmp_path / "cut.safetensors"], "cut.safetensors is not a readable safetensors file"),
        (["compare", a, tmp_path / "new.json"], "new.json has format_version 99. Expected version 1."),
        (["compare", a, tmp_path / "other.json"], "is no run: its format is 'noesis.activations'. Expected a trace or"),
        (["compare", a, tmp_path / "text.json"], "text.json is not readable JSON"),
        (["compare", a, tmp_path / "b.json"], "The runs have no layer in common"),
        (["compare", a, tmp_path / "empty"], "empty holds no run. Expected trace.safetensors"),
        (["compare", a, a, "--baseline", tmp_path / "empty"], "empty holds no run. Expected traces or soulprints"),
        (["compare", a, a, "--baseline", a], "a.json is no folder. Expected a folder of traces or soulprints."),
        (["compare", a, a, "--alpha", 2], "alpha=2.0. Expected a rate between 0 and 1."),
        (["compare", a, a, "--plot", tmp_path / "x.doc"], "x.doc"),
        (["compare", a, a, "--csv", tmp_path / "a.json" / "x.csv"], "a.json"),
        (["summarize", a], "a.json is no noesis trace: its format is 'noesis.soulprint'."),
        (["summarize", tmp_path / "empty"], "empty holds no trace. Expected trace.safetensors"),
        (["layers", "--model", tmp_path / "nothing"], "nothing is not there. Expected a folder of save_pretrained"),
        (["layers", "--model", a], "a.json is a file. Expected a folder of save_pretrained, or an id."),
        (["layers", "--model", tmp_path / "empty"], "empty holds no model. Expected model_index.json"),
        (["layers", "--model", tmp_path / "unet"], "unet holds a UNet2DConditionModel, a part of a pipeline."),
        (
            ["layers", "--model", tmp_path / "strange"],
            "strange cannot be loaded as a causal language model (ValueError",
        ),
        (["layers", "--model", model], "bert cannot be loaded as a causal language model (ValueError"),
        (["trace", "--model", model, "--prompt", "x", "--device", "disk"], "device='disk'. Expected auto, cpu, cuda"),
        (["trace", "--model", model, "--prompt", "x", "--no-gzip"], "--no-gzip with --format safetensors."),
        (["trace", "--model", model, "--prompt", "x", "--steps", 3], "--steps is an option for a diffusion pipeline"),
        (["trace", "--model", model, "--prompt", "x", "--image", "x.png"], "--image is an option for a diffusion"),
        (["demo", "--out", a], "a.json is a file. Expected a folder to write to."),
    ]
    for argv, message in cases:
        done = run(*argv)
        assert (done.code, done.out) == (2, ""), argv
        assert message in done.err
        assert re.fullmatch(r"noesis: error: [^\n]+\n", done.err), argv


def test_options_of_language_models_and_images_of_pipelines(run: Run, sdxl: Path) -> None:
    line = ["trace", "--model", sdxl, *SMALL]
    assert "--temperature is an option for a language model" in run(*line, "--temperature", 1).err
    assert "x.doc has the suffix '.doc'. Expected .png, .jpg" in run(*line, "--image", "x.doc").err
    assert "is a diffusion pipeline. Expected a language" in run("tokens", "--model", sdxl, "--a", 1, "--b", 2).err


@pytest.mark.data
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "layer.3"], "layers='layer.3' selects nothing in LlamaForCausalLM."),
        (["--temperature", "-1"], "temperature=-1.0. Expected a number from 0."),
    ],
)
def test_bad_options_of_a_trace(run: Run, llama: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = run("trace", "--model", llama, "--prompt", ONCE, "--out", tmp_path / "out", *options)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there(run: Run, tmp_path: Path) -> None:
    absent = "mps" if torch.cuda.is_available() else "cuda"
    done = run("trace", "--model", tmp_path, "--prompt", "x", "--device", absent)
    assert done.code == 2
    assert f"device='{absent}', and this torch sees no such device" in done.err


def test_a_dtype_that_is_none() -> None:
    with pytest.raises(noesis.NoesisError, match="dtype='int8'. Expected auto or one of float32, float16, bfloat16."):
        models.load_language_model("a/b", "cpu", "int8")


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("noesis.cli.commands.load_run", interrupt)
    assert run("compare", "a", "b") == (130, "", "noesis: interrupted\n")


@pytest.mark.data
@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_error(v01: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "noesis.cli", "summarize", str(v01 / "run_a")],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment(PYTHONUNBUFFERED=""),  # as most people run it
        check=False,
        timeout=120,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminal_without_unicode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = noesis.Soulprint([0.0], [1.0], ["▁conv"]).save(tmp_path / "a.json")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["compare", str(path), str(path)]) == 0
    assert b"\\u2581conv" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_library_that_prints_does_not_reach_stdout(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = noesis.Soulprint([0.0], [1.0], ["conv"]).save(tmp_path / "a.json")
    load = loading.load_run

    def loud(*args: Any) -> Any:
        sys.stdout.write("by the way")
        return load(*args)

    monkeypatch.setattr("noesis.cli.commands.load_run", loud)
    done = run("compare", path, path, "--json")
    assert json.loads(done.out)["distance"] == 0
    assert "by the way" in done.err


@pytest.mark.data
@pytest.mark.slow
def test_json_of_a_process_is_pure(llama: Path, tmp_path: Path) -> None:
    line = f"trace --model {llama} --prompt Once --max-new-tokens 2 --json --out {tmp_path}"
    done = python("-m", "noesis.cli", *line.split())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "noesis.trace"
    assert f"noesis: wrote {tmp_path / 'trace.safetensors'}" in done.stderr


@pytest.mark.slow
def test_the_exit_code_of_a_process(tmp_path: Path) -> None:
    done = python("-m", "noesis.cli", "compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("noesis: error: ")


@pytest.mark.data
@pytest.mark.slow
def test_a_missing_package_names_its_extra(llama: Path, sdxl: Path, v01: Path, tmp_path: Path) -> None:
    missing = "diffusers", "transformers", "matplotlib"
    a, b = v01 / "run_a", v01 / "run_b"
    lines = [
        ["trace", "--model", llama, "--prompt", "x", "--out", tmp_path],
        ["tokens", "--model", llama, "--a", "x", "--b", "y", "--plot", "x.png"],
        ["trace", "--model", sdxl, "--prompt", "x", "--out", tmp_path],
        ["layers", "--model", sdxl],
        ["compare", a, b, "--plot", tmp_path / "x.png"],
        ["compare", a, b],  # needs none of them
    ]
    done = python(
        "-c",
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        "from noesis.cli import main\n"
        f"print([main(argv) for argv in {[[str(each) for each in line] for line in lines]}])",
    )
    assert done.stdout.splitlines()[-1] == "[2, 2, 2, 2, 2, 0]"
    needs = (
        "noesis: error: {} needs the package '{}', which is not installed. Expected the extra '{}'. Run: pip install"
    )
    expected = [
        ("A language model", "transformers", "transformers"),
        ("--plot", "matplotlib", "viz"),
        ("A diffusion pipeline", "diffusers", "diffusers"),
        ("A diffusion pipeline", "diffusers", "diffusers"),
    ]
    errors = done.stderr.splitlines()
    assert [line.split(" 'noesis")[0] for line in errors[:4]] == [needs.format(*each) for each in expected]
    assert "'matplotlib'" in errors[4]
    assert "noesis[viz]" in errors[4]
    assert len(errors) == 5


# ---------------------------------------------------------------- offline


@pytest.mark.data
def test_a_folder_never_asks_the_network(
    run: Run, llama: Path, sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    line = ["--prompt", ONCE, "--max-new-tokens", 1, "--out", tmp_path / "a"]
    assert run("trace", "--model", llama, *line).code == 0
    assert run("layers", "--model", llama).code == 0
    assert run("trace", "--model", sdxl, *SMALL, "--out", tmp_path / "b").code == 0
    assert run("layers", "--model", sdxl).code == 0


@pytest.mark.slow
def test_an_id_that_cannot_be_reached(tmp_path: Path) -> None:
    done = python("-m", "noesis.cli", "layers", "--model", "a/b", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        "noesis: error: a/b is no folder here, it is not in the cache, and the hub cannot be reached. "
        "Expected a folder of save_pretrained, or an id. Check the path, or the network.\n"
    )


@pytest.mark.data
@pytest.mark.slow
def test_an_id_in_the_cache(llama: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(llama, snapshot)
    write(tmp_path / "hub" / "models--a--b" / "refs" / "main", "0" * 40)
    done = python("-m", "noesis.cli", "layers", "--model", "a/b", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.stdout.startswith("5 layers\n"), done.stderr


# ---------------------------------------------------------------- the example


def test_usage_errors_are_one_line(run: Run) -> None:
    for line in (["trace"], ["trace", "--nope"], ["nothing"], ["compare", "a"]):
        done = run(*line)
        assert done.code == 2
        assert done.err.startswith("noesis: error: ")
        assert len(done.err.splitlines()) == 1
        assert "--help)" in done.err


def test_unexpected_errors_are_not_taken_for_a_difference(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(*_: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("noesis.cli.commands.load_run", burst)
    done = run("compare", "a", "b")
    assert done.code == 2
    assert done.err == "noesis: error: RuntimeError: out of memory (NOESIS_TRACEBACK=1 shows where)\n"
