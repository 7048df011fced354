"""What a pool takes and refuses, and what its model computes."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.adapter_models import CONFIG, WEIGHTS, edit_config, edit_weights
from support.pool_adapters import LAYERS, base, batches, given, saved, with_given
from torch import nn

import lora_kernels
from lora_kernels.nn.mixed import mixed
from lora_kernels.serving.layer import PooledLinear
from lora_kernels.serving.pool import AdapterPool, PoolFull

NAMES = ["a", None, "b", "__base__", "b", "a"]
SETTINGS = {"r": 4, "lora_alpha": 6}


@pytest.fixture
def pool(tmp_path: Path):
    with torch.no_grad(), AdapterPool(base()) as pool:
        yield pool


def check_rows(pool: AdapterPool, models: dict[str, nn.Module]) -> None:
    """Hold the rows of a mixed batch to the model of each adapter alone, and the base's to its own bits."""
    (x,) = batches(1)
    with pool.lease(models) as lease, lease.mixed(NAMES):
        y = pool.model(x)
    for m, name in enumerate(NAMES):
        want = models.get(name, base())(x)[m]
        if name in models:
            torch.testing.assert_close(y[m], want)
            assert not torch.allclose(y[m], base()(x)[m])
        else:
            assert torch.equal(y[m], want)


def test_each_row_gets_its_own_adapter_from_files(pool, tmp_path):
    models = {
        "a": saved(tmp_path / "a", 1, rank_pattern={"head": 9}, alpha_pattern={"inner.fc": 2}),
        "b": saved(tmp_path / "b", 2, r=3, use_rslora=True, target_modules=["inner.out"]),
    }
    for name in models:
        pool.register(name, tmp_path / name)
    assert pool.stats().resident == 0  # only the headers were read
    check_rows(pool, models)


def test_each_row_gets_its_own_adapter_from_state_dicts(pool):
    states = {"a": given(1), "b": given(2, 3, ("head",))}
    pool.register("a", states["a"], config=SETTINGS)
    pool.register("b", states["b"], config={"r": 3, "lora_alpha": 6})
    check_rows(pool, {"a": with_given(states["a"], 1.5), "b": with_given(states["b"], 2.0)})


def test_a_state_dict_is_copied(pool):
    state = given(1)
    pool.register("a", state, config=SETTINGS)
    want = with_given(state, 1.5)
    for value in state.values():
        value.fill_(float("nan"))
    check_rows(pool, {"a": want, **_second(pool)})


def _second(pool: AdapterPool) -> dict[str, nn.Module]:
    state = given(9)
    pool.register("b", state, config=SETTINGS)
    return {"b": with_given(state, 1.5)}


def test_a_config_of_peft_gives_the_settings_of_a_state_dict(pool):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(LAYERS), rank_pattern={"head": 4})
    state = given(1)
    assert pool.register("a", state, config=config).layers == tuple(sorted(LAYERS))
    check_rows(pool, {"a": with_given(state, 1.5), **_second(pool)})


def test_mixed_finds_the_lease_of_the_thread(pool):
    pool.register("a", given(1), config=SETTINGS)
    (x,) = batches(1, 2)
    with pool.lease(["a"]) as lease, lease.mixed(["a", None]):
        want = pool.model(x)
    with pool.lease(["a"]), mixed(pool.model, ["a", None]):
        assert torch.equal(pool.model(x), want)
    with pytest.raises(RuntimeError, match=r"inside `with pool\.lease"):
        mixed(pool.model, ["a", None])
    with pytest.raises(RuntimeError, match="was closed"):
        lease.mixed(["a", None])


def test_the_base_alone_has_the_models_bits_and_close_puts_the_model_back():
    model, (x,) = base(), batches(1)
    layers, want, state = list(model.modules()), model(x), model.state_dict()
    with AdapterPool(model) as pool:
        assert sum(isinstance(each, PooledLinear) for each in model.modules()) == 4
        assert not any(isinstance(each, nn.Linear) for each in model.modules())
        assert torch.equal(model(x), want)
        pool.register("a", given(1), config=SETTINGS)
        with pool.lease(["a"]) as lease:
            assert torch.equal(model(x), want)
            for context in (lease.mixed([None] * 6), pool.mixed([None] * 6), lease.mixed([-1] * 6)):
                with context:
                    assert torch.equal(model(x), want)
        with pool.lease([]) as lease, lease.mixed(["__base__"] * 6):
            assert torch.equal(model(x), want)
        assert list(model.state_dict()) == list(state)
        model.load_state_dict({name: value + 1 for name, value in state.items()})
        model.train()
    assert [id(each) for each in model.modules()] == [id(each) for each in layers]
    assert all(each.training for each in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())  # they share memory
    assert not torch.equal(model(x), want)
    pool.close()
    for call in (lambda: pool.lease(["a"]), lambda: pool.register("b", given(1), config=SETTINGS)):
        with pytest.raises(RuntimeError, match="was closed"):
            call()


@pytest.mark.slow
def test_a_compiled_model_serves_any_lease():
    """In a new thread, in which no context was entered before the model is compiled."""

    def work() -> None:
        model = base().float()
        (x,) = (x.float() for x in batches(1))
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad(), AdapterPool(model) as pool:
            for i in range(3):
                pool.register(f"n{i}", given(i), config=SETTINGS)
            torch.testing.assert_close(compiled(x), base().float()(x))
            for names in (["n0", "n1", None, "n2", "n0", "n0"], ["n2"] * 6, [None, "n1", "n1", None, "n0", "n1"]):
                with pool.lease(set(names)) as lease, lease.mixed(names):
                    torch.testing.assert_close(compiled(x), model(x))
            pool.update("n0", given(7))
            pool.remove("n1")
            with pool.lease(["n0"]) as lease, lease.mixed(["n0", None] * 3):
                torch.testing.assert_close(compiled(x)[0], with_given(given(7), 1.5).float()(x)[0])

    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()


def test_a_model_moves_with_its_pool():
    model = base()
    with AdapterPool(model):
        model.to(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.ones(2, 5)).dtype == torch.float32


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantised_base_is_served(quant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)).requires_grad_(False)
    lora_kernels.apply_lora(model, r=2, quant=quant)
    x, state = torch.randn(4, 64), {}
    for name, (K, N) in {"0": (64, 64), "2": (64, 32)}.items():
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(8, K) / 8
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(N, 8) / 8
    with torch.no_grad():
        before, keys = model(x), list(model.state_dict())
        with AdapterPool(model) as pool:
            torch.testing.assert_close(model(x), before)
            pool.register("a", state, config={"r": 8, "lora_alpha": 8})
            with pool.lease(["a"]) as lease, lease.mixed([None, "a", None, "a"]):
                y = model(x)
            assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(y[::2], before[::2])
        h = x
        for name in ("0", "2"):
            a, b = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            h = h @ model[int(name)].quantized_weight().dequantize().T + model[int(name)].bias + h @ a.T @ b.T
            h = h.tanh() if name == "0" else h
        torch.testing.assert_close(y[1::2], h[1::2], rtol=1e-4, atol=1e-5)


def test_an_adapter_of_a_transformers_model_gives_pefts_logits(tmp_path):
    peft = pytest.importorskip("peft")
    from support.tiny_llama import llama, lora

    model, x = llama().eval(), torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    plain, want = copy.deepcopy(model), {}
    with torch.no_grad():
        want[None] = plain(input_ids=x).logits
        for name, r in (("a", 4), ("b", 8)):
            theirs = peft.get_peft_model(copy.deepcopy(plain), lora(r=r, init_lora_weights=False)).eval()
            theirs.save_pretrained(tmp_path / name)
            want[name] = theirs(input_ids=x).logits
        with AdapterPool(model) as pool:
            for name in "ab":
                pool.register(name, tmp_path / name)
            with pool.lease(["a", "b"]) as lease, lease.mixed(["b", None, "a"]):
                logits = model(input_ids=x).logits
            assert "lm_head" in pool._layers
    for m, name in enumerate(["b", None, "a"]):
        torch.testing.assert_close(logits[m], want[name][m])


def refused(pool: AdapterPool, error: type[Exception], match: str, source: object, **more: object) -> None:
    """Hold that `source` is refused, and the pool is as before."""
    before, layers = pool.stats(), [layer.stack for layer in pool._layers.values()]
    with pytest.raises(error, match=match):
        pool.register("bad", source, **more)
    assert pool.stats() == before
    with pytest.raises(KeyError, match="bad"):
        pool.lease(["bad"])
    assert [len([each for each in stack if each]) for stack in layers] == [
        len([each for each in layer.stack if each]) for layer in pool._layers.values()
    ]


def test_an_adapter_that_matches_nothing_is_refused_with_both_lists(pool, tmp_path):
    saved(tmp_path / "a", 1)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("base_model.model.", "base_model.model.x.")] = tensors.pop(key)

    edit_weights(tmp_path / "a", rename)
    refused(pool, ValueError, r"adapters for x\..*; the pool serves fc, head", tmp_path / "a")


def test_a_partial_match_is_reported(pool, tmp_path):
    saved(tmp_path / "a", 1)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            if ".head." in key:
                tensors[key.replace(".head.", ".other.")] = tensors.pop(key)

    edit_weights(tmp_path / "a", rename)
    with pytest.warns(UserWarning) as told:
        report = pool.register("a", tmp_path / "a")
    assert report.passed_over == {"other": "the model has no such layer"} and report.missing == ("head",)
    assert report.layers == ("inner.fc", "inner.out")
    assert "other" in str(told[0].message) and "head" in str(told[1].message)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"use_dora": True}, "lora_magnitude_vector|DoRA"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 5}, "another base, or files of two adapters"),
        ({"something_new": 1}, "something_new=1"),
    ],
)
def test_what_is_not_served_is_refused_by_name(pool, tmp_path, fields, match):
    saved(tmp_path / "a", 1)
    edit_config(tmp_path / "a", **fields)
    refused(pool, ValueError, match, tmp_path / "a")


def test_damaged_files_leave_the_pool_as_it_was(pool, tmp_path):
    saved(tmp_path / "a", 1)
    weights, config = tmp_path / "a" / WEIGHTS, tmp_path / "a" / CONFIG
    whole, settings = weights.read_bytes(), config.read_text()
    for cut in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        refused(pool, ValueError, "cut short", tmp_path / "a")
    weights.write_bytes(whole)
    config.write_text(settings[:40])
    refused(pool, ValueError, "cut short or not JSON", tmp_path / "a")
    config.write_text(settings)
    weights.unlink()
    refused(pool, FileNotFoundError, "there is no", tmp_path / "a")
    refused(pool, FileNotFoundError, "there is no", tmp_path / "nowhere")


def test_values_that_are_not_finite_are_refused(pool, tmp_path):
    state = given(1)
    state["base_model.model.head.lora_B.weight"][0, 0] = float("inf")
    refused(pool, ValueError, "head is not finite", state, config=SETTINGS)
    saved(tmp_path / "a", 1)
    edit_weights(tmp_path / "a", lambda tensors: tensors["base_model.model.head.lora_A.weight"].fill_(float("nan")))
    refused(pool, ValueError, "head is not finite", tmp_path / "a", pinned=True)
    pool.register("late", tmp_path / "a")  # the values are read when they are needed
    for _ in range(2):
        with pytest.raises(ValueError, match="head is not finite"):
            pool.lease(["late"])
    assert pool.stats().device_bytes == 0


def test_other_mistakes_are_named(pool, tmp_path):
    saved(tmp_path / "a", 1)
    pool.register("a", tmp_path / "a")
    for name in ("", "__base__", None):
        with pytest.raises(ValueError, match="the name of an adapter"):
            pool.register(name, tmp_path / "a")
    with pytest.raises(ValueError, match="registered already"):
        pool.register("a", tmp_path / "a")
    with pytest.raises(ValueError, match="needs its settings"):
        pool.register("b", given(1))
    with pytest.raises(ValueError, match="config of its own"):
        pool.register("b", tmp_path / "a", config=SETTINGS)
    with pytest.raises(TypeError, match="got a int"):
        pool.register("b", 3)
    with pytest.raises(KeyError, match=r"no adapter is called b, c; registered are a"):
        pool.lease(["a", "c", "b"])
    with pytest.raises(TypeError, match="takes a list of names, got the text 'a'"):
        pool.lease("a")
    for call in (pool.key, pool.remove, pool.prefetch):
        with pytest.raises(KeyError, match="no adapter is called z"):
            call("z")
    assert pool.stats().registered == 1 and pool.stats().misses == 0


def test_a_model_that_cannot_have_a_pool_is_refused_and_left_alone(tmp_path):
    model = base()
    with AdapterPool(model):
        with pytest.raises(ValueError, match="has an AdapterPool already"):
            AdapterPool(model)
        for copying in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="while an AdapterPool serves it"):
                copying(model)
    copy.deepcopy(model)
    trained = base()
    lora_kernels.apply_lora(trained, r=2)
    trained.head.lora_B.data.fill_(1)
    with AdapterPool(trained) as pool:
        assert "its own" in pool._targets.passed_over["head"] and type(trained.head) is lora_kernels.FusedLoRALinear
    with pytest.raises(ValueError, match="no linear layer"):
        AdapterPool(nn.Sequential(nn.Tanh()))
    for keywords, match in (
        ({"host_bytes": 1}, "host_bytes is for a model on a GPU"),
        ({"pin_memory": True}, "pin_memory is for a model on a GPU"),
        ({"device_bytes": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            AdapterPool(model, **keywords)
    with pytest.raises(TypeError, match="do not go with fc"):
        AdapterPool(model, dtype=torch.bfloat16)
    assert type(model.fc) is nn.Linear
    with pytest.raises(ValueError, match="meta device"):
        AdapterPool(base().to("meta"))


def test_a_pool_refuses_a_model_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["head"]))
    with pytest.raises(ValueError, match="layers of PEFT"):
        AdapterPool(model)


def test_fp32_adapters_beside_a_16_bit_base():
    model = nn.Sequential(nn.Linear(16, 16)).to(torch.bfloat16).requires_grad_(False)
    state = {f"base_model.model.0.lora_{part}.weight": torch.randn(16, 16) / 4 for part in "AB"}
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    for dtype in (None, torch.float32):
        with AdapterPool(model, dtype=dtype) as pool:
            pool.register("a", state, config={"r": 16, "lora_alpha": 16})
            (layer,) = pool._layers.values()
            assert layer.stack[0].a.dtype == (dtype or torch.bfloat16)
            with torch.no_grad(), pool.lease(["a"]) as lease, lease.mixed(["a"] * 3):
                y = model(x)
        a, b = (state[f"base_model.model.0.lora_{part}.weight"] for part in "AB")
        want = x.float() @ (model[0].weight.float() + b @ a).T + model[0].bias.float()
        torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)


def test_pinned_adapters_are_loaded_at_once_and_a_file_that_changes_is_another_version(pool, tmp_path):
    saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 2)
    pool.register("a", tmp_path / "a", pinned=True)
    assert pool.stats().resident == 1
    pool.register("b", tmp_path / "b")
    want = saved(tmp_path / "b", 3)
    with pytest.raises(ValueError, match="was changed since it was registered"):
        pool.lease(["b"])
    before = pool.key("b")
    pool.update("b", tmp_path / "b")
    assert pool.key("b") != before and pool.key("b").startswith("b@")
    (x,) = batches(1, 1)
    with pool.lease(["b"]) as lease, lease.mixed(["b"]):
        torch.testing.assert_close(pool.model(x), want(x))


def test_the_metrics_are_prometheus_text(pool, tmp_path):
    saved(tmp_path / "a", 1)
    pool.register('a"\\\n', tmp_path / "a")
    (x,) = batches(1, 3)
    for _ in range(2):
        with pool.lease(['a"\\\n']) as lease, lease.mixed(['a"\\\n', None, 'a"\\\n']):
            pool.model(x)
    stats, lines = pool.stats(), pool.metrics().splitlines()
    assert (stats.hits, stats.misses, stats.loads, stats.rows) == (1, 1, 1, {'a"\\\n': 4})
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['lora_pool_rows_total{adapter="a\\"\\\\\\n"}'] == "4"
    assert values['lora_pool_bytes{tier="device"}'] == str(stats.device_bytes) != "0"
    assert values['lora_pool_bytes{tier="disk"}'] == str(sum(f.stat().st_size for f in (tmp_path / "a").iterdir()))
    types = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    for name in values:
        kind = types[name.partition("{")[0]]
        assert kind == ("counter" if name.partition("{")[0].endswith("_total") else "gauge")
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        return
    assert list(text_string_to_metric_families(pool.metrics()))


def test_the_config_of_an_earlier_version_serves_an_update(pool):
    pool.register("a", given(1), config={"r": 4, "lora_alpha": 12, "use_rslora": True})
    state = given(2)
    pool.update("a", state)
    (x,) = batches(1, 1)
    with pool.lease(["a"]) as lease, lease.mixed(["a"]):
        torch.testing.assert_close(pool.model(x), with_given(state, 6.0)(x))
    assert json.dumps(pool.stats().rows) == '{"a": 1}'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.update("a", given(3, 8), config={"r": 8, "lora_alpha": 8})


def test_pool_full_is_an_error_of_its_own():
    assert issubclass(PoolFull, RuntimeError)
