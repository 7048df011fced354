"""Which linear layers of a model are the query, key, value and output projections of its attention, by their names."""

from __future__ import annotations

from collections.abc import Iterable

_ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q", "q_proj", "query", "query_proj", "q_lin", "to_q", "wq"),
    "k": ("k", "k_proj", "key", "key_proj", "k_lin", "to_k", "wk"),
    "v": ("v", "v_proj", "value", "value_proj", "v_lin", "to_v", "wv"),
    "qkv": ("c_attn", "qkv", "qkv_proj", "query_key_value", "wqkv", "to_qkv", "w_pack"),
    "kv": ("kv", "kv_proj", "key_value", "to_kv", "wkv"),
}
"""The last parts of names in small letters: of Llama, Mistral, Qwen and T5, of BERT, DeBERTa and DistilBERT, of vision
transformers, of GPT-2, GPT-NeoX, Bloom and Falcon, of Phi-3, ModernBERT and diffusers."""
_OUTPUTS = ("o", "o_proj", "out_proj", "out_lin", "wo", "to_out.0", "to_out", "c_proj", "proj", "dense")
"""Names of the output projection beside q, k and v. MLPs have some of these names too, so the place counts."""
_OUTPUT_OUTSIDE = "output.dense"
"""Its name beside the module that holds q, k and v, as in BERT: attention.self.query, attention.output.dense."""


def roles_of(names: Iterable[str]) -> dict[str, str]:
    """Return the roles of the projections of attention among linear layers of these names: "q", "k", "v" or "o", and
    "qkv" or "kv" for a layer that computes several of them at once. Other layers are left out."""
    by_end = {end: role for role, ends in _ROLES.items() for end in ends}
    low = {name.lower(): name for name in names}
    roles = {name: by_end[end] for key, name in low.items() if (end := key.rpartition(".")[2]) in by_end}
    for name in [name for name, role in roles.items() if "q" in role]:
        inside = name.lower().rpartition(".")[0]
        outside = inside.rpartition(".")[0]
        places = [f"{inside}.{end}" if inside else end for end in _OUTPUTS]
        places.append(f"{outside}.{_OUTPUT_OUTSIDE}" if outside else _OUTPUT_OUTSIDE)
        found = next((low[place] for place in places if place in low), None)
        if found is not None:
            roles[found] = "o"
    return roles
