// dx = dy w + c · keep ⊙ (g a), da = c · gᵀ (keep ⊙ x), db = s · dyᵀ h, with g = s · dy b, in one launch.
//
//   g tiles    g[128, RP] over all of N, stored in scratch and published by row block.
//   db tiles   dyᵀ h [128 of N, RP] over a part of M.
//   dx tiles   dy w over all of N, with w read N-major, as it is stored. Then g a is added: without dropout in the same
//              accumulators; with dropout 64 columns at a time in accumulators of their own, which are masked, scaled
//              and added. So dx tiles wait for g late, and the mask is drawn while the tensor cores work.
//   da tiles   (keep ⊙ x)ᵀ g [128 of K, RP] over a part of M, x masked in shared memory.
//
// Parts of da and db go to scratch. The last part to arrive sums all of them in order, so gradients do not depend on
// timing.
#pragma once

#include "launch_pass.cuh"

namespace lk::sm90 {

// Loads the second operand of a stage for the whole cluster: 64 contraction rows from `row` on and RP columns from
// `rank` on, in boxes of at most 64 columns.
template <class G, class S>
__device__ __forceinline__ void share_rank_boxes(const Producer<S>& producer, const CUtensorMap& map, int rank,
                                                 int row) {
#pragma unroll
  for (int i = 0; i < G::kRankBoxes; ++i)
    producer.template share_rows<kTileK>(G::kBytesA + i * 64 * G::kWidth, map, rank + i * 64, row, G::kWidth);
}
// Loads COLUMNS columns of a wide second operand for the whole cluster; this block loads its part of the boxes.
template <class G, int COLUMNS, class S>
__device__ __forceinline__ void share_boxes(const Producer<S>& producer, const CUtensorMap& map, int column, int row) {
  constexpr int kPart = COLUMNS / 64 / S::kCluster;
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const int box = producer.shared.rank * kPart + i;
    producer.share(G::kBytesA + box * kBoxBytes, map, column + box * 64, row);
  }
}
// Loads the 128 columns of a first operand, for this block alone.
template <class S>
__device__ __forceinline__ void load_boxes(const Producer<S>& producer, const CUtensorMap& map, int column, int row) {
  producer.load(0, map, column, row);
  producer.load(kBoxBytes, map, column + 64, row);
}

template <int BN, int RP, class S>
__device__ __forceinline__ void produce(const BackwardParams& p, const S& shared) {
  using G = Tile<BN, RP>;
  Producer<S> producer(shared, p.plan.prep);
  const int blocks = ceil_div(p.N, kTileK), parts = ceil_div(p.M, kTileK), low = rank_stages(p.R),
            items = p.plan.items();
  const int* const ready = p.counters + kReady;
  for (;;) {
    const int ticket = producer.claim(p.counters);
    if (ticket >= items) return;
    const Item item = item_of(p.plan, ticket, shared.rank);
    if (item.kind == Kind::kSkinny) {
      producer.await_adapters(p.counters);
#pragma unroll 1
      for (int i = 0; i < blocks; ++i, producer.next()) {
        producer.open(G::kSkinnyBytes);
        producer.load(0, p.dy_rows, i * kTileK, item.m * kTileM);
        share_rank_boxes<G>(producer, p.b, item.n * RP, i * kTileK);
      }
    } else if (item.kind == Kind::kOut) {
#pragma unroll 1
      for (int i = 0; i < blocks; ++i, producer.next()) {
        producer.open(G::kOutBytes);
        producer.load(0, p.dy_rows, i * kTileK, item.m * kTileM);
        share_boxes<G, BN>(producer, p.w, item.n * BN, i * kTileK);
      }
      producer.await_adapters(p.counters);
#pragma unroll 1
      for (int i = 0; i < low; ++i, producer.next()) {
        producer.open(G::kOutBytes);
        share_boxes<G, BN>(producer, p.a, item.n * BN, i * kTileK);
        if (i == 0) producer.await(ready + item.m, ready_target(p.plan));
        producer.load(0, p.g_rows, i * kTileK, item.m * kTileM);
      }
    } else if (item.kind == Kind::kDb) {
      const GradientTile tile = gradient_tile(p.plan, item.n);
      const int end = split_begin(parts, p.plan.db_splits, item.split + 1);
      producer.await_adapters(p.counters);
#pragma unroll 1
      for (int i = split_begin(parts, p.plan.db_splits, item.split); i < end; ++i, producer.next()) {
        producer.open(G::kSkinnyBytes);
        load_boxes(producer, p.dy_columns, tile.columns, i * kTileK);
        share_rank_boxes<G>(producer, p.h, tile.rank, i * kTileK);
      }
    } else if (item.kind == Kind::kDa) {
      const GradientTile tile = gradient_tile(p.plan, item.n);
      const int begin = split_begin(parts, p.plan.da_splits, item.split),
                end = split_begin(parts, p.plan.da_splits, item.split + 1);
#pragma unroll 1
      for (int i = begin; i < end; ++i, producer.next()) {
        producer.open(G::kSkinnyBytes);
        load_boxes(producer, p.x_columns, tile.columns, i * kTileK);
        if (i == begin || i % 2 == 0)
          producer.await(ready + i / 2, ready_target(p.plan));  // a row block is two parts of 64 rows
        share_rank_boxes<G>(producer, p.g_columns, tile.rank, i * kTileK);
      }
    }
  }
}

// Returns one bit for each accumulator of word `w` and part `part` (two rows of two times 32 columns) of the tile at
// row m and column n: whether dropout keeps it. The four lanes of a quad hold the same 8 columns of a row, two each.
// Each lane draws for one of four neighbouring groups of 8 columns, and then the lanes exchange words.
__device__ __forceinline__ uint32_t keep_part(const Dropout& dropout, int m, int n, int thread, int w, int part) {
  const int q = thread % 4, row = m + fragment_row(thread, 0);
  Philox4 r = dropout.draw(row + keep_row(part), (n >> 3) + keep_group(w, part) + q);
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) quad_put(r.word, q, bit, i, __shfl_xor_sync(~0u, quad_sent(r.word, q, bit, i), bit));
  uint32_t bits = 0;
#pragma unroll
  for (int v = 0; v < 4; ++v) bits |= keep_bits(r.word[v], dropout.threshold) << (2 * v);
  return bits << (8 * part);
}

// Adds part `i` to the whole mask. The loop visits every word because registers cannot be indexed.
template <int BN>
__device__ __forceinline__ void keep_more(uint32_t (&keep)[BN / 64], const Dropout& dropout, int m, int n, int thread,
                                          int i) {
  const uint32_t bits = keep_part(dropout, m, n, thread, i / 4, i % 4);
#pragma unroll
  for (int w = 0; w < BN / 64; ++w) keep[w] |= i / 4 == w ? bits : 0;
}

// dx += factor · keep ⊙ (g a), 64 columns at a time. The stages of g and a stay until the last columns are done.
template <class T, int BN, int RP, class S>
__device__ __forceinline__ void add_masked(Consumer<S>& c, float (&dx)[BN / 2], const uint32_t (&keep)[BN / 64],
                                           int stages, float factor) {
  using G = Tile<BN, RP>;
  static_assert(rank_stages(kMaxRank) <= S::kStages, "all stages of the rank fit in the ring at once");
#pragma unroll
  for (int w = 0; w < BN / 64; ++w) {
    float d[32] = {};
    wgmma_registers(d);
    Ring<S::kStages> at = c.ring;
#pragma unroll 1
    for (int i = 0; i < stages; ++i, at.next()) {
      const uint32_t stage = c.wait(at);
      mma_stage<T, KMajor, MnMajor<128>, 64, G::kRankSteps>(d, stage + c.group * kBoxBytes,
                                                            stage + G::kBytesA + w * kBoxBytes);
    }
    wgmma_wait<0>();
    wgmma_registers(d);
#pragma unroll
    for (int i = 0; i < 32; ++i) dx[w * 32 + i] += keep[w] >> keep_bit(i) & 1 ? d[i] * factor : 0.f;
  }
  c.pass(stages);
}

// Computes a part of a da or db tile. Its rows are columns of x or dy, its columns are the rank.
template <class T, class G, int RP, class S>
__device__ __forceinline__ void gradient_part(Consumer<S>& c, float (&d)[RP / 2], int begin, int end,
                                              const Dropout* dropout, int column) {
  wgmma_registers(d);
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const uint32_t stage = c.wait(), box = stage + c.group * kBoxBytes;
    if (dropout != nullptr && dropout->threshold > 0)
      mask_box(*dropout, box, i * kTileK, column + c.group * 64, c.group, c.thread);
    mma_stage<T, MnMajor<128>, MnMajor<G::kWidth>, RP, kTileK / 16>(d, box, stage + G::kBytesA);
    c.advance();
  }
  c.drain(d);
}

// Stores factor · d in da [R,K] or db [N,R]; the strides tell which. `to` is where the warpgroup's part begins, and
// `columns` and `ranks` are how many of each are left from there.
template <class TO, int REGISTERS>
__device__ __forceinline__ void store_gradient(TO* to, const float (&d)[REGISTERS], float factor, int thread,
                                               int columns, int ranks, int column_stride, int rank_stride) {
  const int column = fragment_row(thread, 0), rank = fragment_col(thread, 0);
  TO* at = to + column * column_stride + rank * rank_stride;
#pragma unroll
  for (int j = 0; j < REGISTERS / 4; ++j, at += 8 * rank_stride)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (column + fragment_row(0, e) < columns && rank + fragment_col(0, 4 * j + e) < ranks)
        at[fragment_row(0, e) * column_stride + fragment_col(0, e) * rank_stride] =
            static_cast<TO>(d[4 * j + e] * factor);
}
template <class T, class S, int REGISTERS>
__device__ __forceinline__ void store_gradient_tile(const Consumer<S>& c, const BackwardParams& p,
                                                    const float (&d)[REGISTERS], void* to, float factor,
                                                    const GradientTile& tile, int columns, int column_stride,
                                                    int rank_stride) {
  const int first = tile.columns + c.group * 64;
  const int64_t origin = static_cast<int64_t>(first) * column_stride + static_cast<int64_t>(tile.rank) * rank_stride;
  store_gradient(static_cast<T*>(to) + origin, d, factor, c.thread, columns - first, p.R - tile.rank, column_stride,
                 rank_stride);
}

template <class T, int BN, int RP, class S>
__device__ __forceinline__ void consume(const BackwardParams& p, const S& shared, int group) {
  using G = Tile<BN, RP>;
  Consumer<S> c(shared, group);
  const Dropout dropout(p);
  const int blocks = ceil_div(p.N, kTileK), parts = ceil_div(p.M, kTileK), low = rank_stages(p.R),
            items = p.plan.items();
  for (;;) {
    const int ticket = c.next_ticket();
    if (ticket >= items) break;
    const Item item = item_of(p.plan, ticket, shared.rank);
    if (item.kind == Kind::kPrep) {
      prep_item<T>(p, item.m);
    } else if (item.kind == Kind::kSkinny) {
      float g[RP / 2] = {};
      skinny_tile<T, MnMajor<G::kWidth>, RP>(c, g, blocks, nullptr, 0);
      store_skinny<T, RP>(c, p, g, item.m, item.n * RP, p.g_pointer, p.scale, nullptr, 0.f);
    } else if (item.kind == Kind::kOut) {
      const int m = item.m * kTileM + group * 64, n = item.n * BN;
      float dx[BN / 2] = {};
      wgmma_registers(dx);
      if (dropout.threshold == 0) {
#pragma unroll 1
        for (int i = 0; i < blocks; ++i) {
          const uint32_t stage = c.wait();
          mma_stage<T, KMajor, MnMajor<128>, BN, kTileK / 16>(dx, stage + group * kBoxBytes, stage + G::kBytesA);
          c.advance();
        }
#pragma unroll 1
        for (int i = 0; i < low; ++i) {
          const uint32_t stage = c.wait();
          mma_stage<T, KMajor, MnMajor<128>, BN, G::kRankSteps>(dx, stage + group * kBoxBytes, stage + G::kBytesA);
          c.advance();
        }
        c.drain(dx);
      } else {
        uint32_t keep[BN / 64] = {};
        constexpr int kParts = BN / 64 * 4;  // one part of the mask is drawn in each stage, while parts are left
#pragma unroll 1
        for (int i = 0; i < blocks; ++i) {
          const uint32_t stage = c.wait();
          mma_stage<T, KMajor, MnMajor<128>, BN, kTileK / 16>(dx, stage + group * kBoxBytes, stage + G::kBytesA);
          if (i < kParts) keep_more<BN>(keep, dropout, m, n, c.thread, i);
          c.advance();
        }
        c.drain(dx);
#pragma unroll 1
        for (int i = blocks; i < kParts; ++i) keep_more<BN>(keep, dropout, m, n, c.thread, i);
        add_masked<T, BN, RP>(c, dx, keep, low, p.rescale);
      }
      store_tile<T, BN>(c, p.dx, dx, m, n);
    } else if (item.kind == Kind::kDb) {
      const GradientTile tile = gradient_tile(p.plan, item.n);
      const int splits = p.plan.db_splits;
      float db[RP / 2] = {};
      gradient_part<T, G, RP>(c, db, split_begin(parts, splits, item.split), split_begin(parts, splits, item.split + 1),
                              nullptr, 0);
      if (sum_parts(c, db, p.db_partials, p.counters + db_counter(p.plan, item.n, group), item.n, item.split, splits))
        store_gradient_tile<T>(c, p, db, p.db, p.scale, tile, p.N, p.R, 1);
    } else {
      const GradientTile tile = gradient_tile(p.plan, item.n);
      const int splits = p.plan.da_splits;
      float da[RP / 2] = {};
      gradient_part<T, G, RP>(c, da, split_begin(parts, splits, item.split), split_begin(parts, splits, item.split + 1),
                              &dropout, tile.columns);
      if (sum_parts(c, da, p.da_partials, p.counters + da_counter(p.plan, item.n, group), item.n, item.split, splits))
        store_gradient_tile<T>(c, p, da, p.da, p.rescale, tile, p.K, 1, p.K);
    }
  }
  if (c.thread == 0) tma_store_wait_all();
}

template <class T>
cudaError_t launch_backward(const BackwardParams& p, Tiling tiling, int blocks, cudaStream_t stream) {
  return launch_pass<T>(p, tiling, blocks, stream);
}

}  // namespace lk::sm90
