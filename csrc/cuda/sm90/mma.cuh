// The products of a pipeline stage on the tensor cores, and conversions of the 16-bit types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "wgmma.cuh"

namespace lk::sm90 {

// Multiplies a pipeline stage, STEPS times 16 of the contraction, as one wgmma group. `a` and `b` are shared-memory
// addresses.
template <class T, class A, class B, int N, int STEPS>
__device__ __forceinline__ void mma_stage(float (&d)[N / 2], uint32_t a, uint32_t b) {
  const uint64_t da = A::at(a), db = B::at(b);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
    Wgmma<T, N>::template mma<A::kTranspose, B::kTranspose>(d, da + k * (A::kStep >> 4), db + k * (B::kStep >> 4));
  wgmma_commit();
}

// Values of the 16-bit types, rounded to nearest even: packed pairs, with the first element in the low half, and single
// values.
__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
__device__ __forceinline__ uint32_t pack(__half, float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  return pack(T(), low, high);
}
__device__ __forceinline__ float2 unpack(__nv_bfloat16, uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
__device__ __forceinline__ float2 unpack(__half, uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
template <class T>
__device__ __forceinline__ T rounded(float v) {
  return static_cast<T>(v);
}

}  // namespace lk::sm90
