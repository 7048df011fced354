"""A parent that reads a child's weight without calling the child is found in the source of its forward."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.nn import readers


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("read", "in_a_method", "either", "cast", "asked", "called", "rebuilt", "biased"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x):
        x = F.linear(x, self.read.weight, None)
        x = self._rest(x)
        x = self.either(x) if self.training else x @ self.either.weight.t()
        if isinstance(self.asked.weight, torch.Tensor) and self.cast.weight.dtype != torch.int8:
            x = x.to(self.cast.weight.dtype).to(self.cast.weight.device)
        return self.called(self.cast(self.asked(x)))

    def _rest(self, x):
        if isinstance(self.in_a_method, nn.Linear):
            x = x @ self.in_a_method.weight
        return x + self.biased.bias

    def fuse_weights(self):  # not a part of forward
        return torch.cat([self.called.weight, self.rebuilt.weight])


@pytest.mark.parametrize(
    ("name", "always"),
    [
        *(("read", True), ("in_a_method", True), ("biased", True), ("either", False)),
        *((name, None) for name in ("cast", "asked", "called", "rebuilt", "absent")),
    ],
)
def test_what_forward_reads_and_never_calls_is_told_from_the_rest(name, always):
    found = readers.reading(Parent(), name)
    assert (found and found.always) == always
    if name == "in_a_method":
        assert str(found) == "Parent._rest reads its weight or bias without calling it, past an adapter"
    if name == "either":
        assert "Parent.forward may read" in str(found)


def test_a_conversion_of_x_to_the_dtype_of_a_weight_is_found_where_int8_is_no_exception():
    class Converting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.other(self.proj(x.to(self.proj.weight.dtype)))

    model = nn.Sequential(Converting(), Parent())
    assert readers.conversion_in(model, "0.proj") == "Converting.forward"
    assert readers.conversion_in(model, "0.other") == readers.conversion_in(model, "1.cast") == ""


def test_a_module_around_the_parent_may_read_too():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Parent()

        def forward(self, x):
            return self.inner(x).to(self.inner.cast.weight.dtype) @ self.inner.called.weight

    model = nn.Sequential(nn.Sequential(Around()))
    found = readers.reading_in(model, "0.0.inner.called")
    assert not found.always and str(found).startswith("Around.forward may read")
    assert readers.reading_in(model, "0.0.inner.read").always
    assert readers.reading_in(model, "0.0.inner.cast") is None and readers.reading_in(model, "0.0.inner") is None


def test_a_subclass_has_the_methods_of_its_bases():
    class Child(Parent):
        def _rest(self, x):
            return x

    assert readers.reading(Child(), "read").always
    assert readers.reading(Child(), "in_a_method") is None


class ReadsByBase(Parent):
    def forward(self, x):
        return super().forward(x)


class ReadsByName(Parent):
    def forward(self, x):
        return Parent.forward(self, x)


class ReadsInBase(ReadsByBase):
    def _rest(self, x):
        return super()._rest(x)


@pytest.mark.parametrize("kind", [ReadsByBase, ReadsByName, ReadsInBase])
def test_a_base_whose_forward_is_called_reads_too(kind):
    for name in ("read", "in_a_method"):
        found = readers.reading(kind(), name)
        assert found and found.always and found.method.startswith("Parent.")
    assert readers.reading(kind(), "called") is None


class ReadsData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.cast = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x.to(self.cast.weight.data.dtype), self.read.weight.data)


def test_the_data_of_a_weight_is_its_values():
    assert readers.reading(ReadsData(), "read").always
    assert readers.reading(ReadsData(), "cast") is None


def test_a_state_space_mixer_counts_as_reading_what_it_may_read():
    mixer = Parent()
    mixer.A_log = nn.Parameter(torch.zeros(4))
    assert readers.reading(mixer, "either").always and readers.reading(mixer, "called") is None


def test_a_forward_on_the_instance_is_the_one_that_counts():
    def forward(module, x):
        return F.linear(x, module.called.weight) + module.read(x)

    parent = Parent()
    parent.forward = types.MethodType(forward, parent)
    assert readers.reading(parent, "called").always and readers.reading(parent, "read") is None
    assert readers.reading(Parent(), "called") is None


@pytest.mark.parametrize("name", ["forward", "_rest"])
def test_a_method_that_is_replaced_in_the_class_is_read_anew(name, monkeypatch):
    """Packages that patch a class may come after the first look at it, and may be taken away again."""

    class Patched(Parent):
        pass

    def forward(module, x):
        return F.linear(x, module.called.weight.to(module.rebuilt.weight.dtype))

    def found():
        parent = nn.Sequential(Patched())
        return readers.reading(parent[0], "called"), readers.conversion_in(parent, "0.rebuilt")

    assert found() == (None, "")
    with monkeypatch.context() as patch:
        patch.setattr(Parent, name, forward)
        method, converted = found()
        assert method is not None and method.method == f"Parent.{forward.__name__}" and converted
    assert found() == (None, "")


def test_a_class_without_source_is_read_by_nobody_we_know_of():
    made: dict = {}
    exec("def forward(self, x): return x @ self.read.weight", made)
    assert readers.reading(type("Made", (nn.Module,), {"forward": made["forward"]})(), "read") is None


def test_torchs_own_attention_reads_out_proj():
    assert readers.reading(nn.MultiheadAttention(4, 2), "out_proj").always


def test_the_inference_path_of_an_encoder_is_closed_and_can_be_opened_again():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    before = encoder.use_nested_tensor
    encoder.layers[0].linear1 = FusedLoRALinear(8, 16)
    undo = readers.close_fast_paths(encoder, FusedLoRALinear)
    assert [layer.activation_relu_or_gelu for layer in encoder.layers] == [0, 1]
    assert not encoder.use_nested_tensor
    undo()
    assert encoder.layers[0].activation_relu_or_gelu == 1 and encoder.use_nested_tensor == before
