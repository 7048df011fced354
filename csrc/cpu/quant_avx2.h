// Codes to fp32 with AVX2.
#pragma once

namespace lk::cpu {
namespace {

struct Q {
  struct Lut {
    __m256 first, second;
  };

  static Lut lut(const float* levels) {
    if (!levels) return {_mm256_setzero_ps(), _mm256_setzero_ps()};
    return {_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)};
  }
  static reg look_up(__m128i codes, const Lut& t) {
    const __m256i i = _mm256_cvtepu8_epi32(codes);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // bit 3 as the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.first, i), _mm256_permutevar8x32_ps(t.second, i), upper);
  }
  // 8 bytes hold 16 elements; the high nibble comes first
  static void four(const uint8_t* c, const Lut& t, reg (&v)[2]) {
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(c)), low = _mm_set1_epi8(15);
    const __m128i lo = _mm_and_si128(b, low), hi = _mm_and_si128(_mm_srli_epi16(b, 4), low);
    const __m128i all = _mm_unpacklo_epi8(hi, lo);
    v[0] = look_up(all, t);
    v[1] = look_up(_mm_srli_si128(all, 8), t);
  }
  static reg look_up256(const float* table, const uint8_t* c) {
    return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(c))), 4);
  }
  static reg i8(const uint8_t* c) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(c))));
  }
  // The bits of e4m3, moved to the places of fp16's fields, are its value times 2^-8. All ones is NaN.
  static reg e4m3(const uint8_t* c) {
    const __m128i b = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(c)));
    const __m128i h = _mm_and_si128(_mm_slli_epi16(b, 7), _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
    const __m128i ones = _mm_set1_epi16(0x7f << 7);
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(h, ones), ones);
    return _mm256_cvtph_ps(_mm_or_si128(h, _mm_and_si128(nan, _mm_set1_epi16(0x7e00))));
  }
};

}  // namespace
}  // namespace lk::cpu
