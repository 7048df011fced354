// The products of the low-rank half where x, a and b are bf16. vdpbf16ps adds two products to each lane, in fp32. h and
// g are rounded to bf16 between the products, as plain torch rounds them. Subnormals count as zero. This file is
// compiled with AVX512_BF16 flags: it uses no templates of the standard library, and only its table has external
// linkage.
#include "tile.h"

namespace lk::cpu {
namespace {

constexpr int W2 = 32;  // elements in a register

inline __m512bh load(const bf16* p, __mmask32 on) { return (__m512bh)_mm512_maskz_loadu_epi16(on, p); }
inline __m512bh load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __mmask32 first(i64 n) { return n >= W2 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }
inline Rows<const bf16> elements(Panel P) { return {reinterpret_cast<const bf16*>(P.data), 2 * P.ld}; }

template <bool KEEP>
inline __mmask32 kept(const uint8_t* bits, __mmask32 on) {
  if (!KEEP) return on;
  uint32_t word;
  std::memcpy(&word, bits, 4);
  return word & on;
}

// ---- out[m, r] (+)= sum_k keep(x)[m, k] P[r, k]: MR rows by RR values of r, pairs along k ----

template <bool KEEP, int MR, int RR>
void dot_block(Rows<const bf16> x, Keep keep, Rows<const bf16> P, i64 cols, Sums out, bool add) {
  reg acc[MR][RR];
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int j = 0; j < RR; ++j) acc[i][j] = V::zero();
  for (i64 k = 0; k < cols; k += W2) {
    const __mmask32 on = first(cols - k);
    __m512bh xv[MR];
    LK_UNROLL for (int i = 0; i < MR; ++i) {
      ahead(x.row(i + MR) + k);
      xv[i] = load(x.row(i) + k, kept<KEEP>(keep.row(i) + k / 8, on));
    }
    LK_UNROLL for (int j = 0; j < RR; ++j) {
      const __m512bh p = load(P.row(j) + k, on);
      LK_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], xv[i], p);
    }
  }
  LK_UNROLL for (int i = 0; i < MR; ++i) {
    float s[RR];
    LK_UNROLL for (int j = 0; j < RR; j += 4) V::sums(&acc[i][j], RR - j < 4 ? RR - j : 4, s + j);
    float* o = out.row(i);
    LK_UNROLL for (int j = 0; j < RR; ++j) o[j] = add ? o[j] + s[j] : s[j];
  }
}

template <bool KEEP, int RR>
void dot_rows(Tile x, Keep keep, Rows<const bf16> P, Extent e, Sums out, bool add) {
  constexpr int MR = V::dot_rows(RR);
  const Rows<const bf16> xs = rows_of<const bf16>(x);
  i64 m = 0;
  for (; m + MR <= e.rows; m += MR) dot_block<KEEP, MR, RR>(xs.at(m, 0), keep.at(m, 0), P, e.cols, out.at(m, 0), add);
  for (; m < e.rows; ++m) dot_block<KEEP, 1, RR>(xs.at(m, 0), keep.at(m, 0), P, e.cols, out.at(m, 0), add);
}

template <bool KEEP>
void dot(Tile x, Keep keep, Panel panel, Extent e, Sums out, bool add) {
  const Rows<const bf16> P = elements(panel);
  i64 r = 0;
  for (; r + 8 <= e.R; r += 8) dot_rows<KEEP, 8>(x, keep, P.at(r, 0), e, out.at(0, r), add);
  for (; r + 4 <= e.R; r += 4) dot_rows<KEEP, 4>(x, keep, P.at(r, 0), e, out.at(0, r), add);
  for (; r < e.R; ++r) dot_rows<KEEP, 1>(x, keep, P.at(r, 0), e, out.at(0, r), add);
}

// ---- D[r, k] += sum_m G[m, r] keep(x)[m, k]: RR values of r by 32 columns, pairs along m ----

constexpr i64 kRowsAhead = 48;  // distance of the prefetch

template <bool KEEP, int RR>
void outer_block(Rows<const bf16> x, Keep keep, Panel G, i64 rows, i64 cols, Sums D) {
  const __mmask32 on = first(cols);
  reg acc[RR][2];
  LK_UNROLL for (int j = 0; j < RR; ++j) acc[j][0] = acc[j][1] = V::zero();
  for (i64 m = 0; m < rows; m += 2) {
    const bf16 *even = x.row(m), *odd = even + x.ld;
    const uint8_t* bits = keep.row(m);
    ahead(even + kRowsAhead * x.ld);
    ahead(odd + kRowsAhead * x.ld);
    const __m512i a = (__m512i)load(even, kept<KEEP>(bits, on));
    const __m512i b = m + 1 < rows ? (__m512i)load(odd, kept<KEEP>(bits + keep.ld, on)) : _mm512_setzero_si512();
    const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
    LK_UNROLL for (int j = 0; j < RR; ++j) {
      const __m512bh g = (__m512bh)_mm512_set1_ps(G.row(m)[j]);
      acc[j][0] = _mm512_dpbf16_ps(acc[j][0], low, g);
      acc[j][1] = _mm512_dpbf16_ps(acc[j][1], high, g);
    }
  }
  LK_UNROLL for (int j = 0; j < RR; ++j) {
    // unpacking has left columns 0-3, 8-11, 16-19 and 24-27 in acc[j][0], and the others in acc[j][1]
    const reg ends[2] = {_mm512_shuffle_f32x4(acc[j][0], acc[j][1], 0x44),
                         _mm512_shuffle_f32x4(acc[j][0], acc[j][1], 0xee)};
    LK_UNROLL for (int v = 0; v < 2; ++v) {
      float* d = D.row(j) + v * W;
      const __mmask16 lanes = static_cast<__mmask16>(on >> v * W);
      const reg sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, d), _mm512_shuffle_f32x4(ends[v], ends[v], 0xd8));
      _mm512_mask_storeu_ps(d, lanes, sum);
    }
  }
}

template <bool KEEP>
void outer(Tile x, Keep keep, Panel G, Extent e, Sums D) {
  for (i64 k = 0; k < e.cols; k += W2) {
    const Rows<const bf16> xk = rows_of<const bf16>(x).at(0, k);
    const Keep bits = keep.at(0, k);
    i64 r = 0;
    for (; r + 8 <= e.R; r += 8) outer_block<KEEP, 8>(xk, bits, G.at(0, r), e.rows, e.cols - k, D.at(r, k));
    for (; r + 4 <= e.R; r += 4) outer_block<KEEP, 4>(xk, bits, G.at(0, r), e.rows, e.cols - k, D.at(r, k));
    for (; r < e.R; ++r) outer_block<KEEP, 1>(xk, bits, G.at(0, r), e.rows, e.cols - k, D.at(r, k));
  }
}

// ---- y[m, k] += keep(sum_r H[m, r] P[r, k]) + bias[k]: MR rows by NV vectors of columns, pairs along r ----

template <bool KEEP, int MR, int NV>
void expand_block(Rows<bf16> y, Keep keep, const float* bias, Panel H, Panel P, i64 pairs, i64 cols) {
  reg acc[MR][NV];
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) {
    ahead(y.row(i + MR) + v * W);
    acc[i][v] = V::zero();
  }
  const __mmask16 last = static_cast<__mmask16>(first(cols - (NV - 1) * W));
  for (i64 r = 0; r < pairs; ++r) {
    __m512bh p[NV];
    LK_UNROLL for (int v = 0; v < NV; ++v) p[v] =
        (__m512bh)_mm512_maskz_loadu_ps(v == NV - 1 ? last : 0xffff, P.row(r) + v * W);
    LK_UNROLL for (int i = 0; i < MR; ++i) {
      const __m512bh h = (__m512bh)_mm512_set1_ps(H.row(i)[r]);
      LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], h, p[v]);
    }
  }
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) {
    const __m256i in = _mm256_maskz_loadu_epi16(v == NV - 1 ? last : 0xffff, y.row(i) + v * W);
    reg term = KEEP ? V::keep(acc[i][v], keep.row(i) + v * W / 8) : acc[i][v];
    if (bias) term = V::add(term, _mm512_maskz_loadu_ps(v == NV - 1 ? last : 0xffff, bias + v * W));
    acc[i][v] = V::add(V::widen(in, bf16{}), term);
  }
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v)
      _mm256_mask_storeu_epi16(y.row(i) + v * W, v == NV - 1 ? last : 0xffff, (__m256i)_mm512_cvtneps_pbh(acc[i][v]));
}

template <bool KEEP, int MR>
void expand_rows_of(Rows<bf16> y, Keep keep, const float* bias, Panel H, Panel P, i64 pairs, i64 cols) {
  constexpr int NV = V::EXPAND_NV;
  const auto bias_at = [&](i64 k) { return bias ? bias + k : nullptr; };
  i64 k = 0;
  for (; k + NV * W <= cols; k += NV * W)
    expand_block<KEEP, MR, NV>(y.at(0, k), keep.at(0, k), bias_at(k), H, P.at(0, k), pairs, NV * W);
  for (; k < cols; k += W)
    expand_block<KEEP, MR, 1>(y.at(0, k), keep.at(0, k), bias_at(k), H, P.at(0, k), pairs, cols - k);
}

template <bool KEEP>
void expand(Tile y, Keep keep, const float* bias, Panel H, Panel P, Extent e) {
  constexpr int MR = V::EXPAND_MR;
  const i64 pairs = (e.R + 1) / 2;
  const Rows<bf16> ys = rows_of<bf16>(y);
  i64 m = 0;
  for (; m + MR <= e.rows; m += MR)
    expand_rows_of<KEEP, MR>(ys.at(m, 0), keep.at(m, 0), bias, H.at(m, 0), P, pairs, e.cols);
  for (; m < e.rows; ++m) expand_rows_of<KEEP, 1>(ys.at(m, 0), keep.at(m, 0), bias, H.at(m, 0), P, pairs, e.cols);
}

// ---- the packing of the operands ----

void dot_panel(Tile src, i64 R, i64 cols, Sums P) {
  for (i64 r = 0; r < R; ++r) std::memcpy(P.row(r), row<bf16>(src, r), cols * sizeof(bf16));
}

// t[j] = the pairs (s[i, 2 j], s[i, 2 j + 1]) of 16 rows i, of which `rows` are there. `cols` elements of a row are
// there.
inline void load_pairs(Rows<const bf16> s, i64 rows, i64 cols, reg (&t)[W]) {
  const __mmask32 on = first(cols);
  LK_UNROLL for (int i = 0; i < W; ++i) t[i] = i < rows ? (reg)load(s.row(i), on) : V::zero();
  V::transpose(t);
}

void dot_panel_t(Tile src, i64 cols, i64 R, Sums panel) {
  const Rows<const bf16> from = rows_of<const bf16>(src);
  const Rows<bf16> P{reinterpret_cast<bf16*>(panel.data), 2 * panel.ld};
  for (i64 k = 0; k < cols; k += W) {
    const __mmask16 on = static_cast<__mmask16>(first(cols - k));
    for (i64 r = 0; r < R; r += W2) {
      reg t[W];
      load_pairs(from.at(k, r), cols - k, R - r, t);
      for (i64 j = 0; j < W && r + 2 * j < R; ++j) {
        const __m512i pairs = _mm512_castps_si512(t[j]);
        bf16* const even = P.row(r + 2 * j) + k;
        _mm256_mask_storeu_epi16(even, on, _mm512_cvtepi32_epi16(pairs));
        if (r + 2 * j + 1 < R)
          _mm256_mask_storeu_epi16(even + P.ld, on, _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
      }
    }
  }
}

void expand_panel(Tile src, i64 R, i64 cols, Sums P) {
  for (i64 r = 0; r < R; r += 2)
    for (i64 k = 0; k < cols; k += W) {
      const __mmask16 on = static_cast<__mmask16>(first(cols - k));
      const bf16* const low = row<bf16>(src, r) + k;
      const __m256i a = _mm256_maskz_loadu_epi16(on, low);
      const __m256i b = r + 1 < R ? _mm256_maskz_loadu_epi16(on, low + src.ld) : _mm256_setzero_si256();
      const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
      _mm512_mask_storeu_ps(P.row(r / 2) + k, on, _mm512_castsi512_ps(pairs));
    }
}

void expand_panel_t(Tile src, i64 cols, i64 R, Sums P) {
  const Rows<const bf16> from = rows_of<const bf16>(src);
  for (i64 k = 0; k < cols; k += W)
    for (i64 r = 0; r < R; r += W2) {
      reg t[W];
      load_pairs(from.at(k, r), cols - k, R - r, t);
      for (i64 j = 0; j < W && r + 2 * j < R; ++j)
        _mm512_mask_storeu_ps(P.row(r / 2 + j) + k, static_cast<__mmask16>(first(cols - k)), t[j]);
    }
}

// Rows m and m + 1, interleaved as pairs, are written in the place of row m.
template <class T>
void outer_rows(Tile src, i64 rows, i64 R, float factor, float* G) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const reg f = V::set1(factor);
  for (i64 m = 0; m < rows; m += 2)
    for (i64 r = 0; r < R; r += W) {
      const int n = R - r < W ? static_cast<int>(R - r) : W;
      const reg even = V::mul(V::load(row<T>(src, m) + r, n), f);
      const reg odd = m + 1 < rows ? V::mul(V::load(row<T>(src, m + 1) + r, n), f) : V::zero();
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
      V::store(G + m * R + r, _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleaved, both)), n);
    }
}

// Row m is written as bf16 in the place of row m, with a zero after an odd R.
template <class T>
void expand_rows(Tile src, i64 rows, i64 R, float factor, float* H) {
  const reg f = V::set1(factor);
  for (i64 m = 0; m < rows; ++m) {
    bf16* const out = reinterpret_cast<bf16*>(H + m * R);
    for (i64 r = 0; r < R; r += W) {
      const int n = R - r < W ? static_cast<int>(R - r) : W;
      const reg values = V::mul(V::load(row<T>(src, m) + r, n), f);
      _mm256_mask_storeu_epi16(out + r, V::lanes(n + (n & 1)), (__m256i)_mm512_cvtneps_pbh(values));
    }
  }
}

constexpr LowRank kTable = {
    true,
    [](Tile x, Keep keep, Panel P, Extent e, Sums out, bool add) {
      (keep.bits ? dot<true> : dot<false>)(x, keep, P, e, out, add);
    },
    [](Tile x, Keep keep, Panel G, Extent e, Sums D) { (keep.bits ? outer<true> : outer<false>)(x, keep, G, e, D); },
    [](Tile y, Keep keep, const float* bias, Panel H, Panel P, Extent e) {
      (keep.bits ? expand<true> : expand<false>)(y, keep, bias, H, P, e);
    },
    dot_panel,
    dot_panel_t,
    expand_panel,
    expand_panel_t,
    [](Tile src, i64 rows, i64 R, float factor, float* G) {
      (src.dtype == DType::f32 ? outer_rows<float> : outer_rows<bf16>)(src, rows, R, factor, G);
    },
    [](Tile src, i64 rows, i64 R, float factor, float* H) {
      (src.dtype == DType::f32 ? expand_rows<float> : expand_rows<bf16>)(src, rows, R, factor, H);
    },
};

}  // namespace

const LowRank& low_rank_avx512_bf16() { return kTable; }

}  // namespace lk::cpu
