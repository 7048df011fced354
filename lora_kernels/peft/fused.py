"""`Fused`: the forward that every kind of PEFT's LoRA linears shares on the fused path.

The result, for plain LoRA and for DoRA, is the one that PEFT defines. For plain LoRA it is

    result = base(x) + Σ over active adapters of scaling · lora_B(lora_A(dropout(x)))
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn

from lora_kernels.core.rows import Rows
from lora_kernels.nn.dry_run import Watched
from lora_kernels.nn.fit import has_hooks
from lora_kernels.nn.in_force import CURRENT, current_for
from lora_kernels.nn.recompute import REMEMBERED
from lora_kernels.ops.autograd import as_dtype, autocast_of
from lora_kernels.ops.dora import Update, dora_linear
from lora_kernels.ops.linear import lora_linear
from lora_kernels.ops.multi import lora_linear_multi
from lora_kernels.peft import by_row, folds, hooked, known, merged_terms, serving, several
from lora_kernels.peft.groups import Group
from lora_kernels.peft.layer import FusedLayer, Survey
from lora_kernels.peft.merging import Sum
from lora_kernels.peft.reading import (
    OneAdapter,
    Operands,
    PeftAdapter,
    as_one_adapter,
    only_eager,
    probability,
    weight_and_bias,
    why_not_biased,
)
from lora_kernels.quant.weight import QuantizedWeight

LORA_USES = """
VARIANT_KWARG_KEYS __base__ _cast_input_dtype _check_forward_args _mixed_batch_forward active_adapter active_adapters
adapter_names alora_offsets append base_layer clone disable_adapters dtype enumerate forward get is_autocast_enabled
keys lora_A lora_B lora_dropout lora_variant merged pop result scaling set to torch unmerge weight x
"""
"""The names that PEFT's forwards of plain LoRA use. A fused layer looks at the variants of LoRA, which `lora_variant`
holds."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Fused(FusedLayer):
    """The fused forward of PEFT's LoRA linears. A subclass inherits from this class and then from `peft_class`.

    A forward in the context `mixed` computes each row with an adapter of its own (`by_row.forward_in`). Another one
    asks its group first (`Group.take`), and then `plain_operands`, which serves the most frequent case. Every other
    forward reads the whole layer (`read`). Then it computes (`_compute`, `compute_rows`), or leaves the call to PEFT's
    own forward.
    Subclasses define how the base is read (`read_base`), which variants of LoRA they serve (`variant_reason`) and in
    which dtypes a call is computed (`_dtypes`).
    """

    quantised_base: ClassVar[bool] = False
    """Whether the base weight has 4 or 8 bits."""
    own: ClassVar = {**FusedLayer.own, "_group": lambda: None}

    adapter_table = staticmethod(by_row.adapter_table)
    """The numbers of the model's adapters, which `mixed` asks for."""
    _group: Group | None
    _modules: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: Any
    scaling: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    base_layer: Any
    """The layer that PEFT wraps. `read_base` refuses another tuner's layer there. So get_base_layer(), whose search
    takes microseconds, is not needed."""
    cast_input_dtype_enabled: Any
    _cast_input_dtype: Any
    _check_forward_args: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's forward returns for x [..., in_features]; ``adapter_names`` has one name for each element
        of x's first dimension."""
        compiling = torch.compiler.is_compiling()
        if compiling or CURRENT.get() is not None or REMEMBERED:  # a call of `current_for` would be one more frame
            context = current_for(self)
            if context is not None:
                return context.computed(self, by_row.forward_in(context, self, x, args, kwargs))
        if not (args or kwargs or compiling):
            group = self._group
            if group is not None and (y := group.take(self, x)) is not None:
                self.__dict__["fused_calls"] += 1  # nn.Module's setting of an attribute takes microseconds
                return y
            if (short := self.plain_operands(x)) is not None:
                self.__dict__["fused_calls"] += 1
                w, a, b, scale, bias, p = short
                return lora_linear(x, w, a, b, scale=scale, bias=bias, dropout_p=p, backend=self._backend)
        names = kwargs.get("adapter_names") if kwargs else None
        operands = self.read(x, args, kwargs, names)
        if isinstance(operands, str):
            if type(operands) is hooked.Elsewhere:
                return self.forward(x.to(operands.there), *args, **kwargs).to(operands.back)
            if operands and (y := self.otherwise(x, args, kwargs)) is not None:
                return y
            if not compiling:
                self.count_left(operands)
            return self.peft_class.forward(self, x, *args, **kwargs)
        if not compiling:
            self.__dict__["fused_calls"] += 1
        if names is None and not operands.activated:
            return self._compute(x, operands)
        self._check_forward_args(x, adapter_names=names)
        numbers, rows = by_row.rows_for(x, operands, names, kwargs.get("alora_offsets"))
        return self.compute_rows(x, operands, numbers, rows)

    def otherwise(self, x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return y of a forward that `read` does not serve, where the layer has another way than PEFT's own forward."""
        return None

    def plain_operands(self, x: Tensor) -> OneAdapter | None:
        """Return the operands of a forward without further arguments in the most frequent case, or None where `read`
        has to look.

        They are those that `read` and `as_one_adapter` give. A kind of layer overrides this method where these two
        would take longer than the kernels of a small layer.
        """
        return None

    def read(
        self,
        x: Tensor,
        args: Any = (),
        kwargs: Mapping[str, Any] = _NOTHING,
        names: list[str] | None = None,
        alone: bool = False,
    ) -> Operands | str:
        """Return the operands of a forward with these arguments, or why PEFT's own forward serves it: "" where no
        adapter is to be computed. With `alone` PEFT's forward cannot serve it, also where it would be faster."""
        # Every forward that neither a group nor `plain_operands` serves runs this. It reads the layer once, and avoids
        # nn.Module's slow attribute look-up.
        if self.disable_adapters or self.merged:
            return "" if names is None else "adapter_names beside disabled or merged adapters"
        if args or (kwargs and any(key not in by_row.KEYWORDS for key in kwargs)):
            return "further arguments for the base layer"
        base = self.read_base(self)
        if isinstance(base, str):
            return base
        w, bias = base
        if x.device != w.device:
            return hooked.elsewhere(self, x, w, names)
        present, variants = self.adapters_in(self), self.lora_variant
        active = []
        for name in self.active_adapters if names is None else dict.fromkeys(names):
            if name in present:
                active.append(name)  # a comprehension is one more frame in every forward
        if not active:
            return ""
        adapters = {}
        dropout = biased = activated = False
        for name in active:
            adapter = self.read_adapter(self, name)
            if isinstance(adapter, str):
                return adapter
            adapters[name] = adapter
            if adapter.p > 0:  # a branch, because a compiler may have p as a symbol
                dropout = True
            if adapter.b_bias is not None:
                biased = True
            if adapter.activated:
                activated = True
        if activated and names is None and len(active) > 1:
            return "an activated LoRA beside others"
        if (
            activated
            and names is None
            and (reason := by_row.why_not_offsets(x, kwargs.get("alora_offsets"))) is not None
        ):
            return reason
        if names is None and len(adapters) < len(active):
            return "an adapter that is active twice"
        dtypes = self._dtypes(x, w, adapters, autocast_of(x))
        if isinstance(dtypes, str):
            return dtypes
        inner, outer = dtypes
        beside = len(active) > 1 or names is not None
        if variants and beside and (together := several.why_not(self, adapters, names is not None, inner)):
            return together
        if biased and (reason := why_not_biased(inner)):
            return reason
        if self._backend is None and not alone and (dropout or self.quantised_base):
            # Without a kernel, masks and weights of 4 or 8 bits become tensors by dozens of torch operations. Then
            # PEFT's own forward is the faster one, and serves the call unless a back-end was asked for by name.
            (N, K), a = w.shape, adapters[active[0]].a
            w_format = w.format if isinstance(w, QuantizedWeight) else "dense"
            pair = (inner, torch.float32 if a.dtype == torch.float32 else inner)
            if only_eager(x.device, pair, (N, K, a.shape[0]), dropout, w_format):
                what = "dropout" if w_format == "dense" else f"a weight in {w_format}"
                return f"no kernel for {what} here, and PEFT's own forward is faster than plain torch operations"
        return Operands(w, bias, adapters, inner, outer, activated)

    @staticmethod
    def adapters_in(layer: Any) -> Mapping[str, Any]:
        """Return a mapping whose keys are the names of the adapters of `layer`, which may not be fused yet."""
        adapters: Mapping[str, Any] = layer._modules["lora_A"]._modules
        return adapters

    @staticmethod
    def first_matrix(layer: Any, name: str) -> Tensor:
        """Return the parameter of adapter `name` that a forward of it reads first."""
        a: Tensor = layer.lora_A[name].weight
        return a

    @staticmethod
    def read_base(layer: Any) -> tuple[Tensor | QuantizedWeight, Tensor | None] | str:
        """Return W [N, K] and the bias [N] of the base of `layer`, which may not be fused yet, or why no adapter can be
        fused with it."""
        raise NotImplementedError

    @classmethod
    def read_adapter(cls, layer: Any, name: str) -> PeftAdapter | str:
        """Return adapter `name` of `layer`, which may not be fused yet, or why it cannot be fused."""
        variant = layer.lora_variant.get(name)
        if variant is not None and (reason := cls.variant_reason(layer, name)):
            return reason
        modules = layer._modules
        down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        of_linear = type(down) is nn.Linear and type(up) is nn.Linear
        read: Any = weight_and_bias if of_linear else folds.matrix
        of_a, of_b = read(down), read(up)
        if of_a is None or of_b is None or of_a[1] is not None:
            return f"adapter {name!r} consists of a {type(down).__name__} and a {type(up).__name__}"
        (a, _), (b, b_bias) = of_a, of_b
        for weight in (a, b):
            if type(weight) not in (nn.Parameter, Tensor):
                return f"adapter {name!r} has a {type(weight).__name__}"
        if has_hooks(down, up):
            hooks = hooked.of_adapter(layer, name)
            if isinstance(hooks, str):
                return hooks
            a, b, b_bias = hooked.converted_to(hooks, a, b, b_bias)
        if a.dtype != b.dtype:
            return f"adapter {name!r} has lora_A in {a.dtype} and lora_B in {b.dtype}"
        p = probability(dropout, name)
        if isinstance(p, str):
            return p
        if variant is None:
            return PeftAdapter(a, b, b_bias, layer.scaling[name], p)
        if type(variant) in folds.UNKNOWN:
            return PeftAdapter(folds.scaled(layer, name, a), b, b_bias, layer.scaling[name], p)
        activated = type(variant) is ALoraLinearVariant
        magnitude = None if activated else layer.lora_magnitude_vector[name].weight
        return PeftAdapter(a, b, b_bias, layer.scaling[name], p, magnitude, activated)

    @staticmethod
    def variant_reason(layer: Any, name: str) -> str | None:
        """Return why adapter `name`, which is not plain LoRA, cannot be fused; None where it can."""
        raise NotImplementedError

    @staticmethod
    def known_dtype(layer: Any) -> torch.dtype | None:
        """Return the dtype in which a call is computed outside autocast, where it does not depend on x."""
        raise NotImplementedError

    @staticmethod
    def base_note(layer: Any) -> str:
        """Return the text that follows the size of the base in a report."""
        return ""

    @classmethod
    def why_not_forward(cls) -> str:
        """Return why PEFT's forwards of this class are not those that this package knows, or "" where they are."""
        return known.why_not(cls.peft_class, LORA_USES, "forward", "_mixed_batch_forward")

    @classmethod
    def survey(cls, layer: Any) -> Survey | str:
        """Return the size of the base and the adapters of `layer`, or why its base cannot be read."""
        base = cls.read_base(layer)
        if isinstance(base, str):
            return base
        names = list(cls.adapters_in(layer))
        adapters = [cls.read_adapter(layer, name) for name in names]
        reasons = [why for why in adapters if isinstance(why, str)]
        biased = any(isinstance(each, PeftAdapter) and each.b_bias is not None for each in adapters)
        if biased and (dtype := cls.known_dtype(layer)):
            reasons += filter(None, [why_not_biased(dtype)])
        ranks = ", ".join(f"{name} r={layer.r[name]}" for name in names)
        calls = [serving.call_of_layer(base[0], each) for each in adapters if not isinstance(each, str)]
        text = f"{layer.in_features}→{layer.out_features}{cls.base_note(layer)}, {ranks}"
        return Survey(text, tuple(reasons), tuple(filter(None, calls)))

    def adapters_to_merge(self) -> Container[str]:
        """Return the names of the adapters that this layer has."""
        return self.adapters_in(self)

    def sums(self, names: Sequence[str]) -> Sequence[Sum] | None:
        """Return what merging the adapters `names` adds to W and the bias."""
        return merged_terms.of_lora(self, names)

    def leave(self, reason: str) -> None:
        """Leave the group of the layer, if it is in one."""
        if self._group is not None:
            self._group.leave(self, reason)

    def before_fuse(self) -> Callable[[], None]:
        """Return a function that puts the layer back into its group, and its back-end back."""
        put_back, group = super().before_fuse(), self._group
        reason = "" if group is None else group.reason

        def put_back_both() -> None:
            put_back()
            self._group = group
            if group is not None:
                group.reason = reason

        return put_back_both

    def watched(self) -> Watched | None:
        """Return what a dry forward looks at in this layer; None for one that computes no adapter at present."""
        active = [name for name in self.active_adapters if name in self.adapters_in(self)]
        if self.merged or self.disable_adapters or not active:
            return None
        base = [p for name, p in self.base_layer.named_parameters(recurse=False) if name != "bias"]
        a = [self.first_matrix(self, name) for name in active]
        return Watched(cast(nn.Module, self), base, a, lambda: (self.fused_calls, dict(self.passed_over)))

    def _dtypes(
        self, x: Tensor, w: Any, adapters: dict[str, PeftAdapter], autocast: torch.dtype | None
    ) -> tuple[torch.dtype, torch.dtype] | str:
        """Return the dtypes in which the call is computed and returned (`Operands.inner`, `Operands.outer`), or why the
        dtypes of x, W and the adapters cannot be served together. `autocast` is `autocast_of(x)`."""
        raise NotImplementedError

    def is_apart(self, operands: Operands) -> bool:
        """Return whether the base of a call is computed in another dtype than its adapters."""
        return False

    def settle(self, x: Tensor) -> None:
        """Make the changes to the base that its own forward makes before it computes."""

    def _compute(self, x: Tensor, operands: Operands) -> Tensor:
        """Return y of the base with every adapter of `operands`."""
        adapters = operands.adapters
        if len(adapters) > 1 and any(each.p or each.magnitude is not None for each in adapters.values()):
            return several.compute(self, x, operands)
        return self.compute_alike(x, operands)

    def compute_alike(self, x: Tensor, operands: Operands) -> Tensor:
        """Return y of the base with one adapter, or with several that are neither DoRA nor have dropout."""
        adapter = next(iter(operands.adapters.values()))
        if adapter.magnitude is not None:
            return self.compute_dora(x, operands, adapter)
        w, a, b, scale, bias, p = as_one_adapter(operands)
        return lora_linear(x, w, a, b, scale=scale, bias=bias, dropout_p=p, backend=self._backend)

    def compute_dora(
        self, x: Tensor, operands: Operands, adapter: PeftAdapter, norm_of: Update | None = None
    ) -> Tensor:
        """Return y of the base with the DoRA adapter `adapter`, the only one of `operands`; `norm_of` as for
        `dora_linear`."""
        w, a, b, scale, bias, p = as_one_adapter(operands)
        m = adapter.magnitude
        assert m is not None
        if m.dtype != a.dtype:  # PEFT may make it in the dtype of a weight that was quantised
            m = as_dtype(m, torch.float32)
        return dora_linear(x, w, a, b, m, scale=scale, bias=bias, dropout_p=p, norm_of=norm_of, backend=self._backend)

    def compute_rows(self, x: Tensor, operands: Operands, numbers: Sequence[tuple[str, int]], rows: Rows) -> Tensor:
        """Return y, where each row of x is computed with the adapter that `rows` gives it. `numbers` are the names and
        numbers of these adapters. W is read once."""
        adapters = by_row.many(operands, numbers, rows.n)
        return lora_linear_multi(x, operands.w, adapters, rows, bias=operands.bias, backend=self._backend)
