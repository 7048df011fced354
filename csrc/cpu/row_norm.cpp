// The norms that DoRA divides by, in one pass over w and without w + s b a in memory:
//
// n^2 = ||w||^2 + rowsum((2 s w a^T + s^2 b (a a^T)) * b) by rows
#include <cmath>
#include <limits>

#include "grid.h"
#include "isa.h"
#include "lora.h"
#include "quant.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kRows = 24;     // rows of w per task
constexpr i64 kRanks = 8;     // rows of a per task
constexpr i64 kDepth = 1024;  // columns of w at a time: a row of them stays in L1

// A dense w, whose rows are converted where they are not fp32.
struct Dense {
  Tile w;

  i64 room() const { return w.dtype == DType::f32 ? 0 : kRows * kDepth; }
  Tile rows(i64 n0, i64 rows, i64 k, i64 depth, float* room) const {
    const Tile part = w.at(n0, k);
    if (part.dtype == DType::f32) return part;
    kernels().read(part, rows, depth, 1.0f, {room, kDepth});
    return {room, kDepth, DType::f32};
  }
};

// A w in 4 or 8 bits, whose rows are decoded.
struct Codes {
  const Quantized& w;

  i64 room() const { return kRows * kDepth + decode_room(w, kRows); }
  Tile rows(i64 n0, i64 rows, i64 k, i64 depth, float* room) const {
    decode(w, n0, rows, k, depth, room + kRows * kDepth, room);
    return {room, depth, DType::f32};
  }
};

// `room` of w is the memory in which w.rows puts some rows and columns of w, as floats.
template <class W>
void row_norm_of(int threads, i64 N, i64 K, i64 R, const W& w, Tile a, Tile b, float scale, float* n) {
  const LowRank& l = *kernels().fp32;
  const i64 ldk = panel_stride(K), ldr = panel_stride(R);
  threads = team(threads, 2.0 * N * K * (R + 1));
  const Grid tasks = make_grid(N, K, kRows, std::max<i64>(K, 1)), ranks = make_grid(R, K, kRanks, std::max<i64>(K, 1));

  // Each thread keeps, for the rows of its task: w as floats, w a^T, b, b (a a^T) and ||w||^2.
  const i64 floats_per_thread = w.room() + kRows * (2 * R + ldr) + kRows;
  Scratch scratch;
  float *a_panel, *products, *own;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    a_panel = scratch.floats(R * ldk);
    products = scratch.floats(R * ldr);  // a a^T
    own = scratch.floats(threads * round_up(floats_per_thread, 16));
  }

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (i64 r = 0; r < R; ++r) l.dot_panel(a.at(r, 0), 1, K, {a_panel + r * ldk, ldk});
#pragma omp for schedule(static)
    for (i64 t = 0; t < ranks.size(); ++t) {
      const i64 r0 = ranks.m0(t);
      for (i64 k = 0; k < K; k += kDepth)
        l.dot({a_panel + r0 * ldk + k, ldk, DType::f32}, kKeepAll, {a_panel + k, ldk},
              {ranks.rows(t), std::min(kDepth, K - k), R}, {products + r0 * ldr, ldr}, k > 0);
    }

    float* const wide = own + worker() * round_up(floats_per_thread, 16);
    float* const low = wide + w.room();
    float* const b32 = low + kRows * R;
    float* const b_products = b32 + kRows * R;
    float* const square = b_products + kRows * ldr;
#pragma omp for schedule(dynamic, 1)
    for (i64 t = 0; t < tasks.size(); ++t) {
      const i64 n0 = tasks.m0(t), rows = tasks.rows(t);
      for (i64 k = 0; k < K; k += kDepth) {
        const i64 depth = std::min(kDepth, K - k);
        const Tile part = w.rows(n0, rows, k, depth, wide);
        l.dot(part, kKeepAll, {a_panel + k, ldk}, {rows, depth, R}, {low, R}, k > 0);
        for (i64 i = 0; i < rows; ++i) {
          const Tile one = part.at(i, 0);
          l.dot(one, kKeepAll, {static_cast<const float*>(one.data), one.ld}, {1, depth, 1}, {square + i, 1}, k > 0);
        }
      }
      kernels().read(b.at(n0, 0), rows, R, 1.0f, {b32, R});
      l.dot({b32, R, DType::f32}, kKeepAll, {products, ldr}, {rows, R, R}, {b_products, ldr}, false);
      for (i64 i = 0; i < rows; ++i) {
        float more = 0;
        for (i64 r = 0; r < R; ++r)
          more += (2 * scale * low[i * R + r] + scale * scale * b_products[i * ldr + r]) * b32[i * R + r];
        // Where b a cancels a row of w, so do the terms of the sum, and rounding may leave 0 or less.
        const float least = square[i] * std::numeric_limits<float>::epsilon(), sum = square[i] + more;
        n[n0 + i] = std::sqrt(sum < least ? least : sum);  // NaN stays NaN
      }
    }
  }
}

}  // namespace

void row_norm(int threads, i64 N, i64 K, i64 R, Tile w, Tile a, Tile b, float scale, float* n) {
  row_norm_of(threads, N, K, R, Dense{w}, a, b, scale, n);
}

void row_norm(int threads, const Quantized& w, i64 R, Tile a, Tile b, float scale, float* n) {
  row_norm_of(threads, w.N, w.K, R, Codes{w}, a, b, scale, n);
}

}  // namespace lk::cpu
