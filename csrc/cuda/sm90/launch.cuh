#ifndef LK_SM90_LAUNCH
#define LK_SM90_LAUNCH

#include <cuda_runtime_api.h>

#include "layout.h"

namespace lk::sm90 {

// Launches `kernel` with more than the default shared memory.
template <class P>
cudaError_t launch(void (*kernel)(P), const P& p, int shared_bytes, int blocks, cudaStream_t stream) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  void* arguments[] = {const_cast<P*>(&p)};
  return cudaLaunchKernel(function, dim3(blocks), dim3(kThreads), arguments, shared_bytes, stream);
}

}  // namespace lk::sm90

#endif  // LK_SM90_LAUNCH
