"""Tensor parallel `FusedLoRALinear`: two plans for ``torch.distributed.tensor.parallel.parallelize_module``.

    column-wise   W, B and bias sharded on N, A whole      y_n = x W_nᵀ + bias_n + s · (dropout(x) Aᵀ) B_nᵀ
    row-wise      W and A sharded on K, B and bias whole   y = Σ_k [x_k W_kᵀ + s · (dropout(x_k) A_kᵀ) Bᵀ] + bias

Each process makes one call on its own part. Row-wise the sum over processes is of base and adapter together: one
all-reduce forward, as without an adapter. Backward, column-wise sums dx and dA, row-wise dB.

    plan = {"mlp.up": ColwiseLoRA(), "mlp.down": RowwiseLoRA()}
    parallelize_module(model, mesh, plan)

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019
(arXiv:1909.08053).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from lora_kernels.core.dropout import draw_seed
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.ops.linear import lora_linear

__all__ = ["ColwiseLoRA", "RowwiseLoRA"]


class ColwiseLoRA(ColwiseParallel):
    """As torch's ``ColwiseParallel`` (whose keywords it takes), for a `FusedLoRALinear`.

    Dropout: every process must draw the same mask of the whole x, so seed torch's generators alike within the group
    (``torch.manual_seed``), and differently in processes that see other data.

    Raises:
        TypeError: for a module that is no FusedLoRALinear.
        ValueError: for one that is merged, or DoRA.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        parts = {"weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}
        _shard(module, _ColwiseLinear, device_mesh, parts)


class RowwiseLoRA(RowwiseParallel):
    """As torch's ``RowwiseParallel`` (whose keywords it takes), for a `FusedLoRALinear`.

    Dropout: seed torch's generators alike within the group, as for `ColwiseLoRA`. A mask counts the columns of the x it
    is given, so equal seeds would drop the same columns of every part: each process's rank goes into its seed here.

    Raises:
        TypeError: for a module that is no FusedLoRALinear.
        ValueError: for one that is merged, or DoRA.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        parts = {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate()}
        _shard(module, _RowwiseLinear, device_mesh, parts)


def _shard(module: nn.Module, kind: type[FusedLoRALinear], mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    if not isinstance(module, FusedLoRALinear):
        raise TypeError(
            f"this plan is for FusedLoRALinear, and the module is a {type(module).__name__}: take torch's "
            "ColwiseParallel or RowwiseParallel, or FusedLoRALinear.from_linear first"
        )
    if module.use_dora:
        raise ValueError("there is no tensor parallel DoRA here: its norms run over whole rows of W + s·B·A")
    if module.merged:
        raise ValueError("this FusedLoRALinear is merged: unmerge() it before parallelize_module")
    for name, placement in placements.items():
        if (p := module._parameters[name]) is not None:
            part = distribute_tensor(p.detach(), mesh, [placement])
            module.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
    module.__class__ = kind


class _ShardedLinear(FusedLoRALinear):
    """Parameters are DTensors; x and y too, which the plan's hooks make of what comes and turn into what is asked."""

    def _merged_weight(self, safe: bool) -> Tensor:
        raise NotImplementedError(
            "a tensor parallel FusedLoRALinear cannot be merged: gather its state with get_model_state_dict(..., "
            "options=StateDictOptions(full_state_dict=True)) and merge a whole module with it"
        )

    def _own_part(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, rank: int) -> Tensor:
        """This process's call, with `rank` in the seed of its dropout."""
        p = self.lora_dropout if self.training else 0.0
        return lora_linear(
            x,
            _local(self._parameters["weight"]),
            a,
            b,
            scale=self.scaling,
            bias=bias,
            dropout_p=p,
            seed=draw_seed(x.device) ^ rank if p > 0 else None,
            backend=self.backend,
        )


class _ColwiseLinear(_ShardedLinear):
    def forward(self, x: Tensor) -> Tensor:
        """x [..., K], replicated → y [..., N], sharded on N."""
        whole = cast(DTensor, x)
        local = whole.to_local(grad_placements=[Partial()])
        bias, a, b = (self._parameters[name] for name in ("bias", "lora_A", "lora_B"))
        y = self._own_part(local, _summed(a), _local(b), None if bias is None else _local(bias), 0)
        shape = torch.Size((*local.shape[:-1], self.out_features))
        return DTensor.from_local(
            y, whole.device_mesh, [Shard(y.dim() - 1)], run_check=False, shape=shape, stride=_strides(shape)
        )


class _RowwiseLinear(_ShardedLinear):
    def forward(self, x: Tensor) -> Tensor:
        """x [..., K], sharded on K → y [..., N], still to be summed over the processes."""
        part = cast(DTensor, x)
        local, mesh = part.to_local(), part.device_mesh
        rank = mesh.get_local_rank()
        bias, a, b = (self._parameters[name] for name in ("bias", "lora_A", "lora_B"))
        # the first process adds the bias; the others' zero keeps them in the sum of its gradient
        part_of_bias = None if bias is None else _summed(bias) * float(rank == 0)
        y = self._own_part(local, _local(a), _summed(b), part_of_bias, rank)
        return DTensor.from_local(y, mesh, [Partial()], run_check=False)


def _local(t: Any) -> Tensor:
    return cast(DTensor, t).to_local()


def _summed(t: Any) -> Tensor:
    """A replicated tensor whose gradient each process has a term of: the backward of `redistribute` adds them up."""
    return cast(DTensor, t).redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _strides(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)
