// The launch of the kernel in keep_mask.cuh. Not yet run on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lk::cuda {

// Fills the contiguous mask [M,K] of bf16 or fp16 on `device` with 1 where dropout keeps and 0 elsewhere.
// `threshold` is that of csrc/philox.h, `seed` is on the device. cudaErrorInvalidValue where K is no multiple of 8.
cudaError_t keep_mask(int device, int64_t M, int64_t K, bool bf16, uint32_t threshold, const int64_t* seed, void* mask,
                      cudaStream_t stream);

}  // namespace lk::cuda
