"""Bad input raises the right type of error, with the values at fault in its message, and changes nothing."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import FusedLoRALinear, dora_linear, lora_linear
from lora_kernels.group import Layer, lora_linear_group


def call(**changes):
    given = {
        "x": torch.randn(3, 8),
        "weight": torch.randn(5, 8),
        "lora_a": torch.randn(2, 8),
        "lora_b": torch.randn(5, 2),
        "bias": torch.randn(5),
        "scale": 1.0,
    } | changes
    operands = [given.pop(name) for name in ("x", "weight", "lora_a", "lora_b")]
    return lora_linear(*operands, **given)


BAD = [
    ({"x": torch.randn(())}, ValueError, r"x \(\)"),
    ({"x": torch.randn(3, 7)}, ValueError, r"differ in K.*x \(3, 7\), weight \(5, 8\)"),
    ({"lora_a": torch.randn(2, 9)}, ValueError, r"differ in K.*lora_a \(2, 9\)"),
    ({"lora_a": torch.randn(2, 8, 1)}, ValueError, r"lora_a \(2, 8, 1\)"),
    ({"lora_b": torch.randn(6, 2)}, ValueError, r"differ in N.*lora_b \(6, 2\)"),
    ({"bias": torch.randn(4)}, ValueError, r"differ in N.*bias \(4,\)"),
    ({"bias": torch.randn(5, 1)}, ValueError, r"bias \(5, 1\)"),
    ({"lora_b": torch.randn(5, 3)}, ValueError, r"rank.*lora_a \(2, 8\), lora_b \(5, 3\)"),
    ({"lora_a": torch.randn(0, 8), "lora_b": torch.randn(5, 0)}, ValueError, r"at least 1.*lora_a \(0, 8\)"),
    ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x torch.int64"),
    ({"x": torch.ones(3, 8, dtype=torch.complex64)}, TypeError, "x torch.complex64"),
    ({"x": torch.ones(3, 8, dtype=torch.float64)}, TypeError, "weight torch.float32"),
    ({"weight": torch.randn(5, 8).half()}, TypeError, "weight torch.float16"),
    ({"bias": torch.randn(5).half()}, TypeError, "bias torch.float16"),
    ({"lora_a": torch.randn(2, 8).half()}, TypeError, "lora_a torch.float16, lora_b torch.float32"),
    ({"lora_a": torch.randn(2, 8).double(), "lora_b": torch.randn(5, 2).double()}, TypeError, "lora_a torch.float64"),
    ({"lora_b": torch.empty(5, 2, device="meta")}, ValueError, "lora_b on meta"),
    ({"weight": torch.randn(5, 8, requires_grad=True)}, ValueError, "frozen"),
    ({"dropout_p": 1.0}, ValueError, "got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, "got nan"),
    ({"scale": float("inf")}, ValueError, "finite, got inf"),
    ({"scale": float("nan")}, ValueError, "finite, got nan"),
    ({"scale": 1j}, TypeError, "complex"),
    ({"scale": torch.ones(2)}, ValueError, r"one element.*\(2,\)"),
    ({"scale": torch.ones((), dtype=torch.int32)}, ValueError, "int32"),
    ({"dropout_p": 0.5, "seed": -1}, ValueError, "got -1"),
    ({"dropout_p": 0.5, "seed": 2**63}, ValueError, "got 9223372036854775808"),
    ({"dropout_p": 0.5, "seed": 1.5}, TypeError, "float"),
    ({"dropout_p": 0.5, "seed": torch.tensor(1.0)}, ValueError, "torch.float32"),
    ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, r"\(2,\)"),
    ({"backend": "cudnn"}, ValueError, "unknown backend 'cudnn'.*'eager'"),
    ({"backend": "triton"}, ValueError, "backend='triton' cannot serve this call"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call(**changes)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_way_out_for_a_bias_of_another_dtype_works(dtype, autocast):
    """Autocast leaves an fp64 x as it is, so it is no way out for it. torch refuses such a bias too."""
    x, bias = torch.randn(3, 8, dtype=dtype), torch.randn(5)
    layer = FusedLoRALinear(8, 5, dtype=dtype)
    layer.bias.data = bias
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if autocast and dtype == torch.bfloat16:
            assert layer(x).dtype == dtype
            return
        with pytest.raises(TypeError, match=f"bias must have x's dtype.*bias torch.float32.*to.{dtype}") as error:
            layer(x)
        assert "autocast" not in str(error.value)
        layer.bias.data = layer.bias.data.to(dtype)  # what the message says
        assert layer(x).dtype == dtype
        layer.bias = torch.nn.Parameter(bias.to(torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"bias must be fp64, fp32, fp16 or bf16.*bias torch\.int8"):
            layer(x)


NO_WEIGHTS = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias", "magnitude", "scale"])
@pytest.mark.parametrize("dtype", NO_WEIGHTS, ids=str)
@pytest.mark.parametrize("function", ["lora_linear", "group", "dora_linear"])
def test_autocast_makes_no_weights_of_what_is_no_floating_number(function, dtype, name):
    given = {
        "x": torch.randn(3, 8),
        "weight": torch.randn(5, 8),
        "lora_a": torch.randn(2, 8),
        "lora_b": torch.randn(5, 2),
        "scale": torch.ones(()),
        "bias": torch.randn(5),
        "magnitude": torch.ones(5),
    }
    if function != "dora_linear" and name == "magnitude":
        return
    changed = given | {name: given[name].abs().clamp(max=1).mul(100).to(dtype)}
    x, w, a, b, scale, bias, m = changed.values()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises((TypeError, ValueError), match=str(dtype)):
        if function == "lora_linear":
            lora_linear(x, w, a, b, scale=scale, bias=bias)
        elif function == "group":
            lora_linear_group(x, [Layer(w, a, b, scale, bias)])
        else:
            dora_linear(x, w, a, b, m, scale=scale, bias=bias)


def test_an_operator_refuses_dtypes_that_its_kernels_would_misread():
    x, w, a, b, bias = (torch.randn(*size) for size in ((3, 8), (5, 8), (2, 8), (5, 2), (5,)))
    ops, rest, codes = torch.ops.lora_kernels, (1.0, 0.0, None, None), w.to(torch.int8)
    for changed in (
        (x, w.half(), a, b, bias),
        (x, w, a.half(), b, bias),
        (x, w, a, b, bias.half()),
        (x, codes, a, b, None),
    ):
        with pytest.raises(TypeError, match="one floating dtype"):
            ops.forward(*changed, *rest, False)
        *first, last = changed
        rows, *layer = [[t] for t in first]
        with pytest.raises(TypeError, match="one floating dtype"):
            ops.forward_group(rows[0], *layer, [last], [1.0], [0.0], [None], None, [False])
    h, dy = torch.randn(3, 2), torch.randn(3, 5)
    with pytest.raises(TypeError, match=r"weight torch\.int8"):
        ops.backward(dy, x, codes, a, b, h, *rest, True, True, True)
    with pytest.raises(TypeError, match=r"weight torch\.int8"):
        ops.backward_group([dy], x, [codes], [a], [b], [h], [1.0], [0.0], [None], None, True, [True], [True])
    with pytest.raises(TypeError, match=r"weight torch\.float16"):
        ops.base_gemm(x, w.half(), None)


def test_good_input_passes():
    assert call().shape == (3, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "got 0"),
        ({"r": -3}, "got -3"),
        ({"r": 2.0}, "got 2.0"),
        ({"lora_dropout": 1.0}, "got 1.0"),
        ({"lora_alpha": float("inf")}, "got inf"),
    ],
)
def test_bad_settings_of_the_module_are_named_and_change_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear(4, 4, **settings)
    base = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear.from_linear(base, **settings)
    assert base.weight.requires_grad  # the base is not frozen


def test_a_bad_adapter_dtype_is_named_and_changes_nothing():
    base = torch.nn.Linear(4, 4)
    with pytest.raises(TypeError, match="float16"):
        FusedLoRALinear.from_linear(base, adapter_dtype=torch.float16)
    assert base.weight.requires_grad


def test_another_rank_is_refused_and_nothing_is_loaded():
    source, target = FusedLoRALinear(6, 5, r=8), FusedLoRALinear(6, 5, r=4)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"lora_A \(8, 6\) is of rank 8, this module of r=4"):
        target.load_state_dict(source.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_a_merge_that_overflows_changes_nothing():
    layer = FusedLoRALinear(4, 4, dtype=torch.float16)
    torch.nn.init.constant_(layer.lora_B, 6e4)
    torch.nn.init.constant_(layer.lora_A, 6e4)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged
    layer.merge(safe=False)
    assert layer.merged


@pytest.mark.parametrize(("mark", "value", "words"), [
    ("ds_shape", torch.Size((6, 8)), r"DeepSpeed ZeRO-3 has partitioned it; its shape is \(6, 8\)"),
    ("_fsdp_flattened", True, r"a shard of FullyShardedDataParallel, \(0,\)"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b"])
def test_a_partitioned_parameter_names_who_has_partitioned_it(name, mark, value, words):
    operands = {"weight": torch.ones(6, 8), "lora_a": torch.ones(2, 8), "lora_b": torch.ones(6, 2)}
    operands[name] = torch.empty(0)
    setattr(operands[name], mark, value)
    with pytest.raises(ValueError, match=f"{name}.*{words}"):
        lora_linear(torch.ones(3, 8), scale=1.0, **operands)


def test_a_weight_that_is_computed_from_trained_tensors_is_named_as_such():
    w = torch.ones(6, 8, requires_grad=True) * 2
    with pytest.raises(ValueError, match=r"weight \(6, 8\) requires a gradient, because it is computed.*MulBackward"):
        lora_linear(torch.ones(3, 8), w, torch.ones(2, 8), torch.ones(6, 2), scale=1.0)
