// The tile of the fp32 GEMM. Compiled by kernels.cpp, once per instruction set.
#pragma once

#include "tile.h"

namespace lk::cpu {
namespace {

constexpr int kGemmWidth = V::GEMM_NV * W;
constexpr i64 kGemmChain = 128;            // terms that are summed one after the other: an error no larger than MKL's
constexpr i64 kGemmRow = kGemmDepth + 16;  // rows of x, copied to where they do not all want the same place of L1

template <int MR, int NV>
inline __attribute__((always_inline)) void gemm_chain(const float* xs, const float* P, i64 depth, reg (&acc)[MR][NV]) {
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = V::zero();
  for (i64 k = 0; k < depth; ++k) {
    reg p[NV];
    LK_UNROLL for (int v = 0; v < NV; ++v) p[v] = V::load(P + k * kGemmWidth + v * W);
    LK_UNROLL for (int i = 0; i < MR; ++i) {
      const reg x = V::set1(xs[i * kGemmRow + k]);
      LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = V::fma(x, p[v], acc[i][v]);
    }
  }
}

// y[m, n] = (add ? y[m, n] : 0) + sum_k x[m, k] P[k, n] for MR rows and one panel; lanes along n
template <int MR>
void gemm_rows(const float* xs, const float* P, i64 cols, i64 depth, bool add, float* y, i64 ldy) {
  constexpr int NV = V::GEMM_NV;
  LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v)
      __builtin_prefetch(y + i * ldy + v * W, 1, 3);
  reg acc[MR][NV], first_half[MR][NV];
  const i64 half = depth > kGemmChain ? depth / 2 : depth;
  gemm_chain(xs, P, half, acc);
  if (half < depth) {
    LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) first_half[i][v] = acc[i][v];
    gemm_chain(xs + half, P + half * kGemmWidth, depth - half, acc);
    LK_UNROLL for (int i = 0; i < MR; ++i) LK_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] =
        V::add(acc[i][v], first_half[i][v]);
  }
  LK_UNROLL for (int v = 0; v < NV; ++v) {
    const int n = cols - v * W < W ? static_cast<int>(cols - v * W) : W;
    if (n <= 0) break;
    LK_UNROLL for (int i = 0; i < MR; ++i) {
      float* out = y + i * ldy + v * W;
      V::store(out, add ? V::add(V::load(out, n), acc[i][v]) : acc[i][v], n);
    }
  }
}

// rows <= MR, with as many accumulators as there are rows
template <int MR>
void gemm_group(i64 rows, const float* xs, const float* P, i64 cols, i64 depth, bool add, float* y, i64 ldy) {
  if (rows == MR) return gemm_rows<MR>(xs, P, cols, depth, add, y, ldy);
  if constexpr (MR > 1) gemm_group<MR - 1>(rows, xs, P, cols, depth, add, y, ldy);
}

void gemm(const float* x, i64 ldx, const float* P, i64 rows, i64 cols, i64 depth, bool add, float* y, i64 ldy) {
  constexpr i64 MR = V::GEMM_MR;
  alignas(64) float xs[MR * kGemmRow];
  const i64 groups = (rows + MR - 1) / MR;  // of rows / groups rows, or one more
  for (i64 group = 0; group < groups; ++group) {
    const i64 m0 = rows * group / groups, n = rows * (group + 1) / groups - m0;
    for (i64 i = 0; i < n; ++i) __builtin_memcpy(xs + i * kGemmRow, x + (m0 + i) * ldx, depth * sizeof(float));
    for (i64 n0 = 0; n0 < cols; n0 += kGemmWidth)
      gemm_group<MR>(n, xs, P + n0 * depth, cols - n0 < kGemmWidth ? cols - n0 : kGemmWidth, depth, add,
                     y + m0 * ldy + n0, ldy);
  }
}

// Panels of w for gemm: P[n / width][k][n % width] = w[n, k], and zeroes beyond cols.
void gemm_pack(const float* w, i64 stride_n, i64 stride_k, i64 cols, i64 depth, float* P) {
  const auto at = [&](i64 n, i64 k) {
    return P + n / kGemmWidth * kGemmWidth * depth + k * kGemmWidth + n % kGemmWidth;
  };
  const i64 padded = (cols + kGemmWidth - 1) / kGemmWidth * kGemmWidth;
  if (stride_n == 1) {  // w's memory runs along n: a few rows of it at a time, whose pages stay known
    constexpr i64 rows = 8;
    for (i64 k0 = 0; k0 < depth; k0 += rows)
      for (i64 n = 0; n < padded; n += W) {
        const int width = cols - n < 0 ? 0 : cols - n < W ? static_cast<int>(cols - n) : W;
        for (i64 k = k0; k < k0 + rows && k < depth; ++k) V::store(at(n, k), V::load(w + k * stride_k + n, width));
      }
    return;
  }
  for (i64 n = 0; n < padded; n += W) {
    i64 k = 0;
    if (stride_k == 1 && n + W <= cols) {
      for (; k + W <= depth; k += W) {
        reg t[W];
        LK_UNROLL for (int i = 0; i < W; ++i) t[i] = V::load(w + (n + i) * stride_n + k);
        V::transpose(t);
        LK_UNROLL for (int i = 0; i < W; ++i) V::store(at(n, k + i), t[i]);
      }
    }
    for (; k < depth; ++k)
      for (i64 i = 0; i < W; ++i) at(n, k)[i] = n + i < cols ? w[(n + i) * stride_n + k * stride_k] : 0.0f;
  }
}

}  // namespace
}  // namespace lk::cpu
