"""Every field of PEFT's LoraConfig gives, fused, the result of PEFT, or a report with the reason why not.

The table has a row for each field of the newest PEFT that this package knows, and a test finds a field without one. Of
an older PEFT the fields that it does not have are skipped.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import config as peft_config  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from support.peft_models import Conv1DNet, Net, fused_layers, randomise  # noqa: E402

import lora_kernels  # noqa: E402


def llama(**kwargs) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 20, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, **kwargs))


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


class Case(NamedTuple):
    kwargs: dict[str, Any]
    net: Callable[[], nn.Module] = Net
    left: tuple[str, ...] = ()
    """Parts of the reasons in the report, in their order; none where every layer is fused."""


def variant(name: str) -> tuple[str, ...]:
    return (f"adapter 'default' is a {name}",) * 2


def sub(name: str, **kwargs: Any) -> Any:
    """Return one of the configurations inside a LoraConfig, or a string where this PEFT has none of that name."""
    kind = getattr(peft_config, name, None)
    return f"no {name}" if kind is None else kind(**kwargs)


WRAPPER = ("a Linear, whose forward is not one that transformers' use_experts_implementation has made",)
CASES: dict[str, list[Case]] = {
    "task_type": [Case({"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"]}, llama)],
    "peft_type": [Case({})],
    "auto_mapping": [Case({"auto_mapping": {"base_model_class": "Net", "parent_library": "here"}})],
    "peft_version": [Case({})],
    "base_model_name_or_path": [Case({"base_model_name_or_path": "a/name"})],
    "revision": [Case({"revision": "main"})],
    "inference_mode": [Case({"inference_mode": True})],
    "r": [Case({"r": 9})],
    "target_modules": [
        Case({"target_modules": r".*(up|down)"}),
        Case({"target_modules": ["up", "emb"]}),
        Case({"target_modules": "all-linear"}, llama),
    ],
    "exclude_modules": [Case({"exclude_modules": ["down"]})],
    "lora_alpha": [Case({"lora_alpha": 3})],
    "lora_dropout": [Case({"lora_dropout": 0.3})],
    "fan_in_fan_out": [Case({"fan_in_fan_out": True}, Conv1DNet)],
    "bias": [Case({"bias": "all"}), Case({"bias": "lora_only"})],
    "use_rslora": [Case({"use_rslora": True})],
    "modules_to_save": [Case({"modules_to_save": ["head"]})],
    "init_lora_weights": [
        Case({"init_lora_weights": how})
        for how in (False, "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "mica")
    ],
    "layers_to_transform": [Case({"layers_to_transform": [1], "target_modules": ["q_proj"]}, llama)],
    "layers_pattern": [
        Case({"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q_proj"]}, llama)
    ],
    "rank_pattern": [Case({"rank_pattern": {"down": 9}})],
    "alpha_pattern": [Case({"alpha_pattern": {"up": 1}})],
    "megatron_config": [],  # for Megatron's own linears, which are left to PEFT by their class
    "megatron_core": [],
    "trainable_token_indices": [Case({"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}, llama)],
    "loftq_config": [],  # an initialisation of A, B and W, for which these versions of PEFT need a GPU
    "eva_config": [Case({"init_lora_weights": "eva", "eva_config": sub("EvaConfig")})],
    "corda_config": [Case({"init_lora_weights": "corda", "corda_config": sub("CordaConfig", corda_method="ipm")})],
    "lora_ga_config": [Case({"init_lora_weights": "lora_ga", "lora_ga_config": sub("LoraGAConfig")})],
    "use_dora": [Case({"use_dora": True})],
    "velora_config": [Case({"velora_config": sub("VeloraConfig", num_groups=4)}, left=variant("VeloraLinearVariant"))],
    "alora_invocation_tokens": [
        Case(
            {"alora_invocation_tokens": [1, 4], "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"]},
            llama,
        )
    ],
    "use_qalora": [Case({"use_qalora": True})],  # of GPTQ's layers only
    "qalora_group_size": [Case({"use_qalora": True, "qalora_group_size": 8})],
    "monteclora_config": [
        Case({"monteclora_config": sub("MontecloraConfig")}, left=variant("MontecloraLinearVariant"))
    ],
    "layer_replication": [Case({"layer_replication": [(0, 2), (1, 2)], "target_modules": ["q_proj"]}, llama)],
    "runtime_config": [Case({"runtime_config": peft_config.LoraRuntimeConfig(ephemeral_gpu_offload=True)})],
    "lora_bias": [Case({"lora_bias": True, "target_modules": ["up"]})],
    "target_parameters": [
        Case({"target_modules": ["down"], "target_parameters": ["up.weight"]}, left=WRAPPER),
        Case({"target_modules": ["up"], "target_parameters": ["down.weight"]}, left=WRAPPER),
    ],
    "use_bdlora": [
        Case({"use_bdlora": sub("BdLoraConfig", target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2)})
    ],
    "arrow_config": [],  # a router over other adapters, which has a test of its own below
    "kasa_config": [Case({"kasa_config": sub("KasaConfig")})],
    "ensure_weight_tying": [
        Case({"ensure_weight_tying": True, "target_modules": ["embed_tokens", "lm_head"]}, tied_llama)
    ],
}
FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}


def test_every_field_of_this_pefts_config_has_a_row():
    assert CASES.keys() >= FIELDS, "a newer PEFT: see how its new field changes a layer's forward, and add a row"


def build(case: Case) -> tuple[nn.Module, PeftModel]:
    """Return a base, and a PEFT model of a copy of it."""
    torch.manual_seed(0)
    base = case.net().train()
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]} | case.kwargs))
    torch.manual_seed(1)
    model = get_peft_model(fresh(base, config), config)
    if not isinstance(config.init_lora_weights, str):
        randomise(model)
    return base, model


def fresh(base: nn.Module, config: LoraConfig) -> nn.Module:
    """Return a copy of `base`, with what CorDA needs to know about its inputs."""
    copied = copy.deepcopy(base)
    if config.init_lora_weights == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(copied, config, run_model=lambda: copied(inputs(copied)))
    return copied


def inputs(base: nn.Module) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(10, 24, requires_grad=True) if hasattr(base, "up") else torch.randint(0, 20, (2, 5))


def results(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return y, and the gradients of x and of every parameter."""
    x = inputs(model.get_base_model())
    model.zero_grad(set_to_none=True)
    y = model(x)
    y = getattr(y, "logits", y)
    if y.requires_grad:
        y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | grads | ({} if x.grad is None else {"dx": x.grad})


SHARED = {"layer_replication", "ensure_weight_tying"}
"""The fields with which layers share W. PEFT adds the updates of all of them to it, and its merged model is another."""


def equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Assert equality up to rounding in fp32."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def load(base: nn.Module, path: Path, like: PeftModel) -> PeftModel:
    base = fresh(base, like.peft_config["default"])
    torch.manual_seed(3)  # some initialisations draw numbers, and change the base
    return PeftModel.from_pretrained(base, path, is_trainable=True).train(like.training)


def both(model: nn.Module, plain: nn.Module, do: Callable[[nn.Module], Any]) -> bool:
    """Do something with both models and return whether they did it; otherwise they raised the same error."""
    errors = []
    for each in (model, plain):
        try:
            do(each)
        except Exception as error:
            errors.append(error)
    assert [str(error) for error in errors[1:]] == [str(error) for error in errors[:1]]
    return not errors


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)]
)
def test_a_model_with_the_field_set_is_pefts(case: Case, tmp_path: Path):
    missing = case.kwargs.keys() - FIELDS
    if missing or (case.kwargs.get("init_lora_weights") == "mica" and "kasa_config" not in FIELDS):
        pytest.skip(f"PEFT {peft.__version__} has no {', '.join(missing) or 'MiCA'}")
    (base, model), (_, plain) = build(case), build(case)
    if case.kwargs.get("lora_dropout"):
        model.eval(), plain.eval()  # masks are drawn by other generators: test_peft_values.py compares them
    report = lora_kernels.fuse(model)
    assert len(report.not_fused) == len(case.left), report
    assert all(part in why for part, why in zip(case.left, report.not_fused.values(), strict=True)), report
    equal(results(model), results(plain))
    if not case.left:
        assert all(layer.fused_calls and not layer.passed_over for layer in fused_layers(model))
    shared = bool(SHARED & case.kwargs.keys())
    unmerged = results(model) if shared else {}
    if both(model, plain, lambda each: each.merge_adapter()):
        if shared:
            equal({"y": results(model)["y"]}, {"y": unmerged["y"]})
        else:
            equal(dict(model.named_parameters()), dict(plain.named_parameters()))
            equal(results(model), results(plain))
        for each in (model, plain):
            each.unmerge_adapter()
        equal(dict(model.named_parameters()), dict(plain.named_parameters()))
    for each, name in ((model, "fused"), (plain, "plain")):
        each.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fused", "plain")]
    assert files[0].keys() == files[1].keys() and files[0]
    drifted = [key for key in files[0] if shared and key.endswith("base_layer.weight")]  # of a table, in PEFT's file
    equal(*({key: file[key] for key in drifted} for file in files))
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items() if key not in drifted)
    lora_kernels.enable()
    try:
        loaded = load(base, tmp_path / "fused", model)
    finally:
        lora_kernels.disable()
    assert len(fused_layers(loaded)) == len(fused_layers(model))
    equal(results(loaded), results(load(base, tmp_path / "plain", model)))


def test_a_router_over_other_adapters_is_left_to_peft():
    """Arrow chooses among the other adapters, sample by sample, and computes them all."""
    arrow = sub("ArrowConfig", top_k=1)
    arrow.task_adapter_names = ["ts_expert_0", "ts_expert_1"]
    torch.manual_seed(0)
    model, plain = (
        get_peft_model(Net(), LoraConfig(r=4, target_modules=["up", "down"]), "ts_expert_0") for _ in range(2)
    )
    for each in (model, plain):
        torch.manual_seed(0)
        each.add_adapter("ts_expert_1", LoraConfig(r=4, target_modules=["up", "down"]))
        randomise(each)
        each.add_adapter("router", LoraConfig(r=4, target_modules=["up", "down"], arrow_config=arrow))
        each.set_adapter("router")
    plain.load_state_dict(model.state_dict())
    report = lora_kernels.fuse(model)
    assert list(report.not_fused.values()) == ["adapter 'router' is a ArrowLinearVariant"] * 2
    equal(results(model), results(plain))
