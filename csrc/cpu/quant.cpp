#include "quant.h"

#include "gemm_tasks.h"
#include "grid.h"
#include "isa.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kFewRows = 16;  // up to here every code is read once, or a few times from L1, and meets the rows of x
constexpr i64 kStrip = 128;   // rows of w per task there; a divisor of kFp8Block
constexpr i64 kFp8Block = 128;
constexpr i64 kDepth = 1024;

float scale_of(const Quantized& w, i64 i) {
  if (!w.table) return static_cast<const float*>(w.scales)[i];
  return w.table[static_cast<const uint8_t*>(w.scales)[i]] * w.absmax[i / kNested] + w.offset;
}

const float* fp8_scales(const Quantized& w, i64 n) {
  const i64 row = w.scale_rows == 1 ? 0 : w.scale_rows == w.N && w.scale_cols == 1 ? n : n / kFp8Block;
  return static_cast<const float*>(w.scales) + row * w.scale_cols;
}

void decode_row(const Quantized& w, i64 n, i64 k0, i64 cols, float* out) {
  const Kernels& k = kernels();
  const uint8_t* const row = w.codes + n * w.row_bytes();
  if (w.format == Format::int8) return k.decode(w.format, row + k0, cols, nullptr, scale_of(w, n), out);
  if (w.format == Format::fp8) {
    const float* const scales = fp8_scales(w, n);
    for (i64 j = k0, end; j < k0 + cols; j = end) {
      end = w.scale_cols == 1 ? k0 + cols : std::min((j / kFp8Block + 1) * kFp8Block, k0 + cols);
      k.decode(w.format, row + j, end - j, nullptr, scales[w.scale_cols == 1 ? 0 : j / kFp8Block], out + j - k0);
    }
    return;
  }
  const i64 first = n * w.K + k0, last = first + cols;  // in row-major w, which the blocks are cut from
  for (i64 j = first, end; j < last; j = end) {
    const i64 block = j / w.blocksize;
    end = std::min((block + 1) * w.blocksize, last);
    k.decode(w.format, w.codes + j / 2, end - j, w.levels, scale_of(w, block), out + j - first);
  }
}

// A strip of rows with a scale to every `segment` columns, the same in all rows.
struct Strip {
  const float* scales;
  i64 lds, segment;
};

bool has_segments(const Quantized& w) {
  return !w.four_bits() || w.K % w.blocksize == 0 || (w.K && w.blocksize % w.K == 0);
}

i64 segments(const Quantized& w) { return w.four_bits() && w.K % w.blocksize == 0 ? w.K / w.blocksize : 1; }

Strip strip_of(const Quantized& w, i64 n0, i64 n, float* room) {
  if (w.format == Format::int8) {
    for (i64 i = 0; i < n; ++i) room[i] = scale_of(w, n0 + i) * (1.0f / 127.0f);
    return {room, 1, w.K};
  }
  if (w.format == Format::fp8)
    return {fp8_scales(w, n0), w.scale_rows == w.N && w.scale_cols == 1 ? 1 : 0, w.scale_cols == 1 ? w.K : kFp8Block};
  const i64 S = segments(w);
  if (S * w.blocksize != w.K) {
    for (i64 i = 0; i < n; ++i) room[i] = scale_of(w, (n0 + i) * w.K / w.blocksize);
    return {room, 1, w.K};
  }
  if (!w.table) return {static_cast<const float*>(w.scales) + n0 * S, S, w.blocksize};
  kernels().quant_scales(static_cast<const uint8_t*>(w.scales), n0 * S, n * S, w.table, w.absmax, w.offset, room);
  return {room, S, w.blocksize};
}

void few_rows(int threads, i64 M, const Quantized& w, Tile x, Tile y) {
  const Kernels& k = kernels();
  threads = team(threads, 2.0 * M * w.N * w.K);
  const bool direct = has_segments(w);
  const QuantPairs* const pairs = direct && w.four_bits() && x.dtype == DType::bf16 ? k.quant_bf16 : nullptr;
  const i64 ldx = round_up(w.K, kQuantPad) / (pairs ? 2 : 1), strips = ceil_div(w.N, kStrip),
            room = kStrip * segments(w);
  const float factor = w.format == Format::fp8 ? 256.0f : 1.0f;  // what decoding leaves to the scales
  Scratch scratch;
  float *X, *parts, *rooms;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    X = scratch.floats(M * ldx);
    parts = scratch.floats(threads * kStrip * M);
    rooms = scratch.floats(threads * (direct ? room : kQuantRows * w.K));
  }
  if (pairs) {
    pairs->arrange(x, M, w.K, X, ldx);
  } else {
    k.read(x, M, w.K, 1.0f, X, ldx);
    if (direct) k.quant_x(w.format, X, ldx, M, w.K);
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (i64 t = 0; t < strips; ++t) {
    const i64 n0 = t * kStrip, n = std::min(kStrip, w.N - n0);
    float* const part = parts + worker() * kStrip * M;
    float* const mine = rooms + worker() * (direct ? room : kQuantRows * w.K);
    const Strip strip = direct ? strip_of(w, n0, n, mine) : Strip{};
    for (i64 i = 0; i < n; i += kQuantRows) {
      const i64 some = std::min(kQuantRows, n - i);
      if (direct) {
        for (i64 j = 0; j < kQuantRows * strip.lds; j += 16)  // the scales of the rows after the next
          __builtin_prefetch(strip.scales + (i + 2 * kQuantRows) * strip.lds + j);
        (pairs ? pairs->dot : k.quant_dot)({w.format, w.codes + (n0 + i) * w.row_bytes(), w.row_bytes(), w.levels,
                                            strip.scales + i * strip.lds, strip.lds, strip.segment, some, w.K},
                                           X, ldx, M, part + i * M, M);
        continue;
      }
      for (i64 j = 0; j < some; ++j) decode_row(w, n0 + i + j, 0, w.K, mine + j * w.K);
      for (i64 k0 = 0; k0 < w.K; k0 += kDepth)
        k.fp32->dot(Tile{mine, w.K, DType::f32}.at(0, k0), {nullptr, 0}, X + k0, ldx, some, std::min(kDepth, w.K - k0),
                    M, part + i * M, M, k0 > 0);
    }
    k.write_t(part, M, n, M, direct ? factor : 1.0f, y.at(0, n0));
  }
}

}  // namespace

bool quantized_few(i64 M, bool transposed) { return M <= kFewRows && !transposed; }

void dequantize(int threads, const Quantized& w, i64 n0, i64 rows, i64 k0, i64 cols, Tile out) {
  const Kernels& k = kernels();
  threads = team(threads, 8.0 * rows * cols);
  Scratch scratch;
  float* room;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    room = scratch.floats(threads * cols);
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (i64 i = 0; i < rows; ++i) {
    if (out.dtype == DType::f32) {
      decode_row(w, n0 + i, k0, cols, static_cast<float*>(out.at(i, 0).data));
      continue;
    }
    float* const mine = room + worker() * cols;
    decode_row(w, n0 + i, k0, cols, mine);
    k.write(mine, cols, 1, cols, 1.0f, out.at(i, 0));
  }
}

void quantized_gemm(int threads, i64 M, const Quantized& w, bool transposed, Tile x, Tile y) {
  if (quantized_few(M, transposed)) return few_rows(threads, M, w, x, y);
  const i64 N = transposed ? w.K : w.N, K = transposed ? w.N : w.K;
  gemm_by_panels(threads, M, N, K, x, y, false, 1, [&](i64 n0, i64 cols, i64 k0, i64 depth, float* D, float* P) {
    if (transposed) {
      for (i64 i = 0; i < depth; ++i) decode_row(w, k0 + i, n0, cols, D + i * cols);
      kernels().gemm_pack(D, 1, cols, cols, depth, P);
    } else {
      for (i64 i = 0; i < cols; ++i) decode_row(w, n0 + i, k0, depth, D + i * depth);
      kernels().gemm_pack(D, depth, 1, cols, depth, P);
    }
  });
}

}  // namespace lk::cpu
