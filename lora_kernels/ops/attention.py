"""`multihead_attention`: multi-head attention whose projections have low-rank updates, as ``nn.MultiheadAttention``
computes it from merged weights.

    q, k, v  = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ       W [3E, E], A [r, E], B [3E, r]
    o        = softmax(q kᵀ / √D + mask) v                 for each of the heads, of size D
    y        = o W₂ᵀ + bias₂ + s · (dropout(o) A₂ᵀ) B₂ᵀ   W₂ [E, E], A₂ [r, E], B₂ [E, r]

Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762). No merged weight is formed. Both projections are
`lora_linear`, which saves x, o and h only; ``scaled_dot_product_attention`` computes the middle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops.linear import lora_linear

# torch.fx.symbolic_trace records a call of this function as one node.
torch.fx.wrap("lora_linear")


class Projection(NamedTuple):
    """A projection and its low-rank update. Without `a` it is a plain linear layer."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float | Tensor = 1.0
    dropout_p: float = 0.0

    def part(self, start: int, stop: int) -> Projection:
        """Return the projection to the features from `start` to before `stop`."""
        bias, b = (t if t is None else t[start:stop] for t in (self.bias, self.b))
        return self._replace(weight=self.weight[start:stop], bias=bias, b=b)

    def __call__(self, x: Tensor, backend: str | None) -> Tensor:
        """Return the projection of x. Raises what `lora_linear` raises."""
        w, bias, a, b, scale, p = self
        if a is None or b is None:
            return F.linear(x, w, bias)
        return lora_linear(x, w, a, b, scale=scale, bias=bias, dropout_p=p, backend=backend)


class Heads(NamedTuple):
    """What an ``nn.MultiheadAttention`` has beside its projections."""

    num_heads: int
    batch_first: bool = False
    dropout_p: float = 0.0
    """The dropout of the attention itself, in this call."""
    bias_k: Tensor | None = None
    bias_v: Tensor | None = None
    add_zero_attn: bool = False


class Flags(NamedTuple):
    """The arguments of ``nn.MultiheadAttention.forward`` after query, key and value, in its order."""

    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


def multihead_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    inward: Projection,
    outward: Projection,
    heads: Heads,
    flags: Flags,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return what ``nn.MultiheadAttention`` returns for query, key and value = `qkv`: y and, with `need_weights`, the
    attention weights.

    Args:
        qkv: each [B, L, E] with `heads.batch_first`, else [L, B, E], or [L, E] unbatched. One projection computes those
            of the three that are the same tensor, with one dropout mask.
        inward: the projection to q, k and v, in this order: W [3E, E].
        outward: the output projection: W [E, E].
        heads: the rest of the module.
        flags: the masks, and what is returned. As in torch, `is_causal` is a hint that `attn_mask` is causal, and needs
            it; a row that is masked as a whole gives zeros, or NaN with `need_weights`; the weights that are returned
            have gone through the dropout.

    Raises:
        ValueError: nested tensors; sizes that do not fit; is_causal without attn_mask.
        RuntimeError: masks of other shapes. AssertionError: from torch, for masks that are neither bool nor floating.
    """
    query, key, value = qkv
    E = inward.weight.shape[1]
    _check(query, key, value, E, flags)
    batched = query.dim() == 3
    first = heads.batch_first or not batched
    q, k, v = (_heads(each, heads.num_heads, batched, first) for each in _project(query, key, value, inward, backend))
    mask, is_causal = _merged_mask(q, k, flags, query.dtype)
    k, v, mask = _longer(k, v, mask, heads)
    weights = None
    if flags.need_weights:
        o, weights = _with_weights(q, k, v, mask, heads.dropout_p)
        weights = weights.mean(1) if flags.average_attn_weights else weights
    else:
        o = F.scaled_dot_product_attention(q, k, v, mask, heads.dropout_p, is_causal)
    o = o.transpose(1, 2) if first else o.permute(2, 0, 1, 3)
    y = outward(o.reshape(*o.shape[:2], E), backend)
    if batched:
        return y, weights
    return y[0], None if weights is None else weights[0]


def _check(query: Tensor, key: Tensor, value: Tensor, E: int, flags: Flags) -> None:
    """Raise ValueError for operands that no attention of width E takes."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError(
            "an attention with an adapter takes no nested tensors. Pass padded tensors and key_padding_mask; if an "
            "nn.TransformerEncoder has made them, set its use_nested_tensor to False"
        )
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if (
        query.dim() not in (2, 3)
        or query.dim() != key.dim()
        or key.shape != value.shape
        or query.shape[-1] != E
        or key.shape[-1] != E
    ):
        raise ValueError(
            f"query, key and value must have {E} features in their last of 2 or 3 dimensions, and key the shape of "
            f"value; got {shapes}"
        )
    if flags.is_causal and flags.attn_mask is None:
        raise ValueError(
            "is_causal is a hint that attn_mask is causal, and needs attn_mask, as in nn.MultiheadAttention; "
            "nn.Transformer.generate_square_subsequent_mask makes one"
        )


def _project(
    query: Tensor, key: Tensor, value: Tensor, inward: Projection, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v [..., E], by one product for each group of inputs that are the same tensor."""
    E = inward.weight.shape[1]
    if query is key is value:
        q, k, v = inward(query, backend).unflatten(-1, (3, E)).unbind(-2)
    elif key is value:
        q = inward.part(0, E)(query, backend)
        k, v = inward.part(E, 3 * E)(key, backend).unflatten(-1, (2, E)).unbind(-2)
    else:
        q, k, v = (inward.part(i * E, (i + 1) * E)(x, backend) for i, x in enumerate((query, key, value)))
    return q, k, v


def _heads(x: Tensor, num_heads: int, batched: bool, batch_first: bool) -> Tensor:
    """Return x as [B, H, L, D], a view."""
    x = (x if batched else x.unsqueeze(0)).unflatten(-1, (num_heads, -1))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _merged_mask(q: Tensor, k: Tensor, flags: Flags, dtype: torch.dtype) -> tuple[Tensor | None, bool]:
    """Return what is added to the scores, broadcastable to [B, H, L, S] and of `dtype` where the masks are bool, and
    whether the attention is causal instead."""
    (B, H, L, _), S = q.shape, k.shape[2]
    padding, mask = flags.key_padding_mask, flags.attn_mask
    kind = None if mask is None else mask.dtype
    padding = F._canonical_mask(padding, "key_padding_mask", kind, "attn_mask", dtype)  # type: ignore[no-untyped-call]
    if flags.is_causal and padding is None and not flags.need_weights:
        return None, True
    mask = F._canonical_mask(mask, "attn_mask", None, "", dtype, False)  # type: ignore[no-untyped-call]
    if mask is not None:
        want = (L, S) if mask.dim() == 2 else (B * H, L, S)
        if mask.shape != want:
            raise RuntimeError(f"attn_mask must be {(L, S)} or {(B * H, L, S)}, got {tuple(mask.shape)}")
        mask = mask.view(1, 1, L, S) if mask.dim() == 2 else mask.view(B, H, L, S)
    if padding is not None:
        padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
        if padding.shape != (B, S):
            raise RuntimeError(f"key_padding_mask must be {(B, S)}, got {tuple(padding.shape)}")
        padding = padding.view(B, 1, 1, S)
        mask = padding if mask is None else mask + padding
    return mask, False


def _longer(k: Tensor, v: Tensor, mask: Tensor | None, heads: Heads) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return k, v and the mask with what bias_k, bias_v and add_zero_attn append to the sequence."""
    B, H, _, D = k.shape
    added = 0
    if heads.bias_k is not None and heads.bias_v is not None:
        extra = (t.view(1, H, 1, D).expand(B, -1, -1, -1) for t in (heads.bias_k, heads.bias_v))
        k, v = (torch.cat([x, each.to(x.dtype)], 2) for x, each in zip((k, v), extra, strict=True))
        added += 1
    if heads.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(B, H, 1, D)], 2) for x in (k, v))
        added += 1
    return k, v, F.pad(mask, (0, added)) if added and mask is not None else mask


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """Return o [B, H, L, D] and the attention weights [B, H, L, S], by the operators of torch's own module."""
    B, H, L, D = q.shape
    S = k.shape[2]
    q, k, v = (t.reshape(B * H, -1, D) for t in (q * math.sqrt(1.0 / D), k, v))
    if mask is None:
        scores = torch.bmm(q, k.mT)
    else:
        scores = torch.baddbmm(mask.expand(B, H, L, S).reshape(B * H, L, S), q, k.mT)
    weights = F.dropout(F.softmax(scores, -1), p) if p else F.softmax(scores, -1)
    return torch.bmm(weights, v).view(B, H, L, D), weights.view(B, H, L, S)
