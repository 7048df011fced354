// csrc/cuda/keep_mask.cuh compiled for the host: every thread of the grid runs
// the kernel, one after the other.
#include <cstdint>

namespace {

struct Dim {
  unsigned x;
};
Dim blockIdx, threadIdx, gridDim, blockDim;

} // namespace

#define __global__ static
#include "../../../../csrc/cuda/keep_mask.cuh"

extern "C" void keep_mask(int64_t M, int64_t K, uint32_t one,
                          uint32_t threshold, const int64_t *seed, void *mask,
                          unsigned blocks, unsigned threads) {
  const lk::cuda::KeepMask p{mask, seed, threshold, one, K / 8, M * (K / 8)};
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
      lk::cuda::keep_mask_kernel(p);
}
