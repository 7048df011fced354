#include "device.h"

namespace lk::cuda {

cudaError_t devices(std::vector<Device>* out) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count)) return error;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp prop;
    if (const cudaError_t error = cudaGetDeviceProperties(&prop, i)) return error;
    out->push_back(
        {prop.name, prop.major, prop.minor, prop.multiProcessorCount, static_cast<int>(prop.sharedMemPerBlockOptin)});
  }
  return cudaSuccess;
}

int toolkit_version() { return __CUDACC_VER_MAJOR__ * 1000 + __CUDACC_VER_MINOR__ * 10; }

}  // namespace lk::cuda
