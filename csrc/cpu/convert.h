// Conversion to fp32 and from fp32, plain and transposed. Compiled by kernels.cpp, once per instruction set.
#pragma once

#include "tile.h"

namespace lk::cpu {
namespace {

template <class T>
void read(Tile src, i64 rows, i64 cols, float factor, float* out, i64 ldo) {
  const reg f = V::set1(factor);
  for (i64 i = 0; i < rows; ++i) {
    const T* s = row<T>(src, i);
    float* o = out + i * ldo;
    i64 j = 0;
    for (; j + W <= cols; j += W) V::store(o + j, V::mul(V::load(s + j), f));
    if (const int n = static_cast<int>(cols - j)) V::store(o + j, V::mul(V::load(s + j, n), f), n);
  }
}

template <class T>
void write(const float* src, i64 lds, i64 rows, i64 cols, float factor, Tile out) {
  const reg f = V::set1(factor);
  for (i64 i = 0; i < rows; ++i) {
    const float* s = src + i * lds;
    T* o = row<T>(out, i);
    i64 j = 0;
    for (; j + W <= cols; j += W) V::store(o + j, V::mul(V::load(s + j), f));
    if (const int n = static_cast<int>(cols - j)) V::store(o + j, V::mul(V::load(s + j, n), f), n);
  }
}

// Through a block that lies in L1: whole vectors on the side that is long, single elements on the other.
constexpr i64 kBlock = 16;

template <class T>
void read_t(Tile src, i64 rows, i64 cols, float factor, float* out, i64 ldo) {
  for (i64 i = 0; i < rows; i += kBlock) {
    const i64 ni = rows - i < kBlock ? rows - i : kBlock;
    for (i64 j = 0; j < cols; ++j)
      for (i64 ii = 0; ii < ni; ++ii) out[j * ldo + i + ii] = to_float(row<T>(src, i + ii)[j]) * factor;
  }
}

template <class T>
void write_t(const float* src, i64 lds, i64 rows, i64 cols, float factor, Tile out) {
  for (i64 j = 0; j < cols; j += kBlock) {
    const i64 nj = cols - j < kBlock ? cols - j : kBlock;
    for (i64 jj = 0; jj < nj; ++jj) {
      T* o = row<T>(out, j + jj);
      for (i64 i = 0; i < rows; ++i) from_float(src[i * lds + j + jj] * factor, o + i);
    }
  }
}

}  // namespace
}  // namespace lk::cpu
