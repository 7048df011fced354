"""Whether a call must go through its registered operator, or may go past it to the back-end.

A call past the operator is faster: the dispatch of two operators took a fifth of a training step of a 128x128 layer. It
is taken only where nobody can tell the difference, and that is told by private state of torch.

Most of this state is read in one place, the dispatcher's thread-local set of keys. Every mode (TorchDispatchMode, fake
tensors, make_fx, a checkpointing policy, a FLOP counter), every transform of torch.func, functionalization and
torch.jit.trace put a key into it. Any set but the two ordinary ones counts as watched, also one with a key that a later
torch invents. tests/helpers/support/observers.py lists the names that have been looked at for everything else.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = frozenset((Tensor, nn.Parameter))
"""The types of tensor that have no ``__torch_function__`` or ``__torch_dispatch__`` of their own."""


# The private functions of torch that are asked, once for each call.
_included_keys = torch._C._dispatch_tls_local_include_set
_function_modes = torch._C._len_torch_function_stack
_profiler_enabled = torch._C._autograd._profiler_enabled
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def _key_set(*names: str) -> int:
    """Return a set of the dispatcher's keys as the bits that `_included_keys` shows."""
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return int(reduce(or_, keys).raw_repr())


_ORDINARY = frozenset((_key_set("BackendSelect", "ADInplaceOrView"), _key_set("BackendSelect")))
"""The dispatcher's thread-local keys where nothing observes: outside inference mode, and in it."""


def watched(x: Tensor, w: Tensor, a: Tensor, b: Tensor, other: Tensor | None) -> bool:
    """Return whether a call on these tensors must be seen as the operator that it is. `x` is x in a forward and dy in a
    backward, `other` the bias or x. That is so

    * while torch.compile or torch.export traces it,
    * under a mode, a transform, a tracer (see above) or a TorchFunctionMode,
    * under the profiler, and in forward-mode AD,
    * where a tensor is of a subclass, or on a device that is neither a CPU nor a GPU,
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
        or type(x) not in _PLAIN
        or type(w) not in _PLAIN
        or type(a) not in _PLAIN
        or type(b) not in _PLAIN
        or (other is not None and (type(other) not in _PLAIN or other.is_neg() or other._is_zerotensor()))
        or x.is_neg()
        or x._is_zerotensor()
        or _is_legacy_batched(x)
        or w.is_neg()
        or a.is_neg()
        or b.is_neg()
    )
