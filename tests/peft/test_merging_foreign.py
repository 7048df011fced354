"""Merging over the layers of other packages, and over weights of which a process holds a part."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, get_peft_model  # noqa: E402
from support.merge_models import K, N, Net, is_rounded_once, make, merged_by_peft, randomised  # noqa: E402
from support.old_torch import TORCH  # noqa: E402

import lora_kernels  # noqa: E402


def torchao(dtype: torch.dtype) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    linear = nn.Linear(K, N, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


def hqq(dtype: torch.dtype) -> nn.Module:
    core = pytest.importorskip("hqq.core.quantize", reason="HQQ is not installed")
    config = core.BaseQuantizeConfig(nbits=4, group_size=32)
    return core.HQQLinear(nn.Linear(K, N), config, compute_dtype=dtype, device="cpu")


def dense_of(layer: nn.Module) -> torch.Tensor:
    """Return the weight in fp64: torchao's codes times their scales, which its own dequantize rounds to 16 bits, or
    what HQQ computes with."""
    if (weight := getattr(layer, "weight", None)) is None:
        return layer.dequantize().double()
    return weight.qdata.double() * weight.scale.double()


@pytest.mark.parametrize("base", [torchao, hqq])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_weight_stands_beside_another_packages_codes(base, dtype):
    torch.manual_seed(0)
    quantised = base(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(Net(quantised), LoraConfig(r=4, lora_alpha=6, target_modules=["layer"]))
        except TypeError as error:  # before PEFT 0.20
            pytest.skip(f"PEFT {peft.__version__} takes torchao's layers from transformers only: {error}")
    randomised(model)
    lora_kernels.fuse(model, strict=True)
    layer, x = model.base_model.model.layer, torch.randn(3, K, dtype=dtype)
    want, tensors = model(x), [*layer.base_layer.parameters(), *layer.base_layer.buffers()]
    dense = dense_of(layer.base_layer)
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    for _ in range(2):
        model.merge_adapter()
        merged = layer.base_layer.weight.detach()
        assert is_rounded_once(merged, dense + layer.scaling["default"] * (b @ a).detach())
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(model(x), want, rtol=tolerance, atol=tolerance)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(x).dtype
        model.unmerge_adapter()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == autocast
        now = [*layer.base_layer.parameters(), *layer.base_layer.buffers()]
        assert layer.base_layer is quantised and all(t is other for t, other in zip(now, tensors, strict=True))
        assert torch.equal(model(x), want)


class Rounding(nn.Linear):
    """A layer that keeps its weight in 8 bits in a way of its own."""

    def forward(self, x):
        return x @ self.weight.to(x.dtype).t() * 0.1


@pytest.mark.filterwarnings("ignore:the base is a Rounding")
def test_a_forward_of_its_own_is_told_of_and_bits_of_its_own_are_refused():
    base = Rounding(K, N, bias=False)
    model = randomised(get_peft_model(Net(base), LoraConfig(r=4, target_modules=["layer"])))
    lora_kernels.fuse(model, strict=True)
    with pytest.warns(UserWarning, match="a Rounding with a forward of its own: while merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    base.weight = nn.Parameter(base.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with (
        pytest.raises(ValueError, match=r"stored in torch.float8_e4m3fn.*nothing was changed"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert not model.base_model.model.layer.merged


def test_a_part_of_a_weight_is_merged_where_it_is_and_its_bits_come_back(tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor

    model, _ = make("linear", torch.bfloat16)
    exact = merged_by_peft(model)["base_model.model.layer.base_layer.weight"]
    lora_kernels.fuse(model)
    layer = model.base_model.model.layer
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            sharded = distribute_tensor(module.weight.detach(), mesh, [Shard(0)])
            module.weight = nn.Parameter(sharded, requires_grad=module.weight.requires_grad)
        w = layer.base_layer.weight
        local, bits = w.to_local(), w.to_local().clone()
        for _ in range(3):
            model.merge_adapter()
            assert layer.base_layer.weight is w and is_rounded_once(w.full_tensor().detach(), exact)
            assert lora_kernels.merged_bytes(model) == bits.nbytes
            model.unmerge_adapter()
            assert layer.base_layer.weight is w and torch.equal(w.to_local(), bits)
            assert w.to_local().data_ptr() == local.data_ptr()
        layer.lora_B["default"].weight.data.to_local()[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert not layer.merged and torch.equal(w.to_local(), bits)
        layer.lora_B["default"].weight.data.to_local()[0, 0] = 0
        model.merge_adapter()
        w.to_local().data.add_(1)
        with pytest.raises(ValueError, match="was written to"):
            model.unmerge_adapter()
        lora_kernels.unmerge_written(model, keep=False)
        assert torch.equal(w.to_local(), bits)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(TORCH < (2, 7), reason="fully_shard runs on CPUs from torch 2.7 on")
def test_fsdp2_merges_its_shards_and_is_to_put_gathered_weights_away_first(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model, (x,) = make("linear", torch.float32)
    want = model(x)
    lora_kernels.fuse(model)
    layer = model.base_model.model.layer
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        model(x).sum().backward()
        bits = layer.base_layer.weight.to_local().clone()
        model.merge_adapter()
        assert not torch.equal(layer.base_layer.weight.to_local(), bits)
        torch.testing.assert_close(model(x), want)
        if not hasattr(layer.base_layer.weight, "to_local"):
            with pytest.raises(ValueError, match=r"gathered the weight.*reshard\(\)"):
                model.unmerge_adapter()
        model.reshard()
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight.to_local(), bits)
        torch.testing.assert_close(model(x), want)
    finally:
        torch.distributed.destroy_process_group()


def test_an_offloaded_layer_is_merged_by_peft_which_is_told(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, (x,) = make("linear", torch.float32)
    lora_kernels.fuse(model)
    plain = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.warns(UserWarning, match="offloaded"):
        model.merge_adapter()
    plain.merge_adapter()
    torch.testing.assert_close(model(x), plain(x))
    model.unmerge_adapter()
    assert not model.base_model.model.layer.merged
