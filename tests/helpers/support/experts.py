"""Tiny experts modules of transformers' models, and what they compute with adapters, in fp64 and expert by expert."""

from __future__ import annotations

import copy
import importlib
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

T, K, E, H, I = 9, 2, 5, 12, 8  # noqa: E741
"""Tokens, experts of each token, experts, hidden and intermediate size."""

STACKS = ("gate_up_proj", "down_proj")

_SHARED: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": K,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": I, "intermediate_size": I, "num_experts": E},
    "Mixtral": {"intermediate_size": I, "num_local_experts": E},
    "GptOss": {"intermediate_size": I, "num_local_experts": E, "layer_types": ["full_attention"] * 2},
    "DeepseekV3": {
        "moe_intermediate_size": I,
        "intermediate_size": I,
        "n_routed_experts": E,
        "head_dim": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "kv_lora_rank": 4,
        "q_lora_rank": 4,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "Olmoe": {"intermediate_size": I, "num_experts": E},
}
"""The families whose experts are tested, and the sizes of a tiny model."""


def config_of(family: str, **settings: Any) -> Any:
    if family == "Olmoe" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 5):
        pytest.skip("transformers 5.4 makes no OlmoeConfig: its own default for tie_word_embeddings has a wrong type")
    return getattr(transformers, f"{family}Config")(**(_SHARED | FAMILIES[family] | settings))


def model_of(family: str, implementation: str = "eager", **settings: Any) -> Any:
    """Return a tiny causal language model with random weights."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config_of(family, **settings))
    model.set_experts_implementation(implementation)
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            _randomise(module)
    return model.requires_grad_(True)


def experts_of(family: str, dtype: torch.dtype = torch.float32, implementation: str = "eager", **settings: Any) -> Any:
    """Return one experts module of a family with random weights."""
    torch.manual_seed(0)
    config = config_of(family, **({"hidden_size": H} | settings))
    config._experts_implementation = implementation
    home = importlib.import_module(getattr(transformers, f"{family}Model").__module__)
    kind = getattr(home, f"{family}Experts", None) or getattr(home, f"{family}NaiveMoe")  # in transformers 5.4
    module = kind(config)
    _randomise(module)
    return module.to(dtype)


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    for p in module.parameters():
        nn.init.normal_(p, 0, 0.4)


def unusual_experts(kind: str) -> Any:
    """Return experts in fp64 without a gate, or with a norm behind them, or transposed without biases."""
    torch.manual_seed(0)
    model, sizes = _UNUSUAL[kind]
    home = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    config = types.SimpleNamespace(**sizes, hidden_size=H, _experts_implementation="eager")
    module = getattr(home, kind)(config)
    _randomise(module)
    return module.double()


_UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "NemotronHExperts": (
        "nemotron_h",
        {"n_routed_experts": E, "moe_intermediate_size": I, "moe_latent_size": None, "mlp_hidden_act": "relu2"},
    ),
    "MuseSparkExperts": (
        "muse_spark",
        {
            "num_local_experts": E,
            "moe_hidden_size": H,
            "moe_intermediate_size": I,
            "hidden_act": "silu",
            "post_norm_eps": 1e-6,
        },
    ),
    "AriaExperts": ("aria", {"moe_num_experts": E, "intermediate_size": I}),
}
UNUSUAL = tuple(_UNUSUAL)
"""Classes of experts that differ from the families above."""


class Inputs(NamedTuple):
    x: Tensor
    ids: Tensor
    weights: Tensor
    dy: Tensor


def inputs(
    dtype: torch.dtype = torch.float32, tokens: int = T, k: int = K, experts: int = E, hidden: int = H
) -> Inputs:
    """Return x, the experts of each token with one expert that nobody asks for, their weights, and dy."""
    torch.manual_seed(1)
    used = torch.tensor([e for e in range(experts) if e != 1 or experts == 1])
    ids = used[torch.rand(tokens, len(used)).topk(min(k, len(used)), dim=-1).indices]
    x, weights, dy = torch.randn(tokens, hidden), torch.rand(ids.shape), torch.randn(tokens, hidden)
    return Inputs(x.to(dtype), ids, weights.to(dtype), dy.to(dtype))


class Adapter(NamedTuple):
    """The adapter of a stack: A [E, r, K], B [E, N, r], s."""

    a: Tensor
    b: Tensor
    scale: float


def truth(
    module: Any,
    given: Inputs,
    adapters: Mapping[str, Adapter],
    masks: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return y and the gradients of x, the weights, A and B in fp64.

    Each expert is computed alone by F.linear: with W + s·B·A, or where there is a mask for a stack with W and the
    adapter over the masked x. ``masks[stack](x, rows)`` gives x̂ for the rows with these numbers, sorted by expert.
    """
    base = copy.deepcopy(module).double()
    operands = {"x": given.x, "weights": given.weights}
    for name, each in adapters.items():
        operands |= {f"a {name}": each.a, f"b {name}": each.b}
    leaves = {name: t.detach().double().requires_grad_() for name, t in operands.items()}

    def linear(name: str, e: int, x: Tensor, rows: Tensor) -> Tensor:
        w = getattr(base, name)[e]
        w = w.t() if base.is_transposed else w
        bias = getattr(base, f"{name}_bias")[e] if base.has_bias else None
        if name not in adapters:
            return F.linear(x, w, bias)
        a, b, s = leaves[f"a {name}"][e], leaves[f"b {name}"][e], adapters[name].scale
        if masks is None:
            return F.linear(x, w + s * (b @ a), bias)
        return F.linear(x, w, bias) + s * F.linear(F.linear(masks[name](x, rows), a), b)

    x, weights = leaves["x"], leaves["weights"]
    order = given.ids.flatten().sort(stable=True).indices
    y = 0 * x
    for e in range(base.num_experts):
        rows = (given.ids.flatten()[order] == e).nonzero()[:, 0]
        if len(rows):
            tokens, places = order[rows] // given.ids.shape[1], order[rows] % given.ids.shape[1]
            z = linear("gate_up_proj" if base.has_gate else "up_proj", e, x[tokens], rows)
            z = linear("down_proj", e, base._apply_gate(z) if base.has_gate else base.act_fn(z), rows)
            if getattr(base, "has_post_expert_norm", False):  # transformers 5.4 knows no such norm
                z = base.post_expert_norm(z)
            y = y.index_add(0, tokens, z * weights[tokens, places, None])
    grads = torch.autograd.grad(y, list(leaves.values()), given.dy.double(), allow_unused=True)
    return {"y": y.detach()} | {
        name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, grads, strict=True)
    }


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], most: float) -> None:
    """Assert that every value is within `most` of the largest one of its tensor."""
    assert got.keys() == want.keys() and len(got) > 2
    for name, value in want.items():
        error, largest = (got[name].double() - value).abs().max().item(), value.abs().max().item()
        assert got[name].shape == value.shape and error <= most * largest, f"{name}: {error:.2e} of {largest:.2e}"
