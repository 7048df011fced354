// An emulated Hopper GPU in one host thread, as far as csrc/cuda/sm90 uses one: blocks, clusters, threads, barriers,
// shared memory and time. ptx.h and wgmma.h add its instructions, so that the kernels' own source runs here.
//
// Every CUDA thread is a fiber, and fibers are switched in random order wherever they can wait. Asynchronous work
// happens at a random moment that the instruction set allows: a TMA load before its mbarrier completes, a wgmma between
// its issue and wait_group, a TMA store before wait_group. A wait that nothing can end is reported as a deadlock. If the
// async proxy (TMA, wgmma) reads shared memory that ordinary stores wrote without a proxy fence, that is an error.
// Otherwise memory is sequentially consistent, so a missing release or acquire goes unnoticed here.
//
// The blocks of a cluster start together. A block ends when its own threads have ended; anything that arrives later from
// another block is an error. A multicast arrives in each block at a moment of its own.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../../csrc/cuda/sm90/layout.h"

namespace emu {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

// The arguments of cuTensorMapEncodeTiled, kept in the 128 bytes of the map.
struct TensorMap {
  const char* base;
  uint64_t columns, rows, stride;
  uint32_t box_columns, box_rows, width;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

struct Barrier {
  int arrivals = 0, pending = 0;
  long bytes = 0;
  uint32_t phase = 0;
};
struct Meeting {  // bar.sync, __syncwarp
  int arrived = 0;
  unsigned generation = 0;
};
struct Load {
  uint32_t to, barrier;
  const TensorMap* map;
  int column, row;
};

struct Block;
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Meeting meeting;
};
struct Fiber {
  ucontext_t context;  // the start of the fiber
  jmp_buf place;       // where the fiber continues: unlike swapcontext, longjmp makes no system call
  bool started = false;
  std::unique_ptr<char[]> stack;
  Block* block;
  dim3 thread, index;
  std::function<bool()> ready;  // tells whether its wait is over; empty if it can run
  std::string waits;            // in words
  bool done = false;
  std::string error;
  std::vector<std::function<void()>> open_mma;         // issued, not committed
  std::deque<std::vector<std::function<void()>>> mma;  // groups
  std::vector<std::function<void()>> open_store;
  std::deque<std::vector<std::function<void()>>> stores;
  std::vector<uint32_t> dirty;  // words of shared memory that it stored and has not fenced yet
};

struct Block {
  std::vector<uint8_t> shared;
  std::vector<uint16_t> unfenced;  // per 4-byte word: ordinary stores that no proxy fence has followed
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Meeting> meetings;
  std::map<int, std::vector<uint32_t>> exchange;  // by warp
  std::list<std::function<void()>> arriving;      // TMA loads, stores from other blocks
  std::vector<std::unique_ptr<Fiber>> fibers;
  Cluster* cluster = nullptr;
  unsigned rank = 0;  // of the block in its cluster
  int running = 0;
  int late = 0;  // steps until its threads begin
  unsigned slow = 0,
           slow_for = 0;  // a thread that hardly moves, if any, and for how long
};

struct Random {  // xorshift32 (Marsaglia, 2003)
  uint32_t state = 1;
  void seed(uint32_t seed) { state = (seed + 1) * 0x9E3779B9u | 1; }
  uint32_t operator()() {
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
  }
};
struct Machine {
  Random random;
  unsigned resident = 2;
  unsigned grid = 0;
  jmp_buf scheduler;
  Fiber* current = nullptr;

  bool coin(uint32_t odds) { return (random() >> 8) % odds == 0; }
};
inline Machine machine;

inline Block& block() { return *machine.current->block; }

inline void wait_until(std::string what, std::function<bool()> ready) {
  Fiber* const fiber = machine.current;
  fiber->waits = std::move(what);
  fiber->ready = std::move(ready);
  if (_setjmp(fiber->place) == 0) _longjmp(machine.scheduler, 1);
}
inline void maybe_switch() {
  if (machine.coin(4)) wait_until("its turn", [] { return true; });
}

inline void meet(Meeting& meeting, int count, const std::string& name) {
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    const unsigned generation = meeting.generation;
    wait_until(name, [&meeting, generation] { return meeting.generation != generation; });
  }
}
inline void meet(int id, int count) { meet(block().meetings[id], count, "barrier " + std::to_string(id)); }
inline int warp_id() { return machine.current->thread.x / 32; }
inline int lane_id() { return machine.current->thread.x % 32; }
inline void meet_warp() { meet(100 + warp_id(), 32); }

// ---- addresses in the shared memory of a cluster. The high 8 bits are the rank of the block plus one, the others are the
// address in that block.
constexpr uint32_t kOffset = (1 << 24) - 1;
inline Block& block_at(Cluster& cluster, unsigned rank) {
  if (rank >= cluster.blocks.size()) fail("shared memory of a block that the cluster does not have");
  Block& block = *cluster.blocks[rank];
  if (block.running == 0) fail("shared memory of a block that has ended");
  return block;
}
inline Block& block_of(uint32_t address) {
  return address > kOffset ? block_at(*block().cluster, (address >> 24) - 1) : block();
}

// ---- mbarriers
inline Barrier& barrier_at(Block& block, uint32_t address) {
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) fail("an mbarrier that was never initialised");
  return found->second;
}
inline void settle(Barrier& barrier) {
  if (barrier.pending < 0) fail("more arrivals at an mbarrier than it expects");
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.pending = barrier.arrivals;
  }
}

// ---- shared memory as the async proxy sees it
inline uint32_t swizzle(uint32_t address, uint32_t width) { return address ^ ((address >> 3) & (width - 16)); }
inline const uint8_t* async_read(Block& block, uint32_t address, uint32_t bytes) {
  if (address + bytes > block.shared.size()) fail("shared memory beyond what the launch asked for");
  for (uint32_t word = address / 4; word <= (address + bytes - 1) / 4; ++word)
    if (block.unfenced[word])
      fail(
          "the async proxy reads an ordinary store that no proxy fence has "
          "followed");
  return &block.shared[address];
}

inline void perform(Block& block, const Load& load) {
  const TensorMap& map = *load.map;
  if (load.to % 1024) fail("a TMA box that starts inside a swizzle pattern");
  if (load.to + map.box_rows * map.width > block.shared.size()) fail("a TMA box beyond shared memory");
  for (uint32_t r = 0; r < map.box_rows; ++r)
    for (uint32_t c = 0; c < map.box_columns; c += 8) {  // the swizzle keeps 16 bytes together
      const uint64_t row = load.row + r, column = load.column + c;
      const uint64_t inside = row < map.rows && column < map.columns ? std::min<uint64_t>(map.columns - column, 8) : 0;
      uint8_t* const to = &block.shared[swizzle(load.to + r * map.width + c * 2, map.width)];
      std::memset(to, 0, 16);
      if (inside) std::memcpy(to, map.base + row * map.stride + column * 2, inside * 2);
    }
  Barrier& barrier = barrier_at(block, load.barrier);
  barrier.bytes -= map.box_rows * map.width;
  settle(barrier);
}

inline void run_groups(std::deque<std::vector<std::function<void()>>>& groups, size_t pending) {
  while (groups.size() > pending) {
    for (auto& operation : groups.front()) operation();
    groups.pop_front();
  }
}

// ---- the scheduler
inline std::function<void()> body;  // of the kernel
inline void enter(uint32_t high, uint32_t low) {
  Fiber* const fiber = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
  try {
    body();
  } catch (const std::exception& error) {
    fiber->error = error.what();
  }
  fiber->done = true;
  _longjmp(machine.scheduler, 1);
}

inline void resume(Fiber& fiber) {
  machine.current = &fiber;
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline std::unique_ptr<Block> start_block(Cluster& cluster, unsigned index, int shared_bytes) {
  auto block = std::make_unique<Block>();
  block->cluster = &cluster;
  block->rank = cluster.blocks.size();
  block->shared.resize(0x410 + shared_bytes,
                       0xFF);  // dynamic shared memory starts at 0x410, and is NaN
  block->unfenced.resize(block->shared.size() / 4 + 1);
  for (int t = 0; t < lk::sm90::kThreads; ++t) {
    auto fiber = std::make_unique<Fiber>();
    fiber->block = block.get();
    fiber->thread = dim3(t);
    fiber->index = dim3(index);
    constexpr size_t kStack = 96 << 10;
    fiber->stack.reset(new char[kStack]);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(fiber.get());
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(enter), 2, static_cast<uint32_t>(address >> 32),
                static_cast<uint32_t>(address));
    block->fibers.push_back(std::move(fiber));
  }
  block->running = lk::sm90::kThreads;
  if (machine.coin(2)) block->late = machine.random() % 100;
  return block;
}

// Returns, in words, what the threads of a block wait for and how many wait for each.
inline std::string state(const Block& block) {
  std::map<std::string, int> waits;
  for (auto& fiber : block.fibers)
    if (!fiber->done) ++waits[fiber->waits];
  std::string text = "block " + std::to_string(block.fibers[0]->index.x) + ":";
  for (auto& [what, threads] : waits) text += " " + std::to_string(threads) + " for " + what + ",";
  return text + " ";
}

// Runs a block for a while. Returns whether anything happened, or may still happen without another block.
inline bool advance(Block& block) {
  bool progress = false;
  for (auto arrival = block.arriving.begin(); arrival != block.arriving.end();)
    if (machine.coin(3)) {  // in any order
      (*arrival)();
      arrival = block.arriving.erase(arrival);
      progress = true;
    } else {
      ++arrival;
    }
  if (block.late > 0) {
    --block.late;
    return true;
  }
  if (block.slow_for-- == 0) {
    const size_t threads = block.fibers.size();
    block.slow = machine.coin(2) ? threads : machine.coin(2) ? 0 : machine.random() % threads;  // often the producer
    block.slow_for = machine.random() % 100;
  }
  const size_t first = machine.random() % block.fibers.size();
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    const size_t thread = (first + i) % block.fibers.size();
    Fiber& fiber = *block.fibers[thread];
    if (fiber.done || (fiber.ready && !fiber.ready())) continue;
    progress = true;
    if (thread == block.slow ? !machine.coin(20) : machine.coin(8)) continue;  // this thread does not run in this turn
    fiber.ready = nullptr;
    resume(fiber);
    if (!fiber.error.empty()) fail(fiber.error);
    if (fiber.done) {
      if (!fiber.mma.empty() || !fiber.open_mma.empty()) fail("a thread ends with wgmmas in flight");
      if (!fiber.stores.empty() || !fiber.open_store.empty()) fail("a thread ends with TMA stores in flight");
      if (--block.running == 0 && !block.arriving.empty()) fail("a block ends with loads on their way to it");
    }
  }
  return progress || !block.arriving.empty();
}

inline void run(unsigned grid, unsigned cluster_size, int shared_bytes, std::function<void()> kernel) {
  if (shared_bytes > lk::sm90::kSharedLimit) fail("more shared memory than sm_90 has");
  if (grid == 0 || grid % cluster_size) fail("a grid that is no number of clusters");
  body = std::move(kernel);
  machine.grid = grid;
  unsigned next = 0;
  std::list<Cluster> clusters;
  for (;;) {
    while (next < grid && (clusters.empty() || (clusters.size() + 1) * cluster_size <= machine.resident)) {
      Cluster& cluster = clusters.emplace_back();
      while (cluster.blocks.size() < cluster_size) cluster.blocks.push_back(start_block(cluster, next++, shared_bytes));
    }
    if (clusters.empty()) return;
    bool progress = false;
    for (Cluster& cluster : clusters)
      for (auto& block : cluster.blocks)
        if (block->running > 0) progress = advance(*block) || progress;
    clusters.remove_if([&](const Cluster& cluster) {
      for (auto& block : cluster.blocks)
        if (block->running > 0) return false;
      return progress = true;
    });
    if (!progress) {
      std::string states;
      for (const Cluster& cluster : clusters)
        for (auto& block : cluster.blocks)
          if (block->running > 0) states += state(*block);
      fail("deadlock: " + states);
    }
  }
}

}  // namespace emu
