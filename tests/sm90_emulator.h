// A Hopper GPU, as far as csrc/cuda/sm90 uses one, in one host thread: stands in for ptx.cuh, wgmma.cuh and launch.cuh,
// so that the kernels' own source runs here.
//
// Every CUDA thread is a fiber; fibers are switched in random order wherever they can wait. What is asynchronous
// happens at a random moment of what the instruction set allows: TMA loads until their mbarrier completes, wgmma
// between issue and wait_group, TMA stores until wait_group. A wait that nothing can end is reported as a deadlock.
// Reads of shared memory by the async proxy (TMA, wgmma) of what ordinary stores wrote without a proxy fence are
// errors. Memory is otherwise sequentially consistent: missing release and acquire are not seen here.
//
// The blocks of a cluster start together and end each when its own threads have: what still arrives there from another
// is an error. A multicast arrives in each block at a moment of its own.
#pragma once

#define LK_SM90_PTX
#define LK_SM90_WGMMA
#define LK_SM90_LAUNCH

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/cuda/sm90/layout.h"

#undef __global__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__

namespace emu {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

// What cuTensorMapEncodeTiled is told, in the map's own 128 bytes.
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
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  dim3 thread, index;
  std::function<bool()> ready;  // what it waits for; empty: runnable
  std::string waits;            // in words
  bool done = false;
  std::string error;
  std::vector<std::function<void()>> open_mma;         // issued, not committed
  std::deque<std::vector<std::function<void()>>> mma;  // groups
  std::vector<std::function<void()>> open_store;
  std::deque<std::vector<std::function<void()>>> stores;
  std::vector<uint32_t> dirty;  // shared bytes stored, not yet fenced
};

struct Block {
  std::vector<uint8_t> shared;
  std::vector<uint16_t> unfenced;  // by byte: ordinary stores that no proxy fence has followed
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Meeting> meetings;
  std::map<int, std::vector<uint32_t>> exchange;  // by warp
  std::list<std::function<void()>> arriving;      // TMA loads, stores from other blocks
  std::vector<std::unique_ptr<Fiber>> fibers;
  Cluster* cluster = nullptr;
  unsigned rank = 0;  // in its cluster
  int running = 0;
  int late = 0;  // how long until its threads begin
  unsigned slow = 0, slow_for = 0;  // a thread that hardly moves, if any, and for how long
};

struct Machine {
  std::mt19937 random;
  unsigned resident = 2;
  unsigned grid = 0;
  ucontext_t scheduler;
  Fiber* current = nullptr;

  bool coin(int odds) { return random() % odds == 0; }
};
inline Machine machine;

inline Block& block() { return *machine.current->block; }

inline void wait_until(std::string what, std::function<bool()> ready) {
  Fiber* const fiber = machine.current;
  fiber->waits = std::move(what);
  fiber->ready = std::move(ready);
  swapcontext(&fiber->context, &machine.scheduler);
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

// ---- addresses of the shared memory of a cluster: the block's rank and one, then the address there
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
inline const uint8_t* async_read(Block& block, uint32_t address, int bytes) {
  if (address + bytes > block.shared.size()) fail("shared memory beyond what the launch asked for");
  for (int i = 0; i < bytes; ++i)
    if (block.unfenced[address + i]) fail("the async proxy reads an ordinary store that no proxy fence has followed");
  return &block.shared[address];
}

inline void perform(Block& block, const Load& load) {
  const TensorMap& map = *load.map;
  if (load.to % 1024) fail("a TMA box that starts inside a swizzle pattern");
  for (uint32_t r = 0; r < map.box_rows; ++r)
    for (uint32_t c = 0; c < map.box_columns; ++c) {
      const uint64_t row = load.row + r, column = load.column + c;
      uint16_t value = 0;
      if (row < map.rows && column < map.columns) std::memcpy(&value, map.base + row * map.stride + column * 2, 2);
      const uint32_t address = swizzle(load.to + r * map.width + c * 2, map.width);
      if (address + 2 > block.shared.size()) fail("a TMA box beyond shared memory");
      std::memcpy(&block.shared[address], &value, 2);
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
  swapcontext(&fiber->context, &machine.scheduler);
}

inline std::unique_ptr<Block> start_block(Cluster& cluster, unsigned index, int shared_bytes) {
  auto block = std::make_unique<Block>();
  block->cluster = &cluster;
  block->rank = cluster.blocks.size();
  block->shared.resize(0x410 + shared_bytes, 0xFF);  // dynamic shared memory starts at 0x410, and is NaN
  block->unfenced.resize(block->shared.size());
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

// How many threads of a block wait for what.
inline std::string state(const Block& block) {
  std::map<std::string, int> waits;
  for (auto& fiber : block.fibers)
    if (!fiber->done) ++waits[fiber->waits];
  std::string text = "block " + std::to_string(block.fibers[0]->index.x) + ":";
  for (auto& [what, threads] : waits) text += " " + std::to_string(threads) + " for " + what + ",";
  return text + " ";
}

// A while of a block's life. Whether anything happened or may yet happen of itself.
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
    if (thread == block.slow ? !machine.coin(20) : machine.coin(8)) continue;  // not yet
    fiber.ready = nullptr;
    machine.current = &fiber;
    swapcontext(&machine.scheduler, &fiber.context);
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
      while (cluster.blocks.size() < cluster_size)
        cluster.blocks.push_back(start_block(cluster, next++, shared_bytes));
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

// ---- CUDA's own words
#define threadIdx (emu::machine.current->thread)
#define blockIdx (emu::machine.current->index)
#define gridDim (dim3(emu::machine.grid))
inline void __threadfence() {}
inline void __syncthreads() { emu::meet(0, lk::sm90::kThreads); }
inline void __syncwarp() { emu::meet_warp(); }
template <class T>
T emu_shuffle(T value, int from) {
  static_assert(sizeof(T) == 4);
  auto& words = emu::block().exchange[emu::warp_id()];
  words.resize(32 * 6);
  std::memcpy(&words[emu::lane_id()], &value, 4);
  emu::meet_warp();
  T got;
  std::memcpy(&got, &words[from], 4);
  emu::meet_warp();
  return got;
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emu_shuffle(value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int bit) {
  return emu_shuffle(value, emu::lane_id() ^ bit);
}
inline int atomicAdd(int* p, int value) {
  emu::maybe_switch();
  const int before = *p;
  *p += value;
  return before;
}
inline float __ldcg(const float* p) { return *p; }

namespace lk::sm90 {

extern uint8_t raw[];  // `extern __shared__` of the kernels
inline uint32_t shared_address(const void*) { return 0x410; }

// ---- ptx.cuh
inline void barrier_init(uint32_t barrier, int arrivals) {
  if (barrier % 8) emu::fail("a misaligned mbarrier");
  emu::block().barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_cluster(uint32_t barrier) {
  emu::maybe_switch();
  auto& b = emu::barrier_at(emu::block_of(barrier), barrier & emu::kOffset);
  --b.pending;
  emu::settle(b);
}
inline void barrier_arrive(uint32_t barrier) { barrier_arrive_cluster(barrier); }
inline void barrier_expect(uint32_t barrier, int bytes) {
  emu::barrier_at(emu::block(), barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  auto& b = emu::barrier_at(emu::block(), barrier);
  if (b.phase == parity || emu::machine.coin(4))
    emu::wait_until("mbarrier at " + std::to_string(barrier), [&b, parity] { return b.phase != parity; });
}
inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) { barrier_wait(barrier, parity); }
inline int cluster_rank() { return emu::block().rank; }
inline uint32_t cluster_address(uint32_t address, int rank) { return (rank + 1) << 24 | address; }
inline void cluster_sync() {
  emu::Cluster& cluster = *emu::block().cluster;
  emu::meet(cluster.meeting, cluster.blocks.size() * kThreads, "the cluster's barrier");
}
inline void send_int(uint32_t address, int v, uint32_t barrier) {
  emu::Block& to = emu::block_of(address);
  if (&to != &emu::block_of(barrier)) emu::fail("a store in one block and its barrier in another");
  to.arriving.push_back([&to, address, v, barrier] {
    std::memcpy(&to.shared.at(address & emu::kOffset), &v, 4);
    emu::Barrier& b = emu::barrier_at(to, barrier & emu::kOffset);
    b.bytes -= 4;
    emu::settle(b);
  });
}
inline void tma_load_into(emu::Block& block, const emu::Load& load) {
  block.arriving.push_back([&block, load] { emu::perform(block, load); });
}
inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row) {
  tma_load_into(emu::block(), {to, barrier, reinterpret_cast<const emu::TensorMap*>(map), column, row});
}
inline void tma_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row, uint16_t blocks) {
  for (unsigned rank = 0; rank < 16; ++rank)
    if (blocks >> rank & 1)
      tma_load_into(emu::block_at(*emu::block().cluster, rank),
                    {to, barrier, reinterpret_cast<const emu::TensorMap*>(map), column, row});
}
inline void tma_store(const CUtensorMap* map, uint32_t from, int column, int row) {
  emu::Block& block = emu::block();
  emu::machine.current->open_store.push_back([&block, map, from, column, row] {
    const auto& m = *reinterpret_cast<const emu::TensorMap*>(map);
    for (uint32_t r = 0; r < m.box_rows; ++r)
      for (uint32_t c = 0; c < m.box_columns; ++c)
        if (row + r < m.rows && column + c < m.columns)
          std::memcpy(const_cast<char*>(m.base) + (row + r) * m.stride + (column + c) * 2,
                      emu::async_read(block, emu::swizzle(from + r * m.width + c * 2, m.width), 2), 2);
  });
}
inline void tma_store_commit() {
  emu::Fiber& fiber = *emu::machine.current;
  fiber.stores.push_back(std::move(fiber.open_store));
  fiber.open_store.clear();
  if (emu::machine.coin(2)) emu::run_groups(fiber.stores, 0);
}
template <int PENDING>
void tma_store_wait_read() {
  emu::run_groups(emu::machine.current->stores, PENDING);
}
inline void tma_store_wait_all() { emu::run_groups(emu::machine.current->stores, 0); }
inline void fence_proxy_shared() {
  emu::Fiber& fiber = *emu::machine.current;
  for (const uint32_t address : fiber.dirty) --fiber.block->unfenced[address];
  fiber.dirty.clear();
}
inline void fence_proxy() { fence_proxy_shared(); }
inline void add_release(int* p, int value) {
  emu::maybe_switch();
  *p += value;
}
inline int add_acquire_release(int* p, int value) { return atomicAdd(p, value); }
inline void wait_for(const int* flag, int target) {
  emu::wait_until("a flag to reach " + std::to_string(target), [flag, target] { return *flag >= target; });
}
inline void group_sync(int group) { emu::meet(1 + group, 128); }
inline void consumers_sync() { emu::meet(3, kConsumers); }
template <int REGISTERS>
void registers_give() {}
template <int REGISTERS>
void registers_take() {}

inline uint8_t* shared_bytes(uint32_t address, int bytes) {
  if (address % bytes || address + bytes > emu::block().shared.size()) emu::fail("a bad shared memory address");
  return &emu::block().shared[address];
}
inline void mark(uint32_t address, int bytes) {
  for (int i = 0; i < bytes; ++i) {
    ++emu::block().unfenced[address + i];
    emu::machine.current->dirty.push_back(address + i);
  }
}
inline uint4 load_shared(uint32_t address) {
  uint4 v;
  std::memcpy(&v, shared_bytes(address, 16), 16);
  return v;
}
inline void store_shared(uint32_t address, uint4 v) {
  std::memcpy(shared_bytes(address, 16), &v, 16);
  mark(address, 16);
}
inline int load_shared_int(uint32_t address) {
  int v;
  std::memcpy(&v, shared_bytes(address, 4), 4);
  return v;
}
inline void store_shared_int(uint32_t address, int v) { std::memcpy(shared_bytes(address, 4), &v, 4); }
// Matrix i of four: its row r goes to where lane 8 i + r points; lane l holds elements 2 (l % 4) and the next of row l
// / 4.
inline void store_matrices(uint32_t address, const uint32_t (&v)[4]) {
  auto& words = emu::block().exchange[emu::warp_id()];
  words.resize(32 * 6);
  const int lane = emu::lane_id();
  words[32 + lane] = address;
  emu::meet_warp();
  for (int i = 0; i < 4; ++i) {
    const uint32_t to = words[32 + 8 * i + lane / 4] + lane % 4 * 4;
    std::memcpy(shared_bytes(to, 4), &v[i], 4);
    mark(to, 4);
  }
  emu::meet_warp();
}

// ---- wgmma.cuh. Operands are read as the canonical layouts of the PTX ISA say, from the descriptor's fields alone.
struct Descriptor {
  uint32_t start, leading, stride, width;
  explicit Descriptor(uint64_t d)
      : start((d & 0x3FFF) << 4), leading((d >> 16 & 0x3FFF) << 4), stride((d >> 32 & 0x3FFF) << 4), width(0) {
    const int layout = d >> 62;
    width = layout == 1 ? 128 : layout == 2 ? 64 : layout == 3 ? 32 : 0;
    if (width == 0) emu::fail("a descriptor without swizzle");
    if (d >> 49 & 7) emu::fail("a base offset");
  }
  uint32_t at(bool mn_major, int mn, int k) const {
    const int span = width / 2;
    const uint32_t linear = mn_major ? mn % span * 2 + mn / span * leading + k % 8 * width + k / 8 * stride
                                     : mn % 8 * width + mn / 8 * stride + k * 2;
    return emu::swizzle(start + linear, width);
  }
};

template <class T>
float element(emu::Block& block, uint32_t address) {
  T v;
  std::memcpy(&v, emu::async_read(block, address, 2), 2);
  return static_cast<float>(v);
}

// .sync.aligned: the threads of a warp go together.
inline void wgmma_fence() { emu::meet_warp(); }
template <int N>
void wgmma_registers(float (&)[N]) {}
inline void wgmma_commit() {
  emu::Fiber& fiber = *emu::machine.current;
  fiber.mma.push_back(std::move(fiber.open_mma));
  fiber.open_mma.clear();
}
template <int PENDING>
void wgmma_wait() {
  emu::meet_warp();
  emu::maybe_switch();
  emu::run_groups(emu::machine.current->mma, PENDING);
  emu::meet_warp();  // of all threads, before any goes on
}

template <class T, int N>
struct Wgmma {
  template <int TRANSPOSE_A, int TRANSPOSE_B>
  static void mma(float (&d)[N / 2], uint64_t a, uint64_t b) {
    emu::Fiber& fiber = *emu::machine.current;
    const int thread = fiber.thread.x % 128;
    float* const to = d;
    auto operation = [&fiber, to, a, b, thread] {
      const Descriptor da(a), db(b);
      float rows[2][16];
      for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k)
          rows[half][k] =
              element<T>(*fiber.block, da.at(TRANSPOSE_A, thread / 32 * 16 + thread % 32 / 4 + 8 * half, k));
      for (int i = 0; i < N / 2; i += 4)
        for (int e = 0; e < 2; ++e)
          for (int k = 0; k < 16; ++k) {
            const float v = element<T>(*fiber.block, db.at(TRANSPOSE_B, i / 4 * 8 + thread % 4 * 2 + e, k));
            to[i + e] += rows[0][k] * v;
            to[i + 2 + e] += rows[1][k] * v;
          }
    };
    // at once, or when it is waited for; never before what was issued earlier
    if (fiber.mma.empty() && fiber.open_mma.empty() && emu::machine.coin(2))
      operation();
    else
      fiber.open_mma.push_back(operation);
  }
};

// ---- launch.cuh
template <int CLUSTER, class P>
cudaError_t launch(void (*kernel)(P), const P& p, int shared_bytes, int blocks, cudaStream_t) {
  const auto copy = std::make_shared<P>(p);
  emu::run(blocks, CLUSTER, shared_bytes, [kernel, copy] { kernel(*copy); });
  return cudaSuccess;
}

}  // namespace lk::sm90
