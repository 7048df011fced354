"""AdaLoRA and DeLoRA of PEFT on the fused path: layers whose A and B are computed from other parameters.

    AdaLoRA   y = x Wᵀ + bias + x̂ A'ᵀ Bᵀ     A' = diag(e · α / (n + 1e-5)) A
    DeLoRA    y = x Wᵀ + bias + x̂ A'ᵀ B'ᵀ    A' = diag(1 / ‖A_i‖) A diag(‖W‖)    B' = B diag(λ / (r ‖B_i‖))

e [R] are AdaLoRA's singular values and n is its ``ranknum``: it divides by the first rank, whatever is pruned later.
‖A_i‖ are the norms of A's rows, ‖B_i‖ of B's columns, both at least 1e-4, and ‖W‖ those of W's columns when the adapter
was made. A' [R, K] and B' [N, R] are computed in every forward by differentiable torch operations, so that autograd
gives the gradients of A, B, e and λ, and a change of any of them is seen. Pruning and files stay PEFT's.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023 (arXiv:2303.10512); Bini, Girrbach
and Akata, "Decoupling Angles and Strength in Low-rank Adaptation", 2025 (arXiv:2503.18225).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from peft.tuners.adalora import layer as adalora
from peft.tuners.delora import layer as delora
from torch import Tensor, nn

from lora_kernels.core.rows import Rows
from lora_kernels.ops import check
from lora_kernels.ops.autograd import as_dtype
from lora_kernels.peft import known, merged_terms
from lora_kernels.peft.by_row import KEYWORDS
from lora_kernels.peft.fused import Fused
from lora_kernels.peft.linear import OverDense, dense_base
from lora_kernels.peft.merging import Sum, base_of
from lora_kernels.peft.reading import Operands, PeftAdapter, probability

_ADALORA_USES = """
T _cast_input_dtype active_adapters base_layer disable_adapters dtype keys lora_A lora_B lora_E lora_dropout merged
ranknum scaling unmerge
"""
_DELORA_USES = """
active_adapters base_layer clamp delora_A delora_B delora_dropout delora_lambda delora_w_norm dim disable_adapters dtype
functional linear merged min nn norm r to torch unmerge zeros_like
"""
_LEAST = 1e-4
"""The least norm that DeLoRA divides by."""


class Folded(Fused):
    """The fused forward of a layer that keeps A and B as parameters in dictionaries, `first` and `second`, and whose
    forward has no keywords of its own."""

    shares_input: ClassVar = False  # a group compares the matrices of two readings, and these are computed in each
    first: ClassVar[str] = "lora_A"
    second: ClassVar[str] = "lora_B"
    dropouts: ClassVar[str] = "lora_dropout"
    uses: ClassVar[str]
    """What PEFT's forward uses."""
    lora_variant: Any
    """PEFT's variants of LoRA, by adapter: none."""

    def read(self, x: Tensor, args: Any = (), kwargs: Mapping[str, Any] = MappingProxyType({}), *rest: Any) -> Any:
        """Return the operands of a forward with these arguments, or why PEFT's own forward serves it."""
        if any(key in KEYWORDS for key in kwargs):
            return "further arguments for the base layer"  # PEFT's forward hands these to it too
        return super().read(x, args, kwargs, *rest)

    @classmethod
    def adapters_in(cls, layer: Any) -> Mapping[str, Any]:
        """Return a mapping whose keys are the names of the adapters of `layer`."""
        adapters: Mapping[str, Any] = layer._modules[cls.first]._keys
        return adapters

    @classmethod
    def first_matrix(cls, layer: Any, name: str) -> Tensor:
        """Return A of adapter `name`."""
        a: Tensor = layer._modules[cls.first][name]
        return a

    @classmethod
    def why_not_forward(cls) -> str:
        """Return why PEFT's forward of this class is not the one that this package knows, or "" where it is."""
        return known.why_not(cls.peft_class, cls.uses)

    @classmethod
    def read_adapter(cls, layer: Any, name: str) -> PeftAdapter | str:
        """Return adapter `name` of `layer`, which may not be fused yet, as A' and B'; or why it cannot be fused."""
        modules = layer._modules
        a, b = modules[cls.first][name], modules[cls.second][name]
        dropout = modules[cls.dropouts]._modules[name]
        for t in (a, b):
            if type(t) not in (nn.Parameter, Tensor):
                return f"adapter {name!r} has a {type(t).__name__}"
        if a.dtype != b.dtype:
            return f"adapter {name!r} has {cls.first} in {a.dtype} and {cls.second} in {b.dtype}"
        if 0 in a.shape:
            return f"adapter {name!r} has rank 0"
        p = probability(dropout, name)
        if isinstance(p, str):
            return p
        a, b = cls.folded(layer, name, a, b)
        return PeftAdapter(a, b, None, 1.0, p)

    @staticmethod
    def folded(layer: Any, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return A' and B' of adapter `name`, in the dtype of its A [R, K] and B [N, R]."""
        raise NotImplementedError

    def sums(self, names: Sequence[str]) -> Sequence[Sum]:
        """Return what merging the adapters `names` adds to W: B' A'."""
        modules, turned, terms = self._modules, bool(getattr(self, "fan_in_fan_out", False)), []
        for name in names:
            a, b = modules[self.first][name], modules[self.second][name]
            wide = torch.promote_types(a.dtype, torch.float32)
            terms.append(merged_terms.product(*self.folded(self, name, a.to(wide), b.to(wide)), 1.0, turned))
        return [Sum(base_of(self), "weight", terms)]


class SVD(Folded):
    """What AdaLoRA's layers have in common, whatever their base is."""

    @staticmethod
    def folded(layer: Any, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return A' = diag(e · α / (n + 1e-5)) A, and B. ``scaling`` holds α, or R where α is 0."""
        modules = layer._modules
        factor = modules["lora_E"][name] * (layer.scaling[name] / (modules["ranknum"][name] + 1e-5))
        return (a * factor).to(a.dtype), b


class FusedSVDLinear(SVD, OverDense, adalora.SVDLinear):
    """AdaLoRA over an ``nn.Linear`` or a Conv1D."""

    peft_class = adalora.SVDLinear
    uses = _ADALORA_USES

    @staticmethod
    def read_base(layer: Any) -> tuple[Tensor, Tensor | None] | str:
        """Return W [N, K] and bias of a frozen nn.Linear or Conv1D, or why they cannot be used."""
        return dense_base(layer, layer.fan_in_fan_out, layer.fan_in_fan_out)


class FusedDeloraLinear(Folded, OverDense, delora.DeloraLinear):
    """DeLoRA over an ``nn.Linear``."""

    peft_class = delora.DeloraLinear
    first, second, dropouts = "delora_A", "delora_B", "delora_dropout"
    uses = _DELORA_USES
    lora_variant = MappingProxyType[str, Any]({})

    @staticmethod
    def read_base(layer: Any) -> tuple[Tensor, Tensor | None] | str:
        """Return W [N, K] and bias of a frozen nn.Linear, or why they cannot be used."""
        return dense_base(layer, False, False)

    @staticmethod
    def folded(layer: Any, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return A' = diag(1 / ‖A_i‖) A diag(‖W‖) and B' = B diag(λ / (r ‖B_i‖)), computed in fp32 at least and rounded
        once. Each of them has about the size of what it is made of, where the whole factor in A' might overflow."""
        modules, wide = layer._modules, torch.promote_types(a.dtype, torch.float32)
        up, down = a.to(wide), b.to(wide)
        strength = modules["delora_lambda"][name].to(wide) / layer.r[name]
        norms = modules["delora_w_norm"][name]
        a_norm, b_norm = up.norm(dim=1).clamp(min=_LEAST), down.norm(dim=0).clamp(min=_LEAST)
        return (up / a_norm[:, None] * norms).to(a.dtype), (down * (strength / b_norm)).to(b.dtype)

    def _dtypes(
        self, x: Tensor, w: Any, adapters: dict[str, PeftAdapter], autocast: torch.dtype | None
    ) -> tuple[torch.dtype, torch.dtype] | str:
        given = x.dtype
        if given not in check.DTYPES or w.dtype not in check.DTYPES or (given != w.dtype and not autocast):
            return f"x is {given}, the base weight {w.dtype}"
        inner = autocast or given
        for name, adapter in adapters.items():
            dtype, norms = adapter.a.dtype, self._modules["delora_w_norm"][name].dtype
            if autocast is None and torch.promote_types(given, norms) != dtype:
                return f"adapter {name!r} is {dtype} beside {given} and norms in {norms}"
            if dtype not in (inner, torch.float32) and not (autocast and dtype in check.HALVES):
                return f"adapter {name!r} is {dtype} beside {inner}"
        return inner, given

    def _compute(self, x: Tensor, operands: Operands) -> Tensor:
        return as_dtype(super()._compute(x, operands), operands.outer)

    def compute_rows(self, x: Tensor, operands: Operands, numbers: Sequence[tuple[str, int]], rows: Rows) -> Tensor:
        """Return y in x's dtype, where each row of x is computed with the adapter that `rows` gives it."""
        return as_dtype(super().compute_rows(x, operands, numbers, rows), operands.outer)
