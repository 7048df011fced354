"""A server of many LoRA adapters over one model: continuous batching, an adapter for each request, streamed tokens.

    python examples/serve_adapters.py [--port 8000] [--model PATH --adapters FOLDER]
    python examples/serve_adapters.py --load-test [--short] [--clients 8] [--out DIR]

    curl -N localhost:8000/generate -d '{"prompt": "Hello", "adapter": "style-3", "max_new_tokens": 20}'
    curl localhost:8000/adapters
    curl localhost:8000/metrics

Without ``--model`` it serves a small Llama of random weights with bytes as tokens, and random adapters of several
ranks, so that it runs offline; its texts mean nothing. ``--load-test`` starts the server, lets clients send requests
over 0, 1, 4, ... adapters at a time, prints a table, and draws it.

One thread, transformers' continuous batching, computes the tokens of all running requests in one forward.
`AdapterPool` keeps the adapters in use in memory. `Requests` holds a lease of each request's adapter, and tells the
model which rows are whose. This file is an example and no production server: it has no authentication and no limits.

It needs transformers and safetensors; the load test also rich and matplotlib.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from _serve import Bytes, load_test, make_adapters, make_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lora_kernels.serving.continuous import Requests
from lora_kernels.serving.pool import AdapterPool

BUILD = Path(__file__).parent.parent / "build" / "serve_adapters"
STOPPED = None
"""What a request gets in the place of a result when the server stops."""


class Engine:
    """The model, its pool, and the thread that generates. `stream` may be called by many threads at once."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, device_bytes: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.pool = AdapterPool(model, device_bytes=device_bytes)
        for path in sorted(folder.iterdir()):
            self.pool.register(path.name, path)
        config = ContinuousBatchingConfig(
            allow_block_sharing=False,  # keys and values belong to one adapter
            page_size=32,
            num_blocks=512,
            max_batch_tokens=256,
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
        self.manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)
        self.requests = Requests(self.manager, self.pool)
        self._queues: dict[str, queue.Queue[Any]] = {}
        self._numbers = itertools.count()
        self._router = threading.Thread(target=self._route, daemon=True)
        self.manager.start()
        self._router.start()

    def stream(self, prompt: str, adapter: str | None, max_new_tokens: int) -> Iterator[int]:
        """Add a request, and return an iterator over its tokens. Raises KeyError for an unknown adapter, and PoolFull
        where the pool has no room for it."""
        request_id, results = f"request-{next(self._numbers)}", queue.Queue()
        self._queues[request_id] = results
        try:
            ids = self.tokenizer(prompt)["input_ids"]
            self.requests.add(ids, adapter, request_id=request_id, max_new_tokens=max_new_tokens, streaming=True)
        except BaseException:
            del self._queues[request_id]
            raise
        return self._tokens_of(request_id, results)

    def _tokens_of(self, request_id: str, results: queue.Queue[Any]) -> Iterator[int]:
        sent, finished = 0, False
        try:
            while not finished:
                output = results.get()
                if output is STOPPED:
                    raise RuntimeError("the server has stopped")
                finished = output.is_finished()
                new = output.generated_tokens[sent:]
                sent += len(new)
                yield from new
        finally:
            del self._queues[request_id]
            if not finished:  # the client has gone
                self.requests.cancel(request_id)

    def _route(self) -> None:
        """Hand the manager's results to the requests that they belong to."""
        while self.manager.is_running():
            output = self.manager.get_result(timeout=0.1)
            results = None if output is None else self._queues.get(output.request_id)
            if results is not None:
                results.put(output)
        for results in list(self._queues.values()):
            results.put(STOPPED)

    def close(self) -> None:
        self.manager.stop(block=True)
        self._router.join()
        self.requests.close()
        self.manager.destroy()
        self.pool.close()


class Handler(BaseHTTPRequestHandler):
    """One connection. Tokens are sent as lines of JSON, one for each, as they come."""

    engine: Engine

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._answer(200, self.engine.pool.metrics(), "text/plain; version=0.0.4")
        elif self.path == "/adapters":
            self._answer(200, json.dumps(self.engine.pool.names()))
        else:
            self._answer(404, json.dumps({"error": f"no such page: {self.path}"}))

    def do_POST(self) -> None:
        try:
            if self.path != "/generate":
                raise KeyError(f"no such page: {self.path}")
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            tokens = self.engine.stream(
                str(asked["prompt"]), asked.get("adapter"), min(int(asked.get("max_new_tokens", 32)), 512)
            )
        except (KeyError, ValueError, TypeError, RuntimeError) as error:  # PoolFull is a RuntimeError
            status = 404 if isinstance(error, KeyError) else 503 if isinstance(error, RuntimeError) else 400
            self._answer(status, json.dumps({"error": str(error.args[0])}))
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        try:
            for token in tokens:
                self._line({"token": token, "text": self.engine.tokenizer.decode([token])})
            self._line({"done": True})
        except RuntimeError as error:
            self._line({"error": str(error)})
        except ConnectionError:
            tokens.close()  # cancels the request

    def _line(self, fields: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(fields).encode() + b"\n")
        self.wfile.flush()

    def _answer(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


def start(engine: Engine, port: int) -> ThreadingHTTPServer:
    """Return a server that answers in a thread of its own. Port 0 takes a free one."""
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Served", (Handler,), {"engine": engine}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", help="a model of transformers; without it a small one of random weights is served")
    parser.add_argument("--adapters", type=Path, help="a folder whose folders are adapters in PEFT's format")
    parser.add_argument("--device-mb", type=float, help="the most megabytes of adapters in memory")
    parser.add_argument("--load-test", action="store_true", help="send requests, print a table and draw it")
    parser.add_argument("--clients", type=int, default=8, help="the number of clients of the load test")
    parser.add_argument("--short", action="store_true", help="a load test of a few seconds")
    parser.add_argument("--out", type=Path, default=BUILD, help="folder for adapters and pictures")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.model is None:
        model, tokenizer = make_llama(), Bytes()
        folder = arguments.adapters or make_adapters(model, arguments.out / "adapters")
    else:
        model, tokenizer = (each.from_pretrained(arguments.model) for each in (AutoModelForCausalLM, AutoTokenizer))
        folder = arguments.adapters or parser.error("--model needs --adapters")
    room = None if arguments.device_mb is None else int(arguments.device_mb * 1e6)
    engine = Engine(model.eval(), tokenizer, folder, room)
    server = start(engine, 0 if arguments.load_test else arguments.port)
    try:
        address = f"127.0.0.1:{server.server_address[1]}"
        if arguments.load_test:
            load_test(address, arguments.clients, arguments.out, short=arguments.short)
        else:
            print(f"{len(engine.pool.names())} adapters on http://{address}; stop with Ctrl-C")
            threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.shutdown()
        engine.close()


if __name__ == "__main__":
    main()
