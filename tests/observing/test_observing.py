"""Promises 1 and 2: bitwise equal outputs and gradients, and a model that does not notice."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import noesis
from helpers.models import Block, Returns, small
from noesis.observing import observed as observing


class Net(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def run(model: nn.Module, context=None, backward: bool = True) -> list[Tensor]:
    """Outputs, gradients and the RNG's next number, all of which must be the same."""
    torch.manual_seed(1)
    x = torch.randn(4, 3, 6, 6, requires_grad=backward)
    with context() if context else torch.enable_grad():
        y = model(x)
    found = [y.detach().clone()]
    if backward:
        y.float().square().sum().backward()
        found += [x.grad, *(p.grad.clone() for p in model.parameters())]
        model.zero_grad()
    return [*found, torch.rand(3), *(b.clone() for b in model.buffers())]


CONTEXTS = {
    "eager": None,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", CONTEXTS)
def test_bitwise_equal(context, training):
    torch.manual_seed(0)
    bare = Net().train(training)
    observed = copy.deepcopy(bare)
    wrapped = noesis.wrap(observed, layers="all", per_sample=True, stats=("zeros", "rms"))
    backward = context in ("eager", "autocast")
    for _ in range(2):
        want, got = (run(model, CONTEXTS[context], backward) for model in (bare, wrapped))
        assert len(want) == len(got)
        assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))
    assert (wrapped.trace()["count"] > 0).all()


def test_bitwise_equal_is_noticed_when_it_is_not(monkeypatch):
    bare = Net().eval()
    observed = copy.deepcopy(bare)
    wrapped = noesis.wrap(observed)
    monkeypatch.setattr(observing.Site, "observe", lambda self, output: output.mul_(1 + 1e-6))
    assert not torch.equal(run(bare, backward=False)[0], run(wrapped, backward=False)[0])


def test_the_model_does_not_notice():
    model = Net()
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    wrapped = noesis.wrap(model, layers="all")
    assert list(model.state_dict()) == keys == list(wrapped.state_dict())
    assert all(p is parameters[name] for name, p in wrapped.named_parameters())
    for name, module in model.named_modules():
        if name == "layers":  # a ModuleList is never called
            continue
        assert isinstance(module, classes[name])
        assert isinstance(module, noesis.Observed)
        assert type(module).__name__ == classes[name].__name__
        assert type(module).__module__ == classes[name].__module__
        assert not module._forward_hooks
    assert wrapped.unwrap() is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not any("_noesis" in vars(module) for module in model.modules())


def test_repr_says_so():
    model = Net()
    wrapped = noesis.wrap(model)
    assert "ObservedBlock(" in repr(model)
    assert "ObservedConv2d" not in repr(model)
    assert repr(wrapped) == "Wrapped(Net: 3 of 20 modules observed, layers.0, layers.1, layers.2)"
    wrapped.unwrap()
    assert "Observed" not in repr(model)


def test_forward_hooks_and_an_instance_forward_are_seen():
    """accelerate sets `forward` on the instance; hooks may replace the output."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].forward = lambda x: torch.full_like(x, 3.0)
    model[1].register_forward_hook(lambda module, args, output: torch.full_like(output, 5.0))
    wrapped = noesis.wrap(model, layers="linear")
    wrapped(torch.zeros(1, 2))
    assert wrapped.trace()["mean"].tolist() == [[3.0, 5.0]]


def test_statistics_are_those_of_the_outputs():
    model = Net().eval()
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out.detach().double()))
    wrapped = noesis.wrap(model, layers="all", stats=("rms", "zeros"))
    wrapped(torch.randn(2, 3, 5, 5))
    trace = wrapped.trace()
    for name in trace.layers:
        x = seen[name]
        want = [
            x.numel(),
            x.mean(),
            x.std(),
            x.abs().mean(),
            x.min(),
            x.max(),
            0,
            (x == 0).sum(),
            x.square().mean().sqrt(),
        ]
        assert trace.layer(name)[0] == pytest.approx([float(value) for value in want], rel=1e-5, abs=1e-6), name


def test_a_module_called_several_times_gives_one_row():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act = nn.Linear(3, 3), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            self.seen = [self.act(x), self.act(self.first(x)), self.act(x[:1])]
            return self.seen[0]

    model = Shared()
    wrapped = noesis.wrap(model, layers=nn.SiLU)
    wrapped(torch.randn(5, 3))
    everything = torch.cat([x.detach().flatten() for x in model.seen]).double()
    trace = wrapped.trace()
    assert trace.calls.tolist() == [[3]]
    assert trace["count"].item() == everything.numel()
    assert trace["mean"].item() == pytest.approx(everything.mean().item(), rel=1e-6)
    assert trace["std"].item() == pytest.approx(everything.std().item(), rel=1e-6)


def test_tied_modules_are_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    wrapped = noesis.wrap(model, layers="linear")
    wrapped(torch.ones(1, 4))
    assert wrapped.observed_layers == ["0"]
    assert wrapped.trace().calls.tolist() == [[2]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_under_checkpointing_is_no_call(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.stem(x)).flatten(2).transpose(1, 2)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return self.head(x.mean(1))

    torch.manual_seed(0)
    model = Checkpointed()
    bare = copy.deepcopy(model)
    wrapped = noesis.wrap(model, layers="linear")
    want, got = run(bare), run(wrapped)
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))
    assert (wrapped.trace().calls == 1).all()


# ---------------------------------------------------------------- which tensor


@dataclasses.dataclass
class Output:
    ids: Tensor
    hidden: Tensor


@pytest.mark.parametrize(
    "value",
    [
        lambda x: x,
        lambda x: (x, x * 2),
        lambda x: [None, x],
        lambda x: {"mask": x > 0, "h": x},
        lambda x: Output(x.long(), x),
        lambda x: ((x.long(), (x,)), x * 3),
        lambda x: (x.sum(), x),
    ],
)
def test_the_first_floating_tensor(value):
    model = nn.Sequential(Returns(value))
    wrapped = noesis.wrap(model, layers="leaves")
    wrapped(torch.tensor([[1.0, 2.0]]))
    assert wrapped.trace()["mean"].item() == 1.5


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda x: None, "no floating tensor, in an output of type NoneType"),
        (lambda x: x.long(), "no floating tensor, in an output of type Tensor"),
        (lambda x: {"a": "b"}, "no floating tensor, in an output of type dict"),
        (lambda x: x.to_sparse(), "a tensor of layout torch.sparse_coo, in an output of type Tensor"),
    ],
)
def test_what_cannot_be_measured_is_reported_by_name(value, reason):
    wrapped = noesis.wrap(nn.Sequential(Returns(value)), layers="leaves")
    wrapped(torch.ones(1, 2))
    trace = wrapped.trace()
    assert trace.unmeasured == {"0": reason}
    assert f"not measured: 0 ({reason})" in repr(trace)


def test_output_picks_the_tensor():
    wrapped = noesis.wrap(nn.Sequential(Returns(lambda x: (x, x * 2))), layers="leaves", output=lambda out: out[1])
    wrapped(torch.ones(1, 2))
    assert wrapped.trace()["mean"].item() == 2.0


def test_layers_that_never_ran_are_named():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    wrapped = noesis.wrap(Half(), layers="linear")
    wrapped(torch.ones(1, 2))
    trace = wrapped.trace()
    assert trace.never_ran == ["spare"]
    assert "never ran: spare" in repr(trace)
    assert trace.soulprint().layers == ["used"]


# ---------------------------------------------------------------- copies


def test_a_deep_copy_has_a_recorder_of_its_own():
    model = Net()
    wrapped = noesis.wrap(model)
    wrapped(torch.randn(1, 3, 4, 4))
    twin = copy.deepcopy(model)
    assert isinstance(twin.layers[0], noesis.Observed)
    other = noesis.wrap(twin)  # idempotent: a handle on the copy
    other(torch.randn(1, 3, 4, 4))
    assert (len(wrapped.trace()), len(other.trace())) == (1, 2)
    again = copy.deepcopy(wrapped)
    again(torch.randn(1, 3, 4, 4))
    assert (len(wrapped.trace()), len(again.trace())) == (1, 2)
    other.unwrap()
    assert isinstance(model.layers[0], noesis.Observed)
    assert not isinstance(twin.layers[0], noesis.Observed)


def test_pickle_and_torch_save():
    model = Net().eval()
    wrapped = noesis.wrap(model)
    x = torch.randn(1, 3, 4, 4)
    y = wrapped(x)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin).__name__ == "Net"
    assert isinstance(twin, noesis.Observed)
    assert torch.equal(twin(x), y)
    assert len(noesis.wrap(twin).trace()) == 2
    file = io.BytesIO()
    torch.save(wrapped, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), y)
    assert (len(again.trace()), len(wrapped.trace())) == (2, 1)
    assert type(again.unwrap()) is Net


def test_casting_and_moving_do_not_touch_the_recorder():
    model = Net().eval()
    wrapped = noesis.wrap(model, layers="all")
    assert wrapped.to(torch.bfloat16) is wrapped
    wrapped(torch.randn(1, 3, 4, 4, dtype=torch.bfloat16))
    assert wrapped._recorder.banks[0].slab.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.bfloat16
    assert not any("noesis" in key for key in wrapped.state_dict())


# ---------------------------------------------------------------- the container


def test_the_container_is_the_model():
    model = Net()
    wrapped = noesis.wrap(model)
    assert isinstance(wrapped, nn.Module)
    assert wrapped.observed_model is model
    assert wrapped.head is model.head
    assert wrapped.train(False) is wrapped
    assert not model.training
    assert not wrapped.training
    assert wrapped.eval() is wrapped
    assert wrapped.requires_grad_(False) is wrapped
    wrapped.note = 3
    assert model.note == 3
    assert [name for name, _ in wrapped.named_modules()] == [name for name, _ in model.named_modules()]
    assert wrapped.load_state_dict(model.state_dict()).missing_keys == []
    with pytest.raises(AttributeError, match="nothing_like_it"):
        wrapped.nothing_like_it  # noqa: B018
    hook = wrapped.register_forward_hook(lambda module, args, output: output * 0)
    assert wrapped(torch.ones(1, 3, 4, 4)).abs().sum() == 0
    hook.remove()


def test_the_signature_is_the_models():
    import inspect

    model = Net()
    assert inspect.signature(noesis.wrap(model).forward) == inspect.signature(Net().forward)


def test_an_exception_in_a_layer_leaves_the_next_step_right():
    class Fails(nn.Module):
        on = True

        def forward(self, x):
            if self.on:
                raise RuntimeError("on purpose")
            return x

    model = nn.Sequential(nn.Linear(2, 2), Fails(), nn.Linear(2, 2))
    wrapped = noesis.wrap(model, layers="all")
    with pytest.raises(RuntimeError, match="on purpose"):
        wrapped(torch.ones(1, 2))
    model[1].on = False
    wrapped(torch.ones(3, 2))
    trace = wrapped.trace()
    assert trace["count"].tolist() == [[2, 0, 0], [6, 6, 6]]
    assert trace.order.tolist() == [[1, 0, 0], [1, 2, 3]]


# ---------------------------------------------------------------- refusals


def test_wrapping_twice_is_idempotent_or_refused():
    model = Net()
    wrapped = noesis.wrap(model)
    wrapped(torch.randn(1, 3, 4, 4))
    assert len(noesis.wrap(model).trace()) == 1
    assert len(noesis.wrap(wrapped).trace()) == 1
    with pytest.raises(
        noesis.NoesisError, match=r"Net is wrapped already, with other settings .* Call noesis.unwrap\(model\)"
    ):
        noesis.wrap(model, layers="all")
    with pytest.raises(RuntimeError, match="wrapped already"):
        noesis.wrap(model.layers[0], layers="linear")
    assert sum(cls is noesis.Observed for cls in type(model).__mro__) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated since 2.13
def test_script_modules_and_lazy_modules_are_refused_by_name():
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"0 \(RecursiveScriptModule\) is a ScriptModule.*before scripting"):
        noesis.wrap(nn.Sequential(scripted), layers="all")
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(RuntimeError, match=r"1 \(LazyLinear\) has no parameters yet.*Run the model once"):
        noesis.wrap(model, layers="all")
    assert not any(isinstance(module, noesis.Observed) for module in model.modules())  # nothing half done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stats": 5}, "stats=5. Expected names among count, mean"),
        ({"output": 3}, "output=3. Expected a callable"),
        ({"stats": ("mean", "median")}, "stats has 'median'. Expected any of count, mean"),
        ({"every": 0}, "every=0. Expected a whole number from 1"),
        ({"capacity": 2.5}, "capacity=2.5"),
        ({"per_sample": -1}, "per_sample=-1"),
        ({"layers": "atention"}, r"layers='atention' selects nothing in Net.*Did you mean: 'attention'"),
        ({"layers": []}, "layers is empty"),
        ({"layers": "re:("}, "no regular expression"),
        ({"layers": 3}, "layers has 3 of type int"),
    ],
)
def test_bad_arguments(arguments, message):
    model = Net()
    with pytest.raises(noesis.NoesisError, match=message):
        noesis.wrap(model, **arguments)
    assert type(model) is Net


def test_models_that_cannot_be_wrapped():
    with pytest.raises(ValueError, match="Linear has no submodules to observe.*nn.Sequential"):
        noesis.wrap(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is of type str. Expected an nn.Module or a diffusers pipeline"):
        noesis.wrap("model")


@pytest.mark.parametrize("inside", [False, True])
def test_graph_modules(inside):
    """They write their code into their class, and are copied and pickled by a recipe of their own."""

    class Unannotated(nn.Module):  # torch.fx would write annotations that are text into its code
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.down(self.up(x).relu())

    traced = torch.fx.symbolic_trace(Unannotated())
    bare = copy.deepcopy(traced).eval()
    original = type(traced)
    model = nn.Sequential(traced).eval() if inside else traced.eval()
    wrapped = noesis.wrap(model, layers="all")
    x = torch.randn(2, 8)
    wrapped(x)
    for each in (traced, bare):
        for node in each.graph.nodes:
            if node.target == "relu":
                node.target = "tanh"
        each.recompile()
    y = wrapped(x)
    assert torch.equal(y, bare(x))
    others = [copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))]
    for other in others:
        assert isinstance(other, noesis.Wrapped)
        assert torch.equal(other(x), y)
        assert (other.trace().calls == 1).all()
        assert len(other.trace()) == 3
        assert not other.trace().unmeasured
    assert len(wrapped.trace()) == 2
    assert type(wrapped.unwrap()[0] if inside else wrapped.unwrap()) is original
    assert torch.equal(model(x), y)


def test_tracing_by_torch_fx_leaves_no_mark():
    wrapped = noesis.wrap(Block(), layers="linear")

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = wrapped.observed_model

        def forward(self, x):
            return self.block(x)

    torch.fx.symbolic_trace(Whole())
    torch.fx.symbolic_trace(wrapped.observed_model)
    with pytest.warns(noesis.NoesisWarning, match=r"left out \(\d traced by .*torch\.fx"):
        assert len(wrapped.trace()) == 0


def test_a_module_that_left_the_model_is_given_back_too():
    model = small()
    wrapped = noesis.wrap(model, layers="all")
    removed = model[2]
    model[2] = nn.Linear(6, 3)
    wrapped.unwrap()
    assert type(removed) is nn.Linear
    noesis.wrap(nn.Sequential(removed), layers="all")
