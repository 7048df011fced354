"""`lora_ga` puts in what the formula gives for the mean gradient, and leaves the model as it was in everything else."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear, save_adapter
from lora_kernels.train import lora_ga
from lora_kernels.train.gradients import blocks_of, mean_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    """Four linear layers, of which one is called twice, one shares its weight with an embedding, and one trains."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 24)
        self.twice = nn.Linear(24, 24, bias=False)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.twice(self.twice(self.up(self.table(ids)).tanh()).tanh())
        return self.head(self.down(h).tanh())


NAMES = ["up", "twice", "down", "head"]


def batches(n: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randint(20, (4, 9)), torch.randint(20, (4, 9))) for _ in range(n)]


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def exact_gradients(model: Model, data: list) -> dict[str, torch.Tensor]:
    """Return the mean gradients in fp64, from autograd alone, with a weight of its own for the head."""
    twin = copy.deepcopy(model).double()
    twin.head.weight = nn.Parameter(twin.table.weight.detach().clone())
    weights = [twin.get_submodule(name).weight for name in NAMES]
    total = [torch.autograd.grad(loss(twin, batch), weights) for batch in data]
    return {name: sum(each[i] for each in total) / len(data) for i, name in enumerate(NAMES)}


def byte_size(model: Model) -> int:
    return sum(4 * model.get_submodule(name).weight.numel() for name in NAMES)


@pytest.mark.parametrize("memory", [1 << 30, 2 * 4 * 24 * 24])
def test_gradients_are_those_of_fp64_in_one_pass_and_in_blocks(memory):
    model, data = Model(), batches()
    layers = {name: model.get_submodule(name) for name in NAMES}
    assert len(blocks_of(layers, memory)) == (1 if memory > 10_000 else 3)
    passes = []
    found = dict(mean_gradients(model, layers, data, loss, memory, lambda: passes.append(0)))
    assert list(found) == NAMES and len(passes) == 3 * len(blocks_of(layers, memory))
    for name, exact in exact_gradients(model, data).items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"up": 2}}])
def test_a_b_and_w_are_the_formula_and_the_model_computes_the_same(settings):
    model, data = Model(), batches()
    before, x = copy.deepcopy(model), data[0][0]
    wanted = exact_gradients(model, data)
    report = lora_ga(model, data, loss, r=3, lora_alpha=6, target_modules=NAMES, **settings)
    assert [layer.name for layer in report.layers] == NAMES
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)
    for name, gradient in wanted.items():
        layer, w = model.get_submodule(name), before.get_submodule(name).weight
        assert isinstance(layer, FusedLoRALinear) and layer.init == "lora_ga" and layer.splits_base
        r, N = layer.r, gradient.shape[0]
        assert r == settings.get("rank_pattern", {}).get(name, 3)
        u, _, vt = torch.linalg.svd(gradient)
        c = N**0.25 / 4
        a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        # Singular vectors that are near in value may mix, so the subspaces are compared.
        torch.testing.assert_close(a.T @ a / c**2, vt[:r].T @ vt[:r], rtol=0, atol=2e-3)
        torch.testing.assert_close(b @ b.T / c**2, u[:, r : 2 * r] @ u[:, r : 2 * r].T, rtol=0, atol=2e-3)
        torch.testing.assert_close(
            layer.weight.double(), w.double() - layer.scaling * b @ a, rtol=0, atol=1e-6 * w.abs().max().item()
        )
        assert not layer.weight.requires_grad and layer.lora_A.requires_grad
    assert model.head.weight is not model.table.weight and torch.equal(model.table.weight, before.table.weight)


def test_the_first_step_is_nearer_to_full_fine_tuning_than_loras():
    from lora_kernels import apply_lora

    data = batches(6)
    full = Model()
    starts = {"lora_ga": copy.deepcopy(full), "kaiming": copy.deepcopy(full)}
    lora_ga(starts["lora_ga"], data, loss, r=3, target_modules=["up", "twice", "down"])
    apply_lora(starts["kaiming"], r=3, target_modules=["up", "twice", "down"])
    gradient = exact_gradients(full, data)["twice"]
    cosine = {}
    for name, model in starts.items():
        sum(loss(model, batch) for batch in data).backward()
        layer = model.twice
        step = layer.lora_B.grad @ layer.lora_A + layer.lora_B @ layer.lora_A.grad
        cosine[name] = (step.double() * gradient).sum() / step.double().norm() / gradient.norm()
    assert cosine["lora_ga"] > 0.9 and cosine["lora_ga"] > cosine["kaiming"] + 0.1


def test_the_bits_do_not_depend_on_the_number_of_blocks_and_a_second_run_repeats_them():
    data, made = batches(), []
    model = Model()
    for memory in (1 << 30, 2 * 4 * 24 * 24, 1 << 30):
        twin = copy.deepcopy(model)
        lora_ga(twin, data, loss, r=3, target_modules=NAMES, memory=memory)
        made.append(twin.state_dict())
    for other in made[1:]:
        assert all(torch.equal(value, other[key]) for key, value in made[0].items())


class Alive(TorchDispatchMode):
    """Notes the most bytes of tensors with the given shapes that are alive at a time."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.most = shapes, 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and tuple(t.shape) in self.shapes:
                storage = t.untyped_storage()
                self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._known = {key: each for key, each in self._known.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._known.values()))
        return made


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_no_more_than_the_given_bytes_of_gradients_are_alive(blocks):
    """Eight layers have a shape that no activation has, so that what is alive of it is gradients."""
    model, data = nn.Sequential(*[nn.Linear(40, 40, bias=False) for _ in range(8)]), [torch.randn(3, 40)] * 2
    own = 4 * 40 * 40
    held = 8 // blocks
    memory = own * (held + 1)
    layers = dict(model.named_children())
    assert len(blocks_of(layers, memory)) == blocks
    with Alive({(40, 40)}) as alive:
        for name, gradient in mean_gradients(model, layers, data, lambda m, x: m(x).square().sum(), memory):
            assert gradient.shape == (40, 40) and model.get_submodule(name).weight.grad is None
            del gradient
    weights = 8 * own  # their memory counts as well, because each has another Parameter for a pass
    assert own * held < alive.most - weights <= memory


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    class Checkpointed(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids).requires_grad_()
            return checkpoint(lambda x: self.head(self.down(self.up(x).tanh()).tanh()), x, use_reentrant=reentrant)

    model, data = Checkpointed(), batches(2)
    twin = copy.deepcopy(model)
    twin.forward = lambda ids: twin.head(twin.down(twin.up(twin.table(ids)).tanh()).tanh())
    names = ["up", "down"]
    lora_ga(model, data, loss, r=3, target_modules=names)
    lora_ga(twin, data, loss, r=3, target_modules=names)
    assert all(torch.equal(model.get_submodule(n).lora_A, twin.get_submodule(n).lora_A) for n in names)


def test_a_model_in_16_bits_adds_its_gradients_in_fp32_and_gets_adapters_in_fp32():
    model, data = Model(), batches(2)
    wanted = exact_gradients(copy.deepcopy(model).bfloat16().float(), data)
    model.bfloat16()
    x, before = data[0][0], model(data[0][0])
    layers = {name: model.get_submodule(name) for name in NAMES}
    for name, gradient in mean_gradients(model, layers, data, loss, 1 << 30):
        assert gradient.dtype == torch.float32
        assert (gradient.double() - wanted[name]).norm() <= 0.05 * wanted[name].norm()
    lora_ga(model, data, loss, r=3, target_modules=NAMES)
    assert model.up.lora_A.dtype == torch.float32 and model.up.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.1)


def test_conv1d_of_gpt2_gets_the_formula_in_its_own_layout():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(24, 16), nn.Tanh(), nn.Linear(24, 8))
    twin = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), copy.deepcopy(model[2]))
    with torch.no_grad():
        twin[0].weight.copy_(model[0].weight.T)
        twin[0].bias.copy_(model[0].bias)
    data = [torch.randn(12, 16) for _ in range(2)]
    for each in (model, twin):
        lora_ga(each, data, lambda m, x: m(x).square().mean(), r=2, target_modules=["0"])
    torch.testing.assert_close(model[0].lora_A, twin[0].lora_A, rtol=0, atol=1e-4)
    torch.testing.assert_close(model[0].weight, twin[0].weight.T, rtol=0, atol=1e-4)


def test_without_a_loss_the_models_own_is_taken():
    class Output(Model):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=F.cross_entropy(super().forward(input_ids).flatten(0, 1), labels.flatten()))

    model, data = Output(), batches(2)
    twin = Model()
    twin.load_state_dict(model.state_dict())
    lora_ga(model, [{"input_ids": x, "labels": y} for x, y in data], r=3, target_modules=NAMES)
    lora_ga(twin, data, loss, r=3, target_modules=NAMES)
    assert torch.equal(model.up.lora_B, twin.up.lora_B)


@pytest.mark.slow
def test_a_model_of_transformers_gives_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(32, (4, 12))
    before = model(ids).logits
    report = lora_ga(model, [{"input_ids": ids, "labels": ids}], r=2)
    assert len(report.layers) == 7
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


def test_nothing_else_of_the_model_changes(tmp_path):
    model, data = Model().eval(), batches(2)
    model.table.weight.requires_grad_(False)
    calls = []
    model.up.weight.register_post_accumulate_grad_hook(calls.append)
    model.up.weight.grad = torch.ones_like(model.up.weight)
    weights, trained = dict(model.named_parameters()), {n: p.requires_grad for n, p in model.named_parameters()}
    layers = {name: model.get_submodule(name) for name in NAMES}
    with torch.no_grad():
        list(mean_gradients(model, layers, data, loss, 1 << 30))
    assert all(dict(model.named_parameters())[name] is p for name, p in weights.items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained and not model.training
    assert not calls and torch.equal(model.up.weight.grad, torch.ones_like(model.up.weight))
    assert model.down.weight.grad is None
    lora_ga(model, data, loss, r=3, target_modules=NAMES)
    with pytest.raises(ValueError, match=r"init='lora_ga'.*merge_and_unload"):
        save_adapter(model, tmp_path)


def raising(model: nn.Module, batch: object) -> torch.Tensor:
    raise RuntimeError("in the loss")


def unused() -> nn.Module:
    model = Model()
    model.other = nn.Linear(8, 8)
    return model


def with_nan() -> nn.Module:
    model = Model()
    model.down.weight.data[2, 3] = math.nan
    return model


def without_rows(model: nn.Module, batch: object) -> torch.Tensor:
    return model(torch.zeros(1, 1, dtype=torch.long)).square().sum()


CASES = [
    (Model, {"loss": raising}, RuntimeError, "in the loss"),
    (Model, {"loss": lambda m, b: m(b[0])}, ValueError, r"one number, got \(4, 9, 20\)"),
    (Model, {"loss": lambda m, b: 1.0}, ValueError, "one number, got float"),
    (Model, {"loss": lambda m, b: loss(m, b) * math.inf}, ValueError, "for some layers: up.* not finite"),
    (
        Model,
        {"loss": lambda m, b: torch.zeros(())},
        ValueError,
        "up.*there is no gradient.*checkpoint.*exclude_modules",
    ),
    (Model, {"loss": without_rows}, ValueError, r"the gradient \(24, 16\) has rank 1, and LoRA-GA takes 2r = 6"),
    (Model, {"loss": None}, ValueError, "a batch is a tuple and no mapping of keywords: give loss="),
    (unused, {"target_modules": [*NAMES, "other"]}, ValueError, r"layers: other \(there is no gradient.*rank_pattern"),
    (with_nan, {}, ValueError, r"down: 1 of the 384 elements .* nan at \(2, 3\)"),
    (Model, {"r": 9}, ValueError, r"up: .* between 1 and min\(N, K\) / 2 = 8 .* got 9"),
    (Model, {"r": 0}, ValueError, "up: r must be an integer of at least 1"),
    (Model, {"lora_alpha": 0}, ValueError, "up: scale must be positive"),
    (Model, {"gamma": -1.0}, ValueError, "gamma must be positive and finite, got -1"),
    (Model, {"target_modules": ["table", "up"]}, ValueError, "LoRA-GA is for linear layers, and these are not: table"),
    (Model, {"target_modules": ["nothing"]}, ValueError, "match no layer"),
    (Model, {"memory": 1000}, ValueError, r"gradient of up \(24, 16\) takes 3,072 bytes, and memory is 1,000"),
    (Model, {"data": []}, ValueError, "no batches"),
    (Model, {"data": iter(batches(2)), "memory": 4608}, ValueError, r"read once: give a list .* memory=8,960"),
    (lambda: Model().double(), {}, TypeError, r"up: .* got torch\.float64"),
]


@pytest.mark.parametrize(("make", "given", "error", "message"), CASES)
def test_what_cannot_be_is_refused_and_the_model_stays(make, given, error, message):
    model = make()
    model.table.weight.requires_grad_(False)
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    given = {"loss": loss, "r": 3, "target_modules": NAMES, "data": batches(2)} | given
    with pytest.raises(error, match=message):
        lora_ga(model, given.pop("data"), given.pop("loss"), **given)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (parameter, value, requires_grad) in before.items():
        assert after[name] is parameter and parameter.requires_grad == requires_grad and parameter.grad is None
        assert torch.equal(parameter.nan_to_num(), value.nan_to_num())


def test_an_iterator_is_enough_for_one_pass():
    lora_ga(Model(), iter(batches(2)), loss, r=3, target_modules=NAMES)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([torch.arange(36).view(4, 9) % 20, torch.arange(36).view(4, 9) % 7])


def test_a_data_loader_without_a_length_is_read_once_for_each_block():
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    model = Model()
    lora_ga(model, loader, lambda m, ids: loss(m, (ids, ids)), r=3, target_modules=NAMES, memory=2 * 4 * 24 * 24)
    assert all(model.get_submodule(name).init == "lora_ga" for name in NAMES)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_is_made_without_gradients_can_be_trained(mode):
    model, data = Model(), batches(2)
    with mode():
        lora_ga(model, data, loss, r=3, target_modules=NAMES)
    loss(model, data[0]).backward()
    assert model.up.lora_A.grad.abs().max() > 0 and not model.up.weight.is_inference()


def test_the_progress_is_shown_at_a_terminal_only(monkeypatch, capsys):
    pytest.importorskip("rich")
    lora_ga(Model(), batches(2), loss, r=3, target_modules=NAMES)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    lora_ga(Model(), batches(2), loss, r=3, target_modules=NAMES)
    assert "gradients for LoRA-GA" in capsys.readouterr().err


def test_blocks_hold_what_fits_with_one_gradient_more():
    layers = {str(i): nn.Linear(10, n, bias=False) for i, n in enumerate((10, 10, 30, 5, 5))}
    for memory in itertools.chain(range(2400, 4000, 200)):
        blocks = blocks_of(layers, memory)
        assert list(itertools.chain(*blocks)) == list(layers)
        sizes = [[40 * layers[name].out_features for name in block] for block in blocks]
        assert all(sum(block) + max(block) <= memory for block in sizes)
        for first, second in itertools.pairwise(sizes):
            assert sum(first) + second[0] + max(*first, second[0]) > memory
