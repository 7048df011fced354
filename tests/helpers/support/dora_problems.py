"""Problems for DoRA, which are those of `support.judging` with a magnitude, and a module with a trained adapter."""

from __future__ import annotations

import torch
import torch._inductor.config
from support import judging
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import FusedLoRALinear, reference
from lora_kernels.ops import dora_norm, registered
from lora_kernels.ops.dora import dora_linear

NAMES = ("y", "dx", "da", "db", "dbias", "dm")


def magnitude(q: judging.Problem, dtype: torch.dtype | None = None) -> Tensor:
    """Return a magnitude between 0.5 and 1.5 times the norm."""
    norm = torch.linalg.vector_norm(q.w.double() + q.scale * q.b.double() @ q.a.double(), dim=1)
    generator = torch.Generator().manual_seed(q.w.shape[0])
    return (norm * (0.5 + torch.rand(norm.shape, generator=generator))).to(dtype or q.a.dtype)


def run(q: judging.Problem, m: Tensor, function=dora_linear, **kwargs) -> dict[str, Tensor]:
    leaf = m.clone().requires_grad_()
    return judging.evaluate(q, function, magnitude=leaf, **kwargs) | {"dm": leaf.grad}


class Storages(TorchDispatchMode):
    """Collects the sizes, in bytes, of all tensors that operations return, also inside our operators. Tensors in
    `known` are left out."""

    INSIDE = {  # noqa: RUF012
        torch.ops.lora_kernels.dora_norm.default: dora_norm._run_norm,
        torch.ops.lora_kernels.base_gemm.default: registered._run_base_gemm,
        torch.ops.lora_kernels.forward.default: registered._run_forward,
        torch.ops.lora_kernels.backward.default: registered._run_backward,
    }

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known, self.sizes = {t.untyped_storage().data_ptr() for t in known}, [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.INSIDE:
            with self:
                return self.INSIDE[func](*args)
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(t.untyped_storage().nbytes())
        return out


def plain_torch(q: judging.Problem, m: Tensor) -> dict[str, Tensor]:
    return run(q, m, reference.dora_linear)


def truth(q: judging.Problem, m: Tensor) -> dict[str, Tensor]:
    return run(q.to(torch.float64), m.double(), reference.dora_linear)


def trained(*args, **kwargs) -> FusedLoRALinear:
    """Return a module whose adapter is not zero and whose magnitude is not the norm."""
    layer = FusedLoRALinear(*args, use_dora=True, **kwargs)
    nn.init.normal_(layer.lora_B, std=0.3)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(0.5 + torch.rand(layer.out_features).to(layer.lora_magnitude_vector.dtype))
    return layer
