#include "grid.h"
#include "isa.h"
#include "lora.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kDepth = 1024;  // columns of x (and of a's panel) per pass: 8 rows of the panel stay in L1
constexpr i64 kRows = 48;     // rows of x or y per task
constexpr i64 kWidth = 4096;  // columns of y per task

// Up to this many rows of x, b is read in place. For more rows it pays to transpose b first.
constexpr i64 kRowsInPlace = 4;
// For so few rows, the tasks are cut along R and N. Reading a, b and w takes the time there, so each of their elements
// counts as 16 products when the number of threads is chosen.
constexpr i64 kFewRanks = 8;     // rows of a per task
constexpr i64 kFewWidth = 1024;  // columns of y per task
constexpr i64 kFewWeight = 16;

// Sizes, tasks and memory of a branch, beside its operands.
struct Work {
  const LowRank& l;
  bool a_packed, b_packed, convert_bias;
  i64 ldk, ldn;
  Grid pack_a, pack_b, tiles;
  float *h32 = nullptr, *a_panel = nullptr, *b_panel = nullptr, *bias32 = nullptr;

  Work(const Branch& p, i64 M, i64 K, DType x, bool in_place)
      : l(in_place ? *kernels().fp32 : kernels().low_rank(x, p.a.dtype)),
        a_packed(!in_place || p.a.dtype != DType::f32),
        b_packed(!in_place),
        convert_bias(p.bias && p.bias.dtype != DType::f32 && !p.many),
        ldk(panel_stride(K)),
        ldn(panel_stride(p.N)),
        pack_a(make_grid(p.R, K, p.R, 512)),
        pack_b(make_grid(p.N, p.R, 128, p.R)),
        tiles(make_grid(M, p.N, kRows, in_place ? kFewWidth : kWidth)) {}

  const float* bias(const Branch& p) const { return convert_bias ? bias32 : static_cast<const float*>(p.bias.data); }
  Sums h(const Branch& p) const { return {h32, p.R}; }
  Panel a(const Branch& p) const {
    return a_packed ? Panel{a_panel, ldk} : Panel{static_cast<const float*>(p.a.data), p.a.ld};
  }
};

// Pack the operands of the products.
void pack_operands(const Branch& p, const Work& w) {
  if (p.base) {
#pragma omp single nowait
    p.base->arrange();
  }
  if (w.convert_bias) {
#pragma omp single nowait
    kernels().read(p.bias, 1, p.N, 1.0f, {w.bias32, p.N});
  }
  if (w.a_packed) {
#pragma omp for schedule(static) nowait
    for (i64 t = 0; t < w.pack_a.size(); ++t) {
      const i64 k0 = w.pack_a.k0(t);
      w.l.dot_panel(p.a.at(0, k0), p.R, w.pack_a.width(t), {w.a_panel + w.l.dot_column(k0), w.ldk});
    }
  }
  if (w.b_packed) {
#pragma omp for schedule(static) nowait
    for (i64 t = 0; t < w.pack_b.size(); ++t) {
      const i64 n0 = w.pack_b.m0(t);
      w.l.expand_panel_t(p.b.at(n0, 0), w.pack_b.rows(t), p.R, {w.b_panel + n0, w.ldn});
    }
  }
}

// A part of x and of a: its first row and column of x, its first row of a, and its sizes.
struct Part {
  i64 m0, k0, r0;
  Extent size;
};

// h[m0.., r0..] (+)= keep(x) a^T over the columns of the part, not yet scaled. `bits` is memory for its keep bits.
void dot_x(const Branch& p, const Work& w, Tile x, Part t, uint8_t* bits) {
  const uint32_t threshold = p.dropout.threshold;
  if (threshold) kernels().keep_bits(p.dropout.seed, threshold, t.m0, t.k0, t.size.rows, t.size.cols, bits, kDepth / 8);
  w.l.dot(x.at(t.m0, t.k0), {threshold ? bits : nullptr, kDepth / 8}, w.a(p).at(t.r0, w.l.dot_column(t.k0)), t.size,
          w.h(p).at(t.m0, t.r0), t.k0 > 0);
}

// Write h to its output, if it has one, and pack it for the product with b.
void finish_h(const Branch& p, const Work& w, i64 m0, i64 rows) {
  const Sums h = w.h(p).at(m0, 0);
  const float c = p.dropout.rescale();
  if (p.h) kernels().write(h, rows, p.R, c, p.h.at(m0, 0));
  w.l.expand_rows({h.data, h.ld, DType::f32}, rows, p.R, c * p.scale, h.data);
}

// y += s h b^T, and the bias, unless the base product has it. `column` is memory of the calling thread for kWidth
// floats, used where b is read in place.
void add_to_y(const Branch& p, const Work& w, bool in_place, float* column) {
  const bool has_bias = p.base || (p.many && p.y.dtype != DType::f32);
  const float* const bias = has_bias ? nullptr : w.bias(p);
  const auto expand = [&](i64 m0, i64 rows, i64 n0, i64 cols) {
    w.l.expand(p.y.at(m0, n0), kKeepAll, bias ? bias + n0 : nullptr, w.h(p).at(m0, 0), {w.b_panel + n0, w.ldn},
               {rows, cols, p.R});
  };
  if (p.many) {
    const Tail tail = expand;
#pragma omp for schedule(dynamic, 1) nowait
    for (i64 t = 0; t < p.many->tasks(); ++t) p.many->task(t, tail);
    return;
  }
#pragma omp for schedule(dynamic, 1) nowait
  for (i64 t = 0; t < w.tiles.size(); ++t) {
    const i64 m0 = w.tiles.m0(t), n0 = w.tiles.k0(t), width = w.tiles.width(t), n = w.tiles.rows(t);
    if (!in_place) {
      expand(m0, n, n0, width);
      continue;
    }
    const float one = 1.0f;
    const float* const bias_n = bias ? bias + n0 : nullptr;
    for (i64 m = m0; m < m0 + n; ++m) {
      const Sums h = w.h(p).at(m, 0);
      if (p.b.dtype == DType::f32)  // with b as the panel, its rows share the sums over lanes; the bits are the same
        w.l.dot({h.data, h.ld, DType::f32}, kKeepAll, {static_cast<const float*>(p.b.at(n0, 0).data), p.b.ld},
                {1, p.R, width}, {column, width}, false);
      else
        w.l.dot(p.b.at(n0, 0), kKeepAll, h, {width, p.R, 1}, {column, 1}, false);
      w.l.expand(p.y.at(m, n0), kKeepAll, bias_n, {&one, 1}, {column, width}, {1, width, 1});
    }
  }
}

}  // namespace

void forward(int threads, i64 M, i64 K, Tile x, const std::vector<Branch>& branches) {
  const bool in_place = M <= kRowsInPlace;
  std::vector<Work> works;
  works.reserve(branches.size());
  double products = 0;
  bool drop = false;
  for (const Branch& p : branches) {
    works.emplace_back(p, M, K, x.dtype, in_place);
    products += static_cast<double>(p.R) * (K + p.N);
    if (p.base || p.many) products += static_cast<double>(p.N) * K;
    drop |= p.dropout.threshold != 0;
  }
  threads = team(threads, 2.0 * (in_place ? std::min(M, i64{1}) * kFewWeight : M) * products);
  const i64 task_rows = std::clamp<i64>(round_up(ceil_div(M, 4 * threads), 6), 6, kRows);
  const Grid rows = make_grid(M, K, task_rows, std::max<i64>(K, 1));

  Scratch scratch;
  float* columns;
  uint8_t* bits;
  const i64 bits_per_thread = drop ? task_rows * kDepth / 8 : 0;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    for (size_t i = 0; i < works.size(); ++i) {
      const Branch& p = branches[i];
      Work& w = works[i];
      w.h32 = scratch.floats(M * p.R);
      w.a_panel = scratch.floats(w.a_packed ? p.R * w.ldk : 0);
      w.b_panel = scratch.floats(w.b_packed ? p.R * w.ldn : 0);
      w.bias32 = scratch.floats(w.convert_bias ? p.N : 0);
      if (p.base) p.base->take(scratch, threads);
      if (p.many) p.many->take(scratch, threads);
    }
    columns = scratch.floats(in_place ? threads * kWidth : 0);
    bits = scratch.bytes(threads * bits_per_thread);
  }

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (size_t i = 0; i < works.size(); ++i) pack_operands(branches[i], works[i]);
#pragma omp barrier
    uint8_t* const my_bits = drop ? bits + worker() * bits_per_thread : nullptr;
    if (in_place) {
      for (size_t i = 0; i < works.size(); ++i) {
        const Branch& p = branches[i];
        const Work& w = works[i];
#pragma omp for schedule(static) nowait
        for (i64 r0 = 0; r0 < p.R; r0 += kFewRanks) {
          for (i64 k0 = 0; k0 < K; k0 += kDepth)
            dot_x(p, w, x, {0, k0, r0, {M, std::min(kDepth, K - k0), std::min(kFewRanks, p.R - r0)}}, my_bits);
        }
      }
    } else {
#pragma omp for schedule(dynamic, 1) nowait
      for (i64 t = 0; t < rows.size(); ++t) {
        const i64 m0 = rows.m0(t), n = rows.rows(t);
        i64 k0 = 0;
        do {
          const i64 depth = std::min(kDepth, K - k0);
          for (size_t i = 0; i < works.size(); ++i)
            dot_x(branches[i], works[i], x, {m0, k0, 0, {n, depth, branches[i].R}}, my_bits);
          k0 += depth;
        } while (k0 < K);
        for (size_t i = 0; i < works.size(); ++i) finish_h(branches[i], works[i], m0, n);
      }
    }
    for (size_t i = 0; i < works.size(); ++i) {
      const Branch& p = branches[i];
      if (!p.base) continue;
#pragma omp for schedule(dynamic, 1) nowait
      for (i64 t = 0; t < p.base->strips(); ++t) p.base->strip(t, works[i].bias(p));
    }
#pragma omp barrier
    if (in_place) {
#pragma omp single
      for (size_t i = 0; i < works.size(); ++i) finish_h(branches[i], works[i], 0, M);
    }
    for (size_t i = 0; i < works.size(); ++i) add_to_y(branches[i], works[i], in_place, columns + worker() * kWidth);
  }
}

}  // namespace lk::cpu
