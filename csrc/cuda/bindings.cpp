// The module lora_kernels._cuda. It takes pointers, sizes, strides and a stream, and knows nothing of torch. Importing
// it touches no driver.
#include <pybind11/pybind11.h>

#include <string>

#include "check.h"
#include "device.h"
#include "keep_mask.h"
#include "sm90/bindings_sm90.h"

namespace py = pybind11;

namespace {

// The least driver is that of "CUDA minor version compatibility", NVIDIA's table for each major version of CUDA.
py::dict build_info() {
  const int version = lk::cuda::toolkit_version();
  py::dict info;
  info["nvcc"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["arch"] = "sm_90a";
  info["driver"] = version >= 13000 ? "580" : "525";
  info["sources"] = LK_SOURCES;
  return info;
}

py::list devices() {
  std::vector<lk::cuda::Device> found;
  {
    py::gil_scoped_release unlocked;  // the first call starts the driver
    lk::cuda::check(lk::cuda::devices(&found), "cannot list the CUDA devices");
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

// Pointers are integers.
void keep_mask(int device, int64_t M, int64_t K, bool bf16, uint32_t threshold, uintptr_t seed, uintptr_t mask,
               uintptr_t stream) {
  lk::cuda::check(lk::cuda::keep_mask(device, M, K, bf16, threshold, reinterpret_cast<const int64_t*>(seed),
                                      reinterpret_cast<void*>(mask), reinterpret_cast<cudaStream_t>(stream)),
                  "the keep_mask launch failed");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of a LoRA linear layer";
  m.def("build_info", &build_info,
        "The nvcc that compiled this module, the architecture, the least driver that its CUDA runtime needs, and a "
        "hash of "
        "its sources.");
  m.def("devices", &devices, "One dict per device; RuntimeError with the CUDA error's name if there is no driver.");
  m.def("keep_mask", &keep_mask, py::kw_only(), py::arg("device"), py::arg("M"), py::arg("K"), py::arg("bf16"),
        py::arg("threshold"), py::arg("seed"), py::arg("mask"), py::arg("stream"),
        "Fills the contiguous mask [M,K], K a multiple of 8, with 1 where dropout keeps and 0 elsewhere.");
  lk::sm90::bind_sm90(m);
}
