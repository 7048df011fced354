// The products of the low-rank half where everything is bf16, by vdpbf16ps: two products and two sums in a lane, in
// fp32. What lies between the products, h and g, is rounded to bf16 as plain torch rounds it. Subnormals count as zero.
// Compiled with AVX512_BF16 flags: no standard library templates, and nothing with external linkage but the table.
#include "tile.h"

namespace lk::cpu {
namespace {

constexpr int W2 = 32;  // elements in a register

inline __m512bh load(const bf16* p, __mmask32 on) { return (__m512bh)_mm512_maskz_loadu_epi16(on, p); }
inline __m512bh load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __mmask32 first(i64 n) { return n >= W2 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }
inline const bf16* elements(const float* panel) { return reinterpret_cast<const bf16*>(panel); }

template <bool KEEP>
inline __mmask32 kept(const uint8_t* bits, __mmask32 on) {
  if (!KEEP) return on;
  uint32_t word;
  std::memcpy(&word, bits, 4);
  return word & on;
}

// ---- out[m, r] (+)= sum_k keep(x)[m, k] P[r, k]: MR rows by RR values of r, pairs along k ----

template <bool KEEP, int MR, int RR>
void dot_block(const bf16* x, i64 ldx, Keep keep, const bf16* P, i64 ldp, i64 cols, float* out, i64 ldo, bool add) {
  reg acc[MR][RR];
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int j = 0; j < RR; ++j) acc[i][j] = V::zero();
  for (i64 k = 0; k < cols; k += W2) {
    const __mmask32 on = first(cols - k);
    __m512bh xv[MR];
    LK_UNROLL for (int i = 0; i < MR; ++i) {
      ahead(x + (i + MR) * ldx + k);
      xv[i] = load(x + i * ldx + k, kept<KEEP>(keep.bits + i * keep.ld + k / 8, on));
    }
    LK_UNROLL for (int j = 0; j < RR; ++j) {
      const __m512bh p = load(P + j * ldp + k, on);
      LK_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], xv[i], p);
    }
  }
  LK_UNROLL for (int i = 0; i < MR; ++i) {
    float s[RR];
    LK_UNROLL for (int j = 0; j < RR; j += 4) V::sums(&acc[i][j], RR - j < 4 ? RR - j : 4, s + j);
    float* o = out + i * ldo;
    LK_UNROLL for (int j = 0; j < RR; ++j) o[j] = add ? o[j] + s[j] : s[j];
  }
}

template <bool KEEP, int RR>
void dot_rows(Tile x, Keep keep, const bf16* P, i64 ldp, i64 rows, i64 cols, float* out, i64 ldo, bool add) {
  constexpr int MR = V::dot_rows(RR);
  i64 m = 0;
  for (; m + MR <= rows; m += MR)
    dot_block<KEEP, MR, RR>(row<bf16>(x, m), x.ld, {keep.bits + m * keep.ld, keep.ld}, P, ldp, cols, out + m * ldo, ldo,
                            add);
  for (; m < rows; ++m)
    dot_block<KEEP, 1, RR>(row<bf16>(x, m), x.ld, {keep.bits + m * keep.ld, keep.ld}, P, ldp, cols, out + m * ldo, ldo,
                           add);
}

template <bool KEEP>
void dot(Tile x, Keep keep, const float* panel, i64 ldp, i64 rows, i64 cols, i64 R, float* out, i64 ldo, bool add) {
  const bf16* P = elements(panel);
  ldp *= 2;
  i64 r = 0;
  for (; r + 8 <= R; r += 8) dot_rows<KEEP, 8>(x, keep, P + r * ldp, ldp, rows, cols, out + r, ldo, add);
  for (; r + 4 <= R; r += 4) dot_rows<KEEP, 4>(x, keep, P + r * ldp, ldp, rows, cols, out + r, ldo, add);
  for (; r < R; ++r) dot_rows<KEEP, 1>(x, keep, P + r * ldp, ldp, rows, cols, out + r, ldo, add);
}

// ---- D[r, k] += sum_m G[m, r] keep(x)[m, k]: RR values of r by 32 columns, pairs along m ----

constexpr i64 kRowsAhead = 24;

template <bool KEEP, int RR>
void outer_block(const bf16* x, i64 ldx, Keep keep, const float* G, i64 ldg, i64 rows, i64 cols, float* D, i64 ldd) {
  const __mmask32 on = first(cols);
  reg acc[RR][2];
  LK_UNROLL for (int j = 0; j < RR; ++j) acc[j][0] = acc[j][1] = V::zero();
  for (i64 m = 0; m < rows; m += 2) {
    const bf16 *even = x + m * ldx, *odd = even + ldx;
    const uint8_t* bits = keep.bits + m * keep.ld;
    ahead(even + kRowsAhead * ldx);
    ahead(odd + kRowsAhead * ldx);
    const __m512i a = (__m512i)load(even, kept<KEEP>(bits, on));
    const __m512i b = m + 1 < rows ? (__m512i)load(odd, kept<KEEP>(bits + keep.ld, on)) : _mm512_setzero_si512();
    const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
    LK_UNROLL for (int j = 0; j < RR; ++j) {
      const __m512bh g = (__m512bh)_mm512_set1_ps(G[m * ldg + j]);
      acc[j][0] = _mm512_dpbf16_ps(acc[j][0], low, g);
      acc[j][1] = _mm512_dpbf16_ps(acc[j][1], high, g);
    }
  }
  LK_UNROLL for (int j = 0; j < RR; ++j) {
    // unpacking has left columns 0-3, 8-11, 16-19, 24-27 in the one, the others in the other
    const reg ends[2] = {_mm512_shuffle_f32x4(acc[j][0], acc[j][1], 0x44),
                         _mm512_shuffle_f32x4(acc[j][0], acc[j][1], 0xee)};
    LK_UNROLL for (int v = 0; v < 2; ++v) {
      float* d = D + j * ldd + v * W;
      const __mmask16 lanes = static_cast<__mmask16>(on >> v * W);
      const reg sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, d), _mm512_shuffle_f32x4(ends[v], ends[v], 0xd8));
      _mm512_mask_storeu_ps(d, lanes, sum);
    }
  }
}

template <bool KEEP>
void outer(Tile x, Keep keep, const float* G, i64 ldg, i64 rows, i64 cols, i64 R, float* D, i64 ldd) {
  for (i64 k = 0; k < cols; k += W2) {
    const bf16* const xk = row<bf16>(x, 0) + k;
    const Keep bits{keep.bits + k / 8, keep.ld};
    i64 r = 0;
    for (; r + 8 <= R; r += 8) outer_block<KEEP, 8>(xk, x.ld, bits, G + r, ldg, rows, cols - k, D + r * ldd + k, ldd);
    for (; r + 4 <= R; r += 4) outer_block<KEEP, 4>(xk, x.ld, bits, G + r, ldg, rows, cols - k, D + r * ldd + k, ldd);
    for (; r < R; ++r) outer_block<KEEP, 1>(xk, x.ld, bits, G + r, ldg, rows, cols - k, D + r * ldd + k, ldd);
  }
}

// ---- y[m, k] += keep(sum_r H[m, r] P[r, k]) + bias[k]: MR rows by NV vectors of columns, pairs along r ----

template <bool KEEP, int MR, int NV>
void expand_block(bf16* y, i64 ldy, Keep keep, const float* bias, const float* H, i64 ldh, const float* P, i64 ldp,
                  i64 pairs, i64 cols) {
  reg acc[MR][NV];
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) {
    ahead(y + (i + MR) * ldy + v * W);
    acc[i][v] = V::zero();
  }
  const __mmask16 last = static_cast<__mmask16>(first(cols - (NV - 1) * W));
  for (i64 r = 0; r < pairs; ++r) {
    __m512bh p[NV];
    LK_UNROLL for (int v = 0; v < NV; ++v) p[v] =
        (__m512bh)_mm512_maskz_loadu_ps(v == NV - 1 ? last : 0xffff, P + r * ldp + v * W);
    LK_UNROLL for (int i = 0; i < MR; ++i) {
      const __m512bh h = (__m512bh)_mm512_set1_ps(H[i * ldh + r]);
      LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], h, p[v]);
    }
  }
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) {
    const __m256i in = _mm256_maskz_loadu_epi16(v == NV - 1 ? last : 0xffff, y + i * ldy + v * W);
    reg term = KEEP ? V::keep(acc[i][v], keep.bits + i * keep.ld + v * W / 8) : acc[i][v];
    if (bias) term = V::add(term, _mm512_maskz_loadu_ps(v == NV - 1 ? last : 0xffff, bias + v * W));
    acc[i][v] = V::add(V::widen(in, bf16{}), term);
  }
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) _mm256_mask_storeu_epi16(
      y + i * ldy + v * W, v == NV - 1 ? last : 0xffff, (__m256i)_mm512_cvtneps_pbh(acc[i][v]));
}

template <bool KEEP, int MR>
void expand_rows_of(bf16* y, i64 ldy, Keep keep, const float* bias, const float* H, i64 ldh, const float* P, i64 ldp,
                    i64 pairs, i64 cols) {
  constexpr int NV = V::EXPAND_NV;
  const auto shifted = [&](i64 k) { return Keep{keep.bits + k / 8, keep.ld}; };
  i64 k = 0;
  for (; k + NV * W <= cols; k += NV * W)
    expand_block<KEEP, MR, NV>(y + k, ldy, shifted(k), bias ? bias + k : nullptr, H, ldh, P + k, ldp, pairs, NV * W);
  for (; k < cols; k += W)
    expand_block<KEEP, MR, 1>(y + k, ldy, shifted(k), bias ? bias + k : nullptr, H, ldh, P + k, ldp, pairs, cols - k);
}

template <bool KEEP>
void expand(Tile y, Keep keep, const float* bias, const float* H, i64 ldh, const float* P, i64 ldp, i64 rows, i64 cols,
            i64 R) {
  constexpr int MR = V::EXPAND_MR;
  const i64 pairs = (R + 1) / 2;
  const auto shifted = [&](i64 m) { return Keep{keep.bits + m * keep.ld, keep.ld}; };
  i64 m = 0;
  for (; m + MR <= rows; m += MR)
    expand_rows_of<KEEP, MR>(row<bf16>(y, m), y.ld, shifted(m), bias, H + m * ldh, ldh, P, ldp, pairs, cols);
  for (; m < rows; ++m)
    expand_rows_of<KEEP, 1>(row<bf16>(y, m), y.ld, shifted(m), bias, H + m * ldh, ldh, P, ldp, pairs, cols);
}

// ---- the formats ----

inline uint32_t pair(bf16 low, bf16 high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }

void dot_panel(Tile src, i64 R, i64 cols, float* P, i64 ldp) {
  for (i64 r = 0; r < R; ++r) std::memcpy(P + r * ldp, row<bf16>(src, r), cols * sizeof(bf16));
}

void dot_panel_t(Tile src, i64 cols, i64 R, float* panel, i64 ldp) {
  bf16* const P = reinterpret_cast<bf16*>(panel);
  for (i64 k0 = 0; k0 < cols; k0 += W2)
    for (i64 r = 0; r < R; ++r)
      for (i64 k = k0; k < k0 + W2 && k < cols; ++k) P[r * ldp * 2 + k] = row<bf16>(src, k)[r];
}

void expand_panel(Tile src, i64 R, i64 cols, float* panel, i64 ldp) {
  uint32_t* const P = reinterpret_cast<uint32_t*>(panel);
  for (i64 r = 0; r < R; r += 2) {
    const bf16 *low = row<bf16>(src, r), *high = low + src.ld;
    for (i64 k = 0; k < cols; ++k) P[r / 2 * ldp + k] = pair(low[k], r + 1 < R ? high[k] : bf16{0});
  }
}

void expand_panel_t(Tile src, i64 cols, i64 R, float* panel, i64 ldp) {
  uint32_t* const P = reinterpret_cast<uint32_t*>(panel);
  for (i64 k0 = 0; k0 < cols; k0 += W)
    for (i64 r = 0; r < R; r += 2)
      for (i64 k = k0; k < k0 + W && k < cols; ++k) {
        const bf16* s = row<bf16>(src, k) + r;
        P[r / 2 * ldp + k] = pair(s[0], r + 1 < R ? s[1] : bf16{0});
      }
}

// (row m, row m + 1) in the place of row m
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

// row m as bf16, a zero after an odd R, in the place of row m
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
    [](Tile x, Keep keep, const float* P, i64 ldp, i64 rows, i64 cols, i64 R, float* out, i64 ldo, bool add) {
      (keep.bits ? dot<true> : dot<false>)(x, keep, P, ldp, rows, cols, R, out, ldo, add);
    },
    [](Tile x, Keep keep, const float* G, i64 ldg, i64 rows, i64 cols, i64 R, float* D, i64 ldd) {
      (keep.bits ? outer<true> : outer<false>)(x, keep, G, ldg, rows, cols, R, D, ldd);
    },
    [](Tile y, Keep keep, const float* bias, const float* H, i64 ldh, const float* P, i64 ldp, i64 rows, i64 cols,
       i64 R) { (keep.bits ? expand<true> : expand<false>)(y, keep, bias, H, ldh, P, ldp, rows, cols, R); },
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
