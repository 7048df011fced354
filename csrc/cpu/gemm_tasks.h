// The GEMM cut into tasks. A function of the caller packs the panels of w, so that w may be dense or quantised.
#pragma once

#include <stdexcept>

#include "grid.h"
#include "isa.h"
#include "scratch.h"

namespace lk::cpu {

constexpr i64 kGemmRun = 32;         // passes over K begin at multiples of this
constexpr i64 kGemmRowsLeast = 96;   // rows of y per task: with fewer, packing w would take too large a part
constexpr i64 kGemmRowsMost = 1024;  // rows of y per task where their sums need memory beside y, 1.5 MB a thread

// y [M, N] = x [M, K] w^T, or y += x w^T, or y = x w^T + bias for a y in 16 bits, rounded once. pack(n0, cols, k0,
// depth, D, P) writes the panels of w[n0.., k0..] to P; D is memory of `spare` floats that it may use. k0 is a multiple
// of kGemmRun.
template <class Pack>
void gemm_by_panels(int threads, i64 M, i64 N, i64 K, Tile x, Tile y, bool add, Tile bias, i64 spare,
                    const Pack& pack) {
  if (bias && (add || y.dtype == DType::f32))
    throw std::invalid_argument("a bias is added to a new product in 16 bits only; expand adds others");
  if (!kernels().gemm(x.dtype))
    throw std::invalid_argument(
        "there is no GEMM of many rows, of a strided w or with add for this dtype: has_gemm tells "
        "which dtypes have one");
  const Gemm& g = *kernels().gemm(x.dtype);
  threads = team(threads, 2.0 * M * N * K);
  // The tasks have almost equal sizes, and their number is one that the threads can share evenly.
  const i64 slices = ceil_div(N, g.width), groups = std::min(slices, round_up(ceil_div(N, g.group), threads));
  const i64 runs = std::max<i64>(1, ceil_div(K, kGemmRun)), passes = ceil_div(runs, g.pair * g.depth / kGemmRun);
  const bool sums_in_y = y.dtype == DType::f32;
  i64 chunks = std::clamp<i64>(ceil_div(threads, groups), 1, std::max<i64>(1, M / kGemmRowsLeast));
  if (!sums_in_y) chunks = std::max(chunks, ceil_div(M, kGemmRowsMost));
  const i64 width = ceil_div(slices, groups) * g.width;
  const i64 panel = width * g.depth, sum = sums_in_y || passes == 1 ? 0 : ceil_div(M, chunks) * width;
  Scratch scratch;
  float *panels, *spares, *sums;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    panels = scratch.floats(threads * panel);
    spares = scratch.floats(threads * spare);
    sums = scratch.floats(threads * sum);
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (i64 t = 0; t < chunks * groups; ++t) {
    const i64 chunk = t / groups, group = t % groups;
    const i64 m0 = M * chunk / chunks, rows = M * (chunk + 1) / chunks - m0;
    const i64 n0 = slices * group / groups * g.width, n1 = slices * (group + 1) / groups * g.width;
    const i64 cols = std::min(n1, N) - n0;
    float* const P = panels + worker() * panel;
    float* const D = spares + worker() * spare;
    float* const S = sums + worker() * sum;
    const Tile out = y.at(m0, n0), addend = add ? out : bias ? bias.at(0, n0) : Tile{};
    const auto edge = [&](i64 pass) { return std::min(K, runs * pass / passes * kGemmRun); };
    for (i64 pass = 0; pass < passes; ++pass) {
      const i64 k0 = edge(pass), depth = edge(pass + 1) - k0;
      pack(n0, cols, k0, depth, D, P);
      if (sums_in_y)
        g.tile(x.at(m0, k0), P, rows, cols, depth, {add || pass > 0, {static_cast<float*>(out.data), out.ld}, {}, {}});
      else
        g.tile(x.at(m0, k0), P, rows, cols, depth, {pass > 0, {S, width}, addend, pass + 1 == passes ? out : Tile{}});
    }
  }
}

}  // namespace lk::cpu
