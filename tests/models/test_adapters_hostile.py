"""Malicious adapter files raise errors that name the fault, and leave the model as it was."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from torch import nn

from lora_kernels import apply_lora, load_adapter, save_adapter

st = pytest.importorskip("safetensors.torch")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))


def adapted() -> nn.Module:
    model = plain()
    apply_lora(model, r=2)
    return model


@pytest.fixture
def directory(tmp_path):
    save_adapter(adapted(), tmp_path)
    return tmp_path


def refused(directory, message: str) -> None:
    for make in (plain, adapted):
        model = make()
        before, trained = (
            {key: value.clone() for key, value in model.state_dict().items()},
            [p.requires_grad for p in model.parameters()],
        )
        with pytest.raises(ValueError, match=message):
            load_adapter(model, directory)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == trained


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers_to_transform", "0"),
        ("layers_to_transform", {"0": 1}),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", 3),
        ("layers_pattern", [3]),
        ("target_modules", [0, 1]),
        ("target_modules", [["0"]]),
        ("exclude_modules", [3]),
    ],
)
def test_a_field_of_another_type_is_named(directory, key, value):
    config = json.loads((directory / CONFIG).read_bytes())
    (directory / CONFIG).write_text(json.dumps(config | {key: value}))
    refused(directory, f"{key}=.* is not what LoraConfig has there")


HUGE = 10**400
CONFIGS = {
    "r of zero": ({"r": 0}, "r must be an integer of at least 1"),
    "r negative": ({"r": -2}, "r must be an integer of at least 1"),
    "r true": ({"r": True}, "r=True is not what"),
    "r a fraction": ({"r": 2.0}, r"r=2\.0 is not what"),
    "r null": ({"r": None}, "r=None is not what"),
    "r huge": ({"r": 10**300}, "r is 10000"),
    "r wrong": ({"r": 1 << 30}, "r .* is 1073741824"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
    "alpha infinite": ({"lora_alpha": float("-inf")}, "lora_alpha must be a finite number"),
    "alpha huge": ({"lora_alpha": HUGE}, "too large"),
    "alpha a string": ({"lora_alpha": "8"}, "lora_alpha='8' is not what"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha=True is not what"),
    "dropout NaN": ({"lora_dropout": float("nan")}, r"lora_dropout must lie in \[0, 1\)"),
    "dropout 1": ({"lora_dropout": 1}, r"lora_dropout must lie in \[0, 1\)"),
    "dropout negative": ({"lora_dropout": -0.1}, r"lora_dropout must lie in \[0, 1\)"),
    "dropout huge": ({"lora_dropout": HUGE}, r"lora_dropout must lie in \[0, 1\)"),
    "dropout a list": ({"lora_dropout": [0.1]}, "lora_dropout=.* is not what"),
    "rank NaN": ({"rank_pattern": {"x": float("nan")}}, "rank_pattern=.* is not what"),
    "rank a fraction": ({"rank_pattern": {"x": 1.5}}, "rank_pattern=.* is not what"),
    "rank true": ({"rank_pattern": {"x": True}}, "rank_pattern=.* is not what"),
    "rank zero": ({"rank_pattern": {"x": 0}}, "r must be an integer of at least 1"),
    "rank a list": ({"rank_pattern": ["x"]}, "rank_pattern=.* is not what"),
    "alphas NaN": ({"alpha_pattern": {"x": float("nan")}}, "lora_alpha must be a finite number"),
    "alphas huge": ({"alpha_pattern": {"x": HUGE}}, "too large"),
    "alphas nested": ({"alpha_pattern": {"x": {"y": 1}}}, "alpha_pattern=.* is not what"),
    "a flag as a number": ({"use_rslora": 1}, "use_rslora=1 is not what"),
    "a flag as a string": ({"use_dora": "false"}, "use_dora='false' is not what"),
    "kind a list": ({"peft_type": ["LORA"]}, "peft_type is .*only 'LORA'"),
    "kind in other letters": ({"peft_type": "LoRA"}, "peft_type is 'LoRA'"),
    "kind in letters that look alike": ({"peft_type": "L\u039fRA"}, "peft_type is 'L\u039fRA'"),
    "targets a number": ({"target_modules": 3}, "target_modules=3 is not what"),
    "targets an object": ({"target_modules": {"0": 1}}, "target_modules=.* is not what"),
    "targets null in a list": ({"target_modules": [None]}, "target_modules=.* is not what"),
    "targets with a zero-width letter": ({"target_modules": ["0\u200b", "1\u200b"]}, "target_modules|does not fit"),
    "targets in full-width digits": ({"target_modules": ["\uff10", "\uff11"]}, "target_modules|does not fit"),
    "targets a path": ({"target_modules": ["../../0", "/1"]}, "target_modules|does not fit"),
    "targets a surrogate": ({"target_modules": ["\ud800"]}, "target_modules|does not fit"),
    "blocks true": ({"layers_to_transform": [True]}, "layers_to_transform=.* is not what"),
    "a long value": ({"bias": "x" * 10**6}, "^.{1,600}$"),
    "a long unknown field": ({"y" * 10**6: "x" * 10**6}, "^.{1,800}$"),
    "a pattern that is none": ({"layers_to_transform": [0], "layers_pattern": "(("}, "is no regular expression"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_hostile_config_is_refused(directory, case):
    fields, words = CONFIGS[case]
    config = json.loads((directory / CONFIG).read_bytes())
    (directory / CONFIG).write_text(json.dumps(config | fields))
    if "does not fit" in words:  # a model that has LoRA already does not read target_modules
        with pytest.raises(ValueError, match=words):
            load_adapter(plain(), directory)
    else:
        refused(directory, words)


TEXTS = {
    "deep": ("[" * 100_000 + "]" * 100_000, "not JSON"),
    "deep objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "not JSON"),
    "a field twice": ('{"peft_type": "LORA", "r": 2, "r": 4}', "'r' stands twice"),
    "a key twice inside": ('{"peft_type": "LORA", "rank_pattern": {"0": 2, "0": 4}}', "'0' stands twice"),
    "a number of many digits": ('{"peft_type": "LORA", "r": ' + "9" * 100_000 + "}", "not JSON"),
    "a number": ("1e999", "peft_type is 'float'"),
    "text after it": ('{"peft_type": "LORA"} x', "not JSON"),
    "a comment": ('{"peft_type": "LORA" /* */}', "not JSON"),
    "a python object": ("{'peft_type': 'LORA'}", "not JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_config_that_is_not_plain_json_is_refused(directory, case):
    text, words = TEXTS[case]
    (directory / CONFIG).write_text(text)
    refused(directory, words)


def _in_place_of(path, make) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00\xd8"), "not JSON"),
        (lambda path: path.write_bytes(b"") or os.truncate(path, 1 << 40), "1,099,511,627,776 bytes"),
    ],
    ids=["a pipe", "a device", "no text", "a terabyte"],
)
def test_what_is_no_config_is_not_read(directory, make, words):
    _in_place_of(directory / CONFIG, make)
    refused(directory, words)


def _safetensors(header: object, data: bytes = b"\0" * 4096, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def _header(directory) -> dict[str, dict]:
    content = (directory / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    return {key: value for key, value in header.items() if key != "__metadata__"}


def _changed(header, **fields):
    return header | {next(iter(header)): next(iter(header.values())) | fields}


HEADERS = {
    "overlap": lambda h: _safetensors({key: value | {"data_offsets": [0, 128]} for key, value in h.items()}),
    "past the end": lambda h: _safetensors(_changed(h, data_offsets=[0, 1 << 40])),
    "backwards": lambda h: _safetensors(_changed(h, data_offsets=[128, 0])),
    "negative offsets": lambda h: _safetensors(_changed(h, data_offsets=[-128, 0])),
    "huge shape": lambda h: _safetensors(_changed(h, shape=[1 << 40, 1 << 40])),
    "shape that overflows": lambda h: _safetensors(_changed(h, shape=[1 << 63, 4])),
    "negative shape": lambda h: _safetensors(_changed(h, shape=[-2, -16])),
    "shape of another size": lambda h: _safetensors(_changed(h, shape=[3, 16])),
    "unknown dtype": lambda h: _safetensors(_changed(h, dtype="F7")),
    "wider dtype": lambda h: _safetensors(_changed(h, dtype="F64")),
    "a hole": lambda h: _safetensors(dict(list(h.items())[1:])),
    "no JSON": lambda h: _safetensors(b"not json"),
    "a list": lambda h: _safetensors([1, 2]),
    "a header longer than the file": lambda h: _safetensors(h, size=1 << 30),
    "a header of 2^63 bytes": lambda h: _safetensors(h, size=1 << 63),
    "a deep header": lambda h: _safetensors(b"[" * 100_000 + b"]" * 100_000),
    "no bytes": lambda h: b"",
    "a zip, as torch.save writes": lambda h: b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_file_of_tensors_whose_header_lies_is_refused(directory, case):
    (directory / WEIGHTS).write_bytes(HEADERS[case](_header(directory)))
    refused(directory, "cut short or not a safetensors file|lacks|holds no adapter")


@pytest.mark.parametrize("size", [1 << 20, 1 << 40])
def test_a_file_of_tensors_of_another_size_is_not_read(directory, size):
    os.truncate(directory / WEIGHTS, size)
    refused(directory, "cut short or not a safetensors file")


NAMES = {
    "a path": "base_model.model.../../../etc/passwd.lora_A.weight",
    "an absolute path": "/etc/passwd",
    "a method": "base_model.model.__class__.lora_A.weight",
    "an attribute": "base_model.model.0.weight.lora_A.weight",
    "nothing": "",
    "dots": "base_model.model.....lora_A.weight",
    "a zero byte": "base_model.model.0\0.lora_A.weight",
    "a line": "base_model.model.0\n.lora_A.weight",
    "full-width": "base_model.model.\uff10.lora_A.weight",
    "right to left": "base_model.model.\u202e0.lora_A.weight",
    "long": "base_model.model." + "a." * 50_000 + "lora_A.weight",
    "many modules": "base_model.model." + "module." * 20_000 + "0.lora_A.weight",
    "many wrappers": "module." * 20_000 + "base_model.model.0.lora_A.weight",
    "no weight": "base_model.model.0.lora_A",
    "a bias": "base_model.model.0.lora_A.bias",
    "another part": "base_model.model.0.lora_C.weight",
}


@pytest.mark.parametrize("case", NAMES)
def test_a_tensor_with_a_hostile_name_is_refused_in_few_words(directory, case):
    tensors = st.load_file(directory / WEIGHTS)
    st.save_file(tensors | {NAMES[case]: torch.zeros(2, 16)}, directory / WEIGHTS)
    for make in (plain, adapted):
        with pytest.raises(ValueError, match=r"lacks|no lora_A|two values|does not fit|cut short") as raised:
            load_adapter(make(), directory)
        assert len(str(raised.value)) < 1500 and str(raised.value).isprintable()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0), (2,), (), (2, 16, 1), (1, 32)])
def test_an_adapter_of_another_shape_is_refused(directory, shape):
    tensors = st.load_file(directory / WEIGHTS)
    st.save_file(tensors | {"base_model.model.0.lora_A.weight": torch.zeros(shape)}, directory / WEIGHTS)
    refused(directory, "lora_A")


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8, torch.complex64])
def test_tensors_of_no_floating_dtype_are_refused(directory, dtype, part):
    tensors = st.load_file(directory / WEIGHTS)
    for key in tensors:
        if part in key:
            tensors[key] = tensors[key].to(dtype)
    st.save_file(tensors, directory / WEIGHTS)
    refused(directory, f"the adapter of 0 is {dtype}, no floating type")
