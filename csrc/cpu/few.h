// The base product y [M, N] = x w^T for few rows of x. w is not copied to panels: each element or code of it is read
// once, and is multiplied by all rows of x. The work is cut into strips of rows of w, which a team of threads takes one
// by one, so that a launch can have other work beside them.
#pragma once

#include <memory>

#include "grid.h"
#include "quant.h"
#include "scratch.h"

namespace lk::cpu {

constexpr i64 kFewRows = 16;  // rows of x up to which this product is used

class FewRows {
 public:
  virtual ~FewRows() = default;
  virtual void take(Scratch& scratch, int threads) = 0;  // is called in both passes of Scratch
  virtual void arrange() = 0;                            // prepares x: one thread calls it before any strip
  virtual i64 strips() const = 0;
  virtual void strip(i64 t) = 0;  // computes columns of y: any thread of the team calls it
};

std::unique_ptr<FewRows> few_rows(i64 M, i64 N, i64 K, Tile x, Tile w, Tile y);
std::unique_ptr<FewRows> few_rows(i64 M, const Quantized& w, Tile x, Tile y);

// Compute the whole product with a team of its own.
inline void run(int threads, FewRows& few) {
  Scratch scratch;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    few.take(scratch, threads);
  }
  few.arrange();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (i64 t = 0; t < few.strips(); ++t) few.strip(t);
}

}  // namespace lk::cpu
