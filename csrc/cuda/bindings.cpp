// lora_kernels._cuda: pointers, sizes, strides and a stream in, nothing of torch. Importing it touches no driver.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "device.h"
#include "sm90/bindings_sm90.h"

namespace py = pybind11;

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                             ")");
}

py::dict build_info() {
  const int version = lk::cuda::toolkit_version();
  py::dict info;
  info["nvcc"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["archs"] = py::str(LK_CUDA_ARCHS).attr("split")();
  return info;
}

py::list devices() {
  std::vector<lk::cuda::Device> found;
  {
    py::gil_scoped_release unlocked;  // the first call starts the driver
    check(lk::cuda::devices(&found), "cannot list the CUDA devices");
  }
  py::list list;
  for (const auto& device : found) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["sms"] = device.sms;
    entry["shared_memory_optin"] = device.shared_memory_optin;
    list.append(entry);
  }
  return list;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of a LoRA linear layer";
  m.def("build_info", &build_info, "The nvcc version and the architectures this module was compiled for.");
  m.def("devices", &devices, "One dict per device; RuntimeError with the CUDA error's name if there is no driver.");
  lk::sm90::bind_sm90(m);
}
