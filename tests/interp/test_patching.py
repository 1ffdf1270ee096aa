"""Activation patching: bit for bit what whole forwards under hooks give, and the truth of circuits by construction."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.circuits import Circuit, indirect_object, induction
from helpers.families import NAMES, family, inputs
from helpers.language_models import VOCABULARY, build, prompts
from noesis import interp
from noesis.interp.pairs import Inputs
from noesis.interp.sweeping import Looking, Resuming, Sweep

PAIRS, LENGTH = 4, 7
METRIC = interp.logit_difference(right=[5, 6, 7, 8], wrong=[9, 10, 11, 12])
#: Family -> where its blocks are, and in a block its output projection, what attention adds, and what the mlp adds.
PLACES = {
    "llama": ("model.layers", "self_attn.o_proj", "self_attn", "mlp"),
    "gpt2": ("transformer.h", "attn.c_proj", "attn", "mlp"),
    "neox": ("gpt_neox.layers", "attention.dense", "attention", "mlp"),  # parallel
    "gemma2": ("model.layers", "self_attn.o_proj", "post_attention_layernorm", "post_feedforward_layernorm"),
    "qwen3": ("model.layers", "self_attn.o_proj", "self_attn", "mlp"),
    "mixtral": ("model.layers", "self_attn.o_proj", "self_attn", "mlp"),
}


def ids_of(corrupted: bool) -> Tensor:
    ids = prompts(PAIRS, LENGTH)
    if corrupted:
        ids = ids.clone()
        ids[:, 3] = (ids[:, 3] + 1) % VOCABULARY
    return ids


def hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], None], before: bool) -> Iterator[None]:
    """Change a copy of what a module is given, or of what it returns."""

    def given(_module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            new = args[0].clone()
            change(new)
            return (new, *args[1:]), kwargs
        new = kwargs["hidden_states"].clone()
        change(new)
        return args, {**kwargs, "hidden_states": new}

    def returned(_module: Any, _args: Any, output: Any) -> Any:
        new = hidden(output).clone()
        change(new)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = (
        module.register_forward_pre_hook(given, with_kwargs=True) if before else module.register_forward_hook(returned)
    )
    try:
        yield
    finally:
        handle.remove()


def naive(name: str, model: Any, site: interp.Site, times: int = 1, **options: Any) -> list[list[float]]:
    """The metric of whole forwards under hooks, of so many copies of the pairs in one batch, all with the same cell."""
    blocks, out, attn, mlp = PLACES[name]
    block = model.get_submodule(f"{blocks}.{site.layer}")
    module, before = {
        "resid_pre": (block, True),
        "resid_post": (block, False),
        "z": (block.get_submodule(out), True),
        "attn": (block.get_submodule(attn), False),
        "mlp": (block.get_submodule(mlp), False),
    }[site.component]
    held: list[Tensor] = []
    tokens = slice(None) if site.position is None else site.position
    width = model.config.hidden_size // 4 if name != "gpt2" else model.config.n_embd // 4
    wide = slice(None) if site.head is None else slice(site.head * width, (site.head + 1) * width)
    with torch.no_grad():
        with hooked(module, held.append, before):
            model(ids_of(False), **options)
        source = held[0].repeat(times, 1, 1)

        def put(whole: Tensor) -> None:
            whole[:, tokens, wide] = source[:, tokens, wide]

        with hooked(module, put, before):
            logits = model(ids_of(True).repeat(times, 1), **options).logits
    return [METRIC(each).tolist() for each in logits.split(PAIRS)]


@pytest.mark.parametrize("name", PLACES)
def test_each_cell_is_bit_for_bit_a_whole_forward_under_hooks(name: str) -> None:
    model = family(name)
    sites = ["resid_pre", "resid_post", "attn", "mlp"]
    effects = interp.patch(model, ids_of(False), ids_of(True), METRIC, sites=sites, batch=PAIRS)
    heads = interp.patch(model, ids_of(False), ids_of(True), METRIC, sites="z", positions="all", batch=PAIRS)
    layers = len(interp.anatomy(model, ids_of(False)).blocks)
    assert len(effects) == layers * 4 * LENGTH
    assert len(heads) == layers * 4
    for found in (effects, heads):
        for at, site in enumerate(found.sites[:: 3 if found is effects else 1]):
            row = at * (3 if found is effects else 1)
            assert found.patched[row].tolist() == naive(name, model, site, logits_to_keep=1)[0], site
    with torch.no_grad():
        corrupted, clean = (METRIC(model(ids_of(which), logits_to_keep=1)) for which in (True, False))
    assert effects.corrupted.tolist() == corrupted.tolist()
    assert effects.clean.tolist() == clean.tolist()
    assert np.unique(effects.patched).size > layers * LENGTH  # cells differ


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_cells_that_share_a_batch_are_those_of_whole_forwards_of_that_shape(name: str) -> None:
    model, times = family(name), 4
    options = {"sites": ["z.1", "mlp.1"], "positions": "all", "batch": times * PAIRS}
    effects = interp.patch(model, ids_of(False), ids_of(True), METRIC, **options)
    for at, site in enumerate(effects.sites):
        assert effects.patched[at].tolist() in naive(name, model, site, times, logits_to_keep=1)
    alone = interp.patch(model, ids_of(False), ids_of(True), METRIC, **{**options, "batch": 1})
    np.testing.assert_allclose(alone.patched, effects.patched, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox", "olmo2"])
def test_other_components_do_what_they_are_made_of_does(name: str) -> None:
    """Neurons are what the mlp is made of, and z what a result is; the others differ from each other."""
    model = family(name)
    patch = functools.partial(interp.patch, model, ids_of(False), ids_of(True), METRIC, positions="all")
    sites = ["q", "k", "v", "z", "pattern", "result", "neurons", "mlp", "resid_mid", "resid_post", "embed"]
    anatomy = interp.anatomy(model, ids_of(False))
    sites = [site for site in sites if not any(site in block.refused for block in anatomy.blocks)]
    effects = patch(sites=sites, anatomy=anatomy)
    for layer, block in enumerate(anatomy.blocks):
        if "neurons" in sites and not block.post_norms:
            assert effects["neurons", layer].mean == pytest.approx(effects["mlp", layer].mean, abs=1e-4)
        if not block.post_norms:
            z, result = (effects[part, layer, 1].mean for part in ("z", "result"))
            assert z == pytest.approx(result, abs=1e-4)
        assert effects["resid_post", layer].mean == pytest.approx(1.0, abs=1e-4)
        assert len({round(effects[part, layer, 0].mean, 6) for part in ("q", "v", "z")}) == 3
    assert effects["embed"].mean == pytest.approx(1.0, abs=1e-4)
    assert {str(site) for site in effects.sites if site.component == "k"} == {
        f"k.{layer}.{head}" for layer, block in enumerate(anatomy.blocks) for head in range(block.kv_heads)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_taken_up_or_whole_forwards_are_the_same_in_every_family(name: str) -> None:
    """Padding, parallel blocks, post-norms, caps, experts, two towers: bit for bit."""
    model, clean = family(name), inputs(name)
    corrupted = {key: value if key == "attention_mask" else value.flip(0) for key, value in clean.items()}
    metric = interp.logit_difference(0, 1).bound(clean)
    anatomy = interp.anatomy(model, **clean)
    found = Inputs.of(clean, model, "clean"), Inputs.of(corrupted, model, "corrupted")
    places = [
        interp.Site(component, layer)
        for component in ("resid_pre", "resid_post", "attn", "mlp", "z", "k", "pattern", "resid_mid")
        for layer, block in enumerate(anatomy.blocks)
        if component not in block.refused and not (component == "resid_mid" and block.attn is None)
    ]
    looking = Looking(metric, found[1], model)
    sweep = Sweep(model, anatomy, found[1], found[0], looking, places, "all")
    resuming = Resuming(model, found[0], anatomy)
    assert not resuming.why_not
    assert len(resuming.after) == len(anatomy.blocks) - (name == "t5")  # between its towers
    _, taken_up = sweep.run(2, resuming)
    resuming.why_not = "it is not to be"
    _, whole = sweep.run(2, resuming)
    assert np.array_equal(taken_up, whole)
    assert (taken_up != taken_up[:, :1]).any()


# ---------------------------------------------------------------- truth by construction


@functools.cache
def made(kind: str, seed: int) -> Circuit:
    return {"induction": induction, "indirect object": indirect_object}[kind](seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(
    ("kind", "way", "truth"),
    [
        ("induction", "before", {"previous": 1.0, "induction": 1.0}),
        ("induction", "answer", {"previous": 0.0, "induction": 1.0}),
        ("indirect object", "swap", {"duplicate": 1.0, "inhibition": 1.0, "mover": 1.0}),
    ],
)
def test_exact_patching_is_the_truth(kind: str, way: str, truth: dict[str, float], direction: Any, seed: int) -> None:
    circuit = made(kind, seed)
    pairs = circuit.sample(12, seed, way, ragged=bool(seed % 2))
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    given = (circuit.model, pairs.clean_inputs, pairs.corrupted_inputs, metric)
    effects = interp.patch(*given, sites="z", positions="all", direction=direction)
    expected = {circuit.site("z", name): value for name, value in truth.items()}
    for row, site in enumerate(effects.sites):
        if str(site) in expected:
            np.testing.assert_allclose(effects.values[row], expected[str(site)], atol=1e-5)
        else:
            assert not effects.values[row].any(), site  # exactly 0
    assert {str(each.site) for each in effects.significant()} == {name for name, value in expected.items() if value}
    assert effects.dropped == []


@pytest.mark.parametrize("seed", range(4))
def test_positions_at_which_it_happens(seed: int) -> None:
    circuit = made("induction", seed)
    pairs = circuit.sample(8, seed, ragged=True)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    given = (circuit.model, pairs.clean_inputs, pairs.corrupted_inputs, metric)
    effects = interp.patch(*given, sites=[circuit.site("z", "previous"), circuit.site("z", "induction"), "resid_post"])
    (first, previous), (second, head) = circuit.heads["previous"], circuit.heads["induction"]
    real = pairs.mask.bool().numpy()
    for row, site in enumerate(effects.sites):
        truth = np.zeros(8)
        place = {
            ("z", first, previous): pairs.at["answer"],
            ("z", second, head): pairs.at["end"],
            ("resid_post", site.layer, None): (
                pairs.at["before"]
                if site.layer < first
                else pairs.at["end"]
                if site.layer >= second
                else pairs.at["answer"]
            ),
        }[site[:3]]
        truth[place.numpy() == site.position] = 1.0
        truth[~real[:, site.position]] = np.nan  # padding
        np.testing.assert_allclose(effects.values[row], truth, atol=1e-5, err_msg=str(site))
    assert "at padding" in repr(effects)


# ---------------------------------------------------------------- what is run


def test_logits_are_computed_where_the_metric_looks_alone() -> None:
    model, shapes = build("llama"), []
    model.lm_head.register_forward_hook(lambda _m, args, _o: shapes.append(args[0].shape[1]))
    anatomy = interp.anatomy(model, ids_of(False))
    shapes.clear()
    interp.patch(model, ids_of(False), ids_of(True), METRIC, anatomy=anatomy)
    assert set(shapes) == {1}
    ragged = interp.logit_difference(5, 6, positions=[2, 6, 4, 6])
    shapes.clear()
    effects = interp.patch(model, ids_of(False), ids_of(True), ragged, sites="mlp", positions="all", anatomy=anatomy)
    assert set(shapes) == {3}
    with torch.no_grad():
        assert effects.corrupted == pytest.approx(ragged(model(ids_of(True)).logits).numpy(), abs=1e-6)
    assert effects.dropped == [0]  # it looks before the change


def test_blocks_before_the_cell_and_cells_that_hold_the_same_are_not_run() -> None:
    model, runs = build("llama"), [0, 0, 0]
    anatomy = interp.anatomy(model, ids_of(False))
    for layer, block in enumerate(model.model.layers):

        def count(_m: Any, _a: Any, _o: Any, layer: int = layer) -> None:
            runs[layer] += 1

        block.mlp.register_forward_hook(count)
    interp.patch(model, ids_of(False), ids_of(True), METRIC, anatomy=anatomy, batch=PAIRS)
    changed = LENGTH - 3  # positions from the replaced token on
    # Of 3 x 7 cells: those of layer 0 run blocks 1 and 2, those of layer 1 block 2, those of layer 2 none.
    fixed = runs[0]
    assert runs[1] - fixed == changed
    assert runs[2] - fixed <= 2 * changed + 3


def test_pairs_beyond_a_batch_and_functions_of_all_pairs() -> None:
    model = build("llama")
    whole = interp.patch(model, ids_of(False), ids_of(True), METRIC, sites="z", positions="all")
    parts = interp.patch(model, ids_of(False), ids_of(True), METRIC, sites="z", positions="all", batch=3)
    np.testing.assert_allclose(parts.values, whole.values, atol=1e-4)
    sizes = []

    def own(logits: Tensor) -> Tensor:
        sizes.append(logits.shape)
        return logits[:, -1, 5] - logits[:, -1, 9]

    function = interp.patch(model, ids_of(False), ids_of(True), own, sites="z", positions="all", batch=3)
    assert set(sizes) == {(PAIRS, LENGTH, VOCABULARY)}
    assert function.metric == "own"
    simple = interp.logit_difference(5, 9)
    same = interp.patch(model, ids_of(False), ids_of(True), simple, sites="z", positions="all", batch=3)
    np.testing.assert_allclose(function.values, same.values, atol=1e-4)


class Again(nn.Module):
    """Two blocks, each run twice: no block is one place in a forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in (*self.layers, *self.layers):
            x = x + layer(x)
        return x


def test_a_model_that_cannot_be_taken_up_takes_whole_forwards_and_says_so() -> None:
    clean, corrupted = (torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    patch = functools.partial(interp.patch, Again().eval(), clean, corrupted, interp.logit_difference(0, 1))
    why = "each cell takes a whole forward: block 'layers.0' runs more than once"
    with pytest.warns(noesis.errors.NoesisWarning, match=why):
        effects = patch(sites="enter")
    np.testing.assert_allclose(effects.values, np.repeat([[0.0], [0.0], [1.0]], 5, axis=1), atol=1e-6)
    assert effects.meta["resumed"] is False
    with (
        pytest.warns(noesis.errors.NoesisWarning, match=why),
        pytest.raises(noesis.NoesisError, match="'module:layers.0.0' was kept 2 times"),
    ):
        patch(sites="layers.0.0")


def test_models_of_no_library_and_modules_by_name() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
    model = nn.Sequential(nn.Linear(6, 6), blocks, nn.Linear(6, 4)).eval()
    clean, corrupted = (torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    metric = interp.logit_difference(0, 1)
    sites = ["resid_pre", "resid_post", "0", "1.1.0"]
    effects = interp.patch(model, clean, corrupted, metric, sites=sites, positions="all")
    np.testing.assert_allclose(effects.values, 1.0, atol=1e-5)  # one stream: each place is sufficient
    each = interp.patch(model, clean, corrupted, metric, sites=sites)
    assert all(each[f"{site}@1"].mean == 0 for site in ("resid_pre.0", "resid_post.2", "module:0", "module:1.1.0"))
    assert all(each[f"{site}@2"].mean == pytest.approx(1) for site in ("resid_pre.0", "module:0", "module:1.1.0"))


def test_images_have_classes_and_no_positions_of_logits() -> None:
    model = family("vit")
    clean, corrupted = (torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    metric = interp.logit_difference(0, 1)
    inputs = ({"pixel_values": clean}, {"pixel_values": corrupted})
    effects = interp.patch(model, *inputs, metric, sites=["resid_pre.0", "z.1"], positions="all")
    assert effects["resid_pre.0"].mean == pytest.approx(1.0, abs=1e-4)
    assert len(effects) == 5
    with torch.no_grad():
        assert effects.clean == pytest.approx(metric(model(clean).logits).numpy(), abs=1e-6)


def test_models_without_logits_and_functions_of_what_they_return() -> None:
    model = build("llama").model  # without a head
    kinds = set()

    def norm(output: Any) -> Tensor:
        kinds.add(type(output).__name__)
        return output.last_hidden_state[:, -1].norm(dim=-1)

    effects = interp.patch(model, ids_of(False), ids_of(True), norm, positions="all")
    assert effects.meta["resumed"]
    np.testing.assert_allclose(effects.values, 1.0, atol=1e-4)
    assert kinds == {"BaseModelOutputWithPast"}


def test_nothing_is_left_on_the_model() -> None:
    model = build("llama")
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(ids_of(True)).logits
    interp.patch(model, ids_of(False), ids_of(True), METRIC, sites=["z", "resid_post"])
    assert [type(module) for module in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(model(ids_of(True)).logits, before)


def test_observed_and_edited_models() -> None:
    model = build("llama")
    patch = functools.partial(interp.patch, clean=ids_of(False), corrupted=ids_of(True), metric=METRIC, positions=-1)
    plain = patch(model, sites="z.0")
    assert [site.position for site in plain.sites] == [-1] * 4
    wrapped = noesis.wrap(model)
    wrapped(ids_of(True))
    assert np.array_equal(patch(wrapped, sites="z.0").patched, plain.patched)
    assert len(wrapped.trace()) == 1  # forwards of the sweep are no steps
    with interp.editing(wrapped, interp.Zero("mlp.1")):
        edited = patch(wrapped, sites="z.0")
    noesis.unwrap(wrapped)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    assert np.array_equal(edited.patched, patch(model, sites="z.0").patched)  # effects in the model as it is edited
    assert not np.array_equal(edited.patched, plain.patched)


# ---------------------------------------------------------------- bad input


class OtherWay(nn.Module):
    """Leaves a part out where there are many rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.layers = nn.Linear(6, 6), nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x) if len(x) <= PAIRS else x
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_site_that_does_not_fire_is_no_site_without_effect() -> None:
    clean, corrupted = (torch.randn(PAIRS, 32, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with pytest.raises(noesis.NoesisError, match=r"module:part did not fire in a batch of \d+ rows.*one of 4"):
        interp.patch(OtherWay().eval(), clean, corrupted, interp.logit_difference(0, 1), sites="part")


def shorter(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, :2], ids[:, 3:]], dim=1)


def masked(ids: Tensor, padding: int) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[2, LENGTH - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"corrupted": shorter(ids_of(False))},
            "clean prompts have 7 tokens and corrupted ones 6; they differ from position 2, 2, 2, 2 on",
        ),
        (
            {"clean": masked(ids_of(False), 1), "corrupted": masked(ids_of(True), 3)},
            r"pair 2 has 6 tokens clean and 4 corrupted: one of them has padding at positions \[4, 5\]",
        ),
        ({"corrupted": ids_of(True)[:2]}, "clean has 4 rows, and corrupted 2"),
        ({"corrupted": {"input_ids": ids_of(True), "attention_mask": None}}, "clean has the arguments input_ids"),
        ({"clean": "Mary and John", "corrupted": "Mary"}, "clean is str"),
        ({"metric": lambda logits: logits[:, -1, 0].mean()}, "such as a mean, for a batch of 4"),
        ({"metric": interp.logit_difference([1, 2], 3)}, "logit difference is of 2 examples, and there are 4 pairs"),
        ({"sites": "resid_pots"}, "sites has 'resid_pots'.*resid_post"),
        ({"sites": "z.9"}, "sites has 'z.9', layer 9"),
        ({"sites": "logits"}, "sites has 'logits'"),
        ({"sites": []}, "sites is empty"),
        ({"positions": 7}, "position 7 of resid_post.0"),
        ({"positions": "every"}, "positions is 'every'"),
        ({"positions": [1.5]}, r"positions is \[1.5\]"),
        ({"direction": "ablate"}, "direction is 'ablate'"),
        ({"batch": 0}, "batch is 0"),
        ({"corrupted": ids_of(False)}, "same metric in all 4 pairs"),
    ],
)
def test_what_does_not_fit_says_so(change: dict[str, Any], message: str) -> None:
    given = {"clean": ids_of(False), "corrupted": ids_of(True), "metric": METRIC, "sites": "resid_post", **change}
    with pytest.raises(noesis.NoesisError, match=message):
        interp.patch(build("llama"), given.pop("clean"), given.pop("corrupted"), given.pop("metric"), **given)


def test_training_mode_is_refused() -> None:
    model = build("llama")
    anatomy = interp.anatomy(model, ids_of(False))
    with pytest.raises(noesis.NoesisError, match="in training mode"):
        interp.patch(model.train(), ids_of(False), ids_of(True), METRIC, anatomy=anatomy)


def test_half_precision_that_cannot_tell_them_apart_is_refused() -> None:
    model = build("llama").to(torch.bfloat16)
    model.lm_head.weight.data.add_(2)  # logits of one size, whose differences are near its resolution
    with pytest.raises(noesis.NoesisError, match="half precision, whose rounding moves the metric by .*float32"):
        interp.patch(model, ids_of(False), ids_of(True), METRIC)
    circuit = induction(0)
    pairs = circuit.sample(8)
    metric = interp.logit_difference(pairs.right, pairs.wrong)
    effects = interp.patch(
        circuit.model.to(torch.bfloat16), pairs.clean, pairs.corrupted, metric, sites="z", positions="all"
    )
    assert effects[circuit.site("z", "induction")].mean == pytest.approx(1, abs=0.05)


def test_patching_warns_of_nothing_else() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interp.patch(build("gpt2"), ids_of(False), ids_of(True), METRIC)
