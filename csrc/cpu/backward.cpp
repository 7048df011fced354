#include "grid.h"
#include "isa.h"
#include "lora.h"
#include "parts.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kDepth = 1024;  // columns of dy per step: 8 rows of b's panel stay in L1 for all rows of a tile

// Sizes, tasks and memory of a branch, beside its operands.
struct Work {
  const LowRank& l;
  bool need_g, one_pass, a_packed, h_packed;
  i64 ldn;
  Grid pack_a, pack_b, rows, over_n;
  i64 g_parts;
  float *a_panel = nullptr, *b_panel = nullptr, *h32 = nullptr, *g = nullptr, *g_rows = nullptr, *db_part = nullptr,
        *da_part = nullptr;

  Work(const Branch& p, i64 M, i64 K, bool dx)
      : l(kernels().low_rank(p.dy.dtype, p.a.dtype)),
        need_g(dx || p.da),
        one_pass(p.R <= kFusedRank),
        a_packed(dx),
        h_packed(p.db && (l.pairs || p.h.dtype != DType::f32)),
        ldn(panel_stride(p.N)),
        pack_a(make_grid(p.R, K, p.R, 512)),
        pack_b(make_grid(p.N, p.R, 128, p.R)),
        rows(make_grid(M, p.R, kTileRows, p.R)),
        over_n(fused_grid(M, p.N, p.R)),
        g_parts(one_pass ? over_n.C : 1) {}
};

// Pack a, b and h for the products.
void pack_operands(const Branch& p, const Work& w, i64 ldk) {
  if (w.a_packed) {
#pragma omp for schedule(static) nowait
    for (i64 t = 0; t < w.pack_a.size(); ++t) {
      const i64 k0 = w.pack_a.k0(t);
      w.l.expand_panel(p.a.at(0, k0), p.R, w.pack_a.width(t), {w.a_panel + k0, ldk});
    }
  }
  if (w.need_g) {
#pragma omp for schedule(static) nowait
    for (i64 t = 0; t < w.pack_b.size(); ++t) {
      const i64 n0 = w.pack_b.m0(t);
      w.l.dot_panel_t(p.b.at(n0, 0), w.pack_b.rows(t), p.R, {w.b_panel + w.l.dot_column(n0), w.ldn});
    }
  }
  if (w.h_packed) {
#pragma omp for schedule(static) nowait
    for (i64 t = 0; t < w.rows.size(); ++t)
      w.l.outer_rows(p.h.at(w.rows.m0(t), 0), w.rows.rows(t), p.R, 1.0f, w.h32 + w.rows.m0(t) * p.R);
  }
}

// Compute the parts of g (one for each chunk of columns) and of db (one for each slab of rows) from a branch's dy.
void pass_over_dy(const Branch& p, const Work& w, i64 M) {
  if (w.need_g && !w.one_pass) {
#pragma omp for schedule(dynamic, 1) nowait
    for (i64 t = 0; t < w.rows.size(); ++t) {
      const i64 m0 = w.rows.m0(t);
      for (i64 n0 = 0; n0 < p.N; n0 += kDepth)
        w.l.dot(p.dy.at(m0, n0), kKeepAll, {w.b_panel + w.l.dot_column(n0), w.ldn},
                {w.rows.rows(t), std::min(kDepth, p.N - n0), p.R}, {w.g + m0 * p.R, p.R}, n0 > 0);
    }
  }
  if (!p.db && !(w.need_g && w.one_pass)) return;
  const Panel H = w.h_packed ? Panel{w.h32, p.R} : Panel{static_cast<const float*>(p.h.data), p.h.ld};
#pragma omp for schedule(dynamic, 1) nowait
  for (i64 t = 0; t < w.over_n.size(); ++t) {
    const i64 n0 = w.over_n.k0(t), width = w.over_n.width(t), first = w.over_n.m0(t), last = first + w.over_n.rows(t);
    const Sums D{p.db ? w.db_part + t / w.over_n.C * p.R * w.ldn + n0 : nullptr, w.ldn};
    if (p.db) clear(D, p.R, width);
    for (i64 c0 = 0; c0 < width; c0 += kDepth) {
      const i64 cols = std::min(kDepth, width - c0);
      for (i64 m0 = first; m0 < last; m0 += kTileRows) {
        const i64 n = std::min(kTileRows, last - m0);
        const Tile tile = p.dy.at(m0, n0 + c0);
        if (w.need_g && w.one_pass)
          w.l.dot(tile, kKeepAll, {w.b_panel + w.l.dot_column(n0 + c0), w.ldn}, {n, cols, p.R},
                  {w.g + t % w.over_n.C * M * p.R + m0 * p.R, p.R}, c0 > 0);
        if (p.db) w.l.outer(tile, kKeepAll, H.at(m0, 0), {n, cols, p.R}, D.at(0, c0));
      }
    }
  }
}

// Sum the parts of g, and pack it for the products of dx and da. Sum the parts of db, and write it.
void sum_over_dy(const Branch& p, const Work& w, i64 M, bool dx) {
  if (w.need_g) {
#pragma omp for schedule(static) nowait
    for (i64 t = 0; t < w.rows.size(); ++t) {
      float* const gm = w.g + w.rows.m0(t) * p.R;
      sum_parts(gm, w.rows.rows(t) * p.R, gm, M * p.R, w.g_parts);
      const Tile sum{gm, p.R, DType::f32};
      const float c = p.dropout.rescale();
      if (dx) w.l.expand_rows(sum, w.rows.rows(t), p.R, c * p.scale, w.g_rows + w.rows.m0(t) * p.R);
      if (p.da) w.l.outer_rows(sum, w.rows.rows(t), p.R, p.scale, gm);
    }
  }
  if (!p.db) return;
#pragma omp for schedule(static) nowait
  for (i64 n0 = 0; n0 < p.N; n0 += kReduce) {
    const i64 width = std::min(kReduce, p.N - n0);
    for (i64 r = 0; r < p.R; ++r) {
      float* const D = w.db_part + r * w.ldn + n0;
      sum_parts(D, width, D, p.R * w.ldn, w.over_n.S);
    }
    kernels().write_t({w.db_part + n0, w.ldn}, p.R, width, p.scale, p.db.at(n0, 0));
  }
}

// Sum the parts of da, one for each of `slabs` slabs of rows, and write it.
void sum_da(const Branch& p, const Work& w, i64 K, i64 ldk, i64 slabs) {
  if (!p.da) return;
#pragma omp for schedule(static) nowait
  for (i64 k0 = 0; k0 < K; k0 += kReduce) {
    const i64 width = std::min(kReduce, K - k0);
    for (i64 r = 0; r < p.R; ++r) {
      float* const D = w.da_part + r * ldk + k0;
      sum_parts(D, width, D, p.R * ldk, slabs);
    }
    kernels().write({w.da_part + k0, ldk}, p.R, width, p.dropout.rescale(), p.da.at(0, k0));
  }
}

// dx and g^T x over the rows and columns of a part: what each branch adds to dx, and to its da. A tile of dx and x
// serves every branch, and a branch's keep bits serve both products. `bits` is memory for them, `ld` bytes a row.
struct Last {
  const std::vector<Branch>& branches;
  const std::vector<Work>& works;
  i64 ldk, ld;
  Tile x, dx;

  // With `da`, sums go to the parts of da from `slab` on. k0 may be any column for dx, and a multiple of 64 for da.
  void add(i64 m0, i64 rows, i64 k0, i64 cols, bool to_dx, bool to_da, i64 slab, uint8_t* bits) const {
    for (size_t i = 0; i < works.size(); ++i) {
      const Branch& p = branches[i];
      const Work& w = works[i];
      const bool da = to_da && p.da;
      if (!w.need_g || !(da || to_dx)) continue;
      const uint32_t threshold = p.dropout.threshold;
      const i64 before = threshold ? k0 % 64 : 0;  // keep bits come in groups of 64 columns
      const Keep keep = Keep{threshold ? bits : nullptr, ld}.at(0, before);
      if (threshold) kernels().keep_bits(p.dropout.seed, threshold, m0, k0 - before, rows, before + cols, bits, ld);
      if (da)
        w.l.outer(x.at(m0, k0), keep, {w.g + m0 * p.R, p.R}, {rows, cols, p.R},
                  {w.da_part + slab * p.R * ldk + k0, ldk});
      if (to_dx)
        w.l.expand(dx.at(m0, k0), keep, nullptr, {w.g_rows + m0 * p.R, p.R}, {w.a_panel + k0, ldk}, {rows, cols, p.R});
    }
  }
};

}  // namespace

void backward(int threads, i64 M, i64 K, Tile x, Tile dx, const std::vector<Branch>& branches) {
  const i64 ldk = panel_stride(K);
  std::vector<Work> works;
  works.reserve(branches.size());
  double products = 0;
  i64 largest = 0, part = 0;           // the largest rank; the most columns of a part of dx
  size_t last_many = branches.size();  // the branch whose product completes dx; none if this is beyond the branches
  bool drop = false;
  for (const Branch& p : branches) {
    if (p.base || p.many) products += static_cast<double>(p.N) * K;
    if (p.many) last_many = works.size();
    const Work& w = works.emplace_back(p, M, K, static_cast<bool>(dx));
    products += static_cast<double>(p.R) * ((w.need_g ? p.N : 0) + (p.db ? p.N : 0) + (dx ? K : 0) + (p.da ? K : 0));
    largest = std::max(largest, p.R);
    drop |= p.dropout.threshold != 0;
  }
  threads = team(threads, 2.0 * M * products);
  const Grid over_k = fused_grid(M, K, largest);

  Scratch scratch;
  uint8_t* bits;
  i64 ld = 0, bits_per_thread = 0;  // bytes
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    for (size_t i = 0; i < works.size(); ++i) {
      const Branch& p = branches[i];
      Work& w = works[i];
      w.a_panel = scratch.floats(w.a_packed ? p.R * ldk : 0);
      w.b_panel = scratch.floats(w.need_g ? p.R * w.ldn : 0);
      w.h32 = scratch.floats(w.h_packed ? M * p.R : 0);
      w.g = scratch.floats(w.need_g ? w.g_parts * M * p.R : 0);
      w.g_rows = scratch.floats(dx ? M * p.R : 0);
      w.db_part = scratch.floats(p.db ? w.over_n.S * p.R * w.ldn : 0);
      w.da_part = scratch.floats(p.da ? over_k.S * p.R * ldk : 0);
      if (p.base) p.base->take(scratch, threads);
      if (p.many) p.many->take(scratch, threads);
      if (p.many) part = std::max(part, p.many->width());
    }
    ld = std::max(over_k.chunk, round_up(part, 64) + 64) / 8;
    bits_per_thread = drop ? kTileRows * ld : 0;
    bits = scratch.bytes(threads * bits_per_thread);
  }

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (size_t i = 0; i < works.size(); ++i) pack_operands(branches[i], works[i], ldk);
    for (const Branch& p : branches) {
      if (!p.base) continue;
#pragma omp single
      p.base->arrange();
#pragma omp for schedule(dynamic, 1)  // without nowait, because the next branch adds to the same dx
      for (i64 t = 0; t < p.base->strips(); ++t) p.base->strip(t, nullptr);
    }
#pragma omp barrier

    // dy b and dy^T h: one pass over each dy where the rank is small
    for (size_t i = 0; i < works.size(); ++i) pass_over_dy(branches[i], works[i], M);
#pragma omp barrier
    for (size_t i = 0; i < works.size(); ++i) sum_over_dy(branches[i], works[i], M, static_cast<bool>(dx));
#pragma omp barrier

    uint8_t* const my_bits = drop ? bits + worker() * bits_per_thread : nullptr;
    const Last last{branches, works, ldk, ld, x, dx};
    const bool many = last_many < works.size();
    for (size_t i = 0; i < works.size(); ++i) {
      if (!branches[i].many) continue;
      const Tail tail = [&](i64 m0, i64 rows, i64 k0, i64 cols) {
        last.add(m0, rows, k0, cols, true, false, 0, my_bits);
      };
      if (i) {
#pragma omp barrier
      }
#pragma omp for schedule(dynamic, 1) nowait  // a thread goes on to da while another completes dx
      for (i64 t = 0; t < branches[i].many->tasks(); ++t) branches[i].many->task(t, i == last_many ? tail : Tail{});
    }
#pragma omp for schedule(dynamic, 1)
    for (i64 t = 0; t < over_k.size(); ++t) {
      const i64 k0 = over_k.k0(t), width = over_k.width(t), end = over_k.m0(t) + over_k.rows(t), slab = t / over_k.C;
      for (size_t i = 0; i < works.size(); ++i)
        if (branches[i].da) clear({works[i].da_part + slab * branches[i].R * ldk + k0, ldk}, branches[i].R, width);
      for (i64 m0 = over_k.m0(t); m0 < end; m0 += kTileRows)
        last.add(m0, std::min(kTileRows, end - m0), k0, width, dx && !many, true, slab, my_bits);
    }
    for (size_t i = 0; i < works.size(); ++i) sum_da(branches[i], works[i], K, ldk, over_k.S);
  }
}

}  // namespace lk::cpu
