// The sm_90a back-end compiled for the host, on the emulated GPU of machine.h, with the CUDA runtime calls that it
// makes. Python loads it. The backward kernels are in emulator_backward.cpp, so that both files compile in parallel.
#include "wgmma.h"

#include "../../../../csrc/cuda/sm90/decode.cu"
#include "../../../../csrc/cuda/sm90/forward_bf16.cu"
#include "../../../../csrc/cuda/sm90/forward_fp16.cu"
#include "../../../../csrc/cuda/sm90/launch.cu"

namespace {

int emulated_sms = 4;

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base, const cuuint64_t* size,
                const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint32_t width = box[0] * 2, span = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                                            : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                                                                                   : 32;
  const bool right = rank == 2 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride[0] % 16 == 0 && box[0] <= 256 &&
                     box[1] <= 256 && width == span && step[0] == 1 && step[1] == 1 && size[0] > 0 && size[1] > 0 &&
                     stride[0] >= size[0] * 2;
  if (!right) return CUDA_ERROR_INVALID_VALUE;
  const emu::TensorMap m{static_cast<const char*>(base), size[0], size[1], stride[0], box[0], box[1], width};
  std::memcpy(map, &m, sizeof(m));
  return CUDA_SUCCESS;
}

std::string failure;

template <class F>
const char* guarded(F f) {
  try {
    const int status = f();
    failure = status == 0 ? "" : "cudaError_t " + std::to_string(status);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  return failure.c_str();
}

}  // namespace

extern "C" {

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulated_sms;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// `sms` is the number of multiprocessors that the plans see. `resident` is how many blocks run at a time.
void emulator_configure(unsigned seed, int sms, int resident) {
  emu::machine.random.seed(seed);
  emu::machine.resident = resident;
  emulated_sms = sms;
}
const char* emulated_forward_workspace(const lk::sm90::ForwardArgs* args, lk::sm90::Workspace* needed) {
  return guarded([&] { return lk::sm90::lk_sm90_forward_workspace(args, needed); });
}
const char* emulated_forward(const lk::sm90::ForwardArgs* args) {
  return guarded([&] { return lk::sm90::lk_sm90_forward(args); });
}
const char* emulated_backward_workspace(const lk::sm90::BackwardArgs* args, lk::sm90::Workspace* needed) {
  return guarded([&] { return lk::sm90::lk_sm90_backward_workspace(args, needed); });
}
const char* emulated_backward(const lk::sm90::BackwardArgs* args) {
  return guarded([&] { return lk::sm90::lk_sm90_backward(args); });
}

}  // extern "C"

namespace lk::sm90 {

uint8_t raw[1];  // `extern __shared__`: only its address would matter

}  // namespace lk::sm90
