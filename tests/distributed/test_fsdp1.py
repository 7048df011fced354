"""FullyShardedDataParallel (FSDP 1) trains a model whose weights are frozen, with use_orig_params=True."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
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


class Attention(nn.Module):
    """Attention to another sequence, whose projections are computed with parts of W."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x.flip(0), x.flip(1), need_weights=False)[0]


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(16, 16)


@pytest.mark.parametrize(
    ("make", "name"),
    [(Attention, "attn"), (conv1d, "0"), (lambda: nn.Conv1d(2, 3, 3), "0"), (lambda: nn.Conv1d(2, 3, 1), "0")],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_layers_that_are_not_linear_or_store_another_layout_are_trained(one_process, make, name):
    torch.manual_seed(0)
    model = nn.Sequential(make())
    apply_lora(model, r=4, target_modules=[f"0.{name}" if name != "0" else name])
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    plain, x = copy.deepcopy(model), torch.randn(3, 2, 16)
    sharded = wrapped(model)
    y = sharded(x)
    torch.testing.assert_close(y, plain(x))
    y.square().sum().backward()
    plain(x).square().sum().backward()
    for (key, got), want in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        if want.requires_grad:
            torch.testing.assert_close(got.grad, want.grad, msg=key)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_weight_that_is_trained_is_refused_there_too(one_process):
    model = model_of()
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weight \(32, 16\) requires a gradient.*ViewBackward"):
        wrapped(model)(torch.randn(3, 16))
