// A frozen weight [N, K] in 4 or 8 bits, in the layout of lora_kernels/quant/weight.py, and its products.
#pragma once

#include "integers.h"
#include "kernels.h"

namespace lk::cpu {

constexpr i64 kFp8Block = 128;  // the rows and columns of w that share a scale of fp8, where it is scaled by blocks

struct Quantized {
  Format format;
  i64 N, K;
  const uint8_t* codes;
  const float* levels;          // 4 bits: the values of the 16 codes
  const void* scales;           // fp32; with double quantisation uint8
  i64 scale_rows, scale_cols;   // fp8: [1, 1], [N, 1] or [N / 128, K / 128], rounded up
  i64 blocksize;                // 4 bits: the elements of row-major w that share a scale
  const float *table, *absmax;  // double quantisation: scale i is table[scales[i]] absmax[i / 256] + offset; else null
  float offset;
  Integers integers;  // the whole weight, where the format is `integers`

  bool turned() const { return format == Format::integers && integers.turned(); }
  bool four_bits() const { return format == Format::nf4 || format == Format::fp4; }
  i64 row_bytes() const { return four_bits() ? K / 2 : K; }
};

// out [rows, cols] = w[n0.., k0..], dequantised. For 4 bits k0 and cols are even.
void dequantize(int threads, const Quantized& w, i64 n0, i64 rows, i64 k0, i64 cols, Tile out);

// The number of floats that `decode` needs for rows of w.
i64 decode_room(const Quantized& w, i64 rows);

// out [rows, cols] = w[n0.., k0..] as floats, by the calling thread; k0 and cols are as in `dequantize`. `room` is
// memory for decode_room(w, rows) floats.
void decode(const Quantized& w, i64 n0, i64 rows, i64 k0, i64 cols, float* room, float* out);

// y = x w^T [M, N], or, transposed, y = x w [M, K]. x has a dtype of gemm_of, or, not transposed, at most kFewRows
// rows. The bias may be absent.
void quantized_gemm(int threads, i64 M, const Quantized& w, bool transposed, Tile x, Tile y, Tile bias);

}  // namespace lk::cpu
