// Turns CUDA errors into exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace lk::cuda {

// Throws std::runtime_error with `what` and the error's name and text if `status`, a cudaError_t, is not cudaSuccess.
inline void check(int status, const char* what) {
  const auto error = static_cast<cudaError_t>(status);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                             ")");
}

}  // namespace lk::cuda
