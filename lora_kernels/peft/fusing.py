"""`fuse` puts the LoRA linears of a PEFT model on the fused path.

PEFT's linears over dense weights (`lora_kernels.peft.linear`) and over bitsandbytes' weights of 4 and 8 bits
(`lora_kernels.peft.bnb`) are fused. PEFT's own forward serves what the kernels cannot: whole layers, which `FuseReport`
lists, and single calls, which a layer counts in ``passed_over``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Call
from lora_kernels.nn import dry_run, other_layers, readers
from lora_kernels.peft import groups as peft_groups
from lora_kernels.peft import hooked, kinds, merged_models
from lora_kernels.peft.groups import FAMILIES
from lora_kernels.peft.layer import FusedLayer

try:
    from peft.tuners.lora import LoraLayer

    from lora_kernels.peft.linear import FusedLinear
    from lora_kernels.peft.report import FuseReport
except ImportError as error:
    raise ImportError(
        f"fuse() and enable() work on models of PEFT, which cannot be imported ({error}): pip install peft. Plain "
        "PyTorch models take lora_kernels.apply_lora or FusedLoRALinear.from_linear"
    ) from error

__all__ = ["FuseReport", "FusedLinear", "fuse", "unfuse"]


def fuse(
    model: nn.Module,
    *,
    strict: bool = False,
    backend: str | None = None,
    group: bool | Sequence[Sequence[str]] = False,
    verify: Any = None,
) -> FuseReport:
    """Put every LoRA linear of a PEFT model on the fused path, and return a report.

    Call it after ``get_peft_model`` or ``from_pretrained``, and before wrapping or compiling the model. A second call
    also fuses layers that were added since the first.

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers inside.
        strict: whether to raise, with nothing changed, where a layer or an adapter cannot be fused, the model has no
            LoRA layer, names in `group` give no group, or `verify` could judge none of the layers.
        backend: the name of a back-end, which then serves every call or raises; None for the automatic choice.
        group: the layers that read the same x and are computed by one call, each with its own dropout mask. True stands
            for the names in `lora_kernels.peft.groups.FAMILIES` (q/k/v and gate/up of Llama, Qwen, Mistral, Gemma;
            query/key/value of BERT and ViT; to_q/to_k/to_v of diffusers, and others). Other models need names, such as
            ``[("query_proj", "key_proj")]``. A layer that is called with another x computes alone. So do layers inside
            torch.compile, and for tensors of inference mode. The layers of a group have bases of one kind: all dense,
            all in 4 bits or all in 8.
        verify: inputs of the model, with which `FuseReport.verify` is run at the end: a mapping of keywords, a tuple or
            list of arguments, or one argument. True stands for ``model.dummy_inputs``.

    Returns:
        A report of the layers that are fused, those that are not, and why. A fused layer still leaves to PEFT single
        calls that it cannot serve (see `FusedLinear.passed_over`). ``str()`` of the report also tells which of the
        fused layers have had no fused call since.

    A layer whose parent reads its weight instead of calling it is not fused, because neither this package nor PEFT can
    compute its adapter there. This is found in the source of the parent's forward, and `verify` finds it in every case.
    The path for inference of ``nn.TransformerEncoderLayer``, which does so, is switched off.

    Raises:
        RuntimeError: with `strict`, where a layer or an adapter cannot be fused, there is none, names in `group` give
            no group, or `verify` finds a layer that is not computed by its fused forward, or can judge none. The text
            holds the report, and names layers of other libraries with what to do about them.
        ValueError: for an unknown back-end, or names in `group` that the model does not have; nothing is changed. For
            `verify` as in `FuseReport.verify`, and whatever the forward raises; then no layer is fused that was not
            before, and those that were keep their groups and back-ends.
    """
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"there is no back-end {backend!r}: one of {', '.join(dispatch.BACKENDS)}, or None")
    families: Any = FAMILIES
    if group is not True:
        families = group or ()
        if not isinstance(families, str):  # iterators can be read only once
            families = [family if isinstance(family, str) else tuple(family) for family in families]
        peft_groups.check_families(model, families)
    inputs = None if verify is None or verify is False else dry_run.inputs_for(model, verify)
    found = look_at(model)
    fused, not_fused, layers = found.fused, found.not_fused, found.layers
    if strict and not fused and not not_fused:
        others = f"; it has {told}" if (told := other_layers.told(found.others)) else ""
        raise RuntimeError(f"fuse(strict=True) found no LoRA layer of PEFT in this model{others}")
    if strict and not_fused:
        raise RuntimeError(
            "fuse(strict=True) found LoRA layers that cannot be fused; nothing was changed.\n"
            f"{FuseReport(fused, not_fused, others=found.others)}"
        )
    new = [layer for layer, _ in layers.values() if not isinstance(layer, FusedLayer)]
    put_back = [layer.before_fuse() for layer, _ in layers.values() if isinstance(layer, FusedLayer)]
    reopen: Callable[[], None] | None = None
    try:
        for layer, kind in layers.values():
            _swap(layer, kind, backend)
        reopen = readers.close_fast_paths(model, FusedLayer)  # type: ignore[arg-type]
        groups = peft_groups.group(model, families)
        refs = {name: weakref.ref(layers[name][0]) for name in fused if name in layers}
        calls = tuple(found.calls)
        report = FuseReport(fused, not_fused, groups, calls, backend, refs, found.inner, found.others)
        if strict and group is not True and (alone := peft_groups.not_grouped(families, groups)):
            raise RuntimeError(f"fuse(strict=True, group=...) could not group {alone}")
        if inputs is None:
            return report
        if strict and not any(layer.watched() for layer, _ in layers.values()):
            raise RuntimeError(
                f"fuse(strict=True, verify=...) could judge none of the {len(layers)} LoRA layers: they have no "
                "adapter that is active and not merged. Call set_adapter, enable_adapter_layers or unmerge_adapter"
            )
        report = report.verified_with(model, inputs)
        if strict and report.not_fused:
            raise RuntimeError(f"fuse(strict=True, verify=...) found layers that have no fused forward.\n{report}")
    except BaseException:
        if reopen is not None:
            reopen()
        for layer in new:
            if isinstance(layer, FusedLayer):
                _unfuse_one(layer)
        for undo in put_back:
            undo()
        raise
    return report


class Found(NamedTuple):
    """What there is to fuse in a model."""

    fused: dict[str, str]
    """The layers that can be fused with every adapter: name → size and adapters."""
    not_fused: dict[str, str]
    """The layers that PEFT serves, all their adapters or some: name → reason."""
    layers: dict[str, tuple[Any, type[FusedLayer]]]
    """The layers that get a fused class, and this class."""
    inner: dict[str, str]
    """The layers that a layer around them computes: name → the name of that layer."""
    calls: list[Call]
    """The forwards of the layers, where the choice of a back-end depends on evidence."""
    others: dict[str, int]
    """The number of layers with adapters that are not LoRA of PEFT, by their class."""


def look_at(model: nn.Module) -> Found:
    """Return what `fuse` would do with each layer of `model`, and change nothing."""
    fused, not_fused, layers, calls = {}, {}, dict[str, tuple[Any, type[FusedLayer]]](), list[Call]()
    inner: dict[str, str] = {}
    layer: Any
    for path, layer in model.named_modules():
        if not is_peft_lora(layer):
            continue
        kind = kinds.fused_kind(type(layer), layer)
        if (outer := inner.get(path)) is not None:
            if outer in fused:
                fused[path] = f"computed by {outer}"
            else:
                not_fused[path] = f"computed by {outer}, which is not fused"
        if isinstance(kind, str):
            if outer is None:
                not_fused[path] = kind
            continue
        inner |= {f"{path}.{name}" if path else name: outer or path for name in kind.inner(layer)}
        if outer is not None:
            continue
        reading = readers.reading_in(model, path) if path else None
        passed = str(reading) if reading is not None and reading.always else ""
        with torch.no_grad():  # the report is about calls of evaluation; a layer counts what training leaves to PEFT
            survey = passed or _why_patched(layer, kind) or kind.survey(layer)
        if isinstance(survey, str):
            not_fused[path] = survey
            continue
        layers[path] = layer, kind
        if survey.reasons:
            not_fused[path] = "; ".join(survey.reasons)
        else:
            fused[path] = survey.text + (f"; but {reading}" if reading is not None else "")
            calls += survey.calls
    return Found(fused, not_fused, layers, inner, calls, other_layers.other_layers(model, is_peft_lora))


def is_peft_lora(module: nn.Module) -> bool:
    """Return whether `fuse` has something to say about a module: a layer of PEFT's LoRA or of a kind beside it."""
    return isinstance(module, LoraLayer) or kinds.is_known(type(module))


def unfuse(model: nn.Module) -> None:
    """Give every fused layer of `model` its PEFT class back, as it was before `fuse`. The path for inference of
    ``nn.TransformerEncoderLayer``, which passes over adapters, stays switched off. Raises ValueError, with nothing
    changed, while adapters are merged."""
    merged_models.refuse_merged(model)
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            _unfuse_one(layer)


def _unfuse_one(layer: Any) -> None:
    layer.leave("unfuse was called")
    for name in layer.own:
        del layer.__dict__[name]
    layer.__class__ = layer.peft_class
    _rebind(layer)


def _swap(layer: Any, kind: type[FusedLayer], backend: str | None) -> None:
    if not isinstance(layer, FusedLayer):
        layer.__class__ = kind
        layer.__dict__.update({name: make() for name, make in kind.own.items()})
        layer.prepare()
        _rebind(layer)
    layer.leave("fuse was called again")
    layer._backend = backend


def _why_patched(layer: Any, kind: type[FusedLayer]) -> str:
    """Return why calls of `layer` would not reach a fused forward; "" where they would. The hooks of accelerate
    and diffusers call the method that they have found on the layer before, which `_rebind` replaces."""
    if "forward" not in layer.__dict__:
        return ""
    slot = hooked.innermost(layer)
    what = slot if isinstance(slot, str) else "a forward of another class"
    if not isinstance(slot, str) and slot.forward.__func__ in (kind.forward, kind.peft_class.forward):
        return ""
    return (
        f"its forward is replaced on the instance ({what}), so that a fused forward would not be reached: call fuse "
        "before it is replaced, or delete it from the layer"
    )


def _rebind(layer: Any) -> None:
    """Make the hooks of accelerate and diffusers on `layer` call the forward of the layer's present class."""
    if "forward" in layer.__dict__ and not isinstance(slot := hooked.innermost(layer), str):
        slot.holder[slot.name] = type(layer).forward.__get__(layer)
