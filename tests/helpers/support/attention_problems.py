"""Attentions with low-rank updates, and what ``nn.MultiheadAttention`` computes from their merged weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import FusedLoRAMultiheadAttention


def attention(E: int = 12, H: int = 3, *, r: int = 3, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    """Return a `FusedLoRAMultiheadAttention` whose updates are about as large as its weights. `kwargs` are those of
    ``nn.MultiheadAttention`` and of `from_attention`."""
    own = {"lora_alpha": r} | {
        key: kwargs.pop(key)
        for key in ("lora_dropout", "lora_alpha", "use_rslora", "adapter_dtype", "backend")
        if key in kwargs
    }
    made = FusedLoRAMultiheadAttention.from_attention(nn.MultiheadAttention(E, H, dtype=dtype, **kwargs), r=r, **own)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(0, 0.5 if "bias" in name else p.shape[-1] ** -0.5)
    return made


def masks(kind: str, B: int, H: int, L: int, S: int, dtype: torch.dtype) -> Tensor | None:
    """Return an attn_mask: "none", "bool2", "float2", "bool3", "float3" or "causal". No row is masked as a whole."""
    if kind == "none":
        return None
    if kind == "causal":
        return torch.ones(L, S).triu(1).bool()
    shape = (L, S) if kind.endswith("2") else (B * H, L, S)
    if kind.startswith("float"):
        return torch.randn(shape, dtype=dtype)
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def padding(kind: str, B: int, S: int, dtype: torch.dtype) -> Tensor | None:
    """Return a key_padding_mask: "none", "bool" or "float"."""
    if kind == "none":
        return None
    if kind == "float":
        return torch.randn(B, S, dtype=dtype)
    mask = torch.rand(B, S) < 0.4
    mask[:, 0] = False
    return mask


def from_merged(m: Any, qkv: tuple[Tensor, Tensor, Tensor], **flags: Any) -> tuple[Tensor, Tensor | None]:
    """Return what torch computes with the weights W + s·B·A, through which autograd reaches A and B. LoRA's dropout is
    left out, that of the attention is not."""
    batched = qkv[0].dim() == 3
    turn = m.batch_first and batched
    once = {id(x): x.transpose(0, 1) if turn else x for x in qkv}
    query, key, value = (once[id(x)] for x in qkv)
    flags = {"key_padding_mask": None, "need_weights": True, "attn_mask": None, "is_causal": False} | flags
    y, weights = F.multi_head_attention_forward(
        query,
        key,
        value,
        m.embed_dim,
        m.num_heads,
        m.in_proj_weight + m.scaling * m.lora_B @ m.lora_A,
        m.in_proj_bias,
        m.bias_k,
        m.bias_v,
        m.add_zero_attn,
        m.dropout,
        m.out_proj.weight + m.scaling * m.lora_B_out @ m.lora_A_out,
        m.out_proj.bias,
        m.training,
        **flags,
    )
    return y.transpose(0, 1) if turn else y, weights


def gradients(m: Any, inputs: tuple[Tensor, ...], y: Tensor, weights: Tensor | None) -> list[Tensor]:
    """Return the gradients of a sum over y and the weights, of the inputs and of everything in `m` that is trained."""
    total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    if weights is not None:
        total = total + weights.square().sum()
    wanted = [*dict.fromkeys(inputs), *(p for p in m.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
