// The base products of few rows: y [M, N] = x w^T of a forward, and dx [M, K] = dy w of a backward. w is read where it
// lies. Only the backward over a 16-bit w first converts a strip of it to fp32. The work is cut into strips of y or dx,
// which a team of threads takes one by one, so that a launch can have other work beside them.
#pragma once

#include <memory>

#include "grid.h"
#include "isa.h"
#include "quant.h"
#include "scratch.h"

namespace lk::cpu {

constexpr i64 kFewRows = 16;  // rows of x or dy up to which these products are used

class FewRows {
 public:
  virtual ~FewRows() = default;
  virtual void take(Scratch& scratch, int threads) = 0;  // is called in both passes of Scratch
  virtual void arrange() = 0;                            // prepares the rows: one thread calls it before any strip
  virtual i64 strips() const = 0;
  // Computes columns of the result: any thread of the team calls it. The bias [N] of y may be null; a dx has none.
  virtual void strip(i64 t, const float* bias) = 0;
};

// part[i, m] += bias[i] / factor, where `factor` multiplies the part when it is written
inline void add_bias(Sums part, i64 rows, i64 M, const float* bias, float factor) {
  for (i64 i = 0; bias && i < rows; ++i)
    for (i64 m = 0; m < M; ++m) part.row(i)[m] += bias[i] / factor;
}

std::unique_ptr<FewRows> few_rows(i64 M, i64 N, i64 K, Tile x, Tile w, Tile y);
std::unique_ptr<FewRows> few_rows(i64 M, const Quantized& w, Tile x, Tile y);
std::unique_ptr<FewRows> few_rows_turned(i64 M, const Integers& w, Tile x, Tile y);

// Whether x w^T and dy w are faster within the launch of the low-rank half than as calls of any GEMM. They are not
// without vector instructions, for a w outside of L2, or for many elements of y of which each is a short sum.
bool is_small(i64 M, i64 N, i64 K);

// dx = dy w, or dx += dy w, where is_small
std::unique_ptr<FewRows> few_rows_back(i64 M, i64 N, i64 K, Tile dy, Tile w, Tile dx, bool add);

// Compute the whole product with a team of its own. The bias [N] may be absent.
inline void run(int threads, FewRows& few, i64 N = 0, Tile bias = {}) {
  const bool convert = bias && bias.dtype != DType::f32;
  const float* added = convert ? nullptr : static_cast<const float*>(bias.data);
  Scratch scratch;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    few.take(scratch, threads);
    if (float* const bias32 = scratch.floats(convert ? N : 0); convert && pass) {
      kernels().read(bias, 1, N, 1.0f, {bias32, N});
      added = bias32;
    }
  }
  few.arrange();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (i64 t = 0; t < few.strips(); ++t) few.strip(t, added);
}

}  // namespace lk::cpu
