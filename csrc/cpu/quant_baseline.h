// Codes to fp32 in plain C++.
#pragma once

namespace lk::cpu {
namespace {

struct Q {
  using Lut = const float*;

  static Lut lut(const float* levels) { return levels; }
  static void four(const uint8_t* c, const Lut& t, reg (&v)[2]) {  // the high nibble comes first
    for (int i = 0; i < 2 * W; ++i) v[i / W].v[i % W] = t[i % 2 ? c[i / 2] & 15 : c[i / 2] >> 4];
  }
  static reg look_up256(const float* table, const uint8_t* c) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = table[c[i]];
    return r;
  }
  static reg i8(const uint8_t* c) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = static_cast<float>(static_cast<int8_t>(c[i]));
    return r;
  }
  // The bits of e4m3, moved to the places of fp16's fields, are its value times 2^-8. All ones is NaN.
  static reg e4m3(const uint8_t* c) {
    reg r;
    for (int i = 0; i < W; ++i) {
      const uint32_t rest = c[i] & 0x7fu, bits = (c[i] & 0x80u) << 8 | (rest == 0x7fu ? 0x7e00u : rest << 7);
      r.v[i] = to_float(f16{static_cast<uint16_t>(bits)});
    }
    return r;
  }
};

}  // namespace
}  // namespace lk::cpu
