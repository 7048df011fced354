"""`FusedVeraLinear`: PEFT's VeRA linear on the fused path.

    result = base(x) + v ⊙ (B (u ⊙ (A dropout(x))))        u = vera_lambda_d, v = vera_lambda_b

PEFT's forward keeps an M × N for its backward, and this one keeps h [M, r] alone. Over an ``nn.Linear`` or a Conv1D the
whole layer is one call. Over another base, such as one in 4 bits, its own forward runs, and the update is added to its
result. Saving and everything else stays PEFT's.

Kopiczko, Blankevoort and Asano, "VeRA: Vector-based Random Matrix Adaptation", 2023 (arXiv:2310.11454).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from peft.tuners.vera import layer as vera
from torch import Tensor, nn

from lora_kernels.nn.dry_run import Watched
from lora_kernels.nn.shared_fold import KeptFold, kept_fold
from lora_kernels.ops import check
from lora_kernels.ops.around import add_low_rank
from lora_kernels.ops.autograd import as_dtype, autocast_of
from lora_kernels.ops.linear import lora_linear
from lora_kernels.ops.shared import folded, shared_lora_linear
from lora_kernels.peft import known, merged_terms
from lora_kernels.peft.layer import FusedLayer, Survey
from lora_kernels.peft.linear import dense_base
from lora_kernels.peft.merging import Sum, base_of
from lora_kernels.peft.reading import only_eager, probability

_USES = """
F _cast_input_dtype active_adapters base_layer device disable_adapters dtype in_features keys linear
maybe_clone_base_result merged out_features quantization_backend to unmerge vera_A vera_B vera_dropout vera_lambda_b
vera_lambda_d
"""
"""The names that PEFT's forward uses."""


class _Adapter(NamedTuple):
    """One adapter of a layer."""

    a: Tensor
    """The layer's columns of A, [R, K]."""
    b: Tensor
    """The layer's rows of B, [N, R]."""
    u: Tensor
    v: Tensor
    p: float
    """The dropout probability in this call."""


class FusedVeraLinear(FusedLayer, vera.Linear):
    """PEFT's VeRA over a linear layer. `shared_lora_linear` computes every call of one adapter over an nn.Linear or a
    Conv1D, and `add_low_rank` those over other bases."""

    peft_class = vera.Linear
    own: ClassVar = {**FusedLayer.own, "_kept": lambda: None}
    _kept: KeptFold | None
    """B' of the last forward in evaluation: see `lora_kernels.nn.shared_fold`."""
    _modules: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    base_layer: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's forward returns for x [..., in_features]."""
        compiling = torch.compiler.is_compiling()
        adapter = self._read(x, args, kwargs)
        if isinstance(adapter, str):
            if not compiling:
                self.count_left(adapter)
            y: Tensor = self.peft_class.forward(self, x, *args, **kwargs)
            return y
        if not compiling:
            self.__dict__["fused_calls"] += 1
        return as_dtype(self._compute(x, adapter), x.dtype)

    def _compute(self, x: Tensor, adapter: _Adapter) -> Tensor:
        """Return y, which under autocast is in its dtype."""
        a, b, u, v, p = adapter
        base = dense_base(self, self.fan_in_fan_out, self.is_target_conv_1d_layer)
        kept = None
        if self.training:
            self.__dict__["_kept"] = None
        elif not torch.compiler.is_compiling() and (kept := kept_fold(self._kept, x, b, u, v)) is not None:
            self.__dict__["_kept"] = kept
        if isinstance(base, str):
            whole = folded(b, u, v) if kept is None else kept.folded
            return add_low_rank(self.base_layer(x), x, a, whole, scale=1.0, dropout_p=p, backend=self._backend)
        w, bias = base
        if kept is not None:
            return lora_linear(x, w, a, kept.folded, scale=1.0, bias=bias, dropout_p=p, backend=self._backend)
        return shared_lora_linear(x, w, a, b, u, v, bias=bias, dropout_p=p, backend=self._backend)

    def _read(self, x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> _Adapter | str:
        """Return the adapter of a forward, or why PEFT's own serves it: "" where no adapter is to be computed."""
        if self.disable_adapters or self.merged:
            return ""
        if args or kwargs:
            return "further arguments for the base layer"
        names = [name for name in self.active_adapters if name in self._modules["vera_lambda_d"]]
        if not names:
            return ""
        if len(names) > 1:
            return "several adapters"
        adapter = self.read_adapter(self, names[0])
        if isinstance(adapter, str):
            return adapter
        (a, *_, p), base = adapter, self._modules["base_layer"]
        weight, autocast = getattr(base, "weight", None), autocast_of(x)
        if x.dtype not in check.DTYPES:
            return f"x is {x.dtype}"
        if a.device != x.device:
            return f"the shared A and B are on {a.device}, and x on {x.device}"
        dense = not isinstance(dense_base(self, self.fan_in_fan_out, self.is_target_conv_1d_layer), str)
        if dense and weight is not None and weight.dtype != x.dtype and autocast is None:
            return f"x is {x.dtype}, the base weight {weight.dtype}"
        if autocast is None and a.dtype != x.dtype:
            cast = getattr(self, "cast_input_dtype_enabled", True)
            if not cast or (dense and not (a.dtype == torch.float32 and x.dtype in check.HALVES)):
                return f"the adapter is {a.dtype} beside {x.dtype}"
        if p and self._backend is None:
            inner = autocast or x.dtype
            pair = (inner, torch.float32 if a.dtype == torch.float32 else inner)
            if only_eager(x.device, pair, (adapter.v.shape[0], a.shape[1], a.shape[0]), True, "dense"):
                return "no kernel for dropout here, and PEFT's own forward is faster than plain torch operations"
        return adapter

    @staticmethod
    def read_adapter(layer: Any, name: str) -> _Adapter | str:
        """Return adapter `name` of `layer`, which may not be fused yet, or why it cannot be fused."""
        modules = layer._modules
        p = probability(modules["vera_dropout"]._modules[name], name)
        if isinstance(p, str):
            return p
        u, v = modules["vera_lambda_d"][name], modules["vera_lambda_b"][name]
        a, b = modules["vera_A"][name], modules["vera_B"][name]
        for t in (a, b, u, v):
            if type(t) not in (nn.Parameter, Tensor):
                return f"adapter {name!r} has a {type(t).__name__}"
        dtypes = {str(t.dtype) for t in (a, b, u, v)}
        if len(dtypes) > 1:
            return f"adapter {name!r} is in {', '.join(sorted(dtypes))}"
        R, N, K = u.shape[0], v.shape[0], layer.in_features
        if a.shape[0] != R or b.shape[1] != R:
            return f"adapter {name!r} has r={R} beside A {tuple(a.shape)} and B {tuple(b.shape)}"
        return _Adapter(a[:, :K], b[:N], u, v, p)

    def adapters_to_merge(self) -> Container[str]:
        """Return the names of the adapters that this layer has."""
        adapters: Container[str] = self._modules["vera_lambda_d"]
        return adapters

    def sums(self, names: Sequence[str]) -> Sequence[Sum]:
        """Return what merging the adapters `names` adds to W: (v ⊙ B) (u ⊙ A)."""
        modules, terms = self._modules, []
        for name in names:
            u, v = modules["vera_lambda_d"][name], modules["vera_lambda_b"][name]
            wide = torch.promote_types(u.dtype, torch.float32)
            a = modules["vera_A"][name][:, : self.in_features].to(u.device, wide) * u[:, None]
            b = modules["vera_B"][name][: self.out_features].to(u.device, wide) * v[:, None]
            terms.append(merged_terms.product(a, b, 1.0, self.fan_in_fan_out))
        return [Sum(base_of(self), "weight", terms)]

    @classmethod
    def why_not_forward(cls) -> str:
        """Return why PEFT's forward is not one that this package knows, or "" where it is."""
        return known.why_not(cls.peft_class, _USES)

    @classmethod
    def survey(cls, layer: Any) -> Survey | str:
        """Return the sizes and adapters of `layer`."""
        names = list(layer._modules["vera_lambda_d"].keys())
        reasons = [why for name in names if isinstance(why := cls.read_adapter(layer, name), str)]
        ranks = ", ".join(f"{name} VeRA r={layer.r[name]}" for name in names)
        around = dense_base(layer, layer.fan_in_fan_out, layer.is_target_conv_1d_layer)
        what = f", around {type(layer._modules['base_layer']).__name__}" if isinstance(around, str) else ""
        return Survey(f"{layer.in_features}→{layer.out_features}{what}, {ranks}", tuple(reasons))

    def watched(self) -> Watched | None:
        """Return what a dry forward looks at in this layer; None for one that computes no adapter at present."""
        u: Mapping[str, Any] = self._modules["vera_lambda_d"]
        active = [name for name in self.active_adapters if name in u]
        if self.merged or self.disable_adapters or not active:
            return None
        base = [p for name, p in self.base_layer.named_parameters(recurse=False) if name != "bias"]
        vectors = [u[name] for name in active]
        return Watched(cast(nn.Module, self), base, vectors, lambda: (self.fused_calls, dict(self.passed_over)))

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: all but the kept B'."""
        return {**self.__dict__, "_kept": None}
