// What the machine's CUDA devices are. Everything reports a CUDA error through cudaError_t; bindings.cpp raises.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

namespace lk::cuda {

struct Device {
  std::string name;
  int major, minor;
  int sms;
  int shared_memory_optin;  // bytes per block, at most
};

cudaError_t devices(std::vector<Device>* out);

// Version of the nvcc that compiled this file: 1000 * major + 10 * minor, as CUDART_VERSION has it.
int toolkit_version();

}  // namespace lk::cuda
