// The dropout mask of x [M, K] as numbers 0 and 1, for the products that need it in memory (DoRA's).
#include "grid.h"
#include "isa.h"
#include "lora.h"

namespace lk::cpu {
namespace {

constexpr i64 kRows = 16;    // rows per task
constexpr i64 kCols = 4096;  // columns per task, a multiple of 64

template <class T>
void write_ones(const uint8_t* bits, i64 cols, T one, T* out) {
  for (i64 k = 0; k < cols; ++k) out[k] = static_cast<T>(bits[k / 8] >> k % 8 & 1) * one;
}

// Numbers are written as integers: the bits of 1.0 are `one`, and 0.0 is 0 in every dtype.
void write_row(const uint8_t* bits, i64 cols, Tile out) {
  if (out.dtype == DType::f32) return write_ones<uint32_t>(bits, cols, 0x3f800000u, static_cast<uint32_t*>(out.data));
  const uint16_t one = out.dtype == DType::bf16 ? 0x3f80u : 0x3c00u;
  write_ones<uint16_t>(bits, cols, one, static_cast<uint16_t*>(out.data));
}

}  // namespace

void keep_mask(int threads, Dropout dropout, i64 M, i64 K, Tile out) {
  threads = team(threads, 8.0 * M * K);
  const Grid tasks = make_grid(M, K, kRows, kCols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (i64 t = 0; t < tasks.size(); ++t) {
    uint8_t bits[kRows * kCols / 8];
    const i64 m0 = tasks.m0(t), k0 = tasks.k0(t), rows = tasks.rows(t), cols = tasks.width(t);
    kernels().keep_bits(dropout.seed, dropout.threshold, m0, k0, rows, cols, bits, kCols / 8);
    for (i64 m = 0; m < rows; ++m) write_row(bits + m * kCols / 8, cols, out.at(m0 + m, k0));
  }
}

}  // namespace lk::cpu
