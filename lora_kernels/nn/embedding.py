"""`FusedLoRAEmbedding`: an embedding with a frozen table and a trained low-rank update, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.nn import embedding_fit, loading, merging
from lora_kernels.nn.adapter import FilePart
from lora_kernels.nn.replaced import ReplacedWeight
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.ops.dora_norm import ratio
from lora_kernels.ops.embedding import lora_embedding
from lora_kernels.ops.embedding_norm import column_norm
from lora_kernels.ops.embedding_passes import without_row

torch.fx.wrap("lora_embedding")  # torch.fx.symbolic_trace records a call of it as one node

_ADAPTER = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


class FusedLoRAEmbedding(ReplacedWeight):
    """y = e · (E[ids] + s · Aᵀ[ids] Bᵀ) with the table E frozen: what an ``nn.Embedding`` computes, and LoRA.

    It is called as an ``nn.Embedding`` is, and has its attributes, but is no subclass of it: code that looks for
    ``nn.Embedding``, such as ``resize_token_embeddings`` of transformers, would make another table and drop the
    adapter. It refuses this layer.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685). As in loralib and PEFT, A
    starts zero and B normal(0, 1), so a fresh module computes what its base computes.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as for ``nn.Embedding``. The row padding_idx is not
            adapted: it gets nothing from A, and gives it no gradient.
        r: the rank, at least 1.
        lora_alpha: s = lora_alpha / r; with `use_rslora` lora_alpha / √r (Kalajdzievski, 2023, arXiv:2312.03732).
        lora_dropout: has no effect, as in PEFT, whose files carry it: ids have nothing to drop.
        use_dora: weight-decomposed LoRA, y = e · d ⊙ (E[ids] + s · Aᵀ[ids] Bᵀ) with d = m / ‖E + s·Aᵀ Bᵀ‖ by columns.
            m starts as ‖E‖.
        adapter_dtype: the dtype of A, B and m. None is fp32 beside an fp16 or bf16 table, as in PEFT, and else the
            table's dtype.
        backend: None, or the name of a back-end. It has no effect, because an embedding is computed in one way only.

    Attributes:
        weight: [num_embeddings, embedding_dim], the frozen E, or the merged table while `merged`.
        lora_embedding_A: [num_embeddings, r], Aᵀ, a parameter: a row for each token. PEFT's files hold A.
        lora_embedding_B: [embedding_dim, r], B, a parameter.
        lora_magnitude_vector: [embedding_dim], DoRA's m, a parameter. It exists only with use_dora.
        embed_scale: e, the factor of the scaled embeddings of transformers (Gemma, BART, ...), or 1.
        scaling: s, a float that may be changed at any time.

    ``state_dict`` always holds the base table and the adapter, merged or not. The state_dict of an ``nn.Embedding`` can
    be loaded too, and A and B then keep their values.

    Raises:
        ValueError: r below 1, lora_dropout outside [0, 1), a lora_alpha that is not finite, an unknown back-end;
            loading an adapter of another rank.
        TypeError: an adapter_dtype that does not go with the table's dtype.
    """

    plain = (nn.Embedding,)

    embed_scale: float | Tensor
    lora_magnitude_vector: nn.Parameter
    _plain_kind: type[nn.Module] = nn.Embedding
    """The class of the layer in whose place this one stands."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend)
        embedding_fit.check(settings)
        super().__init__()
        base = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._put_over(base, settings)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> FusedLoRAEmbedding:
        """Return a module over `embedding`'s own table, which is shared, not copied, and is frozen.

        `embedding` is an ``nn.Embedding``, or one of the scaled embeddings of transformers, such as
        Gemma3TextScaledWordEmbedding.

        Raises:
            ValueError: as the constructor.
            TypeError: any other module; one with max_norm, scale_grad_by_freq or sparse gradients, or with hooks, a
                forward or a parametrization of its own; a table that is quantised or made of other tensors.
        """
        settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend)
        return cls.from_settings(embedding, settings)

    @classmethod
    @torch.inference_mode(False)  # what is made in inference mode could not be trained later
    @torch.no_grad()
    def from_settings(cls, module: nn.Embedding, settings: LoRASettings) -> FusedLoRAEmbedding:
        """Return what `from_embedding` returns, for its keywords as one object. Raises ValueError for settings.quant
        and settings.init too, which are for linear layers."""
        embedding_fit.check(settings)
        if reason := cls.why_not(module):
            raise TypeError(f"FusedLoRAEmbedding cannot stand in for this module: {reason}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._put_over(module, settings)
        return layer.train(module.training)

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """Return why a layer of this class cannot take the place of `module`, or "" where it can."""
        return embedding_fit.why_not(module)

    def _put_over(self, embedding: Any, settings: LoRASettings) -> None:
        """Take over the table of `embedding`, freeze it, and add the adapter with its first values."""
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx, self._plain_kind = embedding.padding_idx, type(embedding)
        self.r, self.lora_alpha, self.lora_dropout = settings.r, settings.lora_alpha, settings.lora_dropout
        self.use_rslora, self.use_dora, self.backend = settings.use_rslora, settings.use_dora, settings.backend
        self.scaling = settings.scaling
        weight = embedding.weight.requires_grad_(False)
        self.weight = weight
        embed_scale = getattr(embedding, "embed_scale", 1.0)
        self._scalar_embed_scale = getattr(embedding, "scalar_embed_scale", None)
        if isinstance(embed_scale, Tensor):  # a buffer, as it is in the models of Gemma
            self.register_buffer("embed_scale", embed_scale, persistent=False)
        else:
            self.embed_scale = embed_scale
        how: dict[str, Any] = {"dtype": settings.dtype_beside(weight.dtype), "device": weight.device}
        self.lora_embedding_A = nn.Parameter(torch.empty(self.num_embeddings, self.r, **how))
        self.lora_embedding_B = nn.Parameter(torch.empty(self.embedding_dim, self.r, **how))
        if self.use_dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty(self.embedding_dim, **how))
        self.reset_adapter()

    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., embedding_dim] for ids = `input`, of int64 or int32. Raises what `lora_embedding` raises."""
        weight = self.weight
        if self._base is not None:
            self._check_replaced()
            self.count_call(merged=True)
            y = F.embedding(input, weight)
            e = self.embed_scale
            return y * e.to(weight.dtype) if isinstance(e, Tensor) else y if e == 1 else y * e
        self.count_call()
        return lora_embedding(
            input,
            weight,
            self.lora_embedding_A,
            self.lora_embedding_B,
            scale=self.scaling,
            embed_scale=self.embed_scale,
            padding_idx=self.padding_idx,
            magnitude=self.lora_magnitude_vector if self.use_dora else None,
        )

    # --- first values ---

    def reset_parameters(self) -> None:
        """Give the table new values as nn.Embedding does, then the adapter. Frameworks call it after ``to_empty`` to
        materialise a model from the meta device."""
        self.unmerge()
        with torch.no_grad():
            nn.init.normal_(self.weight)
            if self.padding_idx is not None:
                self.weight[self.padding_idx].fill_(0)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Give the adapter its first values: A zero, B normal(0, 1), m = ‖E‖. A merged module is unmerged first."""
        self.unmerge()
        self._reset_adapter()
        if self.use_dora:
            self._reset_magnitude()

    def _reset_adapter(self) -> None:
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)
        if self.use_dora:  # E may have no values yet, and then neither has its norm
            nn.init.constant_(self.lora_magnitude_vector, math.nan)

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        self.lora_magnitude_vector.copy_(self._norm())

    def _norm(self) -> Tensor:
        a_t = without_row(self.lora_embedding_A.detach(), self.padding_idx)
        scale, m = float(self.scaling), self.lora_magnitude_vector
        return column_norm(self.weight, a_t, self.lora_embedding_B, scale, m)

    # --- merging ---

    def merge(self, safe: bool = True) -> None:
        """Put E + s·Aᵀ Bᵀ, or with DoRA d ⊙ that, into `weight`, computed in fp64 and rounded once. The base table
        stays in memory for `unmerge`.

        A table that other modules share, such as a tied output head, stays E for them: the head does not change, as it
        does where PEFT merges in place. Merging a merged module does nothing.

        Raises:
            ValueError: with `safe`, for a result that is not finite; for a table that is parametrised, sharded, on the
                meta device or offloaded. The module is then as it was.
        """
        super().merge(safe)

    @torch.inference_mode(False)
    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """Return a layer of the class that this one was made from, an ``nn.Embedding`` or a scaled embedding, with the
        adapter merged into its table. This module stays as it is. Raises what `merge` raises."""
        merged = self._copy_of_merged() if self.merged else self._merged_weight(safe=True)
        kind: Any = self._plain_kind
        with torch.device("meta"):
            plain = kind(self.num_embeddings, self.embedding_dim, self.padding_idx)
        plain.weight = nn.Parameter(merged)
        if kind is not nn.Embedding:
            plain.embed_scale = self.embed_scale
            if self._scalar_embed_scale is not None:
                plain.scalar_embed_scale = self._scalar_embed_scale
        return cast(nn.Module, plain.train(self.training))

    def _merged_weight(self, safe: bool) -> Tensor:
        merging.refuse_absent(self)
        merging.refuse_sharded(self, {"weight": self._shape, **self._adapter_shapes()})
        wide = merging.wide_dtype(self.weight.device)
        b, d = self.lora_embedding_B.detach().to(wide), None
        if self.use_dora:
            d = ratio(self.lora_magnitude_vector.detach(), self._norm()).to(wide)
            b = b * d[:, None]
        a_t = without_row(self.lora_embedding_A.detach(), self.padding_idx)

        def rows(block: slice) -> Tensor:
            return self.weight[block] if d is None else self.weight[block].to(wide) * d

        merged = merging.updated_weight(rows, b.t(), a_t, float(self.scaling), self.weight.dtype)
        if safe:
            merging.refuse_nonfinite(merged, self.scaling)
        return merged

    # --- sizes and files ---

    @property
    def _shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        V, D = self._shape
        shapes = dict(zip(_ADAPTER, ((V, self.r), (D, self.r), (D,)), strict=True))
        return shapes if self.use_dora else {name: shapes[name] for name in _ADAPTER[:2]}

    @property
    def size(self) -> str:
        """The size of the table, as reports show it."""
        return f"{self.num_embeddings} × {self.embedding_dim}"

    def file_parts(self) -> dict[str, FilePart]:
        """Return the tensors of the adapter in PEFT's file: A [r, num_embeddings], B [embedding_dim, r] and with DoRA m
        [embedding_dim]."""
        shapes = self._adapter_shapes()
        shapes["lora_embedding_A"] = self.r, self.num_embeddings
        return {name: FilePart(name, shape) for name, shape in shapes.items()}

    def to_file(self, key: str, value: Tensor) -> Tensor:
        """Return the value of an own parameter in the layout of PEFT's file, which holds A and not Aᵀ."""
        return value.t().contiguous() if key == "lora_embedding_A" else value

    def from_file(self, key: str, value: Tensor) -> Tensor:
        """Return a value of PEFT's file in the layout of the own parameter, which is Aᵀ for A."""
        return value.t().contiguous() if key == "lora_embedding_A" else value

    # --- nn.Module ---

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLoRAEmbedding:
        """Move and convert every tensor with `fn`. Where `fn` gives memory that nobody has written, as
        ``Module.to_empty`` does, the adapter gets its first values."""
        emptied = self.lora_embedding_A.is_meta or getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        super()._apply(fn, recurse)
        if emptied and not self.lora_embedding_A.is_meta:
            self._reset_adapter()
            if isinstance(self.embed_scale, Tensor) and self._scalar_embed_scale is not None:
                self.embed_scale.fill_(self._scalar_embed_scale)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing_keys, _, _ = rest  # nn.Module gives: metadata, strict, missing, unexpected, errors
        loading.check_rank(self, state_dict, prefix, dict.fromkeys(_ADAPTER[:2], 1))
        keys = [prefix + name for name in self._adapter_shapes()]
        plain = not any(key in state_dict for key in keys)  # the state_dict of an nn.Embedding, which has no adapter
        merged = self.merged
        self.unmerge()
        follows = self.use_dora and not self.weight.is_meta and self._magnitude_is_new(plain)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if plain:
            missing_keys[:] = [key for key in missing_keys if key not in keys]
            if self.lora_embedding_A.is_meta and not self.weight.is_meta:  # assign=True: the adapter has no values
                loading.put_adapter_beside(self, self.weight.device)
                self.reset_adapter()
        if follows and (plain or self._magnitude_is_new(False)):
            self._reset_magnitude()
        if merged:
            self.merge()

    def _magnitude_is_new(self, or_norm: bool) -> bool:
        """Return whether m is NaN, as it is after ``to_empty``, or with `or_norm` the norm."""
        m = self.lora_magnitude_vector
        return bool(m.isnan().all()) or (or_norm and torch.equal(m, self._norm()))

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows beside the shapes."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, r={self.r}, scaling={self.scaling:g}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.use_dora:
            text += ", use_dora=True"
        if self.lora_embedding_A.dtype != self.weight.dtype:
            text += f", adapter_dtype={self.lora_embedding_A.dtype}"
        return text + (", merged" if self.merged else "")
