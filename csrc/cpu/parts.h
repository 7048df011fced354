// How a backward cuts its sums over rows and columns into parts, and adds the parts up. The cut depends on the shape
// alone.
#pragma once

#include <algorithm>
#include <cstring>

#include "grid.h"

namespace lk::cpu {

constexpr i64 kTileRows = 64;   // rows of dy or x that are used twice while they are in L2
constexpr i64 kFusedRank = 64;  // the largest rank of one pass: beyond, partial sums would grow to the size of dy
constexpr i64 kReduce = 256;    // columns of db or da per task that sums their parts

// The tasks of a pass that gives both g and db (or dx and da). A task has whole rows where M gives enough slabs of
// them, which suits pages and prefetchers; else the columns are cut too. Partial sums of db and da take S x R x cols
// floats, those of g take C x M x R.
inline Grid fused_grid(i64 M, i64 cols, i64 R) {
  if (R > kFusedRank) return make_grid(M, cols, M, 128);
  const i64 slabs = std::clamp<i64>(M / std::max(kTileRows, 8 * R), 1, 8);
  const i64 chunk = std::clamp<i64>(round_up(ceil_div(cols * slabs, 8), 64), 128, 4096);
  return make_grid(M, cols, round_up(ceil_div(M, slabs), kTileRows), chunk);
}

// out[i] = sum of the i-th numbers of all parts, in the order of the parts
inline void sum_parts(float* out, i64 n, const float* part, i64 stride, i64 parts) {
  if (out != part) std::memcpy(out, part, n * sizeof(float));
  for (i64 q = 1; q < parts; ++q)
    for (i64 i = 0; i < n; ++i) out[i] += part[q * stride + i];
}

inline void clear(Sums D, i64 rows, i64 cols) {
  for (i64 r = 0; r < rows; ++r) std::memset(D.row(r), 0, cols * sizeof(float));
}

}  // namespace lk::cpu
