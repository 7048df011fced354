// The kernel and the launch of a pass, forward or backward. The kernel takes the struct P of the pass by value. For
// this type, forward.cuh and backward.cuh define
//
//   produce<BN, RP>(p, shared)             the producer thread: claims work items and loads their stages
//   consume<T, BN, RP>(p, shared, group)   a consumer warpgroup: computes and stores the items
//
// T is the element type, BN the columns of a y or dx tile, RP the padded rank, CLUSTER the blocks of a cluster.
#pragma once

#include "tiles.cuh"

namespace lk::sm90 {

// Only the names: the functions of a pass are found by the type of p.
template <int BN, int RP>
void produce();
template <class T, int BN, int RP>
void consume();

template <class P, class T, int BN, int RP, int CLUSTER>
__global__ void __launch_bounds__(kThreads, 1) pass_kernel(const __grid_constant__ P p) {
  using G = Tile<BN, RP>;
  extern __shared__ uint8_t raw[];
  const Shared<G::kStages, G::kStageBytes, G::kStagingBytes, CLUSTER> shared(raw);
  shared.init();
  // The shuffle tells the compiler that the group is uniform in a warp: descriptors then stay in uniform registers.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    registers_give<40>();
    if (threadIdx.x == 0) produce<BN, RP>(p, shared);
    __syncwarp();
  } else {
    registers_take<232>();
    consume<T, BN, RP>(p, shared, group - 1);
  }
  finish(shared, p);
}

template <class T, int BN, int RP, int CLUSTER, class P>
cudaError_t launch_rank(const P& p, int blocks, cudaStream_t stream) {
  return launch<CLUSTER>(pass_kernel<P, T, BN, RP, CLUSTER>, p, Tile<BN, RP>::kSharedBytes, blocks, stream);
}

template <class T, int BN, int CLUSTER, class P>
cudaError_t launch_tiling(const P& p, int blocks, cudaStream_t stream) {
  switch (padded_rank(p.R)) {
    case 16:
      return launch_rank<T, BN, 16, CLUSTER>(p, blocks, stream);
    case 64:
      return launch_rank<T, BN, 64, CLUSTER>(p, blocks, stream);
    default:
      return launch_rank<T, BN, 128, CLUSTER>(p, blocks, stream);
  }
}

// Launches the kernel of `tiling`, for which is_compiled (schedule.h) must hold.
template <class T, class P>
cudaError_t launch_pass(const P& p, Tiling tiling, int blocks, cudaStream_t stream) {
  if (tiling.columns == 128) return launch_tiling<T, 128, 1>(p, blocks, stream);
  return tiling.cluster == 1 ? launch_tiling<T, 256, 1>(p, blocks, stream)
                             : launch_tiling<T, 256, 2>(p, blocks, stream);
}

}  // namespace lk::sm90
