#include "grid.h"
#include "isa.h"
#include "lora.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kGroup = 384;     // columns of y per task: with kGemmDepth terms their panels stay in L2
constexpr i64 kRowsLeast = 96;  // rows of y per task, lest packing w weigh
constexpr i64 kFewRows = 16;    // up to here w is read as it is
constexpr i64 kStrip = 96;      // rows of w per task there
constexpr i64 kDepth = 1024;  // and terms per pass, so that the strip and x are still in a cache for the next rows of x

// w's rows lie along k: every element is read once, and meets the few rows of x where it lies.
void few_rows(int threads, i64 M, i64 N, i64 K, Tile x, Tile w, Tile y) {
  const Kernels& k = kernels();
  const LowRank& l = k.low_rank(x.dtype, w.dtype);
  const bool convert = x.dtype != DType::f32;
  const i64 ldx = convert ? panel_stride(K) : x.ld, strips = ceil_div(N, kStrip);
  Scratch scratch;
  float *x32, *parts;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    x32 = scratch.floats(convert ? M * ldx : 0);
    parts = scratch.floats(threads * kStrip * M);
  }
  if (convert) l.dot_panel(x, M, K, x32, ldx);
  const float* const X = convert ? x32 : static_cast<const float*>(x.data);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (i64 t = 0; t < strips; ++t) {
    const i64 n0 = t * kStrip, n = std::min(kStrip, N - n0);
    float* const part = parts + worker() * kStrip * M;
    i64 k0 = 0;
    do {
      l.dot(w.at(n0, k0), {nullptr, 0}, X + l.dot_column(k0), ldx, n, std::min(kDepth, K - k0), M, part, M, k0 > 0);
      k0 += kDepth;
    } while (k0 < K);
    k.write_t(part, M, n, M, 1.0f, y.at(0, n0));
  }
}

}  // namespace

void gemm(int threads, i64 M, i64 N, i64 K, Tile x, Tile w, i64 stride_wk, Tile y, bool add) {
  threads = team(threads, 2.0 * M * N * K);
  if (!add && gemm_few(M, stride_wk)) return few_rows(threads, M, N, K, x, w, y);
  const Kernels& k = kernels();
  const float *const X = static_cast<const float*>(x.data), *const W = static_cast<const float*>(w.data);
  float* const Y = static_cast<float*>(y.data);
  // tasks of equal size, and of a number that the threads can share out evenly
  const i64 groups = round_up(ceil_div(N, kGroup), threads);
  const i64 width = round_up(ceil_div(N, groups), k.gemm_width), passes = std::max<i64>(1, ceil_div(K, kGemmDepth));
  const i64 chunks = std::clamp<i64>(ceil_div(threads, ceil_div(N, width)), 1, std::max<i64>(1, M / kRowsLeast));
  const Grid tasks = make_grid(M, N, ceil_div(M, chunks), width);
  Scratch scratch;
  float* panels;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    panels = scratch.floats(threads * width * kGemmDepth);
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (i64 t = 0; t < tasks.size(); ++t) {
    const i64 m0 = tasks.m0(t), n0 = tasks.k0(t), cols = tasks.width(t);
    float* const P = panels + worker() * width * kGemmDepth;
    for (i64 pass = 0; pass < passes; ++pass) {
      const i64 k0 = K * pass / passes, depth = K * (pass + 1) / passes - k0;
      k.gemm_pack(W + n0 * w.ld + k0 * stride_wk, w.ld, stride_wk, cols, depth, P);
      k.gemm(X + m0 * x.ld + k0, x.ld, P, tasks.rows(t), cols, depth, add || pass > 0, Y + m0 * y.ld + n0, y.ld);
    }
  }
}

bool gemm_few(i64 M, i64 stride_wk) { return M <= kFewRows && stride_wk == 1; }

}  // namespace lk::cpu
