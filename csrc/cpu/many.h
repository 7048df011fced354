// The base products of many rows: y [M, N] = x w^T of a forward, and dx [M, K] = dy w of a backward. The work is cut
// into tasks, which a team of threads takes one by one, so that a launch can add the low-rank half to each part of a
// result while that is in a cache.
#pragma once

#include <functional>
#include <memory>

#include "quant.h"
#include "scratch.h"

namespace lk::cpu {

constexpr i64 kTailRows = 24;  // rows of a part: with the columns of a task they fit in L1, or nearly so

// Is called for rows m0.. and columns n0.. of a result when they are complete. m0 is even. It may be empty.
using Tail = std::function<void(i64 m0, i64 rows, i64 n0, i64 cols)>;

class ManyRows {
 public:
  virtual ~ManyRows() = default;
  virtual void take(Scratch& scratch, int threads) = 0;  // is called in both passes of Scratch; cuts the tasks
  virtual i64 tasks() const = 0;
  virtual i64 width() const = 0;  // the most columns of a part
  virtual void task(i64 t, const Tail& tail) = 0;
};

// y = x w^T, or y += x w^T, or y = x w^T + bias for a y in 16 bits. w(n, k) lies at n w.ld + k stride_wk. x has a dtype
// of gemm_of. The bias may be absent.
std::unique_ptr<ManyRows> many_rows(i64 M, i64 N, i64 K, Tile x, Tile w, i64 stride_wk, Tile y, bool add, Tile bias);

// The same for a quantised w, or, transposed, y = x w [M, K].
std::unique_ptr<ManyRows> many_rows(i64 M, const Quantized& w, bool transposed, Tile x, Tile y, bool add, Tile bias);

// Compute the whole product with a team of its own.
void run(int threads, ManyRows& many);

}  // namespace lk::cpu
