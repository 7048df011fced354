#ifndef LK_SM90_LAUNCH
#define LK_SM90_LAUNCH

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "layout.h"

namespace lk::sm90 {

// Sets `clusters` to how many clusters of this launch can run at a time on the current device. The driver is asked once
// for each kernel and device.
inline cudaError_t resident_clusters(const void* kernel, const cudaLaunchConfig_t& config, int* clusters) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{kernel, device}];
  if (found == 0) status = cudaOccupancyMaxActiveClusters(&found, kernel, &config);
  *clusters = found;
  return status != cudaSuccess || found > 0 ? status : cudaErrorInvalidClusterSize;
}

// Launches `kernel` with more than the default shared memory, in clusters of CLUSTER blocks. At most `blocks` blocks
// are launched, a multiple of CLUSTER. Clusters that could not run at the same time as the others are left out.
template <int CLUSTER, class P>
cudaError_t launch(void (*kernel)(P), const P& p, int shared_bytes, int blocks, cudaStream_t stream) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = CLUSTER;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  if constexpr (CLUSTER > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    status = resident_clusters(function, config, &clusters);
    if (status != cudaSuccess) return status;
    config.gridDim = dim3(std::min(blocks, clusters * CLUSTER));
  }
  void* arguments[] = {const_cast<P*>(&p)};
  return cudaLaunchKernelExC(&config, function, arguments);
}

}  // namespace lk::sm90

#endif  // LK_SM90_LAUNCH
