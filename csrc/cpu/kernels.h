// The tile kernels of one instruction set, and the table through which the drivers call those of the set in use.
//
// All sums are fp32. A tile of x, dy, y or dx is addressed in place. A and B come as panels P [R, cols] of floats, with
// the lanes of a register along the columns. keep(x) is x with zeros where dropout drops an element.
#pragma once

#include <cstdint>

// For functions with external linkage that files of several instruction sets include: an instance that is always
// inlined cannot be merged by the linker, which might otherwise put AVX-512 code into the baseline.
#define LK_INLINE inline __attribute__((always_inline))

namespace lk::cpu {

using i64 = int64_t;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

LK_INLINE i64 size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// A row-major operand whose last stride is 1.
struct Tile {
  void* data;
  i64 ld;  // row stride, in elements
  DType dtype;

  LK_INLINE Tile at(i64 row, i64 col) const {
    return {static_cast<char*>(data) + (row * ld + col) * size_of(dtype), ld, dtype};
  }
  LK_INLINE explicit operator bool() const { return data != nullptr; }
};

// Row-major elements of a known type whose last stride is 1.
template <class T>
struct Rows {
  T* data;
  i64 ld;  // row stride, in elements

  LK_INLINE T* row(i64 m) const { return data + m * ld; }
  LK_INLINE Rows at(i64 row, i64 col) const { return {data + row * ld + col, ld}; }
  LK_INLINE operator Rows<const T>() const { return {data, ld}; }
};

using Panel = Rows<const float>;  // floats that a kernel reads
using Sums = Rows<float>;         // floats that a kernel writes

// The dropout mask of a tile, one bit per element: bit j of byte i of a row belongs to column 8 i + j. Without `bits`
// every element is kept.
struct Keep {
  const uint8_t* bits;
  i64 ld;  // bytes per row

  LK_INLINE const uint8_t* row(i64 m) const { return bits + m * ld; }
  LK_INLINE Keep at(i64 row, i64 col) const { return {bits + row * ld + col / 8, ld}; }  // col: a multiple of 8
};

constexpr Keep kKeepAll{nullptr, 0};

// The sizes of a product of a tile [rows, cols] with a panel [R, cols] or [R, rows].
struct Extent {
  i64 rows, cols, R;
};

enum class Format : int { nf4 = 0, fp4 = 1, int8 = 2, fp8 = 3, integers = 4 };

// The factor that decoding applies beside the scales.
constexpr float quant_factor(Format f) { return f == Format::fp8 ? 256.0f : f == Format::int8 ? 1.0f / 127.0f : 1.0f; }

constexpr i64 kQuantRows = 4;   // rows of codes that quant_dot takes at a time
constexpr i64 kQuantPad = 128;  // rows of X are padded to a multiple of this many floats
constexpr i64 kNested = 256;    // the number of scales that share one absmax in double quantisation

// Rows of a quantised weight. Every `segment` columns have a scale, which for int8 and fp8 lacks quant_factor. Integers
// are int8 here, with scales that lack nothing.
struct QuantRows {
  Format format;
  const uint8_t* codes;
  i64 ldc;  // bytes per row
  const float* levels;
  const float* scales;
  i64 lds, segment, rows, K;

  LK_INLINE QuantRows part(i64 first, i64 most) const {
    const i64 n = rows - first < most ? rows - first : most;
    return {format, codes + first * ldc, ldc, levels, scales + first * lds, lds, segment, n, K};
  }
};

// How the codes of a run of consecutive elements of a weight in integers lie in memory. `high` and `low` are the
// nibbles of bytes. `word` is one code of each of consecutive int32, at a shift. `spread4` and `spread8` are all codes
// of consecutive int32, the first in the lowest bits, and `spread_awq` those of 4 bits in AWQ's order.
enum class IntCode : int { i8, u8, high, low, word4, word8, spread4, spread8, spread_awq };

// Consecutive elements (code - zero) * scale of a weight in integers. Both results are rounded to `rounded`.
struct IntRun {
  IntCode code;
  const void* codes;
  int shift;  // of word4 and word8
  i64 count;
  const float *scales, *zeros;  // without scales the codes themselves are the result; zeros may be null
  i64 head, segment;            // the elements that share the first scale, and each next; 0: every element has its own
  DType rounded;
};

// The three products of the low-rank half, and the packing of their operands. A packed operand lies in a buffer of
// floats, also where it consists of pairs of bf16.
struct LowRank {
  bool pairs;  // true: operands are packed as pairs of bf16, for instructions that add two products at a time

  // out[m, r] (+)= sum_k keep(x)[m, k] P[r, k]. P comes from dot_panel; its column k0 begins at P + dot_column(k0).
  void (*dot)(Tile x, Keep keep, Panel P, Extent e, Sums out, bool add);

  // D[r, k] += sum_m G[m, r] keep(x)[m, k]. G comes from outer_rows.
  void (*outer)(Tile x, Keep keep, Panel G, Extent e, Sums D);

  // y[m, k] += keep(sum_r H[m, r] P[r, k]) + bias[k]. H comes from expand_rows, P from expand_panel; bias may be null.
  void (*expand)(Tile y, Keep keep, const float* bias, Panel H, Panel P, Extent e);

  // P [R, cols] from src [R, cols], or, in the functions with _t, from src [cols, R]
  void (*dot_panel)(Tile src, i64 R, i64 cols, Sums P);
  void (*dot_panel_t)(Tile src, i64 cols, i64 R, Sums P);
  void (*expand_panel)(Tile src, i64 R, i64 cols, Sums P);
  void (*expand_panel_t)(Tile src, i64 cols, i64 R, Sums P);

  // factor * src [rows, R] as G or H, whose rows are R floats apart; src and the result may be the same memory. A part
  // that begins at an even row m begins at G + m R or H + m R.
  void (*outer_rows)(Tile src, i64 rows, i64 R, float factor, float* G);
  void (*expand_rows)(Tile src, i64 rows, i64 R, float factor, float* H);

  i64 dot_column(i64 k0) const { return pairs ? k0 / 2 : k0; }
};

// Products of 4-bit codes and bf16 x, by instructions that add two products at a time. X holds bf16 in half as many
// floats; X.ld is a multiple of kQuantPad / 2.
struct QuantPairs {
  void (*dot)(const QuantRows& w, Panel X, i64 M, Sums out);
  void (*arrange)(Tile x, i64 M, i64 K, Sums X);
};

// A matrix with any strides: element (n, k) is at data[n stride_n + k stride_k].
struct Strided {
  const void* data;
  i64 stride_n, stride_k;
};

// Where a tile of the GEMM goes: s = (add_sum ? sum : 0) + x P; then y = addend + s where y is given, else sum = s.
struct GemmOut {
  bool add_sum;
  Sums sum;
  Tile addend;  // of y's dtype: y itself, or a bias, whose row stride is 0; without data it counts as 0
  Tile y;
};

// The GEMM of operands of one type: fp32, or pairs of bf16. T below is the type of an element.
struct Gemm {
  i64 width;  // columns of a panel
  i64 pair;   // terms of the sum in a float of a panel: 1 (fp32) or 2 (bf16)
  i64 depth;  // the most floats in a column of a panel; one pass over K adds up that many
  i64 group;  // the most columns of y whose panels stay in L2 together

  // Panels of w, the n side: P[n / width][k / pair][n % width] = w[n, k] (and w[n, k + 1]). Zeros fill the last panel
  // and the last pair. Elements of w are T; a panel has `column` floats to a column.
  void (*pack)(Strided w, i64 cols, i64 depth, i64 column, float* P);

  // The tile x [rows, depth] P, for at most pair * this->depth terms. x has elements T.
  void (*tile)(Tile x, const float* P, i64 rows, i64 cols, i64 depth, GemmOut out);

  // out[i, k] = w[i, k0 + k], dequantised, as rows of `count` T. For 4 bits k0 is even.
  void (*decode)(const QuantRows& w, i64 k0, i64 count, void* out);

  i64 floats(i64 depth) const { return (depth + pair - 1) / pair; }
};

struct Kernels {
  const char* name;
  const LowRank* fp32;           // for any operands
  const LowRank* bf16;           // for bf16 x, a and b; may be null
  const QuantPairs* quant_bf16;  // for 4 bits and bf16 x; may be null
  const Gemm* gemm_fp32;
  const Gemm* gemm_bf16;  // may be null

  const LowRank& low_rank(DType x, DType adapters) const {
    return bf16 && x == DType::bf16 && adapters == DType::bf16 ? *bf16 : *fp32;
  }

  const Gemm* gemm(DType x) const { return x == DType::f32 ? gemm_fp32 : x == DType::bf16 ? gemm_bf16 : nullptr; }

  // The keep bits of rows m0.. and columns k0.. (k0 is a multiple of 64). It writes ceil(cols / 64) * 8 bytes a row.
  void (*keep_bits)(uint64_t seed, uint32_t threshold, i64 m0, i64 k0, i64 rows, i64 cols, uint8_t* bits, i64 ld);

  // out[i, m] = sum_k w[i, k] x[m, k] / quant_factor, for at most kQuantRows rows i. X holds the rows of x after
  // quant_x has arranged them in place; X.ld is a multiple of kQuantPad.
  void (*quant_dot)(const QuantRows& w, Panel X, i64 M, Sums out);
  void (*quant_x)(Format format, Sums X, i64 M, i64 K);

  // out[i] = table[codes[first + i]] absmax[(first + i) / 256] + offset
  void (*quant_scales)(const uint8_t* codes, i64 first, i64 count, const float* table, const float* absmax,
                       float offset, float* out);

  void (*integers)(const IntRun& run, float* out);

  // out[i, j] = factor * src[i, j], to fp32 and from fp32
  void (*read)(Tile src, i64 rows, i64 cols, float factor, Sums out);
  void (*write)(Panel src, i64 rows, i64 cols, float factor, Tile out);

  // out[j, i] = factor * src[i, j] with src [rows, cols]
  void (*write_t)(Panel src, i64 rows, i64 cols, float factor, Tile out);

  // out[j] += sum_i x[i, j]^2
  void (*add_squares)(Tile x, i64 rows, i64 cols, float* out);
};

// Each of these is defined in a file compiled with the flags of its instruction set.
const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const LowRank& low_rank_avx512_bf16();
const QuantPairs& quant_avx512_bf16();
const Gemm& gemm_avx512_bf16();

}  // namespace lk::cpu
