"""`lora_kernels.nn.mixed` over fused PEFT models: training, ids of tokens, checkpointing, compiling, and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import PeftModel  # noqa: E402
from support.old_torch import compiles_whole_models  # noqa: E402
from support.peft_models import config, make, randomise, run, same  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.core.rows import Rows  # noqa: E402
from lora_kernels.nn.mixed import mixed, table_of  # noqa: E402

ALL = ["default", "second", "third"]
NAMES = ["second", None, "default", "second", "__base__", "default"]


def several(dtype: torch.dtype = torch.float64, p: float = 0.0, **fuse: bool) -> PeftModel:
    """Return a fused model of three adapters that are all trained, one of which is not in every layer."""
    model = make(dtype, lora_dropout=p)
    model.add_adapter("second", config(r=2, use_rslora=True, lora_dropout=p / 2))
    model.add_adapter("third", config(r=5, target_modules=["up"]))
    randomise(model)
    if dtype == torch.float64:
        model.double()
    model.base_model.set_adapter(ALL)
    lora_kernels.fuse(model, strict=True, **fuse)
    return model.train()


def of(name: str, results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in results.items() if f".{name}." in key}


def alone(model: PeftModel, x: Tensor, name: str | None) -> dict[str, Tensor]:
    """Return the results of PEFT's own layers with one adapter, or none, for all samples."""
    plain = copy.deepcopy(model)
    lora_kernels.unfuse(plain)
    if name in (None, "__base__"):
        with plain.disable_adapter():
            return run(plain, x)
    plain.base_model.set_adapter([name])
    return run(plain, x)


def test_each_adapter_has_the_gradients_that_it_has_alone_on_its_samples():
    model, x = several(), torch.randn(6, 5, 24, dtype=torch.float64)
    with mixed(model, NAMES):
        got = run(model, x)
    assert of("default", got) and of("second", got)
    for name in ("default", "second", None):
        mine = [j for j, each in enumerate(NAMES) if (each if each != "__base__" else None) == name]
        want = alone(model, x[mine], name)
        torch.testing.assert_close(got["y"][mine], want["y"])
        torch.testing.assert_close(got["dx"][mine], want["dx"])
        if name is not None:
            same(
                {"y": want["y"], "dx": want["dx"]} | of(name, got),
                {key: want[key] for key in ["y", "dx"]} | of(name, want),
            )


def test_an_adapter_without_rows_gets_no_gradient_and_does_not_move():
    model, x = several(), torch.randn(2, 24, dtype=torch.float64)
    third = {name: p for name, p in model.named_parameters() if ".third." in name}
    before = {name: p.detach().clone() for name, p in third.items()}
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), weight_decay=0.5)
    for names in (["third", "second"], ["default", "second"]):
        optimiser.zero_grad()
        with mixed(model, names):
            model(x).square().sum().backward()
        optimiser.step()
        if names[0] == "third":
            assert all(not torch.equal(p, before[name]) for name, p in third.items())
            before = {name: p.detach().clone() for name, p in third.items()}
            state = {name: copy.deepcopy(optimiser.state[p]) for name, p in third.items()}
    for name, p in third.items():
        assert p.grad is None and torch.equal(p, before[name])
        assert all(torch.equal(value, state[name][key]) for key, value in optimiser.state[p].items())


def test_the_masks_of_an_adapter_do_not_depend_on_the_other_samples(monkeypatch):
    monkeypatch.setattr("lora_kernels.ops.prepare_multi.draw_seeds", lambda n, device: [torch.tensor(7)] * n)
    model, x = several(p=0.4), torch.randn(6, 5, 24, dtype=torch.float64)
    with mixed(model, NAMES):
        among_others = run(model, x)
    with mixed(model, ["default", "default"]):
        by_itself = run(model, x[[2, 5]])
    same(
        of("default", among_others) | {"y": among_others["y"][[2, 5]]}, of("default", by_itself) | {"y": by_itself["y"]}
    )
    model.eval()
    with mixed(model, ["default", "default"]):
        assert not torch.allclose(run(model, x[[2, 5]])["y"], by_itself["y"])


def test_autocast_has_the_values_of_pefts_names():
    model, x = several(torch.float32).eval(), torch.randn(6, 5, 24)
    with torch.autocast("cpu", torch.bfloat16), mixed(model, NAMES):
        got = run(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model, x, adapter_names=[name or "__base__" for name in NAMES])
    same(got, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_inside_and_raises_outside(reentrant):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "num_hidden_layers": 2}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    kwargs = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, **kwargs), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(r=3, lora_dropout=0.3, **kwargs))
    model.base_model.set_adapter(["a", "b"])
    lora_kernels.fuse(model, strict=True)
    model.train()
    tokens, names = torch.randint(0, 40, (3, 7)), ["b", "__base__", "a"]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        with mixed(model, names):
            model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    assert any(".a." in name for name in want) and any(".b." in name for name in want)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients()
    assert got.keys() == want.keys() and all(torch.equal(grad, want[name]) for name, grad in got.items())
    with mixed(model, names):
        loss = model(input_ids=tokens, labels=tokens).loss
    with pytest.raises(RuntimeError, match="inside the same"):
        loss.backward()
    del loss  # while it lives, its backward may still come
    assert gradients().keys() == want.keys()


def test_ids_of_tokens_serve_packed_sequences():
    model, x = several(), torch.randn(1, 9, 24, dtype=torch.float64)
    table = table_of(model)
    assert table == {"default": 0, "second": 1, "third": 2}
    names = ["second", None, "third"]
    ids = [table[name] if name else -1 for name in names for _ in range(3)]
    with mixed(model, torch.tensor([ids])):
        got = model(x)
    with mixed(model, Rows.by_length([3, 3, 3], [1, -1, 2])):
        assert torch.equal(model(x), got)
    for j, name in enumerate(names):
        part = slice(3 * j, 3 * j + 3)
        torch.testing.assert_close(got[:, part], alone(model, x[:, part], name)["y"])


def test_layers_that_share_an_input_compute_by_row_too():
    class Attention(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.up, self.down = (nn.Linear(24, 24, dtype=dtype) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + self.down(x)

    model = make(net=Attention)
    model.add_adapter("second", config(r=2))
    randomise(model)
    plain = copy.deepcopy(model).eval()
    lora_kernels.fuse(model, group=[("up", "down")])
    x = torch.randn(2, 24)
    with mixed(model, ["second", "default"]):
        got = model(x)
    torch.testing.assert_close(got, plain(x, adapter_names=["second", "default"]))


def test_disabled_adapters_are_the_base_alone():
    model, x = several(), torch.randn(6, 5, 24, dtype=torch.float64)
    with mixed(model, NAMES), model.disable_adapter():
        assert torch.equal(model(x), alone(model, x, None)["y"])


def test_a_step_without_the_context_is_as_before():
    model, x = several(), torch.randn(6, 5, 24, dtype=torch.float64)
    model.base_model.set_adapter(["second"])
    want = run(model, x)
    with mixed(model, NAMES):
        run(model, x)
    got = run(model, x)
    assert all(torch.equal(value, want[key]) for key, value in got.items())


@compiles_whole_models
def test_a_compiled_model_is_not_compiled_again_for_other_rows():
    model, x = several(torch.float32), torch.randn(4, 6, 24)
    layer = model.base_model.model.up
    frames = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        frames.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for names in (
        ["second", "second", "default", None],
        ["third"] * 4,
        [None] * 4,
        ["default", "third", "second", None],
    ):
        with mixed(model, names):
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(frames) == 1
    model.base_model.set_adapter(["second"])
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.slow
@compiles_whole_models
def test_a_compiled_step_has_the_gradients_of_its_rows():
    model, x = several(torch.float32), torch.randn(4, 6, 24)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
    for names in (["second", "second", "default", None], ["default", "second", "second", "second"]):
        with mixed(model, names):
            want = run(model, x)
            model.zero_grad()
            own_x = x.clone().requires_grad_()
            compiled(own_x).double().square().sum().backward()
        torch.testing.assert_close(own_x.grad, want["dx"])
        for name, p in model.named_parameters():
            if name in want:
                torch.testing.assert_close(p.grad, want[name])


def test_a_model_that_is_not_fused_is_refused():
    with pytest.raises(RuntimeError, match=r"call lora_kernels\.fuse\(model\)"):
        mixed(make(), ["default"])


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"modules_to_save": ["head"]}, "base_model.model.head: a ModulesToSaveWrapper, which has a copy of its own"),
        ({"target_modules": ["up", "emb"]}, "base_model.model.emb: a FusedEmbedding, which computes the same adapters"),
        (
            {"trainable_token_indices": {"emb": [1]}},
            "base_model.model.emb: a .*TrainableTokens.*, which has trainable tokens",
        ),
    ],
)
def test_parts_that_would_compute_the_active_adapter_are_refused_by_name(kwargs, text):
    model = make(**kwargs)
    lora_kernels.fuse(model)
    with pytest.raises(RuntimeError, match=text):
        mixed(model, ["default"])


def test_adapters_that_cannot_be_computed_by_row_are_refused_by_name():
    model, x = make(use_dora=True), torch.randn(2, 24)
    model.add_adapter("second", config(r=2))
    lora_kernels.fuse(model)
    with mixed(model, ["default", "second"]), pytest.raises(RuntimeError, match="a DoRA adapter"):
        model(x)
    with mixed(model, ["second", None]):  # nobody has the DoRA adapter here
        model(x)
    with mixed(model, ["second", None]), pytest.raises(ValueError, match="adapter_names"):
        model.eval()(x, adapter_names=["second", "second"])


def test_merged_layers_are_refused():
    model = several(torch.float32)
    model.merge_adapter(["second"])
    with mixed(model, ["default"]), pytest.raises(RuntimeError, match="merged"):
        model(torch.randn(1, 24))


def test_unknown_names_and_rows_of_another_number_raise_before_any_work():
    model = several(torch.float32)
    with pytest.raises(KeyError, match="no adapter is called nobody; there are default, second, third"):
        mixed(model, ["nobody"])
    with mixed(model, ["second", None]), pytest.raises(ValueError, match="2 samples"):
        model(torch.randn(3, 24))
