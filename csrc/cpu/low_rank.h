// The three products of the low-rank half, in fp32, over operands of any dtype. Compiled by kernels.cpp, once per
// instruction set.
#pragma once

#include "tile.h"

namespace lk::cpu {
namespace {

// ---- out[m, r] (+)= sum_k keep(x)[m, k] P[r, k]: MR rows by RR values of r, lanes along k ----

template <class T, bool KEEP, bool TAIL, int MR, int RR>
inline __attribute__((always_inline)) void dot_step(const T* x, i64 ldx, const uint8_t* bits, i64 ld_keep,
                                                    const float* P, i64 ldp, int n, reg (&acc)[MR][RR]) {
  reg xv[MR];
  LK_UNROLL for (int i = 0; i < MR; ++i) {
    ahead(x + (i + MR) * ldx);
    xv[i] = TAIL ? V::load(x + i * ldx, n) : V::load(x + i * ldx);
    if (KEEP) xv[i] = V::keep(xv[i], bits + i * ld_keep);
  }
  LK_UNROLL for (int j = 0; j < RR; ++j) {
    reg p = TAIL ? V::load(P + j * ldp, n) : V::load(P + j * ldp);
    V::pin(p);
    LK_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] = V::fma(xv[i], p, acc[i][j]);
  }
}

template <class T, bool KEEP, int MR, int RR>
void dot_block(const T* x, i64 ldx, Keep keep, const float* P, i64 ldp, i64 cols, float* out, i64 ldo, bool add) {
  reg acc[MR][RR];
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int j = 0; j < RR; ++j) acc[i][j] = V::zero();
  i64 k = 0;
  for (; k + W <= cols; k += W) dot_step<T, KEEP, false>(x + k, ldx, keep.bits + k / 8, keep.ld, P + k, ldp, W, acc);
  if (k < cols)
    dot_step<T, KEEP, true>(x + k, ldx, keep.bits + k / 8, keep.ld, P + k, ldp, static_cast<int>(cols - k), acc);
  LK_UNROLL for (int i = 0; i < MR; ++i) {
    float s[RR];
    LK_UNROLL for (int j = 0; j < RR; j += 4) V::sums(&acc[i][j], RR - j < 4 ? RR - j : 4, s + j);
    float* o = out + i * ldo;
    LK_UNROLL for (int j = 0; j < RR; ++j) o[j] = add ? o[j] + s[j] : s[j];
  }
}

template <class T, bool KEEP, int RR>
void dot_rows(Tile x, Keep keep, const float* P, i64 ldp, i64 rows, i64 cols, float* out, i64 ldo, bool add) {
  constexpr int MR = V::dot_rows(RR);
  i64 m = 0;
  for (; m + MR <= rows; m += MR)
    dot_block<T, KEEP, MR, RR>(row<T>(x, m), x.ld, {keep.bits + m * keep.ld, keep.ld}, P, ldp, cols, out + m * ldo, ldo,
                               add);
  for (; m < rows; ++m)
    dot_block<T, KEEP, 1, RR>(row<T>(x, m), x.ld, {keep.bits + m * keep.ld, keep.ld}, P, ldp, cols, out + m * ldo, ldo,
                              add);
}

template <class T, bool KEEP>
void dot(Tile x, Keep keep, const float* P, i64 ldp, i64 rows, i64 cols, i64 R, float* out, i64 ldo, bool add) {
  i64 r = 0;
  if constexpr (V::RR >= 8)
    for (; r + 8 <= R; r += 8) dot_rows<T, KEEP, 8>(x, keep, P + r * ldp, ldp, rows, cols, out + r, ldo, add);
  if constexpr (V::RR >= 4)
    for (; r + 4 <= R; r += 4) dot_rows<T, KEEP, 4>(x, keep, P + r * ldp, ldp, rows, cols, out + r, ldo, add);
  for (; r + 2 <= R; r += 2) dot_rows<T, KEEP, 2>(x, keep, P + r * ldp, ldp, rows, cols, out + r, ldo, add);
  for (; r < R; ++r) dot_rows<T, KEEP, 1>(x, keep, P + r * ldp, ldp, rows, cols, out + r, ldo, add);
}

// ---- D[r, k] += sum_m G[m, r] keep(x)[m, k]: RR values of r by NV vectors of columns, lanes along k ----

// The rows of one call are summed from zero and then added to D: two levels of summation, a smaller error.

constexpr i64 kRowsAhead = 24;

template <class T, bool KEEP, bool TAIL, int RR, int NV>
void outer_block(const T* x, i64 ldx, Keep keep, const float* G, i64 ldg, i64 rows, float* D, i64 ldd, int n) {
  reg acc[RR][NV];
  LK_UNROLL for (int j = 0; j < RR; ++j) LK_UNROLL for (int v = 0; v < NV; ++v) acc[j][v] = V::zero();
  for (i64 m = 0; m < rows; ++m) {
    reg xv[NV];
    LK_UNROLL for (int v = 0; v < NV; ++v) {
      ahead(x + (m + kRowsAhead) * ldx + v * W);
      xv[v] = TAIL ? V::load(x + m * ldx + v * W, n) : V::load(x + m * ldx + v * W);
      if (KEEP) xv[v] = V::keep(xv[v], keep.bits + m * keep.ld + v * W / 8);
    }
    LK_UNROLL for (int j = 0; j < RR; ++j) {
      const reg g = V::set1(G[m * ldg + j]);
      LK_UNROLL for (int v = 0; v < NV; ++v) acc[j][v] = V::fma(g, xv[v], acc[j][v]);
    }
  }
  LK_UNROLL for (int j = 0; j < RR; ++j) LK_UNROLL for (int v = 0; v < NV; ++v) {
    float* d = D + j * ldd + v * W;
    if (TAIL)
      V::store(d, V::add(V::load(d, n), acc[j][v]), n);
    else
      V::store(d, V::add(V::load(d), acc[j][v]));
  }
}

template <class T, bool KEEP, bool TAIL, int NV>
void outer_cols(const T* x, i64 ldx, Keep keep, const float* G, i64 ldg, i64 rows, i64 R, float* D, i64 ldd, int n) {
  i64 r = 0;
  if constexpr (V::RR >= 8)
    for (; r + 8 <= R; r += 8) outer_block<T, KEEP, TAIL, 8, NV>(x, ldx, keep, G + r, ldg, rows, D + r * ldd, ldd, n);
  if constexpr (V::RR >= 4)
    for (; r + 4 <= R; r += 4) outer_block<T, KEEP, TAIL, 4, NV>(x, ldx, keep, G + r, ldg, rows, D + r * ldd, ldd, n);
  for (; r + 2 <= R; r += 2) outer_block<T, KEEP, TAIL, 2, NV>(x, ldx, keep, G + r, ldg, rows, D + r * ldd, ldd, n);
  for (; r < R; ++r) outer_block<T, KEEP, TAIL, 1, NV>(x, ldx, keep, G + r, ldg, rows, D + r * ldd, ldd, n);
}

template <class T, bool KEEP>
void outer(Tile x, Keep keep, const float* G, i64 ldg, i64 rows, i64 cols, i64 R, float* D, i64 ldd) {
  constexpr int NV = V::OUTER_NV;
  const T* base = row<T>(x, 0);
  const auto shifted = [&](i64 k) { return Keep{keep.bits + k / 8, keep.ld}; };
  i64 k = 0;
  for (; k + NV * W <= cols; k += NV * W)
    outer_cols<T, KEEP, false, NV>(base + k, x.ld, shifted(k), G, ldg, rows, R, D + k, ldd, W);
  for (; k + W <= cols; k += W)
    outer_cols<T, KEEP, false, 1>(base + k, x.ld, shifted(k), G, ldg, rows, R, D + k, ldd, W);
  if (k < cols)
    outer_cols<T, KEEP, true, 1>(base + k, x.ld, shifted(k), G, ldg, rows, R, D + k, ldd, static_cast<int>(cols - k));
}

// ---- y[m, k] += keep(sum_r H[m, r] P[r, k]) + bias[k]: MR rows by NV vectors of columns, lanes along k ----

constexpr i64 kRankBlock = 32;  // a long sum over r is taken in blocks: a smaller error

template <bool TAIL, int MR, int NV>
inline __attribute__((always_inline)) void expand_sum(const float* H, i64 ldh, const float* P, i64 ldp, i64 R, int n,
                                                      reg (&acc)[MR][NV]) {
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = V::zero();
  for (i64 r = 0; r < R; ++r) {
    reg p[NV];
    LK_UNROLL for (int v = 0; v < NV; ++v) p[v] = TAIL ? V::load(P + r * ldp + v * W, n) : V::load(P + r * ldp + v * W);
    LK_UNROLL for (int i = 0; i < MR; ++i) {
      const reg h = V::set1(H[i * ldh + r]);
      LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = V::fma(h, p[v], acc[i][v]);
    }
  }
}

template <class T, bool KEEP, bool TAIL, int MR, int NV>
void expand_block(T* y, i64 ldy, Keep keep, const float* bias, const float* H, i64 ldh, const float* P, i64 ldp, i64 R,
                  int n) {
  reg acc[MR][NV];
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) ahead(y + (i + MR) * ldy + v * W);
  expand_sum<TAIL>(H, ldh, P, ldp, R < kRankBlock ? R : kRankBlock, n, acc);
  for (i64 r = kRankBlock; r < R; r += kRankBlock) {
    reg more[MR][NV];
    expand_sum<TAIL>(H + r, ldh, P + r * ldp, ldp, R - r < kRankBlock ? R - r : kRankBlock, n, more);
    LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] =
        V::add(acc[i][v], more[i][v]);
  }
  // all loads before the first store: rows a multiple of 4 KB apart look alike to the store buffer
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) {
    const T* in = y + i * ldy + v * W;
    reg term = KEEP ? V::keep(acc[i][v], keep.bits + i * keep.ld + v * W / 8) : acc[i][v];
    if (bias) term = V::add(term, TAIL ? V::load(bias + v * W, n) : V::load(bias + v * W));
    acc[i][v] = V::add(TAIL ? V::load(in, n) : V::load(in), term);
  }
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) {
    T* out = y + i * ldy + v * W;
    TAIL ? V::store(out, acc[i][v], n) : V::store(out, acc[i][v]);
  }
}

// A few whole rows at a time: a walk down a strip of columns would meet a new page at every row.
template <class T, bool KEEP, int MR>
void expand_rows(T* y, i64 ldy, Keep keep, const float* bias, const float* H, i64 ldh, const float* P, i64 ldp,
                 i64 cols, i64 R) {
  constexpr int NV = V::EXPAND_NV;
  const auto shifted = [&](i64 k) { return Keep{keep.bits + k / 8, keep.ld}; };
  i64 k = 0;
  for (; k + NV * W <= cols; k += NV * W)
    expand_block<T, KEEP, false, MR, NV>(y + k, ldy, shifted(k), bias ? bias + k : nullptr, H, ldh, P + k, ldp, R, W);
  for (; k + W <= cols; k += W)
    expand_block<T, KEEP, false, MR, 1>(y + k, ldy, shifted(k), bias ? bias + k : nullptr, H, ldh, P + k, ldp, R, W);
  if (k < cols)
    expand_block<T, KEEP, true, MR, 1>(y + k, ldy, shifted(k), bias ? bias + k : nullptr, H, ldh, P + k, ldp, R,
                                       static_cast<int>(cols - k));
}

template <class T, bool KEEP>
void expand(Tile y, Keep keep, const float* bias, const float* H, i64 ldh, const float* P, i64 ldp, i64 rows, i64 cols,
            i64 R) {
  constexpr int MR = V::EXPAND_MR;
  const auto shifted = [&](i64 m) { return Keep{keep.bits + m * keep.ld, keep.ld}; };
  i64 m = 0;
  for (; m + MR <= rows; m += MR)
    expand_rows<T, KEEP, MR>(row<T>(y, m), y.ld, shifted(m), bias, H + m * ldh, ldh, P, ldp, cols, R);
  for (; m < rows; ++m)
    expand_rows<T, KEEP, 1>(row<T>(y, m), y.ld, shifted(m), bias, H + m * ldh, ldh, P, ldp, cols, R);
}

}  // namespace
}  // namespace lk::cpu
