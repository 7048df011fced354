// Exhaustive checks of csrc/cuda/sm90/{layout,schedule}.h, compiled by a host compiler. Each returns "" or what is
// wrong.
#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "../csrc/cuda/sm90/schedule.h"

using namespace lk::sm90;

namespace {

std::string said;

const char* say(const std::string& what) {
  said = what;
  return said.c_str();
}

// The plan that launch.cu makes of these sizes, without the pointers.
Plan backward_plan(int M, int N, int K, int R, int sms, int prep, int needs, int cluster) {
  Plan plan;
  plan.cluster = cluster;
  plan.prep = round_up(prep, cluster);
  plan.rank_tiles = rank_tiles(R);
  const int row_blocks = round_up(ceil_div(M, kTileM), cluster);
  if (needs & 3) plan.blocks = row_blocks;
  if (needs & 1) {
    plan.tiles_m = row_blocks;
    plan.tiles_n = ceil_div(K, tiling(M, K, sms).columns);
  }
  if (needs & 2) {
    plan.da_tiles = round_up(ceil_div(K, 128), cluster) * plan.rank_tiles;
    plan.da_splits = gradient_splits(plan.da_tiles, M, sms);
  }
  if (needs & 4) {
    plan.db_tiles = round_up(ceil_div(N, 128), cluster) * plan.rank_tiles;
    plan.db_splits = gradient_splits(plan.db_tiles, M, sms);
  }
  return plan;
}

// Row blocks of h or g that an item waits for: [first, last).
std::pair<int, int> waits(const Plan& plan, const Item& item, int M) {
  if (item.kind == Kind::kOut) return {item.m, item.m + 1};
  if (item.kind != Kind::kDa) return {0, 0};
  const int parts = ceil_div(M, kTileK);
  return {split_begin(parts, plan.da_splits, item.split) / 2,
          (split_begin(parts, plan.da_splits, item.split + 1) - 1) / 2 + 1};
}

}  // namespace

extern "C" {

// Every tile of every kind is one item; all that an item waits for has lower tickets; the row blocks that a da item
// waits for are those whose rows it reads; the blocks of a cluster have the same second operand in as many stages.
const char* check_items(int M, int N, int K, int R, int sms, int prep, int needs, int cluster) {
  const Plan plan = backward_plan(M, N, K, R, sms, prep, needs, cluster);
  std::set<std::tuple<Kind, int, int, int>> seen;
  std::vector<int> published(plan.blocks);
  int prepared = 0;
  for (int i = 0; i < plan.items() * cluster; ++i) {
    const int ticket = i / cluster, rank = i % cluster;
    const Item item = item_of(plan, ticket, rank), leads = item_of(plan, ticket, 0);
    if (item.kind != leads.kind || item.split != leads.split) return say("two kinds of work for one ticket");
    if (item.kind == Kind::kSkinny || item.kind == Kind::kOut) {
      if (item.n != leads.n || item.m != leads.m + rank) return say("a pair that does not share a column tile");
    } else if (item.kind == Kind::kDa || item.kind == Kind::kDb) {
      const GradientTile tile = gradient_tile(plan, item.n), first = gradient_tile(plan, leads.n);
      if (tile.rank != first.rank || tile.columns != first.columns + 128 * rank)
        return say("a pair that does not share a rank tile");
    }
    if (!seen.insert({item.kind, item.m, item.n, item.split}).second) return say("two tickets are one item");
    bool inside = false;
    switch (item.kind) {
      case Kind::kPrep:
        inside = item.m < plan.prep;
        break;
      case Kind::kSkinny:
        inside = item.m < plan.blocks && item.n < plan.rank_tiles;
        break;
      case Kind::kOut:
        inside = item.m < plan.tiles_m && item.n < plan.tiles_n;
        break;
      case Kind::kDb:
        inside = item.n < plan.db_tiles && item.split < plan.db_splits;
        break;
      case Kind::kDa:
        inside = item.n < plan.da_tiles && item.split < plan.da_splits;
        break;
    }
    if (!inside || item.m < 0 || item.n < 0 || item.split < 0) return say("an item outside the problem");
    if (item.kind == Kind::kPrep)
      ++prepared;
    else if (prepared != plan.prep)
      return say("an item before the end of the conversion");
    if (item.kind == Kind::kSkinny) published[item.m] += kGroups;
    const auto [first, last] = waits(plan, item, M);
    for (int m = first; m < last; ++m)
      if (m >= plan.blocks || published[m] != ready_target(plan)) return say("an item waits for a higher ticket");
  }
  if (static_cast<int>(seen.size()) != plan.prep + plan.blocks * plan.rank_tiles + plan.tiles_m * plan.tiles_n +
                                           plan.db_tiles * plan.db_splits + plan.da_tiles * plan.da_splits)
    return say("items are missing");
  for (int m : published)
    if (m != ready_target(plan)) return say("a row block is published too often or too seldom");
  return say("");
}

// The counters of a plan are different ints, inside what the plan asks for.
const char* check_counters(int M, int N, int K, int R, int sms, int cluster) {
  const Plan plan = backward_plan(M, N, K, R, sms, 3, 7, cluster);
  std::set<int> used = {kTicket, kExited, kPrepDone};
  size_t count = used.size();
  for (int m = 0; m < plan.blocks; ++m, ++count) used.insert(kReady + m);
  for (int group = 0; group < kGroups; ++group) {
    for (int tile = 0; tile < plan.db_tiles; ++tile, ++count) used.insert(db_counter(plan, tile, group));
    for (int tile = 0; tile < plan.da_tiles; ++tile, ++count) used.insert(da_counter(plan, tile, group));
  }
  if (used.size() != count) return say("two counters are one int");
  if (*used.rbegin() >= counters(plan)) return say("a counter beyond the end");
  return say("");
}

// The parts of `blocks` blocks follow each other, cover all, and none is empty.
const char* check_splits(int blocks, int splits) {
  if (split_begin(blocks, splits, 0) != 0 || split_begin(blocks, splits, splits) != blocks)
    return say("not all is covered");
  for (int s = 0; s < splits; ++s)
    if (split_begin(blocks, splits, s) >= split_begin(blocks, splits, s + 1)) return say("an empty part");
  return say("");
}
// columns * 10 + cluster
int tiling_of(int M, int columns, int sms) {
  const Tiling t = tiling(M, columns, sms);
  return is_compiled(t) ? t.columns * 10 + t.cluster : 0;
}
int gradient_splits_of(int tiles, int M, int sms) { return gradient_splits(tiles, M, sms); }
int decode_splits_of(int tiles, int blocks, int sms) { return decode_splits(tiles, blocks, sms); }

// Partial sums: every (tile, split, register, thread) has a float of its own in the space that launch.cu takes.
const char* check_partials(int tiles, int splits, int registers) {
  std::vector<bool> used(partial_index(splits, tiles, 0, registers, 0, 0));
  for (int tile = 0; tile < tiles; ++tile)
    for (int split = 0; split < splits; ++split)
      for (int reg = 0; reg < registers; ++reg)
        for (int thread = 0; thread < kConsumers; ++thread) {
          const int64_t i = partial_index(splits, tile, split, registers, reg, thread);
          if (i < 0 || i >= static_cast<int64_t>(used.size()) || used[i])
            return say("partial sums overlap or lie outside");
          used[i] = true;
        }
  for (const bool b : used)
    if (!b) return say("a hole between partial sums");
  return say("");
}

// Items of a decode launch: prep first, then every split of every tile, those of a before those of w.
const char* check_decode(int prep, int a_tiles, int w_tiles, int splits) {
  DecodePlan plan;
  plan.prep = prep;
  plan.a_tiles = a_tiles;
  plan.w_tiles = w_tiles;
  plan.splits = splits;
  std::set<std::pair<int, int>> seen;
  std::set<int> used = {kTicket, kExited, kPrepDone, kDecodeReady};
  int of_a = 0;
  for (int ticket = 0; ticket < plan.items(); ++ticket) {
    const Item item = decode_item(plan, ticket);
    if ((item.kind == Kind::kPrep) != (ticket < prep)) return say("prep is not first");
    if (item.kind == Kind::kPrep) continue;
    if (item.n >= plan.tiles() || item.split >= splits || !seen.insert({item.n, item.split}).second)
      return say("a wrong item");
    if ((item.kind == Kind::kSkinny) != (item.n < a_tiles)) return say("a tile of the wrong kind");
    if (item.kind == Kind::kSkinny)
      ++of_a;
    else if (of_a != a_tiles * splits)
      return say("a tile of w before the last of a");
  }
  if (static_cast<int>(seen.size()) != plan.tiles() * splits) return say("items are missing");
  for (int tile = 0; tile < plan.tiles(); ++tile)
    for (int group = 0; group < kGroups; ++group)
      if (!used.insert(decode_counter(tile, group)).second || *used.rbegin() >= decode_counters(plan))
        return say("a wrong counter");
  return say("");
}

// Clusters claim tickets in random order, `resident` of them at a time out of `grid`, one ahead of what they work on (as
// the producer does). Each block works through its items in order. It stays on an item until what the item waits for is
// published, and what the items of the other blocks wait for, too: half of every stage comes from them, and they must
// have begun it. All must end, and the counters must come back to zero, launch after launch.
const char* check_progress(int M, int N, int K, int R, int sms, int prep, int needs, int cluster, int grid,
                           int resident, int launches, unsigned seed) {
  const Plan plan = backward_plan(M, N, K, R, sms, prep, needs, cluster);
  std::mt19937 random(seed);
  std::vector<int> counter(counters(plan));
  struct Running {
    std::vector<int> claimed;
    std::vector<size_t> done;  // by block: how many of them
    bool last = false;
  };
  const auto published = [&](const Item& item) {
    bool all = item.kind == Kind::kPrep || counter[kPrepDone] >= plan.prep;
    const auto [first, last] = waits(plan, item, M);
    for (int m = first; m < last; ++m) all = all && counter[kReady + m] >= ready_target(plan);
    return all;
  };
  for (int launch = 0; launch < launches; ++launch) {
    std::vector<Running> clusters;
    std::vector<int> finished(plan.items() * cluster);
    int started = 0;
    for (;;) {
      while (static_cast<int>(clusters.size()) < resident && started < grid) {
        clusters.push_back({{}, std::vector<size_t>(cluster), false});
        ++started;
      }
      if (clusters.empty()) break;
      std::vector<int> order(clusters.size());
      for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
      std::shuffle(order.begin(), order.end(), random);
      bool moved = false;
      int leaves = -1;
      for (const int i : order) {
        Running& each = clusters[i];
        const size_t slowest = *std::min_element(each.done.begin(), each.done.end());
        if (!each.last && each.claimed.size() - slowest < 2 && random() % 2) {
          const int ticket = counter[kTicket]++;
          if (ticket < plan.items())
            each.claimed.push_back(ticket);
          else
            each.last = true;
          moved = true;
        }
        for (int rank = 0; rank < cluster; ++rank) {
          const size_t at = each.done[rank];
          if (at == each.claimed.size()) continue;
          bool can = true;
          for (int other = 0; other < cluster; ++other)
            can = can && each.done[other] >= at && published(item_of(plan, each.claimed[at], other));
          moved = moved || can;
          if (!can || random() % 3) continue;
          const Item item = item_of(plan, each.claimed[at], rank);
          ++finished[each.claimed[at] * cluster + rank];
          if (item.kind == Kind::kPrep) ++counter[kPrepDone];
          if (item.kind == Kind::kSkinny) counter[kReady + item.m] += kGroups;
          ++each.done[rank];
        }
        if (each.last && *std::min_element(each.done.begin(), each.done.end()) == each.claimed.size()) leaves = i;
        moved = moved || !each.last;
      }
      if (leaves >= 0) {
        moved = true;
        if ((counter[kExited] += cluster) == grid * cluster)
          for (int& c : counter) c = 0;
        clusters.erase(clusters.begin() + leaves);
      }
      if (!moved) return say("deadlock");
    }
    for (const int times : finished)
      if (times != 1) return say("an item was not done once");
    for (const int c : counter)
      if (c != 0) return say("a counter is left behind");
  }
  return say("");
}

// Accumulators: each element of a 64 x N tile is one register of one thread.
const char* check_fragments(int N) {
  std::vector<int> seen(64 * N);
  for (int thread = 0; thread < 128; ++thread)
    for (int reg = 0; reg < N / 2; ++reg) ++seen[fragment_row(thread, reg) * N + fragment_col(thread, reg)];
  for (const int times : seen)
    if (times != 1) return say("an element is held " + std::to_string(times) + " times");
  return say("");
}

// The bit of the mask for each accumulator is drawn from its own row, column group and lane: what keep_tile of
// backward.cuh does, with the four lanes of every quad side by side.
const char* check_keep_bits(int N) {
  for (int thread = 0; thread < 128; thread += 4)
    for (int w = 0; w < N / 64; ++w)
      for (int part = 0; part < 4; ++part) {
        uint32_t word[4][4];  // of the four lanes: which (lane, word) it is
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

// Masking a 64 x 64 box: every 16-byte chunk once, at an address of its own inside the box.
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

// stmatrix writes each accumulator of 64 columns where the swizzled box has it.
const char* check_stmatrix() {
  for (int thread = 0; thread < 128; ++thread)
    for (int pair = 0; pair < 4; ++pair)
      for (int matrix = 0; matrix < 4; ++matrix)
        for (int e = 0; e < 2; ++e) {
          const int reg = pair * 8 + (matrix / 2) * 4 + (matrix % 2) * 2 + e, lane = thread % 32;
          const uint32_t to = stmatrix_offset(thread / 32, 8 * matrix + lane / 4, pair) + lane % 4 * 4 + e * 2;
          if (to != swizzled(fragment_row(thread, reg), fragment_col(thread, reg) * 2, 128))
            return say("an accumulator goes astray");
        }
  return say("");
}

// A descriptor, read as the PTX ISA's canonical layout, finds each element where TMA's swizzle has put it. Box of 64
// rows of `width` bytes; mn_major: rows are the contraction, and `columns` the operand's other extent; else rows are
// the other index.
const char* check_descriptor(int width, int mn_major, int extent, int step, uint32_t base) {
  const uint64_t d = mn_major ? (width == 128  ? MnMajor<128>::at(base)
                                 : width == 64 ? MnMajor<64>::at(base)
                                               : MnMajor<32>::at(base))
                              : KMajor::at(base);
  const uint32_t advance = mn_major ? 16 * width : KMajor::kStep;
  const uint64_t moved = d + static_cast<uint64_t>(step) * (advance >> 4);
  const uint32_t start = (moved & 0x3FFF) << 4, leading = (moved >> 16 & 0x3FFF) << 4,
                 stride = (moved >> 32 & 0x3FFF) << 4;
  const uint32_t layout = moved >> 62;
  if ((layout == 1 ? 128 : layout == 2 ? 64 : layout == 3 ? 32 : 0) != width || (moved >> 49 & 7))
    return say("wrong layout bits");
  const int span = width / 2;
  for (int mn = 0; mn < extent; ++mn)
    for (int k = 0; k < 16; ++k) {
      const uint32_t linear = start + (mn_major ? mn % span * 2 + mn / span * leading + k % 8 * width + k / 8 * stride
                                                : mn % 8 * width + mn / 8 * stride + k * 2);
      const uint32_t read = linear ^ ((linear >> 3) & (width - 16));
      const int contraction = step * 16 + k;
      // MN-major: box mn / span, row `contraction`, byte (mn % span) * 2. K-major: row mn, byte contraction * 2.
      const uint32_t written = mn_major ? base + mn / span * 64 * width + swizzled(contraction, mn % span * 2, width)
                                        : base + swizzled(mn, contraction * 2, width);
      if (read != written) return say("a descriptor misses an element");
    }
  return say("");
}

// The bytes that a stage is told to expect are those of its boxes.
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
  CHECK(128, 32) CHECK(128, 64) CHECK(128, 128) CHECK(256, 16) CHECK(256, 32) CHECK(256, 64) CHECK(256, 128)
#undef CHECK
      return say("");
}

// Conversion chunks cover a matrix.
const char* check_prep(int rows, int pitch) {
  const int64_t total = static_cast<int64_t>(rows) * pitch,
                covered = static_cast<int64_t>(prep_chunks(rows, pitch)) * kPrepChunk;
  return say(covered >= total && covered - total < kPrepChunk && kPrepChunk == kConsumers * 8 * 4
                 ? ""
                 : "chunks do not cover the matrix");
}
}
