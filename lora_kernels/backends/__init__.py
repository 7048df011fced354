"""The back-ends: modules that define the same names. `dispatch` chooses between them.

A back-end is a module ``lora_kernels.backends.<name>`` with

* ``name``: the name by which ``backend="..."`` asks for it,
* ``why_not(call) -> list[str]``: every reason why it cannot serve a `Call`, as sentences; empty where it can,
* ``forward(x, bases, adapters, save_h) -> (ys, hs)``: y i and h i belong to base i and adapter i; h i is None unless
  ``save_h[i]``,
* ``backward(dys, x, bases, adapters, hs, needs) -> (dx, das, dbs)``: dx is the sum over all bases; a gradient that
  `Needs` does not ask for is None,
* ``keep_mask(x, p, seed)``: the dropout mask of x [M, K] as numbers 0 and 1, in x's dtype,
* ``base_gemm(x, w)``: x Wᵀ [M, N] for a dense w.

A single layer is a list of one base and one adapter. A group of layers that read the same x is a list of several. One
base with many adapters over segments of rows, and many bases over segments, will be the same two functions with one
more argument that tells the rows.

All tensors have two dimensions and any strides, but for ``bias``, which has one dimension, and ``seed``, an int64 of
no dimensions, or None where p is 0. ``x`` is None where no da is needed, and ``hs[i]`` where db i is not. Results are
new and contiguous; a back-end writes to nothing that it receives.

A back-end for a GPU also has ``EVIDENCE``, the architectures ("sm_90") for which ``benchmarks/results/`` holds a run.
The automatic choice passes over a GPU back-end without such a run; it can still be asked for by name.
"""
