"""A request of transformers' continuous batching has the tokens that its adapter generates alone."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import continuous as continuous_batching

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import GenerationConfig  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.serving import continuous  # noqa: E402
from lora_kernels.serving.continuous import Requests, generate_batch  # noqa: E402

if reason := continuous_batching.lacks():
    pytest.skip(reason, allow_module_level=True)
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402

PROMPT = list(range(1, 70))
"""More than a page of the cache, so that it would be shared."""
NAMES = ["a", "b", "c", None]


def make(targets: Any = "all-linear") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False
    )
    model = transformers.LlamaForCausalLM(config).eval()
    kwargs = {"lora_alpha": 32, "target_modules": targets, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **kwargs), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(r=8, **kwargs))
    model.add_adapter("c", peft.LoraConfig(r=3, **kwargs))
    lora_kernels.fuse(model.eval(), strict=True)
    return model


def how(**kwargs: Any) -> GenerationConfig:
    return GenerationConfig(
        **({"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | kwargs)
    )


def batching(**kwargs: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**({"allow_block_sharing": False, "page_size": 16, "num_blocks": 64} | kwargs))


def manager_of(model: Any, **kwargs: Any) -> Any:
    return model.init_continuous_batching(generation_config=how(), continuous_batching_config=batching(**kwargs))


def alone(model: Any, name: str | None, prompt: list[int] = PROMPT, new: int = 6) -> list[int]:
    """Return the tokens that PEFT's own layers generate with one adapter, without a cache."""
    lora_kernels.unfuse(model)
    tokens = torch.tensor([prompt])
    try:
        for _ in range(new):
            with torch.no_grad():
                logits = model(input_ids=tokens, use_cache=False, adapter_names=[name or "__base__"]).logits
            tokens = torch.cat([tokens, logits[0, -1].argmax().view(1, 1)], 1)
    finally:
        lora_kernels.fuse(model, strict=True)
    return tokens[0, len(prompt) :].tolist()


@pytest.fixture(autouse=True)
def _stopping_a_manager_collects_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers collects all garbage of the process then, which takes longer than a test."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture(scope="module")
def model() -> Any:
    return make()


def collect(manager: Any, n: int, seconds: float = 60) -> dict[str, Any]:
    found: dict[str, Any] = {}
    until = time.monotonic() + seconds
    while len(found) < n:
        assert time.monotonic() < until, f"only {sorted(found)} ended"
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            found[output.request_id] = output
    return found


def test_requests_of_one_batch_have_the_tokens_of_their_adapters_alone(model):
    prompts = [PROMPT, PROMPT, PROMPT[:20], PROMPT]
    got = generate_batch(
        model, prompts, NAMES, generation_config=how(), continuous_batching_config=batching(max_batch_tokens=64)
    )
    want = [alone(model, name, prompt) for name, prompt in zip(NAMES, prompts, strict=True)]
    assert [each.generated_tokens for each in got] == want
    assert all(each.error is None for each in got)
    assert len({tuple(each) for each in want}) == 4


def test_the_same_prompt_one_after_another_reads_no_cache_of_another_adapter(model):
    """With block sharing three of these four answers are wrong."""
    manager = manager_of(model)
    with Requests(manager, model) as requests:
        manager.start()
        try:
            got = []
            for name in NAMES:
                request = requests.add(PROMPT, name)
                got.append(collect(manager, 1)[request].generated_tokens)
        finally:
            manager.stop(block=True)
    assert got == [alone(model, name) for name in NAMES]
    assert not requests._held


def test_adapters_of_the_last_layer_are_served():
    model = make(["q_proj", "lm_head"])
    got = generate_batch(model, [PROMPT] * 4, NAMES, generation_config=how(), continuous_batching_config=batching())
    assert [each.generated_tokens for each in got] == [alone(model, name) for name in NAMES]


@pytest.mark.slow
def test_several_answers_of_a_request_have_its_adapter(model):
    manager = model.init_continuous_batching(
        generation_config=how(num_return_sequences=2, do_sample=True, top_k=1), continuous_batching_config=batching()
    )
    with Requests(manager, model) as requests:
        manager.start()
        try:
            requests.add(PROMPT, "b", request_id="first")
            requests.add(PROMPT, None, request_id="second")
            found = collect(manager, 4)
        finally:
            manager.stop(block=True)
        assert not requests._held
    want = {name: alone(model, name) for name in ("b", None)}
    for request_id, output in found.items():
        assert output.generated_tokens == want["b" if request_id.startswith("first") else None]
    assert len(found) == 4


@pytest.mark.slow
def test_a_request_that_was_added_to_the_manager_itself_has_the_base(model):
    manager = manager_of(model)
    with Requests(manager, model):
        manager.start()
        try:
            request = manager.add_request(PROMPT)
            output = collect(manager, 1)[request]
        finally:
            manager.stop(block=True)
    assert output.generated_tokens == alone(model, None)


def test_a_cancelled_request_is_released_and_the_others_go_on(model):
    manager = manager_of(model)
    with Requests(manager, model) as requests:
        manager.start()
        try:
            requests.add(PROMPT, "a", request_id="long", max_new_tokens=150)
            requests.cancel("long")
            requests.add(PROMPT, "b", request_id="short")
            output = collect(manager, 1)["short"]
        finally:
            manager.stop(block=True)
        requests._release_cancelled()
        assert not requests._held and not requests._cancelled
    assert output.generated_tokens == alone(model, "b")


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"allow_block_sharing": True}, "by their tokens alone"),
        ({"use_cuda_graph": True}, "CUDA graphs"),
        ({"default_compile_level": 1}, "pads its batches"),
    ],
)
def test_managers_that_would_mix_up_adapters_are_refused(model, kwargs, text):
    config = batching(**kwargs)
    manager = model.init_continuous_batching(generation_config=how(), continuous_batching_config=config)
    manager.continuous_batching_config.use_cuda_graph = kwargs.get("use_cuda_graph", False)
    step = manager._generation_step
    with pytest.raises(ValueError, match=text):
        Requests(manager, model)
    assert manager._generation_step == step


def test_a_manager_of_another_model_and_a_second_requests_are_refused(model):
    manager = manager_of(make())
    with pytest.raises(ValueError, match="another model"):
        Requests(manager, model)
    manager = manager_of(model)
    with Requests(manager, model), pytest.raises(ValueError, match="Requests already"):
        Requests(manager, model)
    with Requests(manager, model):  # the first is closed
        pass


def test_a_transformers_that_lacks_something_is_refused_by_its_name(model):
    manager = manager_of(model)

    class Other:
        deliver = None

    manager.output_router = Other()
    with pytest.raises(RuntimeError, match=rf"has no Other\.deliver_batch: .* transformers {continuous.KNOWN}"):
        Requests(manager, model)


def test_unknown_adapters_and_ids_in_use_are_refused_before_any_work(model):
    manager = manager_of(model)
    with Requests(manager, model) as requests:
        with pytest.raises(KeyError, match="no adapter is called nobody; there are a, b, c"):
            requests.add(PROMPT, "nobody")
        requests.add(PROMPT, "a", request_id="one")
        with pytest.raises(ValueError, match="'one' is running"):
            requests.add(PROMPT, "b", request_id="one")
        assert list(requests._held) == ["one"]
    with pytest.raises(ValueError, match="2 prompts and 1 names"):
        generate_batch(model, [PROMPT, PROMPT], ["a"])


def test_an_error_in_a_step_ends_the_requests_with_it(model):
    manager = manager_of(model)
    with Requests(manager, model) as requests:
        requests.add(PROMPT, "a", request_id="one")
        requests._held["one"].number = 99  # as if the adapter had been removed
        manager.start()
        output = collect(manager, 1)["one"]
        manager.stop(block=True)
        assert "99" in output.error or "100" in output.error
        assert not requests._held


@pytest.mark.slow
def test_another_thread_may_use_the_model_meanwhile(model):
    manager = manager_of(model)
    model.set_adapter("c")
    with torch.no_grad():
        want = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    with Requests(manager, model) as requests:
        manager.start()
        try:
            request = requests.add(PROMPT, "a", max_new_tokens=20)
            with torch.no_grad():
                got = [model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits for _ in range(5)]
            output = collect(manager, 1)[request]
        finally:
            manager.stop(block=True)
    assert all(torch.allclose(each, want, atol=1e-5) for each in got)
    assert output.generated_tokens[:6] == alone(model, "a")


@pytest.fixture
def pool() -> Iterator[Any]:
    pooled = pytest.importorskip("lora_kernels.serving.pool")
    model = make()
    states = {name: peft.get_peft_model_state_dict(model, adapter_name=name) for name in ("a", "b", "c")}
    configs = {name: model.peft_config[name] for name in states}
    base = model.unload()
    pool = pooled.AdapterPool(base)
    for name, state in states.items():
        pool.register(name, state, config=configs[name])
    yield pool
    pool.close()


def test_a_pool_serves_requests_and_gets_its_adapters_back(pool, model):
    got = generate_batch(pool, [PROMPT] * 4, NAMES, generation_config=how(), continuous_batching_config=batching())
    assert [each.generated_tokens for each in got] == [alone(model, name) for name in NAMES]
    pool.remove("a", wait=True, timeout=1)  # no request holds it any longer
    with pytest.raises(KeyError):
        generate_batch(pool, [PROMPT], ["a"], generation_config=how(), continuous_batching_config=batching())
