"""`FusedLoRALinear`: an ``nn.Linear`` with a frozen weight and a trained low-rank update, in one call."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.nn import fit, merging
from lora_kernels.nn.init import split_named
from lora_kernels.ops import dora
from lora_kernels.ops.linear import lora_linear


class FusedLoRALinear(nn.Linear):
    """y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ with W and bias frozen: a drop-in for ``nn.Linear``.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685). A starts
    Kaiming-uniform(√5), B zero, so a fresh module computes what its base computes.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        r: the rank, at least 1.
        lora_alpha: s = lora_alpha / r; with `use_rslora` lora_alpha / √r (Kalajdzievski, 2023, arXiv:2312.03732).
        lora_dropout: p in [0, 1): dropout on x in the low-rank branch, while training.
        use_dora: weight-decomposed LoRA, y = d ⊙ (x Wᵀ + s·h Bᵀ) + bias with d = m / ‖W + s·B A‖ by rows (see
            `lora_kernels.ops.dora.dora_linear`). Dropout then acts on x in all that the adapter adds to the base. m starts
            as ‖W‖.
        adapter_dtype: of A, B and m: the weight's where None, or fp32 beside an fp16 or bf16 weight.
        backend: the name of a back-end, which is then never replaced by another; None for the automatic choice.

    Attributes:
        weight [out, in], bias [out] or None: the base, requires_grad False.
        lora_A [r, in], lora_B [out, r]: the adapter, parameters; with DoRA lora_magnitude_vector [out] too.
        scaling: s, a float that may be changed at any time.
        merged: whether `weight` holds W + s·B·A (with DoRA: d ⊙ that) at present.

    ``state_dict`` always holds the base weight and the adapter, merged or not. Loading takes the state_dict of an
    ``nn.Linear`` too: the adapter then keeps its values (but a magnitude that is ‖W + s·B A‖, as a new one is, follows
    the loaded W).

    Raises:
        ValueError: r below 1, lora_dropout outside [0, 1), a lora_alpha that is not finite; loading an adapter of
            another rank.
        TypeError: an adapter_dtype that does not go with the weight's dtype.
    """

    _base: Tensor | None
    init = "kaiming"
    """How the adapter began. Other than so, W was split, and the adapter says nothing without this module's base."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_settings(r, lora_alpha, lora_dropout)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
        quant: str | None = None,
        blocksize: int = 64,
        double_quant: bool = False,
        init: str = "kaiming",
    ) -> FusedLoRALinear:
        """The module over `linear`'s own weight and bias: shared, not copied, and frozen from here on.

        With `quant` ("nf4", "fp4", "int8" or "fp8") a `QuantizedLoRALinear` over the quantised weight instead (QLoRA,
        Dettmers et al., 2023, arXiv:2305.14314): nothing of the dense one is kept. blocksize and double_quant are for
        nf4 and fp4 (see `lora_kernels.quant.weight.quantize_weight`, also for what is raised).

        `init` other than "kaiming" splits W into another base and an adapter that is not zero, so that a fresh module
        computes what `linear` does (with `quant` more nearly than the quantised W alone): "pissa" or "olora", over a
        dense base of its own, "loftq" or "lq_lora" over a quantised one (see `lora_kernels.nn.init`). Such an
        adapter is of no use without its base.

        Raises:
            ValueError: as the constructor; use_dora with `quant`; double_quant without; an `init` there is none of, or
                of the other kind of base, or what it raises, such as for r above min(in, out). TypeError: a weight that
                is quantised already; what is no nn.Linear, or more than one: with an adapter, hooks, a forward or a
                parametrization of its own, which the module would pass over.
        """
        check_settings(r, lora_alpha, lora_dropout)
        if reason := fit.why_not(linear, in_place=False):
            raise TypeError(reason)
        if quant is not None:
            from lora_kernels.nn.quantized import QuantizedLoRALinear

            return QuantizedLoRALinear._over_dense(
                linear,
                quant,
                init,
                {"blocksize": blocksize, "double_quant": double_quant},
                r=r,
                lora_alpha=lora_alpha,
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                use_dora=use_dora,
                adapter_dtype=adapter_dtype,
                backend=backend,
            )
        if double_quant:
            raise ValueError('double_quant is for quant="nf4" and quant="fp4", and quant is None')
        if not linear.weight.is_floating_point():
            raise TypeError(
                f"the weight of this {type(linear).__name__} is {linear.weight.dtype}, quantised already: "
                "QuantizedLoRALinear.from_bnb takes the layers of bitsandbytes"
            )
        split, base, start = split_named(init, quant), cast(nn.Parameter, linear.weight), ()
        if split is not None:
            weight, *start = split(base, r, scaling_of(lora_alpha, r, use_rslora))
            base = nn.Parameter(weight, requires_grad=False)
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.in_features, module.out_features = linear.in_features, linear.out_features
        module.register_parameter("weight", base)
        module.register_parameter("bias", linear.bias)
        module.training = linear.training
        module._add_adapter(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend)
        module._start(init, *start)
        return module

    @classmethod
    def from_bnb(cls, linear: nn.Linear, **settings: Any) -> FusedLoRALinear:
        """`QuantizedLoRALinear.from_bnb`: the module over a Linear4bit or Linear8bitLt of bitsandbytes."""
        from lora_kernels.nn.quantized import QuantizedLoRALinear

        return QuantizedLoRALinear.from_bnb(linear, **settings)

    @torch.no_grad()
    def _start(self, init: str, *ab: Tensor) -> None:
        self.init = init
        if ab:
            self.lora_A.copy_(ab[0])
            self.lora_B.copy_(ab[1])
            if self.use_dora:
                self._reset_magnitude()

    def _add_adapter(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        use_dora: bool,
        adapter_dtype: torch.dtype | None,
        backend: str | None,
    ) -> None:
        own = self.weight_dtype
        dtype = adapter_dtype or own
        if dtype != own and not (dtype == torch.float32 and own in (torch.float16, torch.bfloat16)):
            raise TypeError(f"adapter_dtype must be the weight's ({own}), or fp32 beside fp16 or bf16; got {dtype}")
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling: float = scaling_of(lora_alpha, r, use_rslora)
        self.use_dora, self.backend = use_dora, backend
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, dtype=dtype, device=self.weight.device))
        if use_dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty_like(self.lora_B[:, 0]))
        self._weight_norms = dora.WeightNorms()
        # The base weight while merged. A buffer, so that it moves with the module; not persistent, because state_dict
        # tells it as `weight`.
        self.register_buffer("_base", None, persistent=False)
        self.reset_adapter()

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of W: the dtype that x is expected in."""
        return self.weight.dtype

    @property
    def merged(self) -> bool:
        """Whether `weight` holds W + s·B·A at present."""
        return self._base is not None

    def _tensors(self) -> dict[str, Any]:
        """The parameters by name, straight from the dictionary: nn.Module's attribute look-up costs about a microsecond
        each, on every call. In a replica of nn.DataParallel, and where one is parametrised or pruned, some are
        attributes of another kind."""
        p: dict[str, Any] = self._parameters
        if "weight" in p and "bias" in p and "lora_A" in p and "lora_B" in p:
            return p
        return {name: getattr(self, name) for name in ("weight", "bias", "lora_A", "lora_B")}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → y [..., out_features]. Raises what `lora_linear` raises."""
        p = self._tensors()
        weight, bias, lora_a, lora_b = p["weight"], p["bias"], p["lora_A"], p["lora_B"]
        if self._buffers["_base"] is not None:
            self._warn_if_trained(lora_a)
            return F.linear(x, weight, bias)
        dropout_p = self.lora_dropout if self.training else 0.0
        if self.use_dora:
            return dora.dora_linear(
                x,
                weight,
                lora_a,
                lora_b,
                self.lora_magnitude_vector,
                scale=self.scaling,
                bias=bias,
                dropout_p=dropout_p,
                weight_norm_sq=self._weight_norms.of(weight),
                backend=self.backend,
            )
        return lora_linear(
            x, weight, lora_a, lora_b, scale=self.scaling, bias=bias, dropout_p=dropout_p, backend=self.backend
        )

    def _warn_if_trained(self, lora_a: Tensor) -> None:
        """Of a merged module."""
        if self.training and lora_a.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warnings.warn(
                f"this {type(self).__name__} is merged: its adapter gets no gradient until unmerge()", stacklevel=3
            )

    def reset_parameters(self) -> None:
        """Start wholly anew: weight and bias as nn.Linear does, then the adapter. Called after ``to_empty`` by what
        materialises a model from the meta device."""
        made = "lora_A" in self._parameters  # nn.Linear calls this while it is made
        if made:
            self.unmerge()
        super().reset_parameters()
        if made:
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Start anew: A Kaiming-uniform(√5), B zero, m = ‖W‖. A merged module is unmerged first."""
        self.unmerge()
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.use_dora:
            self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        self.lora_magnitude_vector.copy_(self._weight_norm())

    def _weight_norm(self) -> Tensor:
        """‖W + s·B A‖, the magnitude with which d = 1."""
        self._weight_norms.clear()
        return dora.weight_norm(self.weight, self.lora_A, self.lora_B, float(self.scaling), self.lora_magnitude_vector)

    @torch.no_grad()
    def merge(self, safe: bool = True) -> None:
        """weight ← W + s·B·A, with DoRA d ⊙ that, computed in fp64 and rounded once. The base weight is kept (at the
        cost of its memory) for `unmerge`.

        With `safe` a result that is not finite raises ValueError and leaves the module as it was. Merging twice does
        nothing.
        """
        if self.merged:
            return
        merged = self._merged_weight(safe)
        self._base = self.weight.detach()
        self.weight = nn.Parameter(merged, requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """weight ← W, bit for bit what it was before `merge`. Does nothing where nothing is merged."""
        if self._base is not None:
            self.weight = nn.Parameter(self._base, requires_grad=False)
            self._base = None

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with weight W + s·B·A (as `merge` computes it) and a copy of the bias. This module stays as
        it is."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight_dtype
        )
        weight = self._merged_weight(safe=True) if self._base is None else self.weight.detach().clone()
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def _merged_weight(self, safe: bool) -> Tensor:
        d = None
        if self.use_dora:  # the forward's own d
            d = dora.ratio(self.lora_magnitude_vector.detach(), self._weight_norm())
        merged = merging.updated_weight(
            self.weight.__getitem__, self.lora_A, self.lora_B, float(self.scaling), self.weight.dtype, d
        )
        if safe:
            merging.refuse_nonfinite(merged, self.scaling)
        return merged

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base is not None:
            destination[prefix + "weight"] = self._base

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._check_rank(state_dict, prefix)
        keys = [prefix + "lora_A", prefix + "lora_B"]
        if self.use_dora:
            keys.append(prefix + "lora_magnitude_vector")
        plain = not any(key in state_dict for key in keys)  # a plain Linear's: the adapter keeps its values
        merged = self.merged
        self.unmerge()
        follows = self.use_dora and plain and not self.weight.is_meta
        follows = follows and torch.equal(self.lora_magnitude_vector, self._weight_norm())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if plain:
            missing_keys[:] = [key for key in missing_keys if key not in keys]
            if self.lora_A.is_meta and not self.weight.is_meta:  # by assign=True, where nothing was kept
                for name in (key.removeprefix(prefix) for key in keys):
                    empty = torch.empty_like(old := getattr(self, name), device=self.weight.device)
                    setattr(self, name, nn.Parameter(empty, requires_grad=old.requires_grad))
                self.reset_adapter()
        if follows:
            self._reset_magnitude()
        if merged:
            self.merge()

    def _check_rank(self, state_dict: dict[str, Any], prefix: str) -> None:
        for key, dim in ((prefix + "lora_A", 0), (prefix + "lora_B", 1)):
            if key in state_dict and state_dict[key].shape[dim] != self.r:
                rank = state_dict[key].shape[dim]
                raise ValueError(
                    f"{key} {tuple(state_dict[key].shape)} is of rank {rank}, this module of r={self.r}: "
                    f"nothing was loaded into it. Build it with r={rank}"
                )

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the shapes."""
        text = f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout:g}"
        if self.use_dora:
            text += ", use_dora=True"
        if self.lora_A.dtype != self.weight_dtype:
            text += f", adapter_dtype={self.lora_A.dtype}"
        if self.backend is not None:
            text += f", backend={self.backend!r}"
        return text + (", merged" if self.merged else "")


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """s = α/r, or α/√r."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_settings(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raises ValueError for a setting that no layer can have."""
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"r must be an integer of at least 1, got {r!r}")
    if not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be a finite number, got {lora_alpha!r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must lie in [0, 1), got {lora_dropout}")
