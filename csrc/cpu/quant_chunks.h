// A walk along rows of 4-bit codes, a register of codes at a time (AVX-512).
#pragma once

namespace lk::cpu {
namespace {

constexpr i64 kChunk = 128;    // elements of a register of codes
constexpr i64 kAhead = 16384;  // distance of the prefetch, in bytes: a nearer line would arrive too late

inline __m512i load_codes(const uint8_t* c, i64 count) {
  if (count >= kChunk) return _mm512_loadu_si512(c);
  return _mm512_maskz_loadu_epi8((__mmask64{1} << (count / 2)) - 1, c);
}

// Call body(i, codes, scale, k) for each of RW rows i and each chunk, which begins at column k. Rows beyond w.rows
// repeat the first row. Lane l of `scale` is the scale of the 8 neighbouring codes in lane l of `codes`.
template <int RW, class Body>
inline __attribute__((always_inline)) void each_chunk(const QuantRows& w, const Body& body) {
  const uint8_t* c[RW];
  const float* scales[RW];
  LK_UNROLL for (int i = 0; i < RW; ++i) {
    c[i] = w.codes + (i < w.rows ? i : 0) * w.ldc;
    scales[i] = w.scales + (i < w.rows ? i : 0) * w.lds;
  }
  const auto rows = [&](i64 k, i64 count, const auto& scale) {
    LK_UNROLL for (int i = 0; i < RW; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(c[i] + k / 2 + kAhead), _MM_HINT_T1);  // of later rows
      body(i, load_codes(c[i] + k / 2, count), scale(scales[i]), k);
    }
  };
  i64 k0 = 0, s = 0;
  if (w.segment == kChunk / 2)  // the usual segment needs no masks and permutations
    for (; k0 + kChunk <= w.K; k0 += kChunk, s += 2)
      rows(k0, kChunk, [&](const float* of) {
        return _mm512_mask_broadcastss_ps(_mm512_set1_ps(of[s]), 0xff00, _mm_load_ss(of + s + 1));
      });
  // a scale belongs to 4, 8 or 16 lanes of one chunk, or to several chunks
  const bool narrow = w.segment < kChunk && w.segment < w.K;
  const int per_chunk = narrow ? static_cast<int>(kChunk / w.segment) : 1;  // scales
  const i64 length = narrow ? kChunk : w.segment, row_scales = (w.K + w.segment - 1) / w.segment;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i lanes = _mm512_srli_epi32(lane, per_chunk == 4 ? 2 : per_chunk == 2 ? 3 : 4);
  for (; k0 < w.K; k0 += length, s += per_chunk) {
    const i64 end = k0 + length < w.K ? k0 + length : w.K, left = row_scales - s;
    const __mmask16 some = static_cast<__mmask16>((1u << (left < per_chunk ? left : per_chunk)) - 1);
    for (i64 k = k0; k < end; k += kChunk)
      rows(k, end - k,
           [&](const float* of) { return _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(some, of + s)); });
  }
}

}  // namespace
}  // namespace lk::cpu
