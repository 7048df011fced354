"""The cells of embeddings: LoRA and DoRA over tables of the sizes of Llama's and GPT-2's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT, SAVED, Cell, Target, Way
from lora_kernels.core import accuracy
from lora_kernels.nn.embedding import FusedLoRAEmbedding
from lora_kernels.ops.dora_norm import ratio

_LORA = "our LoRA"
_SIZES = ((32000, 2048, 512, 16), (50257, 768, 1024, 8))
"""V, D, the number of ids, and r."""
_ALPHA = 16.0
_PEFT_MARGIN = 4.0
"""How many times the RMS error of plain torch PEFT's may be."""


def cells() -> list[Cell]:
    """Return the cells of embeddings."""
    found = []
    for sizes in _SIZES:
        V, D, M, R = sizes
        name = f"V {V} D {D}, {M} ids, r {R}"
        saved = Target(PEFT, 1.0, SAVED)
        found += [
            Cell("embedding", name, partial(_lora, *sizes), (Target(PEFT, 0.6), saved)),
            Cell("embedding", f"{name}, inference", partial(_lora, *sizes), (Target(PEFT, 0.4),), backward=False),
            Cell("embedding", f"{name}, DoRA", partial(_dora, *sizes), (Target(_LORA, 2.0), Target(PEFT, 0.6), saved)),
        ]
    return found


def _lora(V: int, D: int, M: int, R: int) -> Mapping[str, Way]:
    table, ids, a, b = _operands(V, D, M, R)
    frozen = {FROZEN: Way(lambda: table(ids), (), (table.weight,))}
    return frozen | {
        PEFT: _peft(table, ids, a, b, False),
        OURS: _ours(table, ids, a, b, False),
    }


def _dora(V: int, D: int, M: int, R: int) -> Mapping[str, Way]:
    table, ids, a, b = _operands(V, D, M, R)
    lora = _ours(table, ids, a, b, False)
    frozen = {FROZEN: Way(lambda: table(ids), (), (table.weight,))}
    return frozen | {PEFT: _peft(table, ids, a, b, True), _LORA: lora, OURS: _ours(table, ids, a, b, True)}


def _operands(V: int, D: int, M: int, R: int) -> tuple[nn.Embedding, Tensor, Tensor, Tensor]:
    """Return the frozen table, ids [M], A [R, V] and B [D, R]."""
    generator = torch.Generator().manual_seed(0)
    table = nn.Embedding.from_pretrained(torch.randn(V, D, generator=generator) * 0.02)
    ids = torch.randint(0, V, (M,), generator=generator)
    a, b = torch.randn(R, V, generator=generator) * 0.01, torch.randn(D, R, generator=generator)
    return table, ids, a, b


def _ours(table: nn.Embedding, ids: Tensor, a: Tensor, b: Tensor, dora: bool) -> Way:
    layer = FusedLoRAEmbedding.from_embedding(table, r=a.shape[0], lora_alpha=_ALPHA, use_dora=dora)
    trained = [layer.lora_embedding_A, layer.lora_embedding_B]
    with torch.no_grad():
        layer.lora_embedding_A.copy_(a.t())
        layer.lora_embedding_B.copy_(b)
    if dora:
        trained.append(layer.lora_magnitude_vector)
    check = partial(_faults, lambda: layer(ids), trained, table.weight, ids, layer.scaling, accuracy.RATIO)
    return Way(lambda: layer(ids), tuple(trained), (table.weight,), check)


def _peft(table: nn.Embedding, ids: Tensor, a: Tensor, b: Tensor, dora: bool) -> Way:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=a.shape[0], lora_alpha=int(_ALPHA), target_modules=["0"], use_dora=dora)
    model: Any = get_peft_model(nn.Sequential(table), config)  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    trained = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    with torch.no_grad():
        for parameter, value in zip(trained, (a, b), strict=True):
            parameter.copy_(value)
    if dora:
        trained.append(layer.lora_magnitude_vector["default"].weight)
    check = partial(_faults, lambda: layer(ids), trained, table.weight, ids, layer.scaling["default"], _PEFT_MARGIN)
    return Way(lambda: layer(ids), tuple(trained), (table.weight,), check)


def _faults(
    forward: Callable[[], Tensor], trained: Sequence[Tensor], w: Tensor, ids: Tensor, scale: float, margin: float
) -> list[str]:
    """Return what is wrong with y and the gradients: an RMS error above `margin` times that of plain torch."""
    y = forward()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    got = [y.detach(), *torch.autograd.grad(y, trained, dy)]
    exact, plain = (_equation(trained, w, ids, scale, dy, dtype) for dtype in (torch.float64, torch.float32))
    faults = []
    for name, *three in zip(("y", "da", "db", "dm"), got, exact, plain, strict=False):
        errors = accuracy.errors_beside(*three)
        allowed = errors.rms_allowed * margin / accuracy.RATIO
        if not errors.rms <= allowed:
            faults.append(f"{name}: RMS error {errors.rms:.3g}, allowed {allowed:.3g}")
    return faults


def _equation(
    trained: Sequence[Tensor], w: Tensor, ids: Tensor, scale: float, dy: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Return y and the gradients of `trained` by plain torch operations in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in trained]
    a, b, *m = leaves
    a_t = a.t() if a.shape[1] == w.shape[0] else a
    y = F.embedding(ids, w).to(dtype) + scale * (F.embedding(ids, a_t) @ b.t())
    if m:
        whole = (w.detach().to(dtype) + scale * (a_t.detach() @ b.detach().t())).t()
        y = y * ratio(m[0], torch.linalg.vector_norm(whole, dim=1))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]
