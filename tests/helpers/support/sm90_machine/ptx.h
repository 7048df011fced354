// csrc/cuda/sm90/{ptx,launch}.cuh and CUDA's keywords and built-in functions, on the emulated GPU of machine.h.
#pragma once

#define LK_SM90_PTX
#define LK_SM90_LAUNCH

#include "machine.h"

#undef __global__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__

// ---- CUDA's built-in variables and functions
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
inline void barrier_arrive_cluster_release(uint32_t barrier) { barrier_arrive_cluster(barrier); }
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
  for (const uint32_t word : fiber.dirty) --fiber.block->unfenced[word];
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
inline void mark(uint32_t address, uint32_t bytes) {
  for (uint32_t word = address / 4; word < (address + bytes) / 4; ++word) {
    ++emu::block().unfenced[word];
    emu::machine.current->dirty.push_back(word);
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
// Row r of matrix i, of four, goes to the address that lane 8 i + r gives. Lane l holds two elements of row l / 4: number
// 2 (l % 4) and the next.
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

// ---- launch.cuh
template <int CLUSTER, class P>
cudaError_t launch(void (*kernel)(P), const P& p, int shared_bytes, int blocks, cudaStream_t) {
  const auto copy = std::make_shared<P>(p);
  emu::run(blocks, CLUSTER, shared_bytes, [kernel, copy] { kernel(*copy); });
  return cudaSuccess;
}

}  // namespace lk::sm90
