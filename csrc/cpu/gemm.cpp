#include <algorithm>
#include <cstring>
#include <vector>

#include "few.h"
#include "gemm_tasks.h"
#include "grid.h"
#include "isa.h"
#include "lora.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kStrip = 96;     // rows of w per task
constexpr i64 kColumns = 128;  // columns of w per task of a backward
constexpr i64 kDepth = 1024;   // columns per pass, so that x and the strip stay in a cache until all products are done

constexpr double kLargeProduct = 0.25;  // one with more than this part of a thread's share of the rows is large

bool convert(Tile t) { return t.dtype != DType::f32; }

// y = x w^T
class Dense : public FewRows {
 public:
  Dense(i64 M, i64 N, i64 K, Tile x, Tile w, Tile y)
      : M_(M), N_(N), K_(K), ldx_(convert(x) ? panel_stride(K) : x.ld), x_(x), w_(w), y_(y) {}

  void take(Scratch& scratch, int threads) override {
    x32_ = scratch.floats(convert(x_) ? M_ * ldx_ : 0);
    parts_ = scratch.floats(threads * kStrip * M_);
  }
  void arrange() override {
    if (convert(x_)) l_.dot_panel(x_, M_, K_, {x32_, ldx_});
  }
  i64 strips() const override { return ceil_div(N_, kStrip); }
  void strip(i64 t, const float* bias) override {
    const float* const X = convert(x_) ? x32_ : static_cast<const float*>(x_.data);
    const i64 n0 = t * kStrip, n = std::min(kStrip, N_ - n0);
    const Sums part{parts_ + worker() * kStrip * M_, M_};
    i64 k0 = 0;
    do {
      l_.dot(w_.at(n0, k0), kKeepAll, {X + l_.dot_column(k0), ldx_}, {n, std::min(kDepth, K_ - k0), M_}, part, k0 > 0);
      k0 += kDepth;
    } while (k0 < K_);
    add_bias(part, n, M_, bias ? bias + n0 : nullptr, 1.0f);
    kernels().write_t(part, n, M_, 1.0f, y_.at(0, n0));
  }

 private:
  const i64 M_, N_, K_, ldx_;
  const Tile x_, w_, y_;
  const LowRank& l_ = kernels().low_rank(x_.dtype, w_.dtype);
  float *x32_ = nullptr, *parts_ = nullptr;
};

// dx = dy w, or dx += dy w
class DenseBack : public FewRows {
 public:
  DenseBack(i64 M, i64 N, i64 K, Tile dy, Tile w, Tile dx, bool add)
      : M_(M), N_(N), K_(K), ld_(std::min(K, kColumns)), dy_(dy), w_(w), dx_(dx), add_(add) {}

  void take(Scratch& scratch, int threads) override {
    dy32_ = scratch.floats(convert(dy_) ? M_ * N_ : 0);
    w32_ = scratch.floats(convert(w_) ? threads * N_ * ld_ : 0);
  }
  void arrange() override {
    if (convert(dy_)) kernels().read(dy_, M_, N_, 1.0f, {dy32_, N_});
  }
  i64 strips() const override { return ceil_div(K_, kColumns); }
  void strip(i64 t, const float*) override {
    const i64 k0 = t * kColumns, width = std::min(kColumns, K_ - k0);
    const Tile out = dx_.at(0, k0), columns = w_.at(0, k0);
    Panel rows{static_cast<const float*>(dy_.data), dy_.ld}, panel{static_cast<const float*>(columns.data), w_.ld};
    if (convert(dy_)) rows = {dy32_, N_};
    if (convert(w_)) {
      float* const w32 = w32_ + worker() * N_ * ld_;
      kernels().read(columns, N_, width, 1.0f, {w32, ld_});
      panel = {w32, ld_};
    }
    if (!add_)
      for (i64 m = 0; m < M_; ++m) std::memset(out.at(m, 0).data, 0, width * size_of(out.dtype));
    kernels().fp32->expand(out, kKeepAll, nullptr, rows, panel, {M_, width, N_});
  }

 private:
  const i64 M_, N_, K_, ld_;  // ld_: columns of a strip of w in fp32
  const Tile dy_, w_, dx_;
  const bool add_;
  float *dy32_ = nullptr, *w32_ = nullptr;
};

}  // namespace

void gemm(int threads, i64 M, i64 N, i64 K, Tile x, Tile w, i64 stride_wk, Tile y, bool add, Tile bias) {
  if (!add && M <= kFewRows && stride_wk == 1)
    return run(team(threads, 2.0 * M * N * K), *few_rows(M, N, K, x, w, y), N, bias);
  run(team(threads, 2.0 * M * N * K), *many_rows(M, N, K, x, w, stride_wk, y, add, bias));
}

std::unique_ptr<ManyRows> many_rows(i64 M, i64 N, i64 K, Tile x, Tile w, i64 stride_wk, Tile y, bool add, Tile bias) {
  return by_panels(M, N, K, x, y, add, bias, 0, [=](i64 n0, i64 cols, i64 k0, i64 depth, float*, float* P) {
    const Gemm& g = *kernels().gemm(x.dtype);
    g.pack({w.at(n0, k0 * stride_wk).data, w.ld, stride_wk}, cols, depth, g.floats(depth), P);
  });
}

void run(int threads, ManyRows& many) {
  Scratch scratch;
  many.take(scratch, threads);
  scratch.reserve();
  many.take(scratch, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (i64 t = 0; t < many.tasks(); ++t) many.task(t, {});
}

void gemm_each(int threads, i64 N, i64 K, i64 stride_wk, const std::vector<Product>& products) {
  i64 M = 0;
  for (const Product& p : products) M += p.M;
  threads = team(threads, 2.0 * M * N * K);
  std::vector<const Product*> small;
  for (const Product& p : products) {
    if (threads > 1 && static_cast<double>(p.M) * threads > kLargeProduct * M)
      gemm(threads, p.M, N, K, p.x, p.w, stride_wk, p.y, false, p.bias);
    else
      small.push_back(&p);
  }
  std::stable_sort(small.begin(), small.end(), [](const Product* a, const Product* b) { return a->M > b->M; });
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (size_t i = 0; i < small.size(); ++i) {
    const Product& p = *small[i];
    gemm(1, p.M, N, K, p.x, p.w, stride_wk, p.y, false, p.bias);
  }
}

std::unique_ptr<FewRows> few_rows(i64 M, i64 N, i64 K, Tile x, Tile w, Tile y) {
  return std::make_unique<Dense>(M, N, K, x, w, y);
}

bool is_small(i64 M, i64 N, i64 K) {
  const bool any = M > 0 && N > 0 && K > 0 && M <= kFewRows && &kernels() != &kernels_baseline();
  return any && N * K <= 1 << 16 && M * N * K <= 1 << 18 && M * N <= 1 << 12 && N <= 16 * K;
}

std::unique_ptr<FewRows> few_rows_back(i64 M, i64 N, i64 K, Tile dy, Tile w, Tile dx, bool add) {
  return std::make_unique<DenseBack>(M, N, K, dy, w, dx, add);
}

bool gemm_of(DType dtype) { return kernels().gemm(dtype) != nullptr; }

}  // namespace lk::cpu
