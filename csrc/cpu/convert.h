// Conversion to fp32 and from fp32, plain and transposed. kernels.cpp compiles this file once per instruction set.
#pragma once

#include "tile.h"

namespace lk::cpu {
namespace {

template <class T>
void read(Tile src, i64 rows, i64 cols, float factor, Sums out) {
  const reg f = V::set1(factor);
  for (i64 i = 0; i < rows; ++i) {
    const T* s = row<T>(src, i);
    float* o = out.row(i);
    i64 j = 0;
    for (; j + W <= cols; j += W) V::store(o + j, V::mul(V::load(s + j), f));
    if (const int n = static_cast<int>(cols - j)) V::store(o + j, V::mul(V::load(s + j, n), f), n);
  }
}

template <class T>
void write(Panel src, i64 rows, i64 cols, float factor, Tile out) {
  const reg f = V::set1(factor);
  for (i64 i = 0; i < rows; ++i) {
    const float* s = src.row(i);
    T* o = row<T>(out, i);
    i64 j = 0;
    for (; j + W <= cols; j += W) V::store(o + j, V::mul(V::load(s + j), f));
    if (const int n = static_cast<int>(cols - j)) V::store(o + j, V::mul(V::load(s + j, n), f), n);
  }
}

// The transposed conversions go through blocks of this size, which stay in L1.
constexpr i64 kBlock = 16;

template <class T>
void read_t(Tile src, i64 rows, i64 cols, float factor, Sums out) {
  for (i64 i = 0; i < rows; i += kBlock) {
    const i64 ni = rows - i < kBlock ? rows - i : kBlock;
    for (i64 j = 0; j < cols; ++j)
      for (i64 ii = 0; ii < ni; ++ii) out.row(j)[i + ii] = to_float(row<T>(src, i + ii)[j]) * factor;
  }
}

template <class T>
void write_t(Panel src, i64 rows, i64 cols, float factor, Tile out) {
  for (i64 j = 0; j < cols; j += kBlock) {
    const i64 nj = cols - j < kBlock ? cols - j : kBlock;
    for (i64 jj = 0; jj < nj; ++jj) {
      T* o = row<T>(out, j + jj);
      for (i64 i = 0; i < rows; ++i) from_float(src.row(i)[j + jj] * factor, o + i);
    }
  }
}

}  // namespace
}  // namespace lk::cpu
