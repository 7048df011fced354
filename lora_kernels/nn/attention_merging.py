"""The merged weights of a `FusedLoRAMultiheadAttention`, and a plain ``nn.MultiheadAttention`` that has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_kernels.nn import merging


def merged_weights(module: Any, safe: bool) -> tuple[Tensor, Tensor]:
    """Return W + s·B·A [3E, E] of the input projection and that of the output projection, [E, E], computed in fp64 and
    rounded once. Raises ValueError where a weight is not here as a whole, or with `safe` for a result that is not
    finite."""
    for each in (module, module.out_proj):
        merging.refuse_absent(each)
    made = []
    for weight, a, b in (
        (module.in_proj_weight, module.lora_A, module.lora_B),
        (module.out_proj.weight, module.lora_A_out, module.lora_B_out),
    ):
        if weight.shape != (b.shape[0], a.shape[-1]) or any(hasattr(t, "placements") for t in (weight, a, b)):
            raise ValueError(
                f"a weight of this {type(module).__name__} is sharded, {type(weight).__name__} {tuple(weight.shape)}: "
                "nothing was changed. Merge a whole module that has loaded the full state"
            )
        merged = merging.updated_weight(weight.detach().__getitem__, a, b, float(module.scaling), weight.dtype)
        if safe:
            merging.refuse_nonfinite(merged, module.scaling)
        made.append(merged)
    return made[0], made[1]


def plain_attention(module: Any) -> nn.MultiheadAttention:
    """Return an ``nn.MultiheadAttention`` with the merged weights of `module` and copies of its biases."""
    if module.merged:
        weights = module.merged_in.clone(), module.merged_out.clone()
    else:
        weights = merged_weights(module, True)
    plain = nn.MultiheadAttention(
        module.embed_dim,
        module.num_heads,
        module.dropout,
        bias=module.in_proj_bias is not None,
        add_bias_kv=module.bias_k is not None,
        add_zero_attn=module.add_zero_attn,
        batch_first=module.batch_first,
        device="meta",
        dtype=module.in_proj_weight.dtype,
    )
    plain.in_proj_weight, plain.out_proj.weight = (nn.Parameter(w) for w in weights)
    for owner, source, name in (
        (plain, module, "in_proj_bias"),
        (plain.out_proj, module.out_proj, "bias"),
        (plain, module, "bias_k"),
        (plain, module, "bias_v"),
    ):
        value = getattr(source, name)
        if value is not None:
            setattr(owner, name, nn.Parameter(value.detach().clone()))
    return plain.train(module.training)
