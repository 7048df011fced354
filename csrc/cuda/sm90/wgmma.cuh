// wgmma: D[64, N] += A[64, 16] B[16, N] from shared memory, with fp32 accumulators in registers, N/2 per thread. The
// accumulators are set to zero first. If the first step overwrote them instead, each would be live around the loop over
// work items, and ptxas would spill.
#ifndef LK_SM90_WGMMA
#define LK_SM90_WGMMA

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

namespace lk::sm90 {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of the accumulators across wgmma_fence and wgmma_wait, which do not name them.
template <int N>
__device__ __forceinline__ void wgmma_registers(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <class T, int N>
struct Wgmma;

// There is one specialisation for every (T, N). The instruction names each accumulator register, so these macros spell
// lists of up to 128 operands by tens.
#define LK_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define LK_TEN0 LK_TEN()
#define LK_NAMES_8 "%0,%1,%2,%3"
#define LK_NAMES_16 LK_NAMES_8 ",%4,%5,%6,%7"
#define LK_NAMES_32 LK_TEN0 "%10,%11,%12,%13,%14,%15"
#define LK_NAMES_64 LK_TEN0 LK_TEN(1) LK_TEN(2) "%30,%31"
#define LK_NAMES_128 LK_TEN0 LK_TEN(1) LK_TEN(2) LK_TEN(3) LK_TEN(4) LK_TEN(5) "%60,%61,%62,%63"
#define LK_NAMES_256                                                                                           \
  LK_TEN0 LK_TEN(1) LK_TEN(2) LK_TEN(3) LK_TEN(4) LK_TEN(5) LK_TEN(6) LK_TEN(7) LK_TEN(8) LK_TEN(9) LK_TEN(10) \
      LK_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127"
#define LK_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LK_D8(i) LK_D4(i), LK_D4(i + 4)
#define LK_D16(i) LK_D8(i), LK_D8(i + 8)
#define LK_D32(i) LK_D16(i), LK_D16(i + 16)
#define LK_D64(i) LK_D32(i), LK_D32(i + 32)
#define LK_D128(i) LK_D64(i), LK_D64(i + 64)

#define LK_WGMMA(T, TYPE, N, REGISTERS, A, B, TA, TB)                                           \
  template <>                                                                                   \
  struct Wgmma<T, N> {                                                                          \
    template <int TRANSPOSE_A, int TRANSPOSE_B>                                                 \
    __device__ static __forceinline__ void mma(float (&d)[REGISTERS], uint64_t a, uint64_t b) { \
      asm volatile(                                                                             \
          "{ .reg .pred p; setp.eq.b32 p, 0, 0;\n"                                              \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LK_NAMES_##N     \
          "}, " A ", " B ", p, 1, 1, " TA ", " TB "; }"                                         \
          : LK_D##REGISTERS(0)                                                                  \
          : "l"(a), "l"(b), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));                                \
    }                                                                                           \
  };
#define LK_WGMMA_TYPES(N, REGISTERS, A, B, TA, TB)            \
  LK_WGMMA(__nv_bfloat16, "bf16", N, REGISTERS, A, B, TA, TB) \
  LK_WGMMA(__half, "f16", N, REGISTERS, A, B, TA, TB)

LK_WGMMA_TYPES(8, 4, "%4", "%5", "%6", "%7")
LK_WGMMA_TYPES(16, 8, "%8", "%9", "%10", "%11")
LK_WGMMA_TYPES(32, 16, "%16", "%17", "%18", "%19")
LK_WGMMA_TYPES(64, 32, "%32", "%33", "%34", "%35")
LK_WGMMA_TYPES(128, 64, "%64", "%65", "%66", "%67")
LK_WGMMA_TYPES(256, 128, "%128", "%129", "%130", "%131")

#undef LK_WGMMA_TYPES
#undef LK_WGMMA
#undef LK_D128
#undef LK_D64
#undef LK_D32
#undef LK_D16
#undef LK_D8
#undef LK_D4
#undef LK_NAMES_256
#undef LK_NAMES_128
#undef LK_NAMES_64
#undef LK_NAMES_32
#undef LK_NAMES_16
#undef LK_NAMES_8
#undef LK_TEN0
#undef LK_TEN

}  // namespace lk::sm90

#endif  // LK_SM90_WGMMA
