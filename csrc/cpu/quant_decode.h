// Codes of 4 and 8 bits to numbers. kernels.cpp compiles this file once per instruction set, for fp32; gemm_bf16.cpp
// compiles it for bf16.
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

// For each format, how 2 W elements are loaded.
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
struct Fp8 {  // loads the value times 2^-8
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

// The type of the results, and how 2 W of them are stored.
struct ToFp32 {
  using T = float;
  static void store(T* out, const reg (&v)[2]) {
    V::store(out, v[0]);
    V::store(out + W, v[1]);
  }
};

constexpr i64 kDecodeAhead = 8;  // rows

// to[i, k] = value of code (i, k0 + k) * (scale * factor), and with TWICE this product * then
template <class F, class To, bool TWICE>
void decode_as(const QuantRows& w, i64 k0, i64 count, float factor, float then, typename To::T* to) {
  const Q::Lut t = Q::lut(w.levels);
  const reg g = V::set1(then);
  const i64 first = k0 / w.segment, head = w.segment - k0 % w.segment;
  for (i64 i = 0; i < w.rows; ++i, to += count) {
    const uint8_t* const c = w.codes + i * w.ldc + F::bytes(k0);
    const float* scale = w.scales + i * w.lds + first;
    for (i64 b = 0; b < F::bytes(count); b += 64) ahead(c + kDecodeAhead * w.ldc + b);
    for (i64 b = 0; b * w.segment < count; b += 16) ahead(scale + kDecodeAhead * w.lds + b);
    for (i64 j = 0, end = head; j < count; j = end, end += w.segment, ++scale) {
      const reg f = V::set1(*scale * factor);
      reg v[2];
      const auto scaled = [&] {
        LK_UNROLL for (int n = 0; n < 2; ++n) {
          v[n] = V::mul(v[n], f);
          if (TWICE) v[n] = V::mul(v[n], g);
        }
      };
      end = end < count ? end : count;
      i64 k = j;
      for (; k + kStep <= end; k += kStep) {
        F::load(c + F::bytes(k), t, v);
        scaled();
        To::store(to + k, v);
      }
      if (k == end) continue;
      load_part<F>(c + F::bytes(k), end - k, t, v);
      scaled();
      for (int n = 0; n < 2; ++n) {
        const i64 left = end - k - n * W;
        if (left > 0) V::store(to + k + n * W, v[n], left < W ? static_cast<int>(left) : W);
      }
    }
  }
}

// out[i, k] = w[i, k0 + k], as rows of `count` To::T
template <class To>
void decode(const QuantRows& w, i64 k0, i64 count, void* out) {
  typename To::T* const to = static_cast<typename To::T*>(out);
  if (w.format == Format::int8) return decode_as<Int8, To, true>(w, k0, count, 1.0f, 1.0f / 127.0f, to);
  if (w.format == Format::integers) return decode_as<Int8, To, false>(w, k0, count, 1.0f, 0.0f, to);
  if (w.format == Format::fp8) return decode_as<Fp8, To, false>(w, k0, count, 256.0f, 0.0f, to);
  decode_as<FourBits, To, false>(w, k0, count, 1.0f, 0.0f, to);
}

}  // namespace
}  // namespace lk::cpu
