#include "gemm_tasks.h"
#include "grid.h"
#include "isa.h"
#include "lora.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kFewRows = 16;  // up to here w is read as it is
constexpr i64 kStrip = 96;    // rows of w per task there
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
  if (!add && gemm_few(M, stride_wk)) return few_rows(team(threads, 2.0 * M * N * K), M, N, K, x, w, y);
  gemm_by_panels(threads, M, N, K, x, y, add, 0, [&](i64 n0, i64 cols, i64 k0, i64 depth, float*, float* P) {
    const Gemm& g = *kernels().gemm(x.dtype);
    g.pack(w.at(n0, k0 * stride_wk).data, w.ld, stride_wk, cols, depth, g.floats(depth), P);
  });
}

bool gemm_of(DType dtype) { return kernels().gemm(dtype) != nullptr; }

bool gemm_few(i64 M, i64 stride_wk) { return M <= kFewRows && stride_wk == 1; }

}  // namespace lk::cpu
