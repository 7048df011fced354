"""`Window`: how the kernel of a convolution moves over x, with the padding made explicit.

torch's convolutions pad with zeros, by the same number on both sides. Every other padding is a pad of x before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
"""The padding modes of ``nn.Conv2d``, and their names in ``F.pad``."""

Sizes = int | Sequence[int]
"""A number for all dimensions, or one for each."""


class Window(NamedTuple):
    """How a kernel moves over x [B, C, ...]."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """The number of zeros that the convolution itself adds on both sides of each dimension."""
    dilation: tuple[int, ...]
    groups: int
    pads: tuple[int, ...] = ()
    """The padding before the convolution, as ``F.pad`` takes it: last dimension first. Empty for none."""
    mode: str = "constant"
    """The mode of `pads`."""

    def padded(self, x: Tensor) -> Tensor:
        """Return x with its padding before the convolution."""
        return F.pad(x, self.pads, self.mode) if self.pads else x

    def sizes_before(self, x: Tensor) -> list[int]:
        """Return the sizes that the dimensions of a padded x [B, C, ...] had before."""
        sizes = list(x.shape)
        for i in range(len(self.pads) // 2):
            sizes[-1 - i] -= self.pads[2 * i] + self.pads[2 * i + 1]
        return sizes

    def convolve(self, x: Tensor, w: Tensor, bias: Tensor | None = None, groups: int | None = None) -> Tensor:
        """Return the convolution of a padded x with w, in `groups` where they are given."""
        n = len(self.stride)
        groups = self.groups if groups is None else groups
        return torch.convolution(x, w, bias, self.stride, self.padding, self.dilation, False, (0,) * n, groups)

    def gradients(
        self, dy: Tensor, x: Tensor, w: Tensor, need_dx: bool, need_dw: bool, groups: int | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return dx and dw of `convolve`, and None for each that is not needed. Where dw is not needed, only the shape
        of x counts; where dx is not needed, only that of w."""
        n = len(self.stride)
        groups = self.groups if groups is None else groups
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, w, None, self.stride, self.padding, self.dilation, False, (0,) * n, groups, (need_dx, need_dw, False)
        )
        return dx if need_dx else None, dw if need_dw else None

    def pointwise(self) -> Window:
        """Return the window of the convolution with B: one position, in the same groups."""
        n = len(self.stride)
        return Window((1,) * n, (0,) * n, (1,) * n, self.groups)


def window(
    kernel: Sequence[int], stride: Sizes, padding: str | Sizes, dilation: Sizes, groups: int, padding_mode: str
) -> Window:
    """Return the `Window` of the arguments that ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` take, for a kernel of
    the sizes `kernel`. Raises ValueError for those that they refuse."""
    n = len(kernel)
    if padding_mode not in _MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(_MODES)}; got {padding_mode!r}")
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be an integer of at least 1, got {groups!r}")
    stride, dilation = _each("stride", stride, n, 1), _each("dilation", dilation, n, 1)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid' or a number for each dimension; got {padding!r}")
        if padding == "same" and any(s != 1 for s in stride):
            raise ValueError(f"padding='same' is for a stride of 1, got stride {stride}")
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        both = _each("padding", padding, n, 0)
        if padding_mode == "zeros":
            return Window(stride, both, dilation, groups)
        sides = [(each, each) for each in both]
    nothing = (0,) * n
    if padding_mode != "zeros":
        pads = tuple(side for pair in reversed(sides) for side in pair)
        return Window(stride, nothing, dilation, groups, pads if any(pads) else (), _MODES[padding_mode])
    if all(left == right for left, right in sides):
        return Window(stride, tuple(left for left, _ in sides), dilation, groups)
    # An even kernel and "same": one zero more at the end, which the convolution cannot add.
    pads = tuple(side for left, right in reversed(sides) for side in (0, right - left))
    return Window(stride, tuple(left for left, _ in sides), dilation, groups, pads)


def _each(name: str, given: Sizes, n: int, least: int) -> tuple[int, ...]:
    """Return one number for each of n dimensions, at least `least`."""
    sizes = (given,) * n if isinstance(given, int) else tuple(given)
    if len(sizes) == 1:
        sizes *= n
    if len(sizes) != n or min(sizes) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, or {n} of them; got {given!r}")
    return sizes
