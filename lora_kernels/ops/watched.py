"""The test whether anything observes the operators that a call runs.

A registered operator can be seen by tracers, modes and profilers. Where none is active, a call goes past the operator,
straight to the back-end, because that is faster: the dispatch of two operators took a fifth of a training step of a
128x128 layer. Only private state of torch tells whether something observes a call, so this file reads such state.

Most of it is in one place, the dispatcher's thread-local set of keys. Every mode (TorchDispatchMode, fake tensors,
make_fx, a checkpointing policy, a FLOP counter), every transform of torch.func, functionalization and torch.jit.trace
put a key into this set. Two sets are ordinary; every other set counts as watched, so a key that a later torch adds does
too. For the rest of the state, tests/helpers/support/observers.py lists the names of torch that have been read.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = frozenset((Tensor, nn.Parameter))
"""The types of tensor that have no ``__torch_function__`` or ``__torch_dispatch__`` of their own."""


# The private functions of torch that every call asks.
_included_keys = torch._C._dispatch_tls_local_include_set
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiler_enabled = torch._C._autograd._profiler_enabled
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def _key_set(*names: str) -> int:
    """Return the set of the dispatcher's keys with these names, as the bits that ``raw_repr()`` gives."""
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return int(reduce(or_, keys).raw_repr())


_ORDINARY = frozenset((_key_set("BackendSelect", "ADInplaceOrView"), _key_set("BackendSelect")))
"""The dispatcher's thread-local keys while nothing observes a call: outside inference mode, and in it."""


def watched(x: Tensor, w: Tensor, a: Tensor, b: Tensor, other: Tensor | None) -> bool:
    """Return whether a call on these tensors must go through its registered operator. `x` is x in a forward and dy in a
    backward; `other` is the bias in a forward and x in a backward, or None.

    The answer is True

    * while torch.compile or torch.export traces the call,
    * under a mode, a transform or a tracer that puts a key into the set above, and under a TorchFunctionMode,
    * under the profiler, and in forward-mode AD,
    * where a tensor is of a subclass, or lies on a device that is neither a CPU nor a GPU,
    * where a tensor's memory does not hold its value: lazily negated tensors, the zeros without memory that torch.sgn
      gives as its gradient, and several gradients at once (is_grads_batched, a vectorised Jacobian).
    """
    return (
        torch.compiler.is_compiling()
        or _included_keys().raw_repr() not in _ORDINARY
        or _function_modes() > 0
        or _profiler_enabled()
        or forward_ad._current_level >= 0
        or not (x.is_cpu or x.is_cuda)
        or type(x) not in PLAIN
        or type(w) not in PLAIN
        or type(a) not in PLAIN
        or type(b) not in PLAIN
        or (other is not None and (type(other) not in PLAIN or other.is_neg() or other._is_zerotensor()))
        or x.is_neg()
        or x._is_zerotensor()
        or _is_legacy_batched(x)
        or w.is_neg()
        or a.is_neg()
        or b.is_neg()
    )


def observers() -> tuple[int, int, int]:
    """Return what is active of the modes, transforms and tracers that may see an operator."""
    return _included_keys().raw_repr(), _function_modes(), _dispatch_modes()
