// The launches of the module lora_kernels._cuda on a stand-in for the CUDA runtime, which records tensor maps and
// launches and runs nothing. Everything between Python and the runtime is the project's own code.
#include "runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <sstream>

#include "../../../../csrc/cuda/sm90/bindings_sm90.cpp"
#include "../../../../csrc/cuda/sm90/decode.cu"
#include "../../../../csrc/cuda/sm90/forward_bf16.cu"
#include "../../../../csrc/cuda/sm90/forward_fp16.cu"
#include "../../../../csrc/cuda/sm90/launch.cu"

#undef gridDim  // the built-in variable of kernels, here the field of a launch

namespace {

int current_device = 0, clusters = 66, next_launch_status = 0;
int occupancy_questions = 0;
std::map<const void*, int> shared_limits;  // bytes of dynamic shared memory that a kernel was allowed
std::ostringstream records;                // a JSON object, and a comma, for every call

std::string name_of(const void* kernel) {
  Dl_info info{};
  if (!dladdr(kernel, &info) || info.dli_sname == nullptr) return "";  // decode_kernel is local to its file
  int status = 0;
  char* const text = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string name = text != nullptr ? text : info.dli_sname;
  free(text);
  return name;
}

template <class T>
std::string array(const T* values, int count) {
  std::ostringstream out;
  for (int i = 0; i < count; ++i) out << (i ? "," : "[") << values[i];
  return out.str() + "]";
}

CUresult encode(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* size,
                const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || stride[0] % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  records << "{\"call\":\"map\",\"bf16\":" << (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? "true" : "false")
          << ",\"address\":" << reinterpret_cast<uintptr_t>(base) << ",\"size\":" << array(size, rank)
          << ",\"stride\":" << stride[0] << ",\"box\":" << array(box, rank)
          << ",\"swizzle\":" << (16 << static_cast<int>(swizzle)) << "},";
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 132, cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "";
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) shared_limits[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* found, const void*, const cudaLaunchConfig_t*) {
  ++occupancy_questions;
  return *found = clusters, cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  const int status = std::exchange(next_launch_status, 0);
  if (status != 0) return static_cast<cudaError_t>(status);
  if (config->gridDim.x == 0 || config->dynamicSmemBytes > static_cast<size_t>(shared_limits[kernel]))
    return cudaErrorInvalidValue;
  int cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  const auto& p = *static_cast<const lk::sm90::Common*>(arguments[0]);
  const unsigned grid[3] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  const int sizes[4] = {p.M, p.N, p.K, p.R};
  records << "{\"call\":\"launch\",\"kernel\":\"" << name_of(kernel) << "\",\"device\":" << current_device
          << ",\"grid\":" << array(grid, 3)
          << ",\"threads\":" << config->blockDim.x * config->blockDim.y * config->blockDim.z
          << ",\"shared\":" << config->dynamicSmemBytes << ",\"cluster\":" << cluster
          << ",\"stream\":" << reinterpret_cast<uintptr_t>(config->stream) << ",\"sizes\":" << array(sizes, 4)
          << ",\"counters\":" << reinterpret_cast<uintptr_t>(p.counters) << ",\"counter_count\":" << p.counter_count
          << ",\"seed\":" << reinterpret_cast<uintptr_t>(p.seed) << ",\"threshold\":" << p.threshold
          << ",\"rescale\":" << p.rescale << ",\"scale\":" << p.scale << "},";
  return cudaSuccess;
}

// Returns the calls since the last one as a JSON array.
const char* stand_in_records() {
  static std::string text;
  text = "[" + records.str() + "0]";
  records.str("");
  return text.c_str();
}
void stand_in_fail_next_launch(int status) { next_launch_status = status; }
void stand_in_allow_clusters(int count) { clusters = count; }
int stand_in_occupancy_questions() { return occupancy_questions; }

}  // extern "C"

namespace lk::sm90 {

// `extern __shared__` of the kernels, and of the decode kernel, which lies in an unnamed namespace.
uint8_t raw[1];
namespace {
uint8_t raw[1];
}

}  // namespace lk::sm90

PYBIND11_MODULE(_cuda, m) { lk::sm90::bind_sm90(m); }
