// The three products of the low-rank half, in fp32, over operands of any dtype. kernels.cpp compiles this file once per
// instruction set.
#pragma once

#include "tile.h"

namespace lk::cpu {
namespace {

// ---- out[m, r] (+)= sum_k keep(x)[m, k] P[r, k]: MR rows by RR values of r, lanes along k ----

template <class T, bool KEEP, bool TAIL, int MR, int RR>
LK_INLINE void dot_step(Rows<const T> x, Keep keep, Panel P, int n, reg (&acc)[MR][RR]) {
  reg xv[MR];
  LK_UNROLL for (int i = 0; i < MR; ++i) {
    ahead(x.row(i + MR));
    xv[i] = TAIL ? V::load(x.row(i), n) : V::load(x.row(i));
    if (KEEP) xv[i] = V::keep(xv[i], keep.row(i));
  }
  LK_UNROLL for (int j = 0; j < RR; ++j) {
    reg p = TAIL ? V::load(P.row(j), n) : V::load(P.row(j));
    V::pin(p);
    LK_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] = V::fma(xv[i], p, acc[i][j]);
  }
}

template <class T, bool KEEP, int MR, int RR>
void dot_block(Rows<const T> x, Keep keep, Panel P, i64 cols, Sums out, bool add) {
  reg acc[MR][RR];
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int j = 0; j < RR; ++j) acc[i][j] = V::zero();
  i64 k = 0;
  for (; k + W <= cols; k += W) dot_step<T, KEEP, false>(x.at(0, k), keep.at(0, k), P.at(0, k), W, acc);
  if (k < cols) dot_step<T, KEEP, true>(x.at(0, k), keep.at(0, k), P.at(0, k), static_cast<int>(cols - k), acc);
  LK_UNROLL for (int i = 0; i < MR; ++i) {
    float s[RR];
    LK_UNROLL for (int j = 0; j < RR; j += 4) V::sums(&acc[i][j], RR - j < 4 ? RR - j : 4, s + j);
    float* o = out.row(i);
    LK_UNROLL for (int j = 0; j < RR; ++j) o[j] = add ? o[j] + s[j] : s[j];
  }
}

template <class T, bool KEEP, int RR>
void dot_rows(Tile x, Keep keep, Panel P, Extent e, Sums out, bool add) {
  constexpr int MR = V::dot_rows(RR);
  const Rows<const T> xs = rows_of<const T>(x);
  i64 m = 0;
  for (; m + MR <= e.rows; m += MR)
    dot_block<T, KEEP, MR, RR>(xs.at(m, 0), keep.at(m, 0), P, e.cols, out.at(m, 0), add);
  for (; m < e.rows; ++m) dot_block<T, KEEP, 1, RR>(xs.at(m, 0), keep.at(m, 0), P, e.cols, out.at(m, 0), add);
}

template <class T, bool KEEP>
void dot(Tile x, Keep keep, Panel P, Extent e, Sums out, bool add) {
  i64 r = 0;
  if constexpr (V::RR >= 8)
    for (; r + 8 <= e.R; r += 8) dot_rows<T, KEEP, 8>(x, keep, P.at(r, 0), e, out.at(0, r), add);
  if constexpr (V::RR >= 4)
    for (; r + 4 <= e.R; r += 4) dot_rows<T, KEEP, 4>(x, keep, P.at(r, 0), e, out.at(0, r), add);
  for (; r + 2 <= e.R; r += 2) dot_rows<T, KEEP, 2>(x, keep, P.at(r, 0), e, out.at(0, r), add);
  for (; r < e.R; ++r) dot_rows<T, KEEP, 1>(x, keep, P.at(r, 0), e, out.at(0, r), add);
}

// ---- D[r, k] += sum_m G[m, r] keep(x)[m, k]: RR values of r by NV vectors of columns, lanes along k ----

// The rows of one call are summed from zero and then added to D. Two levels of summation have a smaller error than one.

constexpr i64 kRowsAhead = 48;  // distance of the prefetch

template <class T, bool KEEP, bool TAIL, int RR, int NV>
void outer_block(Rows<const T> x, Keep keep, Panel G, i64 rows, Sums D, int n) {
  reg acc[RR][NV];
  LK_UNROLL for (int j = 0; j < RR; ++j) LK_UNROLL for (int v = 0; v < NV; ++v) acc[j][v] = V::zero();
  for (i64 m = 0; m < rows; ++m) {
    reg xv[NV];
    LK_UNROLL for (int v = 0; v < NV; ++v) {
      ahead(x.row(m + kRowsAhead) + v * W);
      xv[v] = TAIL ? V::load(x.row(m) + v * W, n) : V::load(x.row(m) + v * W);
      if (KEEP) xv[v] = V::keep(xv[v], keep.row(m) + v * W / 8);
    }
    LK_UNROLL for (int j = 0; j < RR; ++j) {
      const reg g = V::set1(G.row(m)[j]);
      LK_UNROLL for (int v = 0; v < NV; ++v) acc[j][v] = V::fma(g, xv[v], acc[j][v]);
    }
  }
  LK_UNROLL for (int j = 0; j < RR; ++j) LK_UNROLL for (int v = 0; v < NV; ++v) {
    float* d = D.row(j) + v * W;
    if (TAIL)
      V::store(d, V::add(V::load(d, n), acc[j][v]), n);
    else
      V::store(d, V::add(V::load(d), acc[j][v]));
  }
}

template <class T, bool KEEP, bool TAIL, int NV>
void outer_cols(Rows<const T> x, Keep keep, Panel G, Extent e, Sums D, int n) {
  i64 r = 0;
  if constexpr (V::RR >= 8)
    for (; r + 8 <= e.R; r += 8) outer_block<T, KEEP, TAIL, 8, NV>(x, keep, G.at(0, r), e.rows, D.at(r, 0), n);
  if constexpr (V::RR >= 4)
    for (; r + 4 <= e.R; r += 4) outer_block<T, KEEP, TAIL, 4, NV>(x, keep, G.at(0, r), e.rows, D.at(r, 0), n);
  for (; r + 2 <= e.R; r += 2) outer_block<T, KEEP, TAIL, 2, NV>(x, keep, G.at(0, r), e.rows, D.at(r, 0), n);
  for (; r < e.R; ++r) outer_block<T, KEEP, TAIL, 1, NV>(x, keep, G.at(0, r), e.rows, D.at(r, 0), n);
}

template <class T, bool KEEP>
void outer(Tile x, Keep keep, Panel G, Extent e, Sums D) {
  constexpr int NV = V::OUTER_NV;
  const Rows<const T> xs = rows_of<const T>(x);
  i64 k = 0;
  for (; k + NV * W <= e.cols; k += NV * W)
    outer_cols<T, KEEP, false, NV>(xs.at(0, k), keep.at(0, k), G, e, D.at(0, k), W);
  for (; k + W <= e.cols; k += W) outer_cols<T, KEEP, false, 1>(xs.at(0, k), keep.at(0, k), G, e, D.at(0, k), W);
  if (k < e.cols)
    outer_cols<T, KEEP, true, 1>(xs.at(0, k), keep.at(0, k), G, e, D.at(0, k), static_cast<int>(e.cols - k));
}

// ---- out[k] += sum_m x[m, k]^2: MR rows, lanes along k ----

template <class T, bool TAIL, int MR>
LK_INLINE void squares_step(Rows<const T> x, float* out, int n) {
  reg acc = V::zero();
  LK_UNROLL for (int i = 0; i < MR; ++i) {
    const reg xv = TAIL ? V::load(x.row(i), n) : V::load(x.row(i));
    acc = V::fma(xv, xv, acc);
  }
  if (TAIL)
    V::store(out, V::add(V::load(out, n), acc), n);
  else
    V::store(out, V::add(V::load(out), acc));
}

template <class T, int MR>
void squares_rows(Rows<const T> x, i64 cols, float* out) {
  i64 k = 0;
  for (; k + W <= cols; k += W) squares_step<T, false, MR>(x.at(0, k), out + k, W);
  if (k < cols) squares_step<T, true, MR>(x.at(0, k), out + k, static_cast<int>(cols - k));
}

// Whole rows are read, because memory is read fastest from their beginning to their end.
template <class T>
void add_squares(Rows<const T> x, i64 rows, i64 cols, float* out) {
  constexpr int MR = 12;
  i64 m = 0;
  for (; m + MR <= rows; m += MR) squares_rows<T, MR>(x.at(m, 0), cols, out);
  for (; m < rows; ++m) squares_rows<T, 1>(x.at(m, 0), cols, out);
}

// ---- y[m, k] += keep(sum_r H[m, r] P[r, k]) + bias[k]: MR rows by NV vectors of columns, lanes along k ----

constexpr i64 kRankBlock = 32;  // a long sum over r is taken in blocks, for a smaller error

template <bool TAIL, int MR, int NV>
LK_INLINE void expand_sum(Panel H, Panel P, i64 R, int n, reg (&acc)[MR][NV]) {
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = V::zero();
  for (i64 r = 0; r < R; ++r) {
    reg p[NV];
    LK_UNROLL for (int v = 0; v < NV; ++v) p[v] = TAIL ? V::load(P.row(r) + v * W, n) : V::load(P.row(r) + v * W);
    LK_UNROLL for (int i = 0; i < MR; ++i) {
      const reg h = V::set1(H.row(i)[r]);
      LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = V::fma(h, p[v], acc[i][v]);
    }
  }
}

template <class T, bool KEEP, bool TAIL, int MR, int NV>
void expand_block(Rows<T> y, Keep keep, const float* bias, Panel H, Panel P, i64 R, int n) {
  reg acc[MR][NV];
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) ahead(y.row(i + MR) + v * W);
  expand_sum<TAIL>(H, P, R < kRankBlock ? R : kRankBlock, n, acc);
  for (i64 r = kRankBlock; r < R; r += kRankBlock) {
    reg more[MR][NV];
    expand_sum<TAIL>(H.at(0, r), P.at(r, 0), R - r < kRankBlock ? R - r : kRankBlock, n, more);
    LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] =
        V::add(acc[i][v], more[i][v]);
  }
  // All loads come before the first store: the store buffer cannot tell apart rows that are a multiple of 4 KB apart.
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) {
    const T* in = y.row(i) + v * W;
    reg term = KEEP ? V::keep(acc[i][v], keep.row(i) + v * W / 8) : acc[i][v];
    if (bias) term = V::add(term, TAIL ? V::load(bias + v * W, n) : V::load(bias + v * W));
    acc[i][v] = V::add(TAIL ? V::load(in, n) : V::load(in), term);
  }
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) {
    T* out = y.row(i) + v * W;
    TAIL ? V::store(out, acc[i][v], n) : V::store(out, acc[i][v]);
  }
}

// A few whole rows at a time: going down a strip of columns would touch a new page at every row.
template <class T, bool KEEP, int MR>
void expand_rows(Rows<T> y, Keep keep, const float* bias, Panel H, Panel P, Extent e) {
  constexpr int NV = V::EXPAND_NV;
  const auto bias_at = [&](i64 k) { return bias ? bias + k : nullptr; };
  i64 k = 0;
  for (; k + NV * W <= e.cols; k += NV * W)
    expand_block<T, KEEP, false, MR, NV>(y.at(0, k), keep.at(0, k), bias_at(k), H, P.at(0, k), e.R, W);
  for (; k + W <= e.cols; k += W)
    expand_block<T, KEEP, false, MR, 1>(y.at(0, k), keep.at(0, k), bias_at(k), H, P.at(0, k), e.R, W);
  if (k < e.cols)
    expand_block<T, KEEP, true, MR, 1>(y.at(0, k), keep.at(0, k), bias_at(k), H, P.at(0, k), e.R,
                                       static_cast<int>(e.cols - k));
}

template <class T, bool KEEP>
void expand(Tile y, Keep keep, const float* bias, Panel H, Panel P, Extent e) {
  constexpr int MR = V::EXPAND_MR;
  const Rows<T> ys = rows_of<T>(y);
  i64 m = 0;
  for (; m + MR <= e.rows; m += MR) expand_rows<T, KEEP, MR>(ys.at(m, 0), keep.at(m, 0), bias, H.at(m, 0), P, e);
  for (; m + 2 <= e.rows; m += 2) expand_rows<T, KEEP, 2>(ys.at(m, 0), keep.at(m, 0), bias, H.at(m, 0), P, e);
  for (; m < e.rows; ++m) expand_rows<T, KEEP, 1>(ys.at(m, 0), keep.at(m, 0), bias, H.at(m, 0), P, e);
}

}  // namespace
}  // namespace lk::cpu
