#include "integers.h"

#include <algorithm>

#include "few.h"
#include "isa.h"

namespace lk::cpu {
namespace {

// The zeros first.. of w, as floats
void read_zeros(const Integers& w, i64 first, i64 count, float* out) {
  if (w.zero_type == Integers::kInt8) {
    const auto* const zeros = static_cast<const int8_t*>(w.zeros) + first;
    kernels().integers({IntCode::i8, zeros, 0, count, nullptr, nullptr, 0, 0, DType::f32}, out);
  } else if (w.zero_type == Integers::kPacked) {  // `first` and the rows of zeros begin with whole words
    const i64 per_word = w.layout == IntLayout::gptq8 ? 4 : 8;
    const IntCode code = w.layout == IntLayout::awq4    ? IntCode::spread_awq
                         : w.layout == IntLayout::gptq8 ? IntCode::spread8
                                                        : IntCode::spread4;
    const auto* const words = static_cast<const uint32_t*>(w.zeros) + first / per_word;
    kernels().integers({code, words, 0, count, nullptr, nullptr, 0, 0, DType::f32}, out);
  } else {
    const Tile zeros = {const_cast<void*>(w.zeros), 0, static_cast<DType>(w.zero_type)};
    kernels().read(zeros.at(0, first), 1, count, 1.0f, {out, count});
  }
}

void read_scales(const Integers& w, i64 first, i64 count, float* scales, float* zeros) {
  kernels().read(w.scales.at(0, first), 1, count, 1.0f, {scales, count});
  if (w.zeros) read_zeros(w, first, count, zeros);
}

// One row of w, whose codes are consecutive up to the middle of w in `halves`
void decode_row(const Integers& w, i64 n, i64 k0, i64 cols, float* room, float* out) {
  const i64 first = n * w.K + k0, block = first / w.group, blocks = (first + cols - 1) / w.group - block + 1;
  float *const scales = room, *const zeros = room + blocks;
  read_scales(w, block, blocks, scales, zeros);
  const i64 half = w.N / 2 * w.K;
  const bool low = w.layout == IntLayout::halves && first >= half;
  const IntCode code = w.layout == IntLayout::signed_rows ? IntCode::i8
                       : w.layout == IntLayout::rows      ? IntCode::u8
                       : low                              ? IntCode::low
                                                          : IntCode::high;
  const auto* const codes = static_cast<const uint8_t*>(w.codes) + (low ? first - half : first);
  kernels().integers(
      {code, codes, 0, cols, scales, w.zeros ? zeros : nullptr, w.group - first % w.group, w.group, w.scales.dtype},
      out);
}

// Columns k0 and the next `count` - 1 of w, at rows n0.. of it, as rows of `cols` floats; n0 is a multiple of 8.
void decode_columns(const Integers& w, i64 k0, i64 count, i64 n0, i64 cols, float* room, float* out) {
  float *const scales = room, *const zeros = room + cols;
  const auto* const words = static_cast<const uint32_t*>(w.codes);
  i64 read = -1;
  for (i64 k = k0; k < k0 + count; ++k, out += cols) {
    const i64 g = w.order ? w.order[k] : k / w.group;
    if (g != read) read_scales(w, g * w.N + n0, cols, scales, zeros);
    read = g;
    IntRun run{IntCode::word4, nullptr, 0, cols, scales, w.zeros ? zeros : nullptr, 0, 0, w.scales.dtype};
    if (w.layout == IntLayout::awq4) {
      run.code = IntCode::spread_awq;
      run.codes = words + k * (w.N / 8) + n0 / 8;
      __builtin_prefetch(words + (k + 16) * (w.N / 8) + n0 / 8);
    } else {
      const i64 per_word = w.layout == IntLayout::gptq8 ? 4 : 8;
      run.code = w.layout == IntLayout::gptq8 ? IntCode::word8 : IntCode::word4;
      run.shift = static_cast<int>(k % per_word * (32 / per_word));
      run.codes = words + k / per_word * w.N + n0;
      if (k % per_word == 0)
        for (i64 n = 0; n < cols; n += 16) __builtin_prefetch(words + (k / per_word + 2) * w.N + n0 + n);
    }
    kernels().integers(run, out);
  }
}

constexpr i64 kStrip = 256;  // rows of a turned w per task of few rows of x: 16 KB beside kDepth
constexpr i64 kDepth = 16;   // columns of it that are decoded at a time

// y = x w^T for a turned w: a strip of y is a sum of its columns
class Turned : public FewRows {
 public:
  Turned(i64 M, const Integers& w, Tile x, Tile y) : M_(M), w_(w), x_(x), y_(y) {}

  void take(Scratch& scratch, int threads) override {
    X_ = scratch.floats(M_ * w_.K);
    rooms_ = scratch.floats(threads * room());
  }
  void arrange() override { kernels().read(x_, M_, w_.K, 1.0f, {X_, w_.K}); }
  i64 strips() const override { return ceil_div(w_.N, kStrip); }
  void strip(i64 t, const float* bias) override {
    const i64 n0 = t * kStrip, n = std::min(kStrip, w_.N - n0);
    float* const mine = rooms_ + worker() * room();
    float *const sums = mine + scale_room(w_, kStrip), *const part = sums + M_ * kStrip;
    for (i64 m = 0; m < M_; ++m)
      for (i64 i = 0; i < n; ++i) sums[m * n + i] = bias ? bias[n0 + i] : 0.0f;
    for (i64 k = 0; k < w_.K; k += kDepth) {
      const i64 depth = std::min(kDepth, w_.K - k);
      decode_columns(w_, k, depth, n0, n, mine, part);
      kernels().fp32->expand({sums, n, DType::f32}, kKeepAll, nullptr, {X_ + k, w_.K}, {part, n}, {M_, n, depth});
    }
    kernels().write({sums, n}, M_, n, 1.0f, y_.at(0, n0));
  }

 private:
  i64 room() const { return round_up(scale_room(w_, kStrip) + (M_ + kDepth) * kStrip, 16); }

  const i64 M_;
  const Integers w_;
  const Tile x_, y_;
  float *X_ = nullptr, *rooms_ = nullptr;
};

}  // namespace

void decode_stored(const Integers& w, i64 first, i64 rows, i64 at, i64 cols, float* room, float* out) {
  if (w.turned()) return decode_columns(w, first, rows, at, cols, room, out);
  for (i64 i = 0; i < rows; ++i) decode_row(w, first + i, at, cols, room, out + i * cols);
}

void decode_turned(const Integers& w, i64 n0, i64 rows, i64 k0, i64 cols, float* room, Tile out) {
  const i64 skip = n0 % 8, n = rows + skip;
  float* const part = room + 2 * n;
  for (i64 k = 0; k < cols; k += kTurnedColumns) {
    const i64 some = std::min(kTurnedColumns, cols - k);
    decode_columns(w, k0 + k, some, n0 - skip, n, room, part);
    kernels().write_t({part + skip, n}, some, rows, 1.0f, out.at(0, k));
  }
}

std::unique_ptr<FewRows> few_rows_turned(i64 M, const Integers& w, Tile x, Tile y) {
  return std::make_unique<Turned>(M, w, x, y);
}

}  // namespace lk::cpu
