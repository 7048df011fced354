// Many adapters over the rows of one x: each row of x has an adapter of its own, or none. An adapter reads and writes
// its own rows only, in their order, so nothing that it computes depends on the other adapters of the call.
#pragma once

#include <cstring>
#include <vector>

#include "lora.h"

namespace lk::cpu {

// An adapter, and its rows. A tile without data is neither read nor computed.
struct Owned {
  const int32_t* rows;  // row m of the adapter is row rows[m] of x, y, dy and dx; they ascend
  i64 M, R;             // without an adapter R is 0, and there is neither a nor b
  float scale;
  Dropout dropout;
  i64 mask_row;     // row mask_row + m of the mask belongs to row m of the adapter
  Tile a;           // [R, K]
  Tile b;           // [N, R], or b^T [R, N]
  bool transposed;  // whether b is b^T
  Tile bias;        // [N] in fp32, which is added to y; it may be absent
  Tile h;           // [M, R]
  Tile da, db;      // [R, K], [N, R]
};

// The operands that the adapters of a call share.
struct Shared {
  i64 M, N, K;
  Tile x, y, bias;  // [M, K], [M, N], [N]; y and the bias of a forward
  Tile dy, dx;      // [M, N], [M, K]; of a backward

  // Writes x w^T + bias to y, or dy w to dx, at the start of the launch; null where y or dx holds its product already.
  std::unique_ptr<FewRows> base;
};

// For the rows of each adapter, where c is the inverse of the part that dropout keeps:
// h = c keep(x) a^T
// y += s h b^T, and the bias in fp32 where there is no base
void forward_multi(int threads, const Shared& call, const std::vector<Owned>& adapters);

// For the rows of each adapter:
// g = s dy b, which stays inside
// db = s dy^T h
// dx += c keep(g a)
// da = c g^T keep(x)
void backward_multi(int threads, const Shared& call, const std::vector<Owned>& adapters);

// Reading the operands of an adapter of few rows takes the time, so each of their elements counts as this many
// products.
constexpr double kReading = 16;

// The size of products of an adapter's rows with matrices [R, .] that have `columns` columns in all.
inline double operations(const Owned& o, i64 columns) {
  return static_cast<double>(o.R) * columns * std::max(kReading, static_cast<double>(o.M));
}

// Whether rows that are `ld` floats apart lie in so few places of L1 that a product of many of them is slow.
inline bool aliased(i64 ld) { return ld % 64 == 0; }

// ---- rows of a matrix that do not follow each other ----

// Elements from one row of a copy to the next: an odd number of cache lines, as in panel_stride.
inline i64 copy_stride(i64 cols, DType dtype) { return panel_stride(cols) * 4 / size_of(dtype); }

inline i64 copy_bytes(i64 rows, i64 cols) { return rows * panel_stride(cols) * static_cast<i64>(sizeof(float)); }

// The distance between n rows that are evenly spaced, else 0.
inline i64 even_step(const int32_t* rows, i64 n) {
  const i64 step = n > 1 ? rows[1] - rows[0] : 1;
  for (i64 i = 2; i < n; ++i)
    if (rows[i] - rows[i - 1] != step) return 0;
  return step;
}

// n rows of a matrix as one tile: where they lie, if they are evenly spaced, else as a copy.
class RowsOf {
 public:
  // `room` has copy_bytes(n, cols) bytes for the copy.
  RowsOf(Tile matrix, const int32_t* rows, i64 n, i64 k0, i64 cols, void* room)
      : from_(matrix.at(0, k0)), rows_(rows), n_(n), bytes_(cols * size_of(matrix.dtype)) {
    const i64 step = even_step(rows, n);
    copied_ = step == 0;
    tile = copied_ ? Tile{room, copy_stride(cols, matrix.dtype), matrix.dtype}
                   : Tile{from_.at(n ? rows[0] : 0, 0).data, step * matrix.ld, matrix.dtype};
    for (i64 i = 0; copied_ && i < n; ++i) std::memcpy(tile.at(i, 0).data, from_.at(rows[i], 0).data, bytes_);
  }
  // Write the tile back to the matrix, if it is a copy.
  void put_back() const {
    for (i64 i = 0; copied_ && i < n_; ++i) std::memcpy(from_.at(rows_[i], 0).data, tile.at(i, 0).data, bytes_);
  }

  Tile tile;

 private:
  Tile from_;
  const int32_t* rows_;
  i64 n_, bytes_;
  bool copied_;
};

}  // namespace lk::cpu
