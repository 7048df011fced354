// Sixteen floats in a zmm register (AVX-512 F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../philox.h"
#include "half.h"

namespace lk::cpu {
namespace {

struct V {
  static constexpr int W = 16;
  static constexpr int RR = 8;  // 32 registers: 24 accumulators and up to 8 operands
  static constexpr int OUTER_NV = 3;
  static constexpr int EXPAND_MR = 6, EXPAND_NV = 4;
  static constexpr int GEMM_MR = 12, GEMM_NV = 2;
  static constexpr int dot_rows(int rr) { return rr == 8 ? 3 : rr == 4 ? 6 : 8; }

  using reg = __m512;

  static reg zero() { return _mm512_setzero_ps(); }
  static reg set1(float s) { return _mm512_set1_ps(s); }
  static void pin(reg& a) { __asm__("" : "+v"(a)); }  // keeps a in a register: gcc would load it again at each use
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg keep(reg a, const uint8_t* bits) {
    __mmask16 on;
    std::memcpy(&on, bits, 2);
    return _mm512_maskz_mov_ps(on, a);
  }

  static __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static reg widen(__m256i h, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
  static reg widen(__m256i h, f16) { return _mm512_cvtph_ps(h); }
  static __m256i narrow(reg a, bf16) {
    // vcvtneps2bf16 would flush subnormals
    const __m512i u = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
  }
  static __m256i narrow(reg a, f16) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static reg load(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
  static void store(float* p, reg a) { _mm512_storeu_ps(p, a); }
  static void store(float* p, reg a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a); }
  template <class T>
  static reg load(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
  }
  template <class T>
  static reg load(const T* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(lanes(n), p), T{});
  }
  template <class T>
  static void store(T* p, reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
  }
  template <class T>
  static void store(T* p, reg a, int n) {
    _mm256_mask_storeu_epi16(p, lanes(n), narrow(a, T{}));
  }

  static void sums(const reg* a, int n, float* out) {
    const reg a1 = n > 1 ? a[1] : zero(), a2 = n > 2 ? a[2] : zero(), a3 = n > 3 ? a[3] : zero();
    const reg t01 = add(_mm512_unpacklo_ps(a[0], a1), _mm512_unpackhi_ps(a[0], a1));
    const reg t23 = add(_mm512_unpacklo_ps(a2, a3), _mm512_unpackhi_ps(a2, a3));
    const reg t = add(_mm512_shuffle_ps(t01, t23, 0x44), _mm512_shuffle_ps(t01, t23, 0xee));
    const __m256 u = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
    const __m128 v = _mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1));
    _mm_mask_storeu_ps(out, static_cast<__mmask8>((1 << n) - 1), v);
  }

  static void transpose(reg (&t)[W]) {
    reg u[W];
    for (int i = 0; i < W; i += 4) {  // 4 x 4 blocks in each quarter
      const reg a = _mm512_unpacklo_ps(t[i], t[i + 1]), b = _mm512_unpackhi_ps(t[i], t[i + 1]);
      const reg c = _mm512_unpacklo_ps(t[i + 2], t[i + 3]), d = _mm512_unpackhi_ps(t[i + 2], t[i + 3]);
      u[i] = _mm512_shuffle_ps(a, c, 0x44);
      u[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
      u[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
      u[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int j = 0; j < 4; ++j) {  // the quarters
      const reg a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
      const reg c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88),
                d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
      t[j] = _mm512_shuffle_f32x4(a, c, 0x88);
      t[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
      t[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
      t[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }

  // This is a shuffle because shifts share a port with the multiplications.
  static __m512i high_half(__m512i p) { return _mm512_shuffle_epi32(p, _MM_PERM_DDBB); }

  // The keep bits of 64 columns. Eight counters are in the low halves of 64-bit lanes. The high halves may hold
  // anything, because _mm512_mul_epu32 ignores them.
  static void keep64(uint64_t seed, uint32_t threshold, uint64_t m, uint32_t group, uint8_t* bits) {
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    // in this order the two unpacks at the end yield groups 0..3 and 4..7
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(group), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
    __m512i c1 = _mm512_set1_epi64(m), c2 = _mm512_set1_epi64(m >> 32), c3 = _mm512_setzero_si512();
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
      c0 = _mm512_ternarylogic_epi64(high_half(p1), c1, _mm512_set1_epi64(k0), 0x96);  // xor of three
      c2 = _mm512_ternarylogic_epi64(high_half(p0), c3, _mm512_set1_epi64(k1), 0x96);
      c1 = p1;
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    const __m512i low = _mm512_mask_shuffle_epi32(c0, 0xaaaa, c1, _MM_PERM_CCAA);  // (c0, c1) in each 64-bit lane
    const __m512i high = _mm512_mask_shuffle_epi32(c2, 0xaaaa, c3, _MM_PERM_CCAA);
    const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(threshold));
    const uint32_t half[2] = {_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(low, high), t),
                              _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(low, high), t)};
    std::memcpy(bits, half, 8);
  }
};

}  // namespace
}  // namespace lk::cpu
