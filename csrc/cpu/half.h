// bf16 and fp16 in memory, one element at a time. Rounding is to nearest even, as torch does it; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace lk::cpu {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline float to_float(float f) { return f; }
inline float to_float(bf16 h) { return float_of(static_cast<uint32_t>(h.bits) << 16); }
inline float to_float(f16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t rest = h.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Shifting the fields to fp32's places leaves the exponent too small by 127 - 15 = 112. An exact product with 2^112
  // corrects it, for subnormals too.
  return float_of(sign | bits_of(float_of(rest << 13) * float_of(0x77800000u)));
}

inline void from_float(float f, float* out) { *out = f; }
inline void from_float(float f, bf16* out) {
  const uint32_t u = bits_of(f);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void from_float(float f, f16* out) {
  const uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
  uint32_t h;
  if (rest > 0x7f800000u) {
    h = 0x7e00u;  // NaN
  } else if (rest >= 0x477ff000u) {
    h = 0x7c00u;  // 65520 and above round to infinity
  } else if (rest < 0x38800000u) {
    h = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;  // below 2^-14: the adder rounds at 2^-24, fp16's last place
  } else {
    h = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | h);
}

}  // namespace
}  // namespace lk::cpu
