// The table of the tile kernels of one instruction set. This file is compiled once per instruction set, and only the
// function that returns the table has external linkage.
#include "convert.h"
#include "gemm_tile.h"
#include "integers_tile.h"
#include "low_rank.h"
#include "quant_decode.h"
#include "quant_tile.h"
#include "tile.h"

namespace lk::cpu {
namespace {

void keep_bits(uint64_t seed, uint32_t threshold, i64 m0, i64 k0, i64 rows, i64 cols, uint8_t* bits, i64 ld) {
  for (i64 m = 0; m < rows; ++m)
    for (i64 k = 0; k < cols; k += 64)
      V::keep64(seed, threshold, static_cast<uint64_t>(m0 + m), static_cast<uint32_t>((k0 + k) >> 3),
                bits + m * ld + k / 8);
}

// Run `call` with T as the type of the elements of `dtype`.
#define LK_BY_DTYPE(dtype, call) \
  switch (dtype) {               \
    case DType::f32: {           \
      using T = float;           \
      call;                      \
      break;                     \
    }                            \
    case DType::bf16: {          \
      using T = lk::cpu::bf16;   \
      call;                      \
      break;                     \
    }                            \
    case DType::f16: {           \
      using T = f16;             \
      call;                      \
      break;                     \
    }                            \
  }

void panel(Tile src, i64 rows, i64 cols, Sums P) { LK_BY_DTYPE(src.dtype, (read<T>(src, rows, cols, 1.0f, P))) }

void panel_t(Tile src, i64 rows, i64 cols, Sums P) { LK_BY_DTYPE(src.dtype, (read_t<T>(src, rows, cols, 1.0f, P))) }

void scaled_rows(Tile src, i64 rows, i64 R, float factor, float* out) {
  LK_BY_DTYPE(src.dtype, (read<T>(src, rows, R, factor, {out, R})))
}

constexpr LowRank kFp32 = {
    false,
    [](Tile x, Keep keep, Panel P, Extent e, Sums out, bool add) {
      LK_BY_DTYPE(x.dtype, (keep.bits ? dot<T, true> : dot<T, false>)(x, keep, P, e, out, add))
    },
    [](Tile x, Keep keep, Panel G, Extent e, Sums D) {
      LK_BY_DTYPE(x.dtype, (keep.bits ? outer<T, true> : outer<T, false>)(x, keep, G, e, D))
    },
    [](Tile y, Keep keep, const float* bias, Panel H, Panel P, Extent e) {
      LK_BY_DTYPE(y.dtype, (keep.bits ? expand<T, true> : expand<T, false>)(y, keep, bias, H, P, e))
    },
    panel,
    panel_t,
    panel,
    panel_t,
    scaled_rows,
    scaled_rows,
};

constexpr Gemm kGemmFp32 = {
    kGemmWidth,           Fp32Terms::pair,      Fp32Terms::depth, Fp32Terms::group,
    gemm_pack<Fp32Terms>, gemm_tile<Fp32Terms>, decode<ToFp32>,
};

constexpr Kernels kTable = {
#if defined(LK_ISA_AVX512)
    "avx512",
#elif defined(LK_ISA_AVX2)
    "avx2",
#else
    "baseline",
#endif
    &kFp32,
    nullptr,
    nullptr,
    &kGemmFp32,
    nullptr,
    keep_bits,
    quant_dot,
    quant_x,
    quant_scales,
    integers,
    [](Tile src, i64 rows, i64 cols, float factor, Sums out) {
      LK_BY_DTYPE(src.dtype, (read<T>(src, rows, cols, factor, out)))
    },
    [](Panel src, i64 rows, i64 cols, float factor, Tile out) {
      LK_BY_DTYPE(out.dtype, (write<T>(src, rows, cols, factor, out)))
    },
    [](Panel src, i64 rows, i64 cols, float factor, Tile out) {
      LK_BY_DTYPE(out.dtype, (write_t<T>(src, rows, cols, factor, out)))
    },
    [](Tile x, i64 rows, i64 cols, float* out) {
      LK_BY_DTYPE(x.dtype, (add_squares<T>(rows_of<const T>(x), rows, cols, out)))
    },
};

}  // namespace

#if defined(LK_ISA_AVX512)
const Kernels& kernels_avx512() { return kTable; }
#elif defined(LK_ISA_AVX2)
const Kernels& kernels_avx2() { return kTable; }
#else
const Kernels& kernels_baseline() { return kTable; }
#endif

}  // namespace lk::cpu
