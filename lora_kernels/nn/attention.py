"""`FusedLoRAMultiheadAttention`: an ``nn.MultiheadAttention`` with low-rank updates of its projections."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_kernels.nn import attention_merging, loading
from lora_kernels.nn.adapter import AdapterLayer, FilePart
from lora_kernels.nn.fit import has_hooks
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.ops.attention import Flags, Heads, Projection, multihead_attention

# torch.fx.symbolic_trace records a call of this function as one node.
torch.fx.wrap("multihead_attention")

_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "base_layer.out_proj.lora_A.weight": "lora_A_out",
    "base_layer.out_proj.lora_B.weight": "lora_B_out",
}
"""The keys of PEFT's file, and the parameters that hold their tensors."""

OUT_PROJ_COUNTED = 2
"""How often PEFT 0.19 to 0.21 add the update of out_proj, because they merge it twice: they compute W₂ + 2s·B₂·A₂."""
_COUNTED_TWICE = "base_layer.out_proj.lora_B.weight"
"""The tensor of PEFT's file that this concerns. The parameter here is twice that tensor, which is exact, so that both
compute the same."""


class FusedLoRAMultiheadAttention(AdapterLayer):
    """An ``nn.MultiheadAttention`` whose input and output projections have a low-rank update each:

        q, k, v = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ        y = o W₂ᵀ + bias₂ + s · (dropout(o) A₂ᵀ) B₂ᵀ

    W [3E, E] and W₂ [E, E] are frozen, and nothing is written into them. A and B of the input projection are one
    pair for q, k and v together, as in PEFT. It is called as an ``nn.MultiheadAttention`` is, with all of its masks and
    flags, and returns what that returns with the merged weights. It is no subclass of it, because code that looks for
    one may hand its weights to another function, past the adapter.

    `from_attention` makes it. kdim and vdim are not supported.

    Attributes:
        in_proj_weight: [3E, E], the frozen W, also while `merged`.
        in_proj_bias: [3E] or None.
        out_proj: the module that holds W₂ and bias₂, which are frozen.
        bias_k, bias_v: [1, 1, E] or None, frozen.
        lora_A, lora_B: [r, E] and [3E, r], parameters.
        lora_A_out, lora_B_out: [r, E] and [E, r], parameters.
        scaling: s, a float that may be changed at any time.
        embed_dim, kdim, vdim, num_heads, head_dim, dropout, batch_first, add_zero_attn: those of the module.

    ``state_dict`` holds the frozen weights under the names of ``nn.MultiheadAttention``, merged or not, and that of an
    ``nn.MultiheadAttention`` can be loaded; the adapter then keeps its values.
    """

    plain = (nn.MultiheadAttention,)

    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Linear
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A_out: nn.Parameter
    lora_B_out: nn.Parameter
    merged_in: Tensor | None
    """The merged weight of the input projection while merged. It is a buffer that state_dict leaves out."""
    merged_out: Tensor | None
    """The same of the output projection."""

    _qkv_same_embed_dim = False
    """nn.TransformerEncoderLayer then does not take its path for inference, which reads the weights of the attention
    and never calls it."""
    q_proj_weight = k_proj_weight = v_proj_weight = None

    @classmethod
    def from_attention(
        cls,
        attention: nn.MultiheadAttention,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> FusedLoRAMultiheadAttention:
        """Return a module over `attention`'s own weights, which are shared, not copied, and are frozen.

        Args:
            attention: the module to adapt.
            r: the rank of both updates, at least 1.
            lora_alpha: s = lora_alpha / r; with `use_rslora` lora_alpha / √r.
            lora_dropout: p in [0, 1): dropout on x and on o in the low-rank branches, while training. It is not the
                dropout of the attention, which stays as it is.
            use_rslora, adapter_dtype, backend: as for `FusedLoRALinear`.

        Raises:
            ValueError: r below 1, lora_dropout outside [0, 1), a lora_alpha that is not finite.
            TypeError: a module that is no nn.MultiheadAttention, or that has kdim, vdim, hooks, a parametrization or a
                forward of its own; an adapter_dtype that does not go with the weight's dtype.
        """
        settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora, False, adapter_dtype, backend)
        return cls.from_settings(attention, settings)

    @classmethod
    @torch.inference_mode(False)  # what is made in inference mode could not be trained later
    @torch.no_grad()
    def from_settings(cls, module: nn.MultiheadAttention, settings: LoRASettings) -> FusedLoRAMultiheadAttention:
        """Return what `from_attention` returns, for its keywords as one object. Raises ValueError for use_dora, `quant`
        and an `init` other than "kaiming" too, which are for linear layers."""
        settings.check()
        plain = {"use_dora": False, "quant": None, "init": "kaiming"}
        given = [f"{name}={value!r}" for name in plain if (value := getattr(settings, name)) != plain[name]]
        if given:
            raise ValueError(
                f"{', '.join(given)} is for linear layers: an nn.MultiheadAttention takes plain LoRA over dense "
                "weights, with init='kaiming'"
            )
        if reason := _why_not(module, in_place=False):
            raise TypeError(reason)
        return cls(module, settings)

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """Return why a fused attention cannot take the place of `module` in a model, or "" where it can."""
        return _why_not(module, in_place=True)

    def __init__(self, attention: nn.MultiheadAttention, settings: LoRASettings) -> None:
        super().__init__()
        self.training = attention.training
        E = self.embed_dim = self.kdim = self.vdim = attention.embed_dim
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
            self.register_parameter(name, cast("nn.Parameter | None", getattr(attention, name)))
        self.out_proj = attention.out_proj
        for p in self.parameters():
            p.requires_grad_(False)
        weight = self.in_proj_weight
        self.r, self.lora_alpha, self.lora_dropout = settings.r, settings.lora_alpha, settings.lora_dropout
        self.use_rslora, self.use_dora, self.backend = settings.use_rslora, False, settings.backend
        self.scaling = settings.scaling
        dtype, device = settings.dtype_beside(weight.dtype), weight.device
        shapes = {
            "lora_A": (self.r, E),
            "lora_B": (3 * E, self.r),
            "lora_A_out": (self.r, E),
            "lora_B_out": (E, self.r),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        for name in ("merged_in", "merged_out"):
            self.register_buffer(name, None, persistent=False)
        self.register_load_state_dict_post_hook(_merge_again)
        self.reset_adapter()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return y, and with `need_weights` the attention weights, as ``nn.MultiheadAttention.forward`` documents them.
        Raises what `lora_kernels.ops.attention.multihead_attention` raises."""
        p = self.lora_dropout if self.training else 0.0
        w_in, w_out, scale = self.in_proj_weight, self.out_proj.weight, self.scaling
        self.count_call(self.merged)
        if self.merged_in is not None and self.merged_out is not None:
            self._warn_of_training()
            inward = Projection(self.merged_in, self.in_proj_bias)
            outward = Projection(self.merged_out, self.out_proj.bias)
        else:
            inward = Projection(w_in, self.in_proj_bias, self.lora_A, self.lora_B, scale, p)
            outward = Projection(w_out, self.out_proj.bias, self.lora_A_out, self.lora_B_out, scale, p)
        drop = self.dropout if self.training else 0.0
        heads = Heads(self.num_heads, self.batch_first, drop, self.bias_k, self.bias_v, self.add_zero_attn)
        flags = Flags(key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return multihead_attention((query, key, value), inward, outward, heads, flags, self.backend)

    def _warn_of_training(self) -> None:
        if torch.compiler.is_compiling():
            return
        if self.training and self.lora_A.requires_grad and torch.is_grad_enabled():
            warnings.warn(
                f"this {type(self).__name__} is merged: its adapter gets no gradient until unmerge()", stacklevel=3
            )

    def reset_adapter(self) -> None:
        """Give the adapter its first values: A Kaiming-uniform(√5), B zero. A merged module is unmerged first."""
        self.unmerge()
        for a, b in ((self.lora_A, self.lora_B), (self.lora_A_out, self.lora_B_out)):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b)

    @property
    def merged(self) -> bool:
        """Whether a forward computes with merged weights."""
        return self.merged_in is not None

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, safe: bool = True) -> None:
        """Compute both merged weights W + s·B·A, in fp64 and rounded once, which forwards take from then on. The frozen
        weights stay as they are. Merging a merged module does nothing.

        Raises ValueError, with `safe`, for a result that is not finite; for weights that are parametrised, sharded or
        on the meta device. The module is then as it was.
        """
        if not self.merged:
            self.merged_in, self.merged_out = attention_merging.merged_weights(self, safe)

    def unmerge(self) -> None:
        """Compute with the frozen weights and the adapter again."""
        self.merged_in = self.merged_out = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def to_plain(self) -> nn.MultiheadAttention:
        """Return an ``nn.MultiheadAttention`` with the merged weights and copies of the biases. This module stays as it
        is. Raises what `merge` raises."""
        return attention_merging.plain_attention(self)

    @property
    def size(self) -> str:
        """The sizes of both projections, as reports show them."""
        E = self.embed_dim
        return f"{E} → {3 * E}, {E} → {E}"

    def file_parts(self) -> dict[str, FilePart]:
        """Return the tensors of the adapter in PEFT's file: A [r, E] and B [3E, r] of the input projection, and those
        of out_proj, [r, E] and [E, r]."""
        return {key: FilePart(name, tuple(self.get_parameter(name).shape)) for key, name in _PARTS.items()}

    def to_file(self, key: str, value: Tensor) -> Tensor:
        """Return the value of an own parameter for PEFT's file: half of `lora_B_out`, which PEFT counts twice."""
        return value / OUT_PROJ_COUNTED if key == _COUNTED_TWICE else value

    def from_file(self, key: str, value: Tensor) -> Tensor:
        """Return a value of PEFT's file as the own parameter that computes what PEFT computes with it."""
        return value * OUT_PROJ_COUNTED if key == _COUNTED_TWICE else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLoRAMultiheadAttention:
        """Move and convert every tensor with `fn`. Where `fn` gives memory that nobody has written, as
        ``Module.to_empty`` does, the adapter gets its first values."""
        emptied = self.lora_A.is_meta or getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        super()._apply(fn, recurse)
        if emptied and not self.lora_A.is_meta:
            self.reset_adapter()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing_keys, _, _ = rest  # nn.Module gives: metadata, strict, missing, unexpected, errors
        loading.check_rank(self, state_dict, prefix)
        self.__dict__["_was_merged"] = self.merged
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        keys = [prefix + name for name in _PARTS.values()]
        if not any(key in state_dict for key in keys):  # the state_dict of an nn.MultiheadAttention
            missing_keys[:] = [key for key in missing_keys if key not in keys]
            weight = self.in_proj_weight
            if self.lora_A.is_meta and not weight.is_meta:  # assign=True: the adapter has no values to keep
                loading.put_adapter_beside(self, weight.device)
                self.reset_adapter()

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows beside the modules inside."""
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, r={self.r}, scaling={self.scaling:g}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout:g}"
        if self.lora_A.dtype != self.in_proj_weight.dtype:
            text += f", adapter_dtype={self.lora_A.dtype}"
        if self.backend is not None:
            text += f", backend={self.backend!r}"
        return text + (", merged" if self.merged else "")


def _merge_again(module: nn.Module, _: Any) -> None:
    """Merge a module that was merged when its state_dict was loaded, once its children have loaded theirs too."""
    if module.__dict__.pop("_was_merged", False):
        cast(FusedLoRAMultiheadAttention, module).merge()


def _why_not(module: nn.Module, in_place: bool) -> str:
    """Return why `module` cannot be adapted, or "" where it can. With `in_place` the result takes its place in a model,
    whose own code expects exactly an nn.MultiheadAttention there."""
    kind = type(module)
    if not isinstance(module, nn.MultiheadAttention):
        return f"a {kind.__name__}, not an nn.MultiheadAttention"
    if kind is not nn.MultiheadAttention and (in_place or kind.forward is not nn.MultiheadAttention.forward):
        return f"a {kind.__name__}: a subclass of nn.MultiheadAttention may compute something else"
    if not module._qkv_same_embed_dim:
        return (
            f"it has kdim={module.kdim} and vdim={module.vdim} beside embed_dim={module.embed_dim}: PEFT takes neither"
        )
    out = module.out_proj
    if not isinstance(out, nn.Linear) or type(out).forward is not nn.Linear.forward:
        return f"its out_proj is a {type(out).__name__}, not an nn.Linear, or has an adapter"
    for owner, name in ((module, "in_proj_weight"), (out, "weight")):
        weight = owner._parameters.get(name)
        if type(weight) is not nn.Parameter:
            return f"its {name} is parametrised, pruned or a {type(getattr(owner, name)).__name__}: make it plain first"
        if not weight.is_floating_point():
            return f"its {name} is {weight.dtype}, quantised already"
    if has_hooks(module, out):
        return "it or its out_proj has hooks, which would be lost: remove them, and put them on the new module"
    return ""
