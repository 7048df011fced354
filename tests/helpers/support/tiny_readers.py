"""Small models of transformers whose code reads the weight of a linear layer past its forward, and some that look as if
they did: how each is made, its inputs, and the names of the layers that are read."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t

IDS = torch.arange(3, 19).view(2, 8)
_TEXT: dict[str, Any] = {"input_ids": IDS}
_SIZE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "intermediate_size": 64}
_SOUND: dict[str, Any] = {
    **_HEADS, "hidden_size": 32, "num_hidden_layers": 1, "conv_dim": (16, 16), "conv_stride": (5, 4),
    "conv_kernel": (10, 8), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip
_TDNN: dict[str, Any] = {"tdnn_dim": (16, 16), "tdnn_kernel": (3, 3), "tdnn_dilation": (1, 1), "xvector_output_dim": 8}
_MIXER: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}


def llama():
    return t.LlamaForCausalLM(t.LlamaConfig(**_SIZE, **_HEADS))


def mamba():
    return t.MambaForCausalLM(t.MambaConfig(**_SIZE, state_size=4))


def mamba2():
    config = t.Mamba2Config(**_SIZE, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=4)
    return t.Mamba2ForCausalLM(config)


def falcon_mamba():
    return t.FalconMambaForCausalLM(t.FalconMambaConfig(**_SIZE, state_size=4))


def jamba():
    return t.JambaForCausalLM(
        t.JambaConfig(
            **_SIZE, **_HEADS, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
            expert_layer_offset=1, num_experts=2, mamba_d_state=4, use_mamba_kernels=False,
        )
    )  # fmt: skip


def bamba():
    return t.BambaForCausalLM(t.BambaConfig(**_SIZE, **_HEADS, num_key_value_heads=2, attn_layer_indices=[1], **_MIXER))


def zamba2():
    return t.Zamba2ForCausalLM(
        t.Zamba2Config(
            **_SIZE, **_HEADS, mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1,
            layers_block_type=["mamba", "hybrid"],
        )
    )  # fmt: skip


def wavlm():
    return t.WavLMModel(t.WavLMConfig(**_SOUND))


def xvector():
    return t.Wav2Vec2ForXVector(t.Wav2Vec2Config(**_SOUND, **_TDNN))


def bloom(**slow):
    return t.BloomForCausalLM(t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4, **slow))


def mobilebert():
    return t.MobileBertForMaskedLM(
        t.MobileBertConfig(
            vocab_size=64, hidden_size=32, embedding_size=16, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=32, true_hidden_size=32, intra_bottleneck_size=32,
        )
    )  # fmt: skip


def t5():
    config = t.T5Config(**_T5, feed_forward_proj="gated-gelu", pad_token_id=0, decoder_start_token_id=0)
    return t.T5ForConditionalGeneration(config)


def bloom_in_slices():
    return bloom(pretraining_tp=2, slow_but_exact=True)


_WAVE = {"input_values": torch.randn(1, 2000, generator=torch.Generator().manual_seed(0))}
MODELS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "llama": (llama, _TEXT, set()),
    "t5": (t5, {**_TEXT, "labels": IDS}, set()),
    "bloom": (bloom, _TEXT, set()),
    "bloom_in_slices": (bloom_in_slices, _TEXT, {"dense", "dense_4h_to_h"}),
    "mamba": (mamba, _TEXT, {"x_proj", "dt_proj", "out_proj"}),
    "mamba2": (mamba2, _TEXT, {"out_proj"}),
    "falcon_mamba": (falcon_mamba, _TEXT, {"x_proj", "dt_proj", "out_proj"}),
    "jamba": (jamba, _TEXT, {"dt_proj"}),
    "bamba": (bamba, _TEXT, {"out_proj"}),
    "zamba2": (zamba2, _TEXT, {"out_proj"}),
    "wavlm": (wavlm, _WAVE, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "xvector": (xvector, _WAVE, {"kernel"}),
    "mobilebert": (mobilebert, _TEXT, {"dense", "decoder"}),
}
"""By name: how the model is made, its inputs, and the last names of the layers whose weights are read."""
SLOW = {"falcon_mamba", "bamba", "zamba2", "mobilebert", "bloom", "mamba2", "xvector", "t5", "jamba", "llama"}
"""Those that the fast tests leave out."""
