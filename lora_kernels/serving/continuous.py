"""An adapter for each request of transformers' continuous batching (`generate_batch`).

A step of continuous batching computes the tokens of all running requests in one row, x [1, T, K]. `Requests` knows the
adapter of each request, and gives the model the ids of its tokens while a step runs. With `AdapterPool`, a request
holds a lease of its adapter until it ends, so that all its tokens see one version.

Keys and values depend on the adapter that has computed them. transformers finds blocks to share by their tokens alone,
so requests with the same prompt and different adapters would read each other's: `Requests` refuses block sharing.

The parts of transformers that this file uses are no public interface. They are those of transformers 5.23; another
version that lacks one of them is refused by its name.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_kernels.core.rows import BASE, BASE_NAMES, Rows
from lora_kernels.nn.mixed import Mixable, Mixed, mixable

if TYPE_CHECKING:
    from lora_kernels.serving.pool import AdapterPool

KNOWN = "5.23"
"""The version of transformers whose continuous batching this file was written for."""

_CHILD = "__child#"
"""What transformers puts between the id of a request and the number of one of its further answers."""

_OF_MANAGER = (
    "_generation_step add_request cancel_request batch_processor output_router model num_return_sequences "
    "continuous_batching_config"
)
_OF_ROUTER = "deliver deliver_batch"
_OF_CONFIG = "allow_block_sharing use_async_batching cuda_graph_booleans varlen_compile_config decode_compile_config"


@dataclass
class _Held:
    """The adapter of a request that runs."""

    number: int
    end: Callable[[], None]
    answers: int
    """The number of its answers that have not ended."""


class Requests:
    """Requests of a ContinuousBatchingManager that have an adapter each.

        manager = model.init_continuous_batching(continuous_batching_config=config)   # allow_block_sharing=False
        with Requests(manager, model) as requests:
            manager.start()
            requests.add(tokens, "a")
            ...
            manager.stop()

    Results come from the manager, as they do without adapters. A request that was added to the manager itself gets the
    base alone. Methods may be called by several threads at once.

    Args:
        manager: what ``init_continuous_batching`` returns, before it is started.
        source: the fused model of PEFT, or the `AdapterPool`, that has the adapters.

    Raises:
        ValueError: a manager that shares blocks of the cache between requests, batches asynchronously, captures graphs
            or compiles; and one that has `Requests` already, or another model than `source`.
        RuntimeError: what `lora_kernels.mixed` raises for the model; another version of transformers, with what it
            lacks.
    """

    def __init__(self, manager: Any, source: nn.Module | AdapterPool) -> None:
        self._manager, self._source = manager, source
        _check_names(manager)
        _check_config(manager.continuous_batching_config)
        self._mixable = _mixable(source)
        self._head = _head(manager, self._mixable)
        """The last layer, where it can have adapters. transformers may compute it for each request's last token."""
        self._held: dict[str, _Held] = {}
        self._cancelled: set[str] = set()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._step = manager._generation_step
        router = manager.output_router
        self._deliver, self._deliver_batch = router.deliver, router.deliver_batch
        manager._generation_step = self._with_rows
        router.deliver, router.deliver_batch = self._delivered, self._delivered_batch

    def add(
        self, input_ids: Sequence[int], adapter: str | None = None, *, request_id: str | None = None, **kwargs: Any
    ) -> str:
        """Add a request and return its id. The other arguments are those of the manager's ``add_request``.

        Args:
            input_ids: the tokens of the prompt.
            adapter: the name of an adapter; None and "__base__" are the base alone.
            request_id: another one than those that run; None for a new one.

        Raises:
            KeyError: for an unknown adapter. PoolFull and others: what ``AdapterPool.lease`` raises.
            ValueError: an id that is in use. RuntimeError: a manager that accepts no requests.
            After any of these, nothing is held.
        """
        self._release_cancelled()
        number, end = self._hold(adapter)
        try:
            with self._lock:
                if request_id is None:
                    request_id = f"adapter_req_{next(self._numbers)}"
                if request_id in self._held:
                    raise ValueError(f"a request with the id {request_id!r} is running")
                held = self._held[request_id] = _Held(number, end, self._manager.num_return_sequences)
        except BaseException:
            end()
            raise
        try:
            added = self._manager.add_request(list(input_ids), request_id=request_id, **kwargs)
            if added is None:
                raise RuntimeError("the manager accepts no requests: it is stopping, or another process drives it")
        except BaseException:
            self._drop(request_id, held)
            raise
        return request_id

    def cancel(self, request_id: str) -> None:
        """Cancel a request. Its adapter is released when the manager has dropped it."""
        with self._lock:
            self._cancelled.add(request_id)
        self._manager.cancel_request(request_id)

    def close(self) -> None:
        """Let the manager go on without adapters, and release those of all requests. Stop the manager before."""
        manager, router = self._manager, self._manager.output_router
        manager._generation_step, router.deliver, router.deliver_batch = self._step, self._deliver, self._deliver_batch
        with self._lock:
            ended, self._held = list(self._held.values()), {}
        for each in ended:
            each.end()

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hold(self, adapter: str | None) -> tuple[int, Callable[[], None]]:
        """Return the number of an adapter, and a function that releases it."""
        if adapter in BASE_NAMES:
            return BASE, _nothing
        if isinstance(self._source, nn.Module):
            table = self._mixable.table
            if adapter not in table:
                raise KeyError(f"no adapter is called {adapter}; there are {', '.join(table) or 'none'}")
            return table[adapter], _nothing
        lease = self._source.lease([adapter])
        return lease[adapter], lease.close

    def _with_rows(self) -> None:
        """Run a step of the manager, in which the tokens of each request have its adapter."""
        self._release_cancelled()
        processor = self._manager.batch_processor
        batch = _of(_of(processor, "inputs_and_outputs"), "requests_in_batch")
        lengths = tuple(_of(each, "query_length") for each in batch)
        which = tuple(self._number(_of(_of(each, "state"), "request_id")) for each in batch)
        layers, head = self._mixable.layers, self._head
        table = self._mixable.table
        if not isinstance(self._source, nn.Module):  # the numbers of a pool are those of its leases
            table = {str(i): i for i in which if i != BASE}
            self._source.count(which, lengths)
        with ExitStack() as contexts:
            contexts.enter_context(Mixed(Mixable(layers - head, table), _rows(lengths, which)))
            if head and _of(_of(processor, "model_runner"), "supports_logits_to_keep")(self._manager.model):
                lengths = tuple(int(_of(each, "has_new_token")) for each in batch)
            if head:
                contexts.enter_context(Mixed(Mixable(head, table), _rows(lengths, which)))
            self._step()

    def _number(self, request_id: str) -> int:
        held = self._find(request_id)[1]
        return BASE if held is None else held.number

    def _find(self, request_id: str) -> tuple[str, _Held | None]:
        """Return the request that has an answer of this id, and its adapter."""
        if request_id not in self._held:
            request_id = request_id.partition(_CHILD)[0]
        return request_id, self._held.get(request_id)

    def _delivered(self, output: Any) -> None:
        self._deliver(output)
        self._end(output)

    def _delivered_batch(self, outputs: list[Any]) -> None:
        self._deliver_batch(outputs)
        for output in outputs:
            self._end(output)

    def _end(self, output: Any) -> None:
        """Release the adapter of a request with its last answer."""
        if not output.is_finished():
            return
        request_id, held = self._find(output.request_id)
        if held is not None:
            held.answers -= 1  # the manager's thread delivers all of them
            if not held.answers:
                self._drop(request_id, held)

    def _release_cancelled(self) -> None:
        """Release the adapters of cancelled requests that the manager has dropped."""
        if not self._cancelled:
            return
        processor = self._manager.batch_processor
        running = [] if processor is None else _of(_of(processor, "inputs_and_outputs"), "requests_in_batch")
        in_batch = {each.state.request_id for each in running}
        for request_id in list(self._cancelled):
            gone = processor is None or _of(processor, "scheduler").request_is_cancelled(request_id)
            if gone and request_id not in in_batch:
                with self._lock:
                    self._cancelled.discard(request_id)
                held = self._held.get(request_id)
                if held is not None:
                    self._drop(request_id, held)

    def _drop(self, request_id: str, held: _Held) -> None:
        with self._lock:
            if self._held.get(request_id) is not held:
                return
            del self._held[request_id]
        held.end()


def generate_batch(
    source: nn.Module | AdapterPool,
    inputs: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    *,
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    timeout: float = 600.0,
    **kwargs: Any,
) -> list[Any]:
    """Return transformers' GenerationOutput for each of `inputs`, which is generated with the adapter of its own.

    It is ``model.generate_batch`` of transformers with an adapter for each prompt, and it shares no blocks of the cache
    between requests.

    Args:
        source: the fused model of PEFT, or the `AdapterPool`, that has the adapters.
        inputs: the tokens of each prompt.
        adapters: the name of an adapter for each; None and "__base__" are the base alone.
        generation_config, continuous_batching_config: those of transformers. Without the second, its defaults, but
            without block sharing.
        timeout: the seconds after which it raises TimeoutError where no request has ended.
        **kwargs: further arguments of the manager's ``add_request``, such as max_new_tokens.

    Raises what `Requests` and `Requests.add` raise, ValueError for lists of different lengths, and RuntimeError where
    the manager's thread has ended with an error.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    if len(inputs) != len(adapters):
        raise ValueError(f"each prompt needs an adapter, or None: got {len(inputs)} prompts and {len(adapters)} names")
    model: Any = source if isinstance(source, nn.Module) else source.model
    config = continuous_batching_config or ContinuousBatchingConfig(allow_block_sharing=False)
    manager = model.init_continuous_batching(generation_config=generation_config, continuous_batching_config=config)
    results: dict[str, Any] = {}
    with Requests(manager, source) as requests:
        manager.start()
        try:
            ids = [requests.add(each, name, **kwargs) for each, name in zip(inputs, adapters, strict=True)]
            waiting = set(ids)
            until = time.monotonic() + timeout
            while waiting:
                result = manager.get_result(timeout=1)
                if result is None:
                    what = f"{len(waiting)} of {len(ids)} requests have not ended"
                    if not manager.is_running():
                        raise RuntimeError(f"{what}, and the manager has stopped")
                    if time.monotonic() > until:
                        raise TimeoutError(f"{what}, and none has in {timeout} seconds")
                elif result.is_finished():
                    until = time.monotonic() + timeout
                    results[result.request_id] = result
                    waiting.discard(result.request_id)
        finally:
            manager.stop(block=True)
            manager.destroy()
    return [results[each] for each in ids]


@functools.lru_cache(8)
@torch.inference_mode(False)
def _rows(lengths: tuple[int, ...], which: tuple[int, ...]) -> Rows:
    """Return the rows of a step. While the same requests decode, each step has the same."""
    return Rows.by_length(lengths, which)


def _nothing() -> None:
    pass


def _mixable(source: nn.Module | AdapterPool) -> Mixable:
    if isinstance(source, nn.Module):
        return mixable(source)
    with source.lease([]):
        return mixable(source.model)


def _of(owner: Any, name: str) -> Any:
    """Return an attribute of one of transformers' objects. Raises RuntimeError where it has none."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(_unknown(owner, name)) from None


def _unknown(owner: Any, name: str) -> str:
    import transformers

    return (
        f"transformers {transformers.__version__} has no {type(owner).__name__}.{name}: an adapter for each request is "
        f"known to work with the continuous batching of transformers {KNOWN}"
    )


def _check_names(manager: Any) -> None:
    for name in _OF_MANAGER.split():
        _of(manager, name)
    for name in _OF_ROUTER.split():
        _of(manager.output_router, name)
    for name in _OF_CONFIG.split():
        _of(manager.continuous_batching_config, name)


def _check_config(config: Any) -> None:
    if config.allow_block_sharing:
        raise ValueError(
            "this manager shares blocks of the cache between requests by their tokens alone, so a request would read "
            "what another adapter has computed: make it with ContinuousBatchingConfig(allow_block_sharing=False)"
        )
    if config.use_async_batching or any(config.cuda_graph_booleans):
        raise ValueError(
            "this manager batches asynchronously or captures CUDA graphs, which would keep the rows of one step: make "
            "it with ContinuousBatchingConfig(use_async_batching=False, use_cuda_graph=False)"
        )
    if config.varlen_compile_config is not None or config.decode_compile_config is not None:
        raise ValueError("this manager pads its batches for a compiler: make it without compile configs")


def _head(manager: Any, found: Mixable) -> frozenset[int]:
    """Return the last layer of the model, as in `Mixable.layers`, where it can have adapters. Raises ValueError for
    another model, or another `Requests` of this manager."""
    if isinstance(getattr(manager._generation_step, "__self__", None), Requests):
        raise ValueError("this manager has Requests already: close() them first")
    model = manager.model
    if not any(id(module) in found.layers for module in model.modules()):
        raise ValueError("this manager generates with another model than the one that has the adapters")
    return found.layers & {id(model.get_output_embeddings())}
