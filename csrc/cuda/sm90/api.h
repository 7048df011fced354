// The C++ interface of the sm_90a back-end: pointers, sizes, strides in elements, and a stream. No torch, no Python.
//
//   forward    h = x̂ aᵀ     y = x wᵀ + bias + s · h bᵀ
//   backward   g = s · dy b     dx = dy w + c · keep ⊙ (g a)     da = c · gᵀ (keep ⊙ x)     db = s · dyᵀ h
//
// The rows of x [M,K], w [N,K], a [R,K], b [N,R] and dy [M,N] have stride ld*. y, dx, h, da and db are contiguous.
// x, w and dy must start at multiples of 16 bytes, and so must their rows. a and b may have any alignment and row
// stride. N and K are multiples of 8, 1 <= R <= 256, M >= 1.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lk::sm90 {

struct Operands {
  int device;  // ordinal of the device
  int M, N, K, R;
  bool bf16;      // whether all tensors are bf16; else they are fp16
  const void* x;  // null in a backward without da
  const void* w;
  const void* a;
  const void* b;
  int64_t ldx, ldw, lda, ldb;
  float scale;
  const int64_t* seed;   // on the device; null where threshold is 0
  uint32_t threshold;    // of the dropout rule (csrc/philox.h); 0 is no dropout
  float rescale;         // c
  int* counters;         // on the device, zero before the first launch, left zero by every launch
  void* scratch;         // on the device, of any content
  void* stream;          // cudaStream_t
  int columns, cluster;  // columns of a tile of y or dx, blocks of a cluster: (128, 1), (256, 1) or (256, 2). With (0,
                         // 0) the rule of schedule.h chooses, and a forward of few rows may take the decode kernel
};

struct ForwardArgs : Operands {
  const void* bias;  // [N] at a multiple of 4 bytes, or null
  void* y;           // [M,N]
  void* h;           // [M,R], or null where it is not wanted
};

struct BackwardArgs : Operands {
  const void* dy;
  int64_t lddy;
  const void* h;  // [M,R]; null where db is null
  void* dx;       // [M,K], or null where it is not wanted
  void* da;       // [R,K], or null where it is not wanted
  void* db;       // [N,R], or null where it is not wanted
};

struct Workspace {
  size_t counters;  // ints
  size_t scratch;   // bytes
};

extern "C" {
// Each function returns a cudaError_t: 0 on success, cudaErrorInvalidValue for operands that break the rules above.
// `device` becomes the current one. The workspace functions dereference no pointer. They compare `x`, `h`, `dx`, `da`
// and `db` with null, and look at the alignment of the others.
int lk_sm90_forward_workspace(const ForwardArgs* args, Workspace* needed);
int lk_sm90_forward(const ForwardArgs* args);
int lk_sm90_backward_workspace(const BackwardArgs* args, Workspace* needed);
int lk_sm90_backward(const BackwardArgs* args);
}

}  // namespace lk::sm90
