"""What a user can do about each reason for which a layer, or a call of one, is left to PEFT's own forward.

A reason says what was found, with its values. A way out belongs to a kind of reason, so it is kept here, once for all
kinds of layers, and a report adds it once however many layers have the reason. Reasons that hold their own way out, as
those about hooks, need none here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_WAYS_OUT = (
    (r"weight is trained|its \S+ is trained", "freeze it with requires_grad_(False), or train it in full without LoRA"),
    (r"no kernel for", "build the extension (python -m lora_kernels doctor says how), or fuse(model, backend=...)"),
    (r"replaced by a function of|does not know$", "install a PEFT and a lora_kernels that know each other"),
    (r"forward of its own", "let the class inherit the forward of the class that it derives from"),
    (r"consists of|has a stride, padding or groups|not torch's own", "use modules of the classes that PEFT makes"),
    (r"may not be converted", "give the adapter x's dtype: model.to(dtype), or enable PEFT's cast of inputs"),
    (r"beside disabled or merged|merged adapters that are disabled", "unmerge_adapter() and enable the adapters first"),
    (r"other adapters active, merged or disabled", "call set_adapter on the whole model, so that both agree"),
    (r"further arguments|other arguments than", "call the layer with x alone; its base has to take care of the rest"),
    (r"active twice", "name every adapter once in set_adapter"),
    (r"activated LoRA|alora_offsets", "activate it alone, with one alora_offset for each sample of an x [B, T, K]"),
    (r"adapter_names", "call once for each adapter, or restrict the adapters to linear layers"),
    (r"DoRA adapter|several DoRA|is DoRA", "activate one DoRA adapter at a time, in fp32 or alone; or plain LoRA"),
    (r"several adapters", "activate one of them, or merge their files with lora_kernels.analysis.merge_adapters first"),
    (r"lora_bias", "lora_bias=False, or a computation in fp32"),
    (r"drops everything", "choose lora_dropout below 1"),
    (r"rank 0", "choose a rank of 1 or more"),
    (r" (is|are) on ", "bring x and the weights to one device"),
    (r"no lora_A|for \S+ experts|has r=", "make the adapter again with the installed PEFT"),
    (r" has \S+ in .* and \S+ in | is in |the stacks are",
     "give both matrices one dtype: layer.to(dtype)"),
    (r"another tuner's layer|computed by ", "fuse what is inside it, or apply one tuner to a layer"),
    (r"distributed by a tensor parallel plan", "leave it to PEFT, whose hooks gather it"),
    (r"quantised yet", "move the model to its device first, which quantises it"),
    (r"quantises its weight anew|has_fp16_weights", "load the model with has_fp16_weights=False"),
    (r"read before torch\.compile", "call fuse, or the model once, before torch.compile"),
    (r"cannot be read", "load the weight again with the installed version of the package that quantised it"),
    (r"fan_in_fan_out", "set fan_in_fan_out=False for layers of nn.Linear"),
    (r"not a plain linear|(is|has) an? [\w.]+$", "use LoRA, DoRA or another kind that docs/peft.md lists as fused"),
    (r"ids are", "give ids of int64 or int32"),
    (r"beside|x is torch|weight is torch|are torch|is torch", "bring x, the base weight and the adapter to dtypes that "
     "go together: one dtype for all, or fp32 adapters beside 16 bits, or autocast"),
    (r"kdim", "use an attention whose key and value have embed_dim features"),
    (r"no key or value|nested tensors", "give query, key and value as plain tensors"),
    (r"made in inference mode", "load or merge the weights outside of torch.inference_mode"),
    (r"needs more of the base", "plain LoRA over this base, or a base that lora_kernels reads: nf4, fp4, int8, dense"),
    (r"yet to cut the smallest", "call the model once"),
    (r"stored transposed|only those of", "adapt the stacks that docs/experts.md names"),
    (r"GraLoRA", "plain LoRA of the same rank, which is fused"),
    (r"not called", "call the layer instead of reading its weight"),
)  # fmt: skip
"""(a regular expression for a kind of reason, what can be done about it). The first that is found counts."""

_OWN = re.compile(r": (remove|put|move|use|make|leave|call|delete|start|an nn\.Dropout)\b|, or put them on")
"""What a reason with a way out of its own holds."""


def says_it_itself(reason: str) -> bool:
    """Return whether a reason holds its way out."""
    return _OWN.search(reason) is not None


def way_out(reason: str) -> str:
    """Return what can be done about a reason, "" where the reason says it itself or nothing is known."""
    if not reason or says_it_itself(reason):
        return ""
    return next((what for pattern, what in _WAYS_OUT if re.search(pattern, reason)), "")


def lines(reasons: Iterable[str]) -> list[str]:
    """Return the lines of a report that say what can be done about `reasons`, one for each kind."""
    found = dict.fromkeys(filter(None, map(way_out, reasons)))
    return [f"  what can be done: {what}" for what in found]
