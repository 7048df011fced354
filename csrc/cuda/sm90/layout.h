// The places of elements in memory and registers: tile sizes, swizzles, wgmma descriptors and fragments, pipeline
// positions. It is arithmetic only,
// so that a host compiler can check all of it (tests/backends/cuda/test_sm90_schedule.py). Nothing here needs CUDA.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LK_CONSTEXPR __host__ __device__ constexpr
#else
#define LK_CONSTEXPR constexpr
#endif

namespace lk::sm90 {

constexpr int kTileM = 128;  // rows of an h, g, y or dx tile; columns of dy or x in a da or db tile
constexpr int kTileK = 64;   // contraction per pipeline stage: 128 bytes, one swizzle span
constexpr int kGroups = 2;   // consumer warpgroups, 64 of the 128 rows each
constexpr int kConsumers = kGroups * 128;
constexpr int kThreads = kConsumers + 128;  // with one warpgroup for the producer
constexpr int kSharedLimit = 232448;        // bytes a block can have on sm_90
constexpr int kBoxBytes = 64 * kTileK * 2;  // a 64 x 64 box of 16-bit elements
constexpr int kMaxRank = 256;

LK_CONSTEXPR int ceil_div(int a, int b) { return a / b + (a % b != 0); }
LK_CONSTEXPR int round_up(int a, int b) { return ceil_div(a, b) * b; }

// The rank of an h, g, da or db tile: R padded with zeros to 16, 64 or 128. Above 128 there are two rank tiles of 128.
// Tiles of rank 32 would save at most 2 % of the products where N and K are 4096, and no reads of memory,
// because the padding is not loaded.
LK_CONSTEXPR int padded_rank(int r) { return r <= 16 ? 16 : r <= 64 ? 64 : 128; }
LK_CONSTEXPR int rank_tiles(int r) { return r <= 128 ? 1 : 2; }
// The rows of x in the decode kernel: M padded with rows of zeros.
constexpr int kDecodeRows = 64;
LK_CONSTEXPR int decode_rows(int m) { return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : kDecodeRows; }
// Pipeline stages of the low-rank steps of a y or dx tile.
LK_CONSTEXPR int rank_stages(int r) { return ceil_div(r, kTileK); }

// Bytes in a row of a box of rank RP, which is also its swizzle: shared memory holds boxes of at most 64 columns of
// 16-bit elements.
LK_CONSTEXPR int rank_width(int rp) { return (rp < 64 ? rp : 64) * 2; }

// A position in the pipeline. The phases of a barrier alternate; `parity` is that of the phase to wait for.
template <int STAGES>
struct Ring {
  int slot = 0;
  uint32_t parity;
  LK_CONSTEXPR explicit Ring(uint32_t first_parity) : parity(first_parity) {}
  LK_CONSTEXPR void next() {
    if (++slot == STAGES) {
      slot = 0;
      parity ^= 1;
    }
  }
};
constexpr uint32_t kFilled = 0;  // a consumer's first wait is for phase 0 of a "full" barrier
// A producer's first wait passes: the phase before the first one of a fresh barrier counts as complete.
constexpr uint32_t kVacant = 1;

// Byte offset, in a box whose rows are `width` = 32 or 128 bytes long, of byte `byte` of row `row`, under TMA's
// swizzle of that width: address bits 4.. are xored with bits 7.. (1 or 3 of them). The box starts at a multiple of
// 1024 bytes.
LK_CONSTEXPR uint32_t swizzled(uint32_t row, uint32_t byte, uint32_t width) {
  const uint32_t address = row * width + byte;
  return address ^ ((address >> 3) & (width - 16));
}

// Shared-memory matrix descriptor of wgmma. Byte strides: `leading`, `stride` as in the PTX ISA, "Matrix descriptor
// format".
LK_CONSTEXPR uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride, uint32_t width) {
  const uint64_t layout = width == 128 ? 1 : 3;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | layout << 62;
}

// An operand whose contraction index is contiguous: rows of 64 elements under the 128-byte swizzle. Eight rows are 1024
// bytes apart.
struct KMajor {
  static constexpr int kTranspose = 0;
  static constexpr uint32_t kWidth = 128, kLeading = 16, kStride = 1024,
                            kStep = 32;  // kStep: bytes to the next 16 of the contraction
  LK_CONSTEXPR static uint64_t at(uint32_t address) { return descriptor(address, kLeading, kStride, kWidth); }
};

// An operand whose other index is contiguous: boxes of 64 contraction rows, WIDTH bytes each. Eight contraction rows
// are 8 * WIDTH bytes apart (stride), the boxes of the next WIDTH bytes 64 * WIDTH (leading).
template <int WIDTH>
struct MnMajor {
  static_assert(WIDTH == 32 || WIDTH == 128);
  static constexpr int kTranspose = 1;
  static constexpr uint32_t kWidth = WIDTH, kLeading = 64 * WIDTH, kStride = 8 * WIDTH, kStep = 16 * WIDTH;
  LK_CONSTEXPR static uint64_t at(uint32_t address) { return descriptor(address, kLeading, kStride, kWidth); }
};

// Return the row and the column that register `reg` of thread `thread` of the warpgroup holds of a 64 x N tile of wgmma
// accumulators. A thread has N/2 registers.
LK_CONSTEXPR int fragment_row(int thread, int reg) { return thread / 32 * 16 + thread % 32 / 4 + (reg & 2) * 4; }
LK_CONSTEXPR int fragment_col(int thread, int reg) { return reg / 4 * 8 + thread % 4 * 2 + (reg & 1); }

// Returns the offset that lane `lane` of warp `warp` gives stmatrix.x4 for the 16 columns `pair` of a 64 x 64 box. Its
// four 8x8 matrices are the registers of accumulators 8 pair + {0,1}, {2,3}, {4,5}, {6,7}: rows 0-7 and 8-15 of the
// left 8 columns, then of the right 8.
LK_CONSTEXPR uint32_t stmatrix_offset(int warp, int lane, int pair) {
  return swizzled(warp * 16 + lane % 16, (pair * 2 + lane / 16) * 16, 128);
}

// A 64 x 64 box is masked in place by 128 threads. Each takes 4 chunks of 8 elements of a row, with one Philox call for
// each chunk.
constexpr int kChunksPerThread = 64 * 8 / 128;
LK_CONSTEXPR int chunk_row(int thread, int i) { return i * 16 + thread / 8; }
LK_CONSTEXPR int chunk_col(int thread) { return thread % 8; }

// The four lanes of a quad transpose 4 x 4 words in two exchanges, with bit = 1 and then 2. Lane q sends `quad_sent` to
// lane q ^ bit, which stores it by `quad_put`. Afterwards word v of lane q holds what word q of lane v held.
LK_CONSTEXPR uint32_t quad_sent(const uint32_t (&word)[4], int q, int bit, int i) {
  const int low = bit == 1 ? 2 * i : i;
  return q & bit ? word[low] : word[low + bit];
}
LK_CONSTEXPR void quad_put(uint32_t (&word)[4], int q, int bit, int i, uint32_t received) {
  const int low = bit == 1 ? 2 * i : i;
  if (q & bit)
    word[low] = received;
  else
    word[low + bit] = received;
}

// A Philox word has two 16-bit lanes, for two neighbouring elements. Returns all ones in the lanes that are kept.
LK_CONSTEXPR uint32_t keep_pair(uint32_t word, uint32_t threshold) {
  return ((word & 0xFFFFu) >= threshold ? 0xFFFFu : 0u) | ((word >> 16) >= threshold ? 0xFFFF0000u : 0u);
}

// Returns the same as keep_pair, with one bit for each lane.
LK_CONSTEXPR uint32_t keep_bits(uint32_t word, uint32_t threshold) {
  return ((word & 0xFFFFu) >= threshold ? 1u : 0u) | ((word >> 16) >= threshold ? 2u : 0u);
}

// The place of the bit for accumulator `reg` of a 64 x N tile. A word holds 32 accumulators in four parts: two rows
// (fragment_row of registers 0 and 2) of two times 32 columns.
LK_CONSTEXPR int keep_word(int reg) { return reg / 32; }
LK_CONSTEXPR int keep_bit(int reg) { return (reg / 16 % 2 * 2 + reg / 2 % 2) * 8 + reg / 4 % 4 * 2 + reg % 2; }
LK_CONSTEXPR int keep_row(int part) { return part % 2 * 8; }
// The first of the four groups of 8 columns of a part.
LK_CONSTEXPR int keep_group(int word, int part) { return word * 8 + part / 2 * 4; }

// Shared memory of the ticket kernels: STAGES x (A box | B box), the staging of stores, barriers.
template <int BN, int RP>
struct Tile {
  static_assert(BN == 128 || BN == 256);
  static_assert(RP == 16 || RP == 64 || RP == 128);
  static constexpr int kWidth = rank_width(RP);       // bytes a row of an MN-major operand of rank RP
  static constexpr int kRankBoxes = RP * 2 / kWidth;  // boxes that the operand takes
  static constexpr int kRankSteps =
      (RP < kTileK ? RP : kTileK) / 16;  // k16 steps of a stage of the low-rank steps; the rest is zeros
  static constexpr int kBytesA = kTileM * kTileK * 2;
  static constexpr int kBytesB = BN * kTileK * 2;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kSkinnyBytes = kBytesA + RP * kTileK * 2;  // loaded in a stage of an h, g, da or db tile
  static constexpr int kOutBytes = kBytesA + BN * kTileK * 2;     // loaded in a stage of a y or dx tile, with zero fill
  static constexpr int kStagingBytes = kGroups * 2 * kBoxBytes;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kAlign = 1024;
  static constexpr int kFit = (kSharedLimit - kAlign - kStagingBytes - kBarrierBytes) / kStageBytes;
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static constexpr int kSharedBytes = kAlign + kStages * kStageBytes + kStagingBytes + kBarrierBytes;
  static_assert(kStages >= 4 && kSharedBytes <= kSharedLimit);
  static_assert(kStageBytes % 1024 == 0,
                "boxes start at multiples of 1024 bytes: the swizzle is a function of the address");
};

// Shared memory of the decode kernel: a stage is 128 rows of w or a, and all MP >= M rows of x.
template <int MP>
struct DecodeTile {
  static_assert(MP == 8 || MP == 16 || MP == 32 || MP == 64);
  static constexpr int kBytesA = kTileM * kTileK * 2;
  static constexpr int kStageBytes = kBytesA + MP * kTileK * 2;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kAlign = 1024;
  static constexpr int kFit = (kSharedLimit - kAlign - kBarrierBytes) / kStageBytes;
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static constexpr int kSharedBytes = kAlign + kStages * kStageBytes + kBarrierBytes;
  static_assert(kSharedBytes <= kSharedLimit && kStageBytes % 1024 == 0);
};

}  // namespace lk::sm90
