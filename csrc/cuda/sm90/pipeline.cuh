// One block: a producer thread that claims tickets and issues TMA loads into a ring of stages, and two consumer
// warpgroups.
//
//   full[s]     1 arrival (the producer's, with the bytes to come) + those bytes: stage s may be read
//   empty[s]    8 arrivals, one of every consumer warp: stage s may be overwritten
//   claimed[i]  1 arrival: ticket i of a ring of two may be read;   read[i]  8 arrivals: it may be overwritten
#pragma once

#include "../../philox.h"
#include "launch.cuh"
#include "mma.cuh"
#include "params.h"
#include "ptx.cuh"

namespace lk::sm90 {

constexpr int kConsumerWarps = kConsumers / 32;

template <int STAGES, int STAGE_BYTES, int STAGING_BYTES>
struct Shared {
  static constexpr int kStages = STAGES;
  uint32_t base;

  __device__ __forceinline__ explicit Shared(const void* raw) : base((shared_address(raw) + 1023) & ~1023u) {}
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
        barrier_init(empty(s), kConsumerWarps);
      }
      for (int i = 0; i < 2; ++i) {
        barrier_init(claimed(i), 1);
        barrier_init(read(i), kConsumerWarps);
      }
      barrier_init_fence();
    }
    __syncthreads();
  }
};

// The producer thread's side.
template <class S>
struct Producer {
  const S& shared;
  Ring<S::kStages> ring{kVacant};
  Ring<2> tickets{kVacant};
  int prep_target;

  __device__ __forceinline__ Producer(const S& s, int prep) : shared(s), prep_target(prep) {}

  __device__ __forceinline__ int claim(int* counters) {
    const int ticket = atomicAdd(counters + kTicket, 1);
    barrier_wait(shared.read(tickets.slot), tickets.parity);
    store_shared_int(shared.ticket(tickets.slot), ticket);
    barrier_arrive(shared.claimed(tickets.slot));
    tickets.next();
    return ticket;
  }
  // Waits until the stage is free and announces `bytes`; loads into address() on full() follow, then next().
  __device__ __forceinline__ void open(int bytes) {
    barrier_wait(shared.empty(ring.slot), ring.parity);
    barrier_expect(full(), bytes);
  }
  __device__ __forceinline__ uint32_t address() const { return shared.stage(ring.slot); }
  __device__ __forceinline__ uint32_t full() const { return shared.full(ring.slot); }
  __device__ __forceinline__ void next() { ring.next(); }
  // What another block wrote with ordinary stores may be loaded by TMA afterwards.
  __device__ __forceinline__ void await(const int* flag, int target) {
    wait_for(flag, target);
    fence_proxy();
  }
  __device__ __forceinline__ void await_adapters(const int* counters) {
    if (prep_target > 0) await(counters + kPrepDone, prep_target);
  }
};

// A consumer warpgroup's side.
template <class S>
struct Consumer {
  const S& shared;
  Ring<S::kStages> ring{kFilled};
  Ring<2> tickets{kFilled};
  int group, thread;  // warpgroup 0 or 1, thread of it
  int previous = -1;  // the stage that wgmma may still be reading

  __device__ __forceinline__ Consumer(const S& s, int g) : shared(s), group(g), thread(threadIdx.x % 128) {}

  __device__ __forceinline__ int warp() const { return thread / 32; }
  __device__ __forceinline__ int lane() const { return thread % 32; }

  __device__ __forceinline__ int next_ticket() {
    barrier_wait(shared.claimed(tickets.slot), tickets.parity);
    const int ticket = load_shared_int(shared.ticket(tickets.slot));
    __syncwarp();
    if (lane() == 0) barrier_arrive(shared.read(tickets.slot));
    tickets.next();
    return __shfl_sync(~0u, ticket, 0);
  }
  __device__ __forceinline__ uint32_t wait() const {  // for the stage at hand; its address
    barrier_wait(shared.full(ring.slot), ring.parity);
    return shared.stage(ring.slot);
  }
  // After a stage's wgmmas were committed: those of the stage before are done when at most one group is in flight.
  __device__ __forceinline__ void advance() {
    wgmma_wait<1>();
    release();
    previous = ring.slot;
    ring.next();
  }
  // After the last stage: d may be read.
  template <int N>
  __device__ __forceinline__ void drain(float (&d)[N]) {
    wgmma_wait<0>();
    wgmma_registers(d);
    release();
    previous = -1;
  }

 private:
  __device__ __forceinline__ void release() const {
    if (previous >= 0 && lane() == 0) barrier_arrive(shared.empty(previous));
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

// keep ⊙ x on a 64 x 64 box in shared memory, in place: rows m.., columns k... By one warpgroup, before its wgmmas read
// the box.
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
  fence_proxy_shared();  // ordinary stores before wgmma, of every thread before the barrier
  group_sync(group);
}

// A chunk of an adapter, converted to T by all consumers of a block.
template <class T, class FROM>
__device__ __forceinline__ void convert_chunk(const PrepJob& job, int chunk, int consumer) {
  const int64_t total = static_cast<int64_t>(job.rows) * job.pitch;
  const FROM* const from = static_cast<const FROM*>(job.from);
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
    if (chunk >= 0 && chunk < job.chunks) {
      if (job.fp32)
        convert_chunk<T, float>(job, chunk, consumer);
      else
        convert_chunk<T, T>(job, chunk, consumer);
    }
    chunk -= job.chunks;
  }
  __threadfence();
  fence_proxy();  // TMA reads what was stored here
  consumers_sync();
  if (consumer == 0) add_release(p.counters + kPrepDone, 1);
}

// The end of a launch, by all threads: the last block out zeroes the counters for the next one on this stream.
template <class S>
__device__ __forceinline__ void finish(const S& shared, const Common& p) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const int exited = add_acquire_release(p.counters + kExited, 1);
    store_shared_int(shared.word(0), exited == static_cast<int>(gridDim.x) - 1);
  }
  __syncthreads();
  if (load_shared_int(shared.word(0)))
    for (int i = threadIdx.x; i < p.counter_count; i += kThreads) p.counters[i] = 0;
}

}  // namespace lk::sm90
