// The dropout mask of x [M, K] as numbers 0 and 1, for the products that need it in memory (DoRA's).
#include <cstring>

#include "grid.h"
#include "isa.h"
#include "lora.h"

namespace lk::cpu {
namespace {

constexpr i64 kRows = 16;    // rows per task
constexpr i64 kCols = 4096;  // columns per task, a multiple of 64

// For every byte of keep bits, the 8 numbers that it stands for, as the bits of the dtype: `one` has the bits of 1.0,
// and 0.0 is all zeros in every dtype.
template <class T, T one>
struct Numbers {
  T of[256][8] = {};
  constexpr Numbers() {
    for (int byte = 0; byte < 256; ++byte)
      for (int j = 0; j < 8; ++j) of[byte][j] = byte >> j & 1 ? one : T{0};
  }
};

template <class T, T one>
void write_row(const uint8_t* bits, i64 cols, void* out) {
  static constexpr Numbers<T, one> numbers;
  T* const to = static_cast<T*>(out);
  i64 k = 0;
  for (; k + 8 <= cols; k += 8) std::memcpy(to + k, numbers.of[bits[k / 8]], sizeof(numbers.of[0]));
  if (k < cols) std::memcpy(to + k, numbers.of[bits[k / 8]], (cols - k) * sizeof(T));
}

}  // namespace

void keep_mask(int threads, Dropout dropout, i64 M, i64 K, Tile out) {
  threads = team(threads, 8.0 * M * K);
  const auto write = out.dtype == DType::f32    ? write_row<uint32_t, 0x3f800000u>
                     : out.dtype == DType::bf16 ? write_row<uint16_t, 0x3f80u>
                                                : write_row<uint16_t, 0x3c00u>;
  const Grid tasks = make_grid(M, K, kRows, kCols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (i64 t = 0; t < tasks.size(); ++t) {
    uint8_t bits[kRows * kCols / 8];
    const i64 m0 = tasks.m0(t), k0 = tasks.k0(t), rows = tasks.rows(t), cols = tasks.width(t);
    kernels().keep_bits(dropout.seed, dropout.threshold, m0, k0, rows, cols, bits, kCols / 8);
    for (i64 m = 0; m < rows; ++m) write(bits + m * kCols / 8, cols, out.at(m0 + m, k0).data);
  }
}

}  // namespace lk::cpu
