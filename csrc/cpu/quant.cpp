#include "quant.h"

#include "few.h"
#include "gemm_tasks.h"
#include "grid.h"
#include "isa.h"
#include "scratch.h"

namespace lk::cpu {
namespace {

constexpr i64 kStrip = 128;       // rows of w per task of few rows of x
constexpr i64 kDepth = 1024;      // columns of decoded rows per product
constexpr i64 kTurnedRows = 128;  // rows of w per task of `dequantize`, where w is turned
constexpr i64 kDecodeRows = 32;   // rows that are decoded together: a multiple of Gemm::width

float scale_of(const Quantized& w, i64 i) {
  if (!w.table) return static_cast<const float*>(w.scales)[i];
  return w.table[static_cast<const uint8_t*>(w.scales)[i]] * w.absmax[i / kNested] + w.offset;
}

// The scales of `rows` rows of w, one to every `segment` columns.
struct Strip {
  const float* scales;
  i64 lds, segment, rows;
};

// The scales of rows n0 and the next n - 1 of fp8; of fewer rows where a block of rows ends before.
Strip fp8_strip(const Quantized& w, i64 n0, i64 n) {
  const float* const scales = static_cast<const float*>(w.scales);
  const i64 segment = w.scale_cols == 1 ? w.K : kFp8Block;
  if (w.scale_rows == 1) return {scales, 0, segment, n};
  if (w.scale_rows == w.N && w.scale_cols == 1) return {scales + n0, 1, segment, n};
  return {scales + n0 / kFp8Block * w.scale_cols, 0, segment, std::min(n, kFp8Block - n0 % kFp8Block)};
}

// Whether the codes are int8 with a scale for whole groups of each row, and no zeros.
bool is_int8_by_groups(const Quantized& w) {
  const Integers& i = w.integers;
  return w.format == Format::integers && i.layout == IntLayout::signed_rows && !i.zeros &&
         i.scales.dtype == DType::f32 && w.K % i.group == 0;
}

// Whether every row of w consists of whole blocks, or every block of whole rows.
bool has_segments(const Quantized& w) {
  if (w.format == Format::integers) return is_int8_by_groups(w);
  return !w.four_bits() || w.K % w.blocksize == 0 || (w.K && w.blocksize % w.K == 0);
}

// The number of scales that strip_of may write for a row.
i64 segments(const Quantized& w) { return w.four_bits() && w.K % w.blocksize == 0 ? w.K / w.blocksize : 1; }

// The floats that decode_rows needs for `rows` rows of at most `cols` columns of w as it is stored.
i64 room_for(const Quantized& w, i64 rows, i64 cols) {
  return w.format == Format::integers && !has_segments(w) ? scale_room(w.integers, cols) + cols : rows * segments(w);
}

// The scales of n rows of a w that has segments, or of the first of them. `room` holds n * segments(w) floats.
Strip strip_of(const Quantized& w, i64 n0, i64 n, float* room) {
  const float* const scales = static_cast<const float*>(w.scales);
  if (w.format == Format::int8) return {scales + n0, 1, w.K, n};
  if (w.format == Format::fp8) return fp8_strip(w, n0, n);
  if (w.format == Format::integers) {
    const i64 group = w.integers.group, S = w.K / group;
    return {static_cast<const float*>(w.integers.scales.data) + n0 * S, S, group, n};
  }
  const i64 S = segments(w);
  if (S * w.blocksize != w.K) {
    for (i64 i = 0; i < n; ++i) room[i] = scale_of(w, (n0 + i) * w.K / w.blocksize);
    return {room, 1, w.K, n};
  }
  if (!w.table) return {scales + n0 * S, S, w.blocksize, n};
  kernels().quant_scales(static_cast<const uint8_t*>(w.scales), n0 * S, n * S, w.table, w.absmax, w.offset, room);
  return {room, S, w.blocksize, n};
}

QuantRows part(const Quantized& w, const Strip& s, i64 n0) {
  return {w.format, w.codes + n0 * w.row_bytes(), w.row_bytes(), w.levels, s.scales, s.lds, s.segment, s.rows, w.K};
}

// Write w[n0.., k0..] to `out`, as rows of `cols` operands of `g`; w^T[n0.., k0..] where w is turned. `room` is memory
// for room_for(w, rows, cols) floats.
void decode_rows(const Gemm& g, const Quantized& w, i64 n0, i64 rows, i64 k0, i64 cols, float* room, void* out) {
  const i64 size = static_cast<i64>(sizeof(float)) / g.pair;
  if (w.format == Format::integers && !has_segments(w)) {
    if (g.pair == 1) return decode_stored(w.integers, n0, rows, k0, cols, room, static_cast<float*>(out));
    float* const row = room + scale_room(w.integers, cols);
    for (i64 i = 0; i < rows; ++i) {
      decode_stored(w.integers, n0 + i, 1, k0, cols, room, row);
      kernels().write({row, cols}, 1, cols, 1.0f, {static_cast<char*>(out) + i * cols * size, cols, DType::bf16});
    }
    return;
  }
  if (has_segments(w)) {
    for (i64 i = 0, some; i < rows; i += some) {
      const Strip strip = strip_of(w, n0 + i, rows - i, room);
      some = strip.rows;
      g.decode(part(w, strip, n0 + i), k0, cols, static_cast<char*>(out) + i * cols * size);
    }
    return;
  }
  for (i64 i = 0; i < rows; ++i) {
    const i64 first = (n0 + i) * w.K + k0, last = first + cols;  // positions in row-major w, which has the blocks
    for (i64 j = first, end; j < last; j = end) {
      const i64 block = j / w.blocksize;
      const float scale = scale_of(w, block);
      end = std::min((block + 1) * w.blocksize, last);
      g.decode({w.format, w.codes + j / 2, 0, w.levels, &scale, 0, end - j, 1, end - j}, 0, end - j,
               static_cast<char*>(out) + (i * cols + j - first) * size);
    }
  }
}

class Codes : public FewRows {
 public:
  Codes(i64 M, const Quantized& w, Tile x, Tile y)
      : M_(M),
        w_(w),
        x_(x),
        y_(y),
        direct_(has_segments(w)),
        pairs_(direct_ && w.four_bits() && x.dtype == DType::bf16 ? kernels().quant_bf16 : nullptr),
        ldx_(round_up(w.K, kQuantPad) / (pairs_ ? 2 : 1)),
        room_(direct_ ? kStrip * segments(w) : kQuantRows * kDepth + room_for(w, kQuantRows, kDepth)) {}

  void take(Scratch& scratch, int threads) override {
    X_ = scratch.floats(M_ * ldx_);
    parts_ = scratch.floats(threads * kStrip * M_);
    rooms_ = scratch.floats(threads * room_);
  }
  void arrange() override {
    const Sums X{X_, ldx_};
    if (pairs_) return pairs_->arrange(x_, M_, w_.K, X);
    kernels().read(x_, M_, w_.K, 1.0f, X);
    if (direct_) kernels().quant_x(w_.format, X, M_, w_.K);
  }
  i64 strips() const override { return ceil_div(w_.N, kStrip); }
  void strip(i64 t, const float* bias) override {
    const i64 n0 = t * kStrip, n = std::min(kStrip, w_.N - n0);
    const Sums out{parts_ + worker() * kStrip * M_, M_};
    float* const room = rooms_ + worker() * room_;
    if (direct_)
      dot_codes(n0, n, room, out);
    else
      dot_decoded(n0, n, room, out);
    const float factor = direct_ ? quant_factor(w_.format) : 1.0f;
    add_bias(out, n, M_, bias ? bias + n0 : nullptr, factor);
    kernels().write_t(out, n, M_, factor, y_.at(0, n0));
  }

 private:
  // out[i, m], from the codes in registers
  void dot_codes(i64 n0, i64 n, float* room, Sums out) const {
    const auto dot = pairs_ ? pairs_->dot : kernels().quant_dot;
    for (i64 first = 0; first < n;) {
      const Strip strip = strip_of(w_, n0 + first, n - first, room);
      const QuantRows rows = part(w_, strip, n0 + first);
      for (i64 i = 0; i < strip.rows; i += kQuantRows) {
        for (i64 j = 0; j < kQuantRows * strip.lds; j += 16)  // the scales of the rows after the next
          __builtin_prefetch(strip.scales + (i + 2 * kQuantRows) * strip.lds + j);
        dot(rows.part(i, kQuantRows), {X_, ldx_}, M_, out.at(first + i, 0));
      }
      first += strip.rows;
    }
  }
  // out[i, m], from a few rows of w that are decoded at a time, where blocks straddle rows
  void dot_decoded(i64 n0, i64 n, float* room, Sums out) const {
    for (i64 i = 0; i < n; i += kQuantRows) {
      const i64 some = std::min(kQuantRows, n - i);
      for (i64 k0 = 0; k0 < w_.K; k0 += kDepth) {
        const i64 depth = std::min(kDepth, w_.K - k0);
        decode_rows(*kernels().gemm_fp32, w_, n0 + i, some, k0, depth, room + kQuantRows * kDepth, room);
        kernels().fp32->dot({room, depth, DType::f32}, kKeepAll, {X_ + k0, ldx_}, {some, depth, M_}, out.at(i, 0),
                            k0 > 0);
      }
    }
  }

  const i64 M_;
  const Quantized w_;
  const Tile x_, y_;
  const bool direct_;
  const QuantPairs* const pairs_;
  const i64 ldx_, room_;  // floats of a row of X; floats that a thread has for scales or decoded rows
  float *X_ = nullptr, *parts_ = nullptr, *rooms_ = nullptr;
};

}  // namespace

std::unique_ptr<FewRows> few_rows(i64 M, const Quantized& w, Tile x, Tile y) {
  if (w.turned()) return few_rows_turned(M, w.integers, x, y);
  return std::make_unique<Codes>(M, w, x, y);
}

i64 decode_room(const Quantized& w, i64 rows) { return w.turned() ? turned_room(rows) : room_for(w, rows, w.K); }

void decode(const Quantized& w, i64 n0, i64 rows, i64 k0, i64 cols, float* room, float* out) {
  if (w.turned()) return decode_turned(w.integers, n0, rows, k0, cols, room, {out, cols, DType::f32});
  decode_rows(*kernels().gemm_fp32, w, n0, rows, k0, cols, room, out);
}

void dequantize(int threads, const Quantized& w, i64 n0, i64 rows, i64 k0, i64 cols, Tile out) {
  const Kernels& k = kernels();
  threads = team(threads, 8.0 * rows * cols);
  const i64 step = w.turned() ? kTurnedRows : 1;  // rows of a task
  const i64 spare = w.turned() ? turned_room(step) : room_for(w, step, cols);
  Scratch scratch;
  float *numbers, *rooms;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    numbers = scratch.floats(threads * (w.turned() ? 0 : cols));
    rooms = scratch.floats(threads * spare);
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (i64 i = 0; i < rows; i += step) {
    const Tile to = out.at(i, 0);
    float* const room = rooms + worker() * spare;
    if (w.turned()) {
      decode_turned(w.integers, n0 + i, std::min(step, rows - i), k0, cols, room, to);
      continue;
    }
    const bool direct = to.dtype == DType::f32;
    float* const mine = direct ? static_cast<float*>(to.data) : numbers + worker() * cols;
    decode_rows(*k.gemm_fp32, w, n0 + i, 1, k0, cols, room, mine);
    if (!direct) k.write({mine, cols}, 1, cols, 1.0f, to);
  }
}

std::unique_ptr<ManyRows> many_rows(i64 M, const Quantized& w, bool transposed, Tile x, Tile y, bool add, Tile bias) {
  const i64 N = transposed ? w.K : w.N, K = transposed ? w.N : w.K;
  const Gemm* const g = kernels().gemm(x.dtype);
  // some rows of w are decoded at a time, and stay in L1
  const i64 most = g ? std::max(g->group, g->pair * g->depth) / g->pair : 0, numbers = kDecodeRows * most;
  const i64 spare = numbers + (g ? room_for(w, kDecodeRows, most * g->pair) : 0);
  const bool by_rows = transposed != w.turned();  // whether rows of w as it is stored are those of a panel
  return by_panels(M, N, K, x, y, add, bias, spare, [=](i64 n0, i64 cols, i64 k0, i64 depth, float* D, float* P) {
    const i64 column = g->floats(depth);
    for (i64 i = 0, rows; i < (by_rows ? depth : cols); i += rows) {
      rows = std::min(kDecodeRows, (by_rows ? depth : cols) - i);
      if (by_rows) {
        decode_rows(*g, w, k0 + i, rows, n0, cols, D + numbers, D);
        g->pack({D, 1, cols}, cols, rows, column, P + i / g->pair * g->width);
      } else {
        decode_rows(*g, w, n0 + i, rows, k0, depth, D + numbers, D);
        g->pack({D, depth, 1}, rows, depth, column, P + i * column);
      }
    }
  });
}

void quantized_gemm(int threads, i64 M, const Quantized& w, bool transposed, Tile x, Tile y, Tile bias) {
  threads = team(threads, 2.0 * M * w.N * w.K);
  if (M <= kFewRows && !transposed) return run(threads, *few_rows(M, w, x, y), w.N, bias);
  run(threads, *many_rows(M, w, transposed, x, y, false, bias));
}

}  // namespace lk::cpu
