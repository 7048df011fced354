// The table of tile kernels. This file is compiled once per instruction set, and has that table alone to link to.
#include "convert.h"
#include "gemm_tile.h"
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

// From the run-time dtype and the presence of a mask to an instance f.template operator()<T, KEEP>.
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

void panel(Tile src, i64 rows, i64 cols, float* P, i64 ldp) {
  LK_BY_DTYPE(src.dtype, (read<T>(src, rows, cols, 1.0f, P, ldp)))
}

void panel_t(Tile src, i64 rows, i64 cols, float* P, i64 ldp) {
  LK_BY_DTYPE(src.dtype, (read_t<T>(src, rows, cols, 1.0f, P, ldp)))
}

void scaled_rows(Tile src, i64 rows, i64 R, float factor, float* out) {
  LK_BY_DTYPE(src.dtype, (read<T>(src, rows, R, factor, out, R)))
}

constexpr LowRank kFp32 = {
    false,
    [](Tile x, Keep keep, const float* P, i64 ldp, i64 rows, i64 cols, i64 R, float* out, i64 ldo, bool add) {
      LK_BY_DTYPE(x.dtype, keep.bits ? (dot<T, true>(x, keep, P, ldp, rows, cols, R, out, ldo, add))
                                     : (dot<T, false>(x, keep, P, ldp, rows, cols, R, out, ldo, add)))
    },
    [](Tile x, Keep keep, const float* G, i64 ldg, i64 rows, i64 cols, i64 R, float* D, i64 ldd) {
      LK_BY_DTYPE(x.dtype, keep.bits ? (outer<T, true>(x, keep, G, ldg, rows, cols, R, D, ldd))
                                     : (outer<T, false>(x, keep, G, ldg, rows, cols, R, D, ldd)))
    },
    [](Tile y, Keep keep, const float* bias, const float* H, i64 ldh, const float* P, i64 ldp, i64 rows, i64 cols,
       i64 R) {
      LK_BY_DTYPE(y.dtype, keep.bits ? (expand<T, true>(y, keep, bias, H, ldh, P, ldp, rows, cols, R))
                                     : (expand<T, false>(y, keep, bias, H, ldh, P, ldp, rows, cols, R)))
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
    [](Tile src, i64 rows, i64 cols, float factor, float* out, i64 ldo) {
      LK_BY_DTYPE(src.dtype, (read<T>(src, rows, cols, factor, out, ldo)))
    },
    [](const float* src, i64 lds, i64 rows, i64 cols, float factor, Tile out) {
      LK_BY_DTYPE(out.dtype, (write<T>(src, lds, rows, cols, factor, out)))
    },
    [](const float* src, i64 lds, i64 rows, i64 cols, float factor, Tile out) {
      LK_BY_DTYPE(out.dtype, (write_t<T>(src, lds, rows, cols, factor, out)))
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
