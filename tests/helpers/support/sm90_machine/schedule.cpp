// Exhaustive checks of csrc/cuda/sm90/schedule.h, compiled by a host compiler. Each returns "" or a text that names
// the fault. `needs` is a sum of 1 for dx, 2 for da and 4 for db.
#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "../../../../csrc/cuda/sm90/schedule.h"
#include "said.h"

using namespace lk::sm90;

namespace {

// Returns the plan that launch.cu makes for a backward of these sizes.
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

// Returns the row blocks of h or g that an item waits for, as [first, last).
std::pair<int, int> waits(const Plan& plan, const Item& item, int M) {
  if (item.kind == Kind::kOut) return {item.m, item.m + 1};
  if (item.kind != Kind::kDa) return {0, 0};
  const int parts = ceil_div(M, kTileK);
  return {split_begin(parts, plan.da_splits, item.split) / 2,
          (split_begin(parts, plan.da_splits, item.split + 1) - 1) / 2 + 1};
}

}  // namespace

extern "C" {

// Every tile of every kind is exactly one item. Everything that an item waits for has lower tickets. A da item waits
// for the row blocks whose rows it reads. The two items of a cluster's ticket read the same second operand in the same
// number of stages.
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

// db and da tiles, which are memory-bound, lie among the dx tiles. Between two dx tiles there are never more of them in
// a row than an even spread needs. A quarter of them follows the last dx tile. db tiles come before da tiles, which
// wait for g.
const char* check_mix(int M, int N, int K, int R, int sms, int cluster) {
  const Plan plan = backward_plan(M, N, K, R, sms, 0, 7, cluster);
  const int side = plan.db() + plan.da(), most = ceil_div(side, plan.out());
  int in_a_row = 0, after = 0;
  bool da = false;
  for (int ticket = plan.preps() + plan.skinny(); ticket < plan.items(); ++ticket) {
    const Kind kind = item_of(plan, ticket, 0).kind;
    if (kind == Kind::kDb && da) return say("a db tile after a da tile");
    da = da || kind == Kind::kDa;
    if (kind == Kind::kOut && in_a_row > most) return say("too many memory-bound items in a row");
    in_a_row = kind == Kind::kOut ? 0 : in_a_row + 1;
    after = in_a_row;
  }
  return say(after < side / 4 || after > side / 4 + most ? "not a quarter at the end" : "");
}

// Returns how many different rows of x and w the first `sms` y tiles of a launch read, one tile for each block.
int rows_at_work(int tiles_m, int tiles_n, int columns, int sms, int cluster) {
  Plan plan;
  plan.cluster = cluster;
  plan.tiles_m = plan.blocks = tiles_m;
  plan.tiles_n = tiles_n;
  std::set<int> m, n;
  for (int i = 0; i < sms; ++i) {
    const Item item = item_of(plan, plan.skinny() + i / cluster, i % cluster);
    m.insert(item.m);
    n.insert(item.n);
  }
  return static_cast<int>(m.size()) * kTileM + static_cast<int>(n.size()) * columns;
}

// No two counters of a plan share an int, and all of them lie within the number of counters that the plan asks for.
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

// The parts into which `blocks` blocks are split follow each other and cover all blocks, and no part is empty.
const char* check_splits(int blocks, int splits) {
  if (split_begin(blocks, splits, 0) != 0 || split_begin(blocks, splits, splits) != blocks)
    return say("not all is covered");
  for (int s = 0; s < splits; ++s)
    if (split_begin(blocks, splits, s) >= split_begin(blocks, splits, s + 1)) return say("an empty part");
  return say("");
}

// Returns 10 * columns + cluster of the tiling that the rule chooses, or 0 if no kernel is compiled for it.
int tiling_of(int M, int columns, int sms) {
  const Tiling t = tiling(M, columns, sms);
  return is_compiled(t) ? t.columns * 10 + t.cluster : 0;
}
int gradient_splits_of(int tiles, int M, int sms) { return gradient_splits(tiles, M, sms); }
int decode_splits_of(int tiles, int blocks, int sms) { return decode_splits(tiles, blocks, sms); }

// Every (tile, split, register, thread) has a float of its own in the scratch that launch.cu takes for partial sums,
// and no float is left over.
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

// The items of a decode launch are the conversions first, then every split of every tile of a, then those of w.
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

// Simulates launches of `grid` clusters, of which `resident` run at a time, and reports a deadlock.
//
// Clusters claim tickets in random order. Like the producer, a cluster claims one ticket ahead of its work. Each block
// works through its items in order. A block ends an item only after everything that the item waits for is published,
// and everything that the other block's item of the same ticket waits for: half of every stage comes from the other
// block, which must have begun that item. Every item must be done exactly once, and every launch must leave the
// counters at zero.
const char* check_progress(int M, int N, int K, int R, int sms, int prep, int needs, int cluster, int grid,
                           int resident, int launches, unsigned seed) {
  const Plan plan = backward_plan(M, N, K, R, sms, prep, needs, cluster);
  std::mt19937 random(seed);
  std::vector<int> counter(counters(plan));
  struct Running {
    std::vector<int> claimed;
    std::vector<size_t> done;  // how many of the claimed tickets each block has finished
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
}
