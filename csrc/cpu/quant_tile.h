// Products of codes of 4 and 8 bits with a few rows of x. kernels.cpp compiles this file once per instruction set.
#pragma once

#include "quant_decode.h"

namespace lk::cpu {
namespace {

// One pass over RW rows of codes for XR rows of x: out[i, m] = sum_s scales[i, s] sum_k in segment s of w x
template <class F, int RW, int XR>
void rows_dot(const QuantRows& w, Panel X, Sums out) {
  const Q::Lut t = Q::lut(w.levels);
  const uint8_t* c[RW];
  LK_UNROLL for (int i = 0; i < RW; ++i) c[i] = w.codes + (i < w.rows ? i : 0) * w.ldc;
  reg acc[RW][XR];
  LK_UNROLL for (int i = 0; i < RW; ++i) LK_UNROLL for (int m = 0; m < XR; ++m) acc[i][m] = V::zero();
  i64 s = 0;
  for (i64 k0 = 0; k0 < w.K; k0 += w.segment, ++s) {
    const i64 end = k0 + w.segment < w.K ? k0 + w.segment : w.K;
    reg p[RW][XR], v[2];
    LK_UNROLL for (int i = 0; i < RW; ++i) LK_UNROLL for (int m = 0; m < XR; ++m) p[i][m] = V::zero();
    i64 k = k0;
    for (; k + kStep <= end; k += kStep) {
      LK_UNROLL for (int i = 0; i < RW; ++i) {
        F::load(c[i] + F::bytes(k), t, v);
        ahead(c[i] + F::bytes(k) + RW * w.ldc);  // of the rows that follow these
        LK_UNROLL for (int m = 0; m < XR; ++m) LK_UNROLL for (int j = 0; j < 2; ++j) p[i][m] =
            V::fma(v[j], V::load(X.row(m) + k + j * W), p[i][m]);
      }
    }
    if (k < end) {  // zeros follow the last column of X
      LK_UNROLL for (int i = 0; i < RW; ++i) {
        load_part<F>(c[i] + F::bytes(k), end - k, t, v);
        LK_UNROLL for (int m = 0; m < XR; ++m) LK_UNROLL for (int j = 0; j < 2; ++j) p[i][m] =
            V::fma(v[j], V::load(X.row(m) + k + j * W), p[i][m]);
      }
    }
    LK_UNROLL for (int i = 0; i < RW; ++i) {
      const reg scale = V::set1(w.scales[(i < w.rows ? i : 0) * w.lds + s]);
      LK_UNROLL for (int m = 0; m < XR; ++m) acc[i][m] = V::fma(p[i][m], scale, acc[i][m]);
    }
  }
  LK_UNROLL for (int i = 0; i < RW; ++i) {
    float sums[4];
    V::sums(acc[i], XR, sums);
    for (int m = 0; m < XR && i < w.rows; ++m) out.row(i)[m] = sums[m];
  }
}

template <class F>
void quant_dot_as(const QuantRows& w, Panel X, i64 M, Sums out) {
  i64 m = 0;
  if constexpr (W == 16)  // AVX-512 has enough registers
    for (; m + 4 <= M; m += 4)
      for (i64 i = 0; i < w.rows; i += 2) rows_dot<F, 2, 4>(w.part(i, 2), X.at(m, 0), out.at(i, m));
  for (; m + 2 <= M; m += 2) rows_dot<F, kQuantRows, 2>(w, X.at(m, 0), out.at(0, m));
  if (m < M) rows_dot<F, kQuantRows, 1>(w, X.at(m, 0), out.at(0, m));
}

// out[i, m] = sum_k w[i, k] x[m, k], for at most kQuantRows rows i. X comes from quant_x.
void quant_dot(const QuantRows& w, Panel X, i64 M, Sums out) {
  if (w.format == Format::int8 || w.format == Format::integers) return quant_dot_as<Int8>(w, X, M, out);
  if (w.format == Format::fp8) return quant_dot_as<Fp8>(w, X, M, out);
#if defined(LK_ISA_AVX512)
  i64 m = 0;
  for (; m + 4 <= M; m += 4) chunks_dot<4>(w, X.at(m, 0), out.at(0, m));
  for (; m + 2 <= M; m += 2) chunks_dot<2>(w, X.at(m, 0), out.at(0, m));
  if (m < M) chunks_dot<1>(w, X.at(m, 0), out.at(0, m));
#else
  quant_dot_as<FourBits>(w, X, M, out);
#endif
}

// Arrange rows of x [M, K] in place for quant_dot: zeros follow column K, and 4-bit formats have their own order of
// columns. X.ld is a multiple of kQuantPad.
void quant_x(Format format, Sums X, i64 M, i64 K) {
  for (i64 m = 0; m < M; ++m) {
    float* row = X.row(m);
    for (i64 k = K; k < X.ld; ++k) row[k] = 0.0f;
#if defined(LK_ISA_AVX512)
    if (format == Format::nf4 || format == Format::fp4) chunks_of(row, X.ld);
#else
    (void)format;
#endif
  }
}

// The scales that double quantisation has stored as codes. The product is rounded before the sum, as in every other
// place that computes them.
void quant_scales(const uint8_t* codes, i64 first, i64 count, const float* table, const float* absmax, float offset,
                  float* out) {
  const reg o = V::set1(offset);
  const auto scaled = [&](reg level, i64 at) {
    reg product = V::mul(level, V::set1(absmax[at / kNested]));
    V::pin(product);
    return V::add(product, o);
  };
  for (i64 i = 0, end; i < count; i = end) {  // up to the end of the scales that share one absmax
    end = ((first + i) / kNested + 1) * kNested - first;
    end = end < count ? end : count;
    for (; i + W <= end; i += W) V::store(out + i, scaled(Q::look_up256(table, codes + first + i), first + i));
    if (i == end) continue;
    uint8_t padded[W] = {};
    __builtin_memcpy(padded, codes + first + i, static_cast<size_t>(end - i));
    V::store(out + i, scaled(Q::look_up256(table, padded), first + i), static_cast<int>(end - i));
  }
}

}  // namespace
}  // namespace lk::cpu
