#include "grid.h"
#include "isa.h"
#include "lora.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kDepth = 1024;  // columns of x (and of a's panel) per pass: the panel's 8 rows stay in L1
constexpr i64 kRows = 48;     // rows of x or y per task
constexpr i64 kWidth = 4096;  // columns of y per task
constexpr i64 kFewRows = 4;   // up to here b is read as it is; beyond, transposing it first pays

}  // namespace

void forward(const Problem& p, Tile x, Tile a, Tile b, Tile bias, Tile y, Tile h) {
  const Kernels& k = kernels();
  const bool down = static_cast<bool>(x), up = static_cast<bool>(y), few = p.M <= kFewRows;
  const int threads = team(p.threads, 2.0 * p.M * p.R * ((down ? p.K : 0) + (up ? p.N : 0)));
  const float c = p.dropout.rescale();
  const bool drop = p.dropout.threshold != 0;
  const LowRank& l = few ? *k.fp32 : k.low_rank(x.dtype, a.dtype);
  const bool a_packed = down && (!few || a.dtype != DType::f32), b_packed = up && !few;

  const bool convert_bias = bias && bias.dtype != DType::f32;

  const i64 ldn = panel_stride(p.N), ldk = panel_stride(p.K);
  const Grid pack_a = make_grid(p.R, p.K, p.R, 512), pack_b = make_grid(p.N, p.R, 128, p.R);
  const i64 task_rows = std::clamp<i64>(round_up(ceil_div(p.M, 4 * threads), 6), 6, kRows);
  const Grid rows = make_grid(p.M, p.K, task_rows, std::max<i64>(p.K, 1)), tiles = make_grid(p.M, p.N, kRows, kWidth);

  Scratch scratch;
  float *h32, *a_panel, *b_panel, *bias32, *tmp;
  uint8_t* bits;
  const i64 bits_per_thread = drop ? task_rows * kDepth / 8 : 0;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    h32 = scratch.floats(p.M * p.R);
    a_panel = scratch.floats(a_packed ? p.R * ldk : 0);
    b_panel = scratch.floats(b_packed ? p.R * ldn : 0);
    bias32 = scratch.floats(convert_bias ? p.N : 0);
    tmp = scratch.floats(up && few ? threads * kWidth : 0);
    bits = scratch.bytes(threads * bits_per_thread);
  }
  if (convert_bias) k.read(bias, 1, p.N, 1.0f, bias32, p.N);
  const float* const add = convert_bias ? bias32 : static_cast<const float*>(bias.data);
  const float* const P = a_packed ? a_panel : static_cast<const float*>(a.data);
  const i64 ldp = a_packed ? ldk : a.ld;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (a_packed) {
#pragma omp for schedule(static) nowait
      for (i64 t = 0; t < pack_a.size(); ++t)
        l.dot_panel(a.at(0, pack_a.k0(t)), p.R, pack_a.width(t), a_panel + l.dot_column(pack_a.k0(t)), ldk);
    }
    if (b_packed) {
#pragma omp for schedule(static) nowait
      for (i64 t = 0; t < pack_b.size(); ++t)
        l.expand_panel_t(b.at(pack_b.m0(t), 0), pack_b.rows(t), p.R, b_panel + pack_b.m0(t), ldn);
    }
    if (!down) {
#pragma omp for schedule(static) nowait
      for (i64 t = 0; t < rows.size(); ++t)
        l.expand_rows(h.at(rows.m0(t), 0), rows.rows(t), p.R, p.scale, h32 + rows.m0(t) * p.R);
    }
#pragma omp barrier
    if (down) {
      uint8_t* const my_bits = drop ? bits + worker() * bits_per_thread : nullptr;
#pragma omp for schedule(dynamic, 1)
      for (i64 t = 0; t < rows.size(); ++t) {
        const i64 m0 = rows.m0(t), n = rows.rows(t);
        float* const hm = h32 + m0 * p.R;
        i64 k0 = 0;
        do {
          const i64 depth = std::min(kDepth, p.K - k0);
          if (drop) k.keep_bits(p.dropout.seed, p.dropout.threshold, m0, k0, n, depth, my_bits, kDepth / 8);
          l.dot(x.at(m0, k0), {my_bits, kDepth / 8}, P + l.dot_column(k0), ldp, n, depth, p.R, hm, p.R, k0 > 0);
          k0 += depth;
        } while (k0 < p.K);
        if (h) k.write(hm, p.R, n, p.R, c, h.at(m0, 0));
        if (up) l.expand_rows({hm, p.R, DType::f32}, n, p.R, c * p.scale, hm);
      }
    }
    if (up) {
#pragma omp for schedule(dynamic, 1)
      for (i64 t = 0; t < tiles.size(); ++t) {
        const i64 m0 = tiles.m0(t), n0 = tiles.k0(t), width = tiles.width(t), n = tiles.rows(t);
        const float* const bias_n = add ? add + n0 : nullptr;
        if (!few) {
          l.expand(y.at(m0, n0), {nullptr, 0}, bias_n, h32 + m0 * p.R, p.R, b_panel + n0, ldn, n, width, p.R);
          continue;
        }
        const float one = 1.0f;
        float* const column = tmp + worker() * kWidth;
        for (i64 m = m0; m < m0 + n; ++m) {
          l.dot(b.at(n0, 0), {nullptr, 0}, h32 + m * p.R, p.R, width, p.R, 1, column, 1, false);
          l.expand(y.at(m, n0), {nullptr, 0}, bias_n, &one, 1, column, width, 1, width, 1);
        }
      }
    }
  }
}

}  // namespace lk::cpu
