"""FullyShardedDataParallel (FSDP 1) trains a model whose weights are frozen, with use_orig_params=True."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

from lora_kernels import apply_lora


@pytest.fixture
def one_process(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_of(**settings) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    apply_lora(model, r=4, target_modules=["0", "2"], **settings)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model


def wrapped(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_values_and_gradients_are_those_of_the_plain_model(one_process, use_dora, checkpointed):
    model, x = model_of(use_dora=use_dora), torch.randn(3, 16)
    plain = copy.deepcopy(model)
    sharded = wrapped(model)
    y = checkpoint(sharded, x, use_reentrant=False) if checkpointed else sharded(x)
    torch.testing.assert_close(y, plain(x))
    y.square().sum().backward()
    plain(x).square().sum().backward()
    for (name, got), want in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        if want.requires_grad:
            torch.testing.assert_close(got.grad, want.grad, msg=name)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_weight_that_is_trained_is_refused_there_too(one_process):
    model = model_of()
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weight \(32, 16\) requires a gradient.*ViewBackward"):
        wrapped(model)(torch.randn(3, 16))
