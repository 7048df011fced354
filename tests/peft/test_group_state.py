"""Nothing that one forward of a group leaves behind is seen by another thread, mode, input, recomputation or model."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from support.old_torch import compiles_whole_models
from support.replicas import replica

import lora_kernels
from lora_kernels.peft import shared

NAMES = ["q_proj", "k_proj", "v_proj"]
WIDTH = 16


class Attention(nn.Module):
    """Three layers over one input, or q over `x` and k and v over `memory`."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return torch.softmax(self.q_proj(x) @ self.k_proj(memory).mT, -1) @ self.v_proj(memory)


def make(parent: type[nn.Module] = Attention, p: float = 0.0, group: bool | None = True) -> nn.Module:
    """Return a module with fused layers, in a group, one by one (False), or PEFT's own (None)."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=p, target_modules=NAMES, init_lora_weights=False)
    model = inject_adapter_in_model(config, nn.ModuleDict({"attn": parent()}))
    if group is not None:
        lora_kernels.fuse(model, group=group)
    return model["attn"].train()


def inputs(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, length, WIDTH, requires_grad=True) for length in lengths]


def gradients(module: nn.Module, *xs: torch.Tensor, how=None) -> list[torch.Tensor]:
    """Return y, dx and the adapters' gradients of one step, whose forward `how` runs."""
    module.zero_grad()
    xs = [x.detach().requires_grad_() for x in xs]
    torch.manual_seed(3)
    y = module(*xs) if how is None else how(module, *xs)
    y.square().sum().backward()
    return [y.detach(), *(x.grad for x in xs), *(p.grad for n, p in module.named_parameters() if "lora_" in n)]


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def report_of(module: nn.Module) -> shared.SharedInput:
    return module.q_proj._group.report


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The numbers of layers of the calls of `lora_linear_group`."""
    counts: list[int] = []
    inner = shared.lora_linear_group
    monkeypatch.setattr(
        shared, "lora_linear_group", lambda x, layers, **kw: counts.append(len(layers)) or inner(x, layers, **kw)
    )
    return counts


def serve(threads: int, forwards: int) -> None:
    """Run forwards of one model in several threads, with gradients in every second one, and check every answer."""
    module = make()
    trained = [p for n, p in module.named_parameters() if "lora_" in n]
    xs = [torch.randn(2, 3 + i % 3, WIDTH) for i in range(threads)]
    want = [gradients(module, x) for x in xs]
    before = module.q_proj.fused_calls
    wrong: list[object] = []

    def run(i: int) -> None:
        try:
            for turn in range(forwards):
                if turn % 2:
                    x = xs[i].detach().requires_grad_()
                    y = module(x)
                    grads = torch.autograd.grad(y.square().sum(), [x, *trained])
                    right = all(map(functools.partial(torch.allclose, atol=1e-4), grads, want[i][1:]))
                else:
                    with torch.inference_mode() if turn % 4 else torch.no_grad():
                        y, right = module(xs[i]), True
                if not (right and torch.allclose(y, want[i][0], atol=1e-5)):
                    wrong.append((i, turn))
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert module.q_proj.fused_calls - before == threads * forwards
    assert report_of(module).calls >= threads * forwards and report_of(module).dissolved is None


def test_threads_get_the_answers_of_their_own_inputs():
    serve(4, 60)


@pytest.mark.slow
def test_eight_threads_get_their_own_answers_in_20000_forwards():
    serve(8, 2500)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("lengths", [(5,), (5, 7)], ids=["self", "cross"])
def test_a_recomputation_repeats_its_forward(lengths, p, reentrant):
    module, xs = make(p=p), inputs(*lengths)
    for _ in range(2):  # the first forward of a group, and a later one
        got = gradients(module, *xs, how=lambda m, *xs: checkpoint(m, *xs, use_reentrant=reentrant))
        same(got, gradients(module, *xs))
        same(got, gradients(make(p=p, group=False), *xs))


class ByLayer(Attention):
    """Each layer is checkpointed within its parent."""

    reentrant = False

    def forward(self, x):
        q, k, v = (checkpoint(getattr(self, name), x, use_reentrant=self.reentrant) for name in NAMES)
        return torch.softmax(q @ k.mT, -1) @ v


class OneOfThem(Attention):
    """The first layer is checkpointed, the others are not."""

    reentrant = False

    def forward(self, x):
        q = checkpoint(self.q_proj, x, use_reentrant=self.reentrant)
        return torch.softmax(q @ self.k_proj(x).mT, -1) @ self.v_proj(x)


class Within(Attention):
    """The hooks of the parent run outside of the checkpoint, as in the layers of transformers 5.23."""

    reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parent", [ByLayer, OneOfThem, Within])
def test_checkpoints_within_the_parent_recompute_what_they_computed(parent, reentrant, monkeypatch):
    if not reentrant and torch.__version__ < (2, 8):
        pytest.skip("torch before 2.8 does not tell whether a layer is checkpointed within its parent")
    monkeypatch.setattr(parent, "reentrant", reentrant)
    xs = inputs(5)
    same(gradients(make(parent, p=0.4), *xs), gradients(make(parent, p=0.4, group=False), *xs))
    same(gradients(make(parent), *xs), gradients(make(), *xs))


@pytest.mark.parametrize("everywhere", [False, True])
def test_backward_hooks_change_nothing_in_a_recomputation(everywhere):
    module, xs = make(p=0.4), inputs(5)
    want, calls = gradients(module, *xs), []
    register = module.k_proj.register_full_backward_hook
    if everywhere:
        register = nn.modules.module.register_module_full_backward_hook
    handle = register(lambda *_: calls.append(1))
    try:
        plain = gradients(module, *xs)
        got = gradients(module, *xs, how=lambda m, x: checkpoint(m, x, use_reentrant=True))
    finally:
        handle.remove()
    assert calls
    same(got, plain)
    same(gradients(module, *xs), want)


class Modes(Attention):
    """The first layer is called in another mode than the rest."""

    mode = torch.no_grad

    def forward(self, x):
        with type(self).mode():
            q = self.q_proj(x)
        return torch.softmax(q.clone().to(x.dtype) @ self.k_proj(x).mT, -1) @ self.v_proj(x)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_another_mode_computes_for_itself(mode, monkeypatch):
    monkeypatch.setattr(Modes, "mode", mode)
    x = torch.randn(2, 5, WIDTH)
    found = []
    for group in (True, None):
        module = make(Modes, group=group)
        k = module.k_proj.register_forward_hook(lambda _, __, y: found.append((y.dtype, y.requires_grad)))
        module(x).square().sum().backward()
        k.remove()
        found.append([p.grad is None for n, p in module.named_parameters() if "lora_" in n])
    assert found[0] == found[2] == (torch.float32, True) and found[1] == found[3] and not all(found[1])


class Between(Attention):
    """Something happens after the first layer has been called."""

    happens = staticmethod(lambda self, x: None)

    def forward(self, x):
        q = self.q_proj(x)
        type(self).happens(self, x)
        return q + self.k_proj(x) + self.v_proj(x)


def _write(t: torch.Tensor) -> None:
    with torch.no_grad():
        t.mul_(2)


def _replace(t: torch.Tensor) -> None:
    t.data = 2 * t.detach()


def _doubled(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: 2 * t for name, t in module.state_dict().items()}


CHANGES = {
    "x": lambda self, x: _write(x),
    "a view of x": lambda self, x: _write(x[0]),
    "A": lambda self, x: _write(self.k_proj.lora_A["default"].weight),
    "W": lambda self, x: _write(self.v_proj.base_layer.weight),
    "bias": lambda self, x: _write(self.v_proj.base_layer.bias),
    "scaling": lambda self, x: self.k_proj.scaling.update(default=9.0),
    "dropout": lambda self, x: self.k_proj.train(False),
    "disabled": lambda self, x: self.k_proj.enable_adapters(False),
    "merged": lambda self, x: self.k_proj.merge(),
    "requires_grad": lambda self, x: self.k_proj.lora_A["default"].weight.requires_grad_(False),
    "parameter": lambda self, x: setattr(
        self.k_proj.lora_B["default"], "weight", nn.Parameter(torch.ones_like(self.k_proj.lora_B["default"].weight))
    ),
    "layer": lambda self, x: setattr(self, "k_proj", self.k_proj.base_layer),
    "x.data": lambda self, x: setattr(x, "data", 2 * x.detach()),
    "A.data": lambda self, x: _replace(self.k_proj.lora_A["default"].weight),
    "B.data": lambda self, x: _replace(self.v_proj.lora_B["default"].weight),
    "W.data": lambda self, x: _replace(self.v_proj.base_layer.weight),
    "bias.data": lambda self, x: _replace(self.k_proj.base_layer.bias),
    "scaling.data": lambda self, x: self.k_proj.scaling["default"].set_(torch.tensor(9.0)),
    "swapped with a new one": lambda self, x: torch.utils.swap_tensors(
        self.k_proj.lora_A["default"].weight, nn.Parameter(torch.ones(4, WIDTH))
    ),
    "swapped with each other": lambda self, x: torch.utils.swap_tensors(
        self.k_proj.base_layer.weight, self.v_proj.base_layer.weight
    ),
    "load_state_dict": lambda self, x: self.load_state_dict(_doubled(self)),
    "load_state_dict by assignment": lambda self, x: self.load_state_dict(_doubled(self), assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_changed_in_a_forward_is_computed_anew(change, mode, monkeypatch):
    if "swapped" in change and mode is torch.enable_grad:
        pytest.skip("torch swaps no tensor that a graph holds")
    monkeypatch.setattr(Between, "happens", staticmethod(CHANGES[change]))
    ys = []
    for group in (True, None):
        module = make(Between, group=group)
        if change == "scaling.data":
            module.k_proj.scaling["default"] = torch.tensor(2.0)
        with mode():
            x = inputs(5)[0].detach() * 1.0
            ys.append(module(x).detach().clone())
    torch.testing.assert_close(*ys)


def test_an_input_of_inference_mode_is_not_shared(calls):
    module = make()
    with torch.inference_mode():
        x = torch.randn(2, 5, WIDTH)
        module(x)
    assert not calls and "inference mode" in next(iter(report_of(module).passed_over))
    with torch.no_grad():
        module(torch.randn(2, 5, WIDTH))
    assert calls == [3]


class Interleaved(Attention):
    def forward(self, x, memory=None):
        memory = 2 * x if memory is None else memory
        ys = [(layer(x), layer(memory)) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        return sum(one.sum(1) * other.sum(1) for one, other in ys)


@pytest.mark.parametrize("lengths", [(5,), (5, 7)])
def test_interleaved_inputs_keep_their_groups(lengths, calls):
    module, xs = make(Interleaved).double(), [x.double() for x in inputs(*lengths)]
    want = gradients(make(Interleaved, group=None).double(), *xs)
    for _ in range(2):
        same(gradients(module, *xs), want)
    assert report_of(module).dissolved is None and sum(calls) == (12 if len(xs) == 1 else 4)


class Twice(Attention):
    """The layers are called twice, and the parent calls itself."""

    def forward(self, x, depth=1):
        y = super().forward(x) + self.q_proj(x) + super().forward(2 * x)
        return self(y, depth - 1) + self.v_proj(y) if depth else y


def test_layers_and_parents_that_are_called_again_and_in_themselves():
    x = inputs(5)[0].double()
    same(gradients(make(Twice).double(), x), gradients(make(Twice, group=None).double(), x))


class Generator(Attention):
    def forward(self, x):
        yield self.q_proj(x)
        yield self.k_proj(x)


def test_a_forward_that_is_a_generator_shares_nothing(calls):
    module, (x,) = make(Generator), inputs(5)
    plain = make(Generator, group=None)
    for got, want in zip(module(x), plain(x), strict=True):
        torch.testing.assert_close(got, want)
    assert not calls


class Stops(Attention):
    error: type[BaseException] | None = None

    def forward(self, x):
        y = self.q_proj(x)
        if self.error is not None:
            raise self.error("on purpose")
        return y + self.k_proj(x)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_results_that_nobody_fetches_are_freed(error):
    module = make(Stops)
    x = torch.randn(2, 5, WIDTH)
    alive = weakref.ref(x)
    module.error = error
    try:
        module(x)
    except BaseException as raised:
        assert type(raised) is error
        del raised
    if error is KeyboardInterrupt:  # torch calls no hook then, so that x goes with the next forward
        module.error = None
        module(torch.randn(2, 5, WIDTH))
    del x
    gc.collect(1)
    assert alive() is None


def test_a_model_is_freed_after_a_forward_was_interrupted():
    module = make(Stops)
    module.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        module(torch.randn(2, 5, WIDTH))
    alive = weakref.ref(module)
    del module
    gc.collect(1)
    assert alive() is None


class Holds(Attention):
    def forward(self, x):
        y = self.q_proj(x) + self.k_proj(x) + self.v_proj(x)
        alive = weakref.ref(x)
        del x
        return y, alive() is None


def test_the_input_is_not_held_after_the_last_layer():
    module = make(Holds)
    group = module.q_proj._group
    with torch.no_grad():
        module(torch.randn(2, 5, WIDTH))
        forward = shared.Forward(module, ())
        group.here.forward = forward
        x = torch.randn(2, 5, WIDTH)
        for name in NAMES:
            getattr(module, name)(x)
    assert forward._pending == {}


def hooks_of(module: nn.Module) -> int:
    return len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._forward_hooks_always_called)


def _peft_model() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(Attention()), LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_an_unloaded_model_has_no_hooks_and_frees_its_adapters(merge, copied):
    model = _peft_model()
    report = lora_kernels.fuse(model, group=True)  # the caller keeps it
    if copied:
        model = copy.deepcopy(model)
    old = weakref.ref(model.base_model.model[0].q_proj.lora_A["default"])
    x = torch.randn(2, 5, WIDTH)
    if not copied:
        model(x)
    plain = model.merge_and_unload() if merge else model.unload()
    del model
    gc.collect(1)
    assert hooks_of(plain[0]) == 0 and old() is None
    assert copied or "no longer in the model" in str(report)
    assert "lora_kernels" not in repr(pickle.dumps(plain))
    torch.testing.assert_close(plain(x), copy.deepcopy(plain)(x))


def test_layers_that_are_replaced_leave_no_hooks():
    module = make()
    for name in NAMES[:2]:
        setattr(module, name, nn.Linear(WIDTH, WIDTH))
    module(*inputs(5))
    module.v_proj = nn.Linear(WIDTH, WIDTH)
    gc.collect(1)
    assert hooks_of(module) == 0


def test_a_deleted_adapter_is_freed():
    model = _peft_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=NAMES))
    lora_kernels.fuse(model, group=True)
    x = torch.randn(2, 5, WIDTH)
    model(x)
    old = weakref.ref(model.base_model.model[0].q_proj.lora_A["default"].weight)
    model.set_adapter("second")
    model.delete_adapter("default")
    gc.collect(1)
    assert old() is None
    model(x)


def test_a_copy_of_a_layer_takes_neither_its_group_nor_its_neighbours():
    module = make()
    got = len(pickle.dumps(module.q_proj))
    assert got < len(pickle.dumps(module)) / 2
    twin = copy.deepcopy(module.q_proj)
    assert twin._group is not module.q_proj._group
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(twin(x), module.q_proj(x))


def test_copies_have_groups_of_their_own(calls):
    module, xs = make(), inputs(5)
    want = gradients(module, *xs)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    alive = weakref.ref(module)
    del module
    gc.collect(1)
    assert alive() is None
    for twin in twins:
        calls.clear()
        same(gradients(twin, *xs), want)
        assert calls == [3] and hooks_of(twin) == 3
        lora_kernels.unfuse(twin)
        assert hooks_of(twin) == 0


def test_replicas_of_data_parallel_share_within_themselves(calls):
    module, (x,) = make(), inputs(5)
    twin = replica(module)
    torch.testing.assert_close(twin(x), module(x))
    assert calls == [3, 3]


def test_vmap_over_inputs(calls):
    module, (x,) = make(), inputs(5)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(module)(x), torch.stack([module(each) for each in x]))


@compiles_whole_models
@pytest.mark.parametrize("how", ["checkpointed", pytest.param("plain", marks=pytest.mark.slow)])
def test_a_module_compiles_as_a_whole_before_any_eager_call(how):
    def run(x):
        return module(x) if how == "plain" else checkpoint(module, x, use_reentrant=False)

    torch._dynamo.reset()
    module, xs = make(), inputs(5)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got = gradients(module, *xs, how=lambda _, x: compiled(x))
    same(got, gradients(module, *xs))


def test_bart_under_activation_checkpointing_trains_as_without_groups():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
    config = transformers.BartConfig(vocab_size=32, d_model=16, max_position_embeddings=16, dropout=0.0, **sizes)
    found = []
    for group in (False, True):
        torch.manual_seed(0)
        base = transformers.BartForConditionalGeneration(config)
        lora = LoraConfig(r=2, lora_dropout=0.3, target_modules=NAMES, init_lora_weights=False)
        model = get_peft_model(base, lora)
        report = lora_kernels.fuse(model, group=group)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
        ids = torch.arange(2, 12).view(2, 5)
        for _ in range(2):
            torch.manual_seed(5)
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=True).loss.backward()
        found.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    assert len(report.groups) == 3 and all(each.calls == 4 for each in report.groups.values())
    same(*found)


_BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
