// The base product y [M, N] = x w^T of few rows of x: every element or code of w is read once, and meets the rows where
// it lies. A strip of w's rows at a time, for a team of threads that may do other things beside.
#pragma once

#include <memory>

#include "grid.h"
#include "quant.h"
#include "scratch.h"

namespace lk::cpu {

class FewRows {
 public:
  virtual ~FewRows() = default;
  virtual void take(Scratch& scratch, int threads) = 0;  // in both passes
  virtual void arrange() = 0;                            // by one thread, before any strip
  virtual i64 strips() const = 0;
  virtual void strip(i64 t) = 0;  // of y; by worker() of the team
};

std::unique_ptr<FewRows> few_rows(i64 M, i64 N, i64 K, Tile x, Tile w, Tile y);  // where gemm_few
std::unique_ptr<FewRows> few_rows(i64 M, const Quantized& w, Tile x, Tile y);    // where quantized_few

// All of it, by a team of its own.
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
