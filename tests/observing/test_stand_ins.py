"""Steps where something else than the model itself is called: what PEFT and BLIP-2 generate with, towers, loops."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.language_models import build, generate, prompts

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = prompts(rows=2, length=7)


def made_of(model: Any, **settings: Any) -> list[Tensor]:
    """What a model generates, greedily, and the scores it chose by."""
    found = model.generate(
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return [found.sequences, *found.logits]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def tokens(trace: noesis.Trace, layer: str, width: int) -> list[float]:
    """How many vectors a layer saw at each step."""
    return (trace["count"][:, trace.layers.index(layer)] / width).tolist()


# ---------------------------------------------------------------- PEFT


def lora() -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("layers", ["blocks", "linear", "all"])
def test_peft_generates_token_by_token(layers: str) -> None:
    bare = made_of(lora(), input_ids=IDS)
    model = lora()
    wrapped = noesis.wrap(model, layers=layers)
    assert same(bare, made_of(wrapped, input_ids=IDS))
    trace = wrapped.trace()
    assert trace.steps.tolist() == [0, 1, 2, 3, 4]
    assert trace.batches.tolist() == [2] * 5
    assert (trace.calls[:, trace.order[0] > 0] == 1).all()
    name = next(name for name in trace.layers if name.endswith("layers.1" if layers != "linear" else "1.mlp.down_proj"))
    assert tokens(trace, name, 32) == [14, 2, 2, 2, 2]
    assert wrapped.unwrap() is model
    assert not any(isinstance(module, noesis.Observed) for module in model.modules())
    assert type(model.base_model).__name__ == "LoraModel"


def test_alarms_and_logs_see_what_peft_generates(tmp_path: Any) -> None:
    wrapped = noesis.wrap(lora())
    found: list[noesis.Alarm] = []
    alarms = noesis.Alarms(wrapped, found.append)
    wrapped.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert wrapped.log_to(tmp_path / "run.jsonl")["noesis/layers/ran"] == 3
    assert alarms.check() == []
    with torch.no_grad():
        wrapped.observed_model.base_model.model.model.layers[1].mlp.down_proj.weight.fill_(math.nan)
    wrapped.generate(input_ids=IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    alarms.check()
    assert [(alarm.layer, alarm.step) for alarm in found] == [("base_model.model.model.layers.1", 3)]


def test_training_and_generating_in_turns_and_inner_models_called_by_loops() -> None:
    wrapped = noesis.wrap(lora(), gradients=True)
    want = []
    for _ in range(2):
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        wrapped.generate(input_ids=IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        want += [14.0, 14.0, 2.0]
    inner = [
        wrapped.observed_model.base_model,
        wrapped.observed_model.base_model.model,
        wrapped.observed_model.base_model.model.base_model,
    ]
    for length, model in enumerate([*inner, *inner], start=1):
        model(input_ids=IDS[:, :length])[0].sum().backward()
        want.append(2.0 * length)
    with wrapped.paused():
        inner[0](input_ids=IDS)
    trace, gradients = wrapped.trace(), wrapped.gradients()
    name = trace.layers[1]
    assert tokens(trace, name, 32) == want
    assert (trace.calls == 1).all()
    trained = [0, 3, *range(6, 12)]
    assert [step for step, calls in enumerate(gradients.calls.sum(1).tolist()) if calls] == trained
    assert [tokens(gradients, name, 32)[step] for step in trained] == [want[step] for step in trained]


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_prompt_tuning_and_a_sequence_to_sequence_model_inside_of_peft() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)
    wrapped = noesis.wrap(peft.get_peft_model(build("llama"), settings).eval())
    wrapped.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens(wrapped.trace(), wrapped.observed_layers[0], 32) == [20, 2, 2]
    settings = peft.LoraConfig(target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    wrapped = noesis.wrap(peft.get_peft_model(t5(), settings).eval())
    for _ in range(2):
        wrapped.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert wrapped.trace().calls.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]] * 2


# ---------------------------------------------------------------- models of transformers


def t5() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def blip2() -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {"model_type": "opt", "vocab_size": 99, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2}
    config = transformers.Blip2Config(
        vision_config={**SMALL, "image_size": 8, "patch_size": 4},
        qformer_config={**SMALL, "vocab_size": 30, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
        text_config={**text, "num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
        num_query_tokens=3,
        image_token_index=50,
    )
    inputs = {"pixel_values": torch.randn(1, 3, 8, 8), "input_ids": torch.tensor([[50, 50, 50, 5, 6, 7]])}
    return transformers.Blip2ForConditionalGeneration(config).eval(), inputs


def llava() -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**SMALL, vocab_size=99, max_position_embeddings=64),
        image_token_index=50,
        image_seq_length=4,
    )
    inputs = {"pixel_values": torch.randn(1, 3, 8, 8), "input_ids": torch.tensor([[50, 50, 50, 50, 5, 6, 7]])}
    return transformers.LlavaForConditionalGeneration(config).eval(), inputs


ALL, LAST = [1] * 6, [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("gradients", [False, True])
def test_blip2_generates_token_by_token(gradients: bool) -> None:
    model, inputs = blip2()
    bare = made_of(model, **inputs)
    wrapped = noesis.wrap(model, gradients=gradients, per_sample=True)
    assert same(bare, made_of(wrapped, **inputs))
    want = [ALL, *[LAST] * 4]
    assert wrapped.trace().calls.tolist() == want
    for count in (1, 3):
        wrapped.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        wrapped(**inputs)
        want += [ALL, *[LAST] * (count - 1), ALL]
    wrapped.observed_model.language_model(inputs["input_ids"])
    wrapped.observed_model.language_model(inputs["input_ids"])
    trace = wrapped.trace()
    assert trace.calls.tolist() == [*want, LAST, LAST]
    assert trace.samples[0].calls.tolist() == trace.calls.tolist()


def test_llava_generates_token_by_token_and_its_towers_can_be_called() -> None:
    model, inputs = llava()
    bare = made_of(model, **inputs)
    wrapped = noesis.wrap(model, layers=["re:vision_tower.*layers.\\d$", "re:language_model.layers.\\d$"])
    assert same(bare, made_of(wrapped, **inputs))
    calls = wrapped.trace().calls.tolist()
    vision, last = calls[0], [0, 0, 1, 1]
    assert calls == [vision, *[last] * 4]
    assert min(vision) == 1
    for _ in range(2):
        wrapped.observed_model.base_model(**inputs)
    assert wrapped.trace().calls.tolist() == [*calls, vision, vision]
    wrapped.reset()
    for _ in range(3):
        wrapped.get_image_features(inputs["pixel_values"])
    assert wrapped.trace().calls[:, 2:].tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("every", [1, 2])
def test_an_encoder_before_the_first_token_is_part_of_its_step(every: int) -> None:
    bare = made_of(t5(), inputs=IDS)
    wrapped = noesis.wrap(t5(), every=every, per_sample=True)
    assert same(bare, made_of(wrapped, inputs=IDS, num_beams=1))
    first, further = [1, 1, 1, 1], [0, 0, 1, 1]
    want = [first, *[further] * 4]
    assert wrapped.trace().calls.tolist() == want[::every]
    wrapped.reset()
    for _ in range(2):  # by hand, as those do who score answers
        encoded = wrapped.get_encoder()(IDS)
        for length in (1, 2):
            wrapped(encoder_outputs=encoded, attention_mask=torch.ones_like(IDS), decoder_input_ids=IDS[:, :length])
    trace = wrapped.trace()
    assert trace.calls.tolist() == [first, further, first, further][::every]
    assert trace.steps.tolist() == [0, 1, 2, 3][::every]


def test_beams_are_the_batch_of_the_step_that_the_encoder_began() -> None:
    wrapped = noesis.wrap(t5())
    wrapped.generate(IDS, num_beams=3, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert wrapped.trace().batches.tolist() == [6, 6, 6]


@pytest.mark.parametrize("inside_of_peft", [False, True])
def test_speculative_decoding_has_a_step_for_each_forward_of_the_model(inside_of_peft: bool) -> None:
    main = lora() if inside_of_peft else build("llama")
    assistant = build("llama", seed=3)
    calls: list[int] = []
    inner = main.base_model.model if inside_of_peft else main
    handle = inner.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "assistant_model": assistant}
    bare = main.generate(input_ids=IDS[:1], **settings)
    handle.remove()
    wrapped = noesis.wrap(main)
    assert torch.equal(bare, wrapped.generate(input_ids=IDS[:1], **settings))
    assert len(wrapped.trace()) == len(calls)
    assert (wrapped.trace().calls == 1).all()


def test_towers_that_are_called_by_turns() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**SMALL, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**SMALL, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    model, pixels = transformers.CLIPModel(config).eval(), torch.randn(2, 3, 8, 8)
    wrapped = noesis.wrap(model)
    text, both = [1, 1, 0, 0], [1, 1, 1, 1]
    vision = [0, 0, 1, 1]
    for _ in range(3):
        wrapped.get_image_features(pixels)
    assert wrapped.trace().calls.tolist() == [vision] * 3
    wrapped.reset()
    for _ in range(3):
        wrapped.get_image_features(pixels)
        wrapped.get_text_features(IDS)
    assert wrapped.trace().calls.tolist() == [both] * 3
    wrapped.get_text_features(IDS)
    wrapped(input_ids=IDS, pixel_values=pixels)
    assert wrapped.trace().calls.tolist() == [both] * 3 + [text, both]


# ---------------------------------------------------------------- models of one's own


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


def stack() -> nn.Sequential:
    return nn.Sequential(Block(), Block())


class Seeing(nn.Module):
    """A vision tower and a language model, the second of which a loop of its own calls, as its real fellows do."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower, self.language_model = stack(), stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.language_model(self.vision_tower(x))

    def generate(self, x: Tensor, count: int) -> Tensor:
        x = self.vision_tower(x)
        for _ in range(count):
            x = self.language_model(x)
        return x


X = torch.ones(3, 4)


def test_a_loop_over_a_part_has_a_step_for_each_call() -> None:
    wrapped = noesis.wrap(Seeing())
    both, last = [1, 1, 1, 1], [0, 0, 1, 1]
    for count in (4, 2):
        wrapped.generate(X, count)
    wrapped(X)
    wrapped.generate(X, 1)
    assert wrapped.trace().calls.tolist() == [both, last, last, last, both, last, both, both]


def test_a_part_and_then_the_model_are_one_step() -> None:
    wrapped = noesis.wrap(Seeing())
    wrapped.observed_model.vision_tower(X)
    wrapped(X)
    wrapped(X)
    assert wrapped.trace().calls.tolist() == [[2, 2, 1, 1], [1, 1, 1, 1]]


class Speaking(nn.Module):
    """Each of its forwards is followed by some of a smaller model, which fills in details."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.details = stack(), Seeing()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def generate(self, x: Tensor, count: int) -> Tensor:
        for _ in range(count):
            x = self.details.generate(self(x), 2)
        return x


def test_what_runs_between_two_forwards_while_the_model_generates_is_no_step() -> None:
    wrapped = noesis.wrap(Speaking())
    wrapped.generate(X, 3)
    wrapped(X)
    first, further = [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 2, 2]
    assert wrapped.trace().calls.tolist() == [first, further, further, further]


def test_the_inner_model_of_a_wrapper_with_a_head() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model, self.head = stack(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.base_model(x))

    wrapped = noesis.wrap(Headed(), layers="linear", gradients=True)
    found: list[noesis.Alarm] = []
    alarms = noesis.Alarms(wrapped, found.append)
    for _ in range(3):  # with the head of the model, or another
        wrapped.observed_model.head(wrapped.observed_model.base_model(X)).sum().backward()
        wrapped.observed_model.base_model(X).sum().backward()
    assert wrapped.trace().calls.tolist() == [[1, 1, 1], [1, 1, 0]] * 3
    assert wrapped.gradients().calls.tolist() == [[1, 1, 1], [1, 1, 0]] * 3
    nn.init.constant_(wrapped.observed_model.head.weight, math.nan)
    hidden = wrapped.observed_model.base_model(X)
    assert alarms.check() == []
    wrapped.observed_model.head(hidden)
    alarms.check()
    assert [(alarm.layer, alarm.step) for alarm in found] == [("head", 6)], "it came after the step was looked at"


def test_layers_that_are_called_one_by_one() -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(4, 4))
    wrapped = noesis.wrap(model, layers="all")
    for _ in range(3):
        x = X
        for layer in model:
            x = layer(x)
    assert wrapped.trace().calls.tolist() == [[1] * len(wrapped.observed_layers)] * 3


def test_every_copies_pauses_and_runs() -> None:
    wrapped = noesis.wrap(Seeing(), every=2)
    wrapped.generate(X, 5)
    assert wrapped.trace().steps.tolist() == [0, 2, 4]
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        copied.reset()
        copied.generate(X, 3)
        assert copied.trace().calls.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    with wrapped.paused():
        wrapped.generate(X, 2)
    assert len(wrapped.trace()) == 3
    with wrapped.run():
        wrapped.generate(X, 1)
        assert wrapped.trace().steps.tolist() == [0]


def test_surprise_of_what_a_part_computed_alone() -> None:
    wrapped = noesis.wrap(lora(), codebook=noesis.Codebook())
    wrapped.calibrate([{"input_ids": prompts(rows=8, seed=seed)} for seed in range(16)])
    wrapped(input_ids=IDS)
    want = wrapped.surprise()
    wrapped.observed_model.base_model(input_ids=IDS)
    assert wrapped.surprise().score.tolist() == want.score.tolist()
    assert wrapped.surprise().p_value.shape == (2,)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.slow
def test_an_inner_model_that_is_compiled() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(Block(), Block()), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = Outer()
    wrapped = noesis.wrap(model, layers="body.*")
    inner = torch.compile(model.body, backend="eager", fullgraph=True)
    for _ in range(3):
        inner(X)
    names = wrapped.observed_layers
    assert wrapped.trace().calls.tolist() == [[1] * len(names)] * 3
    outer = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        outer(X)
        wrapped(X)
    assert wrapped.trace().calls.tolist() == [[1] * len(names)] * 7


def test_nothing_of_generate_shows() -> None:
    model = build("llama")
    signature = type(model).generate.__doc__, type(model).generate.__name__
    wrapped = noesis.wrap(model)
    assert (type(model).generate.__doc__, type(model).generate.__name__) == signature
    observed = generate(wrapped, IDS)
    assert len(wrapped.trace()) == 5
    wrapped.unwrap()
    assert torch.equal(generate(model, IDS).sequences, observed.sequences)
