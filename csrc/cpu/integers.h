// A frozen weight in integers of 4 or 8 bits, w = (code - zero) * scale, in the layouts of
// lora_kernels/quant/integers.py.
#pragma once

#include "kernels.h"

namespace lk::cpu {

// The codes lie by rows of w: int8 [N, K]; uint8 [N, K]; uint8 [N/2, K], whose high nibbles are the first half of the
// rows and whose low ones the second. Or by columns: int32 [K/8, N] or [K/4, N], each word with elements of one row of
// w; int32 [K, N/8], each word with elements of one column, in AWQ's order.
enum class IntLayout : int { signed_rows = 0, rows = 1, halves = 2, gptq4 = 3, gptq8 = 4, awq4 = 5 };

struct Integers {
  IntLayout layout;
  i64 N, K;
  const void* codes;
  // By rows of w: a scale for each `group` consecutive elements of row-major w. By columns: scales [groups, N], and
  // group k / group, or order[k], is that of column k. Zeros are there as many, or packed as int32 [groups, N/8] or
  // [groups, N/4] beside codes by columns.
  i64 group;
  Tile scales;
  const void* zeros;     // may be null
  int zero_type;         // DType, or one of the next two
  const int32_t* order;  // may be null

  static constexpr int kInt8 = 3, kPacked = 4;

  bool turned() const { return layout >= IntLayout::gptq4; }
  // the floats that `decode_stored` needs for each column, and `decode` for each row, of a `room`
  i64 groups_in(i64 columns) const { return columns / group + 2; }
};

// out[i, j] = element (first + i, at + j) of the matrix as it is stored: w, or w^T where it is turned, as floats.
// `room` is memory for scale_room(w, cols) floats.
void decode_stored(const Integers& w, i64 first, i64 rows, i64 at, i64 cols, float* room, float* out);

inline i64 scale_room(const Integers& w, i64 cols) { return w.turned() ? 2 * (cols + 8) : 2 * w.groups_in(cols); }

constexpr i64 kTurnedColumns = 32;  // columns of w that are decoded together before they are turned

// out[n, k] = w[n0 + n, k0 + k], for a w that is turned, in out's dtype. `room` is memory for turned_room(rows) floats.
void decode_turned(const Integers& w, i64 n0, i64 rows, i64 k0, i64 cols, float* room, Tile out);

inline i64 turned_room(i64 rows) { return (rows + 16) * (kTurnedColumns + 2); }

}  // namespace lk::cpu
