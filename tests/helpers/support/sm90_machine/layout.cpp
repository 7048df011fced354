// Exhaustive checks of csrc/cuda/sm90/layout.h, compiled by a host compiler. Each returns "" or a text that names
// the fault.
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../../../../csrc/cuda/sm90/schedule.h"
#include "said.h"

using namespace lk::sm90;

extern "C" {

// Each element of a 64 x N tile is held in exactly one accumulator register of one thread.
const char* check_fragments(int N) {
  std::vector<int> seen(64 * N);
  for (int thread = 0; thread < 128; ++thread)
    for (int reg = 0; reg < N / 2; ++reg) ++seen[fragment_row(thread, reg) * N + fragment_col(thread, reg)];
  for (const int times : seen)
    if (times != 1) return say("an element is held " + std::to_string(times) + " times");
  return say("");
}

// The mask bit of each accumulator is drawn from the row, the group of eight columns and the word that belong to the
// accumulator's element. The check repeats keep_part of backward.cuh for the four lanes of a quad at once.
const char* check_keep_bits(int N) {
  for (int thread = 0; thread < 128; thread += 4)
    for (int w = 0; w < N / 64; ++w)
      for (int part = 0; part < 4; ++part) {
        uint32_t word[4][4];  // by lane and word: a number that tells which lane drew it, and as which word
        for (uint32_t q = 0; q < 4; ++q)
          for (uint32_t v = 0; v < 4; ++v) word[q][v] = q * 16 + v;
        for (int bit = 1; bit <= 2; bit *= 2)
          for (int i = 0; i < 2; ++i) {
            uint32_t sent[4];
            for (int q = 0; q < 4; ++q) sent[q] = quad_sent(word[q], q, bit, i);
            for (int q = 0; q < 4; ++q) quad_put(word[q], q, bit, i, sent[q ^ bit]);
          }
        for (int q = 0; q < 4; ++q)
          for (int v = 0; v < 4; ++v)
            for (int e = 0; e < 2; ++e) {
              int reg = -1;
              for (int r = 0; r < N / 2; ++r)
                if (keep_word(r) == w && keep_bit(r) == 8 * part + 2 * v + e) {
                  if (reg >= 0) return say("two accumulators share a bit");
                  reg = r;
                }
              if (reg < 0) return say("a bit of no accumulator");
              const int drawn_by = word[q][v] / 16, drawn_word = word[q][v] % 16;
              const int row = fragment_row(thread, 0) + keep_row(part), group = keep_group(w, part) + drawn_by;
              if (row != fragment_row(thread + q, reg) ||
                  group * 8 + drawn_word * 2 + e != fragment_col(thread + q, reg))
                return say("a bit of the wrong element");
            }
      }
  return say("");
}

// The threads that mask a 64 x 64 box visit every 16-byte chunk once, each at an address of its own inside the box.
const char* check_chunks() {
  std::set<uint32_t> addresses;
  std::set<std::pair<int, int>> chunks;
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < kChunksPerThread; ++i) {
      const int row = chunk_row(thread, i), chunk = chunk_col(thread);
      chunks.insert({row, chunk});
      addresses.insert(swizzled(row, chunk * 16, 128));
    }
  if (chunks.size() != 512 || addresses.size() != 512 || *addresses.rbegin() != 8192 - 16)
    return say("chunks are missing");
  return say("");
}

// stmatrix writes each accumulator of 64 columns to the place that its element has in the swizzled box.
const char* check_stmatrix() {
  for (int thread = 0; thread < 128; ++thread)
    for (int pair = 0; pair < 4; ++pair)
      for (int matrix = 0; matrix < 4; ++matrix)
        for (int e = 0; e < 2; ++e) {
          const int reg = pair * 8 + (matrix / 2) * 4 + (matrix % 2) * 2 + e, lane = thread % 32;
          const uint32_t to = stmatrix_offset(thread / 32, 8 * matrix + lane / 4, pair) + lane % 4 * 4 + e * 2;
          if (to != swizzled(fragment_row(thread, reg), fragment_col(thread, reg) * 2, 128))
            return say("an accumulator is stored in the wrong place");
        }
  return say("");
}

// A wgmma descriptor, read by the canonical layout of the PTX ISA, finds each element where TMA's swizzle has put it.
// A box has 64 rows of `width` bytes. With mn_major its rows are the contraction index, else they are the other index.
// `extent` is the size of the operand's other index, and `step` counts 16 of the contraction.
const char* check_descriptor(int width, int mn_major, int extent, int step, uint32_t base) {
  const uint64_t d = mn_major ? (width == 128 ? MnMajor<128>::at(base) : MnMajor<32>::at(base)) : KMajor::at(base);
  const uint32_t advance = mn_major ? 16 * width : KMajor::kStep;
  const uint64_t moved = d + static_cast<uint64_t>(step) * (advance >> 4);
  const uint32_t start = (moved & 0x3FFF) << 4, leading = (moved >> 16 & 0x3FFF) << 4,
                 stride = (moved >> 32 & 0x3FFF) << 4;
  const uint32_t layout = moved >> 62;
  if ((layout == 1 ? 128 : layout == 3 ? 32 : 0) != width || (moved >> 49 & 7))
    return say("wrong layout bits");
  const int span = width / 2;
  for (int mn = 0; mn < extent; ++mn)
    for (int k = 0; k < 16; ++k) {
      const uint32_t linear = start + (mn_major ? mn % span * 2 + mn / span * leading + k % 8 * width + k / 8 * stride
                                                : mn % 8 * width + mn / 8 * stride + k * 2);
      const uint32_t read = linear ^ ((linear >> 3) & (width - 16));
      const int contraction = step * 16 + k;
      // MN-major: the element is in box mn / span, row `contraction`, at byte (mn % span) * 2. K-major: it is in row
      // mn, at byte contraction * 2.
      const uint32_t written = mn_major ? base + mn / span * 64 * width + swizzled(contraction, mn % span * 2, width)
                                        : base + swizzled(mn, contraction * 2, width);
      if (read != written) return say("a descriptor misses an element");
    }
  return say("");
}

// The bytes that the barrier of a stage expects are the bytes of the boxes that are loaded into it.
const char* check_bytes() {
  const int box = 64 * 64 * 2;
#define CHECK(BN, RP)                                                                                                  \
  if (Tile<BN, RP>::kOutBytes != (kTileM * 64 + BN * 64) * 2 || Tile<BN, RP>::kOutBytes != (2 + BN / 64) * box ||      \
      Tile<BN, RP>::kSkinnyBytes != (kTileM * 64 + RP * 64) * 2 ||                                                     \
      Tile<BN, RP>::kSkinnyBytes != 2 * box + Tile<BN, RP>::kRankBoxes * 64 * Tile<BN, RP>::kWidth ||                  \
      Tile<BN, RP>::kOutBytes > Tile<BN, RP>::kStageBytes || Tile<BN, RP>::kSkinnyBytes > Tile<BN, RP>::kStageBytes || \
      Tile<BN, RP>::kSharedBytes > kSharedLimit)                                                                       \
    return say("wrong bytes for " #BN " columns, rank " #RP);
  CHECK(128, 16)
  CHECK(128, 64) CHECK(128, 128) CHECK(256, 16) CHECK(256, 64) CHECK(256, 128)
#undef CHECK
      return say("");
}

// The chunks of a conversion cover its matrix, and the last one begins inside it.
const char* check_prep(int rows, int pitch) {
  const int64_t total = static_cast<int64_t>(rows) * pitch,
                covered = static_cast<int64_t>(prep_chunks(rows, pitch)) * kPrepChunk;
  return say(covered >= total && covered - total < kPrepChunk && kPrepChunk == kConsumers * 8 * 4
                 ? ""
                 : "chunks do not cover the matrix");
}
}
