"""`fuse` puts the LoRA linears of a PEFT model on the fused path; `enable` does so for every model that PEFT builds.

PEFT's linears over dense weights (`lora_kernels.peft.linear`) and over bitsandbytes' weights of 4 and 8 bits
(`lora_kernels.peft.bnb`) are fused. PEFT's own forward serves what the kernels cannot: whole layers, which `FuseReport`
lists, and single calls, which a layer counts in ``passed_over``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Call
from lora_kernels.peft import groups as peft_groups
from lora_kernels.peft import serving
from lora_kernels.peft.groups import FAMILIES
from lora_kernels.peft.shared import SharedInput

try:
    from peft.tuners.lora import LoraLayer, LoraModel

    from lora_kernels.peft.linear import Fused, FusedLinear
except ImportError as error:
    raise ImportError(
        f"fuse() and enable() work on models of PEFT, which cannot be imported ({error}): pip install peft. Plain "
        "PyTorch models take lora_kernels.apply_lora or FusedLoRALinear.from_linear"
    ) from error

__all__ = ["FuseReport", "FusedLinear", "disable", "enable", "fuse", "unfuse"]


def _fused_kind(kind: type) -> type[Fused] | None:
    """Return the fused class that replaces PEFT's class `kind`, or None where there is none. A fused `kind` is returned
    itself."""
    if issubclass(kind, Fused):
        return kind
    if kind.__module__ == "peft.tuners.lora.bnb":  # PEFT has it only beside bitsandbytes
        from lora_kernels.peft import bnb as peft_bnb

        return peft_bnb.KINDS.get(kind)
    return FusedLinear if kind is FusedLinear.peft_class else None


@dataclass(frozen=True)
class FuseReport:
    """The result of `fuse`. ``str()`` of it is a table."""

    fused: dict[str, str]
    """The modules of which every adapter is on the fused path: name → size and adapters."""
    not_fused: dict[str, str]
    """The modules of which PEFT's own forward serves at least one adapter: name → reason."""
    groups: dict[str, SharedInput] = field(default_factory=dict)
    """The groups that ``fuse(group=...)`` has made: name of a module → its children that one call computes."""
    calls: tuple[Call, ...] = ()
    """The forwards of the fused layers, where the choice of a back-end depends on evidence about the device."""
    backend: str | None = None
    """The back-end that `fuse` was asked for."""

    def __str__(self) -> str:
        rows = [(name, "fused", what) for name, what in self.fused.items()]
        rows += [(name, "not fused", why) for name, why in self.not_fused.items()]
        head = f"{len(self.fused)} of {len(rows)} LoRA layers fused"
        if not rows:
            return f"{head}: the model has none"
        rows += [(name, "grouped", str(group)) for name, group in self.groups.items()]
        width = max(len(name) for name, _, _ in rows)
        lines = [head, *(f"  {name:{width}}  {state:9}  {what}" for name, state, what in rows)]
        return "\n".join([*lines, *filter(None, [serving.line(self.calls, self.backend)])])


def fuse(
    model: nn.Module,
    *,
    strict: bool = False,
    backend: str | None = None,
    group: bool | Sequence[Sequence[str]] = False,
) -> FuseReport:
    """Put every LoRA linear of a PEFT model on the fused path, and return a report.

    Call it after ``get_peft_model`` or ``from_pretrained``, and before wrapping or compiling the model. A second call
    also fuses layers that were added since the first.

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers inside.
        strict: whether to raise, with nothing changed, where a layer or an adapter cannot be fused.
        backend: the name of a back-end, which then serves every call or raises; None for the automatic choice.
        group: the layers that read the same x and are computed by one call, each with its own dropout mask. True stands
            for the names in `lora_kernels.peft.groups.FAMILIES` (q/k/v and gate/up of Llama, Qwen, Mistral, Gemma;
            query/key/value of BERT and ViT). Other models need names, such as ``[("wq", "wk", "wv")]``. A layer that
            is called with another x computes alone. So do layers inside torch.compile, and for tensors of inference
            mode. Layers over bitsandbytes' weights are not grouped.

    Returns:
        A report of the layers that are fused, those that are not, and why. A fused layer still leaves to PEFT single
        calls that it cannot serve (see `FusedLinear.passed_over`).

    Raises:
        RuntimeError: with `strict`, where a layer or an adapter cannot be fused. The text holds the report.
        ValueError: for an unknown back-end, or names in `group` that the model does not have; nothing is changed.
    """
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"there is no back-end {backend!r}: one of {', '.join(dispatch.BACKENDS)}, or None")
    families = FAMILIES if group is True else group or ()
    if families is not FAMILIES:
        peft_groups.check_families(model, families)
    fused, not_fused, layers, calls = {}, {}, [], list[Call]()
    layer: Any
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        kind = _fused_kind(type(layer))
        if kind is None:
            where = type(layer).__module__.removeprefix("peft.tuners.")
            not_fused[path] = f"a {where}.{type(layer).__name__}, not a plain linear"
            continue
        base = kind.read_base(layer)
        if isinstance(base, str):
            not_fused[path] = base
            continue
        layers.append((layer, kind))
        adapters = [kind.read_adapter(layer, name) for name in layer.lora_A]
        reasons = [why for why in adapters if isinstance(why, str)]
        if reasons:
            not_fused[path] = "; ".join(reasons)
        else:
            ranks = ", ".join(f"{name} r={layer.r[name]}" for name in layer.lora_A)
            fused[path] = f"{layer.in_features}→{layer.out_features}{kind.base_note(layer)}, {ranks}"
            found = [serving.call_of_layer(base[0], each) for each in adapters if not isinstance(each, str)]
            calls += filter(None, found)
    if strict and not_fused:
        raise RuntimeError(
            "fuse(strict=True) found LoRA layers that cannot be fused; nothing was changed.\n"
            f"{FuseReport(fused, not_fused)}"
        )
    for layer, kind in layers:
        _swap(layer, kind, backend)
    return FuseReport(fused, not_fused, peft_groups.group(model, FusedLinear, families), tuple(calls), backend)


def unfuse(model: nn.Module) -> None:
    """Give every fused layer of `model` its PEFT class back, as it was before `fuse`."""
    for layer in model.modules():
        if isinstance(layer, Fused):
            _leave_group(layer, "unfuse was called")
            for name in layer.own:
                del layer.__dict__[name]
            layer.__class__ = layer.peft_class  # type: ignore[assignment]


def _swap(layer: Any, kind: type[Fused], backend: str | None) -> None:
    if not isinstance(layer, Fused):
        layer.__class__ = kind
        layer.__dict__.update({name: make() for name, make in kind.own.items()})
        layer.prepare()
    _leave_group(layer, "fuse was called again")
    layer._backend = backend


def _leave_group(layer: Any, reason: str) -> None:
    if layer._group is not None:
        layer._group.leave(layer, reason)


_create = LoraModel.__dict__["_create_new_module"]


def _create_fused(*args: Any, **kwargs: Any) -> Any:
    module = _create.__func__(*args, **kwargs)
    # Base and adapter are not checked here. They may still change, and every forward checks them.
    if kind := _fused_kind(type(module)):
        _swap(module, kind, None)
    return module


def enable() -> None:
    """Fuse every LoRA linear that PEFT makes from now on, until `disable`.

    It is for code that builds the PEFT model itself, such as TRL's trainers. Calling it twice does no more than once.
    """
    LoraModel._create_new_module = staticmethod(_create_fused)  # type: ignore[method-assign]


def disable() -> None:
    """Undo `enable`: layers that PEFT makes from now on are not fused. Fused layers stay fused until `unfuse`."""
    LoraModel._create_new_module = _create  # type: ignore[method-assign]
