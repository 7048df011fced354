// csrc/cuda/sm90/wgmma.cuh on the emulated GPU of machine.h. Operands are read by the canonical layouts of the PTX ISA,
// from nothing but the descriptor's fields.
#pragma once

#define LK_SM90_WGMMA

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.h"

namespace lk::sm90 {

struct Descriptor {
  uint32_t start, leading, stride, width;
  explicit Descriptor(uint64_t d)
      : start((d & 0x3FFF) << 4), leading((d >> 16 & 0x3FFF) << 4), stride((d >> 32 & 0x3FFF) << 4), width(0) {
    const int layout = d >> 62;
    width = layout == 1 ? 128 : layout == 2 ? 64 : layout == 3 ? 32 : 0;
    if (width == 0) emu::fail("a descriptor without swizzle");
    if (d >> 49 & 7) emu::fail("a base offset");
  }
  uint32_t at(bool mn_major, int mn, int k) const {
    const int span = width / 2;
    const uint32_t linear = mn_major ? mn % span * 2 + mn / span * leading + k % 8 * width + k / 8 * stride
                                     : mn % 8 * width + mn / 8 * stride + k * 2;
    return emu::swizzle(start + linear, width);
  }
};

// Reads MN neighbouring rows or columns of an operand, the first of which is even, over 16 of the contraction.
template <class T, bool MN_MAJOR, int MN>
void read_operand(emu::Block& block, const Descriptor& d, int mn, float (&to)[MN][16]) {
  constexpr int kTogether = MN_MAJOR ? MN : 8;  // neighbours in one piece that the swizzle does not cut
  T piece[kTogether];
  for (int m = 0; m < MN; m += MN_MAJOR ? MN : 1)
    for (int k = 0; k < 16; k += MN_MAJOR ? 1 : 8) {
      std::memcpy(piece, emu::async_read(block, d.at(MN_MAJOR, mn + m, k), sizeof(piece)), sizeof(piece));
      for (int i = 0; i < kTogether; ++i) to[MN_MAJOR ? i : m][MN_MAJOR ? k : k + i] = static_cast<float>(piece[i]);
    }
}

// The threads of a warp run an instruction with .sync.aligned together.
inline void wgmma_fence() { emu::meet_warp(); }
template <int N>
void wgmma_registers(float (&)[N]) {}
inline void wgmma_commit() {
  emu::Fiber& fiber = *emu::machine.current;
  fiber.mma.push_back(std::move(fiber.open_mma));
  fiber.open_mma.clear();
}
template <int PENDING>
void wgmma_wait() {
  emu::meet_warp();
  emu::maybe_switch();
  emu::run_groups(emu::machine.current->mma, PENDING);
  emu::meet_warp();  // all threads must have come before any continues
}

template <class T, int N>
struct Wgmma {
  template <int TRANSPOSE_A, int TRANSPOSE_B>
  static void mma(float (&d)[N / 2], uint64_t a, uint64_t b) {
    emu::Fiber& fiber = *emu::machine.current;
    const int thread = fiber.thread.x % 128;
    float* const to = d;
    auto operation = [&fiber, to, a, b, thread] {
      const Descriptor da(a), db(b);
      const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
      float rows[2][1][16], columns[2][16];
      for (int half = 0; half < 2; ++half)
        read_operand<T, TRANSPOSE_A != 0>(*fiber.block, da, row + 8 * half, rows[half]);
      for (int i = 0; i < N / 2; i += 4) {
        read_operand<T, TRANSPOSE_B != 0>(*fiber.block, db, i / 4 * 8 + column, columns);
        for (int half = 0; half < 2; ++half)
          for (int e = 0; e < 2; ++e)
            for (int k = 0; k < 16; ++k) to[i + 2 * half + e] += rows[half][0][k] * columns[e][k];
      }
    };
    // This runs at once, or when it is waited for, but never before work that was issued earlier.
    if (fiber.mma.empty() && fiber.open_mma.empty() && emu::machine.coin(2))
      operation();
    else
      fiber.open_mma.push_back(operation);
  }
};

}  // namespace lk::sm90
