// A block has a producer thread, which claims tickets and issues TMA loads into a ring of stages, and two consumer
// warpgroups.
//
//   full[s]     1 arrival (the producer's, with the bytes to come) + those bytes: stage s may be read
//   empty[s]    8 arrivals, one of every consumer warp: stage s may be overwritten
//   claimed[i]  1 arrival: ticket i of a ring of two may be read;   read[i]  8 arrivals: it may be overwritten
//
// In a cluster of two, each producer loads its block's own first operand, and half of the second operand into both
// blocks. So the bytes of a stage come from both producers, and stage s is empty once the consumers of both blocks have
// released it (16 arrivals). The producer of block 0 claims for both blocks. Before it overwrites a ticket it waits at
// its read[i] for all consumers and the other producer (17 arrivals). It sends the ticket to the other block's shared
// memory, where claimed[i] expects 4 bytes.
#pragma once

#include "../../philox.h"
#include "launch.cuh"
#include "mma.cuh"
#include "params.h"
#include "ptx.cuh"

namespace lk::sm90 {

constexpr int kConsumerWarps = kConsumers / 32;

template <int STAGES, int STAGE_BYTES, int STAGING_BYTES, int CLUSTER>
struct Shared {
  static constexpr int kStages = STAGES, kCluster = CLUSTER;
  uint32_t base;
  int rank;  // of the block in its cluster

  __device__ __forceinline__ explicit Shared(const void* raw)
      : base((shared_address(raw) + 1023) & ~1023u), rank(CLUSTER == 1 ? 0 : cluster_rank()) {}
  __device__ __forceinline__ uint32_t stage(int s) const { return base + s * STAGE_BYTES; }
  __device__ __forceinline__ uint32_t staging(int group) const {
    return base + STAGES * STAGE_BYTES + group * 2 * kBoxBytes;
  }
  __device__ __forceinline__ uint32_t barriers() const { return base + STAGES * STAGE_BYTES + STAGING_BYTES; }
  __device__ __forceinline__ uint32_t full(int s) const { return barriers() + 8 * s; }
  __device__ __forceinline__ uint32_t empty(int s) const { return barriers() + 8 * (STAGES + s); }
  __device__ __forceinline__ uint32_t claimed(int i) const { return barriers() + 8 * (2 * STAGES + i); }
  __device__ __forceinline__ uint32_t read(int i) const { return barriers() + 8 * (2 * STAGES + 2 + i); }
  __device__ __forceinline__ uint32_t ticket(int i) const { return barriers() + 8 * (2 * STAGES + 4) + 4 * i; }
  __device__ __forceinline__ uint32_t word(int group) const { return barriers() + 8 * (2 * STAGES + 5) + 4 * group; }
  static_assert(8 * (2 * STAGES + 6) <= 256);

  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < STAGES; ++s) {
        barrier_init(full(s), 1);
        barrier_init(empty(s), CLUSTER * kConsumerWarps);
      }
      for (int i = 0; i < 2; ++i) {
        barrier_init(claimed(i), 1);
        barrier_init(read(i), CLUSTER * kConsumerWarps + CLUSTER - 1);
      }
      barrier_init_fence();
    }
    sync();
  }
  // Synchronises all threads of the cluster.
  __device__ __forceinline__ void sync() const {
    if constexpr (CLUSTER == 1) {
      __syncthreads();
    } else {
      __syncwarp();  // the barrier is for whole warps
      cluster_sync();
    }
  }
  // Waits at a barrier where threads of another block arrive or complete bytes, and then sees what they did before.
  __device__ __forceinline__ void wait_for_all(uint32_t barrier, uint32_t parity) const {
    if constexpr (CLUSTER == 1)
      barrier_wait(barrier, parity);
    else
      barrier_wait_cluster(barrier, parity);
  }
  __device__ __forceinline__ int await_ticket(int i, uint32_t parity) const {
    wait_for_all(claimed(i), parity);
    return load_shared_int(ticket(i));
  }
  __device__ __forceinline__ void release_ticket(int i) const {
    if constexpr (CLUSTER == 1)
      barrier_arrive(read(i));
    else
      barrier_arrive_cluster_release(cluster_address(read(i), 0));
  }
  // Counts this warp among those that no longer need stage s. A whole warp calls it.
  __device__ __forceinline__ void release_stage(int s, int lane) const {
    if constexpr (CLUSTER == 1) {
      if (lane == 0) barrier_arrive(empty(s));
    } else {
      if (lane < CLUSTER) barrier_arrive_cluster(cluster_address(empty(s), lane));
    }
  }
};

// The state of the producer thread.
template <class S>
struct Producer {
  const S& shared;
  Ring<S::kStages> ring{kVacant};
  Ring<2> tickets;  // block 0 fills it, the other block reads it
  int prep_target;

  __device__ __forceinline__ Producer(const S& s, int prep)
      : shared(s), tickets(s.rank == 0 ? kVacant : kFilled), prep_target(prep) {}

  __device__ __forceinline__ int claim(int* counters) {
    const int i = tickets.slot;
    int ticket;
    if (S::kCluster == 1 || shared.rank == 0) {
      ticket = atomicAdd(counters + kTicket, 1);
      shared.wait_for_all(shared.read(i), tickets.parity);
      store_shared_int(shared.ticket(i), ticket);
      barrier_arrive(shared.claimed(i));
#pragma unroll
      for (int other = 1; other < S::kCluster; ++other)
        send_int(cluster_address(shared.ticket(i), other), ticket, cluster_address(shared.claimed(i), other));
    } else {
      barrier_expect(shared.claimed(i), sizeof(ticket));
      ticket = shared.await_ticket(i, tickets.parity);
      shared.release_ticket(i);
    }
    tickets.next();
    return ticket;
  }
  // Waits until the stage is free and announces `bytes`. The caller then issues the loads and calls next().
  __device__ __forceinline__ void open(int bytes) {
    barrier_wait(shared.empty(ring.slot), ring.parity);
    barrier_expect(shared.full(ring.slot), bytes);
  }
  // Loads a box into this block.
  __device__ __forceinline__ void load(int place, const CUtensorMap& map, int column, int row) const {
    tma_load(shared.stage(ring.slot) + place, &map, shared.full(ring.slot), column, row);
  }
  // Loads a box into all blocks of the cluster.
  __device__ __forceinline__ void share(int place, const CUtensorMap& map, int column, int row) const {
    if constexpr (S::kCluster == 1)
      load(place, map, column, row);
    else
      tma_multicast(shared.stage(ring.slot) + place, &map, shared.full(ring.slot), column, row, (1 << S::kCluster) - 1);
  }
  // Loads this block's part of ROWS rows, `width` bytes each, into all blocks. The map's box is such a part.
  template <int ROWS>
  __device__ __forceinline__ void share_rows(int place, const CUtensorMap& map, int column, int row, int width) const {
    constexpr int kPart = ROWS / S::kCluster;
    static_assert(kPart % 8 == 0, "parts start where the swizzle's pattern does");
    share(place + shared.rank * kPart * width, map, column, row + shared.rank * kPart);
  }
  __device__ __forceinline__ void next() { ring.next(); }
  // Waits for a flag. Afterwards TMA may load what another block wrote with ordinary stores before it.
  __device__ __forceinline__ void await(const int* flag, int target) {
    wait_for(flag, target);
    fence_proxy();
  }
  __device__ __forceinline__ void await_adapters(const int* counters) {
    if (prep_target > 0) await(counters + kPrepDone, prep_target);
  }
};

// The state of a consumer warpgroup.
template <class S>
struct Consumer {
  const S& shared;
  Ring<S::kStages> ring{kFilled};
  Ring<2> tickets{kFilled};
  int group, thread;  // the warpgroup, 0 or 1, and the thread in it
  int previous = -1;  // the stage that wgmma may still be reading

  __device__ __forceinline__ Consumer(const S& s, int g) : shared(s), group(g), thread(threadIdx.x % 128) {}

  __device__ __forceinline__ int warp() const { return thread / 32; }
  __device__ __forceinline__ int lane() const { return thread % 32; }

  __device__ __forceinline__ int next_ticket() {
    const int ticket = shared.await_ticket(tickets.slot, tickets.parity);
    __syncwarp();
    if (lane() == 0) shared.release_ticket(tickets.slot);
    tickets.next();
    return __shfl_sync(~0u, ticket, 0);
  }
  // Waits for the current stage and returns its address.
  __device__ __forceinline__ uint32_t wait() const { return wait(ring); }
  __device__ __forceinline__ uint32_t wait(const Ring<S::kStages>& at) const {
    barrier_wait(shared.full(at.slot), at.parity);
    return shared.stage(at.slot);
  }
  // Called after the wgmmas of a stage were committed. When at most one group is in flight, those of the stage before
  // are done, and that stage is released.
  __device__ __forceinline__ void advance() {
    wgmma_wait<1>();
    release();
    previous = ring.slot;
    ring.next();
  }
  // Called after the last stage. Afterwards d may be read.
  template <int N>
  __device__ __forceinline__ void drain(float (&d)[N]) {
    wgmma_wait<0>();
    wgmma_registers(d);
    release();
    previous = -1;
  }
  // Releases the next `stages` stages, which were read through a copy of `ring`. No wgmma may be in flight.
  __device__ __forceinline__ void pass(int stages) {
    for (int i = 0; i < stages; ++i, ring.next()) shared.release_stage(ring.slot, lane());
  }

 private:
  __device__ __forceinline__ void release() const {
    if (previous >= 0) shared.release_stage(previous, lane());
  }
};

struct Dropout {
  uint32_t key0, key1, threshold;
  __device__ __forceinline__ explicit Dropout(const Common& p) : key0(0), key1(0), threshold(p.threshold) {
    if (threshold == 0) return;
    const uint64_t seed = static_cast<uint64_t>(*p.seed);
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
  }
  __device__ __forceinline__ Philox4 draw(int m, int group) const { return philox4x32_10(group, m, 0, 0, key0, key1); }
};

// Replaces a 64 x 64 box of x in shared memory, which starts at row m and column k, by keep ⊙ x. One warpgroup calls it
// before its wgmmas read the box.
__device__ __forceinline__ void mask_box(const Dropout& dropout, uint32_t box, int m, int k, int group, int thread) {
  const int chunk = chunk_col(thread);
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const int row = chunk_row(thread, i);
    const Philox4 r = dropout.draw(m + row, (k >> 3) + chunk);
    const uint32_t address = box + swizzled(row, chunk * 16, 128);
    uint4 v = load_shared(address);
    v.x &= keep_pair(r.word[0], dropout.threshold);
    v.y &= keep_pair(r.word[1], dropout.threshold);
    v.z &= keep_pair(r.word[2], dropout.threshold);
    v.w &= keep_pair(r.word[3], dropout.threshold);
    store_shared(address, v);
  }
  fence_proxy_shared();  // every thread fences its stores before the barrier, so that wgmma reads them
  group_sync(group);
}

// Copies a chunk of an operand of type T. All consumers of a block call it.
template <class T>
__device__ __forceinline__ void copy_chunk(const PrepJob& job, int chunk, int consumer) {
  const int64_t total = static_cast<int64_t>(job.rows) * job.pitch;
  const T* const from = static_cast<const T*>(job.from);
#pragma unroll 1
  for (int i = 0; i < kPrepChunk / (kConsumers * 8); ++i) {
    const int64_t at = static_cast<int64_t>(chunk) * kPrepChunk + (i * kConsumers + consumer) * 8;
    if (at >= total) return;
    const int64_t row = at / job.pitch;
    const int col = static_cast<int>(at - row * job.pitch);
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = col + j < job.cols ? static_cast<float>(from[row * job.ld + col + j]) : 0.f;
    *reinterpret_cast<uint4*>(static_cast<T*>(job.to) + at) =
        make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7]));
  }
}
template <class T>
__device__ __forceinline__ void prep_item(const Common& p, int chunk) {
  const int consumer = threadIdx.x - 128;
  for (int j = 0; j < kPrepJobs; ++j) {
    const PrepJob& job = p.prep[j];
    if (chunk >= 0 && chunk < job.chunks) copy_chunk<T>(job, chunk, consumer);
    chunk -= job.chunks;
  }
  __threadfence();
  fence_proxy();  // TMA reads what was stored here
  consumers_sync();
  if (consumer == 0) add_release(p.counters + kPrepDone, 1);
}

// Ends a launch; all threads call it. The last block to exit zeroes the counters for the next launch on this stream. No
// block leaves while another of its cluster could still arrive at its barriers.
template <class S>
__device__ __forceinline__ void finish(const S& shared, const Common& p) {
  shared.sync();
  if (threadIdx.x == 0) {
    const int exited = add_acquire_release(p.counters + kExited, 1);
    store_shared_int(shared.word(0), exited == static_cast<int>(gridDim.x) - 1);
  }
  __syncthreads();
  if (load_shared_int(shared.word(0)))
    for (int i = threadIdx.x; i < p.counter_count; i += kThreads) p.counters[i] = 0;
}

}  // namespace lk::sm90
