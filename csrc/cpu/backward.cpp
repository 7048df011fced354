#include <cstring>

#include "grid.h"
#include "isa.h"
#include "lora.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kTileRows = 64;   // rows of dy or x that are used twice while they lie in L2
constexpr i64 kFusedRank = 64;  // beyond, partial sums would grow to the size of dy: two passes without them instead
constexpr i64 kDepth = 1024;
constexpr i64 kReduce = 256;

// Where g and db (or dx and da) come from one pass. Whole rows where M gives enough slabs of them, for the sake of
// pages and prefetchers; columns are cut where it does not. Partial sums of db and da take S x R x cols, of g C x M x
// R.
Grid fused_grid(i64 M, i64 cols, i64 R) {
  if (R > kFusedRank) return make_grid(M, cols, M, 128);
  const i64 slabs = std::clamp<i64>(M / std::max(kTileRows, 8 * R), 1, 8);
  const i64 chunk = std::clamp<i64>(round_up(ceil_div(cols * slabs, 8), 64), 128, 4096);
  return make_grid(M, cols, round_up(ceil_div(M, slabs), kTileRows), chunk);
}

// out[i] = sum over the parts, in order
void sum_parts(float* out, i64 n, const float* part, i64 stride, i64 parts) {
  if (out != part) std::memcpy(out, part, n * sizeof(float));
  for (i64 q = 1; q < parts; ++q)
    for (i64 i = 0; i < n; ++i) out[i] += part[q * stride + i];
}

void clear(float* D, i64 ldd, i64 rows, i64 cols) {
  for (i64 r = 0; r < rows; ++r) std::memset(D + r * ldd, 0, cols * sizeof(float));
}

}  // namespace

void backward(const Problem& p, Tile dy, Tile x, Tile a, Tile b, Tile h, Tile dx, Tile da, Tile db) {
  const Kernels& k = kernels();
  const LowRank& l = k.low_rank(dy.dtype, a.dtype);
  const bool need_g = dx || da, one_pass = p.R <= kFusedRank;
  const bool drop = p.dropout.threshold != 0;
  const float c = p.dropout.rescale();
  const double products = (need_g ? p.N : 0.0) + (db ? p.N : 0.0) + (dx ? p.K : 0.0) + (da ? p.K : 0.0);
  const int threads = team(p.threads, 2.0 * p.M * p.R * products);

  const i64 ldn = panel_stride(p.N), ldk = panel_stride(p.K), MR = p.M * p.R;
  const bool a_packed = static_cast<bool>(dx), h_packed = db && (l.pairs || h.dtype != DType::f32);
  const Grid pack_a = make_grid(p.R, p.K, p.R, 512), pack_b = make_grid(p.N, p.R, 128, p.R);
  const Grid rows = make_grid(p.M, p.R, kTileRows, p.R);
  const Grid over_n = fused_grid(p.M, p.N, p.R), over_k = fused_grid(p.M, p.K, p.R);
  const i64 g_parts = one_pass ? over_n.C : 1;

  Scratch scratch;
  float *a_panel, *b_panel, *h32, *g, *g_rows, *db_part, *da_part;
  uint8_t* bits;
  const i64 bits_per_thread = drop ? kTileRows * over_k.chunk / 8 : 0;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    a_panel = scratch.floats(a_packed ? p.R * ldk : 0);
    b_panel = scratch.floats(need_g ? p.R * ldn : 0);
    h32 = scratch.floats(h_packed ? MR : 0);
    g = scratch.floats(need_g ? g_parts * MR : 0);
    g_rows = scratch.floats(dx ? MR : 0);
    db_part = scratch.floats(db ? over_n.S * p.R * ldn : 0);
    da_part = scratch.floats(da ? over_k.S * p.R * ldk : 0);
    bits = scratch.bytes(threads * bits_per_thread);
  }
  const float* const H = h_packed ? h32 : static_cast<const float*>(h.data);
  const i64 ldh = h_packed ? p.R : h.ld;
  const Keep all{nullptr, 0};

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // panels of fp32
    if (a_packed) {
#pragma omp for schedule(static) nowait
      for (i64 t = 0; t < pack_a.size(); ++t)
        l.expand_panel(a.at(0, pack_a.k0(t)), p.R, pack_a.width(t), a_panel + pack_a.k0(t), ldk);
    }
    if (need_g) {
#pragma omp for schedule(static) nowait
      for (i64 t = 0; t < pack_b.size(); ++t)
        l.dot_panel_t(b.at(pack_b.m0(t), 0), pack_b.rows(t), p.R, b_panel + l.dot_column(pack_b.m0(t)), ldn);
    }
    if (h_packed) {
#pragma omp for schedule(static) nowait
      for (i64 t = 0; t < rows.size(); ++t)
        l.outer_rows(h.at(rows.m0(t), 0), rows.rows(t), p.R, 1.0f, h32 + rows.m0(t) * p.R);
    }
#pragma omp barrier

    // dy b and dy^T h: one pass over dy where the rank is small
    if (need_g && !one_pass) {
#pragma omp for schedule(dynamic, 1) nowait
      for (i64 t = 0; t < rows.size(); ++t) {
        const i64 m0 = rows.m0(t);
        for (i64 n0 = 0; n0 < p.N; n0 += kDepth)
          l.dot(dy.at(m0, n0), all, b_panel + l.dot_column(n0), ldn, rows.rows(t), std::min(kDepth, p.N - n0), p.R,
                g + m0 * p.R, p.R, n0 > 0);
      }
    }
    if (db || (need_g && one_pass)) {
#pragma omp for schedule(dynamic, 1)
      for (i64 t = 0; t < over_n.size(); ++t) {
        const i64 n0 = over_n.k0(t), width = over_n.width(t), first = over_n.m0(t), last = first + over_n.rows(t);
        float* const D = db ? db_part + t / over_n.C * p.R * ldn + n0 : nullptr;
        if (db) clear(D, ldn, p.R, width);
        for (i64 m0 = first; m0 < last; m0 += kTileRows) {
          const i64 n = std::min(kTileRows, last - m0);
          const Tile tile = dy.at(m0, n0);
          if (need_g && one_pass)
            l.dot(tile, all, b_panel + l.dot_column(n0), ldn, n, width, p.R, g + t % over_n.C * MR + m0 * p.R, p.R,
                  false);
          if (db) l.outer(tile, all, H + m0 * ldh, ldh, n, width, p.R, D, ldn);
        }
      }
    }
#pragma omp barrier

    // sums of the parts
    if (need_g) {
#pragma omp for schedule(static) nowait
      for (i64 t = 0; t < rows.size(); ++t) {
        float* const gm = g + rows.m0(t) * p.R;
        sum_parts(gm, rows.rows(t) * p.R, gm, MR, g_parts);
        const Tile sum{gm, p.R, DType::f32};
        if (dx) l.expand_rows(sum, rows.rows(t), p.R, c * p.scale, g_rows + rows.m0(t) * p.R);
        if (da) l.outer_rows(sum, rows.rows(t), p.R, p.scale, gm);
      }
    }
    if (db) {
#pragma omp for schedule(static) nowait
      for (i64 n0 = 0; n0 < p.N; n0 += kReduce) {
        const i64 width = std::min(kReduce, p.N - n0);
        for (i64 r = 0; r < p.R; ++r) {
          float* const D = db_part + r * ldn + n0;
          sum_parts(D, width, D, p.R * ldn, over_n.S);
        }
        k.write_t(db_part + n0, ldn, p.R, width, p.scale, db.at(n0, 0));
      }
    }
#pragma omp barrier

    // dx and g^T x: the keep bits of a tile serve both
    if (need_g) {
      uint8_t* const my_bits = drop ? bits + worker() * bits_per_thread : nullptr;
      const Keep keep{my_bits, over_k.chunk / 8};
#pragma omp for schedule(dynamic, 1)
      for (i64 t = 0; t < over_k.size(); ++t) {
        const i64 k0 = over_k.k0(t), width = over_k.width(t), first = over_k.m0(t), last = first + over_k.rows(t);
        float* const D = da ? da_part + t / over_k.C * p.R * ldk + k0 : nullptr;
        if (da) clear(D, ldk, p.R, width);
        for (i64 m0 = first; m0 < last; m0 += kTileRows) {
          const i64 n = std::min(kTileRows, last - m0);
          if (drop) k.keep_bits(p.dropout.seed, p.dropout.threshold, m0, k0, n, width, my_bits, keep.ld);
          if (da) l.outer(x.at(m0, k0), keep, g + m0 * p.R, p.R, n, width, p.R, D, ldk);
          if (dx) l.expand(dx.at(m0, k0), keep, nullptr, g_rows + m0 * p.R, p.R, a_panel + k0, ldk, n, width, p.R);
        }
      }
    }
    if (da) {
#pragma omp for schedule(static)
      for (i64 k0 = 0; k0 < p.K; k0 += kReduce) {
        const i64 width = std::min(kReduce, p.K - k0);
        for (i64 r = 0; r < p.R; ++r) {
          float* const D = da_part + r * ldk + k0;
          sum_parts(D, width, D, p.R * ldk, over_k.S);
        }
        k.write(da_part + k0, ldk, p.R, width, c, da.at(0, k0));
      }
    }
  }
}

}  // namespace lk::cpu
