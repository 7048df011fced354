"""`SharedFactors`: the A and B of VeRA and Tied-LoRA, which all adapted layers of a model have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn import loading

NAME = "lora_shared"
"""The name under which a model holds them."""


class SharedFactors(nn.Module):
    """A [r, K_max] and B [N_max, r], whose first columns and rows the layers of a model take.

    A model holds them once, as its child ``lora_shared``, and the layers refer to that child. So ``state_dict``, files
    and the counts of parameters have them once, and moving the model moves them. An ``nn.Sequential``, whose children
    are the steps of its forward, holds them in its first adapted layer.

    Args:
        r: the rank, at least 1.
        in_features, out_features: K_max and N_max.
        key: the number from which A and B are drawn, as PEFT does for VeRA: with a generator of a CPU, A and then B,
            uniform in ±√(6 / fan_in). The same key gives the same values on every machine and rank. None draws from
            torch's global generator as LoRA does, Kaiming-uniform(√5).
        train_a, train_b: whether A and B are trained.
        zero: "A" or "B" starts as zeros; None, neither.
        save_projection: whether files hold A and B. Otherwise a reader draws them from `key`.
        device, dtype: of A and B; fp32 by default.

    Attributes:
        lora_A: [r, K_max], a parameter.
        lora_B: [N_max, r], a parameter.
        key, save_projection: the arguments of these names.

    Raises ValueError for sizes below 1 or a key that is no integer in [0, 2⁶³).
    """

    @torch.inference_mode(False)  # what is made in inference mode could not be trained later
    def __init__(
        self,
        r: int,
        in_features: int,
        out_features: int,
        *,
        key: int | None = 0,
        train_a: bool = False,
        train_b: bool = False,
        zero: str | None = None,
        save_projection: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"r": r, "in_features": in_features, "out_features": out_features}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        if key is not None and (not isinstance(key, int) or isinstance(key, bool) or not 0 <= key < 1 << 63):
            raise ValueError(f"key must be an integer in [0, 2**63) or None, got {key!r}")
        self.r, self.in_features, self.out_features = r, in_features, out_features
        self.key, self.zero, self.save_projection = key, zero, save_projection
        dtype = dtype or torch.float32
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=device), train_a)
        self.lora_B = nn.Parameter(torch.empty(out_features, r, dtype=dtype, device=device), train_b)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give A and B their first values. Frameworks call it after ``to_empty``."""
        if self.key is None:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        elif not self.lora_A.is_meta:
            a, b = drawn(self.key, self.r, self.in_features, self.out_features)
            self.lora_A.copy_(a)
            self.lora_B.copy_(b)
        if self.zero is not None:
            nn.init.zeros_(self.lora_A if self.zero == "A" else self.lora_B)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError: the layers compute with the factors."""
        raise TypeError("SharedFactors are no step of a model: the layers that share them compute with them")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedFactors:
        emptied = self.lora_A.is_meta or getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        super()._apply(fn, recurse)
        if emptied and not self.lora_A.is_meta:
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing_keys, _, _ = rest  # nn.Module gives: metadata, strict, missing, unexpected, errors
        loading.check_rank(self, state_dict, prefix)
        keys = [prefix + "lora_A", prefix + "lora_B"]
        plain = not any(key in state_dict for key in keys)  # the state of the model without adapters
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if plain:
            missing_keys[:] = [key for key in missing_keys if key not in keys]

    def extra_repr(self) -> str:
        """Return the sizes that ``repr`` shows."""
        drawn_from = "" if self.key is None else f", key={self.key}"
        trained = "".join(f", train_{n}=True" for n, p in (("a", self.lora_A), ("b", self.lora_B)) if p.requires_grad)
        return f"r={self.r}, in_features={self.in_features}, out_features={self.out_features}{drawn_from}{trained}"


def drawn(key: int, r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Return VeRA's A [r, in_features] and B [out_features, r] for a key, in fp32 on the CPU, with PEFT's bits."""
    generator = torch.Generator("cpu").manual_seed(key)
    made = []
    for shape, fan_in in (((r, in_features), in_features), ((out_features, r), r)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in))  # in this order, for PEFT's last bit
        with torch.inference_mode(False), torch.no_grad():
            values = torch.empty(shape, dtype=torch.float32, device="cpu")
            made.append(values.uniform_(-bound, bound, generator=generator))
    return made[0], made[1]


def placed(model: nn.Module, factors: SharedFactors, first: nn.Module) -> None:
    """Make `factors` a child of `model`, or of `first`, its first adapted layer, where the children of `model` are what
    it computes or holds one by one."""
    home = first if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) else model
    home.add_module(NAME, factors)


def removed(model: nn.Module) -> None:
    """Take the factors out of `model`, whose layers no longer need them."""
    for module in list(model.modules()):
        if isinstance(module._modules.get(NAME), SharedFactors):
            del module._modules[NAME]


def factors_of(model: nn.Module) -> list[SharedFactors]:
    """Return the factors that `model` holds, each once."""
    return [module for module in model.modules() if isinstance(module, SharedFactors)]
