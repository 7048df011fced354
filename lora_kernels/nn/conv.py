"""`FusedLoRAConv1d`, `FusedLoRAConv2d`, `FusedLoRAConv3d`: convolutions with a frozen weight and a trained low-rank
update, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lora_kernels.nn import conv_fit, conv_state, loading
from lora_kernels.nn.adapter import FilePart
from lora_kernels.nn.replaced import ReplacedWeight
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.ops.conv import lora_conv
from lora_kernels.ops.conv_plain import convolve
from lora_kernels.ops.conv_window import Sizes, window

torch.fx.wrap("lora_conv")  # torch.fx.symbolic_trace records a call as one node, as it does with functions of torch


class AdapterConv(ReplacedWeight):
    """What `FusedLoRAConv1d`, `FusedLoRAConv2d` and `FusedLoRAConv3d` have in common."""

    kind: ClassVar[type[Any]]
    """The class of torch whose place this one takes."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    grouped: bool
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
        grouped: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend)
        conv = self.kind(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        conv_fit.check(conv, settings, grouped)
        super().__init__()
        self._take(conv, settings, grouped)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
        grouped: bool = False,
    ) -> AdapterConv:
        """Return a module over the own weight and bias of `conv`. They are shared, not copied, and are frozen.

        Raises:
            ValueError: as the constructor.
            TypeError: a module that is not of torch's own class for these dimensions, or that has hooks or a
                parametrised weight, which the new module would pass over.
        """
        settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend)
        return cls.from_settings(conv, settings, grouped)

    @classmethod
    @torch.inference_mode(False)  # what is made in inference mode could not be trained later
    @torch.no_grad()
    def from_settings(cls, module: Any, settings: LoRASettings, grouped: bool = False) -> AdapterConv:
        """Return what `from_conv` returns, for its keywords as one object. Raises ValueError for a quantised weight or
        an initialisation that splits W too, which convolutions do not have."""
        if reason := cls.why_not(module):
            raise TypeError(reason)
        conv_fit.check(module, settings, grouped)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(module, settings, grouped)
        return made.train(module.training)

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """Return why a layer of this class cannot take the place of `module`, or "" where it can."""
        return conv_fit.why_not(module, cls.kind)

    def _take(self, conv: Any, settings: LoRASettings, grouped: bool) -> None:
        """Take over the parameters and attributes of `conv`, and add an adapter with its first values."""
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(conv, name))
        self.padding_mode, self.grouped = conv.padding_mode, grouped and conv.groups > 1
        self.register_parameter("weight", conv.weight.requires_grad_(False))
        self.register_parameter("bias", conv.bias if conv.bias is None else conv.bias.requires_grad_(False))
        self.r, self.lora_alpha, self.lora_dropout = settings.r, settings.lora_alpha, settings.lora_dropout
        self.use_rslora, self.use_dora, self.backend = settings.use_rslora, settings.use_dora, settings.backend
        self.scaling = settings.scaling
        like: dict[str, Any] = {"dtype": settings.dtype_beside(conv.weight.dtype), "device": conv.weight.device}
        of_a, of_b, of_m = self._shapes()
        self.lora_A = nn.Parameter(torch.empty(of_a, **like))
        self.lora_B = nn.Parameter(torch.empty(of_b, **like))
        if self.use_dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty(of_m, **like))
        self.reset_adapter()

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, B and m."""
        ones = (1,) * len(self.kernel_size)
        channels = self.in_channels // (self.groups if self.grouped else 1)
        return (
            (self.r, channels, *self.kernel_size),
            (self.out_channels, self.r // self.groups, *ones),
            (1, self.out_channels, *ones),
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return y [B, out_channels, ...] for x = `input` [B, in_channels, ...], which has the name that nn.Conv2d
        gives it, or without B for one sample. Raises what `lora_conv` raises."""
        if self._base is not None:
            self._check_replaced()
            self.count_call(merged=True)
            moves = window(self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
            return convolve(moves.padded(input), self.weight, self.bias, moves, self.groups)
        self.count_call()
        return lora_conv(
            input,
            self.weight,
            self.lora_A,
            self.lora_B,
            scale=self.scaling,
            bias=self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            dropout_p=self.lora_dropout if self.training else 0.0,
            magnitude=self.lora_magnitude_vector if self.use_dora else None,
            backend=self.backend,
        )

    def merge(self, safe: bool = True) -> None:
        """Put W + s·B·A, or with DoRA d ⊙ that, into `weight`, computed in fp64 and rounded once. The base weight stays
        in memory for `unmerge`. A weight that other modules share stays W for them.

        Raises:
            ValueError: with `safe`, for a result that is not finite; for groups whose A sees all channels, since no
                weight of W's shape computes them; for a weight that is parametrised, pruned, sharded, or on the meta
                device. The module is then as it was.
        """
        super().merge(safe)

    def _merged_weight(self, safe: bool) -> Tensor:
        return conv_state.merged_weight(self, safe)

    @torch.inference_mode(False)
    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """Return a convolution of torch with weight W + s·B·A, as `merge` computes it, and a copy of the bias. This
        module stays as it is. Raises what `merge` raises."""
        merged = self._copy_of_merged() if self.merged else self._merged_weight(safe=True)
        conv = self.kind(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, device="meta",
        )  # fmt: skip
        conv.weight = nn.Parameter(merged)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone())
        return cast(nn.Module, conv.train(self.training))

    @property
    def size(self) -> str:
        """The channels and the kernel, as reports show them."""
        kernel = "×".join(map(str, self.kernel_size))
        of_groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.in_channels} → {self.out_channels}, kernel {kernel}{of_groups}"

    def file_parts(self) -> dict[str, FilePart]:
        """Return the tensors of the adapter in PEFT's file: A [r, in, k, ...], B [out, r/groups, 1, ...] and with DoRA
        m [1, out, 1, ...]. Raises ValueError for an A in groups, which PEFT does not have."""
        if self.grouped:
            raise ValueError(
                f"PEFT's files have no A in groups, {tuple(self.lora_A.shape)} over groups={self.groups}: save the "
                "state_dict, or merge() and save the model. An adapter made with grouped=False goes into a file"
            )
        of_a, of_b, of_m = self._shapes()
        parts = {"lora_A.weight": FilePart("lora_A", of_a), "lora_B.weight": FilePart("lora_B", of_b)}
        if self.use_dora:
            parts["lora_magnitude_vector"] = FilePart("lora_magnitude_vector", of_m)
        return parts

    def why_not_file(self) -> str:
        """Return why PEFT computes something else from this layer's file than this layer does, or "" where it does
        not."""
        dropped = conv_state.dropped_by_peft(self)
        return dropped and (
            f"PEFT's forward leaves {dropped} of the base out of the adapter, so one that PEFT has trained over this "
            "layer means something else here, and one from here means something else to PEFT"
        )

    def reset_parameters(self) -> None:
        """Give weight and bias new values as torch's convolutions do, then the adapter. Frameworks call it after
        ``to_empty`` to materialise a model from the meta device."""
        self.unmerge()
        self.kind.reset_parameters(self)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Give the adapter its first values: A Kaiming-uniform(√5), B zero, m = ‖W‖. A merged module is unmerged
        first."""
        self.unmerge()
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.use_dora:
            conv_state.reset_magnitude(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterConv:
        """Move and convert every tensor with `fn`. The adapter gets its first values where `fn` gives memory that
        nobody has written, as ``Module.to_empty`` does."""
        emptied = self.lora_A.is_meta or getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        super()._apply(fn, recurse)
        if emptied and not self.lora_A.is_meta:
            merged = self.merged
            self.reset_adapter()
            if self.use_dora and not merged:  # W has no values yet, so neither has its norm
                nn.init.constant_(self.lora_magnitude_vector, math.nan)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing_keys, _, _ = rest  # nn.Module gives: metadata, strict, missing, unexpected, errors
        if self.groups == 1:
            loading.check_rank(self, state_dict, prefix)
        own = [prefix + name for name in self._parameters if name.startswith("lora_")]
        plain = not any(key in state_dict for key in own)  # the state_dict of a convolution without an adapter
        merged = self.merged
        self.unmerge()
        follows = self.use_dora and not self.weight.is_meta and conv_state.is_new_magnitude(self, plain)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if plain:
            missing_keys[:] = [key for key in missing_keys if key not in own]
            if self.lora_A.is_meta and not self.weight.is_meta:  # assign=True: the adapter has no values to keep
                loading.put_adapter_beside(self, self.weight.device)
                self.reset_adapter()
        if follows and (plain or conv_state.is_new_magnitude(self, False)):
            conv_state.reset_magnitude(self)
        if merged:
            self.merge()

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows: those of torch's convolutions, and the adapter's."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        usual = {"padding": (0,) * len(self.kernel_size), "dilation": (1,) * len(self.kernel_size), "groups": 1}
        usual |= {"padding_mode": "zeros", "grouped": False, "lora_dropout": 0.0, "use_dora": False, "backend": None}
        text += f", bias={self.bias is not None}, r={self.r}, scaling={self.scaling:g}"
        text += "".join(
            f", {name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value
        )
        if self.lora_A.dtype != self.weight.dtype:
            text += f", adapter_dtype={self.lora_A.dtype}"
        return text + (", merged" if self.merged else "")


class FusedLoRAConv1d(AdapterConv):
    """A convolution in one dimension with LoRA: see `FusedLoRAConv2d`."""

    kind, plain = nn.Conv1d, (nn.Conv1d,)


class FusedLoRAConv2d(AdapterConv):
    """y = x ∗ W + bias + s·B (dropout(x) ∗ A) with W and bias frozen: what an ``nn.Conv2d`` computes, and LoRA. A has
    W's kernel and r output channels, and B is a 1×1 kernel, so W + s·B A is a convolution of W's shape.

    It is called as an ``nn.Conv2d`` is, and has its attributes, but is no subclass of it. Stride, padding, padding mode
    and dilation hold for both halves. See `lora_kernels.ops.conv.lora_conv` for how a call is computed and what it
    saves.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for ``nn.Conv2d``.
        r: the rank, at least 1, and a multiple of groups.
        lora_alpha, lora_dropout, use_rslora, adapter_dtype: as for `FusedLoRALinear`. Dropout acts on single elements
            of x.
        use_dora: weight-decomposed LoRA, with d = m / ‖W + s·B A‖ by output channels.
        backend: the name of a back-end, which draws the dropout mask, and computes 1×1 kernels and patches; None for
            the automatic choice.
        grouped: with groups, whether A is in groups too: [r, in/groups, k, k]. Such an adapter can be merged, and has
            DoRA. Otherwise A sees all channels, as PEFT's does, [r, in, k, k], and can neither.

    Attributes:
        weight: [out, in/groups, k, k], the frozen W, or the merged weight while `merged`.
        bias: [out] or None, the frozen bias.
        lora_A: [r, in, k, k], A, a parameter.
        lora_B: [out, r/groups, 1, 1], B, a parameter.
        lora_magnitude_vector: [1, out, 1, 1], DoRA's m, a parameter. It exists only with use_dora.
        scaling: s, a float that may be changed at any time.

    ``state_dict`` always holds the base weight and the adapter, merged or not. That of an ``nn.Conv2d`` can be loaded
    too. A and B then keep their values, and so does m, unless it is the norm of W + s·B A: then it becomes the new one.

    Raises:
        ValueError: r below 1 or no multiple of groups, lora_dropout outside [0, 1), a lora_alpha that is not finite,
            use_dora with groups and without `grouped`; loading an adapter of another rank.
        TypeError: an adapter_dtype that does not go with the weight's dtype.
    """

    kind, plain = nn.Conv2d, (nn.Conv2d,)


class FusedLoRAConv3d(AdapterConv):
    """A convolution in three dimensions with LoRA: see `FusedLoRAConv2d`."""

    kind, plain = nn.Conv3d, (nn.Conv3d,)
