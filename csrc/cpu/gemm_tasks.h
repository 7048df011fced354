// The GEMM cut into tasks. A function of the caller packs the panels of w, so that w may be dense or quantised.
#pragma once

#include <stdexcept>

#include "grid.h"
#include "isa.h"
#include "many.h"
#include "scratch.h"

namespace lk::cpu {

constexpr i64 kGemmRun = 32;         // passes over K begin at multiples of this
constexpr i64 kGemmRowsLeast = 96;   // rows of y per task: with fewer, packing w would take too large a part
constexpr i64 kGemmRowsMost = 1024;  // rows of y per task where their sums need memory beside y, 1.5 MB a thread

// y [M, N] = x [M, K] w^T, or y += x w^T, or y = x w^T + bias for a y in 16 bits, rounded once. pack(n0, cols, k0,
// depth, D, P) writes the panels of w[n0.., k0..] to P; D is memory of `spare` floats that it may use. k0 is a multiple
// of kGemmRun.
template <class Pack>
class Panels : public ManyRows {
 public:
  Panels(i64 M, i64 N, i64 K, Tile x, Tile y, bool add, Tile bias, i64 spare, Pack pack)
      : M_(M),
        N_(N),
        x_(x),
        y_(y),
        bias_(bias),
        add_(add),
        spare_(spare),
        K_(K),
        pack_(std::move(pack)),
        g_(gemm_for(x.dtype)),
        slices_(ceil_div(N, g_.width)),
        runs_(std::max<i64>(1, ceil_div(K, kGemmRun))),
        passes_(ceil_div(runs_, g_.pair * g_.depth / kGemmRun)) {
    if (bias && (add || y.dtype == DType::f32))
      throw std::invalid_argument("a bias is added to a new product in 16 bits only; expand adds others");
  }

  // The tasks have almost equal sizes, and their number is one that the threads can share evenly.
  void take(Scratch& scratch, int threads) override {
    groups_ = std::min(slices_, round_up(ceil_div(N_, g_.group), threads));
    chunks_ = std::clamp<i64>(ceil_div(threads, groups_), 1, std::max<i64>(1, M_ / kGemmRowsLeast));
    if (!sums_in_y()) chunks_ = std::max(chunks_, ceil_div(M_, kGemmRowsMost));
    width_ = ceil_div(slices_, groups_) * g_.width;
    panel_ = width_ * g_.depth;
    sum_ = sums_in_y() || passes_ == 1 ? 0 : (ceil_div(M_, chunks_) + 1) * width_;
    panels_ = scratch.floats(threads * panel_);
    spares_ = scratch.floats(threads * spare_);
    sums_ = scratch.floats(threads * sum_);
  }
  i64 tasks() const override { return chunks_ * groups_; }
  i64 width() const override { return width_; }

  void task(i64 t, const Tail& tail) override {
    const i64 chunk = t / groups_, group = t % groups_;
    const i64 first = row(chunk), rows = row(chunk + 1) - first;
    const i64 n0 = slices_ * group / groups_ * g_.width, n1 = slices_ * (group + 1) / groups_ * g_.width;
    const i64 cols = std::min(n1, N_) - n0;
    float* const P = panels_ + worker() * panel_;
    float* const D = spares_ + worker() * spare_;
    float* const S = sums_ + worker() * sum_;
    for (i64 pass = 0; pass < passes_; ++pass) {
      const i64 k0 = edge(pass), depth = edge(pass + 1) - k0;
      pack_(n0, cols, k0, depth, D, P);
      const bool complete = pass + 1 == passes_;
      const i64 step = complete && tail ? kTailRows : rows;
      for (i64 m = 0, some; m < rows; m += some) {
        some = std::min(step, rows - m);
        const Tile out = y_.at(first + m, n0), addend = add_ ? out : bias_ ? bias_.at(0, n0) : Tile{};
        g_.tile(x_.at(first + m, k0), P, some, cols, depth,
                sums_in_y() ? GemmOut{add_ || pass > 0, {static_cast<float*>(out.data), out.ld}, {}, {}}
                            : GemmOut{pass > 0, {S + m * width_, width_}, addend, complete ? out : Tile{}});
        if (complete && tail) tail(first + m, some, n0, cols);
      }
    }
  }

 private:
  static const Gemm& gemm_for(DType dtype) {
    if (const Gemm* g = kernels().gemm(dtype)) return *g;
    throw std::invalid_argument(
        "there is no GEMM of many rows, of a strided w or with add for this dtype: has_gemm tells "
        "which dtypes have one");
  }
  bool sums_in_y() const { return y_.dtype == DType::f32; }
  i64 row(i64 chunk) const { return chunk == chunks_ ? M_ : M_ * chunk / chunks_ / 2 * 2; }  // even, as tails need it
  i64 edge(i64 pass) const { return std::min(K_, runs_ * pass / passes_ * kGemmRun); }

  const i64 M_, N_;
  const Tile x_, y_, bias_;
  const bool add_;
  const i64 spare_, K_;
  const Pack pack_;
  const Gemm& g_;
  const i64 slices_, runs_, passes_;
  i64 groups_ = 1, chunks_ = 1, width_ = 0, panel_ = 0, sum_ = 0;
  float *panels_ = nullptr, *spares_ = nullptr, *sums_ = nullptr;
};

template <class Pack>
std::unique_ptr<ManyRows> by_panels(i64 M, i64 N, i64 K, Tile x, Tile y, bool add, Tile bias, i64 spare, Pack pack) {
  return std::make_unique<Panels<Pack>>(M, N, K, x, y, add, bias, spare, std::move(pack));
}

}  // namespace lk::cpu
