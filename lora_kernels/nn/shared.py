"""`SharedLoRALinear`: a linear layer with two trained vectors, over an A and a B that many layers share (VeRA,
Tied-LoRA)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.nn import loading
from lora_kernels.nn.adapter import FilePart
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.quantized import QuantizedLoRALinear, quantized_linear
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.nn.shared_factors import SharedFactors
from lora_kernels.nn.shared_fold import KeptFold, kept_fold
from lora_kernels.ops.linear import lora_linear
from lora_kernels.ops.shared import folded, shared_lora_linear
from lora_kernels.quant.weight import QuantizedWeight

torch.fx.wrap("lora_linear")  # as in nn/linear.py
torch.fx.wrap("shared_lora_linear")

_VECTORS = ("lora_u", "lora_v")


@dataclass(frozen=True)
class SharedSettings(LoRASettings):
    """The settings of a layer with shared factors."""

    factors: SharedFactors | None = None
    """The factors, which must be as wide as the layer at least."""
    train_u: bool = True
    train_v: bool = True
    first_u: float = 1.0
    """What u starts as."""
    first_v: float = 0.0
    """What v starts as."""

    def check(self) -> None:
        """Raise ValueError for values that no such layer can have."""
        super().check()
        if self.use_dora or self.init != "kaiming":
            raise ValueError(
                f"use_dora={self.use_dora} and init={self.init!r} are for layers with an A and B of their own"
            )
        for name, value in (("u (d_initial of VeRA)", self.first_u), ("v", self.first_v)):
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"the first value of {name} must be a finite number, got {value!r}")


class SharedAdapter:
    """What a layer adds to a `FusedLoRALinear` whose A and B are shared. A subclass inherits from this class first."""

    _factors: SharedFactors
    _kept: KeptFold | None
    """B' of the last forward in evaluation: see `lora_kernels.nn.shared_fold`."""
    _first: tuple[float, float]
    """What u and v start as."""
    lora_u: nn.Parameter
    lora_v: nn.Parameter
    weight: Any
    in_features: int
    out_features: int
    training: bool
    __dict__: dict[str, Any]

    @property
    def factors(self) -> SharedFactors:
        """The factors, which the model holds."""
        return self._factors

    @property
    def lora_A(self) -> Tensor:
        """A of this layer [r, in], columns of the shared one."""
        return self._factors.lora_A[:, : self.in_features]

    @property
    def lora_B(self) -> Tensor:
        """B' = v ⊙ B ⊙ u of this layer [out, r], computed anew."""
        return folded(self._factors.lora_B[: self.out_features], self.lora_u, self.lora_v)

    def _parts(self) -> tuple[Any, Any, Any, Any]:
        layer, factors = cast(Any, self), self._factors
        return layer.turned(self.weight), layer.bias, factors.lora_A, factors.lora_B

    def _add_adapter(self, settings: LoRASettings) -> None:
        layer: Any = self
        factors = getattr(settings, "factors", None)
        if not isinstance(settings, SharedSettings) or factors is None:
            raise TypeError(
                f"a {type(self).__name__} is made over SharedFactors, by from_linear(linear, factors), apply_vera or "
                "apply_tied_lora"
            )
        if factors.r != settings.r:
            raise ValueError(f"r is {settings.r}, and the shared factors have rank {factors.r}")
        if factors.in_features < self.in_features or factors.out_features < self.out_features:
            raise ValueError(
                f"the shared factors are for layers of up to {factors.in_features} → {factors.out_features}, and this "
                f"one is {self.in_features} → {self.out_features}"
            )
        dtype = settings.dtype_beside(layer.weight_dtype)
        if factors.lora_A.dtype != dtype:
            raise TypeError(f"the shared factors are in {factors.lora_A.dtype}, and this layer's adapter in {dtype}")
        layer.r, layer.lora_alpha, layer.lora_dropout = settings.r, settings.lora_alpha, settings.lora_dropout
        layer.use_rslora, layer.use_dora, layer.backend = settings.use_rslora, False, settings.backend
        layer.scaling = settings.scaling
        for base in (self.weight, layer.bias):
            if base is not None:
                base.requires_grad_(False)
        # nn.Module would make the factors a child of every layer, and its __setattr__ takes time.
        self.__dict__.update(_factors=factors, _kept=None, _first=(settings.first_u, settings.first_v))
        device = self.weight.device
        self.lora_u = nn.Parameter(torch.empty(settings.r, dtype=dtype, device=device), settings.train_u)
        self.lora_v = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device), settings.train_v)
        layer.reset_adapter()

    def _reset_adapter(self) -> None:
        for vector, value in zip((self.lora_u, self.lora_v), self._first, strict=True):
            nn.init.constant_(vector, value)

    def _computed(self, x: Tensor, w: Tensor | QuantizedWeight, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """Return y of a layer that is not merged, for the whole of the shared A and B."""
        layer: Any = self
        u, v = self.lora_u, self.lora_v
        s, p, backend = layer.scaling, 0.0, layer.backend
        if self.training:
            p, self.__dict__["_kept"] = layer.lora_dropout, None
        elif not torch.compiler.is_compiling() and (kept := kept_fold(self._kept, x, b, u, v)) is not None:
            self.__dict__["_kept"] = kept
            return lora_linear(x, w, a[:, : self.in_features], kept.folded, scale=s, bias=bias, backend=backend)
        return shared_lora_linear(x, w, a, b, u, v, scale=s, bias=bias, dropout_p=p, backend=backend)

    def _trained(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a tensor of the adapter that is trained, if there is one."""
        return next((t for t in (self.lora_u, self.lora_v, a, b) if t.requires_grad), self.lora_u)

    def file_parts(self) -> dict[str, FilePart]:
        """Raise ValueError: files hold the factors once, and not with a layer."""
        raise ValueError(
            "its A and B are shared by several layers, for which the format of LoRA has no place: save_adapter and "
            "load_adapter know the formats of models whose adapted layers all share their factors"
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel makes replicas of layers one by one, whose shared A and B would stay on the first GPU: "
            "take DistributedDataParallel"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: all but the kept B'."""
        return {**self.__dict__, "_kept": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        emptied = self.lora_u.is_meta or getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        self.__dict__["_kept"] = None
        super()._apply(fn, recurse)  # type: ignore[misc]
        if emptied and not self.lora_u.is_meta:
            self._reset_adapter()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing_keys, unexpected_keys, _ = rest  # metadata, strict, missing, unexpected, errors
        layer: Any = self
        if layer.merged:
            raise ValueError(
                f"{prefix or 'the module'}: the adapter is merged, and the shared factors are loaded after it: "
                "unmerge() before loading"
            )
        loading.check_rank(self, state_dict, prefix, {"lora_u": 0})
        keys = [prefix + name for name in _VECTORS]
        plain = not any(key in state_dict for key in keys)  # the state_dict of the plain layer
        state_dict = self._in_own_format(state_dict, prefix)
        nn.Module._load_from_state_dict(layer, state_dict, prefix, *rest)
        unexpected_keys[:] = [key for key in unexpected_keys if key != prefix + "weight_format"]
        if plain:
            missing_keys[:] = [key for key in missing_keys if key not in keys]
            if self.lora_u.is_meta and not self.weight.is_meta:  # assign=True: the adapter has no values to keep
                loading.put_adapter_beside(self, self.weight.device)
                self._reset_adapter()
                if self._factors.lora_A.is_meta:
                    loading.put_adapter_beside(self._factors, self.weight.device)
                    self._factors.reset_parameters()

    def _in_own_format(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Return `state_dict` with the weight in the format of this layer."""
        return state_dict

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows beside the shapes."""
        text: str = super().extra_repr()  # type: ignore[misc]
        frozen = [name for name in _VECTORS if not getattr(self, name).requires_grad]
        return text + "".join(f", {name} frozen" for name in frozen)


class _DenseForward(SharedAdapter):
    """The forward over a dense weight."""

    count_call: Any
    _base: Any
    _check_merged: Any

    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., out_features] for x = `input` [..., in_features]. Raises what `shared_lora_linear` raises."""
        weight, bias, a, b = self._parts()
        if self._base is not None:
            self._check_merged(self.weight, self._base, self._trained(a, b))
            self.count_call(merged=True)
            return F.linear(input, weight, bias)
        self.count_call()
        return self._computed(input, weight, bias, a, b)


class SharedLoRALinear(_DenseForward, FusedLoRALinear):  # type: ignore[misc]
    """y = x Wᵀ + bias + s · (((dropout(x) Aᵀ) ⊙ u) Bᵀ) ⊙ v, with W and bias frozen and A and B of several layers.

    VeRA (Kopiczko, Blankevoort and Asano, 2023, arXiv:2310.11454) trains u and v over random A and B. Tied-LoRA
    (Renduchintala, Konuk and Kuchaiev, 2023, arXiv:2311.09578) trains all four. `apply_vera` and `apply_tied_lora` make
    these layers in a model. `merge`, `unmerge` and `to_linear` are those of a `FusedLoRALinear`.

    In evaluation without gradients on a CPU, B' = v ⊙ B ⊙ u [out, r] is kept for a frozen B: see
    `lora_kernels.nn.shared_fold`. In training it is formed in each call, and not saved.

    Attributes:
        weight, bias, scaling, merged: as in `FusedLoRALinear`.
        lora_u: [r], u, a parameter (PEFT's ``vera_lambda_d``).
        lora_v: [out], v, a parameter (PEFT's ``vera_lambda_b``).
        factors: the `SharedFactors`, which the model holds.
        lora_A, lora_B: the layer's columns of A, and B'; no parameters.
    """

    quantized_kind: ClassVar[type[Any]]

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear: nn.Linear,
        factors: SharedFactors,
        *,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        train_u: bool = True,
        train_v: bool = True,
        first_u: float = 0.1,
        first_v: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
        quant: str | None = None,
        blocksize: int = 64,
        double_quant: bool = False,
    ) -> FusedLoRALinear:
        """Return a layer over `linear`'s own weight and bias and over `factors`, which a module above it should hold.

        s is lora_alpha / r, and 1 where lora_alpha is None. u starts as `first_u`, v as `first_v`. The other keywords
        are those of `FusedLoRALinear.from_linear`, and so are the errors; ValueError and TypeError too for factors that
        are too small, or in another dtype than the adapter.
        """
        r = factors.r
        alpha = r if lora_alpha is None else lora_alpha
        settings = SharedSettings(
            r, alpha, lora_dropout, False, False, adapter_dtype, backend, quant, blocksize, double_quant, "kaiming",
            factors, train_u, train_v, first_u, first_v,
        )  # fmt: skip
        return cls.from_settings(linear, settings)


class SharedLoRAConv1D(_DenseForward, FusedLoRAConv1D):  # type: ignore[misc]
    """A `SharedLoRALinear` over the Conv1D of transformers, which stores Wᵀ."""


class SharedQuantizedLoRALinear(SharedAdapter, QuantizedLoRALinear):  # type: ignore[misc]
    """A `SharedLoRALinear` over a weight in 4 or 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., out_features] for x = `input` [..., in_features]. Raises what `shared_lora_linear` raises."""
        codes, bias, a, b = self._parts()
        w = self._assembled(codes)
        if self._unmerged is not None:
            self._check_merged(codes, self._unmerged.codes, self._trained(a, b))
            self.count_call(merged=True)
            return quantized_linear(input, w, bias, self.backend)
        self.count_call()
        return self._computed(input, w, bias, a, b)

    def _in_own_format(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        return loading.stored_state(self, state_dict, prefix)


SharedLoRALinear.quantized_kind = SharedQuantizedLoRALinear
