// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and the dropout rule on top.
//
//   key     = (seed & 0xffffffff, seed >> 32)
//   counter = (k >> 3, m & 0xffffffff, m >> 32, 0)        m: row of the flattened x, k: column
//   lane j = k & 7 is 16 bits of word j >> 1: the low half where j is even, the high half where j is odd
//   keep iff lane >= threshold
//
// Everything has internal linkage. This header is compiled once per instruction set, and a definition that the linker
// merged across those files could put AVX-512 code into the baseline.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LK_HOST_DEVICE inline
#endif

namespace lk {
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct Philox4 {
  uint32_t word[4];
};

LK_HOST_DEVICE Philox4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// Bit j of the result says whether element 8 * group + j of row m is kept.
LK_HOST_DEVICE uint8_t philox_keep8(uint64_t seed, uint64_t m, uint32_t group, uint32_t threshold) {
  const Philox4 r = philox4x32_10(group, static_cast<uint32_t>(m), static_cast<uint32_t>(m >> 32), 0,
                                  static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  uint8_t bits = 0;
  for (int j = 0; j < 8; ++j) {
    const uint32_t lane = (r.word[j >> 1] >> (16 * (j & 1))) & 0xffffu;
    bits |= static_cast<uint8_t>((lane >= threshold) << j);
  }
  return bits;
}

}  // namespace
}  // namespace lk
