// The fp32 GEMM cut into tasks, with panels of w from wherever they come.
#pragma once

#include "grid.h"
#include "isa.h"
#include "scratch.h"

namespace lk::cpu {

constexpr i64 kGemmGroup = 384;     // columns of y per task: with kGemmDepth terms their panels stay in L2
constexpr i64 kGemmRowsLeast = 96;  // rows of y per task, lest packing w weigh

// y [M, N] = x [M, K] w^T, or y += that. pack(n0, cols, k0, depth, D, P) writes the panels of w[n0.., k0..] to P; D is
// `spare` floats a column and term for its own use. k0 is even.
template <class Pack>
void gemm_by_panels(int threads, i64 M, i64 N, i64 K, Tile x, Tile y, bool add, i64 spare, const Pack& pack) {
  const Kernels& k = kernels();
  threads = team(threads, 2.0 * M * N * K);
  const float* const X = static_cast<const float*>(x.data);
  float* const Y = static_cast<float*>(y.data);
  // tasks of equal size, and of a number that the threads can share out evenly
  const i64 groups = round_up(ceil_div(N, kGemmGroup), threads);
  const i64 width = round_up(ceil_div(N, groups), k.gemm_width), passes = std::max<i64>(1, ceil_div(K, kGemmDepth));
  const i64 chunks = std::clamp<i64>(ceil_div(threads, ceil_div(N, width)), 1, std::max<i64>(1, M / kGemmRowsLeast));
  const Grid tasks = make_grid(M, N, ceil_div(M, chunks), width);
  Scratch scratch;
  float *panels, *spares;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    panels = scratch.floats(threads * width * kGemmDepth);
    spares = scratch.floats(threads * width * kGemmDepth * spare);
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (i64 t = 0; t < tasks.size(); ++t) {
    const i64 m0 = tasks.m0(t), n0 = tasks.k0(t), cols = tasks.width(t);
    float* const P = panels + worker() * width * kGemmDepth;
    float* const D = spares + worker() * width * kGemmDepth * spare;
    const auto edge = [&](i64 pass) { return pass == passes ? K : K * pass / passes / 2 * 2; };
    for (i64 pass = 0; pass < passes; ++pass) {
      const i64 k0 = edge(pass), depth = edge(pass + 1) - k0;
      pack(n0, cols, k0, depth, D, P);
      k.gemm(X + m0 * x.ld + k0, x.ld, P, tasks.rows(t), cols, depth, add || pass > 0, Y + m0 * y.ld + n0, y.ld);
    }
  }
}

}  // namespace lk::cpu
