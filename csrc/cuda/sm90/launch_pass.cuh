// The kernel and the launch of a pass, forward or backward. A pass is a struct with
//
//   Params                              what the kernel takes, by value
//   produce<BN, RP>(params, shared)     the producer thread: claims work items and loads their stages
//   consume<T, BN, RP>(params, shared, group)   a consumer warpgroup: computes and stores the items
//
// T is the element type, BN the columns of a y or dx tile, RP the padded rank, CLUSTER the blocks of a cluster.
#pragma once

#include "tiles.cuh"

namespace lk::sm90 {

template <class PASS, class T, int BN, int RP, int CLUSTER>
__global__ void __launch_bounds__(kThreads, 1) pass_kernel(const __grid_constant__ typename PASS::Params p) {
  using G = Tile<BN, RP>;
  extern __shared__ uint8_t raw[];
  const Shared<G::kStages, G::kStageBytes, G::kStagingBytes, CLUSTER> shared(raw);
  shared.init();
  // The shuffle tells the compiler that the group is uniform in a warp: descriptors then stay in uniform registers.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    registers_give<40>();
    if (threadIdx.x == 0) PASS::template produce<BN, RP>(p, shared);
    __syncwarp();
  } else {
    registers_take<232>();
    PASS::template consume<T, BN, RP>(p, shared, group - 1);
  }
  finish(shared, p);
}

template <class PASS, class T, int BN, int RP, int CLUSTER>
cudaError_t launch_rank(const typename PASS::Params& p, int blocks, cudaStream_t stream) {
  return launch<CLUSTER>(pass_kernel<PASS, T, BN, RP, CLUSTER>, p, Tile<BN, RP>::kSharedBytes, blocks, stream);
}

template <class PASS, class T, int BN, int CLUSTER>
cudaError_t launch_tiling(const typename PASS::Params& p, int blocks, cudaStream_t stream) {
  switch (padded_rank(p.R)) {
    case 16:
      return launch_rank<PASS, T, BN, 16, CLUSTER>(p, blocks, stream);
    case 32:
      return launch_rank<PASS, T, BN, 32, CLUSTER>(p, blocks, stream);
    case 64:
      return launch_rank<PASS, T, BN, 64, CLUSTER>(p, blocks, stream);
    default:
      return launch_rank<PASS, T, BN, 128, CLUSTER>(p, blocks, stream);
  }
}

// Launches the kernel of `tiling`, for which is_compiled (schedule.h) must hold.
template <class PASS, class T>
cudaError_t launch_pass(const typename PASS::Params& p, Tiling tiling, int blocks, cudaStream_t stream) {
  if (tiling.columns == 128) return launch_tiling<PASS, T, 128, 1>(p, blocks, stream);
  return tiling.cluster == 1 ? launch_tiling<PASS, T, 256, 1>(p, blocks, stream)
                             : launch_tiling<PASS, T, 256, 2>(p, blocks, stream);
}

}  // namespace lk::sm90
