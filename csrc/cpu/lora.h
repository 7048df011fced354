// The layer on a CPU: the base GEMM, and the low-rank half beside a base that is already in y or dx.
#pragma once

#include <vector>

#include "kernels.h"

namespace lk::cpu {

struct Dropout {
  uint32_t threshold = 0;  // 0: none
  uint64_t seed = 0;

  float rescale() const { return 65536.0f / static_cast<float>(65536 - static_cast<int>(threshold)); }
};

// One of the adapters that read the same x [M, K]: a [R, K], b [N, R], and what belongs to it alone. The driver's
// caller says what is there; a tile without data is absent.
struct Branch {
  i64 N, R;
  float scale;
  Dropout dropout;
  Tile a, b;
  Tile bias, y;     // forward: [N], [M, N]
  Tile dy, da, db;  // backward: [M, N], [R, K], [N, R]
  Tile h;           // [M, R]
};

// For each branch, in one pass over x for all:
// h = c keep(x) a^T   [M, R], where x is given (else h is read)
// y += s h b^T + bias [M, N], where y is given; bias may be absent
// h may be absent when x and y are both there.
void forward(int threads, i64 M, i64 K, Tile x, const std::vector<Branch>& branches);

// For each branch, in one pass over x and dx for all:
// g = s dy b          [M, R], kept inside
// db = s dy^T h       [N, R], where db is given
// dx += c keep(g a)   [M, K], where dx is given
// da = c g^T keep(x)  [R, K], where da is given
void backward(int threads, i64 M, i64 K, Tile x, Tile dx, const std::vector<Branch>& branches);

// y = x w^T             [M, N], the base GEMM, or y += x w^T; w(n, k) lies at n w.ld + k stride_wk; dtypes of
// gemm_of, or, without add, any dtype where gemm_few(M, stride_wk)
void gemm(int threads, i64 M, i64 N, i64 K, Tile x, Tile w, i64 stride_wk, Tile y, bool add);
bool gemm_few(i64 M, i64 stride_wk);
bool gemm_of(DType dtype);  // fp32, and bf16 where the processor multiplies it

}  // namespace lk::cpu
