// The sums of the norms that DoRA over an embedding divides by, in one pass over w [V, D]:
//
// n^2 = ||w||^2 + rowsum((2 s w^T a^T + s^2 b (a a^T)) * b) by columns of w
//
// A task owns some columns of a slab of rows. Sums are added up in fp32 over a bounded number of rows, and then in
// fp64, in the order of the rows. The slabs depend on the shape alone.
#include "grid.h"
#include "isa.h"
#include "lora.h"
#include "parts.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kRows = 12;              // rows of a block: while one is summed, `outer` prefetches a later one
constexpr i64 kRowsInFp32 = 384;       // rows whose sums are added up in fp32
constexpr i64 kPartFloats = 1 << 15;   // sums of a task in fp32
constexpr i64 kSlabs = 8;              // the most slabs of rows
constexpr i64 kSlabDoubles = 1 << 19;  // sums of all slabs in fp64, beyond which there is one slab

// Columns of x [V, cols], whose products with a^T [V, R] have `sums` rows: R, or R + 1 with the sums of squares.
struct Columns {
  Grid grid;
  i64 sums;
  double* total = nullptr;  // [grid.S, sums, grid.cols]

  i64 doubles() const { return grid.S * sums * grid.cols; }
  double* at(i64 slab, i64 sum, i64 col) const { return total + (slab * sums + sum) * grid.cols + col; }

  // Return the sum over the slabs.
  float whole(i64 sum, i64 col) const {
    double s = 0;
    for (i64 slab = 0; slab < grid.S; ++slab) s += *at(slab, sum, col);
    return static_cast<float>(s);
  }
};

Columns columns_of(i64 V, i64 cols, i64 sums) {
  const i64 most = std::max<i64>(kPartFloats / (sums + 1) / 64, 1) * 64;
  const i64 chunk = round_up(ceil_div(cols, std::max<i64>(1, ceil_div(cols, most))), 64);
  const i64 slabs = std::clamp<i64>(kSlabDoubles / std::max<i64>(1, sums * cols), 1, kSlabs);
  return {make_grid(V, cols, std::max(kRowsInFp32, ceil_div(V, slabs)), chunk), sums};
}

// Memory of a thread: rows of a^T as floats, and the sums of a task in fp32.
struct Own {
  float *a, *part;
};

// The sums of task t. Without w the columns are those of a^T.
void sum_task(const Columns& c, i64 t, const Tile* w, Tile a_t, bool turned, i64 R, Own own) {
  const LowRank& l = *kernels().fp32;
  const i64 k0 = c.grid.k0(t), width = c.grid.width(t), slab = t / c.grid.C, ld = c.grid.chunk;
  const i64 first = c.grid.m0(t), last = first + c.grid.rows(t);
  for (i64 j = 0; j < c.sums; ++j) std::fill_n(c.at(slab, j, k0), width, 0.0);
  for (i64 m = first; m < last; m += kRowsInFp32) {
    clear({own.part, ld}, c.sums, width);
    const i64 end = std::min(m + kRowsInFp32, last);
    for (i64 m0 = m; m0 < end; m0 += kRows) {
      const i64 rows = std::min(kRows, end - m0);
      if (turned)
        l.dot_panel_t(a_t.at(0, m0), R, rows, {own.a, R});
      else
        l.outer_rows(a_t.at(m0, 0), rows, R, 1.0f, own.a);
      const Tile x = w ? w->at(m0, k0) : Tile{own.a + k0, R, DType::f32};
      if (c.sums > R) kernels().add_squares(x, rows, width, own.part + R * ld);
      l.outer(x, kKeepAll, {own.a, R}, {rows, width, R}, {own.part, ld});
    }
    for (i64 j = 0; j < c.sums; ++j) {
      double* const total = c.at(slab, j, k0);
      for (i64 k = 0; k < width; ++k) total[k] += own.part[j * ld + k];
    }
  }
}

}  // namespace

void column_sums(int threads, i64 V, i64 D, i64 R, Tile w, Tile a_t, bool turned, float* square, Tile low, Tile gram) {
  threads = team(threads, 2.0 * V * D * (R + 1));
  Columns of_w = columns_of(V, D, R + 1), of_a = columns_of(V, R, R);
  const i64 a_floats = round_up(kRows * R, 16);
  const i64 own_floats = a_floats + std::max(of_w.sums * of_w.grid.chunk, of_a.sums * of_a.grid.chunk);
  Scratch scratch;
  float* own;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    of_w.total = reinterpret_cast<double*>(scratch.floats(2 * of_w.doubles()));
    of_a.total = reinterpret_cast<double*>(scratch.floats(2 * of_a.doubles()));
    own = scratch.floats(threads * own_floats);
  }

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Own mine{own + worker() * own_floats, own + worker() * own_floats + a_floats};
#pragma omp for schedule(dynamic, 1)
    for (i64 t = 0; t < of_w.grid.size() + of_a.grid.size(); ++t) {
      if (t < of_w.grid.size())
        sum_task(of_w, t, &w, a_t, turned, R, mine);
      else
        sum_task(of_a, t - of_w.grid.size(), nullptr, a_t, turned, R, mine);
    }
#pragma omp for schedule(static) nowait
    for (i64 r = 0; r < R; ++r)
      for (i64 k = 0; k < R; ++k) *static_cast<float*>(gram.at(r, k).data) = of_a.whole(r, k);
#pragma omp for schedule(static)
    for (i64 r = 0; r <= R; ++r) {
      float* const out = r < R ? static_cast<float*>(low.at(r, 0).data) : square;
      for (i64 k = 0; k < D; ++k) out[k] = of_w.whole(r, k);
    }
  }
}

}  // namespace lk::cpu
