"""noesis.diff: the same inputs through two models, and what of that is said."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import noesis
from helpers.models import Garments
from noesis.diffing.kept import keep
from noesis.diffing.weights import BUCKETS, change, weights_of
from noesis.errors import BadType, BadValue, TooLarge

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    *("Once upon a time", "Tom was happy because", "Lily and Ben went to the park", "The dog ran to the big tree"),
    *("One day a cat", "Mom said it was time to", "The sun was bright and", "He liked to play with his"),
]
#: The weight that is changed.
SUSPECT = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def llama(data: Path) -> nn.Module:
    """A trained Llama."""
    return transformers.AutoModelForCausalLM.from_pretrained(data / "stories260k").eval()


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(data / "stories260k")


@pytest.fixture
def changed(llama: nn.Module) -> nn.Module:
    """The same with one weight scaled by 1.3."""
    model = copy.deepcopy(llama)
    model.get_submodule(SUSPECT).weight.data.mul_(1.3)
    return model


def classifier(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)).eval()


def rows(count: int = 8) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


# What differs.


@pytest.mark.data
def test_a_model_against_itself_is_no_difference_bit_by_bit(llama: nn.Module, tokenizer: Any) -> None:
    found = noesis.diff(llama, llama, TEXTS, tokenizer=tokenizer)
    assert found.identical
    assert found.distance == 0
    assert found.first_difference is None
    assert found.first_divergence is None
    assert found.changed == []
    assert str(found).splitlines()[0].startswith("no difference: 6 layers over 8 inputs, ")
    assert "a ran twice, and equals itself bit by bit" in str(found)


@pytest.mark.data
def test_one_changed_weight_is_named_and_so_is_where_it_is_felt(
    llama: nn.Module, changed: nn.Module, tokenizer: Any
) -> None:
    found = noesis.diff(llama, changed, TEXTS, tokenizer=tokenizer)
    assert found.first_divergence is not None
    assert (found.first_divergence.layer, found.first_divergence.inputs) == ("model.layers.2", 8)
    assert found.changed == ["model.layers.2", "model.layers.3", "model.layers.4", "(output)"]
    assert [weight.name for weight in found.weights] == [f"{SUSPECT}.weight"]
    weight = llama.get_submodule(SUSPECT).weight.detach().double()
    assert found.weights[0].norm == pytest.approx(0.3 * float(weight.norm()), rel=1e-5)
    assert found.weights[0].relative == pytest.approx(0.3, rel=1e-5)
    assert not found.weights[0].estimated


@pytest.mark.data
def test_errors_are_those_of_the_activations_themselves(llama: nn.Module, changed: nn.Module, tokenizer: Any) -> None:
    found = noesis.diff(llama, changed, TEXTS[:2], tokenizer=tokenizer)
    for at, text in enumerate(TEXTS[:2]):
        kept = []
        for model in (llama, changed):
            with noesis.capture(model) as acts, torch.no_grad():
                model(**tokenizer(text, return_tensors="pt"))
            kept.append(acts)
        expected = noesis.compare(*kept)
        np.testing.assert_allclose(found.errors[at, :5], expected.relative_error, rtol=1e-9)
        np.testing.assert_allclose(found.sqnr[:2], np.inf)


@pytest.mark.data
def test_predictions_that_flip_are_those_of_the_logits(llama: nn.Module, changed: nn.Module, tokenizer: Any) -> None:
    found = noesis.diff(llama, changed, TEXTS, tokenizer=tokenizer)
    expected, count = [], 0
    for at, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            a, b = (model(ids).logits[0].softmax(-1) for model in (llama, changed))
        count += len(a)
        for place in (a.argmax(-1) != b.argmax(-1)).nonzero().flatten().tolist():
            names = [tokenizer.convert_ids_to_tokens(int(each[place].argmax())) for each in (a, b)]
            expected.append((at, place, *names, float(a[place].max()), float(b[place].max())))
    assert found.predictions == count
    assert len(expected) > 3
    assert [flip[:4] for flip in found.flips] == [flip[:4] for flip in expected]
    np.testing.assert_allclose([flip[4:] for flip in found.flips], [flip[4:] for flip in expected], rtol=1e-5)


@pytest.mark.data
def test_padding_makes_no_predictions(llama: nn.Module) -> None:
    ids = torch.randint(3, 512, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    assert noesis.diff(llama, llama, [{"input_ids": ids, "attention_mask": mask}]).predictions == 10


@pytest.mark.data
def test_rounding_of_a_dtype_is_no_divergence(llama: nn.Module, tokenizer: Any) -> None:
    found = noesis.diff(llama, copy.deepcopy(llama).bfloat16(), TEXTS, tokenizer=tokenizer)
    assert found.first_divergence is None
    assert found.first_difference is not None
    assert found.changed == []
    assert found.tolerance == 2.0**-5
    assert found.meta_differences == {"dtype": ("float32", "bfloat16")}
    assert (found.sqnr > 30).all()
    assert "none beyond rounding" in str(found)
    # A fault beside the rounding is none.
    broken = copy.deepcopy(llama)
    broken.get_submodule(SUSPECT).weight.data.mul_(1.5)
    assert "model.layers.2" in noesis.diff(llama, broken.bfloat16(), TEXTS, tokenizer=tokenizer).changed


@pytest.mark.data
@pytest.mark.parametrize("layers", ["blocks", "linear"])
def test_an_adapter_of_peft(llama: nn.Module, tokenizer: Any, layers: str) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[3], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    found = noesis.diff(llama, adapted, TEXTS, tokenizer=tokenizer, layers=layers)
    assert found.first_divergence is not None
    suspect = "model.layers.3.self_attn.q_proj"
    assert found.first_divergence.layer == (suspect if layers == "linear" else "model.layers.3")
    # The layer counts with the weight that it computes with.
    merged = copy.deepcopy(adapted).merge_and_unload().get_submodule(suspect).weight.detach()
    norm = float((merged - llama.get_submodule(suspect).weight.detach()).norm())
    assert [(weight.name, pytest.approx(weight.norm, rel=1e-4)) for weight in found.weights] == [
        (f"{suspect}.weight", norm)
    ]
    assert all("lora_" in name for name in found.weights_only_in_b)
    assert len(found.weights_only_in_b) == 2


@pytest.mark.data
def test_an_adapter_on_and_off(llama: nn.Module, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(llama), config).eval()

    def off() -> nn.Module:
        adapted.disable_adapter_layers()
        return adapted

    def on() -> nn.Module:
        adapted.enable_adapter_layers()
        return adapted

    found = noesis.diff(off, on, TEXTS, tokenizer=tokenizer)
    assert len(found.changed) == 6
    assert {weight.name for weight in found.weights} == {
        f"model.layers.{at}.self_attn.q_proj.weight" for at in range(5)
    }
    assert noesis.diff(off, llama, TEXTS, tokenizer=tokenizer).distance == 0


@pytest.mark.data
@pytest.mark.slow
def test_a_trained_classifier(data: Path) -> None:
    model = Garments(load_file(data / "fashion_cnn" / "model.safetensors")).eval()
    pixels = np.load(data / "fashion_mnist_test.npz", allow_pickle=False)["images"][:100]
    images = nn.functional.pad(torch.from_numpy(pixels)[:, None] / 127.5 - 1, [2] * 4, value=-1.0).repeat(1, 3, 1, 1)
    pruned = copy.deepcopy(model)
    weight = pruned.hidden[2].weight.data
    weight[weight.abs() < weight.abs().quantile(0.6)] = 0
    found = noesis.diff(model, pruned, images, layers="all")
    with torch.no_grad():
        a, b = (each(images).argmax(-1) for each in (model, pruned))
    assert [(flip.input, flip.a, flip.b) for flip in found.flips] == [
        (at, str(int(a[at])), str(int(b[at]))) for at in (a != b).nonzero().flatten().tolist()
    ]
    assert len(found.flips) > 0
    assert found.predictions == 100
    assert found.changed == ["hidden.2", "hidden.3", "hidden", "classifier", "(output)"]
    assert [each.name for each in found.weights] == ["hidden.2.weight"]


@pytest.mark.data
@pytest.mark.slow
def test_a_diffusion_pipeline(data: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(data / "fashion_t2i")
    pipe.set_progress_bar_config(disable=True)
    inputs = [{"prompt": text, "num_inference_steps": 3} for text in ("a coat", "a bag", "a dress")]
    assert noesis.diff(pipe, pipe, inputs).identical
    other = copy.deepcopy(pipe)
    other.unet.mid_block.resnets[0].conv1.weight.data.mul_(1.2)
    found = noesis.diff(pipe, other, inputs)
    assert found.labels == ["a coat", "a bag", "a dress"]
    assert found.first_divergence is not None
    assert found.first_divergence[:2] == ("mid_block.resnets.0", 0)  # what is before it differs from the next step on
    assert not found.equal[:, found.layers.index("down_blocks.0.resnets.0")].any()
    assert [weight.name for weight in found.weights] == ["unet.mid_block.resnets.0.conv1.weight"]
    assert found.predictions == 0
    # Noise from generators of one's own is the same in every run.
    seeded = [{**given, "generator": torch.Generator().manual_seed(at)} for at, given in enumerate(inputs)]
    assert noesis.diff(pipe, pipe, seeded).identical
    assert not np.allclose(noesis.diff(pipe, other, seeded).errors[1:], found.errors[1:])
    # Weights beside the denoiser count too.
    other = copy.deepcopy(pipe)
    other.text_encoder.get_input_embeddings().weight.data.mul_(1.1)
    found = noesis.diff(pipe, other, inputs)
    assert [weight.name.partition(".")[0] for weight in found.weights] == ["text_encoder"]
    assert "(output)" in found.changed


# The control of each claim.


def test_a_model_that_differs_from_itself_is_its_own_control() -> None:
    model = classifier().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one_by_one = [row.repeat(2, 1) for row in rows(8).split(1)]  # batch norm needs two
    found = noesis.diff(model, model, one_by_one, layers="all", baseline=3)
    assert found.distance > 0.1
    assert found.changed == []
    assert "a is in training mode; a ran 4 times, and differs from itself" in str(found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Beyond that noise, a change is found.
    other = copy.deepcopy(model)
    other[4].bias.data.add_(20)
    assert "4" in noesis.diff(model, other, one_by_one, layers="all", baseline=3).changed


def test_one_input_has_no_significance_and_says_so() -> None:
    found = noesis.diff(classifier(0), classifier(1), rows(1), layers="all")
    assert np.isnan(found.q_value).all()
    assert np.isnan(found.effect_q_value).all()
    with pytest.raises(BadValue, match="This diff is of 1 input"):
        _ = found.changed
    assert "one input: nothing is said of how surely" in str(found)


def test_without_repeats_there_is_no_control() -> None:
    found = noesis.diff(classifier(0), classifier(1), rows(), layers="all", baseline=0)
    assert np.isnan(found.control).all()
    assert "control: none, a did not run twice" in str(found)


def test_the_control_is_of_a_alone() -> None:
    quiet, noisy = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3)).eval(), nn.Sequential()
    noisy.extend(copy.deepcopy(quiet)).train()
    assert noesis.diff(quiet, noisy, rows(), layers="all").changed == ["1", "(output)"]
    assert noesis.diff(noisy, quiet, rows(), layers="all", baseline=3).changed == []


@pytest.mark.slow
def test_equal_models_are_rarely_called_changed() -> None:
    """Two noisy copies of one model: the share of diffs that name any layer is about alpha or less."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 4)).train()
    named = sum(bool(noesis.diff(model, model, rows(8), layers="all").changed) for _ in range(40))
    assert named <= 6


def test_a_shift_in_one_direction_is_told_from_a_change_in_none() -> None:
    a = classifier()
    shifted, noisy = copy.deepcopy(a), copy.deepcopy(a)
    shifted[4].bias.data.add_(3.0)
    noisy[4].weight.data.copy_(a[4].weight.data[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))])
    one, other = (noesis.diff(a, b, rows(12), layers="all") for b in (shifted, noisy))
    at = one.layers.index("4")
    assert one.effect_q_value[at] < 0.001
    assert other.q_value[at] < 0.001 < other.effect_q_value[at]


# Corner cases.


def test_nan_in_one_model_is_an_infinite_error_and_is_counted() -> None:
    a = classifier()
    b = copy.deepcopy(a)
    b[4].bias.data[2] = float("nan")
    found = noesis.diff(a, b, rows(), layers="all")
    at = found.layers.index("4")
    assert np.isinf(found.errors[:, at]).all()
    assert found.nonfinite[:, at].tolist() == [0, 8]
    assert found.distance == np.inf
    assert "not finite a" in str(found)
    assert found.changed == ["4", "(output)"]
    both = noesis.diff(b, b, rows(), layers="all")
    assert both.identical
    assert both.nonfinite[:, at].tolist() == [8, 8]


def test_layers_of_other_shapes_have_effects_alone() -> None:
    a, b = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    found = noesis.diff(a, b, rows(), layers="all")
    assert np.isnan(found.relative_error).tolist() == [True, False, False]
    assert found.effect[0] > 0
    assert found.left_out["0"].startswith("activations are 1x16 in a and 1x12 in b")
    assert found.weights_left_out["0.weight"] == "shape 16x8 in a and 12x8 in b"
    assert not found.identical


def test_layers_of_one_model_only_are_named() -> None:
    a = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    b = nn.Sequential(*copy.deepcopy(a), nn.ReLU(), nn.Linear(8, 8))
    found = noesis.diff(a, b, rows(), layers="all")
    assert (found.only_in_a, found.only_in_b) == ([], ["2", "3"])
    assert found.weights_only_in_b == ["3.weight", "3.bias"]
    assert found.relative_error[:2].tolist() == [0, 0]
    assert "layers only in b: 2, 3" in str(found)


class Named(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for at, name in enumerate(names):
            torch.manual_seed(at)
            self.add_module(name, nn.Linear(8, 8 if at < 2 else 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x).relu()
        return x


def test_renamed_layers_are_found_when_asked() -> None:
    a, b = Named("first", "second", "head"), Named("first", "middle", "head")
    with torch.no_grad():
        b.head = copy.deepcopy(a.head)
    by_name = noesis.diff(a, b, rows(), layers="all")
    assert (by_name.only_in_a, by_name.only_in_b) == (["second"], ["middle"])
    by_order = noesis.diff(a, b, rows(), layers="all", match="order")
    assert by_order.renamed == {"second": "middle", "second.weight": "middle.weight", "second.bias": "middle.bias"}
    assert by_order.identical
    assert "taken for the same by shape and order: second = middle" in str(by_order)
    acts = [noesis.Activations({name: [torch.ones(2, 3)]}) for name in "xy"]
    with pytest.raises(BadValue, match='have no layer in common.*match="order"'):
        noesis.diff(*acts)
    assert noesis.diff(*acts, match="order").renamed == {"x": "y"}


@pytest.mark.data
def test_other_tokenizers_and_vocabularies(llama: nn.Module, tokenizer: Any) -> None:
    other = copy.deepcopy(llama)
    other.resize_token_embeddings(515, mean_resizing=False)
    found = noesis.diff(llama, other, TEXTS, tokenizer=tokenizer)
    assert found.meta_differences == {"vocabulary": (512, 515)}
    assert found.relative_error[:5].tolist() == [0] * 5
    assert "(output)" in found.left_out
    assert found.predictions > 0
    # Another tokenizer: other tokens, so other activations; what can be compared is said.
    apart = noesis.diff(llama, llama, TEXTS, tokenizer=(tokenizer, lambda text: {"input_ids": list(text.encode())}))
    assert apart.predictions == 0
    assert "tokens or samples in a" in apart.left_out["predictions"]
    assert np.isnan(apart.relative_error).all()
    assert (apart.effect > 0).all()
    assert apart.weights == []
    with pytest.raises(BadValue, match="without a tokenizer"):
        noesis.diff(llama, llama, TEXTS)


@pytest.mark.data
def test_tied_weights_are_one(llama: nn.Module, tokenizer: Any) -> None:
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    tied = copy.deepcopy(llama)
    tied.lm_head.weight.data.mul_(1.1)
    assert [each.name for each in noesis.diff(llama, tied, TEXTS[:1], tokenizer=tokenizer).weights] == [
        "model.embed_tokens.weight"
    ]
    untied = copy.deepcopy(llama)
    untied.lm_head.weight = nn.Parameter(llama.lm_head.weight.detach() * 1.1)
    for pair in ((llama, untied), (untied, llama)):
        found = noesis.diff(*pair, TEXTS[:1], tokenizer=tokenizer)
        assert [each.name for each in found.weights] == ["lm_head.weight"]


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_count_dequantised() -> None:
    a = classifier()
    b = torch.ao.quantization.quantize_dynamic(copy.deepcopy(a), {nn.Linear}, torch.qint8)
    found = noesis.diff(a, b, rows(), layers=["0", "4"])
    assert {each.name for each in found.weights} == {"0.weight", "4.weight"}
    assert all(0 < each.relative < 0.02 for each in found.weights)
    assert found.changed == ["0", "4", "(output)"]
    # Numbers without their scale cannot be held against weights.
    whole = copy.deepcopy(a)
    whole[4].weight = nn.Parameter(torch.ones(4, 16, dtype=torch.int8), requires_grad=False)
    weights = [weights_of(model, stays=False)[0]["4.weight"] for model in (a, whole)]
    assert change("4.weight", *weights) == "float32 in a and int8 in b"


class Packed(Tensor):
    """Numbers in a form of its own, as libraries of quantisation have them."""

    @staticmethod
    def __new__(cls) -> Packed:
        made: Packed = Tensor._make_wrapper_subclass(cls, (4, 16), dtype=torch.float32)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls()
        raise NotImplementedError(func)


class Dequantisable(Packed):
    def dequantize(self) -> Tensor:
        return torch.full((4, 16), 0.5)


class Codes(nn.Parameter):
    """Whole numbers that stand for others."""


def test_weights_in_a_form_of_their_own_are_named() -> None:
    model = nn.Module()
    model.register_buffer("packed", Packed())
    model.register_buffer("known", Dequantisable())
    model.codes = Codes(torch.ones(4, dtype=torch.int8), requires_grad=False)
    model.lazy = nn.LazyLinear(3, bias=False)
    found, left_out = weights_of(model, stays=False)
    assert [(name, weight.norm) for name, weight in found.items()] == [("known", 4.0)]
    assert left_out == {
        "packed": "it is a Packed, which computes in its own way",
        "codes": "it is a Codes, whose numbers stand for others",
        "lazy.weight": "it has no data",
    }


# Inputs.


def test_inputs_of_every_kind() -> None:
    a, b, x = classifier(0), classifier(1), rows(4)
    expected = noesis.diff(a, b, x, layers="all")
    for inputs in (x.numpy(), list(x.split(1)), [(row,) for row in x.split(1)], ({"input": row} for row in x.split(1))):
        np.testing.assert_array_equal(noesis.diff(a, b, inputs, layers="all").errors, expected.errors)
    called = noesis.diff(a, b, list(range(4)), layers="all", call=lambda model, at: model(x[at : at + 1]))
    np.testing.assert_array_equal(called.errors, expected.errors)
    assert noesis.diff(a, b, x.double(), layers="all").errors.shape == (4, 6)  # in the dtype of the model


def test_wrong_arguments() -> None:
    a = classifier()
    for wrong, message in (
        ({"inputs": None}, "inputs is not given"),
        ({"inputs": []}, "inputs is empty"),
        ({"baseline": -1}, "baseline=-1"),
        ({"match": "shape"}, "match='shape'"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"elements": 0}, "elements=0"),
    ):
        with pytest.raises(BadValue, match=message):
            noesis.diff(a, a, **({"inputs": rows()} | wrong))
    with pytest.raises(BadType, match="a model is a int"):
        noesis.diff(a, 3, rows(), layers="all")
    with pytest.raises(TooLarge, match="would pass max_bytes=100"):
        noesis.diff(a, a, rows(), layers="all", max_bytes=100)


def test_an_observed_model_records_nothing_of_it() -> None:
    wrapped = noesis.wrap(classifier(), layers="all")
    assert noesis.diff(wrapped, wrapped, rows(), layers="all").identical
    assert wrapped.trace().values.shape[0] == 0


# One model at a time.


def test_a_is_freed_before_b_is_made() -> None:
    alive: list[Any] = []
    states = []

    def make(seed: int) -> nn.Module:
        states.append([ref() is None for ref in alive])
        model = classifier(seed)
        model.circle = [model]  # as models have, which are not freed by the last reference to them
        alive.append(weakref.ref(model))
        return model

    found = noesis.diff(lambda: make(0), lambda: make(1), rows(), layers="all")
    assert states == [[], [True]]
    assert len(found.weights) == 4


@pytest.mark.slow
def test_what_is_kept_is_bounded_and_estimates_are_near() -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(8, 4096), nn.Linear(4096, 64))
    b = copy.deepcopy(a)
    b[0].weight.data += 0.1 * torch.randn(4096, 8)
    b[1].weight.data[:, 5] += 1.0
    x = torch.randn(2, 16, 8)
    exact, some = (noesis.diff(a, b, x, layers="all", elements=most) for most in (1 << 20, 512))
    np.testing.assert_allclose(some.errors[:, 0], exact.errors[:, 0], rtol=0.2)
    kept = noesis.diff(lambda: a, lambda: b, x, layers="all")
    for estimate, norm in zip(kept.weights, exact.weights, strict=True):
        assert estimate.name == norm.name
        assert estimate.norm == pytest.approx(norm.norm, rel=0.1)
    assert [each.estimated for each in kept.weights] == [True, True]


def test_one_element_of_many_is_not_missed() -> None:
    """Beyond the elements that are kept, all bits have a say."""
    a = nn.Sequential(nn.Linear(8, 4096))
    b = copy.deepcopy(a)
    b[0].bias.data[1234] += 1
    found = noesis.diff(a, b, rows(), layers="all", elements=16)
    assert not found.equal.any()
    assert not found.identical
    assert found.first_difference is not None


def test_sketches_are_as_long_as_the_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    a = nn.Linear(512, 300, bias=False)
    sizes = []
    for columns in (slice(0, 1), slice(None)):
        b = copy.deepcopy(a)
        b.weight.data[:, columns] += torch.randn(b.weight[:, columns].shape, generator=generator)
        found = change("weight", *(weights_of(model, stays=False)[0]["weight"] for model in (a, b)))
        sizes.append(found.norm / float((b.weight - a.weight).detach().norm()))  # type: ignore[union-attr]
    assert sizes == pytest.approx([1.0, 1.0], abs=5 * BUCKETS**-0.5)


# Captures that were saved elsewhere.


@pytest.mark.data
def test_saved_captures_stand_for_models(llama: nn.Module, changed: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    def captured(model: nn.Module, text: str) -> noesis.Activations:
        with noesis.capture(model) as acts, torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        return noesis.Activations.load(acts.save(tmp_path / "acts.safetensors"))

    expected = noesis.diff(llama, changed, TEXTS, tokenizer=tokenizer)
    a, b = ([captured(model, text) for text in TEXTS] for model in (llama, changed))
    for one, other, inputs in ((a, b, None), (a, changed, TEXTS), (llama, b, TEXTS)):
        found = noesis.diff(one, other, inputs, tokenizer=tokenizer)
        np.testing.assert_array_equal(found.errors, expected.errors[:, :5])
        assert found.first_divergence == expected.first_divergence
        assert (found.weights_compared, found.only_in_a, found.only_in_b) == (0, [], [])
    assert len(noesis.diff(a[0], b[0]).labels) == 1
    with pytest.raises(BadValue, match="8 captures and 2 inputs"):
        noesis.diff(a, llama, TEXTS[:2], tokenizer=tokenizer)
    with pytest.raises(BadType, match="something else than captures"):
        noesis.diff([1, 2], llama, TEXTS[:2], tokenizer=tokenizer)


@pytest.mark.data
def test_a_picture(llama: nn.Module, changed: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = noesis.diff(llama, changed, TEXTS[:3], tokenizer=tokenizer)
    labels = [label.get_text() for label in found.plot(tmp_path / "diff.png").axes[0].get_yticklabels()]
    assert labels == found.layers
    assert (tmp_path / "diff.png").stat().st_size > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_what_is_kept_of_a_tensor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noesis.diffing.weights.PERIOD", 1000)  # in several parts
    x = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = float("nan")
    kept = keep(x, 100)
    values = x.double().flatten()[1:]
    assert (kept.shape, kept.finite, kept.nonfinite, len(kept.elements)) == ((3, 1500), 4499, 1, 100)
    assert kept.mean == pytest.approx(float(values.mean()), rel=1e-9)
    assert kept.std == pytest.approx(float(values.std(correction=0)), rel=1e-9)
    assert kept.elements.dtype == dtype
    assert keep(x.clone(), 100).digest == kept.digest
    assert keep(torch.where(torch.arange(1500) == 7, 2.0, x.float()).to(dtype), 100).digest != kept.digest
    assert keep(torch.empty(0, 3, dtype=dtype), 100).finite == 0
