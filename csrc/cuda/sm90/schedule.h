// The work item of each ticket, and the counters and scratch memory that a launch needs. This is arithmetic only, which
// tests/backends/cuda/test_sm90_schedule.py checks exhaustively on a host.
//
// Blocks claim tickets from one atomic counter and work through theirs in ascending order. An item waits only for items
// with lower tickets. So the lowest unfinished ticket is always running and waits for nothing: there is no deadlock,
// however many blocks are resident.
//
// The blocks of the ticket kernels may come in clusters of two, which run at the same time and claim together. A ticket
// is then two items, one a block: the same work on neighbouring row blocks (of x, dy, h, g; for da and db: neighbouring
// columns of x or dy). The second operand of every stage is the same for both, and each block loads half of it into
// both. Where the number of row blocks, or of column tiles, is odd, it counts as one more: that item's loads give zeros
// and its stores store nothing, but it has as many stages, publishes and waits like any other.
//
// Pairs cannot deadlock either. The lowest unfinished ticket belongs to a cluster whose blocks both run, and everything
// that it waits for is published. Its stage i may be loaded once both blocks have released the previous stage in the
// same place of the ring. That stage belongs to a lower ticket, which both blocks have finished, or to this ticket, and
// then it has arrived in both blocks.
//
//   ticket kernels   prep | h or g tiles | y or dx tiles, most db and da tiles among them | the other db and da tiles
//
//   decode           prep | row tiles of a, each split along K | row tiles of w, each split along K
#pragma once

#include "layout.h"

namespace lk::sm90 {

enum class Kind { kPrep, kSkinny, kOut, kDb, kDa };

struct Item {
  Kind kind;
  int m;      // prep: chunk. skinny, out: block of 128 rows
  int n;      // skinny: rank tile. out: column tile. db, da: tile, see gradient_tile. decode: tile of 128 rows
  int split;  // db, da, decode: part of the contraction
};

struct Plan {
  int cluster = 1;     // blocks that claim together; all numbers of blocks, tiles and chunks are multiples of it
  int prep = 0;        // chunks of adapters to convert
  int rank_tiles = 1;  // 128 of the rank each
  int blocks = 0;      // row blocks of 128 of h or g; 0 where neither is wanted
  int tiles_m = 0, tiles_n = 0;  // of y or dx; tiles_n is 0 where it is not wanted
  int db_tiles = 0, db_splits = 1;
  int da_tiles = 0, da_splits = 1;

  // Tickets of each kind.
  LK_CONSTEXPR int preps() const { return prep / cluster; }
  LK_CONSTEXPR int skinny() const { return blocks / cluster * rank_tiles; }
  LK_CONSTEXPR int out() const { return tiles_m / cluster * tiles_n; }
  LK_CONSTEXPR int db() const { return db_tiles / cluster * db_splits; }
  LK_CONSTEXPR int da() const { return da_tiles / cluster * da_splits; }
  LK_CONSTEXPR int items() const { return preps() + skinny() + db() + out() + da(); }
};

// y and dx tiles go down 16 rows of tiles before the next column. 132 blocks at work on tiles of 128 by 256 then read
// 16 · 128 + 132 / 16 · 256 = 4160 rows of x and w between them, where 8 rows of tiles would make it 5248; and w, which
// does not stay in L2 from one group of rows to the next, is read half as often.
constexpr int kGroupM = 16;

LK_CONSTEXPR Item out_item(const Plan& plan, int i, int rank) {
  const int tiles_m = plan.tiles_m / plan.cluster, most = kGroupM / plan.cluster;
  const int per_group = most * plan.tiles_n, group = i / per_group, first = group * most;
  const int rows = tiles_m - first < most ? tiles_m - first : most, j = i - group * per_group;
  return {Kind::kOut, (first + j % rows) * plan.cluster + rank, j / rows, 0};
}

// Returns tile i % (tiles / cluster) of split i / (tiles / cluster). The blocks of a cluster take neighbouring columns
// of one rank tile.
LK_CONSTEXPR Item gradient_item(const Plan& plan, Kind kind, int tiles, int i, int rank) {
  const int tickets = tiles / plan.cluster, j = i % tickets;
  const int columns = j / plan.rank_tiles * plan.cluster + rank;
  return {kind, 0, columns * plan.rank_tiles + j % plan.rank_tiles, i / tickets};
}

// Returns the item of block `rank` of a cluster for a ticket.
LK_CONSTEXPR Item item_of(const Plan& plan, int ticket, int rank) {
  int i = ticket;
  if (i < plan.preps()) return {Kind::kPrep, i * plan.cluster + rank, 0, 0};
  i -= plan.preps();
  if (i < plan.skinny()) return {Kind::kSkinny, i / plan.rank_tiles * plan.cluster + rank, i % plan.rank_tiles, 0};
  i -= plan.skinny();
  // db and da tiles are memory-bound, dx tiles are not. Three quarters of the db and da tiles are spread evenly among
  // the dx tiles, so that the memory and the tensor cores are busy at the same time. The last quarter comes at the end,
  // because small items fill the last round better than large ones. db tiles come first, because they need no g.
  const int side = plan.db() + plan.da(), spread = side - side / 4, mixed = spread + plan.out();
  int before = spread + i - mixed;  // of db and da tiles
  if (i < mixed) {
    before = static_cast<int>(static_cast<int64_t>(i) * spread / mixed);
    const int after = static_cast<int>((static_cast<int64_t>(i) + 1) * spread / mixed);
    if (after == before) return out_item(plan, i - before, rank);
  }
  if (before < plan.db()) return gradient_item(plan, Kind::kDb, plan.db_tiles, before, rank);
  return gradient_item(plan, Kind::kDa, plan.da_tiles, before - plan.db(), rank);
}

// Part `split` of the `splits` parts of `blocks` blocks is [split_begin(split), split_begin(split + 1)). It is not
// empty if splits <= blocks.
LK_CONSTEXPR int split_begin(int blocks, int splits, int split) {
  return static_cast<int>(static_cast<int64_t>(blocks) * split / splits);
}

// Returns into how many parts the sums over M of `tiles` da or db tiles are split: about two items for each
// multiprocessor, each of at least 8 blocks of 64 rows.
LK_CONSTEXPR int gradient_splits(int tiles, int M, int sms) {
  const int blocks = ceil_div(M, kTileK), wanted = ceil_div(2 * sms, tiles), most = blocks / 8 > 0 ? blocks / 8 : 1;
  return wanted < most ? wanted : most;
}

// How the ticket kernels cut y or dx: the columns of a tile, 128 or 256, and the blocks of a cluster, 1 or 2.
struct Tiling {
  int columns, cluster;
};
LK_CONSTEXPR bool is_compiled(Tiling t) {
  return (t.columns == 256 && (t.cluster == 1 || t.cluster == 2)) || (t.columns == 128 && t.cluster == 1);
}

// Chooses 256 columns a tile where that fills the multiprocessors, else 128. Chooses clusters of two if there are 256
// columns and at least two row blocks, and if pairs take no more rounds of the multiprocessors than single blocks. At
// full rate a block reads 48 KB from L2 every stage, or 32 KB if it shares w: about 9 or 6 TB/s for all blocks. That is
// an estimate, which no GPU has confirmed yet.
LK_CONSTEXPR Tiling tiling(int M, int columns, int sms) {
  const int rows = ceil_div(M, kTileM), tiles_n = ceil_div(columns, 256);
  if (rows * tiles_n < sms) return {128, 1};
  const bool pairs =
      rows >= 2 && sms >= 2 && ceil_div(ceil_div(rows, 2) * tiles_n, sms / 2) <= ceil_div(rows * tiles_n, sms);
  return {256, pairs ? 2 : 1};
}

// The elements that one item converts of an adapter: 4 times 8 for every consumer thread.
constexpr int kPrepChunk = kConsumers * 32;
LK_CONSTEXPR int prep_chunks(int rows, int pitch) {
  return static_cast<int>((static_cast<int64_t>(rows) * pitch + kPrepChunk - 1) / kPrepChunk);
}

// Counters: int32, all zero between launches (the last block out of a launch clears what it used).
constexpr int kTicket = 0, kExited = 1, kPrepDone = 2, kReady = 4;

// Row block m of h or g is there when both warpgroups have published their half of each of its rank tiles, at counter
// kReady + m.
LK_CONSTEXPR int ready_target(const Plan& plan) { return kGroups * plan.rank_tiles; }
// Arrivals of the splits of a da or db tile, by warpgroup.
LK_CONSTEXPR int db_counter(const Plan& plan, int tile, int group) {
  return kReady + plan.blocks + tile * kGroups + group;
}
LK_CONSTEXPR int da_counter(const Plan& plan, int tile, int group) {
  return kReady + plan.blocks + (plan.db_tiles + tile) * kGroups + group;
}
LK_CONSTEXPR int counters(const Plan& plan) { return kReady + plan.blocks + (plan.db_tiles + plan.da_tiles) * kGroups; }

// A da or db tile is 128 columns of x or dy and one rank tile; those of the same columns are neighbours.
struct GradientTile {
  int columns, rank;  // the first of each
};
LK_CONSTEXPR GradientTile gradient_tile(const Plan& plan, int tile) {
  return {tile / plan.rank_tiles * 128, tile % plan.rank_tiles * 128};
}

// Returns where accumulator `reg` of consumer thread `thread` goes among the partial sums. Every access is coalesced,
// and a thread that sums reads the positions that it holds itself.
LK_CONSTEXPR int64_t partial_index(int splits, int tile, int split, int registers, int reg, int thread) {
  return ((static_cast<int64_t>(tile) * splits + split) * registers + reg) * kConsumers + thread;
}

struct DecodePlan {
  int prep = 0;
  int a_tiles = 0, w_tiles = 0;  // of 128 rows
  int splits = 1;                // of K, in blocks of 64
  int blocks = 0;                // ceil(K / 64)

  LK_CONSTEXPR int tiles() const { return a_tiles + w_tiles; }
  LK_CONSTEXPR int items() const { return prep + tiles() * splits; }
};

// Returns the item of a decode ticket. Its n counts the tiles of a first, then those of w. The splits of a tile are
// neighbours and end together.
LK_CONSTEXPR Item decode_item(const DecodePlan& plan, int ticket) {
  if (ticket < plan.prep) return {Kind::kPrep, ticket, 0, 0};
  const int i = ticket - plan.prep, tile = i / plan.splits;
  return {tile < plan.a_tiles ? Kind::kSkinny : Kind::kOut, 0, tile, i % plan.splits};
}

// Returns into how many parts K is split: the number that takes the least time, and the smallest of those. An item is
// counted as its stages plus about 4 stages of latency, and the time as rounds of the multiprocessors times that.
LK_CONSTEXPR int decode_splits(int tiles, int blocks, int sms) {
  int best = 1, best_time = 0;
  for (int splits = 1; splits <= 32 && splits <= blocks; ++splits) {
    const int time = ceil_div(tiles * splits, sms) * (ceil_div(blocks, splits) + 4);
    if (splits == 1 || time < best_time) {
      best = splits;
      best_time = time;
    }
  }
  return best;
}

// The counter of halves of tiles of a whose h is published. The last part to arrive at a half counts it.
constexpr int kDecodeReady = 3;
LK_CONSTEXPR int decode_ready_target(const DecodePlan& plan) { return plan.a_tiles * kGroups; }
LK_CONSTEXPR int decode_counter(int tile, int group) { return kReady + tile * kGroups + group; }
LK_CONSTEXPR int decode_counters(const DecodePlan& plan) { return kReady + plan.tiles() * kGroups; }

}  // namespace lk::sm90
