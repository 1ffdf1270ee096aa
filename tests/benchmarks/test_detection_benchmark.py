"""The detection benchmark: its figures by brute force, its detectors by their formulas, its sets."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import noesis
from helpers.checkout import BENCHMARKS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def detection(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    parts = ("baselines", "metrics", "nervecode_baseline", "sets", "blind_sets", "classifiers", "detector", "variants")
    parts = (*parts, "speed")
    return types.SimpleNamespace(**{part: importlib.import_module(f"detection.{part}") for part in parts})


# ---------------------------------------------------------------- figures


def tied(seed: int, inside: int = 60, outside: int = 45) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 12, inside) / 4, generator.integers(3, 16, outside) / 4


@pytest.mark.parametrize("seed", range(5))
def test_the_figures_agree_with_brute_force(detection, seed):
    inside, outside = tied(seed)
    pairs = [(b > a) + 0.5 * (a == b) for a in inside for b in outside]
    assert detection.metrics.auroc(inside, outside) == pytest.approx(np.mean(pairs), abs=1e-12)

    threshold = min(t for t in inside if np.mean(inside <= t) >= 0.95)
    assert detection.metrics.fpr95(inside, outside) == pytest.approx(np.mean(outside <= threshold), abs=1e-12)

    area, recall = 0.0, 0.0
    for t in sorted({*inside, *outside}, reverse=True):
        true, false = (outside >= t).sum(), (inside >= t).sum()
        area += (true / len(outside) - recall) * true / (true + false)
        recall = true / len(outside)
    assert detection.metrics.aupr(inside, outside) == pytest.approx(area, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_agree_with_scikit_learn(detection, seed):
    measures = pytest.importorskip("sklearn.metrics")
    inside, outside = tied(seed)
    truth, scores = np.repeat([0, 1], [len(inside), len(outside)]), np.concatenate([inside, outside])
    assert detection.metrics.auroc(inside, outside) == pytest.approx(measures.roc_auc_score(truth, scores))
    assert detection.metrics.aupr(inside, outside) == pytest.approx(measures.average_precision_score(truth, scores))


def test_extremes_of_the_figures(detection):
    apart = detection.metrics.figures([0, 1, 2], [3, math.inf])
    assert (apart["auroc"], apart["fpr95"], apart["aupr"]) == (100, 0, 100)
    assert apart["auroc_interval"] == [100, 100]
    inverted = detection.metrics.figures([3, 4], [-math.inf, 2])
    assert (inverted["auroc"], inverted["fpr95"]) == (0, 100)
    same = detection.metrics.figures([1, 1, 1, 1], [1, 1])
    assert (same["auroc"], same["fpr95"]) == (50, 100)
    assert same["aupr"] == pytest.approx(100 * 2 / 6)


@pytest.mark.parametrize(("inside", "outside"), [([], [1.0]), ([1.0], []), ([math.nan, 1.0], [2.0])])
def test_scores_without_meaning_are_refused(detection, inside, outside):
    with pytest.raises(ValueError, match="both need some, and none may be NaN"):
        detection.metrics.figures(inside, outside)


def test_the_intervals_are_those_of_a_bootstrap_over_both_samples(detection):
    generator = np.random.default_rng(0)
    inside, outside = generator.normal(0, 1, 200), generator.normal(1, 1, 150)
    found = detection.metrics.figures(inside, outside, resamples=2000)
    for name in ("auroc", "fpr95", "aupr"):
        measure = getattr(detection.metrics, name)
        draws = [measure(generator.choice(inside, 200), generator.choice(outside, 150)) for _ in range(1000)]
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high
        spread = 100 * (np.quantile(draws, 0.975) - np.quantile(draws, 0.025))
        assert high - low == pytest.approx(spread, rel=0.15)
    assert detection.metrics.figures(inside, outside, seed=3) == detection.metrics.figures(inside, outside, seed=3)
    assert detection.metrics.figures(inside, outside, seed=3) != detection.metrics.figures(inside, outside, seed=4)


# ---------------------------------------------------------------- detectors

CLASSES, WIDTH = 4, 16


class World:
    """Four Gaussian classes along the first axes of 16, and a head that reads those axes."""

    def __init__(self) -> None:
        self.weight = torch.eye(CLASSES, WIDTH).double()
        self.bias = torch.linspace(-0.1, 0.1, CLASSES).double()
        self.labels = torch.arange(CLASSES).repeat(150)
        self.features = self.points(10.0)
        self.logits = self.head(self.features)

    def points(self, scale: float, off: float = 0.0) -> torch.Tensor:
        """Points about the class means times scale / 10, shifted by `off` along the axes that the head ignores."""
        x = scale * self.weight[self.labels] + torch.randn(len(self.labels), WIDTH).double()
        x[:, CLASSES:] += off
        return x

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias

    def fitted(self, detector):
        return detector.fit(self.features, self.logits, self.labels, self.weight, self.bias)

    def scores(self, detector, x: torch.Tensor) -> torch.Tensor:
        return detector.score(x, self.head(x))


MAHALANOBIS = ["Mahalanobis", "Mahalanobis++", "relative Mahalanobis"]
NAMES = ["MSP", "MaxLogit", "Energy", "GEN", *MAHALANOBIS, "kNN", "ViM", "fDBD"]


def test_every_baseline_is_tested(detection):
    assert set(NAMES) == set(detection.baselines.BASELINES)


@pytest.mark.parametrize("name", NAMES)
def test_far_is_stranger_than_near_is_stranger_than_normal(detection, name):
    world = World()
    detector = world.fitted(detection.baselines.BASELINES[name]())
    normal, near, far = (world.scores(detector, world.points(*at)) for at in [(10.0,), (5.0, 0.5), (1.0, 3.0)])
    assert normal.median() < near.median() < far.median()
    assert detection.metrics.auroc(normal, far) > 0.95
    assert torch.isfinite(torch.cat([normal, near, far])).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(detection, name):
    world = World()
    detector = world.fitted(detection.baselines.BASELINES[name]())
    x = world.points(5.0)[:20]
    alone = torch.cat([world.scores(detector, row[None]) for row in x])
    torch.testing.assert_close(world.scores(detector, x), alone)


@pytest.mark.parametrize("name", MAHALANOBIS)
def test_mahalanobis_by_its_formula(detection, name):
    world = World()
    points = world.points(5.0)
    x, at = world.features.numpy(), points.numpy()
    if name == "Mahalanobis++":
        x, at = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, at))
    labels = world.labels.numpy()
    means = np.stack([x[labels == c].mean(0) for c in range(CLASSES)])
    centred = x - means[labels]
    inverse = np.linalg.inv(centred.T @ centred / len(x))
    expected = np.array([min((p - m) @ inverse @ (p - m) for m in means) for p in at])
    if name == "relative Mahalanobis":
        inverse = np.linalg.inv(np.cov(x.T, bias=True))
        expected -= np.array([(p - x.mean(0)) @ inverse @ (p - x.mean(0)) for p in at])
    found = world.scores(world.fitted(detection.baselines.BASELINES[name]()), points)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_dead_features_leave_mahalanobis_finite(detection):
    world = World()
    world.features[:, 7] = 0
    scores = world.scores(world.fitted(detection.baselines.Mahalanobis()), world.features)
    assert torch.isfinite(scores).all()
    assert scores.mean() == pytest.approx(WIDTH - 1, rel=0.1)


def test_the_other_scores_by_their_formulas(detection):
    world, kinds = World(), detection.baselines
    x = world.points(5.0)[:30]
    z = world.head(x)
    p = z.softmax(1)

    def found(kind) -> torch.Tensor:
        return world.scores(world.fitted(kind()), x)

    torch.testing.assert_close(found(kinds.MSP).neg().exp(), p.amax(1))
    torch.testing.assert_close(found(kinds.MaxLogit), -z.amax(1))
    torch.testing.assert_close(found(kinds.Energy), -z.exp().sum(1).log())
    torch.testing.assert_close(found(kinds.GEN), (p**0.1 * (1 - p) ** 0.1).sum(1), rtol=1e-5, atol=1e-7)

    bank, queries = (points / points.norm(dim=1, keepdim=True) for points in (world.features, x))
    distances = (queries[:, None] - bank[None]).norm(dim=2).sort(1).values
    torch.testing.assert_close(found(kinds.KNN), distances[:, 49])

    residuals = []
    origin = -torch.linalg.pinv(world.weight) @ world.bias
    axes = torch.linalg.svd(world.features - origin).Vh[: WIDTH // 2]
    for points in (world.features, x):
        centred = points - origin
        residuals.append((centred - centred @ axes.T @ axes).norm(dim=1))
    alpha = world.logits.amax(1).sum() / residuals[0].sum()
    torch.testing.assert_close(found(kinds.ViM), alpha * residuals[1] - z.logsumexp(1))

    expected = []
    for point, logits in zip(x, z, strict=True):
        top = int(logits.argmax())
        others = [c for c in range(CLASSES) if c != top]
        planes = [(logits[top] - logits[c]) / (world.weight[top] - world.weight[c]).norm() for c in others]
        expected.append(-sum(planes) / len(others) / (point - world.features.mean(0)).norm())
    torch.testing.assert_close(found(kinds.FDBD), torch.stack(expected))


def test_few_fit_inputs_lower_the_number_of_neighbours(detection):
    world = World()
    few = slice(200)
    detector = detection.baselines.KNN().fit(world.features[few], world.logits, world.labels, world.weight, world.bias)
    assert detector.k == 20


# ---------------------------------------------------------------- whole cases


def small_case(sets):
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    fit, test = torch.randn(90, 6), torch.randn(40, 6)
    return sets.Case(
        name="small",
        model=model,
        logits="2",
        features="1",
        blocks=("1",),
        fit=fit,
        fit_labels=model(fit).argmax(1),
        test=test,
        test_labels=model(test).argmax(1),
        out={"far": 5 + torch.randn(30, 6)},
        near=(),
        seed=0,
    )


def small_sequences(sets):
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)).eval()
    fit, test, out = (torch.randint(0, 11, (count, 7)) for count in (60, 30, 27))
    return sets.Case(
        name="sequences",
        model=model,
        logits="2",
        features="1",
        blocks=("1",),
        fit=fit,
        fit_labels=fit[:, 1:],
        test=test,
        test_labels=test[:, 1:],
        out={"other": out},
        near=(),
        seed=0,
        sequences=True,
    )


def test_evaluate_gives_every_detector_its_scores(detection):
    case = small_case(detection.sets)
    found = detection.baselines.evaluate(case, nervecode=False)
    assert list(found) == list(detection.baselines.BASELINES)
    for scores in found.values():
        assert {name: tuple(x.shape) for name, x in scores.items()} == {"test": (40,), "far": (30,)}
    torch.testing.assert_close(found["Energy"]["far"], -case.model(case.out["far"]).double().logsumexp(1))
    assert detection.metrics.auroc(found["Mahalanobis"]["test"], found["Mahalanobis"]["far"]) > 0.9
    assert not case.model[1]._forward_hooks


def test_evaluate_scores_tokens_and_sequences(detection):
    case = small_sequences(detection.sets)
    found = detection.baselines.evaluate(case, nervecode=False)
    tokens = detection.baselines.evaluate(case, nervecode=False, each_token=True)
    for name, scores in found.items():
        assert scores["test"].shape == (30,)
        torch.testing.assert_close(tokens[name]["test"].reshape(30, 6).mean(1), scores["test"])
    logits = case.model(case.out["other"])[:, :-1].double()
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), case.out["other"][:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(found["NLL"]["other"], expected)


def test_what_is_learned_from_tokens_pairs_states_with_the_next_token(detection, monkeypatch):
    case = small_sequences(detection.sets)
    monkeypatch.setattr(detection.baselines, "BANK", 100)
    features, logits, labels = detection.baselines.fit_rows(case)
    assert 60 < len(labels) < 140
    assert len(features) == len(logits) == len(labels)
    states = case.model[:2](case.fit)[:, :-1].flatten(0, 1).double()
    pairs = {(tuple(x.tolist()), int(y)) for x, y in zip(states, case.fit_labels.flatten(), strict=True)}
    assert all((tuple(x.tolist()), int(y)) in pairs for x, y in zip(features, labels, strict=True))


@pytest.mark.parametrize("recommended", [False, True])
def test_nervecode_is_run_on_a_copy(detection, recommended):
    pytest.importorskip("nervecode")
    case = small_case(detection.sets)
    before = {name: x.clone() for name, x in case.model.state_dict().items()}
    found = detection.nervecode_baseline.nervecode_scores(case, recommended=recommended)
    assert {name: tuple(x.shape) for name, x in found.items()} == {"test": (40,), "far": (30,)}
    after = case.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in case.model.parameters())


def test_where_nervecode_does_not_apply_it_says_so(detection):
    pytest.importorskip("nervecode")
    case = small_case(detection.sets)
    object.__setattr__(case, "model", nn.Sequential(nn.ReLU()))
    found = detection.nervecode_baseline.nervecode_scores(case, recommended=False)
    assert isinstance(found, str)
    assert ": " in found


# ---------------------------------------------------------------- sets


def test_made_pictures(detection):
    sets = detection.sets
    first, again = (sets.noise(10, (3, 8, 8), torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (10, 3, 8, 8)
    assert 0 <= first.min() < first.max() <= 1
    x = torch.rand(2, 3, 32, 32)
    blurred = sets.blurred(x, 3.0)
    assert blurred.shape == x.shape
    assert blurred.std() < 0.2 * x.std()
    torch.testing.assert_close(sets.blurred(torch.full((1, 3, 32, 32), 0.3), 3.0), torch.full((1, 3, 32, 32), 0.3))
    edge = torch.zeros(1, 1, 41, 41)
    edge[..., 20, 20] = 1
    profile = sets.blurred(edge, 2.0)[0, 0, 20]
    assert float(profile[22] / profile[20]) == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert sets.coloured(torch.rand(4, 1, 28, 28)).shape == (4, 3, 32, 32)


def test_the_digits_are_trained_once_and_kept(detection, tmp_path):
    pytest.importorskip("sklearn")
    first, again = (detection.sets.case(3, seed=1, cache=tmp_path) for _ in range(2))
    assert [path.name for path in tmp_path.iterdir()] == ["digits-perceptron-1.safetensors"]
    assert torch.equal(first.model(first.test), again.model(again.test))
    assert all(torch.equal(first.out[name], again.out[name]) for name in first.out)
    assert set(first.near) <= set(first.out)
    assert (first.model(first.test).argmax(1) == first.test_labels).float().mean() > 0.95
    assert len(first.fit) / (len(first.fit) + len(first.test)) == pytest.approx(0.6, abs=0.01)


@pytest.mark.data
@pytest.mark.slow
def test_resnet20_is_as_accurate_as_its_authors_say(detection, data):
    case = detection.sets.case(1, data=data)
    assert set(case.near) <= set(case.out)
    assert all(case.model.get_submodule(name) is not None for name in (*case.blocks, case.features, case.logits))
    with torch.no_grad():
        guesses = torch.cat([case.model(batch).argmax(1) for batch in case.test.split(500)])
    assert (guesses == case.test_labels).float().mean() == pytest.approx(0.918, abs=0.005)


@pytest.mark.data
@pytest.mark.slow
def test_the_stories_are_of_the_models_own_kind(detection, data, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    for name in ("FIT_STORIES", "TEST_STORIES", "TEXTS"):
        monkeypatch.setattr(detection.sets, name, 40)
    case = detection.sets.case(4, data=data, cache=tmp_path)
    with torch.no_grad():
        loss = {
            name: float(case.model(x[:40], labels=x[:40]).loss) for name, x in {"test": case.test, **case.out}.items()
        }
    assert loss.pop("test") < 1.5
    assert min(loss.values()) > 4
    for x in (case.fit, case.test, *case.out.values()):
        assert x.shape[1] == 128
        assert (x[:, 0] == case.model.config.bos_token_id).all()
        assert (x[:, 1:] > case.model.config.eos_token_id).all()
    again = detection.sets.case(4, data=data, cache=tmp_path)
    assert torch.equal(case.test, again.test)


@pytest.mark.data
@pytest.mark.parametrize("number", [5, 6])
@pytest.mark.slow
def test_the_blind_sets_are_what_they_say(detection, data, tmp_path, number):
    build, seeds = detection.blind_sets.BLIND[number]
    models = {5: detection.classifiers.SmallViT(), 6: detection.classifiers.CharGRU(96, 2)}
    kept = {5: "mnist-vit-1", 6: "passages-gru-1"}[number]
    safetensors.torch.save_file(models[number].state_dict(), tmp_path / f"{kept}.safetensors")  # trains for minutes
    case, again = (build(1, data, tmp_path) for _ in range(2))
    assert seeds == (0, 1, 2)
    assert set(case.near) < set(case.out)
    assert case.name in detection.detector.CALIBRATED_ON
    assert all(torch.equal(case.out[name], again.out[name]) for name in case.out)
    assert [len(case.fit), len(case.test), len(case.fit_labels), len(case.test_labels)] == [5000, 2000, 5000, 2000]
    wrapped = noesis.wrap(case.model, layers="blocks")
    assert set(case.blocks) <= set(wrapped.observed_layers)
    wrapped.unwrap()
    found = detection.baselines.evaluate(
        dataclasses.replace(case, fit=case.fit[:300], fit_labels=case.fit_labels[:300], test=case.test[:20], out={}),
        nervecode=False,
    )
    assert all(scores["test"].isfinite().all() for scores in found.values())
    shared = {tuple(row) for row in case.fit.flatten(1).tolist()} & {
        tuple(row) for row in case.test.flatten(1).tolist()
    }
    assert not shared


@pytest.mark.data
def test_passages_are_of_both_authors_and_their_words_are_kept(detection, data, tmp_path):
    sets = detection.blind_sets
    safetensors.torch.save_file(
        detection.classifiers.CharGRU(96, 2).state_dict(), tmp_path / "passages-gru-0.safetensors"
    )
    case = sets.passages(0, data, tmp_path)
    assert case.test_labels.float().mean() == 0.5

    def text(row: torch.Tensor) -> str:
        return "".join(chr(code + 32) for code in row.tolist())

    mixed, backwards = (case.out[name] for name in ("shuffled", "reversed"))
    assert all(
        sorted(text(one).split()) == sorted(text(other)[::-1].split())
        for one, other in zip(mixed, backwards, strict=True)
    )
    assert "import" in "".join(text(row) for row in case.out["code"])


# ---------------------------------------------------------------- noesis on a case


@pytest.fixture
def ood(monkeypatch, detection, tmp_path):
    """The script, with a cache of its own."""
    script = importlib.import_module("ood")
    monkeypatch.setattr(script, "case", functools.partial(detection.sets.case, cache=tmp_path))
    return script


@pytest.mark.slow
def test_digits_from_the_command_to_the_tables(ood, tmp_path, capsys):
    pytest.importorskip("sklearn")
    path = tmp_path / "ood.json"
    options = ["--sets", "3", "--seeds", "0", "--splits", "0", "1", "--no-nervecode", "--json", str(path)]
    ood.main(options)
    found = json.loads(path.read_text())
    assert found["script"] == "ood"
    (case,) = found["cases"]
    assert (case["name"], case["seed"], case["splits"], case["near"]) == ("digits", 0, [0, 1], ["digits89"])
    assert list(case["figures"])[:3] == ["noesis", "noesis without logits", "noesis, frozen on set 1"]
    assert set(NAMES) < set(case["figures"])
    assert [len(runs) for runs in case["figures"].values()] == [2, 2, 2, *[1] * len(NAMES)]
    ours = case["figures"]["noesis"]
    assert ours[0] != ours[1]  # another split
    assert ours[0]["inverted"]["auroc"] > 99
    assert ours[0]["digits89"]["auroc_interval"][0] < ours[0]["digits89"]["auroc"]
    alarms = case["false_alarms"]
    assert "trained on" in alarms["calibrated_on"]
    assert [list(run) for run in (*alarms["runs"], alarms["held_out"])] == [["0.01", "0.05", "0.1"]] * 3
    assert alarms["held_out"]["0.1"] == pytest.approx(0.1, abs=0.06)
    told = capsys.readouterr().out
    table = importlib.import_module("table")
    assert f"{table.detection_table(found['summary'])}\n\n" in table.render_detection(tmp_path) + "\n\n"
    text, count = table.put("a\n<!-- detection -->\nold\n<!-- end -->\nb", "detection", "new")
    assert (text, count) == ("a\n<!-- detection -->\nnew\n<!-- end -->\nb", 1)
    assert "| digits | digits89 (near) | noise | inverted | permuted | mean AUROC | far FPR95 |" in told
    assert f"| {found['summary']['overall']['noesis']['auroc']:.1f} |" in told
    assert "| digits, 0 | images the model was trained on: no guarantee |" in told


@pytest.mark.slow
def test_the_default_is_a_variant_of_the_ablations(detection, tmp_path):
    pytest.importorskip("sklearn")
    variants = detection.variants
    case = detection.sets.case(3, cache=tmp_path)
    names = variants.selected(case, "blocks")
    inputs = {"fit": case.fit, "test": case.test, **case.out}
    vectors = {name: variants.extract(case, x, [*names, case.logits]) for name, x in inputs.items()}
    for seed, logits in ((0, True), (3, True), (0, False)):
        variant = variants.Variant(doubt="energy" if logits else None, head=logits)
        # Nobody says without `logits` that the last module is no block.
        found = variants.scores(variant, names if logits else [*names, case.logits], vectors, seed)
        judged = detection.detector.judge(case, seed=seed, logits=logits)
        for name, scores in judged.scores.items():
            assert np.corrcoef(found[name], scores)[0, 1] > 0.9999
            assert np.median(np.abs(found[name] - scores)) < 1e-3
    assert type(case.model) is nn.Sequential  # unwrapped


@pytest.mark.parametrize("row", range(8))
def test_every_kind_of_variant_tells_far_from_normal(detection, row):
    variants, case = detection.variants, many(detection.sets)
    inputs = {"fit": case.fit, "test": case.test, **case.out}
    names = variants.selected(case, "leaves")
    vectors = {name: variants.extract(case, x, names) for name, x in inputs.items()}
    for one in variants.ablations()[row::8]:
        if one.name == "energy alone":
            continue
        found = variants.scores(one.variant, variants.layers_of(case, one.layers), vectors)
        assert list(found) == ["test", "far"]
        assert detection.metrics.auroc(found["test"], found["far"]) > 0.9, one.name


def many(sets):
    """The small case, with enough inputs to calibrate."""
    case = small_case(sets)
    object.__setattr__(case, "fit", torch.randn(300, 6))
    object.__setattr__(case, "blocks", ("0", "1"))
    return case


def test_a_constant_at_the_end_keeps_the_length_of_vectors(detection):
    variants = detection.variants
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2000, 6)) * np.arange(1, 7)
    inverse = np.linalg.inv(np.cov(x.T))
    at = generator.normal(size=(500, 6)) * 8
    expected = np.einsum("ni,ij,nj->n", at - x.mean(0), inverse, at - x.mean(0)) / 2

    def lengths(scale):
        book = variants.LayerCodebook(variants.noesis.Codebook(size=1), torch.device("cpu"))
        book.fit(variants.undirected(x, scale), generator)
        return book.code(torch.from_numpy(variants.undirected(at, scale)).float()).mixture.numpy()

    scale = float(np.sqrt((x**2).sum(1).mean()))
    assert np.corrcoef(lengths(scale), expected)[0, 1] > 0.99
    assert np.corrcoef(lengths(None), expected)[0, 1] < 0.8


def test_the_rules_of_the_ablations(detection):
    variants = detection.variants
    layers = np.array([[1.0, 2.0, 3.0], [0.5, 0.5, 8.0]])
    doubt = np.array([4.0, 0.25])
    together = 2 * np.log(np.exp(layers[:, :2] / 2).mean(1))
    np.testing.assert_allclose(variants.earlier(layers), together)
    density = (layers[:, 2] + together) / 2
    rules = variants.RULES
    expected = {
        "2 energy + last": [8 + 3 + 1.5, 0.5 + 8 + 0.5],
        "energy + density": doubt + density,
        "energy + last + earlier": doubt + layers[:, 2] + together,
        "plain sum": [10, 9.25],
        "maximum": [4, 8],
    }
    for start, want in expected.items():
        (rule,) = (rule for name, rule in rules.items() if name.startswith(start))
        np.testing.assert_allclose(rule(layers, doubt), want)


def test_tokens_are_judged_one_by_one(detection):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes)).eval()
    case = small_sequences(detection.sets)
    fit, test = torch.randint(0, 11, (130, 9)), torch.randint(0, 11, (20, 9))
    new = {"model": model, "logits": "lm_head", "features": "model.norm", "fit": fit, "test": test}
    new["out"] = {"other": torch.randint(20, 40, (15, 9))}
    for name, value in new.items():
        object.__setattr__(case, name, value)
    found = detection.detector.judge_tokens(case)
    assert list(found) == ["last layer", "mean over layers", "combined"]
    for name, scores in found.items():
        assert {where: x.shape for where, x in scores.items()} == {"test": (160,), "other": (120,)}
        assert detection.metrics.auroc(scores["test"], scores["other"]) > 0.9, name
    settings = detection.variants.noesis.Codebook(positions="each")
    with detection.detector.calibrated(case, settings, fit) as wrapped, torch.no_grad():
        wrapped(case.out["other"])
        layers = wrapped.surprise().layers
        layers = [layers[name].positions[:, :-1].ravel() for name in wrapped.calibration.counted]
    np.testing.assert_allclose(found["last layer"]["other"], layers[-1], rtol=1e-4)
    np.testing.assert_allclose(found["mean over layers"]["other"], np.mean(layers, 0), rtol=1e-4)
    alone = detection.detector.judge(case, positions="each")
    assert alone.scores["other"].shape == (15,)


# ---------------------------------------------------------------- means


def told(auroc: float, fpr95: float) -> dict:
    figures = {"auroc": auroc, "fpr95": fpr95, "aupr": auroc}
    return figures | {f"{name}_interval": [value - 1, value + 3] for name, value in figures.items()}


def made(name: str, ours: list[list[float]], baseline: list[float], seed: int = 0) -> dict:
    """A case whose out sets are one near and two far; FPR95 is 100 - AUROC."""

    def run(values: list[float]) -> dict:
        return {out: told(x, 100 - x) for out, x in zip(("near", "far1", "far2"), values, strict=True)}

    figures = {"noesis": [run(values) for values in ours], "Energy": [run(baseline)], "other": [run([50.0] * 3)]}
    return {"name": name, "seed": seed, "near": ["near"], "figures": figures}


def test_the_summary_is_of_means(ood):
    first = made("a", [[80, 90, 100], [82, 92, 100]], [70, 90, 80])
    second = made("a", [[90, 100, 100]], [80, 100, 100], seed=1)
    third = made("b", [[60, 98, 98]], [62, 96, 96])
    del third["figures"]["other"]
    found = ood.summary([first, second, third])
    a = found["sets"]["a"]["noesis"]
    assert a["outs"]["near"]["auroc"] == pytest.approx((81 + 90) / 2)  # runs first, then seeds
    assert a["outs"]["near"]["auroc_interval"] == pytest.approx([84.5, 88.5])
    assert a["auroc"] == pytest.approx((85.5 + 95.5 + 100) / 3)
    assert a["near_auroc"] == pytest.approx(85.5)
    assert a["far_auroc"] == pytest.approx(97.75)
    assert a["far_fpr95"] == pytest.approx(2.25)
    assert a["auroc_runs"] == pytest.approx([90, 274 / 3, 290 / 3])
    assert list(found["overall"]) == ["noesis", "Energy"]  # the other one lacks a set
    assert found["overall"]["noesis"]["auroc"] == pytest.approx(((85.5 + 95.5 + 100) / 3 + 256 / 3) / 2)
    energy = found["overall"]["Energy"]["far_fpr95"]
    assert energy == pytest.approx(((100 - 92.5) + 4) / 2)
    target = found["target"]
    assert target["auroc"]["best"] == "Energy"
    assert target["auroc"]["met"] is True
    assert target["far_fpr95"]["met"] is (found["overall"]["noesis"]["far_fpr95"] <= energy / 2)
    assert {name: near["met"] for name, near in target["near"].items()} == {"a": True, "b": False}  # 2 points below


def test_the_blind_figures_are_of_both_sets_and_all_methods(ood):
    found = json.loads((BENCHMARKS / "results" / "ood-blind-cpu.json").read_text())
    cases = found["cases"]
    assert found["script"] == "ood-blind"  # no part of the four sets' tables
    assert [(case["set"], case["seed"]) for case in cases] == [(number, seed) for number in (5, 6) for seed in range(3)]
    assert all({*NAMES, "nervecode", "nervecode recommended", "noesis"} <= set(case["figures"]) for case in cases)
    assert json.loads(json.dumps(ood.summary(cases))) == found["summary"]
    notes = (BENCHMARKS / "NOTES.md").read_text(encoding="utf-8")
    for name in ("mnist", "passages"):
        outs = found["summary"]["sets"][name]["noesis"]["outs"]
        assert " | ".join(f"{told['auroc']:.1f} / {told['fpr95']:.1f}" for told in outs.values()) in notes


# ---------------------------------------------------------------- speed


@pytest.mark.slow
def test_steps_with_codebooks_are_timed(detection):
    pytest.importorskip("nervecode")
    size = importlib.import_module("models").Size(batch=4, tokens=3, depth=1)
    found = detection.speed.stepping(rounds=2, seconds=0.0, size=size)
    variants = found["variants"]
    assert list(variants) == ["bare", "statistics", "codebooks", "surprise", "nervecode", "nervecode surprise"]
    assert found["layers"] == 2
    assert all(variants[name]["seconds"] > 0 for name in variants)
    assert "share_of_nervecode" in variants["codebooks"]
    text = importlib.import_module("table").speed_tables({"stepping": found})
    assert text.count("\n") == 7
    assert f"| stepping | surprise | {variants['surprise']['seconds'] * 1e3:.1f} ms" in text or "µs" in text


@pytest.mark.data
@pytest.mark.slow
def test_calibrating_is_timed_against_the_forwards(detection, data, monkeypatch):
    whole = detection.sets.case(1, data=data)
    assert len(whole.fit) == 3000
    few = dataclasses.replace(whole, fit=whole.fit[:300], fit_labels=whole.fit_labels[:300])
    monkeypatch.setattr(detection.speed, "case", lambda number, data: few)
    found = detection.speed.calibrating(rounds=1, data=data)
    assert found["inputs"] == 300
    assert found["variants"]["calibrate"]["ratio"] > 0.8
