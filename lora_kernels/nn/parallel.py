"""Tensor-parallel `FusedLoRALinear`: two plans for ``torch.distributed.tensor.parallel.parallelize_module``.

    column-wise   W, B and bias sharded on N, A whole      y_n = x W_nᵀ + bias_n + s · (dropout(x) Aᵀ) B_nᵀ
    row-wise      W and A sharded on K, B and bias whole   y = Σ_k [x_k W_kᵀ + s · (dropout(x_k) A_kᵀ) Bᵀ] + bias

Each process makes one call on its own part. In a row-wise layer one all-reduce in the forward sums base and adapter
together, so an adapter adds no communication there. The backward of a column-wise layer sums dx and dA over the
processes, and that of a row-wise layer sums dB.

    plan = {"mlp.up": ColwiseLoRA(), "mlp.down": RowwiseLoRA()}
    parallelize_module(model, mesh, plan)

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019
(arXiv:1909.08053).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from lora_kernels.core.dropout import draw_seed
from lora_kernels.nn.base import AdapterLinear
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.residual import ResLoRALinear
from lora_kernels.ops.linear import lora_linear

__all__ = ["ColwiseLoRA", "RowwiseLoRA"]


class ColwiseLoRA(ColwiseParallel):
    """torch's ``ColwiseParallel`` for a `FusedLoRALinear`; it takes the same keywords.

    With dropout, every process of the group must draw the same mask of the whole x. Give torch's generators the same
    seed in all of them (``torch.manual_seed``), and another seed in processes that see other data.

    Raises:
        TypeError: the module is no FusedLoRALinear.
        ValueError: the module is merged or quantised, or uses DoRA.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _distributed(self, module, device_mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        parts = {"weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}
        _shard(module, _ColwiseLinear, device_mesh, parts)


class RowwiseLoRA(RowwiseParallel):
    """torch's ``RowwiseParallel`` for a `FusedLoRALinear`; it takes the same keywords.

    With dropout, give torch's generators the same seed in all processes of the group, as for `ColwiseLoRA`. Every
    process numbers the columns of its part of x from 0, so equal masks would drop the same columns of every part. Each
    process therefore combines its rank with the seed.

    Raises:
        TypeError: the module is no FusedLoRALinear.
        ValueError: the module is merged or quantised, or uses DoRA.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.desired_input_layouts = (Shard(-1),)
        return _distributed(self, module, device_mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        parts = {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate()}
        _shard(module, _RowwiseLinear, device_mesh, parts)


def _distributed(style: Any, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Return `module` with its parameters sharded and the hooks of torch's plans. Their own ``_apply`` does the same
    for an nn.Linear only."""
    return distribute_module(
        module,
        mesh,
        style._partition_linear_fn,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


def _shard(module: nn.Module, kind: type[FusedLoRALinear], mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    """Turn each parameter that `placements` names into a DTensor with that placement, and the class of `module` into
    `kind`."""
    if isinstance(module, FusedLoRAConv1D):
        raise TypeError(
            "this plan is for FusedLoRALinear, and a FusedLoRAConv1D stores its weight [in, out], which the plan would "
            "split in the wrong dimension: take FSDP2, or make it an nn.Linear first, with to_linear()"
        )
    if not isinstance(module, FusedLoRALinear):
        raise TypeError(
            f"this plan is for FusedLoRALinear, and the module is a {type(module).__name__}: take torch's "
            "ColwiseParallel or RowwiseParallel, or FusedLoRALinear.from_linear first"
        )
    if isinstance(module, ResLoRALinear):
        raise TypeError(
            "this plan is for FusedLoRALinear, and would take the shortcuts from a layer with ResLoRA: "
            "lora_kernels.reslora_to_lora(model) makes plain LoRA layers first"
        )
    if isinstance(module, AdapterLinear.quantized_kind):
        raise ValueError("a quantised weight cannot be sharded here: take the dense weight, or FSDP2")
    if "lora_A" not in module._parameters:
        raise ValueError("an adapter whose A and B are shared by layers cannot be sharded here: take FSDP2")
    if module.use_dora:
        raise ValueError("there is no tensor parallel DoRA here, because its norms need whole rows of W + s·B·A")
    if module.merged:
        raise ValueError("this FusedLoRALinear is merged: unmerge() it before parallelize_module")
    for name, placement in placements.items():
        if (p := module._parameters[name]) is not None:
            part = distribute_tensor(p.detach(), mesh, [placement])
            module.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
    module.__class__ = kind


class _ShardedLinear(FusedLoRALinear):
    """A `FusedLoRALinear` whose parameters are DTensors. x and y are DTensors too: the hooks of torch's plans convert
    them from what the caller passes, and into what the caller asks for."""

    def _merged_weight(self, safe: bool) -> Tensor:
        raise NotImplementedError(
            "a tensor parallel FusedLoRALinear cannot be merged: gather its state with get_model_state_dict(..., "
            "options=StateDictOptions(full_state_dict=True)) and merge a whole module with it"
        )

    def _own_part(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, rank: int) -> Tensor:
        """Return y of this process's part of W. `rank` is combined with the seed of its dropout."""
        self.count_call()
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
    """W, B and bias are sharded on N, and A is whole."""

    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., N], sharded on N, for a replicated x = `input` [..., K]."""
        whole = cast(DTensor, input)
        local = whole.to_local(grad_placements=[Partial()])
        bias, a, b = (self._parameters[name] for name in ("bias", "lora_A", "lora_B"))
        y = self._own_part(local, _summed(a), _local(b), None if bias is None else _local(bias), 0)
        shape = torch.Size((*local.shape[:-1], self.out_features))
        return DTensor.from_local(
            y, whole.device_mesh, [Shard(y.dim() - 1)], run_check=False, shape=shape, stride=_strides(shape)
        )


class _RowwiseLinear(_ShardedLinear):
    """W and A are sharded on K, and B and bias are whole."""

    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., N], still to be summed over the processes, for x = `input` [..., K] sharded on K."""
        part = cast(DTensor, input)
        local, mesh = part.to_local(), part.device_mesh
        rank = mesh.get_local_rank()
        bias, a, b = (self._parameters[name] for name in ("bias", "lora_A", "lora_B"))
        # Only the first process adds the bias. The others add zeros, so that all take part in summing its gradient.
        part_of_bias = None if bias is None else _summed(bias) * float(rank == 0)
        y = self._own_part(local, _local(a), _summed(b), part_of_bias, rank)
        return DTensor.from_local(y, mesh, [Partial()], run_check=False)


def _local(t: Any) -> Tensor:
    return cast(DTensor, t).to_local()


def _summed(t: Any) -> Tensor:
    """Return the local tensor of a replicated DTensor. Each process then has one term of its gradient, and the backward
    of `redistribute` adds them up."""
    return cast(DTensor, t).redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _strides(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)
