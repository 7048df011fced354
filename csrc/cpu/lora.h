// A LoRA layer on a CPU: its base GEMM, and its low-rank half. The low-rank half adds to a base product that y or dx
// holds already, or first computes a base product of few rows (`Branch::base`).
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "few.h"
#include "many.h"

namespace lk::cpu {

// T = min(round(65536 p), 65535), half to even as Python rounds. A 16-bit lane below it drops its element.
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::min(std::nearbyint(p * 65536.0), 65535.0));
}

struct Dropout {
  uint32_t threshold = 0;  // 0: no dropout
  uint64_t seed = 0;

  // c = 65536 / (65536 - T), the inverse of the exact probability of being kept
  float rescale() const { return 65536.0f / static_cast<float>(65536 - static_cast<int>(threshold)); }
};

// The operands of one of the layers that read the same x [M, K]. A tile without data stands for an operand that is not
// there: it is neither read nor computed.
struct Branch {
  i64 N, R;
  float scale;
  Dropout dropout;
  Tile a, b;        // [R, K], [N, R]
  Tile bias, y;     // [N], [M, N]; of a forward
  Tile dy, da, db;  // [M, N], [R, K], [N, R]; of a backward
  Tile h;           // [M, R]

  // Writes x w^T to y at the start of a forward, or dy w to dx at the start of a backward; null where they hold it.
  std::unique_ptr<FewRows> base;

  // The same for many rows. What the low-rank half adds to the result follows part by part. A bias of y in fp32 is
  // added there too, and one in 16 bits belongs to this product.
  std::unique_ptr<ManyRows> many;
};

// For each branch, in one pass over x for all of them:
// h = c keep(x) a^T   [M, R]; it may be absent, and is then not written
// y += s h b^T + bias [M, N]; a branch with a base has y = x w^T + bias, rounded once, before s h b^T is added
void forward(int threads, i64 M, i64 K, Tile x, const std::vector<Branch>& branches);

// For each branch, in one pass over x and dx for all of them:
// g = s dy b          [M, R], which stays inside
// db = s dy^T h       [N, R]
// dx += c keep(g a)   [M, K]; a branch with a base has dx = dy w, or dx += dy w, before that
// da = c g^T keep(x)  [R, K]
void backward(int threads, i64 M, i64 K, Tile x, Tile dx, const std::vector<Branch>& branches);

// The base GEMM: y = x w^T [M, N], or y += x w^T, or y = x w^T + bias for a y in 16 bits. w(n, k) lies at n w.ld + k
// stride_wk. x has a dtype of gemm_of, or, without add, at most kFewRows rows beside a w with stride_wk 1.
void gemm(int threads, i64 M, i64 N, i64 K, Tile x, Tile w, i64 stride_wk, Tile y, bool add, Tile bias);

// One of the products of gemm_each: y = x w^T for M rows, or y = x w^T + bias for a y in 16 bits.
struct Product {
  i64 M;
  Tile x, w, y, bias;
};

// The products of several w [N, K] of the same strides. A large one is computed by all threads together, and a small
// one by one of them. Each has the bits that `gemm` gives it alone.
void gemm_each(int threads, i64 N, i64 K, i64 stride_wk, const std::vector<Product>& products);

// Whether the GEMM takes any number of rows of this dtype: fp32, and bf16 where the processor multiplies it.
bool gemm_of(DType dtype);

// out [M, K] = 1 where dropout keeps an element of x [M, K], else 0
void keep_mask(int threads, Dropout dropout, i64 M, i64 K, Tile out);

// n [N] = ||w + scale b a|| by rows, for w [N, K], a [R, K] and b [N, R] of any dtypes; see row_norm.cpp. Where
// rounding leaves less than eps ||w||^2 of n^2, n is the root of that, with the eps of fp32.
void row_norm(int threads, i64 N, i64 K, i64 R, Tile w, Tile a, Tile b, float scale, float* n);
void row_norm(int threads, const Quantized& w, i64 R, Tile a, Tile b, float scale, float* n);

// square [D] = ||w||^2 by columns, low [R, D] = a w and gram [R, R] = a a^T in fp32, for w [V, D] and a^T [V, R] of any
// dtypes; see column_norm.cpp. Where `turned`, a_t holds a [R, V].
void column_sums(int threads, i64 V, i64 D, i64 R, Tile w, Tile a_t, bool turned, float* square, Tile low, Tile gram);

}  // namespace lk::cpu
