// Eight floats in plain C++, which the compiler turns into SSE2 on x86-64 and NEON on arm64.
#pragma once

#include <cstdint>
#include <cstring>

#include "../philox.h"
#include "half.h"

namespace lk::cpu {
namespace {

struct V {
  static constexpr int W = 8;                         // lanes
  static constexpr int RR = 2;                        // largest block of r in dot and outer
  static constexpr int OUTER_NV = 2;                  // vectors of columns in outer
  static constexpr int EXPAND_MR = 2, EXPAND_NV = 2;  // rows, vectors of columns in expand
  static constexpr int GEMM_MR = 2, GEMM_NV = 2;      // rows, vectors of columns in the GEMM's tile
  static constexpr int dot_rows(int rr) { return rr == 2 ? 2 : 4; }

  struct reg {
    float v[W];
  };

  static reg zero() { return reg{}; }
  static reg set1(float s) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = s;
    return r;
  }
  static void pin(reg&) {}
  static reg fma(reg a, reg b, reg c) {
    for (int i = 0; i < W; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static reg mul(reg a, reg b) {
    for (int i = 0; i < W; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static reg add(reg a, reg b) {
    for (int i = 0; i < W; ++i) a.v[i] += b.v[i];
    return a;
  }
  static reg keep(reg a, const uint8_t* bits) {
    for (int i = 0; i < W; ++i) a.v[i] = (*bits >> i) & 1 ? a.v[i] : 0.0f;
    return a;
  }
  template <class T>
  static reg load(const T* p) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class T>
  static reg load(const T* p, int n) {
    reg r{};
    for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class T>
  static void store(T* p, reg a) {
    for (int i = 0; i < W; ++i) from_float(a.v[i], p + i);
  }
  template <class T>
  static void store(T* p, reg a, int n) {
    for (int i = 0; i < n; ++i) from_float(a.v[i], p + i);
  }

  // out[j] = sum of the lanes of a[j], for n <= 4 vectors
  static void sums(const reg* a, int n, float* out) {
    for (int j = 0; j < n; ++j) {
      const float* v = a[j].v;
      out[j] = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    }
  }

  static void transpose(reg (&t)[W]) {
    for (int i = 0; i < W; ++i)
      for (int j = 0; j < i; ++j) {
        const float s = t[i].v[j];
        t[i].v[j] = t[j].v[i];
        t[j].v[i] = s;
      }
  }

  // The keep bits of columns 8 * group .. 8 * group + 63 of row m, 8 bytes
  static void keep64(uint64_t seed, uint32_t threshold, uint64_t m, uint32_t group, uint8_t* bits) {
    for (int i = 0; i < 8; ++i) bits[i] = philox_keep8(seed, m, group + i, threshold);
  }
};

}  // namespace
}  // namespace lk::cpu
