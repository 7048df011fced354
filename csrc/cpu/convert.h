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

// out[j, i] = factor * src[i, j] for a block of at most W x W elements. A full block stays in registers.
template <bool FULL, class From, class To>
LK_INLINE void transpose_block(Rows<const From> src, int rows, int cols, reg factor, Rows<To> out) {
  reg t[W];
  LK_UNROLL for (int i = 0; i < W; ++i) {
    if (FULL)
      t[i] = V::load(src.row(i));
    else
      t[i] = i < rows ? V::load(src.row(i), cols) : V::zero();
  }
  V::transpose(t);
  LK_UNROLL for (int j = 0; j < W; ++j) {
    if (FULL)
      V::store(out.row(j), V::mul(t[j], factor));
    else if (j < cols)
      V::store(out.row(j), V::mul(t[j], factor), rows);
  }
}

template <class From, class To>
LK_INLINE void transpose_at(Rows<const From> src, i64 i, i64 j, i64 rows, i64 cols, reg factor, Rows<To> out) {
  const int n = rows - i < W ? static_cast<int>(rows - i) : W, m = cols - j < W ? static_cast<int>(cols - j) : W;
  if (n == W && m == W)
    transpose_block<true>(src.at(i, j), n, m, factor, out.at(j, i));
  else
    transpose_block<false>(src.at(i, j), n, m, factor, out.at(j, i));
}

// Rows of src are read from their beginning to their end, as prefetchers expect. `out` is in a cache.
template <class T>
void read_t(Tile src, i64 rows, i64 cols, float factor, Sums out) {
  const reg f = V::set1(factor);
  for (i64 i = 0; i < rows; i += W)
    for (i64 j = 0; j < cols; j += W) transpose_at(rows_of<const T>(src), i, j, rows, cols, f, out);
}

// Rows of out are written from their beginning to their end. `src` is in a cache.
template <class T>
void write_t(Panel src, i64 rows, i64 cols, float factor, Tile out) {
  const reg f = V::set1(factor);
  for (i64 j = 0; j < cols; j += W)
    for (i64 i = 0; i < rows; i += W) transpose_at(src, i, j, rows, cols, f, rows_of<T>(out));
}

}  // namespace
}  // namespace lk::cpu
