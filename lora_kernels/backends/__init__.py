"""The back-ends: modules with the same names, which `dispatch` chooses between.

A back-end is a module ``lora_kernels.backends.<name>`` with

* ``name``: what ``backend="..."`` calls it,
* ``why_not(call) -> list[str]``: every reason why it cannot serve a `Call`, as sentences; empty where it can,
* ``forward(x, bases, adapters, save_h) -> (ys, hs)``: y i and h i of base i with adapter i; h i is None unless
  ``save_h[i]``,
* ``backward(dys, x, bases, adapters, hs, needs) -> (dx, das, dbs)``: one dx, the sum over all bases; what `Needs` does
  not ask for is None,
* ``keep_mask(x, p, seed)``: the dropout mask of x [M, K] as numbers 0 and 1, in x's dtype,
* ``base_gemm(x, w)``: x Wᵀ [M, N] for a dense w.

A single layer is a list of one base and one adapter. A group of layers that read the same x is a list of several. One
base with many adapters over segments of rows, and many bases over segments, will be the same two functions with one
more argument that tells the rows.

All tensors are two-dimensional (``bias`` one-dimensional, ``seed`` zero-dimensional int64 or None where p is 0), of any
strides. ``x`` is None where no da is needed, ``hs[i]`` where db i is not. Results are fresh and contiguous; nothing
that is received is written to.

A back-end for a GPU also has ``EVIDENCE``, the architectures ("sm_90") for which ``benchmarks/results/`` holds a run.
The automatic choice passes over a GPU back-end without evidence; asking for it by name does not.
"""
