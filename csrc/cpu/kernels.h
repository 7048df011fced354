// Tile kernels of one instruction set, and the table through which the drivers reach the one that was chosen.
//
// All sums are fp32. A tile of x (or dy, y, dx) is addressed in place by pointer and row stride; adapters come as
// "panels" P [R, cols] with the lanes running along the columns; `keep`, where not null, holds one bit per element
// (rows of ld_keep bytes, bit j of byte i: column 8 i + j) and zeroes what dropout drops.
#pragma once

#include <cstdint>

namespace lk::cpu {

using i64 = int64_t;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline i64 size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// A row-major operand whose last stride is 1.
struct Tile {
  void* data;
  i64 ld;  // row stride, in elements
  DType dtype;

  Tile at(i64 row, i64 col) const { return {static_cast<char*>(data) + (row * ld + col) * size_of(dtype), ld, dtype}; }
  explicit operator bool() const { return data != nullptr; }
};

struct Keep {
  const uint8_t* bits;
  i64 ld;  // bytes per row
};

enum class Format : int { nf4 = 0, fp4 = 1, int8 = 2, fp8 = 3 };

// What decoding leaves out of the scales.
constexpr float quant_factor(Format f) { return f == Format::fp8 ? 256.0f : f == Format::int8 ? 1.0f / 127.0f : 1.0f; }

constexpr i64 kQuantRows = 4;
constexpr i64 kQuantPad = 128;  // floats
constexpr i64 kNested = 256;    // scales that share one of double quantisation's

// Rows of a quantised weight; every `segment` columns have a scale, of int8 and fp8 without quant_factor.
struct QuantRows {
  Format format;
  const uint8_t* codes;
  i64 ldc;  // bytes
  const float* levels;
  const float* scales;
  i64 lds, segment, rows, K;

  QuantRows part(i64 first, i64 most) const {
    const i64 n = rows - first < most ? rows - first : most;
    return {format, codes + first * ldc, ldc, levels, scales + first * lds, lds, segment, n, K};
  }
};

// The three products of the low-rank half, and the formats of their operands. Buffers are of floats in every format.
struct LowRank {
  bool pairs;  // bf16 operands, two by two, for instructions that add two products at a time; else fp32

  // out[m, r] (+)= sum_k keep(x)[m, k] P[r, k]; P from dot_panel, its column k0 at P + dot_column(k0)
  void (*dot)(Tile x, Keep keep, const float* P, i64 ldp, i64 rows, i64 cols, i64 R, float* out, i64 ldo, bool add);

  // D[r, k] += sum_m G[m, r] keep(x)[m, k]; G from outer_rows
  void (*outer)(Tile x, Keep keep, const float* G, i64 ldg, i64 rows, i64 cols, i64 R, float* D, i64 ldd);

  // y[m, k] += keep(sum_r H[m, r] P[r, k]) + bias[k]; H from expand_rows, P from expand_panel; bias may be null
  void (*expand)(Tile y, Keep keep, const float* bias, const float* H, i64 ldh, const float* P, i64 ldp, i64 rows,
                 i64 cols, i64 R);

  // P [R, cols] of src [R, cols], or, _t, of src [cols, R]
  void (*dot_panel)(Tile src, i64 R, i64 cols, float* P, i64 ldp);
  void (*dot_panel_t)(Tile src, i64 cols, i64 R, float* P, i64 ldp);
  void (*expand_panel)(Tile src, i64 R, i64 cols, float* P, i64 ldp);
  void (*expand_panel_t)(Tile src, i64 cols, i64 R, float* P, i64 ldp);

  // factor * src [rows, R], with rows R floats apart, as G or H; may be done in place. Row m of either is at m R, for
  // even m
  void (*outer_rows)(Tile src, i64 rows, i64 R, float factor, float* G);
  void (*expand_rows)(Tile src, i64 rows, i64 R, float factor, float* H);

  i64 dot_column(i64 k0) const { return pairs ? k0 / 2 : k0; }
};

// 4-bit codes beside bf16 x, by instructions that add two products at a time: X holds bf16 in half as many floats, ldx
// a multiple of kQuantPad / 2.
struct QuantPairs {
  void (*dot)(const QuantRows& w, const float* X, i64 ldx, i64 M, float* out, i64 ldo);
  void (*arrange)(Tile x, i64 M, i64 K, float* X, i64 ldx);
};

// The GEMM of one format of operands: fp32, or bf16 two by two. T is what its operands consist of.
struct Gemm {
  i64 width;  // columns of a panel
  i64 pair;   // terms to a float of a panel: 1 or 2
  i64 depth;  // floats of a column of a panel, at most: what a pass over K adds up
  i64 group;  // columns of y whose panels stay in L2 together, at most

  // Panels of w, the n side: P[n / width][k / pair][n % width] = w[n, k] (and w[n, k + 1]), with zeroes to the end of
  // the last panel and of the last pair. w is T*, with any strides; a panel has `column` floats to a column.
  void (*pack)(const void* w, i64 stride_n, i64 stride_k, i64 cols, i64 depth, i64 column, float* P);

  // s = (add_sum ? sum : 0) + x P, for at most pair * this->depth terms; then y = (add_y ? y : 0) + s where y is given,
  // else sum = s
  void (*tile)(Tile x, const float* P, i64 rows, i64 cols, i64 depth, bool add_sum, float* sum, i64 lds, bool add_y,
               Tile y);

  // out[i, k] = w[i, k0 + k], dequantised, rows of `count` T; k0 even for 4 bits
  void (*decode)(const QuantRows& w, i64 k0, i64 count, void* out);

  i64 floats(i64 depth) const { return (depth + pair - 1) / pair; }
};

struct Kernels {
  const char* name;
  const LowRank* fp32;           // for any operands
  const LowRank* bf16;           // where x and the adapters are bf16; may be null
  const QuantPairs* quant_bf16;  // for 4 bits where x is bf16; may be null
  const Gemm* gemm_fp32;
  const Gemm* gemm_bf16;  // may be null

  const LowRank& low_rank(DType x, DType adapters) const {
    return bf16 && x == DType::bf16 && adapters == DType::bf16 ? *bf16 : *fp32;
  }

  const Gemm* gemm(DType x) const { return x == DType::f32 ? gemm_fp32 : x == DType::bf16 ? gemm_bf16 : nullptr; }

  // bits of rows m0.. and columns k0.. (k0 a multiple of 64); writes ceil(cols / 64) * 8 bytes a row
  void (*keep_bits)(uint64_t seed, uint32_t threshold, i64 m0, i64 k0, i64 rows, i64 cols, uint8_t* bits, i64 ld);

  // out[i, m] = sum_k w[i, k] x[m, k] / quant_factor for at most kQuantRows rows; X from rows of x by quant_x, in
  // place, ldx a multiple of kQuantPad
  void (*quant_dot)(const QuantRows& w, const float* X, i64 ldx, i64 M, float* out, i64 ldo);
  void (*quant_x)(Format format, float* X, i64 ldx, i64 M, i64 K);

  // out[i] = table[codes[first + i]] absmax[(first + i) / 256] + offset
  void (*quant_scales)(const uint8_t* codes, i64 first, i64 count, const float* table, const float* absmax,
                       float offset, float* out);

  // out[i, j] = factor * src[i, j]; to fp32 and from fp32
  void (*read)(Tile src, i64 rows, i64 cols, float factor, float* out, i64 ldo);
  void (*write)(const float* src, i64 lds, i64 rows, i64 cols, float factor, Tile out);

  // out[j, i] = factor * src[i, j] with src [rows, cols]
  void (*write_t)(const float* src, i64 lds, i64 rows, i64 cols, float factor, Tile out);
};

// One per file compiled with that instruction set's flags.
const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const LowRank& low_rank_avx512_bf16();
const QuantPairs& quant_avx512_bf16();
const Gemm& gemm_avx512_bf16();

}  // namespace lk::cpu
