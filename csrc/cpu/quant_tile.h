// Codes of 4 and 8 bits to fp32, and their products with a few rows of x. Compiled by kernels.cpp, once per instruction
// set.
#pragma once

#include "tile.h"

#if defined(LK_ISA_AVX512)
#include "quant_avx512.h"
#elif defined(LK_ISA_AVX2)
#include "quant_avx2.h"
#else
#include "quant_baseline.h"
#endif

namespace lk::cpu {
namespace {

// From a format to its elements: Q::four, i8 or e4m3 of 2 W elements.
struct FourBits {
  static constexpr i64 bytes(i64 k) { return k / 2; }
  static void load(const uint8_t* c, const Q::Lut& t, reg (&v)[2]) { Q::four(c, t, v); }
};
struct Int8 {
  static constexpr i64 bytes(i64 k) { return k; }
  static void load(const uint8_t* c, const Q::Lut&, reg (&v)[2]) {
    v[0] = Q::i8(c);
    v[1] = Q::i8(c + W);
  }
};
struct Fp8 {  // times 2^-8
  static constexpr i64 bytes(i64 k) { return k; }
  static void load(const uint8_t* c, const Q::Lut&, reg (&v)[2]) {
    v[0] = Q::e4m3(c);
    v[1] = Q::e4m3(c + W);
  }
};

constexpr i64 kStep = 2 * W;

template <class F>
inline void load_part(const uint8_t* c, i64 count, const Q::Lut& t, reg (&v)[2]) {
  uint8_t padded[kStep] = {};
  __builtin_memcpy(padded, c, static_cast<size_t>(F::bytes(count)));
  F::load(padded, t, v);
}

// out[i] = value(code i) * factor, and that * then where TWICE
template <class F, bool TWICE>
void decode_as(const uint8_t* c, i64 count, const float* levels, float factor, float then, float* out) {
  const Q::Lut t = Q::lut(levels);
  const reg f = V::set1(factor), g = V::set1(then);
  reg v[2];
  i64 k = 0;
  for (; k + kStep <= count; k += kStep) {
    F::load(c + F::bytes(k), t, v);
    LK_UNROLL for (int j = 0; j < 2; ++j) {
      reg r = V::mul(v[j], f);
      if (TWICE) r = V::mul(r, g);
      V::store(out + k + j * W, r);
    }
  }
  if (k == count) return;
  load_part<F>(c + F::bytes(k), count - k, t, v);
  LK_UNROLL for (int j = 0; j < 2; ++j) {
    const i64 n = count - k - j * W;
    reg r = V::mul(v[j], f);
    if (TWICE) r = V::mul(r, g);
    if (n > 0) V::store(out + k + j * W, r, n < W ? static_cast<int>(n) : W);
  }
}

void decode(Format format, const uint8_t* c, i64 count, const float* levels, float scale, float* out) {
  if (format == Format::int8) return decode_as<Int8, true>(c, count, levels, scale, 1.0f / 127.0f, out);
  if (format == Format::fp8) return decode_as<Fp8, false>(c, count, levels, scale * 256.0f, 0.0f, out);
  decode_as<FourBits, false>(c, count, levels, scale, 0.0f, out);
}

// One pass over RW rows of codes for XR rows of x: out[i, m] = sum_s scales[i, s] sum_k in segment s of w x
template <class F, int RW, int XR>
void rows_dot(const QuantRows& w, const float* X, i64 ldx, float* out, i64 ldo) {
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
        __builtin_prefetch(c[i] + F::bytes(k) + 1024, 0, 3);
        LK_UNROLL for (int m = 0; m < XR; ++m) LK_UNROLL for (int j = 0; j < 2; ++j) p[i][m] =
            V::fma(v[j], V::load(X + m * ldx + k + j * W), p[i][m]);
      }
    }
    if (k < end) {  // x is followed by zeroes
      LK_UNROLL for (int i = 0; i < RW; ++i) {
        load_part<F>(c[i] + F::bytes(k), end - k, t, v);
        LK_UNROLL for (int m = 0; m < XR; ++m) LK_UNROLL for (int j = 0; j < 2; ++j) p[i][m] =
            V::fma(v[j], V::load(X + m * ldx + k + j * W), p[i][m]);
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
    for (int m = 0; m < XR && i < w.rows; ++m) out[i * ldo + m] = sums[m];
  }
}

template <class F>
void quant_dot_as(const QuantRows& w, const float* X, i64 ldx, i64 M, float* out, i64 ldo) {
  i64 m = 0;
  if constexpr (W == 16)  // there are registers enough
    for (; m + 4 <= M; m += 4)
      for (i64 i = 0; i < w.rows; i += 2) rows_dot<F, 2, 4>(w.part(i, 2), X + m * ldx, ldx, out + i * ldo + m, ldo);
  for (; m + 2 <= M; m += 2) rows_dot<F, kQuantRows, 2>(w, X + m * ldx, ldx, out + m, ldo);
  if (m < M) rows_dot<F, kQuantRows, 1>(w, X + m * ldx, ldx, out + m, ldo);
}

// out[i, m] = sum_k w[i, k] x[m, k] for at most kQuantRows rows; X from quant_x
void quant_dot(const QuantRows& w, const float* X, i64 ldx, i64 M, float* out, i64 ldo) {
  if (w.format == Format::int8) return quant_dot_as<Int8>(w, X, ldx, M, out, ldo);
  if (w.format == Format::fp8) return quant_dot_as<Fp8>(w, X, ldx, M, out, ldo);
#if defined(LK_ISA_AVX512)
  i64 m = 0;
  for (; m + 4 <= M; m += 4) chunks_dot<4>(w, X + m * ldx, ldx, out + m, ldo);
  for (; m + 2 <= M; m += 2) chunks_dot<2>(w, X + m * ldx, ldx, out + m, ldo);
  if (m < M) chunks_dot<1>(w, X + m * ldx, ldx, out + m, ldo);
#else
  quant_dot_as<FourBits>(w, X, ldx, M, out, ldo);
#endif
}

// Rows of x [M, K] as quant_dot takes them, ldx a multiple of 128: with zeroes behind, and in its order
void quant_x(Format format, float* X, i64 ldx, i64 M, i64 K) {
  for (i64 m = 0; m < M; ++m) {
    float* row = X + m * ldx;
    for (i64 k = K; k < ldx; ++k) row[k] = 0.0f;
#if defined(LK_ISA_AVX512)
    if (format == Format::nf4 || format == Format::fp4) chunks_of(row, ldx);
#else
    (void)format;
#endif
  }
}

// Scales out of double quantisation. The product is rounded before the sum, as everywhere.
void quant_scales(const uint8_t* codes, i64 first, i64 count, const float* table, const float* absmax, float offset,
                  float* out) {
  const reg o = V::set1(offset);
  const auto scaled = [&](reg level, i64 at) {
    reg product = V::mul(level, V::set1(absmax[at / kNested]));
    V::pin(product);
    return V::add(product, o);
  };
  for (i64 i = 0, end; i < count; i = end) {  // as far as one absmax goes
    end = ((first + i) / kNested + 1) * kNested - first;
    end = end < count ? end : count;
    for (; i + W <= end; i += W) V::store(out + i, scaled(Q::gather(table, codes + first + i), first + i));
    if (i == end) continue;
    uint8_t padded[W] = {};
    __builtin_memcpy(padded, codes + first + i, static_cast<size_t>(end - i));
    V::store(out + i, scaled(Q::gather(table, padded), first + i), static_cast<int>(end - i));
  }
}

}  // namespace
}  // namespace lk::cpu
