#include "keep_mask.h"

#include <algorithm>

#include "keep_mask.cuh"

namespace lk::cuda {

cudaError_t keep_mask(int device, int64_t M, int64_t K, bool bf16, uint32_t threshold, const int64_t* seed, void* mask,
                      cudaStream_t stream) {
  if (M < 0 || K < 0 || K % 8 != 0) return cudaErrorInvalidValue;
  if (M * K == 0) return cudaSuccess;
  // This module has a CUDA runtime of its own, which does not know the device that torch chose.
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const KeepMask p{mask, seed, threshold, bf16 ? 0x3F80u : 0x3C00u, K / 8, M * (K / 8)};
  constexpr int kThreads = 256;
  const int64_t blocks = std::min<int64_t>((p.total + kThreads - 1) / kThreads, 65536);
  keep_mask_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace lk::cuda
