"""`Projection`: the gradient of one B beside a frozen A, projected as LoRA-FA does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_kernels.models.pairs import EMBEDDING, Pair
from lora_kernels.nn.merging import wide_dtype


class _Place(NamedTuple):
    """Where a module holds a parameter, which other code may replace."""

    owner: nn.Module
    name: str

    @property
    def parameter(self) -> Any:
        return self.owner._parameters[self.name]

    @staticmethod
    def of(layer: nn.Module, parameter: Tensor) -> _Place:
        """Return the place of `parameter` in `layer` or in one of its children."""
        for owner in layer.modules():
            for name, held in owner._parameters.items():
                if held is parameter:
                    return _Place(owner, name)
        raise AssertionError("a pair's parameters are its layer's")


class Projection:
    """The frozen matrix of a pair (A; in an embedding B), and a hook on the gradient of the trained one."""

    def __init__(self, pair: Pair, project: bool) -> None:
        """Make the factor of a frozen matrix that has values. Raises ValueError for one without full rank, and for a
        scale of 0; nothing is changed then."""
        self.pair = pair
        self._project = project
        self._was_trained = pair.random_at_start.requires_grad
        self._frozen = _Place.of(pair.layer, pair.random_at_start)
        self._trained = _Place.of(pair.layer, pair.zero_at_start)
        self._inverse: Tensor | None = None
        """(A Aᵀ)⁻¹ [groups, R, R]. `_key` says of which values; a write through ``A.data`` leaves no trace there."""
        self._key: tuple[Any, ...] = ()
        self._handle: RemovableHandle | None = None
        if project and not pair.random_at_start.is_meta:
            if pair.scale == 0:
                raise ValueError(
                    f"s is 0 in {pair.name}, so that its B gets no gradient to project: set a scaling, or "
                    "call freeze_a(model, project=False)"
                )
            self._renew()

    @staticmethod
    def is_of(parameter: Tensor) -> bool:
        """Return whether the gradient of `parameter` is projected."""
        hooks: Any = parameter._backward_hooks or {}
        return any(isinstance(getattr(hook, "__self__", None), Projection) for hook in hooks.values())

    @property
    def frozen(self) -> nn.Parameter:
        """The frozen matrix, as the layer has it now."""
        return self._frozen.parameter  # type: ignore[no-any-return]

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 holds a part of the trained matrix here."""
        return hasattr(self._trained.parameter, "placements")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}  # the parameter of a copy has no hook

    def refuse_parallel(self) -> None:
        """Raise ValueError for a trained matrix of which a tensor parallel plan holds a part here."""
        if self._project:
            raise ValueError(
                f"B of {self.pair.name} is divided by a tensor parallel plan, and its gradient cannot be projected: "
                "call freeze_a(model, project=False)"
            )

    def hold(self) -> None:
        """Freeze the one matrix, and project the gradients of the other, as the layer has them now. Raises RuntimeError
        where the call has other tensors in place of the parameters, whose gradients would not be projected."""
        frozen, trained = self._frozen.parameter, self._trained.parameter
        if not (isinstance(frozen, nn.Parameter) and isinstance(trained, nn.Parameter)):
            if self._project and trained.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"the parameters of {self.pair.name} are replaced by tensors for this call "
                    "(torch.func.functional_call), whose gradients freeze_a does not project: call remove() of what it "
                    "returned first, or freeze_a(model, project=False)"
                )
            return  # they are the caller's, who says what is trained
        if frozen.requires_grad:
            frozen.requires_grad_(False)
            frozen.grad = None  # an optimiser would go on with it
        if frozen is not self.pair.random_at_start or trained is not self.pair.zero_at_start:
            a, b = (trained, frozen) if self.pair.kind == EMBEDDING else (frozen, trained)
            self.pair = replace(self.pair, a=a, b=b)  # the old ones are not kept in memory
        if self._project and not frozen.is_meta:
            if self._key_of(frozen) != self._key:
                self._renew()
            self.hook()

    def hook(self) -> None:
        """Project the gradients of the trained matrix that the layer has now, if it is whole."""
        trained = self._trained.parameter
        if not self._project or hasattr(trained, "placements") or not trained.requires_grad:
            return
        if self._handle is None or self._handle.id not in (trained._backward_hooks or {}):
            self._handle = trained.register_hook(self.projected)

    def release(self) -> None:
        """Remove the hook, and let the frozen matrix be trained if it was before."""
        if self._handle is not None:
            self._handle.remove()
        if self._was_trained:
            self._frozen.parameter.requires_grad_(True)

    def projected(self, grad: Tensor) -> Tensor:
        """Return g (A Aᵀ)⁻¹ / s² for a gradient g in the layout of the trained matrix, in its dtype."""
        scale = self.pair.scale
        if scale == 0:  # the gradient is zero
            return grad
        frozen = self._frozen.parameter
        of_a_shard = hasattr(self.pair.random_at_start, "placements")  # it is whole in the backward, and is not loaded
        if not of_a_shard and self._key_of(frozen) != self._key:
            self._renew()
        inverse = self._inverse
        assert inverse is not None
        if inverse.device != grad.device:
            inverse = self._inverse = inverse.to(grad.device)
        made = torch.empty_like(grad, memory_format=torch.contiguous_format)
        with torch.autocast(grad.device.type, enabled=False):
            self._rows_of_trained(made).copy_(self._rows_of_trained(grad).to(inverse.dtype) @ (inverse / scale**2))
        return made

    def _rows_of_trained(self, t: Tensor) -> Tensor:
        """Return t, in the layout of the trained matrix, as [groups, N, R]."""
        return self.pair.as_a(t).mT if self.pair.kind == EMBEDDING else self.pair.as_b(t)

    @staticmethod
    def _key_of(frozen: Tensor) -> tuple[Any, ...]:
        """Return what differs if the values of the frozen matrix do. It never equals itself for a tensor of inference
        mode, whose writes are not counted."""
        version = object() if frozen.is_inference() else frozen._version
        address = None if hasattr(frozen, "placements") else frozen.data_ptr()  # of another dtype, it lies elsewhere
        return id(frozen), address, frozen.dtype, version

    @torch.inference_mode(False)
    @torch.no_grad()
    def _renew(self) -> None:
        """Make `_inverse` from the frozen matrix that the layer has now."""
        frozen = self._frozen.parameter
        key = self._key_of(frozen)
        whole = frozen.full_tensor() if hasattr(frozen, "full_tensor") else frozen.detach()
        a = self.pair.as_b(whole).mT if self.pair.kind == EMBEDDING else self.pair.as_a(whole)
        a = a.to(wide_dtype(a.device))
        with torch.autocast(a.device.type, enabled=False):
            gram = a @ a.mT
            self._check_rank(gram, tuple(whole.shape))
            self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self._key = key

    def _check_rank(self, gram: Tensor, shape: tuple[int, ...]) -> None:
        """Raise ValueError where a matrix of `gram` [groups, R, R] has no inverse in the precision of gradients."""
        R = gram.shape[-1]
        if not gram.isfinite().all():
            rank = "values that are not finite"
        else:
            values = torch.linalg.eigvalsh(gram)
            kept = values > R * torch.finfo(torch.float32).eps * values[:, -1:].clamp_min(torch.finfo(gram.dtype).tiny)
            least = int(kept.sum(1).min())
            if least == R:
                return
            rank = f"a numerical rank of {least}, and r is {R}"
        which = "B" if self.pair.kind == EMBEDDING else "A"
        raise ValueError(
            f"{which} {shape} of {self.pair.name} has {rank}, so that the gradient beside it cannot be projected: give "
            f"it its first values (reset_adapter, or PEFT's reset_lora_parameters), choose a smaller r, or call "
            "freeze_a(model, project=False)"
        )
