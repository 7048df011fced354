// A list of the machine's CUDA devices. Functions return CUDA errors as cudaError_t; the bindings raise them.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

namespace lk::cuda {

struct Device {
  std::string name;
  int major, minor;
  int sms;
  int shared_memory_optin;  // the most bytes of shared memory per block
};

cudaError_t devices(std::vector<Device>* out);

// The version of the nvcc that compiled this file, 1000 * major + 10 * minor as in CUDART_VERSION.
int toolkit_version();

}  // namespace lk::cuda
