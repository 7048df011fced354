// Products of 4-bit codes with a few rows of bf16 x, two products at a time (AVX512_BF16). The 16 levels are rounded to
// bf16, where plain torch rounds every element of w; the scales stay fp32. This file is compiled with AVX512_BF16
// flags: it uses no templates of the standard library, and only its table has external linkage.
#include "tile.h"

#include "quant_chunks.h"

namespace lk::cpu {
namespace {

// The permutation uses 5 bits of an index, of which 4 are a code. So the table holds the levels twice.
inline __m512i table_of(const float* levels) {
  uint16_t t[32];
  for (int i = 0; i < 32; ++i) {
    bf16 h;
    from_float(levels[i % 16], &h);
    t[i] = h.bits;
  }
  return _mm512_loadu_si512(t);
}

// The values of a register of codes. Lane w of 16 bits, shifted by s nibbles, has element 4 w + (s ^ 1) in its last 4
// bits.
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

template <int RW, int XR>
void rows_dot(const QuantRows& w, __m512i t, Panel X, Sums out) {
  reg acc[RW][XR];
  LK_UNROLL for (int i = 0; i < RW; ++i) LK_UNROLL for (int m = 0; m < XR; ++m) acc[i][m] = V::zero();
  each_chunk<RW>(w, [&](int i, __m512i codes, __m512 scale, i64 k) {
    __m512bh v[4];
    look_up(codes, t, v);
    LK_UNROLL for (int m = 0; m < XR; ++m) acc[i][m] =
        _mm512_fmadd_ps(chunk_dot(v, X.row(m) + k / 2), scale, acc[i][m]);
  });
  for (int i = 0; i < RW && i < w.rows; ++i) V::sums(acc[i], XR, out.row(i));
}

void dot(const QuantRows& w, Panel X, i64 M, Sums out) {
  const __m512i t = table_of(w.levels);
  i64 m = 0;
  for (; m + 4 <= M; m += 4) rows_dot<kQuantRows, 4>(w, t, X.at(m, 0), out.at(0, m));
  for (; m < M; ++m)
    for (i64 i = 0; i < w.rows; ++i)  // row by row: the prefetchers serve one stream of codes best
      rows_dot<1, 1>(w.part(i, 1), t, X.at(m, 0), out.at(i, m));
}

// Elements 8 l + (s ^ 1) and 8 l + (s ^ 1) + 4 of a chunk go, beside each other, to the float at 16 s + l.
void arrange(Tile x, i64 M, i64 K, Sums X) {
  for (i64 m = 0; m < M; ++m) {
    const uint16_t* from = row<uint16_t>(x, m);
    uint16_t* to = reinterpret_cast<uint16_t*>(X.row(m));
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
