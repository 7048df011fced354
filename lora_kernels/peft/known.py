"""Whether PEFT's own forward is one that the fused path may stand in for.

A fused layer computes the result of PEFT's forward without calling it. So the forward must be one that this package
knows: PEFT's own function, which uses only the attributes and functions that PEFT 0.19 to 0.21 use there. A newer PEFT
may use something new in it (a gate, another kind of variant, a hook), and another package may replace it. Such a layer
is left to PEFT, with the name of what is new. A change that uses nothing new is not noticed here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

_LORA_USES = """
VARIANT_KWARG_KEYS __base__ _cast_input_dtype _check_forward_args _mixed_batch_forward active_adapter active_adapters
adapter_names alora_offsets append base_layer clone disable_adapters dtype enumerate forward get is_autocast_enabled
keys lora_A lora_B lora_dropout lora_variant merged pop result scaling set to torch unmerge weight x
"""
_LORA = frozenset(_LORA_USES.split())
"""What PEFT's forwards of plain LoRA use. `lora_variant` holds the variants of LoRA, which a fused layer looks at."""

_DORA_USES = """
F Identity adapter_name base_layer base_result bias dequantize_module_weight detach dtype fan_in_fan_out get_base_layer
get_lora_weight get_weight_norm isinstance linear lora_A lora_B lora_dropout lora_magnitude_vector lora_weight nn
scaling to training transpose view weight
"""
_DORA = frozenset(_DORA_USES.split())
"""What the forwards of PEFT's DoRA use."""


_ALORA_USES = """
alora_offsets arange bool device dtype get int len long lora_A lora_B lora_dropout min scaling shape tensor to torch
unsqueeze view weight zeros
"""
_ALORA = frozenset(_ALORA_USES.split())
"""What the forward of PEFT's activated LoRA uses."""

_ATTENTION_USES = """
ValueError __class__ __name__ _check_forward_args active_adapters adapter_names base_layer disable_adapters dtype
get_base_layer lora_A merge merged out_proj to unmerge
"""
_ATTENTION = frozenset(_ATTENTION_USES.split())
"""What PEFT's forward of an nn.MultiheadAttention uses."""

_AROUND = _LORA | {"quant_linear_module"}
"""What PEFT's forwards over the layers of other packages use."""


def why_not_around(peft_class: type[Any]) -> str:
    """Return why the fused path may not stand in for the forward of `peft_class`, a LoRA layer of PEFT over a layer of
    another package, or "" where it may."""
    return _unknown(peft_class, "forward", _AROUND)


_EMBEDDING_USES = """
F T VARIANT_KWARG_KEYS __base__ _check_forward_args _embed _get_embed_scale _mixed_batch_forward active_adapter
active_adapters adapter_names append base_layer disable_adapters dtype embedding enumerate forward get get_base_layer
input_fn input_fns keys lora_embedding_A lora_embedding_B lora_variant max_norm merged norm_type output_fn output_fns
padding_idx pop result scale_grad_by_freq scaling set sparse to unmerge x
"""
_EMBEDDING = frozenset(_EMBEDDING_USES.split())
"""What PEFT's forwards of an embedding with plain LoRA use."""

_DORA_EMBEDDING_USES = """
T _embed _get_embed_scale adapter_name base_layer detach dtype embed_fn get_base_layer get_lora_weight get_weight_norm
lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector lora_weight scaling to weight
"""
_DORA_EMBEDDING = frozenset(_DORA_EMBEDDING_USES.split())
"""What the forwards of PEFT's DoRA over an embedding use."""


_PARAMETER_USES = """
ALLOWED_COMPUTE_DTYPES Linear UPCAST_DTYPES ValueError _LoraFactorsProxy _LoraParameterProxy __class__ __name__
_activate_lora _check_forward_args _did_swap_in_out_features _remove_parametrizations active_adapters adapter_names any
base_layer cached device disable_adapters dtype einsum get_base_layer get_delta_factors get_delta_weight get_param
getattr len lora_A lora_B merged nn num_experts original parameter_name parametrizations parametrize pop
register_parametrization requires_grad requires_grad_ reshape scaling shape to torch unmerge utils weight
"""
_PARAMETER = frozenset(_PARAMETER_USES.split())
"""What PEFT's wrapper of a parameter uses in a forward."""


def why_not_lora(peft_class: type[Any]) -> str:
    """Return why the fused path may not stand in for the forward of `peft_class`, a LoRA linear of PEFT, or "" where it
    may."""
    return _unknown(peft_class, "forward", _LORA) or _unknown(peft_class, "_mixed_batch_forward", _LORA)


def why_not_dora(variant: type[Any], magnitude: type[Any]) -> str:
    """Return why the fused path may not stand in for DoRA, which PEFT's class `variant` computes with a `magnitude`, or
    "" where it may."""
    return _unknown(variant, "forward", _DORA) or _unknown(magnitude, "forward", _DORA)


def why_not_alora(variant: type[Any]) -> str:
    """Return why the fused path may not stand in for activated LoRA, which PEFT's class `variant` computes, or "" where
    it may."""
    return _unknown(variant, "forward", _ALORA)


def why_not(owner: type[Any], uses: str) -> str:
    """Return why the fused path may not stand in for the forward of PEFT's class `owner`, or "" where it may. `uses`
    holds the names that the forward is known to use, between spaces."""
    return _unknown(owner, "forward", frozenset(uses.split()))


def why_not_embedding(peft_class: type[Any]) -> str:
    """Return why the fused path may not stand in for the forward of `peft_class`, PEFT's embedding with LoRA, or ""
    where it may."""
    names = "forward", "_mixed_batch_forward", "_embed"
    return next(filter(None, (_unknown(peft_class, name, _EMBEDDING) for name in names)), "")


def why_not_dora_embedding(variant: type[Any], magnitude: type[Any]) -> str:
    """Return why the fused path may not stand in for DoRA over an embedding, which PEFT's class `variant` computes with
    a `magnitude`, or "" where it may."""
    return _unknown(variant, "forward", _DORA_EMBEDDING) or _unknown(magnitude, "forward", _DORA_EMBEDDING)


def why_not_attention(peft_class: type[Any]) -> str:
    """Return why the fused path may not stand in for the forward of `peft_class`, PEFT's LoRA over an
    nn.MultiheadAttention, or "" where it may."""
    return _unknown(peft_class, "forward", _ATTENTION)


def why_not_parameter(wrapper: type[Any]) -> str:
    """Return why the fused path may not stand in for the forward of PEFT's class `wrapper`, which adapts a parameter,
    or "" where it may."""
    names = ("forward", "_activate_lora", "get_delta_weight")
    return next(filter(None, (_unknown(wrapper, name, _PARAMETER) for name in names)), "")


def _unknown(owner: type[Any], name: str, known: frozenset[str]) -> str:
    function = getattr(owner, name)
    made_by = function.__globals__.get("__name__") if isinstance(function, FunctionType) else ""
    if made_by == "contextlib":  # of @contextmanager
        function = getattr(function, "__wrapped__", function)
    what = f"PEFT's {owner.__name__}.{name}"
    home = function.__globals__.get("__name__", "") if isinstance(function, FunctionType) else type(function).__module__
    if home.partition(".")[0] != "peft":
        return f"{what} has been replaced by a function of {home}"
    if new := _new(function.__code__, known):
        return f"{what} uses {', '.join(new)}, which this version of lora_kernels does not know"
    return ""


@functools.cache  # a model has hundreds of layers of one class, and a code object never changes
def _new(code: CodeType, known: frozenset[str]) -> list[str]:
    return sorted(set(_used(code)) - known)


def _used(code: CodeType) -> Iterator[str]:
    """Yield the attributes, global names, keywords and names in strings that a function uses."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _used(constant)
        for text in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(text, str) and text.isidentifier():
                yield text
