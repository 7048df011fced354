// The sm_90a back-end as C++ sees it: pointers, sizes, strides (in elements), a stream. No torch, no Python.
//
//   forward    h = x̂ aᵀ     y = x wᵀ + bias + s · h bᵀ
//   backward   g = s · dy b     dx = dy w + c · keep ⊙ (g a)     da = c · gᵀ (keep ⊙ x)     db = s · dyᵀ h
//
// x [M,K] · w [N,K] · a [R,K] · b [N,R] · dy [M,N], rows of stride ld*. y, dx, h, da, db are contiguous. x, w, dy: base
// at a multiple of 16 bytes, ld* * 2 as well; N and K multiples of 8; 1 <= R <= 256; M >= 1. a and b are read with any
// alignment and row stride.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lk::sm90 {

struct Operands {
  int device;  // its ordinal
  int M, N, K, R;
  bool bf16;           // x, w, bias, y, h, dy, dx: bf16 or fp16
  bool adapters_fp32;  // a, b, da, db: fp32 or the same
  const void* x;       // null in a backward that wants no da
  const void* w;
  const void* a;
  const void* b;
  int64_t ldx, ldw, lda, ldb;
  float scale;
  const int64_t* seed;   // on the device; null where threshold is 0
  uint32_t threshold;    // of the dropout rule (csrc/philox.h); 0: no dropout
  float rescale;         // c
  int* counters;         // on the device, zero before the first launch, left zero by every launch
  void* scratch;         // on the device, of any content
  void* stream;          // cudaStream_t
  int columns, cluster;  // of a tile of y or dx, and blocks of a cluster: (128, 1), (256, 1), (256, 2). (0, 0): by the
                         // rule of schedule.h; then a forward of few rows may take the decode kernel
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
  void* da;       // [R,K], likewise
  void* db;       // [N,R], likewise
};

struct Workspace {
  size_t counters;  // ints
  size_t scratch;   // bytes
};

extern "C" {
// Each returns a cudaError_t, 0 on success; cudaErrorInvalidValue for operands other than described above. `device`
// becomes the current one. The workspace functions read no pointer but `x`, `h`, `dx`, `da`, `db` against null, and the
// alignment of `a` and `b`.
int lk_sm90_forward_workspace(const ForwardArgs* args, Workspace* needed);
int lk_sm90_forward(const ForwardArgs* args);
int lk_sm90_backward_workspace(const BackwardArgs* args, Workspace* needed);
int lk_sm90_backward(const BackwardArgs* args);
// 0 where the stream is not being captured, else a number that differs for every capture.
int lk_sm90_capture_id(void* stream, unsigned long long* id);
}

}  // namespace lk::sm90
