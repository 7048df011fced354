// Products of 4-bit codes with a few rows of bf16 x, two at a time (AVX512_BF16). The 16 levels are rounded to bf16,
// where plain torch rounds every element of w; the scales stay fp32. Compiled with AVX512_BF16 flags: no standard
// library templates, and nothing with external linkage but the table.
#include "tile.h"

namespace lk::cpu {
namespace {

constexpr i64 kChunk = 128;   // elements of a register of codes
constexpr i64 kAhead = 4096;  // bytes

// The permutation looks at 5 bits of an index, of which 4 are a code: the table holds the levels twice.
inline __m512i table_of(const float* levels) {
  uint16_t t[32];
  for (int i = 0; i < 32; ++i) {
    bf16 h;
    from_float(levels[i % 16], &h);
    t[i] = h.bits;
  }
  return _mm512_loadu_si512(t);
}

inline __m512i load_codes(const uint8_t* c, i64 count) {
  if (count >= kChunk) return _mm512_loadu_si512(c);
  return _mm512_maskz_loadu_epi8((__mmask64{1} << (count / 2)) - 1, c);
}

// Lane w of 16 bits, shifted by s nibbles, has element 4 w + (s ^ 1) in its last 4 bits.
inline void look_up(__m512i q, __m512i t, __m512bh (&v)[4]) {
  v[0] = (__m512bh)_mm512_permutexvar_epi16(q, t);
  LK_UNROLL for (int s = 1; s < 4; ++s) v[s] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4 * s), t);
}

inline __m512 chunk_dot(const __m512bh (&v)[4], const float* x) {
  const auto pairs = [&](int s) { return (__m512bh)_mm512_loadu_si512(x + 16 * s); };
  const __m512 p = _mm512_dpbf16_ps(_mm512_setzero_ps(), v[0], pairs(0));
  const __m512 r = _mm512_dpbf16_ps(_mm512_setzero_ps(), v[1], pairs(1));
  return _mm512_add_ps(_mm512_dpbf16_ps(p, v[2], pairs(2)), _mm512_dpbf16_ps(r, v[3], pairs(3)));
}

// A scale belongs to 4, 8 or 16 lanes of one chunk, or to several chunks.
template <int RW, int XR>
void rows_dot(const QuantRows& w, __m512i t, const float* X, i64 ldx, float* out, i64 ldo) {
  const bool narrow = w.segment < kChunk && w.segment < w.K;
  const int per_chunk = narrow ? static_cast<int>(kChunk / w.segment) : 1;  // scales
  const i64 length = narrow ? kChunk : w.segment, row_scales = (w.K + w.segment - 1) / w.segment;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i lanes = _mm512_srli_epi32(lane, per_chunk == 4 ? 2 : per_chunk == 2 ? 3 : 4);
  const uint8_t* c[RW];
  const float* scales[RW];
  LK_UNROLL for (int i = 0; i < RW; ++i) {
    c[i] = w.codes + (i < w.rows ? i : 0) * w.ldc;
    scales[i] = w.scales + (i < w.rows ? i : 0) * w.lds;
  }
  reg acc[RW][XR];
  LK_UNROLL for (int i = 0; i < RW; ++i) LK_UNROLL for (int m = 0; m < XR; ++m) acc[i][m] = V::zero();
  i64 s = 0;
  for (i64 k0 = 0; k0 < w.K; k0 += length, s += per_chunk) {
    const i64 end = k0 + length < w.K ? k0 + length : w.K, left = row_scales - s;
    const __mmask16 some = static_cast<__mmask16>((1u << (left < per_chunk ? left : per_chunk)) - 1);
    for (i64 k = k0; k < end; k += kChunk) {
      LK_UNROLL for (int i = 0; i < RW; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(c[i] + k / 2 + kAhead), _MM_HINT_T1);  // of later rows
        const __m512 scale = _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(some, scales[i] + s));
        __m512bh v[4];
        look_up(load_codes(c[i] + k / 2, end - k), t, v);
        LK_UNROLL for (int m = 0; m < XR; ++m) acc[i][m] =
            _mm512_fmadd_ps(chunk_dot(v, X + m * ldx + k / 2), scale, acc[i][m]);
      }
    }
  }
  for (int i = 0; i < RW && i < w.rows; ++i) V::sums(acc[i], XR, out + i * ldo);
}

void dot(const QuantRows& w, const float* X, i64 ldx, i64 M, float* out, i64 ldo) {
  const __m512i t = table_of(w.levels);
  i64 m = 0;
  for (; m + 4 <= M; m += 4) rows_dot<kQuantRows, 4>(w, t, X + m * ldx, ldx, out + m, ldo);
  for (; m < M; ++m)
    for (i64 i = 0; i < w.rows; ++i)  // row by row: one stream of codes, as the prefetchers like it
      rows_dot<1, 1>(w.part(i, 1), t, X + m * ldx, ldx, out + i * ldo + m, ldo);
}

// Elements 8 l + (s ^ 1) and that + 4 of a chunk, beside each other at 16 s + l
void arrange(Tile x, i64 M, i64 K, float* X, i64 ldx) {
  for (i64 m = 0; m < M; ++m) {
    const uint16_t* from = row<uint16_t>(x, m);
    uint16_t* to = reinterpret_cast<uint16_t*>(X + m * ldx);
    for (i64 k = 0; k < K; k += kChunk)
      for (i64 i = 0; i < kChunk; ++i) {
        const i64 at = k + i / 2 % 16 * 8 + i % 2 * 4 + (i / 32 ^ 1);
        to[k + i] = at < K ? from[at] : 0;
      }
  }
}

constexpr QuantPairs kTable = {dot, arrange};

}  // namespace

const QuantPairs& quant_avx512_bf16() { return kTable; }

}  // namespace lk::cpu
