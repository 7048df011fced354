"""The names by which torch shows that something observes a call, or that a tensor is of a special kind.

For each name of torch 2.6, 2.13 and 2.14 somebody has decided whether `lora_kernels.ops.watched` must check it. A torch
with a name that is not listed here fails tests/ops/test_observers.py. Then find out what the name is for. If that
observer would miss a call that leaves out the registered operator, `watched` must check it. In any case, add the name
here.
"""

from __future__ import annotations

import re

import torch

_IN_C = re.compile(
    r"stack$|_mode|_is_\w*trac|tracing|functorch|profil|batched|fwd_grad|dual_level|observer|dispatch_tls"
)
_NOT_IN_C = re.compile(r"^_jit_|^_cuda_|^_mps_|^_mtia_|^_get_m|^_get_cudnn|autograd_fallback")


def _matching(module: object, pattern: re.Pattern[str], without: re.Pattern[str] | None = None) -> set[str]:
    return {name for name in dir(module) if pattern.search(name) and not (without and without.search(name))}


def found() -> dict[str, set[str]]:
    """Return the names of the installed torch, by the module or class that has them."""
    keys = torch._C.DispatchKey.__members__
    return {
        "torch._C.DispatchKey": {key for key in keys if not key.startswith(("StartOf", "EndOf"))},
        "torch._C._TorchDispatchModeKey": set(torch._C._TorchDispatchModeKey.__members__),
        "torch._C": _matching(torch._C, _IN_C, _NOT_IN_C),
        "torch._C._functorch": _matching(torch._C._functorch, re.compile("^is_|stack")),
        "torch._C._autograd": _matching(torch._C._autograd, re.compile("enabled|observer|callback|_tracing|_type$")),
        "torch._C._profiler": _matching(torch._C._profiler, re.compile("observer|State|callback")),
        "torch.compiler": _matching(torch.compiler, re.compile("^_?is_")),
        "torch.autograd.forward_ad": _matching(torch.autograd.forward_ad, re.compile("level|dual|enabled")),
        "torch.Tensor": _matching(torch.Tensor, re.compile("^_?is_")),
    }


KNOWN: dict[str, str] = {
    "torch._C.DispatchKey": """
        ADInplaceOrView AutocastCPU AutocastCUDA AutocastHPU AutocastIPU AutocastMPS AutocastPrivateUse1 AutocastXPU
        Autograd AutogradCPU AutogradCUDA AutogradFunctionality AutogradHIP AutogradHPU AutogradIPU AutogradLazy
        AutogradMAIA AutogradMPS AutogradMTIA AutogradMeta AutogradNestedTensor AutogradOther AutogradPrivateUse1
        AutogradPrivateUse2 AutogradPrivateUse3 AutogradVE AutogradXLA AutogradXPU BackendSelect CPU CUDA
        CompositeExplicitAutograd CompositeExplicitAutogradNonFunctional CompositeImplicitAutograd
        CompositeImplicitAutogradNestedTensor Conjugate Dense FuncTorchBatched FuncTorchBatchedDecomposition
        FuncTorchDynamicLayerBackMode FuncTorchDynamicLayerFrontMode FuncTorchGradWrapper FuncTorchVmapMode
        Functionalize HIP HPU IPU Lazy MAIA MPS MTIA Meta Negative NestedTensor NestedTensorCPU NestedTensorCUDA
        NestedTensorHIP NestedTensorHPU NestedTensorIPU NestedTensorLazy NestedTensorMAIA NestedTensorMPS
        NestedTensorMTIA NestedTensorMeta NestedTensorPrivateUse1 NestedTensorPrivateUse2 NestedTensorPrivateUse3
        NestedTensorVE NestedTensorXLA NestedTensorXPU PreDispatch PrivateUse1 PrivateUse2 PrivateUse3 Python
        PythonDispatcher PythonTLSSnapshot Quantized QuantizedCPU QuantizedCUDA QuantizedHIP QuantizedHPU QuantizedIPU
        QuantizedLazy QuantizedMAIA QuantizedMPS QuantizedMTIA QuantizedMeta QuantizedPrivateUse1 QuantizedPrivateUse2
        QuantizedPrivateUse3 QuantizedVE QuantizedXLA QuantizedXPU Sparse SparseCPU SparseCUDA SparseCsr SparseCsrCPU
        SparseCsrCUDA SparseCsrHIP SparseCsrHPU SparseCsrIPU SparseCsrLazy SparseCsrMAIA SparseCsrMPS SparseCsrMTIA
        SparseCsrMeta SparseCsrPrivateUse1 SparseCsrPrivateUse2 SparseCsrPrivateUse3 SparseCsrVE SparseCsrXLA
        SparseCsrXPU SparseHIP SparseHPU SparseIPU SparseLazy SparseMAIA SparseMPS SparseMTIA SparseMeta
        SparsePrivateUse1 SparsePrivateUse2 SparsePrivateUse3 SparseVE SparseXLA SparseXPU Undefined VE XLA XPU
        ZeroTensor
    """,
    "torch._C._TorchDispatchModeKey": """
        FAKE FUNCTIONAL PROXY
    """,
    "torch._C": """
        _are_functorch_transforms_active _create_graph_by_tracing _dispatch_tls_is_dispatch_key_excluded
        _dispatch_tls_is_dispatch_key_included _dispatch_tls_local_exclude_set _dispatch_tls_local_include_set
        _dispatch_tls_set_dispatch_key_excluded _dispatch_tls_set_dispatch_key_included _enter_dual_level
        _exit_dual_level _functorch _get_dispatch_mode _get_tracing_state _is_fwd_grad_enabled
        _is_torch_function_mode_enabled _is_tracing _len_torch_dispatch_stack _len_torch_function_stack
        _pop_torch_dispatch_stack _pop_torch_function_stack _profiler _push_on_torch_dispatch_stack
        _push_on_torch_function_stack _set_dispatch_mode _set_fwd_grad_enabled _set_tracing_state _unset_dispatch_mode
        is_inference_mode_enabled
    """,
    "torch._C._functorch": """
        get_dynamic_layer_stack_depth get_interpreter_stack is_batchedtensor is_dead_tensor_wrapper is_functionaltensor
        is_functorch_wrapped_tensor is_gradtrackingtensor is_legacy_batchedtensor peek_interpreter_stack
        pop_dynamic_layer_stack pop_dynamic_layer_stack_and_undo_to_depth push_dynamic_layer_stack
    """,
    "torch._C._autograd": """
        _clear_callbacks _profiler_enabled _profiler_type _saved_tensors_hooks_is_enabled
        _saved_tensors_hooks_set_tracing _set_empty_test_observer
    """,
    "torch._C._profiler": """
        ProfilerState _PyFrameState _add_execution_trace_observer _cupti_approximate_time_callback_address
        _cupti_monitor_buffer_complete_callback_address _cupti_monitor_buffer_request_callback_address
        _disable_execution_trace_observer _enable_execution_trace_observer _remove_execution_trace_observer
    """,
    "torch.compiler": """
        _is_compiling_flag _is_exporting_flag _is_non_strict_tracing _is_non_strict_tracing_flag is_compiling
        is_dynamo_compiling is_exporting
    """,
    "torch.autograd.forward_ad": """
        _current_level _is_fwd_grad_enabled _set_fwd_grad_enabled dual_level enter_dual_level exit_dual_level make_dual
        unpack_dual
    """,
    "torch.Tensor": """
        _is_all_true _is_any_true _is_view _is_zerotensor is_coalesced is_complex is_conj is_contiguous is_cpu is_cuda
        is_distributed is_floating_point is_inference is_ipu is_leaf is_maia is_meta is_mkldnn is_mps is_mtia is_neg
        is_nested is_nonzero is_pinned is_quantized is_same_size is_set_to is_shared is_signed is_sparse is_sparse_csr
        is_vulkan is_xla is_xpu
    """,
}
"""The names that have been examined, by the module or class that has them."""
