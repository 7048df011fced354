"""The sizes of a model's linear layers, from the config.json that Hugging Face keeps beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NEEDED = "hidden_size, num_attention_heads and intermediate_size"


def projections(path: Path) -> list[tuple[int, int]]:
    """Return the different (K, N) of the linear layers in a transformer's blocks: q, k and v, o, up and gate, down.

    The keys are those of Llama, Mistral, Qwen, Gemma, BERT and ViT; those of the text part count where a model has
    several. Raises ValueError, with a sentence, for a file that has none.
    """
    config = _read(path)
    if "hidden_size" not in config and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    missing = [key for key in ("hidden_size", "num_attention_heads", "intermediate_size") if config.get(key) is None]
    if missing:
        raise ValueError(
            f"{path} has no {' and no '.join(missing)}: the sizes are read from {_NEEDED} (or use --shapes)"
        )
    hidden, heads, inner = (
        _positive(path, config, key) for key in ("hidden_size", "num_attention_heads", "intermediate_size")
    )
    kv_heads = _positive(path, config, "num_key_value_heads", heads)
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"{path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head = _positive(path, config, "head_dim", hidden // heads)
    sizes = [
        (hidden, heads * head),
        (hidden, kv_heads * head),
        (heads * head, hidden),
        (hidden, inner),
        (inner, hidden),
    ]
    for K, N in sizes:
        if K % 8 or N % 8:
            raise ValueError(f"{path}: a layer of {K}→{N} is not measured: K and N must be multiples of 8")
    return list(dict.fromkeys(sizes))


def _read(path: Path) -> dict[str, Any]:
    try:
        path = path / "config.json" if path.is_dir() else path
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not the object of a config.json")
    return config


def _positive(path: Path, config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**24:
        raise ValueError(f"{path}: {key} is {value!r}, not a number of columns or heads")
    return value
