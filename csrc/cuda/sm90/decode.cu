// The forward for M <= 64 without dropout. Reading w once bounds its time, so the contraction over K is split until
// every multiprocessor streams a part of w.
//
// w is the wide operand of wgmma and x the narrow one: a tile is 128 rows of w times all of x. Parts of K go to scratch
// in fp32. The rows of a make tiles too, which are claimed first; the last part to arrive at such a tile publishes h in
// fp32. The last part to arrive at a tile of w sums the parts in order, waits for h, and adds bias + s · h bᵀ in fp32.
// h is rounded only where it is saved.
#include "tiles.cuh"

namespace lk::sm90 {
namespace {

template <int MP, class S>
__device__ __forceinline__ void decode_produce(const DecodeParams& p, const S& shared) {
  using G = DecodeTile<MP>;
  Producer<S> producer(shared, p.plan.prep);
  const int items = p.plan.items();
  for (;;) {
    const int ticket = producer.claim(p.counters);
    if (ticket >= items) return;
    const Item item = decode_item(p.plan, ticket);
    if (item.kind == Kind::kPrep) continue;
    const bool of_a = item.kind == Kind::kSkinny;
    if (of_a) producer.await_adapters(p.counters);
    const CUtensorMap& rows = of_a ? p.a : p.w;
    const int row = (of_a ? item.n : item.n - p.plan.a_tiles) * kTileM;
    const int end = split_begin(p.plan.blocks, p.plan.splits, item.split + 1);
#pragma unroll 1
    for (int i = split_begin(p.plan.blocks, p.plan.splits, item.split); i < end; ++i, producer.next()) {
      producer.open(G::kStageBytes);
      producer.load(0, rows, i * kTileK, row);
      producer.load(G::kBytesA, p.x, i * kTileK, 0);
    }
  }
}

// Stores h, transposed and in fp32, to scratch, and to the saved [M,R] if that is not null. Then publishes this half of
// a tile of a.
template <class T, int MP, class S>
__device__ __forceinline__ void publish_h(const Consumer<S>& c, const DecodeParams& p, const float (&d)[MP / 2],
                                          int row) {
#pragma unroll
  for (int i = 0; i < MP / 2; ++i) {
    const int r = row + fragment_row(c.thread, i), m = fragment_col(c.thread, i);
    if (r < p.R) {
      p.h_sum[r * MP + m] = d[i];
      if (p.h != nullptr && m < p.M) static_cast<T*>(p.h)[static_cast<int64_t>(m) * p.R + r] = rounded<T>(d[i]);
    }
  }
  __threadfence();
  group_sync(c.group);
  if (c.thread == 0) add_release(p.counters + kDecodeReady, 1);
}

// d += s · b hᵀ. Rows of d are rows of b, columns of d are rows of h.
template <class B, int MP, class S>
__device__ __forceinline__ void add_low_rank(const Consumer<S>& c, const DecodeParams& p, float (&d)[MP / 2], int row) {
  const int n = row + fragment_row(c.thread, 0), m = fragment_col(c.thread, 0);
  const B* const b = static_cast<const B*>(p.b) + n * p.ldb;
  float low[MP / 2] = {};
#pragma unroll 4
  for (int r = 0; r < p.R; ++r) {
    const float b0 = n < p.N ? static_cast<float>(b[r]) : 0.f,
                b8 = n + 8 < p.N ? static_cast<float>(b[8 * p.ldb + r]) : 0.f;
#pragma unroll
    for (int j = 0; j < MP / 8; ++j) {
      const float2 h = *reinterpret_cast<const float2*>(p.h_sum + r * MP + m + 8 * j);
      low[4 * j] += b0 * h.x;
      low[4 * j + 1] += b0 * h.y;
      low[4 * j + 2] += b8 * h.x;
      low[4 * j + 3] += b8 * h.y;
    }
  }
#pragma unroll
  for (int i = 0; i < MP / 2; ++i) d[i] += p.scale * low[i];
}

template <class T, int MP, class S>
__device__ __forceinline__ void finish_y(const Consumer<S>& c, const DecodeParams& p, float (&d)[MP / 2], int row) {
  if (c.thread == 0) wait_for(p.counters + kDecodeReady, decode_ready_target(p.plan));
  group_sync(c.group);
  add_low_rank<T, MP>(c, p, d, row);
#pragma unroll
  for (int i = 0; i < MP / 2; ++i) {
    const int n = row + fragment_row(c.thread, i), m = fragment_col(c.thread, i);
    if (n < p.N && m < p.M) {
      const float add = p.bias == nullptr ? 0.f : static_cast<float>(static_cast<const T*>(p.bias)[n]);
      static_cast<T*>(p.y)[static_cast<int64_t>(m) * p.N + n] = rounded<T>(d[i] + add);
    }
  }
}

template <class T, int MP, class S>
__device__ __forceinline__ void decode_consume(const DecodeParams& p, const S& shared, int group) {
  using G = DecodeTile<MP>;
  Consumer<S> c(shared, group);
  const int items = p.plan.items();
  for (;;) {
    const int ticket = c.next_ticket();
    if (ticket >= items) return;
    const Item item = decode_item(p.plan, ticket);
    if (item.kind == Kind::kPrep) {
      prep_item<T>(p, item.m);
      continue;
    }
    float d[MP / 2] = {};
    wgmma_registers(d);
    const int end = split_begin(p.plan.blocks, p.plan.splits, item.split + 1);
#pragma unroll 1
    for (int i = split_begin(p.plan.blocks, p.plan.splits, item.split); i < end; ++i) {
      const uint32_t stage = c.wait();
      mma_stage<T, KMajor, KMajor, MP, kTileK / 16>(d, stage + group * kBoxBytes, stage + G::kBytesA);
      c.advance();
    }
    c.drain(d);
    if (!sum_parts(c, d, p.partials, p.counters + decode_counter(item.n, group), item.n, item.split, p.plan.splits))
      continue;
    if (item.kind == Kind::kSkinny)
      publish_h<T, MP>(c, p, d, item.n * kTileM + group * 64);
    else
      finish_y<T, MP>(c, p, d, (item.n - p.plan.a_tiles) * kTileM + group * 64);
  }
}

template <class T, int MP>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
  using G = DecodeTile<MP>;
  extern __shared__ uint8_t raw[];
  const Shared<G::kStages, G::kStageBytes, 0, 1> shared(raw);
  shared.init();
  // The shuffle tells the compiler that the group is uniform in a warp: descriptors then stay in uniform registers.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    if (threadIdx.x == 0) decode_produce<MP>(p, shared);
    __syncwarp();
  } else {
    decode_consume<T, MP>(p, shared, group - 1);
  }
  finish(shared, p);
}

}  // namespace

template <class T>
cudaError_t launch_decode(const DecodeParams& p, int blocks, cudaStream_t stream) {
  switch (decode_rows(p.M)) {
    case 8:
      return launch<1>(decode_kernel<T, 8>, p, DecodeTile<8>::kSharedBytes, blocks, stream);
    case 16:
      return launch<1>(decode_kernel<T, 16>, p, DecodeTile<16>::kSharedBytes, blocks, stream);
    case 32:
      return launch<1>(decode_kernel<T, 32>, p, DecodeTile<32>::kSharedBytes, blocks, stream);
    default:
      return launch<1>(decode_kernel<T, 64>, p, DecodeTile<64>::kSharedBytes, blocks, stream);
  }
}

template cudaError_t launch_decode<__nv_bfloat16>(const DecodeParams&, int, cudaStream_t);
template cudaError_t launch_decode<__half>(const DecodeParams&, int, cudaStream_t);

}  // namespace lk::sm90
