"""`FusedLoRALinear`: a linear layer with a frozen weight and a trained low-rank update, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.nn import by_row, construct, fit, loading, magnitude, merging, offload
from lora_kernels.nn.base import AdapterLinear
from lora_kernels.nn.in_force import CURRENT, current_for
from lora_kernels.nn.recompute import REMEMBERED
from lora_kernels.nn.replaced import ReplacedWeight
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.ops.dora import dora_linear
from lora_kernels.ops.dora_norm import ratio
from lora_kernels.ops.linear import lora_linear
from lora_kernels.quant.weight import QuantizedWeight

# torch.fx.symbolic_trace records a call of these functions as one node, as it does with those of torch.
torch.fx.wrap("lora_linear")
torch.fx.wrap("dora_linear")


class FusedLoRALinear(AdapterLinear, ReplacedWeight):
    """y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ with W and bias frozen: what an ``nn.Linear`` computes, and LoRA.

    It is called as an ``nn.Linear`` is, and has its attributes, but is no subclass of it: code that looks for
    ``nn.Linear`` may make another layer of the weight and bias, without the adapter.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685). A starts
    Kaiming-uniform(√5) and B zero, so a fresh module computes what its base computes.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        r: the rank, at least 1.
        lora_alpha: s = lora_alpha / r; with `use_rslora` lora_alpha / √r (Kalajdzievski, 2023, arXiv:2312.03732).
        lora_dropout: p in [0, 1): dropout on x in the low-rank branch, while training.
        use_dora: weight-decomposed LoRA, y = d ⊙ (x Wᵀ + s·h Bᵀ) + bias with d = m / ‖W + s·B A‖ by rows (see
            `lora_kernels.dora_linear`). Dropout then acts on x in all that the adapter adds to the base. m starts as
            ‖W‖.
        adapter_dtype: the dtype of A, B and m. None is fp32 beside an fp16 or bf16 weight, as in PEFT, and else the
            weight's dtype. The dtype of a 16-bit weight gives an adapter in 16 bits. At small learning rates such an
            adapter rounds its updates away, and ``torch.amp.GradScaler`` refuses it in fp16.
        backend: the name of a back-end, which then serves every call or raises; None for the automatic choice.

    Attributes:
        weight: [out, in], the frozen W, or the merged weight while `merged`.
        bias: [out] or None, the frozen bias.
        lora_A: [r, in], A, a parameter.
        lora_B: [out, r], B, a parameter.
        lora_magnitude_vector: [out], DoRA's m, a parameter. It exists only with use_dora.
        scaling: s, a float that may be changed at any time.
        merged: whether `weight` holds W + s·B·A (with DoRA: d ⊙ that) at present.

    ``state_dict`` always holds the base weight and the adapter, merged or not. The state_dict of an ``nn.Linear`` can
    be loaded too. A and B then keep their values. So does m, unless it equals ‖W + s·B A‖, as a new m does: then it
    becomes the norm with the loaded W. ``to_empty`` gives A and B their first values. It makes m NaN, since W has no
    values yet; `reset_adapter`, or loading W, makes m the norm.

    Raises:
        ValueError: r below 1, lora_dropout outside [0, 1), a lora_alpha that is not finite; loading an adapter of
            another rank.
        TypeError: an adapter_dtype that does not go with the weight's dtype.
    """

    plain: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    adapter_table = staticmethod(by_row.adapter_table)
    """The number of the layer's adapter, which `lora_kernels.mixed` asks for."""

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
        settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend)
        settings.check()
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(self.stored_shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self._reset_base()
        self._add_adapter(settings)

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
        """Return a module over `linear`'s own weight and bias. They are shared, not copied, and are frozen.

        `quant` ("nf4", "fp4", "int8" or "fp8") asks for a `QuantizedLoRALinear` over the quantised weight (QLoRA,
        Dettmers et al., 2023, arXiv:2305.14314). It keeps no reference to the dense weight. blocksize and double_quant
        are for nf4 and fp4; `lora_kernels.quantize_weight` documents them and its errors.

        An `init` of "kaiming", "gaussian" or "orthogonal" gives A and B first values with B A = 0, and leaves W as it
        is. Any other splits W into a new base and an adapter that is not zero, so that a fresh module computes what
        `linear` does. "pissa", "milora" and "olora" make a dense base. "loftq" and "lq_lora" make a quantised base, and
        the base with its adapter is nearer to W than the quantised W alone. See `lora_kernels.initialise`. Such an
        adapter is valid with this base only.

        Raises:
            ValueError: as the constructor; double_quant without `quant`; an unknown `init`, or
                one for the other kind of base; and what the scheme itself raises, for an r above min(in, out) for
                example.
            TypeError: a weight that is quantised already; a module that is not an nn.Linear, or that has an adapter,
                hooks, a forward or a parametrization of its own, which the new module would pass over.
        """
        settings = LoRASettings(
            r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend, quant, blocksize, double_quant,
            init,
        )  # fmt: skip
        return cls.from_settings(linear, settings)

    @classmethod
    @torch.inference_mode(False)  # what is made in inference mode could not be trained later
    @torch.no_grad()
    def from_settings(cls, module: nn.Linear, settings: LoRASettings) -> FusedLoRALinear:
        """Return what `from_linear` returns, for its keywords as one object."""
        settings.check()
        if reason := fit.why_not(module, in_place=False):
            raise TypeError(reason)
        if settings.quant is not None:
            return cls.quantized_kind.from_dense(module, settings)
        return cast(FusedLoRALinear, construct.over_dense(cls, module, settings))

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """Return why a fused layer cannot take the place of `module` in a model, or "" where it can."""
        return fit.why_not(module, in_place=True)

    @staticmethod
    def sizes_of(module: Any) -> tuple[int, int]:
        """Return the in_features and out_features of `module`, a layer in whose place this one can stand."""
        return module.in_features, module.out_features

    @staticmethod
    def turned(weight: Tensor) -> Tensor:
        """Return W [out, in] for a tensor in the layout of `weight`, and the other way round."""
        return weight

    @classmethod
    def from_bnb(cls, linear: nn.Linear, **settings: Any) -> FusedLoRALinear:
        """Return a `QuantizedLoRALinear` over a Linear4bit or Linear8bitLt of bitsandbytes, as its `from_bnb` does."""
        return cls.quantized_kind.from_bnb(linear, **settings)

    def _add_adapter(self, settings: LoRASettings) -> None:
        super()._add_adapter(settings)
        if self.use_dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty_like(self.lora_B[:, 0]))
        self.reset_adapter()

    def _start(self, init: str, *ab: Tensor) -> None:
        super()._start(init, *ab)
        if ab and self.use_dora:
            self._reset_magnitude()

    @by_row.asks
    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., out_features] for x = `input` [..., in_features], which has the name that nn.Linear gives it.
        Raises what `lora_linear` raises."""
        compiling = torch.compiler.is_compiling()
        if compiling or CURRENT.get() is not None or REMEMBERED:
            context = current_for(self)
            if context is not None:
                self.count_call(self.merged)
                return by_row.forward_in(context, self, input)
        weight, bias, a, b = self._parts()
        if self._base is not None:
            self._check_merged(self.weight, self._base, a)
            self.count_call(merged=True)
            return F.linear(input, weight, bias)
        if not compiling:
            self.__dict__["fused_calls"] = self.fused_calls + 1  # nn.Module's setting of an attribute is slow
        p = self.lora_dropout if self.training else 0.0
        if self.use_dora:
            m = self._parameters.get("lora_magnitude_vector")
            return dora_linear(
                input,
                weight,
                a,
                b,
                self.lora_magnitude_vector if m is None else m,
                scale=self.scaling,
                bias=bias,
                dropout_p=p,
                backend=self.backend,
            )
        return lora_linear(input, weight, a, b, scale=self.scaling, bias=bias, dropout_p=p, backend=self.backend)

    def frozen_weight(self) -> Tensor | QuantizedWeight:
        """Return W [out, in], also that of a merged module."""
        return self.turned(self.weight if self._base is None else self._base)

    def _reset_base(self) -> None:
        weight, bias = self.weight, self.bias
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(bias, -bound, bound)

    def reset_adapter(self) -> None:
        """Give the adapter its first values: A Kaiming-uniform(√5), B zero, m = ‖W‖; or those of `init`, where it is
        "gaussian" or "orthogonal". A merged module is unmerged first.

        Raises ValueError where the weights are offloaded, because these values would be overwritten by the old ones.
        """
        super().reset_adapter()
        if self.use_dora:
            self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        self.lora_magnitude_vector.copy_(magnitude.norm_of(self))

    @torch.inference_mode(False)  # what is made in inference mode could not be trained later
    @torch.no_grad()
    def merge(self, safe: bool = True) -> None:
        """Put W + s·B·A, or with DoRA d ⊙ that, into `weight`, computed in fp64 and rounded once. The base weight stays
        in memory for `unmerge`.

        A weight that other modules share, such as that of a tied output head, stays W for them. Merging a merged module
        does nothing. Where accelerate has offloaded the module, the merged weight is kept in the CPU's memory, and the
        next forward takes it.

        Raises:
            ValueError: with `safe`, for a result that is not finite; for a weight that is parametrised, pruned,
                sharded, or on the meta device. The module is then as it was.
        """
        if self.merged:
            return
        merging.refuse_computed(self)
        with offload.onloaded(self):
            merged = nn.Parameter(self._merged_weight(safe), requires_grad=False)
            base = offload.as_kept(self, cast(nn.Parameter, self._parameters["weight"]), "weight")
            self._parameters["weight"] = merged
        self._keep_base(base, merged if offload.hook_of(self) is None else None)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W back as `weight`: the Parameter of before `merge`, so that what was tied to it is tied again. Does
        nothing where nothing is merged.

        Raises ValueError where the merged weight is parametrised or pruned, or was offloaded after it was merged.
        Nothing is changed.
        """
        base = self._base
        if base is None:
            return
        merging.refuse_computed(self)
        if not (base.is_meta or offload.has_replaced(self, "weight")):
            merging.refuse_absent(self)
            if base.device != self.weight.device:  # it was merged while it was offloaded, and is so no longer
                base = nn.Parameter(base.to(self.weight.device), base.requires_grad)
        with offload.onloaded(self):
            self._parameters["weight"] = base
        self._keep_base(None)

    def _keep_base(self, base: nn.Parameter | None, merged: nn.Parameter | None = None) -> None:
        # nn.Module's __setattr__ would make them parameters of the module.
        self.__dict__.update(_base=base, _merged_as=merged)

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with weight W + s·B·A, as `merge` computes it, and a copy of the bias in
        `weight_dtype`. This module stays as it is. That of an offloaded module is on the device of its forward, and is
        not offloaded. Raises what `merge` raises, but takes a parametrised or pruned weight."""
        linear = self._made_plain(lambda weight: merging.plain_linear(self, self.turned(weight).contiguous()))
        return cast(nn.Linear, linear)

    def to_plain(self) -> nn.Module:
        """Return what `to_linear` returns."""
        return self.to_linear()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _made_plain(self, make: Callable[[Tensor], nn.Module]) -> nn.Module:
        """Return what `make` returns for the merged weight, in the layout of `weight`."""
        if self.merged:
            self._refuse_lost_merge()
        with offload.onloaded(self):
            if self._base is None:
                return make(self._merged_weight(safe=True))
            merging.refuse_absent(self)
            return make(self.weight.detach().clone())

    def _ratio(self) -> Tensor | None:
        """Return DoRA's d, from the same functions as in the forward; None without DoRA."""
        return ratio(self.lora_magnitude_vector.detach(), magnitude.norm_of(self)) if self.use_dora else None

    def _merged_weight(self, safe: bool) -> Tensor:
        merging.refuse_absent(self)
        merging.refuse_sharded(self, self.whole_shapes)
        w = self.turned(self.weight)
        merged = merging.updated_weight(
            w.__getitem__, self.lora_A, self.lora_B, float(self.scaling), w.dtype, self._ratio()
        )
        if safe:
            merging.refuse_nonfinite(merged, self.scaling)
        return self.turned(merged).contiguous()

    def _reset_adapter(self) -> None:
        super()._reset_adapter()
        if self.use_dora:  # W has no values yet, so neither has its norm
            nn.init.constant_(self.lora_magnitude_vector, math.nan)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing_keys, _, _ = rest  # nn.Module gives: metadata, strict, missing, unexpected, errors
        loading.check_rank(self, state_dict, prefix)
        keys = [prefix + "lora_A", prefix + "lora_B"]
        if self.use_dora:
            keys.append(prefix + "lora_magnitude_vector")
        plain = not any(key in state_dict for key in keys)  # the state_dict of an nn.Linear, which has no adapter
        merged = self.merged
        self.unmerge()
        follows = self.use_dora and not self.weight.is_meta and magnitude.is_new(self, plain)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if plain:
            missing_keys[:] = [key for key in missing_keys if key not in keys]
            if self.lora_A.is_meta and not self.weight.is_meta:  # assign=True: the adapter has no values to keep
                loading.put_adapter_beside(self, self.weight.device)
                self.reset_adapter()
        if follows and (plain or magnitude.is_new(self, False)):  # FSDP2 loads missing values from the module itself
            self._reset_magnitude()
        if merged:
            self.merge()
