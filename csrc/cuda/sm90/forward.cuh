// y = x wᵀ + bias + s · h bᵀ, h = x̂ aᵀ, in one launch.
//
//   h tiles   h[128, RP] over all of K. x is masked in shared memory, and the accumulators are multiplied by c. If h
//             is saved it is stored unscaled. s · h, rounded once from fp32, goes to scratch: s · b would not be
//             exact, and accumulators that already hold x wᵀ cannot be scaled by s.
//   y tiles   y[128, BN] over all of K, then ceil(R / 64) more stages add (s · h) bᵀ to the same accumulators.
#pragma once

#include "launch_pass.cuh"

namespace lk::sm90 {

template <int BN, int RP, class S>
__device__ __forceinline__ void produce(const ForwardParams& p, const S& shared) {
  using G = Tile<BN, RP>;
  Producer<S> producer(shared, p.plan.prep);
  const int blocks = ceil_div(p.K, kTileK), low = rank_stages(p.R), items = p.plan.items();
  for (;;) {
    const int ticket = producer.claim(p.counters);
    if (ticket >= items) return;
    const Item item = item_of(p.plan, ticket, shared.rank);
    if (item.kind == Kind::kSkinny) {
      producer.await_adapters(p.counters);
#pragma unroll 1
      for (int i = 0; i < blocks; ++i, producer.next()) {
        producer.open(G::kSkinnyBytes);
        producer.load(0, p.x, i * kTileK, item.m * kTileM);
        producer.template share_rows<RP>(G::kBytesA, p.a, i * kTileK, item.n * RP, kTileK * 2);
      }
    } else if (item.kind == Kind::kOut) {
#pragma unroll 1
      for (int i = 0; i < blocks; ++i, producer.next()) {
        producer.open(G::kOutBytes);
        producer.load(0, p.x, i * kTileK, item.m * kTileM);
        producer.template share_rows<BN>(G::kBytesA, p.w, i * kTileK, item.n * BN, kTileK * 2);
      }
      producer.await_adapters(p.counters);
#pragma unroll 1
      for (int i = 0; i < low; ++i, producer.next()) {
        producer.open(G::kOutBytes);
        producer.template share_rows<BN>(G::kBytesA, p.b, i * kTileK, item.n * BN, kTileK * 2);
        if (i == 0) producer.await(p.counters + kReady + item.m, ready_target(p.plan));
        producer.load(0, p.sh, i * kTileK, item.m * kTileM);
      }
    }
  }
}

// Loads the bias of the columns of a [64, BN] tile from column n on, two neighbours in a word, and zeros beyond
// `columns`, a multiple of 8.
template <int BN>
__device__ __forceinline__ void load_bias(uint32_t (&pairs)[BN / 8], const void* bias, int thread, int n, int columns) {
  const int first = n + fragment_col(thread, 0);
  const uint32_t* const at = static_cast<const uint32_t*>(bias) + first / 2;
#pragma unroll
  for (int j = 0; j < BN / 8; ++j) pairs[j] = first + 8 * j < columns ? at[4 * j] : 0;
}
template <class T, int BN>
__device__ __forceinline__ void add_bias(float (&d)[BN / 2], const uint32_t (&pairs)[BN / 8]) {
#pragma unroll
  for (int i = 0; i < BN / 2; i += 4) {
    const float2 add = unpack(T(), pairs[i / 4]);
    d[i] += add.x;
    d[i + 1] += add.y;
    d[i + 2] += add.x;
    d[i + 3] += add.y;
  }
}

template <class T, int BN, int RP, class S>
__device__ __forceinline__ void consume(const ForwardParams& p, const S& shared, int group) {
  using G = Tile<BN, RP>;
  Consumer<S> c(shared, group);
  const Dropout dropout(p);
  const int blocks = ceil_div(p.K, kTileK), low = rank_stages(p.R), items = p.plan.items();
  for (;;) {
    const int ticket = c.next_ticket();
    if (ticket >= items) break;
    const Item item = item_of(p.plan, ticket, shared.rank);
    if (item.kind == Kind::kPrep) {
      prep_item<T>(p, item.m);
    } else if (item.kind == Kind::kSkinny) {
      float h[RP / 2] = {};
      skinny_tile<T, KMajor, RP>(c, h, blocks, &dropout, item.m * kTileM);
      store_skinny<T, RP>(c, p, h, item.m, item.n * RP, p.sh_pointer, p.scale * p.rescale, p.h, p.rescale);
    } else {
      float y[BN / 2] = {};
      wgmma_registers(y);
#pragma unroll 1
      for (int i = 0; i < blocks; ++i) {
        const uint32_t stage = c.wait();
        mma_stage<T, KMajor, KMajor, BN, kTileK / 16>(y, stage + group * kBoxBytes, stage + G::kBytesA);
        c.advance();
      }
#pragma unroll 1
      for (int i = 0; i < low; ++i) {
        const uint32_t stage = c.wait();
        mma_stage<T, KMajor, KMajor, BN, G::kRankSteps>(y, stage + group * kBoxBytes, stage + G::kBytesA);
        c.advance();
      }
      uint32_t bias[BN / 8];
      if (p.bias != nullptr) load_bias<BN>(bias, p.bias, c.thread, item.n * BN, p.N);  // while the last wgmmas run
      c.drain(y);
      if (p.bias != nullptr) add_bias<T, BN>(y, bias);
      store_tile<T, BN>(c, p.y, y, item.m * kTileM + group * 64, item.n * BN);
    }
  }
  if (c.thread == 0) tma_store_wait_all();
}

template <class T>
cudaError_t launch_forward(const ForwardParams& p, Tiling tiling, int blocks, cudaStream_t stream) {
  return launch_pass<T>(p, tiling, blocks, stream);
}

}  // namespace lk::sm90
