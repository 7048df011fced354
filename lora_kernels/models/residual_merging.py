"""ResLoRA as plain LoRA: `reslora_to_lora`, with what it changes.

The update of a layer with input or middle shortcuts is s · B (A_n x_n + Σ_k C_k x_{n−k}), with C_k = A_n in "is" and
C_k = A_{n−k} in "ms". A plain LoRA layer has x_n alone. So x_{n−k} is taken to be α_k x_n, which gives
A' = A_n + Σ_k α_k C_k, and the error of that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lora_kernels.models.inject import places_of, put
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.targets import some
from lora_kernels.nn import dry_run
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.merging import wide_dtype
from lora_kernels.nn.residual import ResLoRALinear

How = Literal["fit", "inputs", "weights", "middle"]


class LayerError(NamedTuple):
    """What taking the shortcuts away changes in a layer, on the given inputs."""

    alphas: tuple[float, ...]
    """α_k of each earlier layer, the nearest first."""
    of_output: float
    """‖y' − y‖ / ‖y‖."""
    of_update: float
    """‖y' − y‖ / ‖y − x Wᵀ − bias‖: the share of the adapter's effect that is lost."""


@dataclass(frozen=True)
class MergedReport:
    """What `reslora_to_lora` has made of each layer, and what that has changed. ``str()`` of it is a table."""

    structure: str
    how: str
    layers: dict[str, LayerError]
    """By the layer's name. With structure "bs" nothing is changed, and the errors are 0."""
    of_model: float | None
    """‖y' − y‖ / ‖y‖ of the model's own output; None where there were no inputs, or the output has no tensor."""

    def __str__(self) -> str:
        if self.structure == "bs":
            return f'{len(self.layers)} layers of structure "bs" are plain LoRA of rank Σr now, without an error'
        width = max(len(name) for name in [*self.layers, "module"])
        lines = [f"{'module':<{width}}  error of y  of the update  α"]
        for name, (alphas, output, update) in self.layers.items():
            told = " ".join(f"{alpha:.3f}" for alpha in alphas)
            lines.append(f"{name:<{width}}  {output:>10.2g}  {update:>13.2g}  {told}")
        whole = "unknown" if self.of_model is None else f"{self.of_model:.2g}"
        return "\n".join(
            [*lines, f'structure "{self.structure}", how="{self.how}"; error of the model\'s output: {whole}']
        )


@torch.inference_mode(False)
@torch.no_grad()
def reslora_to_lora(model: nn.Module, inputs: Any = None, how: How = "fit") -> MergedReport:
    """Replace every layer with ResLoRA by a plain LoRA layer, in place, and return what that changes. Afterwards
    `save_adapter`, `merge_and_unload` and everything else that takes LoRA takes the model.

    Structure "bs" becomes LoRA of rank Σr, without an error. "is" and "ms" become LoRA of the same rank r, which is an
    approximation: the x of an earlier block is taken to be α times this layer's own x.

    Args:
        model: a model after `apply_reslora`.
        inputs: inputs of the model on which the error is measured, as `apply_lora` takes them for `verify`. They are
            needed for "is" and "ms", and choose α there: take data like those of the training.
        how: how α is chosen.

            * "fit": the α that make the error on the inputs smallest, by least squares. It is ours.
            * "inputs": ‖x_{n−k}‖ / ‖x_n‖, as in the official code.
            * "weights": for "is", ‖W_{n−2} + s B A‖ / ‖W_{n−1} + s B A‖ as in the official code, with s.
            * "middle": for "ms", (1 + Σ_k α_k) A_n with α_k = ‖h_{n−k}‖ / ‖h_n‖, as in the official code.

    The model runs twice on the inputs, in evaluation mode. The x of every layer are in memory at the same time.

    Raises:
        ValueError: a model without ResLoRA; "is" or "ms" without inputs, or with a layer that the forward does not
            reach, or that reads NaN or infinite values; a `how` that does not go with the structure; a merged layer.
            The model is unchanged.
    """
    found: dict[str, Any] = dict(lora_layers(model))
    layers: dict[str, ResLoRALinear] = {n: layer for n, layer in found.items() if isinstance(layer, ResLoRALinear)}
    structure = _structure(layers, how)
    if structure == "bs":
        made = {name: layer.as_lora() for name, layer in layers.items()}
        errors = {name: LayerError((1.0,) * len(layer.earlier), 0.0, 0.0) for name, layer in layers.items()}
        _put(model, layers, made)
        return MergedReport(structure, how, errors, None if inputs is None else 0.0)
    if inputs is None:
        raise ValueError(
            f'structure "{structure}" becomes plain LoRA approximately only: give inputs of the model, on which the '
            "error is measured"
        )
    given, training = dry_run.inputs_for(model, inputs), {name: layer.training for name, layer in layers.items()}
    with _evaluation(model):
        with _seen(layers) as seen:
            before = _first_tensor(model(*given.args, **given.kwargs))
        if missing := [name for name in layers if name not in seen]:
            raise ValueError(f"these layers were not called in a forward with these inputs: {some(missing)}")
        rows = {
            name: torch.cat(each).to(torch.promote_types(each[0].dtype, torch.float32)) for name, each in seen.items()
        }
        if odd := [name for name, x in rows.items() if not x.numel() or not x.isfinite().all()]:
            raise ValueError(f"with these inputs {some(odd)} read no rows, or values that are NaN or infinite")
        made, errors = dict[str, FusedLoRALinear](), dict[str, LayerError]()
        names = {id(layer): name for name, layer in layers.items()}
        for name, layer in layers.items():
            earlier = [(other, rows[names[id(other)]]) for other in reversed(layer.earlier)]
            made[name], errors[name] = _approximated(layer, rows[name], earlier, how)
        undo = _put(model, layers, made)
        try:
            after = _first_tensor(model(*given.args, **given.kwargs))
        except BaseException:
            undo()
            raise
    for name, plain in made.items():
        plain.training = training[name]
    chains = {id(layer._chain): layer._chain for layer in layers.values()}
    for module in model.modules():
        for chain in chains.values():
            chain.take_from(module)
    of_model = None if before is None or after is None else _relative(after - before, before)
    return MergedReport(structure, how, errors, of_model)


def _structure(layers: Mapping[str, ResLoRALinear], how: str) -> str:
    """Return the structure of the layers. Raises ValueError where they are none, or `how` does not go with it."""
    if not layers:
        raise ValueError("the model has no layer with ResLoRA: apply_reslora(model) first")
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(f"these layers are merged: {some(merged)}. unmerge() them first")
    structure = next(iter(layers.values())).structure
    fitting = {"is": ("fit", "inputs", "weights"), "ms": ("fit", "inputs", "middle")}.get(structure, get_args(How))
    if how not in fitting:
        raise ValueError(f'how must be one of {", ".join(fitting)} for structure "{structure}", got {how!r}')
    return structure


def _approximated(
    layer: ResLoRALinear, x: Tensor, earlier: list[tuple[ResLoRALinear, Tensor]], how: str
) -> tuple[FusedLoRALinear, LayerError]:
    """Return a plain LoRA layer for a layer that has read x [M, K], and the layers before it with what they have read,
    and what it is wrong by."""
    wide = wide_dtype(x.device)
    a, b, x = layer.lora_A.to(wide), layer.lora_B.to(wide), x.to(wide)
    if not earlier and layer.structure == "is":  # the first layer of a chain reads x + x
        earlier = [(layer, x)]
        alphas = [1.0]
        terms = [a]
    else:
        terms = [a if layer.structure == "is" else other.lora_A.to(wide) for other, _ in earlier]
        alphas = _alphas(layer, x, earlier, terms, how)
    wanted = sum(((z.to(wide) @ c.T) for (_, z), c in zip(earlier, terms, strict=True)), torch.zeros_like(x @ a.T))
    if how == "middle":
        terms = [a] * len(earlier)
    new_a = a + sum((alpha * c for alpha, c in zip(alphas, terms, strict=True)), torch.zeros_like(a))
    s = float(layer.scaling)
    update = s * (x @ a.T + wanted) @ b.T
    wrong = s * (x @ new_a.T) @ b.T - update
    y = layer.as_lora(layer.lora_A, torch.zeros_like(layer.lora_B))(x.to(layer.weight_dtype)).to(wide) + update
    made = layer.as_lora(new_a.to(layer.lora_A.dtype), layer.lora_B)
    return made, LayerError(tuple(alphas), _relative(wrong, y), _relative(wrong, update))


def _alphas(
    layer: ResLoRALinear,
    x: Tensor,
    earlier: list[tuple[ResLoRALinear, Tensor]],
    terms: list[Tensor],
    how: str,
) -> list[float]:
    """Return α_k of each earlier layer, the nearest first."""
    if how == "fit":
        return _fitted(layer, x, earlier, terms)
    if how == "weights":
        first = earlier[0][0]
        return [_ratio(_norm(first.earlier[-1]), _norm(first)) if first.earlier else 1.0]
    if how == "inputs":
        return [_ratio(z.norm().item(), x.norm().item()) for _, z in earlier]
    h = (x @ layer.lora_A.to(x.dtype).T).norm().item()
    return [_ratio((z.to(x.dtype) @ c.T).norm().item(), h) for (_, z), c in zip(earlier, terms, strict=True)]


def _fitted(
    layer: ResLoRALinear, x: Tensor, earlier: list[tuple[ResLoRALinear, Tensor]], terms: list[Tensor]
) -> list[float]:
    """Return the α_k that minimise ‖Σ_k (C_k x_{n−k} − α_k C_k x_n) Bᵀ‖."""
    if not earlier:
        return []
    b = layer.lora_B.to(x.dtype)
    gram_of_b = b.T @ b
    own = [x @ c.T for c in terms]
    wanted = sum((z.to(x.dtype) @ c.T for (_, z), c in zip(earlier, terms, strict=True)), torch.zeros_like(own[0]))
    gram = torch.stack([torch.stack([(one @ gram_of_b * other).sum() for other in own]) for one in own])
    right = torch.stack([(one @ gram_of_b * wanted).sum() for one in own])
    return [float(alpha) for alpha in torch.linalg.pinv(gram, hermitian=True) @ right]


def _norm(layer: ResLoRALinear) -> float:
    """Return ‖W + s·B A‖_F."""
    merged = layer.as_lora(layer.lora_A, layer.lora_B)._merged_weight(safe=False)
    return float(merged.to(torch.float32).norm())


def _ratio(one: float, other: float) -> float:
    """Return one / other, and 1 where one of them is 0, as in the official code."""
    return one / other if one and other else 1.0


def _relative(wrong: Tensor, right: Tensor) -> float:
    """Return ‖wrong‖ / ‖right‖, 0 where nothing is wrong, and infinity where only nothing would be right."""
    error, size = (float(each.double().norm() if each.device.type != "mps" else each.norm()) for each in (wrong, right))
    return error / size if size else math.inf if error else 0.0


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _seen(layers: Mapping[str, ResLoRALinear]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what each layer reads, as rows [M, K], while the body runs."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda layer, args: seen.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _put(model: nn.Module, layers: Mapping[str, nn.Module], made: Mapping[str, nn.Module]) -> Any:
    """Put the layers `made` in the places of `layers`, and return a function that undoes it."""
    places = places_of(model)

    def put_all(these: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            for place in places[id(layer)]:
                put(model, place, these[name])

    put_all(made)
    return lambda: put_all(layers)


def _first_tensor(output: Any) -> Tensor | None:
    """Return a copy of the first floating tensor of a model's output."""
    if isinstance(output, Tensor):
        return output.detach().clone() if output.is_floating_point() else None
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits.detach().clone()
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((t for t in map(_first_tensor, values) if t is not None), None)
