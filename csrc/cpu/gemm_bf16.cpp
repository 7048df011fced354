// The GEMM of bf16 operands, two products at a time (AVX512_BF16). Subnormals count as zero, because vdpbf16ps treats
// them so. This file is compiled with AVX512_BF16 flags: it uses no templates of the standard library, and only its
// table has external linkage.
#include "gemm_tile.h"
#include "quant_decode.h"

namespace lk::cpu {
namespace {

struct Bf16Terms {
  using T = bf16;
  static constexpr i64 pair = 2;
  // It is deeper and narrower than in fp32, because sums that wait for the next pass need a place in L2 too.
  static constexpr i64 depth = 512, group = 192;
  static reg fma(reg x, reg p, reg sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)p); }
  static reg columns(const T* w, i64 stride_k, i64 k, i64 depth, int n) {
    const auto row = [&](i64 i) {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(V::lanes(n), w + i * stride_k));
    };
    const __m512i low = row(k);
    return _mm512_castsi512_ps(k + 1 < depth ? _mm512_or_si512(low, _mm512_slli_epi32(row(k + 1), 16)) : low);
  }
  static float one(const T* w, i64 stride_k, i64 k, i64 depth) {
    const uint32_t high = k + 1 < depth ? w[(k + 1) * stride_k].bits : 0;
    return float_of(w[k * stride_k].bits | high << 16);
  }
};

struct ToBf16 {
  using T = bf16;
  static void store(T* out, const reg (&v)[2]) { _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0])); }
};

constexpr Gemm kTable = {
    kGemmWidth,           Bf16Terms::pair,      Bf16Terms::depth, Bf16Terms::group,
    gemm_pack<Bf16Terms>, gemm_tile<Bf16Terms>, decode<ToBf16>,
};

}  // namespace

const Gemm& gemm_avx512_bf16() { return kTable; }

}  // namespace lk::cpu
