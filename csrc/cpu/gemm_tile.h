// The tile of the GEMM. A class Terms describes its operands: kernels.cpp compiles it with Fp32Terms once per
// instruction set, and gemm_bf16.cpp with pairs of bf16.
#pragma once

#include "tile.h"

namespace lk::cpu {
namespace {

constexpr int kGemmWidth = V::GEMM_NV * W;

// What a float of a panel holds, and how it is multiplied by a float of x.
struct Fp32Terms {
  using T = float;
  static constexpr i64 pair = 1;
  // Each accumulator sums half the depth, which keeps the error no larger than MKL's.
  static constexpr i64 depth = 256, group = 384;
  static reg fma(reg x, reg p, reg sum) { return V::fma(x, p, sum); }
  // The floats of row k of a panel for n neighbouring columns of w, whose memory runs along n
  static reg columns(const T* w, i64 stride_k, i64 k, i64, int n) { return V::load(w + k * stride_k, n); }
  // The float of row k of a panel for one column of w
  static float one(const T* w, i64 stride_k, i64 k, i64) { return w[k * stride_k]; }
};

// Floats from one row of the copy of x to the next. The 16 more than the depth keep the rows from mapping to the same
// sets of L1.
template <class Terms>
constexpr i64 kGemmRow = Terms::depth + 16;

template <class Terms, int MR, int NV>
inline __attribute__((always_inline)) void gemm_chain(const float* xs, const float* P, i64 depth, reg (&acc)[MR][NV]) {
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = V::zero();
  for (i64 k = 0; k < depth; ++k) {
    reg p[NV];
    LK_UNROLL for (int v = 0; v < NV; ++v) p[v] = V::load(P + k * kGemmWidth + v * W);
    LK_UNROLL for (int i = 0; i < MR; ++i) {
      const reg x = V::set1(xs[i * kGemmRow<Terms> + k]);
      LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = Terms::fma(x, p[v], acc[i][v]);
    }
  }
}

// Where the rows of one panel go, as in GemmOut.
template <class T>
struct RowsOut {
  bool add_sum;
  Sums sum;
  Rows<const T> addend;
  Rows<T> y;
};

// MR rows and one panel, lanes along n; depth in floats
template <class Terms, int MR>
void gemm_rows(const float* xs, const float* P, i64 cols, i64 depth, RowsOut<typename Terms::T> out) {
  constexpr int NV = V::GEMM_NV;
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v)
      __builtin_prefetch(out.sum.row(i) + v * W, 1, 3);
  reg acc[MR][NV], first_half[MR][NV];
  const i64 half = depth > Terms::depth / 2 ? depth / 2 : depth;
  gemm_chain<Terms>(xs, P, half, acc);
  if (half < depth) {
    LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) first_half[i][v] = acc[i][v];
    gemm_chain<Terms>(xs + half, P + half * kGemmWidth, depth - half, acc);
    LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] =
        V::add(acc[i][v], first_half[i][v]);
  }
  LK_UNROLL for (int v = 0; v < NV; ++v) {
    const int n = cols - v * W < W ? static_cast<int>(cols - v * W) : W;
    if (n <= 0) break;
    LK_UNROLL for (int i = 0; i < MR; ++i) {
      float* const s = out.sum.row(i) + v * W;
      const reg total = out.add_sum ? V::add(V::load(s, n), acc[i][v]) : acc[i][v];
      if (!out.y.data) {
        V::store(s, total, n);
        continue;
      }
      const bool add = out.addend.data != nullptr;
      V::store(out.y.row(i) + v * W, add ? V::add(V::load(out.addend.row(i) + v * W, n), total) : total, n);
    }
  }
}

// gemm_rows for `rows` <= MR, with as many accumulators as there are rows
template <class Terms, int MR, class... Rest>
void gemm_group(i64 rows, Rest... rest) {
  if (rows == MR) return gemm_rows<Terms, MR>(rest...);
  if constexpr (MR > 1) gemm_group<Terms, MR - 1>(rows, rest...);
}

template <class Terms>
void gemm_tile(Tile x, const float* P, i64 rows, i64 cols, i64 depth, GemmOut out) {
  using T = typename Terms::T;
  constexpr i64 MR = V::GEMM_MR;
  alignas(64) float xs[MR * kGemmRow<Terms>];
  const i64 groups = (rows + MR - 1) / MR;  // each has rows / groups rows, or one more
  const i64 floats = (depth + Terms::pair - 1) / Terms::pair;
  for (i64 group = 0; group < groups; ++group) {
    const i64 m0 = rows * group / groups, n = rows * (group + 1) / groups - m0;
    for (i64 i = 0; i < n; ++i) {
      if (depth % Terms::pair) xs[i * kGemmRow<Terms> + floats - 1] = 0.0f;  // the other half of a last pair
      __builtin_memcpy(xs + i * kGemmRow<Terms>, row<T>(x, m0 + i), depth * sizeof(T));
    }
    const auto from = [&](Tile t, i64 n0) { return Rows<T>{t ? row<T>(t, m0) + n0 : nullptr, t.ld}; };
    for (i64 n0 = 0; n0 < cols; n0 += kGemmWidth)
      gemm_group<Terms, MR>(n, xs, P + n0 * floats, cols - n0 < kGemmWidth ? cols - n0 : kGemmWidth, floats,
                            RowsOut<T>{out.add_sum, out.sum.at(m0, n0), from(out.addend, n0), from(out.y, n0)});
  }
}

template <class Terms>
void gemm_pack(Strided from, i64 cols, i64 depth, i64 column, float* P) {
  using T = typename Terms::T;
  constexpr i64 pair = Terms::pair;
  const T* const w = static_cast<const T*>(from.data);
  const i64 stride_n = from.stride_n, stride_k = from.stride_k;
  const auto at = [&](i64 n, i64 k) {
    return P + n / kGemmWidth * kGemmWidth * column + k / pair * kGemmWidth + n % kGemmWidth;
  };
  const i64 padded = (cols + kGemmWidth - 1) / kGemmWidth * kGemmWidth;
  if (stride_n == 1) {  // memory runs along n: a few rows at a time, so that their pages stay in the TLB
    constexpr i64 rows = 8 * pair;
    for (i64 k0 = 0; k0 < depth; k0 += rows)
      for (i64 n = 0; n < padded; n += W) {
        const int width = cols - n < 0 ? 0 : cols - n < W ? static_cast<int>(cols - n) : W;
        for (i64 k = k0; k < k0 + rows && k < depth; k += pair)
          V::store(at(n, k), Terms::columns(w + n, stride_k, k, depth, width));
      }
    return;
  }
  for (i64 n = 0; n < padded; n += W) {
    i64 k = 0;
    if (stride_k == 1 && n + W <= cols) {
      for (; k + W * pair <= depth; k += W * pair) {
        reg t[W];
        LK_UNROLL for (int i = 0; i < W; ++i) t[i] =
            V::load(reinterpret_cast<const float*>(w + (n + i) * stride_n + k));
        V::transpose(t);
        LK_UNROLL for (int i = 0; i < W; ++i) V::store(at(n, k + i * pair), t[i]);
      }
    }
    for (; k < depth; k += pair)
      for (i64 i = 0; i < W; ++i)
        at(n, k)[i] = n + i < cols ? Terms::one(w + (n + i) * stride_n, stride_k, k, depth) : 0.0f;
  }
}

}  // namespace
}  // namespace lk::cpu
