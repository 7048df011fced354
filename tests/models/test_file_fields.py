"""Every field of PEFT's LoraConfig in a file is used, refused by name where it changes what is computed, or known to
change nothing.

The table has a row for each field of the newest PEFT that this package knows, and a test finds a field without one.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lora_kernels.models.adapter_config import checked_config

USED: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 3,
    "lora_dropout": 0.25,
    "use_rslora": True,
    "use_dora": True,
    "target_modules": ["other"],
    "exclude_modules": ["head"],
    "rank_pattern": {"up": 2},
    "alpha_pattern": {"up": 2},
    "layers_to_transform": [1],
    "layers_pattern": "blocks",
    "target_parameters": ["experts.down_proj"],
    "ensure_weight_tying": True,
}
"""The fields that choose layers, or set what they compute, and a value that is not PEFT's default."""

REFUSED: dict[str, list[Any]] = {
    "peft_type": ["LOHA", "ADALORA", "DELORA"],
    "bias": ["all", "lora_only"],
    "modules_to_save": [["head"]],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"],
    "megatron_config": [{"hidden_size": 8}],
    "trainable_token_indices": [[1], {"emb": [1]}],
    "velora_config": [{"num_groups": 4}],
    "alora_invocation_tokens": [[1]],
    "use_qalora": [True],
    "monteclora_config": [{"samples": 4}],
    "layer_replication": [[[0, 2]]],
    "lora_bias": [True],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 2}],
    "kasa_config": [{"beta": 1e-4}],
}
"""The fields that make another function of A and B, or keep parameters beside them, and values that do."""

WITHOUT_EFFECT: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "Net", "parent_library": "here"},
    "peft_version": "0.21.2",
    "base_model_name_or_path": "a/name",
    "revision": "main",
    "inference_mode": True,
    "fan_in_fan_out": True,  # PEFT decides by the class of the layer, and so do we
    "megatron_core": "megatron.core",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": True},
}
"""The notes, and the settings of features that another field switches on. Initialisations that leave W as it is are
among `FIRST_VALUES`."""

FIRST_VALUES = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""The values of init_lora_weights after which A and B alone are the adapter."""

PLAIN = {"peft_type": "LORA", "target_modules": ["up", "down"]}


def read(**fields: Any) -> Any:
    return checked_config(json.loads(json.dumps(PLAIN | fields)), "adapter_config.json")


def test_every_field_of_this_pefts_config_has_a_row():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= USED.keys() | REFUSED.keys() | WITHOUT_EFFECT.keys(), "see what the new field changes, and add it"


def test_no_field_stands_in_two_rows():
    assert len(USED) + len(REFUSED) + len(WITHOUT_EFFECT) == len({*USED, *REFUSED, *WITHOUT_EFFECT})


def test_pefts_defaults_are_accepted():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    fields = peft.LoraConfig(target_modules=["up", "down"]).to_dict()
    given = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    config = checked_config(json.loads(json.dumps(given | {"peft_type": "LORA"})), "adapter_config.json")
    assert (config.settings.r, config.settings.lora_alpha) == (8, 8)


@pytest.mark.parametrize("field", USED)
def test_a_field_that_is_used_changes_what_is_read(field: str):
    assert read(**{field: USED[field]}) != read()


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in REFUSED for value in REFUSED[field]], ids=str)
def test_a_field_that_changes_what_is_computed_is_refused_by_name(field: str, value: Any):
    with pytest.raises(ValueError, match=field):
        read(**{field: value})


@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_a_field_without_effect_changes_nothing(field: str):
    assert dataclasses.replace(read(**{field: WITHOUT_EFFECT[field]}), of_peft=False) == read()


@pytest.mark.parametrize("value", FIRST_VALUES)
def test_first_values_that_leave_w_as_it_is_change_nothing(value: Any):
    assert read(init_lora_weights=value) == read()


@pytest.mark.parametrize("value", [True, 1, "on", {"a": 1}, [0]], ids=str)
def test_a_field_of_a_later_peft_is_refused_where_it_is_set(value: Any):
    with pytest.raises(ValueError, match="not known here, and may change what is computed: new_config"):
        read(new_config=value)
    assert read(new_config=None) == read(new_config=False) == read(new_config={}) == read()
