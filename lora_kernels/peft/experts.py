"""`FusedExperts`: PEFT's adapters on the parameters of an experts module, on the fused path.

PEFT adapts a parameter with ``target_parameters`` by a ParamWrapper around the module that has it. Two parameters get
two wrappers, one around the other. Its forward makes W + s·B·A of every expert in each call and hands that to the
module. Here the outermost wrapper computes the whole module, with the adapters of all wrappers, and never forms B·A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from lora_kernels.nn import experts_form, experts_forward
from lora_kernels.nn.dry_run import Watched
from lora_kernels.nn.experts_forward import StackAdapter
from lora_kernels.nn.merged_sums import Term
from lora_kernels.ops import check
from lora_kernels.ops.autograd import autocast_of
from lora_kernels.peft import hooked, known
from lora_kernels.peft.layer import FusedLayer, Survey
from lora_kernels.peft.merging import Sum, as_matrix

_USES = """
ALLOWED_COMPUTE_DTYPES Linear UPCAST_DTYPES ValueError _LoraFactorsProxy _LoraParameterProxy __class__ __name__
_activate_lora _check_forward_args _did_swap_in_out_features _remove_parametrizations active_adapters adapter_names any
base_layer cached device disable_adapters dtype einsum get_base_layer get_delta_factors get_delta_weight get_param
getattr len lora_A lora_B merged nn num_experts original parameter_name parametrizations parametrize pop
register_parametrization requires_grad requires_grad_ reshape scaling shape to torch unmerge utils weight
"""
"""The names that PEFT's wrapper of a parameter uses in a forward."""

_ROUTING = ("top_k_index", "top_k_weights"), ("router_indices", "routing_weights")
"""The names that experts modules give to the experts of each token and their weights."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class _Operands(NamedTuple):
    """The operands of one forward."""

    base: Any
    """The experts module."""
    ids: Tensor
    weights: Tensor
    adapters: dict[str, StackAdapter]
    """The adapters of each stack that has some at present; several of one stack as one."""


class FusedExperts(FusedLayer, peft_layer.ParamWrapper):
    """PEFT's wrapper of a parameter of an experts module. `lora_kernels.lora_linear_experts` computes every call of the
    outermost wrapper that it can serve, for the wrappers inside too. Their ``fused_calls`` are counted with its own."""

    peft_class = peft_layer.ParamWrapper

    _modules: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's forward returns for x [T, H], the experts of each token and their weights."""
        compiling = torch.compiler.is_compiling()
        operands = self.read(x, args, kwargs)
        if isinstance(operands, str):
            if not compiling:
                self.count_left(operands)
            y: Tensor = self.peft_class.forward(self, x, *args, **kwargs)
            return y
        if not compiling:
            for wrapper in _wrappers(self):
                if isinstance(wrapper, FusedLayer):
                    wrapper.fused_calls += 1
        base, ids, weights, adapters = operands
        return experts_forward.forward(type(base), base, x, ids, weights, adapters, self._backend)

    def read(self, x: Tensor, args: Any = (), kwargs: Mapping[str, Any] = _NOTHING) -> _Operands | str:
        """Return the operands of a forward with these arguments, or why PEFT's own forward serves it: "" where no
        adapter is to be computed."""
        base = _base_of(self)
        adapters: dict[str, StackAdapter] = {}
        active = False
        for wrapper in _wrappers(self):
            if wrapper.disable_adapters:
                if wrapper.merged:
                    return "merged adapters that are disabled, which PEFT unmerges"
                continue
            names = [] if wrapper.merged else [name for name in wrapper.active_adapters if name in wrapper.lora_A]
            active = active or bool(names)
            # `enable` does not ask what is in a wrapper.
            if names and (reason := experts_form.why_not(base, hooks=False)):
                return reason
            if len(set(names)) < len(names):
                return "an adapter that is active twice"
            if wrapper is not self and (reason := hooked.refusal(f"the wrapper of {wrapper.parameter_name}", wrapper)):
                return reason
            found = [_read_adapter(wrapper, base, name) for name in names]
            for each in found:
                if isinstance(each, str):
                    return each
            if found:
                adapters[wrapper.parameter_name] = _as_one(cast(list[StackAdapter], found))
        if not active:
            return ""
        routing = _routing(args, kwargs)
        if routing is None:
            return "other arguments than the experts of each token and their weights"
        if reason := _why_not_base(self) or experts_forward.why_not(x, *routing) or _why_not_dtypes(x, base, adapters):
            return reason
        return _Operands(base, *routing, adapters)

    unload_and_optionally_merge_module = peft_layer.ParamWrapper.unload_and_optionally_merge_module

    def sums(self, names: Sequence[str]) -> Sequence[Sum]:
        """Return what merging the adapters `names` adds to the wrapped parameter."""
        base, stacked = _base_of(self), cast(Tensor, self.get_param()).dim() == 3
        terms = []
        for name in names:
            a, b = (getattr(self, part)[name].weight for part in ("lora_A", "lora_B"))
            adapter = _stacks(a, b, self.num_experts)
            if self.num_experts > 1 and not self._did_swap_in_out_features:
                left, right = adapter.a.mT, adapter.b.mT
            else:
                left, right = adapter.b, adapter.a  # as PEFT does for one expert, however it is stored
            terms.append(Term(left, right, float(self.scaling[name])))
        return [Sum(base, self.parameter_name, terms, _as_it_is if stacked else as_matrix)]

    @classmethod
    def why_not_forward(cls) -> str:
        """Return why PEFT's forward of a wrapped parameter is not the one that this package knows, or "" where it
        is."""
        return known.why_not(peft_layer.ParamWrapper, _USES, "forward", "_activate_lora", "get_delta_weight")

    @classmethod
    def survey(cls, layer: Any) -> Survey | str:
        """Return the size of the wrapped parameter and its adapters, or why it is left to PEFT."""
        base = _base_of(layer)
        if reason := _why_not_base(layer):
            return reason
        adapters = [_read_adapter(layer, base, name) for name in layer.lora_A]
        reasons = tuple(why for why in adapters if isinstance(why, str))
        E, N, K = experts_form.projection(base, layer.parameter_name).weight.shape
        ranks = ", ".join(f"{name} r={layer.r[name]}" for name in layer.lora_A)
        text = f"{layer.parameter_name}, {E} × ({K}→{N}), {ranks}"
        inside = [wrapper.parameter_name for wrapper in _wrappers(layer) if wrapper is not layer]
        if inside:
            text += f"; computes {' and '.join(inside)} of its base_layer in the same call"
        return Survey(text, reasons)

    def watched(self) -> Watched | None:
        """Return what a dry forward looks at in this layer; None for one that computes no adapter at present."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or self.disable_adapters or not active:
            return None
        a: list[Any] = [self.lora_A[name].weight for name in active]
        # A wrapper inside another is not called, and the hook of a dry forward on it would look like a user's.
        outermost = isinstance(self._modules["base_layer"], peft_layer.ParamWrapper)
        layer: Any = self if outermost else self.lora_A
        return Watched(layer, [self.get_param()], a, lambda: (self.fused_calls, dict(self.passed_over)))


# PEFT looks for its wrapper by this name when it adds another adapter.
FusedExperts.__name__ = "ParamWrapper"


def _wrappers(layer: Any) -> Iterator[Any]:
    """Yield `layer`, a wrapper of PEFT, and the wrappers inside it."""
    while isinstance(layer, peft_layer.ParamWrapper):
        yield layer
        layer = layer._modules["base_layer"]


def _base_of(layer: Any) -> Any:
    """Return the module in the innermost wrapper."""
    while isinstance(layer, peft_layer.ParamWrapper):
        layer = layer._modules["base_layer"]
    return layer


def _why_not_base(layer: Any) -> str:
    """Return why the module in the wrapper `layer` cannot be computed here, or "" where it can."""
    base = _base_of(layer)
    if reason := experts_form.why_not(base, hooks=False) or hooked.refusal(f"this {type(base).__name__}", base):
        return reason
    stacks = experts_form.names(base)
    for wrapper in _wrappers(layer):
        name = wrapper.parameter_name
        if name not in stacks:
            return f"{name} has an adapter, and only those of {' and '.join(stacks)} are fused"
        if getattr(base, name).requires_grad:
            return f"its {name} is trained"
    if base.num_experts == 1 and base.is_transposed:
        return "a single expert that is stored transposed, to which PEFT adds B·A as it would to W [N, K]"
    return ""


def _read_adapter(wrapper: Any, base: Any, name: str) -> StackAdapter | str:
    """Return adapter `name` of a wrapper as stacks that share the memory of PEFT's, or why it cannot be fused."""
    a, b = (getattr(wrapper, part)[name].weight for part in ("lora_A", "lora_B"))
    E = base.num_experts
    for weight in (a, b):
        if type(weight) not in (nn.Parameter, Tensor):
            return f"adapter {name!r} has a {type(weight).__name__}"
    if a.dtype != b.dtype:
        return f"adapter {name!r} has lora_A in {a.dtype} and lora_B in {b.dtype}"
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] % E or b.shape[1] != a.shape[0]:
        return f"adapter {name!r} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} for {E} experts"
    return _stacks(a, b, E)._replace(scale=wrapper.scaling[name])


def _stacks(a: Tensor, b: Tensor, E: int) -> StackAdapter:
    """Return PEFT's A and B as stacks of E matrices. In A the expert is the slowest dimension of the rows, in B the
    fastest of the columns."""
    r = a.shape[0] // E
    return StackAdapter(a.view(E, r, -1), b.view(-1, r, E).permute(2, 0, 1), 1.0)


def _as_it_is(w: Tensor) -> Tensor:
    return w


def _as_one(adapters: list[StackAdapter]) -> StackAdapter:
    """Return several adapters of a stack as one, whose rank is the sum of theirs."""
    if len(adapters) == 1:
        return adapters[0]
    wide = torch.promote_types(adapters[0].a.dtype, torch.float32)  # in 16 bits s·B would be rounded
    a = torch.cat([each.a.to(wide) for each in adapters], 1)
    b = torch.cat([each.b.to(wide) * each.scale for each in adapters], 2)
    return StackAdapter(a, b, 1.0)


def _routing(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return the experts of each token and their weights, or None where the arguments are others."""
    for names in _ROUTING:
        if set(kwargs) <= set(names[len(args) :]) and len(args) + len(kwargs) == len(names):
            ids, weights = (*args, *(kwargs[name] for name in names[len(args) :]))
            if isinstance(ids, Tensor) and isinstance(weights, Tensor):
                return ids, weights
    return None


def _why_not_dtypes(x: Tensor, base: Any, adapters: Mapping[str, StackAdapter]) -> str:
    """Return why the dtypes of x, the stacks and the adapters cannot be served together, or ""."""
    dtypes = {getattr(base, name).dtype for name in experts_form.names(base)}
    if len(dtypes) > 1:
        return f"the stacks are {' and '.join(sorted(map(str, dtypes)))}"
    (dtype,) = dtypes
    if x.dtype not in check.DTYPES or (x.dtype != dtype and autocast_of(x) is None):
        return f"x is {x.dtype}, the stacks {dtype}"
    for name, adapter in adapters.items():
        own = adapter.a.dtype
        if own != dtype and not (own == torch.float32 and dtype in check.HALVES):
            return f"the adapter of {name} is {own} beside {dtype}"
    return ""
