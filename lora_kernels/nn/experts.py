"""`FusedLoRAExperts`: the experts of a mixture-of-experts layer, with a trained low-rank update for each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_kernels.nn import experts_form, experts_forward, experts_merging, loading, merging, offload
from lora_kernels.nn.adapter import AdapterLayer, FilePart
from lora_kernels.nn.experts_forward import StackAdapter
from lora_kernels.nn.settings import LoRASettings

_OF_MODULE = frozenset(nn.Module().__dict__)
"""The attributes that every nn.Module has."""


class FusedLoRAExperts(AdapterLayer):
    """The experts of a layer of transformers, and LoRA: each expert e has the frozen weights and the activation that
    it had, and an adapter of its own beside one of its two weights or both.

        W_e x   becomes   W_e x + s · B_e (A_e dropout(x))

    It takes the place of an experts module of transformers 5 (Qwen3-MoE, Mixtral, gpt-oss, DeepSeek, OLMoE and every
    other whose class has the decorator ``use_experts_implementation``), is called as that is, and keeps its parameters
    and attributes. Make one with `from_experts`. The router lies outside of it, and stays as it is.

    A starts Kaiming-uniform(√5) and B zero, so a fresh module computes what its base computes. PEFT adapts the same
    parameters with ``target_parameters``; files are interchangeable. PEFT refuses dropout there; here each of the two
    weights has a mask of its own over the rows of its experts.

    Attributes:
        gate_up_proj (or up_proj), down_proj, and their biases: the frozen stacks, as transformers stores them.
        target_parameters: the names of the stacks that have an adapter, in the order of the module's parameters.
        lora_A_<stack>: [E, r, K], A of each expert, a parameter.
        lora_B_<stack>: [E, N, r], B of each expert, a parameter.
        scaling: s, a float that may be changed at any time.
        merged: whether the stacks hold W + s·B·A at present.

    ``state_dict`` always holds the base weights and the adapter, merged or not. The state_dict of the plain module can
    be loaded too; A and B then keep their values.
    """

    experts_class: type[Any]
    """The class of the plain module."""
    target_parameters: tuple[str, ...]
    plain_attributes: tuple[str, ...]
    """The names of the attributes that the plain module has."""
    num_experts: int
    _base: dict[str, nn.Parameter]
    """The base stacks while merged, else nothing. They stand neither with the parameters nor with the buffers, because
    `state_dict` holds them under the names of the merged ones."""
    _merged_as: dict[str, Tensor | None]
    """The merged stacks that `merge` has put in, or those in their place that have been found not to be the base."""

    @classmethod
    def from_experts(
        cls,
        module: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        parameters: Sequence[str] | None = None,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> FusedLoRAExperts:
        """Return a module over the parameters of `module`, an experts module of transformers. They are shared, not
        copied, and are frozen.

        `parameters` names the stacks that get an adapter, "gate_up_proj" and "down_proj" for example; None stands for
        both. The other keywords are those of `FusedLoRALinear.from_linear`; r is the rank of each expert.

        Raises:
            ValueError: for an r, lora_alpha or lora_dropout that no layer can have, and a name in `parameters` that is
                not one of the module's stacks.
            TypeError: for a module that is not of the known form: one with another forward, hooks, quantised or
                sharded stacks; and for an adapter_dtype that does not go with the weights'.
        """
        settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora, adapter_dtype=adapter_dtype, backend=backend)
        return cls.from_settings(module, settings, parameters)

    @classmethod
    @torch.inference_mode(False)  # what is made in inference mode could not be trained later
    @torch.no_grad()
    def from_settings(
        cls, module: Any, settings: LoRASettings, parameters: Sequence[str] | None = None
    ) -> FusedLoRAExperts:
        """Return what `from_experts` returns, for its keywords as one object."""
        settings.check()
        _refuse_settings(settings)
        if reason := cls.why_not(module):
            raise TypeError(reason)
        known = experts_form.names(module)
        if isinstance(parameters, str) or (parameters is not None and not set(parameters) <= set(known)):
            raise ValueError(f"parameters must be a list of {' and '.join(known)}, got {parameters!r}")
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        own = {name: value for name, value in module.__dict__.items() if name not in _OF_MODULE}
        new.__dict__.update(own, plain_attributes=tuple(own), _base={}, _merged_as={}, experts_class=type(module))
        new._parameters.update(module._parameters)
        new._buffers.update(module._buffers)
        new._modules.update(module._modules)
        new.training = module.training
        new.requires_grad_(False)
        # The order is that of the module's parameters, in which PEFT nests its wrappers.
        new.target_parameters = tuple(name for name in module._parameters if name in (parameters or known))
        new._add_adapter(settings)
        return new

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """Return why a `FusedLoRAExperts` cannot take the place of `module` in a model; "" where it can."""
        if reason := experts_form.why_not(module):
            return reason
        clash = sorted(set(module.__dict__) & _OWN)
        if clash:
            return f"its attributes {', '.join(clash)} have the names of this module's own"
        gate = getattr(type(module), "_apply_gate", None)
        used = getattr(getattr(gate, "__code__", None), "co_names", ())
        methods = [name for name in used if hasattr(type(module), name) and not hasattr(cls, name)]
        return f"its _apply_gate uses {', '.join(methods)} of its class" if methods else ""

    def _add_adapter(self, settings: LoRASettings) -> None:
        self.r, self.lora_alpha, self.lora_dropout = settings.r, settings.lora_alpha, settings.lora_dropout
        self.use_rslora, self.use_dora, self.backend = settings.use_rslora, False, settings.backend
        self.scaling = settings.scaling
        for name in self.target_parameters:
            weight = experts_form.projection(self, name).weight
            E, N, K = weight.shape
            how: Any = {"dtype": settings.dtype_beside(weight.dtype), "device": weight.device}
            self.register_parameter(f"lora_A_{name}", nn.Parameter(torch.empty(E, self.r, K, **how)))
            self.register_parameter(f"lora_B_{name}", nn.Parameter(torch.empty(E, N, self.r, **how)))
        self._reset_adapter()

    def pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A and B of the stack `name`."""
        return getattr(self, f"lora_A_{name}"), getattr(self, f"lora_B_{name}")

    def reset_adapter(self) -> None:
        """Give the adapter its first values: A Kaiming-uniform(√5), B zero. A merged module is unmerged first."""
        self.unmerge()
        self._reset_adapter()

    def _reset_adapter(self) -> None:
        for name in self.target_parameters:
            a, b = self.pair(name)
            nn.init.kaiming_uniform_(a.view(-1, a.shape[-1]), a=math.sqrt(5))
            nn.init.zeros_(b)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        *,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
    ) -> Tensor:
        """Return y [T, H] for x = `hidden_states` [T, H], the experts [T, k] of each token and their weights [T, k].
        gpt-oss calls these two router_indices and routing_weights.

        An id outside of 0..E - 1 is no expert, and adds nothing.
        """
        ids = router_indices if top_k_index is None else top_k_index
        weights = routing_weights if top_k_weights is None else top_k_weights
        if ids is None or weights is None:
            raise TypeError(f"{type(self).__name__} needs the experts of each token and their weights, both [T, k]")
        self.count_call(bool(self._base))
        if self._base:
            self._check_merged()
            y: Tensor = self.experts_class.forward(self, hidden_states, ids, weights)
            return y
        experts_forward.check(hidden_states, ids, weights)
        p = self.lora_dropout if self.training else 0.0
        adapters = {name: StackAdapter(*self.pair(name), self.scaling, p) for name in self.target_parameters}
        return experts_forward.forward(self.experts_class, self, hidden_states, ids, weights, adapters, self.backend)

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        """Return what the plain module computes between its two stacks. Its forward asks, which serves a merged
        module."""
        return experts_form.apply_gate(self.experts_class, self, gate_up_out)

    @property
    def merged(self) -> bool:
        """Whether the stacks hold W + s·B·A at present."""
        return bool(self._base)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, safe: bool = True) -> None:
        """Put W_e + s·B_e·A_e into the stacks, computed in fp64 for one expert at a time and rounded once. The base
        stacks stay in memory for `unmerge`. Merging a merged module does nothing.

        Raises:
            ValueError: with `safe`, for a result that is not finite; for stacks that are parametrised, sharded, on the
                meta device or offloaded. The module is then as it was.
        """
        if self._base:
            return
        new = {name: nn.Parameter(stack, False) for name, stack in experts_merging.merged_stacks(self, safe).items()}
        base = {name: self._parameters[name] for name in new}
        self._parameters.update(new)
        self.__dict__.update(_base=base, _merged_as=dict(new))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the stacks of before `merge` back. Does nothing where nothing is merged."""
        self._parameters.update(self._base)
        self.__dict__.update(_base={}, _merged_as={})

    @torch.inference_mode(False)
    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """Return a plain experts module whose stacks hold W + s·B·A, as `merge` computes it, and copies of the rest.
        This module stays as it is. Raises what `merge` raises."""
        if not self._base:
            return experts_merging.plain(self, experts_merging.merged_stacks(self, True))
        merging.refuse_absent(self)
        self._refuse_lost_merge()
        return experts_merging.plain(self, {name: getattr(self, name).detach().clone() for name in self._base})

    def _check_merged(self) -> None:
        """Warn of a merged module that is to be trained; raise where accelerate has offloaded it, with W alone."""
        if torch.compiler.is_compiling():
            return
        if offload.hook_of(self) is not None:
            raise ValueError(
                f"this {type(self).__name__} was merged when accelerate offloaded it, and accelerate has kept the "
                f"weights without the adapter. {experts_merging.BRING_BACK}, then unmerge(), offload, and merge after "
                "that"
            )
        if self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            warnings.warn(
                f"this {type(self).__name__} is merged: its adapter gets no gradient until unmerge()", stacklevel=3
            )
        self._refuse_lost_merge()

    def _refuse_lost_merge(self) -> None:
        """Raise ValueError where a stack of a merged module is the base again."""
        for name, base in self._base.items():
            self._merged_as[name] = merging.refuse_lost(self, getattr(self, name), base, self._merged_as[name])

    @property
    def size(self) -> str:
        """The sizes of the stacks, as reports show them."""
        shapes = [experts_form.projection(self, name).weight.shape for name in experts_form.names(self)]
        return f"{self.num_experts} × ({', '.join(f'{K} → {N}' for _, N, K in shapes)})"

    def file_parts(self) -> dict[str, FilePart]:
        """Return the tensors of the adapter in PEFT's file: A [E·r, K] with the expert slowest, B [N, r·E] with the
        expert fastest. PEFT nests a wrapper for each adapted stack, the module's first stack innermost."""
        parts = {}
        for depth, name in enumerate(reversed(self.target_parameters)):
            (E, r, K), N = self.pair(name)[0].shape, self.pair(name)[1].shape[1]
            prefix = "base_layer." * depth
            parts[f"{prefix}lora_A.weight"] = FilePart(f"lora_A_{name}", (E * r, K))
            parts[f"{prefix}lora_B.weight"] = FilePart(f"lora_B_{name}", (N, r * E))
        return parts

    def to_file(self, key: str, value: Tensor) -> Tensor:
        """Return A [E, r, K] or B [E, N, r] in the layout of PEFT's file."""
        if key.endswith("lora_A.weight"):
            return value.reshape(-1, value.shape[-1])
        return value.permute(1, 2, 0).reshape(value.shape[1], -1)

    def from_file(self, key: str, value: Tensor) -> Tensor:
        """Return a value of PEFT's file as A [E, r, K] or B [E, N, r]."""
        if key.endswith("lora_A.weight"):
            return value.reshape(self.num_experts, -1, value.shape[-1])
        return value.reshape(value.shape[0], -1, self.num_experts).permute(2, 0, 1).contiguous()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter. Raises ValueError for a new stack of a merged module: the adapter would be dropped."""
        if name in self.__dict__.get("_base", ()):
            raise ValueError(f"this module is merged: unmerge() it before it is given another {name}")
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLoRAExperts:
        """Move and convert every tensor with `fn`, also the base stacks of a merged module. Where `fn` gives memory
        that nobody has written, as ``Module.to_empty`` does, the adapter gets its first values."""
        a = self.pair(self.target_parameters[0])[0]
        emptied = a.is_meta or getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        known = [name for name in self._base if self._parameters[name] is self._merged_as[name]]
        held = {f"_base_{name}": p for name, p in self._base.items()}
        self._parameters.update(held)  # so that torch treats them as every other parameter
        try:
            super()._apply(fn, recurse)
        finally:
            for name in self._base:
                self._base[name] = cast(nn.Parameter, self._parameters.pop(f"_base_{name}"))
        self._merged_as.update({name: self._parameters[name] for name in known})
        if emptied and not self.pair(self.target_parameters[0])[0].is_meta:
            self._reset_adapter()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, p in self._base.items():
            destination[prefix + name] = p if keep_vars else p.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing_keys, _, _ = rest  # nn.Module gives: metadata, strict, missing, unexpected, errors
        keys = [f"{prefix}lora_{which}_{name}" for name in self.target_parameters for which in "AB"]
        for key in keys:
            own = getattr(self, key[len(prefix) :])
            if key in state_dict and state_dict[key].shape != own.shape:
                raise ValueError(
                    f"{key} is {tuple(state_dict[key].shape)}, here {tuple(own.shape)} with r={self.r}: nothing was "
                    "loaded into this module"
                )
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not any(key in state_dict for key in keys):  # the state_dict of the plain module, which has no adapter
            missing_keys[:] = [key for key in missing_keys if key not in keys]
            weight = getattr(self, self.target_parameters[0])
            if self.pair(self.target_parameters[0])[0].is_meta and not weight.is_meta:  # assign=True: it has no values
                loading.put_adapter_beside(self, weight.device)
                self._reset_adapter()
        if merged:
            self.merge()

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows."""
        names = ", ".join(self.target_parameters)
        text = f"{self.size}, {self.experts_class.__name__}, adapters on {names}, r={self.r}, scaling={self.scaling:g}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout:g}"
        if self.backend is not None:
            text += f", backend={self.backend!r}"
        return text + (", merged" if self.merged else "")


_OWN = frozenset(
    ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "backend", "scaling", "init", "target_parameters",
     "experts_class", "plain_attributes", "_base", "_merged_as", "size", "merged")
)  # fmt: skip
"""The attributes that a `FusedLoRAExperts` has beside those of the plain module."""


def _refuse_settings(settings: LoRASettings) -> None:
    """Raise ValueError for settings of other layers that experts do not have."""
    if settings.use_dora:
        raise ValueError("use_dora over experts is not supported: the norm of every expert would need all of its W")
    if settings.quant is not None or settings.double_quant:
        raise ValueError(f"experts cannot be quantised here (quant={settings.quant!r}): leave quant away")
    if settings.init != "kaiming":
        raise ValueError(f'experts take init="kaiming" only, got {settings.init!r}')
