"""`FusedMultiheadAttention`: PEFT's LoRA over an ``nn.MultiheadAttention``, without merging in the forward.

PEFT writes W + s·B·A into the module before each forward and takes it out again after it, which changes a W in 16 bits
a little every time. Here W is only read. The result is the one that PEFT defines:

* A and B of the layer itself belong to the input projection of q, k and v, those of its out_proj to the output.
* The adapters' lora_dropout has no effect, because PEFT's merged weights leave no place for it.
* PEFT 0.19 to 0.21 merge the update of out_proj twice, the second time past autograd: y has W₂ + 2s·B·A, and the
  gradients of A and B are those of a single one. `counted` finds out what the installed PEFT does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from lora_kernels.nn.dry_run import Watched
from lora_kernels.nn.merged_sums import Term
from lora_kernels.ops import check
from lora_kernels.ops.attention import Flags, Heads, Projection, multihead_attention
from lora_kernels.ops.autograd import autocast_of
from lora_kernels.peft import hooked, known, merged_terms, serving
from lora_kernels.peft.layer import FusedLayer, Survey
from lora_kernels.peft.linear import FusedLinear
from lora_kernels.peft.merging import Sum
from lora_kernels.peft.reading import Operands, PeftAdapter, as_one_adapter

_OUT = "out_proj"

_USES = """
ValueError __class__ __name__ _check_forward_args active_adapters adapter_names base_layer disable_adapters dtype
get_base_layer lora_A merge merged out_proj to unmerge
"""
"""The names that PEFT's forward of an nn.MultiheadAttention uses."""


class Counted(NamedTuple):
    """How often PEFT counts the update of out_proj."""

    value: float
    """In y and dx."""
    gradient: float
    """In the gradients of A and B."""


@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def counted() -> Counted:
    """Return how often the installed PEFT counts the update of out_proj, found out on a layer of one feature."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        attention = nn.MultiheadAttention(1, 1, dtype=torch.float32)
        layer: Any = peft_layer.MultiheadAttention(attention, "one", config=LoraConfig(r=1), r=1, lora_alpha=1)
        out = layer.base_layer.out_proj
        with torch.no_grad():
            attention.in_proj_bias.fill_(1.0)
            out.base_layer.weight.zero_()
            out.lora_A["one"].weight.fill_(1.0)
            out.lora_B["one"].weight.fill_(1.0)
        x = torch.zeros(1, 1, 1, dtype=torch.float32)
        y = layer(x, x, x)[0].sum()
        (db,) = torch.autograd.grad(y, out.lora_B["one"].weight)
    return Counted(y.item(), db.item())


class _Base(NamedTuple):
    """The ``nn.MultiheadAttention`` that PEFT wraps."""

    attention: nn.MultiheadAttention
    out: Any
    """PEFT's layer in the place of its out_proj."""
    weights: tuple[Tensor, Tensor]
    """W of the input projection [3E, E], and of the output projection, [E, E]."""
    biases: tuple[Tensor | None, Tensor | None]


class _Call(NamedTuple):
    """The operands of one forward."""

    qkv: tuple[Tensor, Tensor, Tensor]
    projections: tuple[Projection, Projection]
    heads: Heads
    flags: Flags


class FusedMultiheadAttention(FusedLayer, peft_layer.MultiheadAttention):
    """PEFT's LoRA over an ``nn.MultiheadAttention``. Both of its projections are `lora_kernels.lora_linear`."""

    peft_class = peft_layer.MultiheadAttention
    own: ClassVar = {**FusedLayer.own, "_counted": counted, "_kept_in_forward": lambda: None}
    _counted: Counted
    _kept_in_forward: Sequence[tuple[nn.Module, str, nn.Parameter | None]] | None
    """The weights while PEFT's own forward runs, which replaces them; else None."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what PEFT's forward returns: y and the attention weights, in query's dtype."""
        compiling = torch.compiler.is_compiling()
        call = self._read(query, args, kwargs)
        if isinstance(call, str):
            if not compiling:
                self.count_left(call)
            return self._forward_of_peft(query, args, kwargs)
        if not compiling:
            self.__dict__["fused_calls"] += 1
        y, weights = multihead_attention(call.qkv, *call.projections, call.heads, call.flags, self._backend)
        return y.to(query.dtype), weights if weights is None else weights.to(query.dtype)

    def _read(self, query: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call | str:
        """Return the operands of a forward, or why PEFT's own serves it: "" where no adapter is to be computed."""
        if self.disable_adapters or self.merged:
            return ""
        base = _read_base(self)
        if isinstance(base, str):
            return base
        attention, out, weights, biases = base
        if query.device != weights[0].device:
            return hooked.not_there("query", query, weights[0])
        # PEFT's own forward replaces its weights. It has done so in inference mode, and now it does so out of it.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(w.is_inference() for w in weights):
            return "a base weight that PEFT's forward has made in inference mode, which no backward can have"
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return ""
        if out.active_adapters != self.active_adapters or out.merged or out.disable_adapters:
            return "its out_proj has other adapters active, merged or disabled"
        if len(set(active)) < len(active):
            return "an adapter that is active twice"
        given = _arguments(query, args, kwargs)
        if isinstance(given, str):
            return given
        qkv, flags = given
        pairs = []
        for layer, weight, bias in zip((self, out), weights, biases, strict=True):
            adapters = {}
            for name in active:
                adapter = _read_adapter(layer, name)
                if isinstance(adapter, str):
                    return adapter
                adapters[name] = adapter
            if reason := _why_not_dtypes(qkv, weight, adapters):
                return reason
            inner = autocast_of(query) or query.dtype
            w, a, b, scale, bias, _ = as_one_adapter(Operands(weight, bias, adapters, inner, inner))
            pairs.append(Projection(cast(Tensor, w), bias, a, b, scale))
        drop = attention.dropout if attention.training else 0.0
        heads = Heads(
            attention.num_heads,
            attention.batch_first,
            drop,
            attention.bias_k,
            attention.bias_v,
            attention.add_zero_attn,
        )
        return _Call(qkv, (pairs[0], self._as_counted(pairs[1])), heads, flags)

    def _as_counted(self, out: Projection) -> Projection:
        """Return the output projection with its update counted as often as PEFT does."""
        value, gradient = self._counted
        if value == gradient == 1.0 or out.a is None or out.b is None:
            return out
        # The value is A's or B's own, because their difference from themselves is 0; the gradient has the weight.
        a, b = (t if gradient == value else torch.lerp(t.detach(), t, gradient / value) for t in (out.a, out.b))
        return out._replace(a=a, b=b, scale=out.scale * value)

    unload_and_optionally_merge_module = peft_layer.MultiheadAttention.unload_and_optionally_merge_module

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as every fused layer does; in PEFT's own forward, which merges for autograd, as PEFT does."""
        if self._kept_in_forward is None:
            super().merge(safe_merge, adapter_names)
        else:
            self.peft_class.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Put the base of before `merge` back, bit for bit."""
        if self._kept_in_forward is None:
            super().unmerge()
            return
        for owner, name, parameter in self._kept_in_forward:
            owner.__dict__.pop(name, None)
            owner._parameters[name] = parameter
        self.note_merged([])

    def sums(self, names: Sequence[str]) -> Sequence[Sum]:
        """Return what merging the adapters `names` adds to both projections."""
        (attention, in_name), (linear, out_name) = self._places()
        out: Any = attention._modules[_OUT]
        terms: tuple[list[Term], list[Term]] = ([], [])
        for name in names:
            for layer, counts, into in zip((self, out), (1.0, self._counted.value), terms, strict=True):
                merged_terms.check_variant(layer, name)
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                into.append(merged_terms.product(a, b, counts * merged_terms.scale_of(layer, name), False))
        return [Sum(attention, in_name, terms[0]), Sum(linear, out_name, terms[1])]

    def note_merged(self, names: list[str]) -> None:
        """Take down that `names` are the merged adapters of both projections from now on."""
        super().note_merged(names)
        attention: Any = self._modules["base_layer"]
        attention._modules[_OUT].merged_adapters = list(names)

    def _restore_weights(self) -> None:
        """Register the weights where PEFT's forward has left plain tensors. PEFT makes new Parameters of them whenever
        the modules are listed, and the ones that were there would be lost to ties and optimisers."""
        if any(owner._parameters.get(name) is None for owner, name in self._places()):
            super()._restore_weights()

    def _places(self) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
        """Return the modules that have the weights of the two projections, and their names there."""
        attention: Any = self._modules["base_layer"]
        return (attention, "in_proj_weight"), (attention._modules[_OUT].get_base_layer(), "weight")

    def _forward_of_peft(self, query: Tensor, args: Any, kwargs: Any) -> Any:
        """Return the result of PEFT's forward. Where it merges and unmerges, the Parameters of before are put back."""
        if self.merged or self.disable_adapters:
            return self.peft_class.forward(self, query, *args, **kwargs)
        kept = [(owner, name, owner._parameters[name]) for owner, name in self._places()]
        if not torch.is_inference_mode_enabled():  # autograd cannot save what a forward of PEFT has made in that mode
            kept = [
                (owner, name, nn.Parameter(w.detach().clone(), w.requires_grad) if w.is_inference() else w)
                for owner, name, w in kept
                if w is not None
            ]
        self._kept_in_forward = kept
        try:
            return self.peft_class.forward(self, query, *args, **kwargs)
        finally:
            self._kept_in_forward = None

    @classmethod
    def why_not_forward(cls) -> str:
        """Return why PEFT's forward is not the one that this package knows, or "" where it is."""
        return known.why_not(cls.peft_class, _USES)

    @classmethod
    def inner(cls, layer: Any) -> Sequence[str]:
        """Return the name of the out_proj, whose weights the attention reads."""
        return (f"base_layer.{_OUT}",)

    @classmethod
    def survey(cls, layer: Any) -> Survey | str:
        """Return the sizes of both projections and the adapters of `layer`, or why its base cannot be read."""
        base = _read_base(layer)
        if isinstance(base, str):
            return base
        adapters = {name: (_read_adapter(layer, name), _read_adapter(base.out, name)) for name in layer.lora_A}
        reasons = {each: None for pair in adapters.values() for each in pair if isinstance(each, str)}
        calls = [
            serving.call_of_layer(weight, each)
            for pair in adapters.values()
            for weight, each in zip(base.weights, pair, strict=True)
            if not isinstance(each, str)
        ]
        E = base.attention.embed_dim
        text = f"{E}→{3 * E}, {E}→{E}, " + ", ".join(f"{name} r={layer.r[name]}" for name in layer.lora_A)
        if counted().value != 1.0:
            text += f" (the update of out_proj counts {counted().value:g} times, as with PEFT)"
        if any(isinstance(drop, nn.Dropout) for drop in layer.lora_dropout.values()):
            text += " (lora_dropout has no effect, as with PEFT)"
        return Survey(text, tuple(reasons), tuple(filter(None, calls)))

    def watched(self) -> Watched | None:
        """Return what a dry forward looks at in this layer; None for one that computes no adapter at present."""
        base = _read_base(self)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or self.disable_adapters or not active or isinstance(base, str):
            return None
        a = [cast(Tensor, self.lora_A[name].weight) for name in active]
        return Watched(self, list(base.weights), a, lambda: (self.fused_calls, dict(self.passed_over)))


def _read_base(layer: Any) -> _Base | str:
    """Return the attention that `layer` wraps, which may not be fused yet, or why no adapter can be fused with it."""
    attention = layer._modules["base_layer"]
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return f"its base is a {type(attention).__name__} with a forward of its own"
    out = attention._modules[_OUT]
    if not isinstance(out, peft_layer.Linear):
        return f"its out_proj is a {type(out).__name__}"
    if out.fan_in_fan_out:
        return "fan_in_fan_out, with which PEFT transposes the update of its out_proj"
    linear = out._modules["base_layer"]
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return f"its out_proj is a {type(linear).__name__} with a forward of its own"
    if not attention._qkv_same_embed_dim:
        return f"it has kdim={attention.kdim} and vdim={attention.vdim}"
    weights = attention.in_proj_weight, linear.weight
    for weight in weights:
        if type(weight) not in (nn.Parameter, Tensor):
            return f"a base weight is a {type(weight).__name__}"
        if weight.requires_grad:
            return "a base weight is trained"
    for module in (attention, out, linear):
        if reason := hooked.refusal("its base layer or out_proj", module):
            return reason
    return _Base(attention, out, weights, (attention.in_proj_bias, linear.bias))


def _read_adapter(layer: Any, name: str) -> PeftAdapter | str:
    """Return adapter `name` of the attention or its out_proj, without dropout, or why it cannot be fused."""
    if name not in layer.lora_A:
        return f"adapter {name!r} has no lora_A for the out_proj"
    if name in layer.lora_variant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    if hooked.converted(layer.lora_A[name]) or hooked.converted(layer.lora_B[name]):
        return f"adapter {name!r} has layerwise casting, and PEFT reads it as it is stored: leave adapters out of it"
    adapter = FusedLinear.read_adapter(layer, name)
    if isinstance(adapter, str):
        return adapter
    if adapter.b_bias is not None:
        return f"adapter {name!r} has lora_bias, which PEFT's forward of an attention leaves out"
    return adapter._replace(p=0.0)


def _arguments(
    query: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], Flags] | str:
    """Return query, key and value, and the other arguments of ``nn.MultiheadAttention.forward``, or why they are left
    to PEFT."""
    given = dict(zip(("key", "value", *Flags._fields), args, strict=False)) | dict(kwargs)
    key, value = given.pop("key", None), given.pop("value", None)
    if len(args) > 2 + len(Flags._fields) or not given.keys() <= set(Flags._fields):
        return "further arguments for the base layer"
    if not isinstance(key, Tensor) or not isinstance(value, Tensor):
        return "no key or value"
    if query.is_nested or key.is_nested or value.is_nested:
        return "nested tensors"
    return (query, key, value), Flags(**given)


def _why_not_dtypes(qkv: Sequence[Tensor], w: Tensor, adapters: Mapping[str, PeftAdapter]) -> str:
    """Return why the dtypes of x, W and the adapters cannot be served together, or "" where they can. PEFT converts
    s·B·A to W's dtype, whatever the adapters' is."""
    autocast, given = autocast_of(qkv[0]), qkv[0].dtype
    if any(x.dtype != given for x in qkv) or given not in check.DTYPES or w.dtype not in check.DTYPES:
        return f"query, key and value are {', '.join(str(x.dtype) for x in qkv)}, the base weight {w.dtype}"
    if given != w.dtype and not autocast:
        return f"x is {given}, the base weight {w.dtype}"
    for name, adapter in adapters.items():
        dtype = adapter.a.dtype
        if dtype not in (given, torch.float32) or (dtype == torch.float32 and given == torch.float64):
            return f"adapter {name!r} is {dtype} beside {given}"
    return ""
