"""The example server gives each request the tokens of its own adapter, also when several run at once."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import continuous
from support.paths import ROOT

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import lora_kernels

TOKENS = 6
PROMPTS = {None: "the base", "style-0": "one", "style-1": "another prompt", "style-2": "a third", "style-3": "!"}


class Served:
    """A running server, and what it should answer."""

    def __init__(self, folder: Path) -> None:
        import _serve
        import serve_adapters
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=_serve.Bytes.vocabulary, initializer_range=0.2, eos_token_id=256, **sizes)
        ).eval()
        tokenizer = _serve.Bytes()
        _serve.make_adapters(model, folder)
        self.wanted = {}
        for name, prompt in PROMPTS.items():
            model.generation_config.pad_token_id = 0
            adapted = model if name is None else _loaded(model, folder / name)
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            found = adapted.generate(ids, max_new_tokens=TOKENS, do_sample=False)
            self.wanted[name] = found[0, ids.shape[1] :].tolist()
        self.module: ModuleType = serve_adapters
        self.engine = serve_adapters.Engine(model, tokenizer, folder)
        self.server = serve_adapters.start(self.engine, 0)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"

    def ask(self, **fields: Any) -> list[dict[str, Any]]:
        url = f"http://{self.address}/generate"
        with urllib.request.urlopen(url, json.dumps(fields).encode(), timeout=30) as response:
            return [json.loads(line) for line in response]

    def get(self, page: str) -> str:
        with urllib.request.urlopen(f"http://{self.address}/{page}", timeout=30) as response:
            return response.read().decode()


def _loaded(model: torch.nn.Module, folder: Path) -> Any:
    import copy

    adapted = copy.deepcopy(model)
    lora_kernels.load_adapter(adapted, folder)
    return adapted.eval()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if reason := continuous.lacks():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.syspath_prepend(str(ROOT / "examples"))
        import _serve

        patch.setattr(_serve, "ADAPTERS", 4)
        served = Served(tmp_path_factory.mktemp("adapters"))
        yield served
        served.server.shutdown()
        served.server.server_close()
        served.engine.close()


def test_requests_that_run_together_get_the_tokens_of_their_own_adapters(served: Served) -> None:
    names = [*PROMPTS] * 2
    together = threading.Barrier(len(names))

    def client(name: str | None) -> list[dict[str, Any]]:
        together.wait()
        return served.ask(prompt=PROMPTS[name], adapter=name, max_new_tokens=TOKENS)

    with ThreadPoolExecutor(len(names)) as threads:
        answers = list(threads.map(client, names))
    for name, answer in zip(names, answers, strict=True):
        assert [each["token"] for each in answer[:-1]] == served.wanted[name], name
        assert answer[-1] == {"done": True}
    assert len({tuple(each) for each in served.wanted.values()}) == len(PROMPTS)
    stats = served.engine.pool.stats()
    assert stats.leased == 0
    for name in filter(None, PROMPTS):  # the prompt's tokens, and the answer's but for the last one
        assert stats.rows[name] == 2 * (len(PROMPTS[name]) + TOKENS - 1)


def test_pages_and_errors(served: Served) -> None:
    assert json.loads(served.get("adapters")) == [f"style-{i}" for i in range(4)]
    assert "lora_pool_adapters_registered 4" in served.get("metrics").splitlines()
    for fields, status, told in (
        ({"prompt": "x", "adapter": "unknown"}, 404, "no adapter is called unknown"),
        ({"adapter": "style-0"}, 404, "prompt"),
        ({"prompt": "x", "max_new_tokens": "many"}, 400, "many"),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            served.ask(**fields)
        assert error.value.code == status and told in json.loads(error.value.read())["error"]


def test_a_client_that_leaves_frees_its_adapter(served: Served) -> None:
    tokens = served.engine.stream("x", "style-0", 500)
    next(tokens)
    assert served.engine.pool.stats().leased == 1
    tokens.close()
    served.ask(prompt="y", max_new_tokens=30)  # the steps of another request
    assert served.engine.pool.stats().leased == 0


def test_the_load_test_prints_a_table_and_draws_it(served: Served, tmp_path: Path, capsys) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    import _serve

    rounds = _serve.load_test(served.address, 2, tmp_path, short=True)
    assert [each.adapters for each in rounds] == [0, 1, 4]
    assert all(each.tokens == 2 * 2 * 8 and len(each.first) == 4 for each in rounds)
    assert "the base alone" in capsys.readouterr().out
    assert (tmp_path / "load_test.png").read_bytes().startswith(b"\x89PNG")
