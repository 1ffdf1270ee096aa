"""What edits do, against the same change made by hand."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.families import NAMES, family, inputs
from helpers.language_models import build, prompts
from noesis import interp
from noesis.interp.sites import LAYERED


def logits(model: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def by_hook(module: nn.Module, change: Callable[[Tensor], Tensor], *, before: bool, call: Callable[[], Any]) -> Any:
    """The truth: a plain hook of torch."""

    def pre(_module: Any, args: Any, kwargs: Any) -> Any:
        return (change(args[0]), *args[1:]), kwargs

    def post(_module: Any, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_pre_hook(pre, with_kwargs=True) if before else module.register_forward_hook(post)
    try:
        return call()
    finally:
        handle.remove()


# ---------------------------------------------------------------- at each component


@pytest.mark.parametrize("name", NAMES)
def test_each_component_can_be_edited_and_the_model_is_as_before(name: str) -> None:
    model, given = family(name), inputs(name)
    bare = logits(model, **given)
    found = interp.anatomy(model, **given)
    classes = {key: type(module) for key, module in model.named_modules()}
    for layer in (0, len(found.blocks) - 1):
        for component in LAYERED:
            if component in found.blocks[layer].refused:
                continue
            if component == "resid_mid" and found.blocks[layer].attn is None:
                with pytest.raises(noesis.NoesisError, match="what attention adds there is not known"):
                    interp.run(model, given, edits=[interp.Zero(f"resid_mid.{layer}")], anatomy=found)
                continue
            site = f"{component}.{layer}"
            kept = interp.run(model, given, keep=site, anatomy=found)[site]
            same = interp.run(model, given, edits=[interp.Custom(site, torch.clone)], anatomy=found)
            tolerance = (
                {"atol": 0, "rtol": 0} if component not in ("resid_mid", "result") else {"atol": 1e-6, "rtol": 0}
            )
            torch.testing.assert_close(same.logits, bare, **tolerance, equal_nan=True)
            changed = interp.run(model, given, keep=site, edits=[interp.Scale(site, 3.0)], anatomy=found)
            torch.testing.assert_close(changed[site], 3 * kept, atol=2e-4, rtol=1e-4)
            assert not torch.equal(changed.logits, bare)
    assert torch.equal(logits(model, **given), bare)
    assert {key: type(module) for key, module in model.named_modules()} == classes
    assert not any("_noesis_stops" in vars(module) for module in model.modules())


def test_heads_of_z_are_inputs_of_the_output_projection() -> None:
    model, ids = build("llama"), prompts()
    width = model.config.hidden_size // 4

    def zero(z: Tensor) -> Tensor:
        z = z.clone()
        z[..., 2 * width : 3 * width] = 0
        return z

    truth = by_hook(
        model.model.layers[1].self_attn.o_proj, zero, before=True, call=lambda: logits(model, input_ids=ids)
    )
    assert torch.equal(interp.run(model, ids, edits=[interp.Zero("z.1.2")]).logits, truth)
    assert torch.allclose(interp.run(model, ids, edits=[interp.Zero("result.1.2")]).logits, truth, atol=1e-6)


def test_the_stream_after_attention_is_changed_for_the_mlp_and_for_what_follows() -> None:
    model, ids = build("gpt2"), prompts()
    kept = interp.run(model, ids, keep=["resid_mid.1", "mlp.1"])
    direction = torch.randn(kept["resid_mid.1"].shape[-1])
    run = interp.run(
        model, ids, edits=[interp.Add("resid_mid.1", direction)], keep=["resid_mid.1", "resid_post.1", "mlp.1"]
    )
    assert torch.allclose(run["resid_mid.1"], kept["resid_mid.1"] + direction, atol=1e-5)
    assert torch.allclose(run["resid_post.1"], run["resid_mid.1"] + run["mlp.1"], atol=1e-5)
    assert not torch.allclose(run["mlp.1"], kept["mlp.1"], atol=1e-3)


def test_a_pattern_that_is_changed_is_what_values_are_weighed_by() -> None:
    model, ids = build("llama"), prompts()
    first = torch.zeros(7, 7)
    first[:, 0] = 1  # all look at the first token
    run = interp.run(
        model, ids, edits=[interp.Custom("pattern.1.3", lambda p: first.expand(p.shape))], keep=["z.1", "v.1"]
    )
    assert torch.allclose(run["z.1"][:, :, 3], run["v.1"][:, :1, 1].expand(-1, 7, -1), atol=1e-5)


def test_any_module_of_any_model() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 4)
    run = interp.run(model, x, edits=[interp.Zero("1")])
    assert run.anatomy is None
    assert torch.equal(run.output, model[2].bias.expand(3, 2))
    kept = interp.run(model, x, keep=["0", "module:1"])
    for site in ("0", "module:0", "1"):
        assert torch.equal(interp.run(model, 2 * x, edits=[interp.Patch(site, kept)]).output, kept.output)


# ---------------------------------------------------------------- kinds


def test_kinds_of_edits_are_what_they_say() -> None:
    model, ids = build("gpt2"), prompts()
    site = "resid_post.1"
    clean = interp.run(model, ids, keep=site)
    x = clean[site]
    direction = torch.randn(x.shape[-1])
    unit = direction / direction.norm()

    def after(edit: interp.Edit) -> Tensor:
        return interp.run(model, ids, keep=site, edits=[edit], anatomy=clean.anatomy)[site]

    assert after(interp.Zero(site)).abs().max() == 0
    assert torch.equal(after(interp.Scale(site, 0.5)), 0.5 * x)
    assert torch.allclose(after(interp.Add(site, direction, 2.0)), x + 2 * direction, atol=1e-6)
    assert (after(interp.Project(site, direction)) @ unit).abs().max() < 1e-5
    assert torch.allclose(after(interp.Project(site, direction)), x - (x @ unit)[..., None] * unit, atol=1e-5)
    two = torch.stack([direction, torch.randn_like(direction)])
    assert (after(interp.Project(site, two)) @ two.T).abs().max() < 1e-4
    noisy = after(interp.Noise(site, 0.1, seed=3))
    assert torch.equal(noisy, after(interp.Noise(site, 0.1, seed=3)))
    assert not torch.equal(noisy, after(interp.Noise(site, 0.1, seed=4)))
    assert (noisy - x).std() == pytest.approx(0.1, rel=0.1)


def test_noise_uses_no_generator_of_torch() -> None:
    model, ids = build("gpt2"), prompts()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    interp.run(
        model,
        ids,
        edits=[interp.Noise("resid_post.1", 0.1), interp.Resample("z.0", interp.run(model, ids, keep="z.0"))],
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_replacements_by_what_was_there_in_other_runs() -> None:
    model, ids = build("gpt2"), prompts()
    other = torch.roll(prompts(seed=1), 1, 0)
    reference = interp.run(model, other, keep=["resid_post", "z", "pattern"])
    there = reference["resid_post.1"]

    def after(edit: interp.Edit, site: str = "resid_post.1") -> Tensor:
        return interp.run(model, ids, keep=site, edits=[edit], anatomy=reference.anatomy)[site]

    assert torch.equal(after(interp.Patch("resid_post.1", reference)), there)
    assert torch.equal(after(interp.Patch("resid_post.1", there)), there)
    assert torch.equal(after(interp.Patch("z.1.2@-1", reference), "z.1.2@-1"), reference["z.1"][:, -1, 2])
    assert torch.equal(
        after(interp.Patch("pattern.1.2@3", reference), "pattern.1.2@3"), reference["pattern.1"][:, 2, 3]
    )
    assert torch.equal(after(interp.Freeze("resid_post.1", reference)), there)
    assert torch.allclose(after(interp.Mean("resid_post.1", reference)), there.mean((0, 1)).expand_as(there), atol=1e-5)
    by_position = after(interp.Mean("resid_post.1", reference, by_position=True))
    assert torch.allclose(by_position, there.mean(0).expand_as(there), atol=1e-5)
    drawn = after(interp.Resample("resid_post.1", reference, seed=1))
    assert all(any(torch.equal(row, example) for example in there) for row in drawn)
    both = interp.run(
        model, ids, keep=["resid_post.0", "resid_post.1"], edits=[interp.Resample("resid_post.0-1", reference, seed=1)]
    )
    rows = [
        [
            int((both[f"resid_post.{n}"][row] == reference[f"resid_post.{n}"]).flatten(1).all(1).nonzero()[0])
            for row in range(2)
        ]
        for n in (0, 1)
    ]
    assert rows[0] == rows[1]  # what is put in at several sites is of one example


def test_patching_the_last_block_gives_the_other_runs_logits() -> None:
    model, ids, other = build("gpt2"), prompts(), prompts(seed=1)
    reference = interp.run(model, other, keep="resid_post.2")
    assert torch.equal(interp.run(model, ids, edits=[interp.Patch("resid_post.2", reference)]).logits, reference.logits)


# ---------------------------------------------------------------- where and when


def test_positions_rows_and_conditions() -> None:
    model, ids = build("gpt2"), prompts()
    clean = interp.run(model, ids, keep="resid_post.0")
    x = clean["resid_post.0"]

    def after(edit: interp.Edit) -> Tensor:
        return interp.run(model, ids, keep="resid_post.0", edits=[edit], anatomy=clean.anatomy)["resid_post.0"]

    expected = x.clone()
    expected[:, [1, 6]] = 0
    assert torch.equal(after(interp.Zero("resid_post.0", positions=[1, -1])), expected)
    expected = x.clone()
    expected[1] = 0
    assert torch.equal(after(interp.Zero("resid_post.0", rows=1)), expected)
    bound = float(x.norm(dim=-1).median())
    loud = (x.norm(dim=-1, keepdim=True) > bound).expand_as(x)
    assert torch.equal(after(interp.Zero("resid_post.0", when=interp.When("norm", ">", bound))), x.masked_fill(loud, 0))
    assert torch.equal(after(interp.Zero("resid_post.0", when=lambda part: part > 0)), x.clamp(max=0))
    expected = x.clone()
    expected[0, 2] = 0
    assert torch.equal(after(interp.Zero("resid_post.0@2", rows=0)), expected)


def test_order_is_that_of_the_edits_and_of_what_comes_after_what() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    x, one = torch.randn(3, 2), torch.ones(2)
    y = model[0](x)
    double, add = interp.Scale("0", 2.0, name="double"), interp.Add("0", one, name="add")
    assert torch.equal(interp.run(model, x, edits=[double, add]).output, (2 * y + 1).relu())
    assert torch.equal(interp.run(model, x, edits=[add, double]).output, (2 * (y + 1)).relu())
    late = interp.Scale("0", 2.0, name="double", after="add")
    assert torch.equal(interp.run(model, x, edits=[late, add]).output, (2 * (y + 1)).relu())
    with interp.editing(model, double, add) as ed:
        ed.reorder("add", "double")
        assert torch.equal(model(x), (2 * (y + 1)).relu())
        with ed.suspended():
            assert torch.equal(model(x), y.relu())
        with ed.suspended("add"):
            assert torch.equal(model(x), (2 * y).relu())
        ed.switch("double", on=False)
        assert torch.equal(model(x), (y + 1).relu())
    assert ed.fired == {"add": 2, "double": 2}
    assert torch.equal(model(x), y.relu())


def test_one_within_another_and_runs_within() -> None:
    model, ids = build("gpt2"), prompts()
    clean = interp.run(model, ids, keep="resid_post.1")
    with interp.editing(model, interp.Scale("resid_post.1", 2.0)), interp.editing(model, interp.Zero("attn.2")):
        run = interp.run(model, ids, keep=["resid_post.1", "attn.2"], anatomy=clean.anatomy)
    assert torch.equal(run["resid_post.1"], 2 * clean["resid_post.1"])
    assert run["attn.2"].abs().max() == 0
    assert torch.equal(interp.run(model, ids).logits, clean.logits)


def test_the_same_edits_can_be_entered_again() -> None:
    model, ids = build("llama"), prompts()
    ed = interp.editing(model, interp.Zero("z.1"), interp.Scale("pattern.2", 0.5))
    outputs = []
    for _ in range(2):
        with ed:
            outputs.append(logits(model, input_ids=ids))
    assert torch.equal(*outputs)
    assert set(ed.fired.values()) == {2}


def test_a_bound_limits_how_far_an_edit_goes() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    x = torch.randn(5, 2)
    with interp.editing(model, interp.Add("0", torch.tensor([100.0, 0.0])), bound=0.5) as ed:
        change = model(x)
    with torch.no_grad():
        y = model(x)
    assert torch.allclose((change - y).norm(dim=-1), 0.5 * y.norm(dim=-1), rtol=1e-4)
    assert ed.changes["Add 0"] == pytest.approx(0.5, rel=1e-3)
    assert "5" in repr(ed).splitlines()[-1]


# ---------------------------------------------------------------- nothing silent


def test_an_edit_that_never_fired_is_an_error() -> None:
    model, ids = build("gpt2"), prompts()
    with (
        pytest.raises(noesis.NoesisError, match=r"Zero z\.1 never fired"),
        interp.editing(model, interp.Zero("z.1", steps="decode")),
    ):
        model(ids)
    with pytest.raises(noesis.NoesisError, match="never fired"), interp.editing(model, interp.Zero("z.1")):
        pass
    with pytest.raises(noesis.NoesisError, match="never fired"):
        interp.run(model, ids, edits=[interp.Zero("resid_post.0", positions=[99])])
    with pytest.raises(noesis.NoesisError, match="never fired"):
        interp.run(model, ids, edits=[interp.Zero("resid_post.0", when=interp.When("norm", ">", 1e9))])
    with pytest.raises(KeyError), interp.editing(model, interp.Zero("z.1")):
        raise KeyError  # which is what is said


def test_nan_is_kept_out_and_said() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    ed = interp.editing(model, interp.Custom("0", lambda x: x / 0))
    with pytest.raises(noesis.NoesisError, match="made NaN or Inf"), ed:
        y = model(torch.ones(1, 2))
    assert torch.equal(y, model(torch.ones(1, 2)))


def test_an_edit_without_effect_is_told() -> None:
    from loguru import logger

    said: list[str] = []
    sink = logger.add(said.append, level="WARNING")
    logger.enable("noesis")
    try:
        interp.run(nn.Sequential(nn.Linear(2, 2)).eval(), torch.ones(1, 2), edits=[interp.Scale("0", 1.0)])
    finally:
        logger.remove(sink)
    assert any("fired and changed nothing" in line for line in said)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: [interp.Zero("z.9")], r"Zero has 'z.9', layer 9"),
        (lambda run: [interp.Zero("z.1.9")], "head 9"),
        (lambda run: [interp.Zero("zz.1", name="mine")], "Zero 'mine' has 'zz.1', which is neither"),
        (lambda run: [interp.Zero(3)], "the site 3"),
        (lambda run: [interp.Zero("z.1", positions="last")], "positions='last'"),
        (lambda run: [interp.Zero("z.1", steps="prefil")], "steps='prefil'"),
        (lambda run: [interp.Zero("z.1", when=3)], "when=3"),
        (lambda run: [interp.Zero("z.1", when=interp.When("norm", "=", 1))], "'<' or '>'"),
        (lambda run: [interp.Zero("z.1@2", positions=[1])], "has no tokens"),
        (lambda run: [interp.Add("resid_post.1", torch.ones(7))], "resid_post.1"),
        (lambda run: [interp.Add("resid_post.1", [1.0])], "is given a direction that is list"),
        (lambda run: [interp.Project("resid_post.1", torch.zeros(32))], "length 0"),
        (lambda run: [interp.Patch("z.2", run)], "kept z.2"),
        (lambda run: [interp.Mean("resid_post.1", run)], r"reference that has z\.1"),
        (lambda run: [interp.Patch("z.1", 3)], "reference of type int"),
        (lambda run: [interp.Patch("z.1", torch.ones(2, 9, 4, 8))], "values of shape 2x9x4x8"),
        (lambda run: [interp.Custom("z.1", 3)], "a function"),
        (lambda run: [interp.Custom("z.1", lambda x: 3)], "returned a int"),
        (lambda run: [interp.Custom("z.1", lambda x: x[:1, :2])], "makes a tensor of shape"),
        (
            lambda run: [interp.Zero("z.1", name="a", after="b"), interp.Zero("z.1", name="b", after="a")],
            "wait for each other",
        ),
        (lambda run: [interp.Zero("z.1", name="a", after="c")], "'c', which is not there"),
        (lambda run: [interp.Zero("z.1", name="a"), interp.Zero("z.1", name="a")], "two edits are called 'a'"),
        (lambda run: ["z.1"], "a str among edits"),
    ],
)
def test_what_cannot_be_is_said(make: Callable[[Any], Any], message: str) -> None:
    model, ids = build("gpt2"), prompts()
    kept = interp.run(model, ids, keep="z.1")
    with pytest.raises(noesis.NoesisError, match=message):
        interp.run(model, ids, edits=make(kept))


# ---------------------------------------------------------------- in the company of others


def test_observing_sees_the_edited_model() -> None:
    model, ids = build("llama"), prompts()
    wrapped = noesis.wrap(model, layers="blocks")
    wrapped(ids)
    plain = wrapped.trace()
    wrapped.reset()
    with interp.editing(wrapped, interp.Zero("attn.*")) as ed:
        out = wrapped(ids).logits
    assert set(ed.fired.values()) == {3}
    edited = wrapped.trace()
    assert edited.values.shape == plain.values.shape  # the run that found the anatomy is no step
    assert not torch.equal(torch.tensor(plain.values), torch.tensor(edited.values))
    bare = wrapped.unwrap()
    with interp.editing(bare, interp.Zero("attn.*")):
        assert torch.equal(bare(ids).logits, out)
    assert not any(isinstance(module, noesis.Observed) for module in model.modules())


def test_wrapping_and_unwrapping_inside() -> None:
    model, ids = build("llama"), prompts()
    bare = logits(model, input_ids=ids)
    with interp.editing(model, interp.Zero("attn.0")):
        edited = logits(model, input_ids=ids)
        wrapped = noesis.wrap(model)
        assert torch.equal(logits(wrapped, input_ids=ids), edited)
    assert torch.equal(logits(wrapped, input_ids=ids), bare)
    assert len(wrapped.trace()) == 2
    with interp.editing(model, interp.Zero("attn.0")):
        wrapped.unwrap()
        assert torch.equal(logits(model, input_ids=ids), edited)
    assert all(type(module).__mro__[1] is not type(module) for module in model.modules())
    assert torch.equal(logits(model, input_ids=ids), bare)
    assert not any("noesis" in base.__module__ for module in model.modules() for base in type(module).__mro__)


def test_copies_made_inside_are_plain() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with interp.editing(model, interp.Zero("0")):
        model(torch.ones(1, 2))
        made, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (made, read):
        assert [type(module) for module in other.modules()] == [nn.Sequential, nn.Linear, nn.ReLU]
        assert torch.equal(other(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_other_threads_are_edited_too_and_runs_of_others_are_not_kept() -> None:
    model, ids = build("gpt2"), prompts()
    outputs: list[Tensor] = []
    with interp.editing(model, interp.Zero("result.1.0"), interp.Scale("resid_mid.1", 2.0)):
        here = logits(model, input_ids=ids)
        threads = [threading.Thread(target=lambda: outputs.append(logits(model, input_ids=ids))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outputs) == 4
    assert all(torch.equal(out, here) for out in outputs)


def test_gradients_flow_through_edits_and_training_goes_on() -> None:
    model, ids = build("gpt2").train(), prompts()
    found = interp.anatomy(build("gpt2"), ids)
    with interp.editing(model, interp.Zero("mlp.1"), anatomy=found):
        model(ids, labels=ids).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is None or grad.abs().sum() == 0 for name, grad in grads.items() if "h.1.mlp" in name)
    assert grads["transformer.h.0.mlp.c_fc.weight"].abs().sum() > 0


def test_activation_checkpointing_edits_the_recomputation_and_counts_it_once() -> None:
    def grads(checkpointing: bool) -> tuple[list[Tensor], dict[str, int]]:
        torch.manual_seed(0)
        model = build("llama").train()
        found = interp.anatomy(model.eval(), prompts())
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with interp.editing(model, interp.Scale("mlp.1", 0.5), interp.Zero("z.2.1"), anatomy=found) as ed:
            model(prompts(), labels=prompts(), use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], ed.fired

    plain, again = grads(False), grads(True)
    assert plain[1] == again[1] == {"Scale mlp.1": 1, "Zero z.2.1": 1}
    assert all(torch.equal(a, b) for a, b in zip(plain[0], again[0], strict=True))


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model, ids = build("llama"), prompts()
    bare = logits(model, input_ids=ids)

    def fails(_x: Tensor) -> Tensor:
        raise ZeroDivisionError

    ed = interp.editing(model, interp.Zero("result.0.1"), interp.Custom("mlp.1", fails, name="fails"))

    def several() -> None:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model(ids)
        ed.switch("fails", on=False)
        model(ids)

    with pytest.raises(noesis.NoesisError, match="^fails never fired"), ed:
        several()
    assert torch.equal(logits(model, input_ids=ids), bare)
