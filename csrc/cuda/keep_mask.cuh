// The dropout mask of x [M,K] as numbers 0 and 1 of 16 bits, by the rule of csrc/philox.h.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace lk::cuda {

struct KeepMask {
  void* mask;  // [M,K], contiguous, at an address that is a multiple of 16 bytes; K is a multiple of 8
  const int64_t* seed;
  uint32_t threshold;
  uint32_t one;    // the bits of 1.0 in the mask's type
  int64_t groups;  // in a row: K / 8, with one Philox call each
  int64_t total;   // M * K / 8
};

struct alignas(16) Group {
  uint32_t pair[4];  // the low half holds the first element of the pair
};

// A thread writes whole groups, 16 bytes each, in steps of the grid.
__global__ void keep_mask_kernel(const KeepMask p) {
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.total; i += step) {
    const int64_t m = i / p.groups;
    const uint32_t keep = philox_keep8(seed, m, static_cast<uint32_t>(i - m * p.groups), p.threshold);
    Group group;
    for (int j = 0; j < 4; ++j)
      group.pair[j] = (keep >> (2 * j) & 1 ? p.one : 0u) | (keep >> (2 * j + 1) & 1 ? p.one << 16 : 0u);
    static_cast<Group*>(p.mask)[i] = group;
  }
}

}  // namespace lk::cuda
