// Parts that the kernels share: narrow tiles (h = x̂ aᵀ, g = s · dy b), stores of output tiles, sums of parts.
#pragma once

#include "pipeline.cuh"

namespace lk::sm90 {

// d[64, RP] = A[64, blocks * 64] B, where A is this warpgroup's half of the A boxes. `dropout`, if not null, masks A.
template <class T, class B, int RP, class S>
__device__ __forceinline__ void skinny_tile(Consumer<S>& c, float (&d)[RP / 2], int blocks, const Dropout* dropout,
                                            int m) {
  wgmma_registers(d);
#pragma unroll 1
  for (int i = 0; i < blocks; ++i) {
    const uint32_t stage = c.wait(), box = stage + c.group * kBoxBytes;
    if (dropout != nullptr && dropout->threshold > 0)
      mask_box(*dropout, box, m + c.group * 64, i * kTileK, c.group, c.thread);
    mma_stage<T, KMajor, B, RP, kTileK / 16>(d, box, stage + kTileM * kTileK * 2);
    c.advance();
  }
  c.drain(d);
}

// Stores this warpgroup's rows of a narrow tile, whose first column is `rank`: factor · d to `to` (row stride `pitch`,
// even) and, unless `saved` is null, saved_factor · d to the contiguous `saved` [M,R]. Then publishes the row block.
template <class T, int RP, class S>
__device__ __forceinline__ void store_skinny(const Consumer<S>& c, const Common& p, const float (&d)[RP / 2], int block,
                                             int rank, void* to, float factor, void* saved, float saved_factor) {
  const int first = block * kTileM + c.group * 64;
#pragma unroll
  for (int i = 0; i < RP / 2; i += 2) {
    const int row = first + fragment_row(c.thread, i), col = rank + fragment_col(c.thread, i);
    if (row < p.M && col < p.R) {
      *reinterpret_cast<uint32_t*>(static_cast<T*>(to) + static_cast<int64_t>(row) * p.pitch + col) =
          pack2<T>(d[i] * factor, d[i + 1] * factor);
      if (saved != nullptr) {
        T* const at = static_cast<T*>(saved) + static_cast<int64_t>(row) * p.R + col;
        if (p.R % 2 == 0) {
          *reinterpret_cast<uint32_t*>(at) = pack2<T>(d[i] * saved_factor, d[i + 1] * saved_factor);
        } else {
          at[0] = rounded<T>(d[i] * saved_factor);
          if (col + 1 < p.R) at[1] = rounded<T>(d[i + 1] * saved_factor);
        }
      }
    }
  }
  __threadfence();
  fence_proxy();  // TMA of other blocks reads what was stored here
  group_sync(c.group);
  if (c.thread == 0) add_release(p.counters + kReady + block, 1);
}

// Rounds this warpgroup's [64, BN] tile to T and stores it by TMA from row m and column n on. Chunks of 64 columns
// alternate between two staging boxes: a box is written again once the store that used it has read it.
template <class T, int BN, class S>
__device__ __forceinline__ void store_tile(const Consumer<S>& c, const CUtensorMap& map, const float (&d)[BN / 2],
                                           int m, int n) {
#pragma unroll
  for (int chunk = 0; chunk < BN / 64; ++chunk) {
    const uint32_t box = c.shared.staging(c.group) + (chunk & 1) * kBoxBytes;
    if (c.thread == 0) tma_store_wait_read<1>();
    group_sync(c.group);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = chunk * 32 + (pair * 2 + e) * 4;
        v[2 * e] = pack2<T>(d[i], d[i + 1]);
        v[2 * e + 1] = pack2<T>(d[i + 2], d[i + 3]);
      }
      store_matrices(box + stmatrix_offset(c.warp(), c.lane(), pair), v);
    }
    fence_proxy_shared();  // every thread fences its ordinary stores, before the barrier, so that TMA reads them
    group_sync(c.group);
    if (c.thread == 0) {
      tma_store(&map, box, n + chunk * 64, m);
      tma_store_commit();
    }
  }
}

// Writes this part to scratch and counts it. Returns true in the warpgroup that is the last of its tile to arrive; d is
// then the sum of all parts.
template <int REGISTERS, class S>
__device__ __forceinline__ bool sum_parts(const Consumer<S>& c, float (&d)[REGISTERS], float* partials, int* counter,
                                          int tile, int split, int splits) {
  if (splits == 1) return true;
  const int consumer = c.group * 128 + c.thread;
  float* const own = partials + partial_index(splits, tile, split, REGISTERS, 0, consumer);
#pragma unroll
  for (int i = 0; i < REGISTERS; ++i) own[i * kConsumers] = d[i];
  __threadfence();
  group_sync(c.group);
  if (c.thread == 0) store_shared_int(c.shared.word(c.group), add_acquire_release(counter, 1) == splits - 1);
  group_sync(c.group);
  if (!load_shared_int(c.shared.word(c.group))) return false;
  __threadfence();
  const float* part = partials + partial_index(splits, tile, 0, REGISTERS, 0, consumer);
#pragma unroll
  for (int i = 0; i < REGISTERS; ++i) d[i] = __ldcg(part + i * kConsumers);
#pragma unroll 1
  for (int s = 1; s < splits; ++s) {
    part += REGISTERS * kConsumers;
#pragma unroll
    for (int i = 0; i < REGISTERS; ++i) d[i] += __ldcg(part + i * kConsumers);
  }
  return true;
}

}  // namespace lk::sm90
