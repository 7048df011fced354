"""`TiedLoRALinear`: an output head that shares its weight and its adapter with an embedding."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lora_kernels.nn.adapter import AdapterLayer, FilePart
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.settings import LoRASettings


class TiedLoRALinear(FusedLoRALinear):
    """y = x Eᵀ + bias + s · (dropout(x) B) A: the head over the table E [V, D] of an embedding, with the embedding's
    own adapter ΔE = s · Aᵀ Bᵀ, A [r, V] and B [D, r].

    So table and head stay one matrix in training, and can be merged into one. Both layers hold the very same
    Parameters, whose gradients are the sums of both. PEFT calls this ``ensure_weight_tying``; its file holds the
    adapter under both layers.

    Attributes:
        lora_A: [r, D], Bᵀ, a view of the parameter below.
        lora_B: [V, r], Aᵀ, the embedding's ``lora_embedding_A``.
        lora_embedding_B: [D, r], the embedding's parameter of this name.
    """

    @classmethod
    def over(cls, linear: nn.Linear, embedding: AdapterLayer, settings: LoRASettings) -> TiedLoRALinear:
        """Return a head over the weight of `linear` and the adapter of `embedding`, a `FusedLoRAEmbedding` without
        DoRA. Raises what `FusedLoRALinear.from_linear` raises."""
        layer: Any = FusedLoRALinear.from_settings(linear, settings)
        layer.__class__ = cls
        del layer._parameters["lora_A"]
        layer.lora_B = embedding.lora_embedding_A
        layer.lora_embedding_B = embedding.lora_embedding_B
        return layer  # type: ignore[no-any-return]

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """A of the head [r, D]."""
        return cast(Tensor, self.lora_embedding_B).t()

    def _reset_adapter(self) -> None:
        """Leave the adapter to the embedding, which gives it its first values."""

    def file_parts(self) -> dict[str, FilePart]:
        """Return the tensors of the adapter in PEFT's file: lora_A [r, D] and lora_B [V, r]."""
        return {
            "lora_A.weight": FilePart("lora_embedding_B", (self.r, self.in_features)),
            "lora_B.weight": FilePart("lora_B", (self.out_features, self.r)),
        }

    def to_file(self, key: str, value: Tensor) -> Tensor:
        """Return the value of an own parameter in the layout of PEFT's file."""
        return value.t().contiguous() if key == "lora_A.weight" else value

    def from_file(self, key: str, value: Tensor) -> Tensor:
        """Return a value of PEFT's file in the layout of the own parameter."""
        return value.t().contiguous() if key == "lora_A.weight" else value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing_keys, _, _ = rest  # nn.Module gives: metadata, strict, missing, unexpected, errors
        plain = prefix + "lora_B" not in state_dict
        if plain and self.lora_B.is_meta:
            raise ValueError(
                f"{prefix}lora_B is on the meta device and tied to the embedding's adapter, so it cannot be made here: "
                "load the plain model first, and call apply_lora(ensure_weight_tying=True) then"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if plain:
            missing_keys[:] = [key for key in missing_keys if key != prefix + "lora_embedding_B"]
