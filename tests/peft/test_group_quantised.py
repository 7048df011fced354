"""Groups over bitsandbytes' weights: one call for all layers, in the dtypes of single calls, and nothing of a forward
is seen where an operand has changed, or by another thread, mode or recomputation."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft", reason="PEFT is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from support.old_torch import compiles_whole_models  # noqa: E402
from support.peft_models import fused_layers, randomise  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft import shared  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
NAMES = ["q_proj", "k_proj", "v_proj"]
WIDTH = 64


class Attention(nn.Module):
    """Three layers over one input, with something between the first and the second."""

    def __init__(self, eight: bool = False, **kwargs) -> None:
        super().__init__()
        for name in NAMES:
            if eight:
                layer = bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
            else:
                layer = bnb.nn.Linear4bit(WIDTH, WIDTH, **({"compute_dtype": FP32, "quant_type": "nf4"} | kwargs))
            setattr(self, name, layer)
        self.between = None
        self.to("cpu")

    def forward(self, x):
        q = self.q_proj(x)
        if self.between is not None:
            self.between(self, x)
        return torch.softmax(q @ self.k_proj(x).mT, -1) @ self.v_proj(x)


class Model(nn.Module):
    def __init__(self, eight: bool = False, **kwargs) -> None:
        super().__init__()
        self.attn = Attention(eight, **kwargs)
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = eight, not eight

    def forward(self, x):
        return self.attn(x)


def make(group: bool | None = True, p: float = 0.0, eight: bool = False, use_dora: bool = False, **kwargs) -> PeftModel:
    """Return a model with fused layers, in a group, one by one (False), or PEFT's own (None)."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=p, target_modules=NAMES, use_dora=use_dora)
    model = get_peft_model(Model(eight, **kwargs), config, autocast_adapter_dtype=False)
    randomise(model)
    if group is not None:
        lora_kernels.fuse(model, group=group, strict=True)
    return model.train()


def attn(model: nn.Module) -> Attention:
    return model.base_model.model.attn


def report_of(model: nn.Module) -> shared.SharedInput:
    return attn(model).q_proj._group.report


def x_of(length: int = 5, dtype: torch.dtype = FP32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, length, WIDTH).to(dtype)


def gradients(model: nn.Module, x: torch.Tensor, how=None) -> list[torch.Tensor]:
    """Return y, dx and the adapters' gradients of one step, whose forward `how` runs."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    y = model(x) if how is None else how(model, x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for n, p in model.named_parameters() if "lora_" in n)]


def same(got: list[torch.Tensor], want: list[torch.Tensor], **kwargs) -> None:
    assert len(got) == len(want) == 8
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **kwargs)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kwargs", [{}, {"quant_type": "fp4", "compress_statistics": False}, {"eight": True}], ids=str)
def test_a_group_trains_as_its_layers_do(kwargs, p):
    grouped, single, x = make(p=p, **kwargs), make(False, p=p, **kwargs), x_of()
    for _ in range(2):
        same(gradients(grouped, x), gradients(single, x))
    assert report_of(grouped).calls == 2 and not report_of(grouped).passed_over
    assert [layer.fused_calls for layer in fused_layers(grouped)] == [2, 2, 2]
    if p == 0:
        for got, want in zip(gradients(grouped, x), gradients(make(None, **kwargs), x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("kwargs", [{"compute_dtype": FP32}, {"compute_dtype": BF16}, {"compute_dtype": None},
                                    {"eight": True}], ids=str)  # fmt: skip
def test_dtypes_are_those_of_single_layers(kwargs, x_dtype, autocast):
    found = []
    for group in (True, False):
        model = make(group, **kwargs)
        with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
            y = attn(model).q_proj(x_of(dtype=x_dtype)), model(x_of(dtype=x_dtype)).detach()
        found.append([*y, [getattr(attn(model), name).base_layer.__dict__.get("compute_dtype") for name in NAMES]])
        if group and not kwargs.get("eight") and fused_layers(model)[0].fused_calls > 1:
            apart = kwargs["compute_dtype"] == BF16 and x_dtype == FP32 and autocast is None
            assert report_of(model).calls == (0 if apart else 1)
    (q, y, dtypes), (q1, y1, dtypes1) = found
    assert y.dtype == y1.dtype and torch.equal(y, y1) and torch.equal(q, q1) and dtypes == dtypes1


def test_a_group_saves_x_once():
    x, sizes = x_of(64), []

    def saved(model: nn.Module) -> int:
        sizes.clear()

        def keep(t: torch.Tensor) -> torch.Tensor:
            sizes.append(t.untyped_storage().data_ptr())
            return t

        leaf = x.clone().requires_grad_() * 1.0
        module = attn(model)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            module(leaf)
        return sum(1 for each in sizes if each == leaf.untyped_storage().data_ptr())

    assert (saved(make(False)), saved(make())) == (3, 1)


# --- what a forward leaves behind ---


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_recomputation_repeats_its_forward(p, reentrant):
    model, x = make(p=p), x_of()
    for _ in range(2):  # the first forward of a group, and a later one
        got = gradients(model, x, how=lambda m, x: checkpoint(m, x, use_reentrant=reentrant))
        same(got, gradients(model, x))


def _write(t: torch.Tensor) -> None:
    with torch.no_grad():
        t.copy_(t * 2 if t.is_floating_point() else torch.full_like(t, 0x35))


def _state(layer) -> object:
    return layer.base_layer.weight.quant_state


CHANGES = {
    "x": lambda self, x: _write(x),
    "A": lambda self, x: _write(self.k_proj.lora_A["default"].weight),
    "codes": lambda self, x: _write(self.v_proj.base_layer.weight),
    "codes, new memory": lambda self, x: setattr(
        self.v_proj.base_layer.weight, "data", torch.full_like(self.v_proj.base_layer.weight.data, 0x35)
    ),
    "scales": lambda self, x: _write(_state(self.k_proj).state2.absmax),
    "new scales": lambda self, x: setattr(_state(self.k_proj).state2, "absmax", _state(self.k_proj).state2.absmax * 3),
    "offset": lambda self, x: setattr(_state(self.v_proj), "offset", _state(self.v_proj).offset * 3),
    "bias": lambda self, x: _write(self.v_proj.base_layer.bias),
    "scaling": lambda self, x: self.k_proj.scaling.update(default=9.0),
    "disabled": lambda self, x: self.k_proj.enable_adapters(False),
    "requires_grad": lambda self, x: self.k_proj.lora_A["default"].weight.requires_grad_(False),
    "compute_dtype": lambda self, x: setattr(self.k_proj.base_layer, "compute_dtype", torch.float16),
    "layer": lambda self, x: setattr(self, "k_proj", self.k_proj.base_layer),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_changed_in_a_forward_is_computed_anew(change, mode):
    ys = []
    for group in (True, False):
        model = make(group, compress_statistics=True)
        attn(model).between = CHANGES[change]
        with mode():
            x = x_of() * 1.0
            ys.append(model(x).detach().clone())
    torch.testing.assert_close(*ys)
    unchanged = make(False, compress_statistics=True)
    if change != "requires_grad":
        assert not torch.equal(ys[1], unchanged(x_of()).detach())


def test_threads_get_the_answers_of_their_own_inputs():
    model = make()
    xs = [x_of(3 + i) for i in range(4)]
    want = [gradients(model, x)[0] for x in xs]
    wrong: list[object] = []

    def run(i: int) -> None:
        try:
            for turn in range(30):
                with torch.enable_grad() if turn % 2 else torch.no_grad():
                    if not torch.allclose(model(xs[i]).detach(), want[i], atol=1e-5):
                        wrong.append((i, turn))
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and report_of(model).calls >= 120


def test_inference_mode_is_not_shared_and_the_layer_trains_afterwards():
    model = make()
    with torch.inference_mode():
        y = model(x_of())
    assert "inference mode" in next(iter(report_of(model).passed_over))
    torch.testing.assert_close(model(x_of()).detach(), y.clone())
    same(gradients(model, x_of()), gradients(make(False), x_of()))


# --- which layers form a group ---


def test_layers_over_bases_of_several_kinds_are_grouped_by_kind():
    model = Model()
    model.attn.k_proj = nn.Linear(WIDTH, WIDTH)
    single = get_peft_model(model, LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False))
    grouped = copy.deepcopy(single)
    lora_kernels.fuse(single)
    report = lora_kernels.fuse(grouped, group=True)
    (group,) = report.groups.values()
    assert len(report.fused) == 3 and group.names == ("q_proj", "v_proj")
    same(gradients(grouped, x_of()), gradients(single, x_of()))
    assert group.calls == 1 and not group.passed_over


def test_dora_layers_compute_one_by_one():
    model = make(use_dora=True)
    want = gradients(make(None, use_dora=True), x_of())
    got = gradients(model, x_of())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert report_of(model).passed_over == {"q_proj: several adapters, or DoRA": 1}


@pytest.mark.parametrize("how", ["copy", "pickle", "unfuse"])
def test_copies_have_groups_of_their_own(how):
    model, x = make(), x_of()
    y = model(x)
    if how == "unfuse":
        lora_kernels.unfuse(model)
        assert not fused_layers(model) and not attn(model)._forward_hooks
    else:
        model = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
        assert report_of(model).calls == 1
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@compiles_whole_models
def test_a_grouped_model_compiles_into_one_graph():
    model, x = make(), x_of()
    want = gradients(make(False), x)
    model.compile(backend="aot_eager", fullgraph=True)
    same(gradients(model, x), want)
