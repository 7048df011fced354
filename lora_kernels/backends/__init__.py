"""The back-ends: modules that define the same names. `dispatch` chooses between them.

A back-end computes one layer, or several that read the same x. Each layer has a base and an adapter of its own:

    h = x̂ Aᵀ,  x̂ = c · keep ⊙ x          y = x Wᵀ + bias + s · h Bᵀ
    g = s · dy B                         dx = Σ over the layers (dy W + c · keep ⊙ (g A))
    da = gᵀ x̂                            db = s · dyᵀ h

c and keep are those of core/dropout.py.

A back-end is a module ``lora_kernels.backends.<name>`` with

* ``name``: the name by which ``backend="..."`` asks for it,
* ``why_not(call) -> list[str]``: every reason why it cannot serve a `Call`, as sentences; empty where it can,
* ``forward(x, bases, adapters, save_h) -> (ys, hs)``: y i and h i belong to base i and adapter i; h i is None unless
  ``save_h[i]``,
* ``backward(dys, x, bases, adapters, hs, needs) -> (dx, das, dbs)``: dx is one sum over all layers; a gradient that
  `Needs` does not ask for is None,
* ``keep_mask(x, p, seed)``: keep for x [M, K], as numbers 0 and 1 in x's dtype,
* ``base_gemm(x, w, bias, transposed)``: x Wᵀ + bias [M, N], rounded once, or x W [M, K] where `transposed`. A bias is
  given for an x in 16 bits only, and not beside `transposed`.

bases, adapters, save_h, dys and hs have one entry for each layer, and so have ``needs.da`` and ``needs.db``. A back-end
whose kernels serve one layer at a time makes its two functions with ``each.py``.

x and every dy have two dimensions, [M, K] and [M, N]; M may be 0. Tensors have any strides. ``w`` is a tensor, or a
`QuantizedWeight` where `why_not` has agreed to the call's ``w_format``. ``seed`` is an int64 tensor of one element, or
None where p is 0. x, bias, dy and a dense w have one dtype. a and b have the same dtype, or fp32 beside an x in 16
bits. y and dx have x's dtype; h, da and db have a's: an h in fp16 would overflow where h in fp32 does not. Results are
new and contiguous, and a back-end writes to nothing that it receives, except y in `add_multi`.

``x`` may be None where no da is needed, and ``hs[i]`` where db i is not. The back-end of a backward is chosen anew, by
a `Call` with ``op="backward"``, so it must accept an h that another back-end has made.

A back-end for a GPU also has ``kernel_class(call) -> str``, a short name of the kernels that serve a `Call`. Calls of
one class, pass, pair of dtypes, dropout and w_format run the same kernels. The automatic choice takes a GPU back-end
where that class was right on the device in use (`proven`); it can always be asked for by name.

``dispatch.BACKENDS`` lists the names, and ``dispatch.AUTOMATIC`` the order of the automatic choice: a new back-end is
added to both. Its import raises ImportError, with the way out, where something that it needs is not installed.

Many adapters over the rows of one x are two more functions, whose `Call` has the op "forward_multi" or
"backward_multi", the largest rank as R, and dropout if any adapter has it:

* ``forward_multi(x, base, adapters, rows, save_h) -> (y, h)``,
* ``backward_multi(dy, x, base, adapters, rows, h, needs) -> (dx, das, dbs)``.

The equation above holds for the rows X_i of adapter i, which `Rows` gives, and y = x Wᵀ + bias for those that have
none. ``adapters[i]`` is None where that adapter has nothing in this layer; its rows get the base alone. The mask of a
row is drawn at its place among the rows of its adapter, and every sum of an adapter is made in the order of its rows:
so nothing that belongs to an adapter depends on its neighbours in the batch. h is one buffer of one dimension, in a's
dtype. The h [M_i, R_i] of adapter i begins in it at Σ M_j R_j over the adapters j < i, where R_j is 0 if
``adapters[j]`` is None; it may be longer than the sum. h is None unless ``save_h``. Where a row has no adapter, its y
is bit-equal to what the frozen layer would give for this x: ``F.linear(x, w, bias)`` for a dense w. da and db of an
adapter without rows are None or zeros.

The experts of one layer are two more, whose `Call` has the op "forward_experts" or "backward_experts":

* ``forward_experts(x, base, adapter, rows, save_h) -> (y, h)``,
* ``backward_experts(dy, x, base, adapter, rows, h, needs) -> (dx, da, db)``.

``base`` and ``adapter`` hold stacks: w [E, N, K] (dense, of any dtype, which is then converted to x's one expert at a
time), bias [E, N], a [E, R, K] and b [E, N, R]. The equation holds for the rows X_e of expert e, which follow each
other in x (`Rows.is_in_order`). y and dx are zeros in the rows that no expert has, and da and db in the experts without
rows. There is one mask over all rows of x. h is [M, R]; what it holds in rows without an expert is never read.
``needs`` has one entry for da and one for db. Nothing of the size of w is made, and nothing of the size of y beside y.

A back-end may also have ``add_multi(y, x, adapters, rows) -> None``, whose `Call` has the op "add_multi". It adds the
low-rank half s · (x A_iᵀ) B_iᵀ of each adapter i to the rows of y [M, N] in place, and touches no other row. y has x's
dtype and last stride 1, and may be columns of a larger tensor. No adapter has dropout.
"""
