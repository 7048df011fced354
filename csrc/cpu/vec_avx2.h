// Eight floats in a ymm register (AVX2, FMA, F16C).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../philox.h"
#include "half.h"

namespace lk::cpu {
namespace {

struct V {
  static constexpr int W = 8;
  static constexpr int RR = 4;  // 16 registers: 12 accumulators, 3 operands, 1 to spare
  static constexpr int OUTER_NV = 3;
  static constexpr int EXPAND_MR = 4, EXPAND_NV = 3;
  static constexpr int GEMM_MR = 6, GEMM_NV = 2;
  static constexpr int dot_rows(int rr) { return rr == 4 ? 3 : 4; }

  using reg = __m256;

  static reg zero() { return _mm256_setzero_ps(); }
  static reg set1(float s) { return _mm256_set1_ps(s); }
  static void pin(reg& a) { __asm__("" : "+x"(a)); }  // keeps a in a register: gcc would load it again at each use
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg keep(reg a, const uint8_t* bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i on = _mm256_and_si256(_mm256_set1_epi32(*bits), bit);
    return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(on, bit)));
  }

  static __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static reg widen(__m128i h, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
  static reg widen(__m128i h, f16) { return _mm256_cvtph_ps(h); }
  static __m128i narrow(reg a, bf16) {
    const __m256i u = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
  static __m128i narrow(reg a, f16) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static reg load(const float* p, int n) { return _mm256_maskload_ps(p, lanes(n)); }
  static void store(float* p, reg a) { _mm256_storeu_ps(p, a); }
  static void store(float* p, reg a, int n) { _mm256_maskstore_ps(p, lanes(n), a); }
  template <class T>
  static reg load(const T* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
  }
  template <class T>
  static reg load(const T* p, int n) {
    T buffer[W] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
  }
  template <class T>
  static void store(T* p, reg a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
  }
  template <class T>
  static void store(T* p, reg a, int n) {
    T buffer[W];
    store(buffer, a);
    std::memcpy(p, buffer, n * sizeof(T));
  }

  static void sums(const reg* a, int n, float* out) {
    const reg a1 = n > 1 ? a[1] : zero(), a2 = n > 2 ? a[2] : zero(), a3 = n > 3 ? a[3] : zero();
    const reg t01 = add(_mm256_unpacklo_ps(a[0], a1), _mm256_unpackhi_ps(a[0], a1));
    const reg t23 = add(_mm256_unpacklo_ps(a2, a3), _mm256_unpackhi_ps(a2, a3));
    const reg t = add(_mm256_shuffle_ps(t01, t23, 0x44), _mm256_shuffle_ps(t01, t23, 0xee));
    alignas(16) float s[4];
    _mm_store_ps(s, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
    for (int j = 0; j < n; ++j) out[j] = s[j];
  }

  static void transpose(reg (&t)[W]) {
    reg u[W];
    for (int i = 0; i < W; i += 4) {  // 4 x 4 blocks in each half
      const reg a = _mm256_unpacklo_ps(t[i], t[i + 1]), b = _mm256_unpackhi_ps(t[i], t[i + 1]);
      const reg c = _mm256_unpacklo_ps(t[i + 2], t[i + 3]), d = _mm256_unpackhi_ps(t[i + 2], t[i + 3]);
      u[i] = _mm256_shuffle_ps(a, c, 0x44);
      u[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
      u[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      u[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int j = 0; j < 4; ++j) {  // the halves
      t[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
      t[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
    }
  }

  // The keep bits of 32 columns. Four counters are in the low halves of 64-bit lanes. The high halves may hold
  // anything, because _mm256_mul_epu32 ignores them.
  static uint32_t keep32(uint64_t seed, __m256i threshold, uint64_t m, uint32_t group) {
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(group), _mm256_setr_epi64x(0, 1, 2, 3));
    __m256i c1 = _mm256_set1_epi64x(m), c2 = _mm256_set1_epi64x(m >> 32), c3 = _mm256_setzero_si256();
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
      c1 = p1;
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    const __m256i low = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
    const __m256i high = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
    const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
    // lane >= T  <=>  saturating T - lane is 0
    const __m256i none = _mm256_setzero_si256();
    const __m256i keep_even = _mm256_cmpeq_epi16(_mm256_subs_epu16(threshold, even), none);
    const __m256i keep_odd = _mm256_cmpeq_epi16(_mm256_subs_epu16(threshold, odd), none);
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(keep_even, keep_odd)));
  }
  static void keep64(uint64_t seed, uint32_t threshold, uint64_t m, uint32_t group, uint8_t* bits) {
    const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold));
    const uint32_t half[2] = {keep32(seed, t, m, group), keep32(seed, t, m, group + 4)};
    std::memcpy(bits, half, 8);
  }
};

}  // namespace
}  // namespace lk::cpu
