"""The benchmark scripts, at tiny sizes: their arithmetic, their peers, and from measuring to the pages' tables."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import noesis
from helpers.checkout import BENCHMARKS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def script(monkeypatch):
    """Import a script by name, as the scripts import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


# ---------------------------------------------------------------- timing


def test_overhead_is_the_median_of_the_rounds_own_ratios(script):
    # The second round was slow for both: a ratio of medians would say 1.5, the rounds say 1.1.
    samples = {"bare": [1.0, 4.0, 2.0], "noesis": [1.1, 6.0, 2.2]}
    told = script("timing").against(samples)
    assert told["bare"]["seconds"] == 2.0
    assert told["noesis"]["seconds"] == 2.2
    assert told["noesis"]["ratio"] == pytest.approx(1.1)
    assert told["noesis"]["ratio_quartiles"] == pytest.approx([1.1, 1.3])
    assert told["noesis"]["overhead_percent"] == pytest.approx(10)
    assert told["noesis"]["overhead_percent_quartiles"] == pytest.approx([10, 30])
    assert told["noesis"]["added_seconds"] == pytest.approx(0.2)


def test_share_of_what_another_adds(script):
    share = script("timing").share
    samples = {"bare": [1.0, 1.0, 1.0], "noesis": [1.1, 1.2, 1.3], "hooks": [1.4, 1.4, 1.4]}
    told = share(samples, "noesis", "hooks")
    assert told["share"] == pytest.approx(0.5)
    assert told["share_quartiles"] == pytest.approx([0.375, 0.625])
    samples["hooks"] = [1.4, 1.4, 0.9]  # one round in which noise made the hooks seem free
    assert share(samples, "noesis", "hooks") == {"share": pytest.approx(0.5), "share_quartiles": None}
    assert share(samples | {"hooks": [1.0, 1.0, 1.0]}, "noesis", "hooks") is None


def test_every_round_runs_every_variant_and_no_order_is_preferred(script):
    timing = script("timing")
    orders = [timing.order(["a", "b", "c"], turn) for turn in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    for place in range(3):
        assert sorted(order[place] for order in orders) == ["a", "a", "b", "b", "c", "c"]
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.interleave(runs, device="cpu", rounds=3, warmup=1, seconds=0)
    assert found.inner == 1
    assert [len(values) for values in found.seconds.values()] == [3, 3]
    assert calls == [*"ab", *"aaa", *"ab", *"ba", *"ba", *"ab"]


# ---------------------------------------------------------------- models


def test_copies_share_parameters_and_buffers_but_not_modules(script):
    bare = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    copy = script("models").shared_copy(bare)
    assert all(one is other for one, other in zip(bare.parameters(), copy.parameters(), strict=True))
    assert all(one is other for one, other in zip(bare.buffers(), copy.buffers(), strict=True))
    assert not {id(module) for module in bare.modules()} & {id(module) for module in copy.modules()}
    noesis.wrap(copy)
    assert not any(isinstance(module, noesis.Observed) for module in bare.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "blocks"),
    [
        ("mlp", {"batch": 2}, {"leaves": 5, "matrices": 3}),
        ("ffn", {"batch": 1, "tokens": 2}, {"blocks": 4, "leaves": 12, "matrices": 8}),
        ("resnet50", {"batch": 1, "pixels": 32}, {"blocks": 16, "matrices": 54}),
        ("stack", {"output": "4 KB", "depth": 3}, {"layers": 3}),
    ],
)
def test_models_run_are_observed_and_stay_the_same(script, name, size, blocks):
    models = script("models")
    bench = models.build(name, "cpu", models.Size(**size))
    want = bench.outputs(bench.module)
    for layers, count in blocks.items():
        copy = models.shared_copy(bench.module)
        wrapped = noesis.wrap(copy, layers=bench.layers[layers])
        assert len(wrapped.observed_layers) == count
        assert all(map(torch.equal, want, bench.outputs(copy)))
        bench.step(copy)()
        trace = wrapped.trace()
        assert len(trace) == 2
        assert not trace.never_ran
        assert not trace["nonfinite"].any()
    assert all(tensor.isfinite().all() for tensor in want)


def test_sdxl_has_the_size_and_the_layers_that_are_claimed(script):
    pytest.importorskip("diffusers")
    models = script("models")
    unet = models.sdxl_unet()
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert not list(unet.buffers())  # nothing that materialising would leave uninitialised
    for layers, count in {"blocks70": 70, "sites297": 297}.items():
        wrapped = noesis.wrap(unet, layers=models.SDXL_LAYERS[layers])
        assert len(wrapped.observed_layers) == count
        wrapped.unwrap()


def test_materialised_weights_are_near_unit_gain_and_buffers_are_refused(script):
    materialise = script("models").materialise
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 256), nn.LayerNorm(256))
    model = materialise(model, "cpu", torch.float32)
    assert model(torch.randn(64, 512)).std().item() == pytest.approx(1, rel=0.1)
    assert model[0](torch.randn(64, 512)).std().item() == pytest.approx(1, rel=0.1)
    with torch.device("meta"):
        norm = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match=r"buffers \['running_mean'"):
        materialise(norm, "cpu", torch.float32)


# ---------------------------------------------------------------- peers


def attached(script, name: str) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Attach a peer to a small model, run it once, detach, and check that nothing is left of it."""
    peers = script("peers")
    model, x = small(), torch.randn(5, 6)
    layers = dict(model.named_modules())
    want, seen = model(x), {}
    peer = peers.attach(name, model, ["0", "1", "2"])
    with torch.no_grad():
        assert torch.equal(model(x), want)
    read = peer.read()
    peer.forget()
    assert peer.read() == {}
    peer.detach()
    assert dict(model.named_modules()) == layers
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        model(x)
        assert peer.read() == {}
        for layer, module in model.named_children():
            x = seen[layer] = module(x)
    return model, seen, read


@pytest.mark.parametrize("name", ["hooks", "torch-ops"])
def test_peers_with_plain_statistics(script, name):
    _, seen, read = attached(script, name)
    assert list(read) == ["0", "1", "2"]
    for layer, x in seen.items():
        want = {"mean": x.mean(), "std": x.std(), "abs_mean": x.abs().mean(), "max": x.max(), "min": x.min()}
        if name == "torch-ops":
            want |= {"count": torch.tensor(x.numel()), "nonfinite": torch.tensor(0)}
        assert read[layer] == pytest.approx({field: value.item() for field, value in want.items()}, rel=1e-5, abs=1e-7)


def test_composer_averages_statistics_of_the_last_dimension(script):
    _, seen, read = attached(script, "composer")
    rows = seen["0"].double()
    z = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True, correction=0)
    want = {
        "l2_norm": rows.square().sum(1).sqrt().mean(),
        "average": rows.mean(),
        "max": rows.max(1).values.mean(),
        "skewness": z.pow(3).mean(1).mean(),
        "kurtosis": z.pow(4).mean(1).mean(),
    }
    assert read["0"] == pytest.approx({field: value.item() for field, value in want.items()}, rel=1e-4)


def test_cache_keeps_copies_until_detached(script):
    _, seen, read = attached(script, "cache")
    assert {layer: told["mean"] for layer, told in read.items()} == pytest.approx(
        {layer: x.mean().item() for layer, x in seen.items()}, rel=1e-5
    )


def test_nervecode_takes_the_layers_it_has_a_wrapper_for(script):
    pytest.importorskip("nervecode")
    _, _, read = attached(script, "nervecode")
    assert list(read) == ["0", "2"]
    peers = script("peers")
    with pytest.raises(peers.UnsuitableError, match=r"none of the 1 layers is an nn\.Linear or nn\.Conv2d"):
        peers.attach("nervecode", small(), ["1"])


def test_nervecode_absent_is_said(script, monkeypatch):
    peers = script("peers")
    monkeypatch.setattr(peers, "version", lambda package: None)
    with pytest.raises(peers.UnsuitableError, match=r"\[benchmark\]"):
        peers.attach("nervecode", small(), ["0"])


def test_atomics_need_a_cuda_device(script):
    peers = script("peers")
    with pytest.raises(peers.UnsuitableError, match="needs a CUDA device"):
        peers.attach("atomics", small(), ["0"])


@pytest.mark.slow
def test_atomics_count_what_is_there():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    # In a process of its own: Triton reads TRITON_INTERPRET when it is imported.
    code = """
import torch
from atomics import accumulate
row, enabled = torch.zeros(5), torch.ones((), dtype=torch.int32)
x = torch.linspace(-3, 2, 5001)
accumulate(x, row, enabled)
want = torch.stack([torch.tensor(5001.0), x.sum(), x.abs().sum(), x.square().sum(), x.abs().max()])
torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-2)
accumulate(x, row, enabled.zero_())
torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-2)
"""
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_tensor_is_found_where_layers_return_several(script):
    tensor_of = script("peers").tensor_of
    x, ids = torch.ones(2), torch.ones(2, dtype=torch.long)
    assert tensor_of((ids, {"hidden": [x]})) is x
    assert tensor_of(ids) is None
    assert tensor_of((None, "text")) is None


# ---------------------------------------------------------------- from measuring to the table


@pytest.mark.slow
def test_overhead_writes_what_the_table_shows(script, tmp_path, capsys):
    path = tmp_path / "overhead.json"
    overhead, table = script("overhead"), script("table")
    common = ["--rounds", "2", "--seconds", "0.0001"]
    overhead.main(
        ["--model", "mlp", "--batch", "2", "--peers", "control", "hooks", "atomics", "--json", str(path), *common]
    )
    assert "bitwise equal" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] == torch.__version__
    (case,) = found["cases"]
    assert (case["model"], case["layers"], case["observed"], case["mode"]) == ("mlp", "leaves", 5, "eager")
    assert list(case["variants"]) == ["bare", "noesis", "control", "hooks", "atomics"]
    ours = case["variants"]["noesis"]
    assert ours["bitwise_equal"] is True
    assert "noesis_adds" in case["variants"]["hooks"]
    assert "noesis_adds" not in case["variants"]["control"]
    assert ours["calls"] == ours["layers"] == 5
    assert ours["added_us_per_layer"] == pytest.approx(ours["added_seconds"] / 5 * 1e6)
    assert case["variants"]["atomics"] == {"not_applicable": "a Triton kernel: it needs a CUDA device"}
    output = ["--model", "stack", "--output", "4 KB", "--depth", "2"]
    overhead.main([*output, "--json", str(tmp_path / "stack.json"), *common])
    text = table.render(tmp_path)
    assert "| mlp, batch 2 | 1 | eager | leaves (5) |" in text
    assert table.percent(ours["overhead_percent"]) in text
    assert "| 1 | eager | 4 KB |" in text
    assert f"torch {torch.__version__}" in text


@pytest.mark.slow
def test_the_outputs_of_a_model_are_observed_without_it(script, tmp_path):
    path, overhead = tmp_path / "alone.json", script("overhead")
    common = ["--rounds", "2", "--seconds", "0.0001", "--modes", "outputs", "--json", str(path)]
    overhead.main(["--model", "mlp", "--batch", "2", "--peers", "control", "hooks", "nervecode", *common])
    (case,) = json.loads(path.read_text())["cases"]
    assert case["variants"]["noesis"]["calls"] == case["observed"] == 5
    assert case["variants"]["nervecode"]["layers"] == 3
    assert "noesis_adds" in case["variants"]["hooks"]
    text = script("table").render(tmp_path)
    assert "| mlp, batch 2 | leaves (5) |" in text
    assert "eager" not in text


@pytest.mark.parametrize("name", ["mlp", "resnet50"])
@pytest.mark.slow
def test_stand_ins_return_what_the_layers_returned(script, name):
    models, outputs = script("models"), script("outputs")
    bench = models.build(name, "cpu", models.Size(batch=1, pixels=32))
    alone = outputs.of(bench, "leaves")
    wrapped, replayed = (
        noesis.wrap(models.shared_copy(one.module), layers=one.layers["leaves"]) for one in (bench, alone)
    )
    for one, model in ((bench, wrapped), (alone, replayed)):
        one.step(model)()
    assert np.array_equal(wrapped.trace().values, replayed.trace().values)
    assert np.array_equal(wrapped.trace().calls, replayed.trace().calls)


def test_the_pages_say_what_the_results_say(script):
    script("table").main(["--check"])
    first = script("table").render_first().splitlines()
    assert len(first) == 2 + 5 + 2, "five rows"


def test_the_table_goes_between_the_markers_and_is_checked(script, tmp_path, capsys):
    table = script("table")
    told = {"seconds": 2.0, "overhead_percent": 0.5, "overhead_percent_quartiles": [0.25, 1.0], "layers": 7}
    case = {"model": "m", "layers": "blocks", "observed": 7, "mode": "graph", "threads": None}
    case["sizes"] = {"batch": 2}
    case["variants"] = {
        "bare": {"seconds": 2e-3},
        "noesis": told,
        "hooks": {"failed": "why"},
        "cache": told | {"note": "applies to 7 of 9 layers"},
        "nervecode": {"not_applicable": "why"},
    }
    machine = {"device": "a device", "kind": "cuda", "torch": "2", "triton": "3"}
    results = {"script": "overhead", "machine": machine, "cases": [case, case | {"failed": "x", "variants": {}}]}
    del results["cases"][1]["variants"]
    (tmp_path / "a.json").write_text(json.dumps(results))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- cost -->\n\n<!-- end -->\n")
    page = tmp_path / "docs" / "benchmarks.md"
    page.write_text("before\n<!-- overhead -->\nold\n<!-- end -->\nafter\n<!-- detection -->\n\n<!-- end -->\n")
    options = ["--results", str(tmp_path), "--root", str(tmp_path)]
    with pytest.raises(SystemExit, match="is not what the results say"):
        table.main(["--check", *options])
    assert "old" in page.read_text()
    table.main(options)
    assert "left out m blocks graph: x" in capsys.readouterr().err
    table.main(["--check", *options])
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", "<!-- overhead -->"]
    assert lines[-5:] == ["<!-- end -->", "after", "<!-- detection -->", "", "<!-- end -->"]
    row = "| m, batch 2 | graph | blocks (7) | 2.0 ms | 0.50 % (0.25 % to 1.00 %) | failed | 0.50 % (7 layers) |"
    assert [line for line in lines if line.startswith("| m,")] == [row]  # and no column for nervecode
    assert "a device, torch 2, triton 3; `benchmarks/overhead.py`." in lines
    page.write_text("no markers\n")
    with pytest.raises(SystemExit, match="has no part between"):
        table.main(options)


def test_the_first_page_has_what_a_step_takes_longer_where_that_was_measured(script, tmp_path):
    variants = {name: {"added_seconds": seconds} for name, seconds in (("noesis", 1e-4), ("hooks", 5e-4))}
    alone = {"model": "mlp", "layers": "leaves", "observed": 5, "mode": "outputs", "variants": variants}
    variants = {"bare": {"seconds": 1e-3}, "noesis": {"overhead_percent": 9.5}, "hooks": {"overhead_percent": 45.9}}
    machine = {"device": "a device", "kind": "cpu", "torch": "2", "triton": None}
    results = {"script": "overhead", "machine": machine, "cases": [alone]}
    (tmp_path / "outputs.json").write_text(json.dumps(results))
    assert "| 5 | 100 µs | 500 µs |" in script("table").render_first(tmp_path)
    results["cases"] = [alone | {"mode": "eager", "variants": variants}]
    (tmp_path / "whole.json").write_text(json.dumps(results))
    assert ", in 1.0 ms | 5 | 100 µs (9.50 %) | 500 µs (45.9 %) |" in script("table").render_first(tmp_path)
    results["machine"] = machine | {"device": "another"}  # whose steps are no measure of the first
    (tmp_path / "whole.json").write_text(json.dumps(results))
    assert "| 5 | 100 µs | 500 µs |" in script("table").render_first(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--modes", "graph"], "needs --device cuda"),
        (["--peers", "guesswork"], "take control, hooks, torch-ops, composer, atomics, cache, nervecode, all or none"),
        (["--model", "mlp", "--layers", "blocks70"], "mlp has no set of layers 'blocks70': take leaves, matrices"),
    ],
)
def test_mistakes_are_told(script, arguments, said):
    with pytest.raises(SystemExit, match=said):
        script("overhead").main(arguments)


@pytest.mark.slow
def test_kernel_and_scaling_measure(script, tmp_path, capsys):
    script("kernel").main(
        ["--dtypes", "float16", "--max-bytes", "4K", "--rounds", "2", "--json", str(tmp_path / "kernel.json")]
    )
    (case,) = json.loads((tmp_path / "kernel.json").read_text())["cases"]
    for cache in ("cold", "warm"):
        told = case[cache]
        assert told["kernel"]["gb_per_s"] > 0
        assert told["share_of_copy"] > 0
    assert "| float16 | 64 KB |" not in script("table").render(tmp_path)
    options = ["--layers", "1", "2", "--output", "4 KB", "--rounds", "2", "--seconds", "0.0001"]
    script("scaling").main([*options, "--json", str(tmp_path / "scaling.json")])
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [case["layers"] for case in found["by_layers"]] == [1, 2]
    assert len(found["by_steps"]) == 2
    assert "once it is full" in capsys.readouterr().out


def test_bandwidth_counts_what_is_read_and_written(script):
    told = script("kernel").bandwidths({"kernel": [1.0, 2.0], "copy": [1.0, 1.0]}, {"kernel": 4e9, "copy": 8e9})
    assert told["kernel"]["gb_per_s"] == 3.0
    assert told["copy"]["gb_per_s"] == 8.0
    assert told["share_of_copy"] == pytest.approx(0.375)


def test_the_recorders_memory_is_counted_whole(script):
    memory = script("memory")
    wrapped = noesis.wrap(small(), capacity=100)
    larger = noesis.wrap(small(), capacity=1100)
    grown = memory.recorder_bytes(larger.observed_model) - memory.recorder_bytes(wrapped.observed_model)
    assert grown >= 1000 * len(wrapped.observed_layers) * 7 * 4  # at least a float per statistic, layer and step
    assert memory.recorder_bytes(wrapped.observed_model) < 1 << 20


@pytest.mark.slow
def test_weighing(script, tmp_path, monkeypatch):
    path, weighing = tmp_path / "weighing.json", script("weighing")
    monkeypatch.setattr(weighing, "CASES", ((8, 2, 4),))
    weighing.main(["--rounds", "10", "--cases", "0", "--json", str(path)])
    (case,) = json.loads(path.read_text())["cases"]
    assert case["parameters"] == 2 * (8 * 8 + 8)
    assert 0 < case["share_percent_every"] < case["share_percent"]


def test_layers_that_are_off(script, tmp_path):
    path = tmp_path / "off.json"
    script("off").main(["--rounds", "2", "--seconds", "0.0001", "--json", str(path)])
    [case] = json.loads(path.read_text())["cases"]
    assert list(case["variants"]) == ["bare", "control", "paused", "left-out"]
    assert all("added_ns_per_layer" in told for name, told in case["variants"].items() if name != "bare")


def test_every_step_of_run_all_is_a_command_that_parses(script, monkeypatch):
    run_all, overhead, models = script("run_all"), script("overhead"), script("models")
    monkeypatch.setattr(overhead, "check_device", lambda device: None)
    for tasks, device in ((run_all.CUDA, "cuda"), (run_all.CPU, "cpu")):
        assert len({task.name for task in tasks}) == len(tasks)
        for task in tasks:
            name, *arguments = task.command.split()
            assert (BENCHMARKS / name).is_file()
            if name == "overhead.py":
                options = overhead.parse([*arguments, "--device", device])
                known = {"sdxl": models.SDXL_LAYERS}.get(options.model[0], {**models.BLOCKS, "all": None})
                assert set(options.layers) <= set(known)


@pytest.mark.slow
def test_run_all_goes_on_after_a_failure_and_says_so(script, tmp_path, monkeypatch, capsys):
    run_all = script("run_all")
    tasks = (
        run_all.Task("broken", "overhead.py --model nothing", 60),
        run_all.Task("slow", "overhead.py", 0),
        run_all.Task("well", "overhead.py --help", 60),
    )
    monkeypatch.setattr(run_all, "CPU", tasks)
    with pytest.raises(SystemExit):
        run_all.main(["--device", "cpu", "--results", str(tmp_path)])
    told = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[:2] for line in told] == [["broken", "FAILED"], ["slow", "OUT"], ["well", "done"]]
