// Codes to fp32 with AVX-512.
#pragma once

#include "quant_chunks.h"

namespace lk::cpu {
namespace {

struct Q {
  using Lut = __m512;

  static Lut lut(const float* levels) { return levels ? _mm512_loadu_ps(levels) : _mm512_setzero_ps(); }

  // 16 bytes hold 32 elements; the high nibble comes first
  static void four(const uint8_t* c, const Lut& t, reg (&v)[2]) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(c)), low = _mm_set1_epi8(15);
    const __m128i lo = _mm_and_si128(b, low), hi = _mm_and_si128(_mm_srli_epi16(b, 4), low);
    v[0] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(hi, lo)), t);
    v[1] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(hi, lo)), t);
  }
  // table[c[i]]. Eight permutations of 32 levels each take less time than a gather.
  static reg look_up256(const float* table, const uint8_t* c) {
    const __m512i i = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(c)));
    const auto of = [&](int first) {
      return _mm512_permutex2var_ps(_mm512_loadu_ps(table + first), i, _mm512_loadu_ps(table + first + 16));
    };
    const auto bit = [&](int b) { return _mm512_test_epi32_mask(i, _mm512_set1_epi32(b)); };
    const __mmask16 b32 = bit(32), b64 = bit(64);
    const auto of64 = [&](int first) { return _mm512_mask_mov_ps(of(first), b32, of(first + 32)); };
    const auto of128 = [&](int first) { return _mm512_mask_mov_ps(of64(first), b64, of64(first + 64)); };
    return _mm512_mask_mov_ps(of128(0), bit(128), of128(128));
  }
  static reg i8(const uint8_t* c) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(c))));
  }
  // The bits of e4m3, moved to the places of fp16's fields, are its value times 2^-8. All ones is NaN.
  static reg e4m3(const uint8_t* c) {
    const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(c)));
    const __m256i h = _mm256_and_si256(_mm256_slli_epi16(b, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    const __m256i ones = _mm256_set1_epi16(0x7f << 7);
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(h, ones), ones);
    return _mm512_cvtph_ps(_mm256_or_si256(h, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00))));
  }
};

// Put x in the order of chunks_dot: element 8 l + (s ^ 1) of a chunk goes to 16 s + l.
inline void chunks_of(float* x, i64 n) {
  for (i64 k = 0; k < n; k += kChunk) {
    float chunk[kChunk];
    for (int s = 0; s < 8; ++s)
      for (int l = 0; l < 16; ++l) chunk[16 * s + l] = x[k + 8 * l + (s ^ 1)];
    __builtin_memcpy(x + k, chunk, sizeof(chunk));
  }
}

// The values of a register of codes. Lane l, shifted by s nibbles, has element 8 l + (s ^ 1) of the 128 in its last 4
// bits, and the permutation uses only those. Some of the shifts are the high half of a product by a power of two: most
// processors shift and permute on the same ports, and multiply on others.
inline void look_up(__m512i q, __m512 t, __m512 (&v)[8]) {
  v[0] = _mm512_permutexvar_ps(q, t);
  LK_UNROLL for (int j = 1; j < 4; ++j) {
    const __m512i power = _mm512_set1_epi16(static_cast<int16_t>(1 << (16 - 4 * j)));
    v[j] = _mm512_permutexvar_ps(_mm512_mulhi_epu16(q, power), t);
  }
  LK_UNROLL for (int j = 4; j < 8; ++j) v[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4 * j), t);
}

inline __m512 chunk_dot(const __m512 (&v)[8], const float* x) {
  __m512 p = _mm512_mul_ps(v[0], _mm512_loadu_ps(x)), r = _mm512_mul_ps(v[4], _mm512_loadu_ps(x + 64));
  LK_UNROLL for (int j = 1; j < 4; ++j) {
    p = _mm512_fmadd_ps(v[j], _mm512_loadu_ps(x + 16 * j), p);
    r = _mm512_fmadd_ps(v[4 + j], _mm512_loadu_ps(x + 64 + 16 * j), r);
  }
  return _mm512_add_ps(p, r);
}

template <int XR>
inline void chunks_dot(const QuantRows& w, Panel X, Sums out) {
  constexpr int RW = XR == 1 ? 1 : XR == 2 ? 4 : 2;  // for one row of x memory is the limit: one stream of codes
  const __m512 t = _mm512_loadu_ps(w.levels);
  for (i64 i0 = 0; i0 < w.rows; i0 += RW) {
    reg acc[RW][XR];
    LK_UNROLL for (int i = 0; i < RW; ++i) LK_UNROLL for (int m = 0; m < XR; ++m) acc[i][m] = V::zero();
    each_chunk<RW>(w.part(i0, RW), [&](int i, __m512i codes, __m512 scale, i64 k) {
      __m512 v[8];
      look_up(codes, t, v);
      LK_UNROLL for (int m = 0; m < XR; ++m) acc[i][m] = _mm512_fmadd_ps(chunk_dot(v, X.row(m) + k), scale, acc[i][m]);
    });
    LK_UNROLL for (int i = 0; i < RW; ++i) {
      float sums[4];
      V::sums(acc[i], XR, sums);
      for (int m = 0; m < XR && i0 + i < w.rows; ++m) out.row(i0 + i)[m] = sums[m];
    }
  }
}

}  // namespace
}  // namespace lk::cpu
