// The layer on a CPU: the base GEMM, and the low-rank half beside a base that is already in y or dx.
#pragma once

#include "kernels.h"

namespace lk::cpu {

struct Dropout {
  uint32_t threshold = 0;  // 0: none
  uint64_t seed = 0;

  float rescale() const { return 65536.0f / static_cast<float>(65536 - static_cast<int>(threshold)); }
};

struct Problem {
  i64 M, N, K, R;
  float scale;
  Dropout dropout;
  int threads;
};

// h = c keep(x) a^T   [M, R], where x is given (else h is read)
// y += s h b^T + bias [M, N], where y is given; bias [N] may be absent
// x [M, K] · a [R, K] · b [N, R]; h may be absent when x and y are both there.
void forward(const Problem& p, Tile x, Tile a, Tile b, Tile bias, Tile y, Tile h);

// g = s dy b          [M, R], kept inside
// db = s dy^T h       [N, R], where db is given
// dx += c keep(g a)   [M, K], where dx is given
// da = c g^T keep(x)  [R, K], where da is given
void backward(const Problem& p, Tile dy, Tile x, Tile a, Tile b, Tile h, Tile dx, Tile da, Tile db);

// y = x w^T             [M, N], the base GEMM; w(n, k) lies at n w.ld + k stride_wk; fp32, or any dtype where
// gemm_few(M, stride_wk)
void gemm(int threads, i64 M, i64 N, i64 K, Tile x, Tile w, i64 stride_wk, Tile y);
bool gemm_few(i64 M, i64 stride_wk);

}  // namespace lk::cpu
