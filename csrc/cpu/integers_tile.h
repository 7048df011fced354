// Integer codes of 4 and 8 bits to numbers. kernels.cpp compiles this file once per instruction set; the compiler makes
// vector instructions of the loops that unpack.
#pragma once

#include "tile.h"

namespace lk::cpu {
namespace {

constexpr int kAwqShift[8] = {0, 16, 4, 20, 8, 24, 12, 28};  // of the elements of a word, in their order

template <int PER_WORD>
inline void unpack_words(const uint32_t* words, i64 count, const int (&shift)[PER_WORD], float* out) {
  constexpr uint32_t mask = PER_WORD == 8 ? 15u : 255u;
  i64 i = 0;
  for (; i + PER_WORD <= count; i += PER_WORD, ++words)
    for (int j = 0; j < PER_WORD; ++j) out[i + j] = static_cast<float>(static_cast<int>(*words >> shift[j] & mask));
  for (int j = 0; i + j < count; ++j) out[i + j] = static_cast<float>(static_cast<int>(*words >> shift[j] & mask));
}

void unpack(const IntRun& r, float* __restrict out) {
  const i64 n = r.count;
  const auto* const bytes = static_cast<const uint8_t*>(r.codes);
  const auto* const words = static_cast<const uint32_t*>(r.codes);
  constexpr int four[8] = {0, 4, 8, 12, 16, 20, 24, 28}, eight[4] = {0, 8, 16, 24};
  switch (r.code) {
    case IntCode::i8:
      for (i64 i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<int8_t>(bytes[i]));
      return;
    case IntCode::u8:
      for (i64 i = 0; i < n; ++i) out[i] = static_cast<float>(bytes[i]);
      return;
    case IntCode::high:
      for (i64 i = 0; i < n; ++i) out[i] = static_cast<float>(bytes[i] >> 4);
      return;
    case IntCode::low:
      for (i64 i = 0; i < n; ++i) out[i] = static_cast<float>(bytes[i] & 15);
      return;
    case IntCode::word4:
      for (i64 i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<int>(words[i] >> r.shift & 15u));
      return;
    case IntCode::word8:
      for (i64 i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<int>(words[i] >> r.shift & 255u));
      return;
    case IntCode::spread4:
      return unpack_words(words, n, four, out);
    case IntCode::spread8:
      return unpack_words(words, n, eight, out);
    case IntCode::spread_awq:
      return unpack_words(words, n, kAwqShift, out);
  }
}

// v rounded to T
template <class T>
inline reg rounded(reg v) {
  T buffer[W];
  V::store(buffer, v);
  return V::load(buffer);
}
template <>
inline reg rounded<float>(reg v) {
  return v;
}

// v = (v - zero) * scale for n <= W elements, in place
template <class T>
inline void scale_some(float* v, reg scale, reg minus_zero, int n) {
  const reg code = n == W ? V::load(v) : V::load(v, n);
  const reg w = rounded<T>(V::mul(rounded<T>(V::add(code, minus_zero)), scale));
  n == W ? V::store(v, w) : V::store(v, w, n);
}

template <class T>
void scale_run(const IntRun& r, float* out) {
  const reg minus = V::set1(-1.0f), none = V::zero();
  if (r.segment == 0) {
    for (i64 i = 0; i < r.count; i += W) {
      const int n = r.count - i < W ? static_cast<int>(r.count - i) : W;
      const auto load = [&](const float* p) { return n == W ? V::load(p + i) : V::load(p + i, n); };
      scale_some<T>(out + i, load(r.scales), r.zeros ? V::mul(load(r.zeros), minus) : none, n);
    }
    return;
  }
  i64 s = 0;
  for (i64 i = 0, end = r.head; i < r.count; i = end, end += r.segment, ++s) {
    end = end < r.count ? end : r.count;
    const reg scale = V::set1(r.scales[s]), minus_zero = r.zeros ? V::set1(-r.zeros[s]) : none;
    i64 j = i;
    for (; j + W <= end; j += W) scale_some<T>(out + j, scale, minus_zero, W);
    if (j < end) scale_some<T>(out + j, scale, minus_zero, static_cast<int>(end - j));
  }
}

void integers(const IntRun& r, float* out) {
  unpack(r, out);
  if (!r.scales) return;
  switch (r.rounded) {
    case DType::f32:
      return scale_run<float>(r, out);
    case DType::bf16:
      return scale_run<bf16>(r, out);
    case DType::f16:
      return scale_run<f16>(r, out);
  }
}

}  // namespace
}  // namespace lk::cpu
