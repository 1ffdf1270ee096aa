"""The Trainer of transformers and Accelerate with a wrapped model: as if it were the model itself."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import noesis
from helpers.language_models import build, prompts
from noesis.errors import BadType, BadValue
from noesis.integrations.trainer import NoesisCallback

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one per process, whoever made it


def examples(rows: int = 32) -> list[dict[str, torch.Tensor]]:
    # "noise" is no argument of the model: the Trainer has to see that.
    return [{"input_ids": row, "labels": row, "noise": torch.zeros(1)} for row in prompts(rows, 12)]


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=40, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


def trainer(model: Any, folder: Path, data: Any = None, **options: Any) -> Any:
    kwargs = {"callbacks": options.pop("callbacks", None), "eval_dataset": options.pop("eval_dataset", None)}
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    arguments = transformers.TrainingArguments(**{**settings, **options})
    return transformers.Trainer(model=model, args=arguments, train_dataset=data or examples(), **kwargs)


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- Trainer


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.slow
def test_training_and_checkpoints_are_those_of_the_bare_model(options: dict[str, Any], tmp_path: Path) -> None:
    bare = trainer(build("llama"), tmp_path / "bare", **options)
    bare.train()
    wrapped = noesis.wrap(build("llama"))
    ours = trainer(wrapped, tmp_path / "ours", **options)
    assert ours.label_names == bare.label_names == ["labels"]
    assert ours.can_return_loss == bare.can_return_loss
    assert ours.model_accepts_loss_kwargs == bare.model_accepts_loss_kwargs
    ours.train()
    assert losses(ours) == losses(bare)
    assert len(losses(ours)) == 4
    assert len(wrapped.trace()) == 4 * options.get("gradient_accumulation_steps", 1)
    assert not wrapped.trace().unmeasured
    assert not wrapped.trace().never_ran
    saved, reference = (
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / name / "checkpoint-4") for name in ("ours", "bare")
    )
    assert saved.config.architectures == ["LlamaForCausalLM"]
    assert equal(saved.state_dict(), reference.state_dict())
    assert equal(saved.state_dict(), wrapped.state_dict())


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = trainer(build("llama"), tmp_path / "run")
    whole.train()
    wrapped = noesis.wrap(build("llama", seed=1))
    again = trainer(wrapped, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(again) == losses(whole)
    assert len(wrapped.trace()) == 2
    assert equal(wrapped.state_dict(), whole.model.state_dict())


@pytest.mark.slow
def test_totals_that_are_not_beside_the_checkpoint_are_told(tmp_path: Path) -> None:
    trainer(build("llama"), tmp_path / "run").train()
    wrapped = noesis.wrap(build("llama"))
    again = trainer(wrapped, tmp_path / "again", callbacks=[NoesisCallback(wrapped)])
    with pytest.warns(noesis.NoesisWarning, match=r"noesis.json is not there, so totals begin at step 2"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    noesis.RunState(wrapped).load_state_dict(noesis.RunState(noesis.wrap(build("llama"))).state_dict())
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))  # whoever loaded it knows


@pytest.mark.slow
def test_totals_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole, first, again = (noesis.wrap(build("llama"), gradients=True) for _ in range(3))
    for wrapped, folder, options in ((whole, "whole", {}), (first, "run", {"max_steps": 2}), (again, "run", {})):
        resume = wrapped is again
        callbacks = [NoesisCallback(wrapped)]
        options |= {"lr_scheduler_type": "constant"}
        trainer(wrapped, tmp_path / folder, callbacks=callbacks, **options).train(resume_from_checkpoint=resume)
    for one, other in ((whole.trace(), again.trace()), (whole.gradients(), again.gradients())):
        np.testing.assert_allclose(one.totals, other.totals, rtol=1e-12)
        np.testing.assert_allclose(one.averages, other.averages, rtol=1e-12)
        assert (len(other), other.dropped_steps) == (2, 2)


@pytest.mark.slow
def test_labels_of_a_classifier_and_evaluation(tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in prompts(16, 8)]
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "eval_dataset": data}
    bare = trainer(bert(), tmp_path / "bare", data, **options)
    bare.train()
    ours = trainer(noesis.wrap(bert()), tmp_path / "ours", data, **options)
    ours.train()
    assert losses(ours) == losses(bare)
    evaluated, reference = (
        [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry] for one in (ours, bare)
    )
    assert evaluated == reference
    assert len(evaluated) == 2
    assert torch.equal(torch.as_tensor(ours.predict(data).predictions), torch.as_tensor(bare.predict(data).predictions))


@pytest.mark.slow
def test_a_compiled_model(tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    torch._dynamo.reset()
    wrapped = noesis.wrap(build("llama"))
    ours = trainer(wrapped, tmp_path / "ours", **options)
    ours.train()
    assert len(wrapped.trace()) == 2
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-2")
    assert equal(saved.state_dict(), build("llama").state_dict()) is False
    assert equal(saved.state_dict(), wrapped.state_dict())


@pytest.mark.slow
def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        return peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))

    bare = trainer(adapted(), tmp_path / "bare")
    bare.train()
    ours = trainer(noesis.wrap(adapted()), tmp_path / "ours")
    ours.train()
    assert losses(ours) == losses(bare)
    folder = tmp_path / "ours" / "checkpoint-4"
    assert (folder / "adapter_model.safetensors").is_file()
    loaded = peft.PeftModel.from_pretrained(build("llama"), folder)
    ids = prompts()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, bare.model.eval()(ids).logits)


# ---------------------------------------------------------------- being the model


def test_the_container_passes_for_the_model() -> None:
    model = build("llama")
    wrapped = noesis.wrap(model)
    assert isinstance(wrapped, noesis.Wrapped)
    assert isinstance(wrapped, transformers.LlamaForCausalLM)
    assert isinstance(wrapped, transformers.PreTrainedModel)
    assert not isinstance(wrapped, transformers.BertModel)
    assert wrapped.__class__ is type(model)
    assert transformers.modeling_utils.unwrap_model(wrapped) is wrapped
    wrapped.unwrap()
    assert wrapped.__class__ is transformers.LlamaForCausalLM
    assert not isinstance(wrapped, noesis.Observed)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_containers(copied: Any) -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 2)))
    other = copied(wrapped)
    assert isinstance(other, noesis.Wrapped)
    other(torch.ones(1, 2))
    assert len(other.trace()) == 1


def test_a_forward_bound_to_the_container_runs_the_model() -> None:
    """Accelerate's mixed precision does so; `self.model` is another thing in the container and in a Llama."""
    wrapped = noesis.wrap(build("llama"))
    wrapped.forward = MethodType(type(wrapped.observed_model).forward, wrapped)
    assert wrapped.observed_model.forward.__self__ is wrapped.observed_model
    wrapped(prompts())
    assert len(wrapped.trace()) == 1


def test_distributed_data_parallel(tmp_path: Path) -> None:
    wrapped = noesis.wrap(build("llama"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(wrapped)
        loss = parallel(input_ids=prompts(), labels=prompts()).loss
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    bare = build("llama")
    expected = bare(input_ids=prompts(), labels=prompts()).loss
    expected.backward()
    assert torch.equal(loss, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(wrapped.parameters(), bare.parameters(), strict=True))
    assert len(wrapped.trace()) == 1
    assert transformers.modeling_utils.unwrap_model(parallel) is wrapped


# ---------------------------------------------------------------- Accelerate


@pytest.mark.parametrize("what", ["wrapped", "model"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(what: str, precision: str) -> None:
    def run(model: Any) -> list[float]:
        accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(prompts(8, 6), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        found = []
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert accelerator.unwrap_model(model).state_dict().keys() == build("llama").state_dict().keys()
        return found

    reference = run(build("llama"))
    wrapped = noesis.wrap(build("llama"))
    assert run(wrapped if what == "wrapped" else wrapped.observed_model) == reference
    assert len(wrapped.trace()) == 4
    assert len(set(reference)) == 4


# ---------------------------------------------------------------- the callback


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.slow
def test_the_callback_logs_beside_the_trainer(strategy: str, tmp_path: Path) -> None:
    wrapped = noesis.wrap(build("llama"))
    found: list[noesis.Alarm] = []
    callback = NoesisCallback(wrapped, every=2, alarms=noesis.Alarms(wrapped, found.append))
    ours = trainer(wrapped, tmp_path, callbacks=[callback], eval_strategy=strategy, eval_steps=2,
                   eval_dataset=examples(4))  # fmt: skip
    bare = trainer(build("llama"), tmp_path / "bare")
    bare.train()
    ours.train()
    assert losses(ours) == losses(bare)
    assert len(wrapped.trace()) == 4, "evaluation is not observed"
    assert not wrapped._recorder.paused
    assert [entry for entry in ours.state.log_history if "eval_loss" in entry]
    with (tmp_path / "checkpoint-4" / "trainer_state.json").open() as file:
        history = json.load(file)["log_history"]
    ours_in_it = [entry for entry in history if "noesis/layers/ran" in entry]
    assert [entry["step"] for entry in ours_in_it] == [2, 4]
    trace = wrapped.trace()
    assert ours_in_it[1]["noesis/max_of_layers/std"] == trace["std"][3].max()
    assert not found


def test_the_callback_writes_where_it_is_told(tmp_path: Path) -> None:
    wrapped = noesis.wrap(build("llama"))
    path = tmp_path / "run.jsonl"
    trainer(wrapped, tmp_path, callbacks=[NoesisCallback(wrapped, path, layers="each", stats=["std"])]).train()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[3]["noesis/model.layers.1/std"] == wrapped.trace()["std"][3, 1]


def test_the_callback_reports_through_the_trainer(tmp_path: Path) -> None:
    class Reporter(transformers.TrainerCallback):
        logged: list[dict[str, float]] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logged.append(dict(logs))

    wrapped = noesis.wrap(build("llama"))
    ours = trainer(wrapped, tmp_path, callbacks=[Reporter()])
    ours.add_callback(NoesisCallback(wrapped, ours, every=2))
    ours.train()
    assert len([logs for logs in Reporter.logged if "noesis/mean_of_layers/std" in logs]) == 2
    assert len(losses(ours)) == 4, "the trainer's own log is not lost"


def test_the_callback_raises_alarms(tmp_path: Path) -> None:
    wrapped = noesis.wrap(build("llama"))
    with torch.no_grad():
        wrapped.observed_model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    callback = NoesisCallback(wrapped, every=1, alarms=noesis.Alarms(wrapped, "raise"))
    with pytest.raises(noesis.NoesisError, match=r"step 0: layer 'model\.layers\.1' has \d+ NaN") as caught:
        trainer(wrapped, tmp_path, callbacks=[callback]).train()
    [alarm] = caught.value.alarms
    assert (alarm.kind, alarm.layer, alarm.step, alarm.at) == ("nonfinite", "model.layers.1", 0, 1)


def test_bad_arguments(tmp_path: Path) -> None:
    wrapped = noesis.wrap(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(BadType, match=r"NoesisCallback\(Sequential\)\. Expected what noesis\.wrap returned"):
        NoesisCallback(wrapped.observed_model)
    with pytest.raises(BadValue, match=r"every=0\. Expected a whole number from 1"):
        NoesisCallback(wrapped, every=0)
    with pytest.raises(BadType, match=r"alarms=True\. Expected noesis\.Alarms\(wrapped\)"):
        NoesisCallback(wrapped, alarms=True)
    with pytest.raises(BadValue, match=r"Name the file run\.jsonl"):
        NoesisCallback(wrapped, tmp_path / "run.txt")
    with pytest.raises(AttributeError, match="'NoesisCallback' object has no attribute 'state'"):
        NoesisCallback(wrapped).state()
