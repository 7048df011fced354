// The parameters of the kernels, which they take by value: tensor maps, pointers, sizes and the plan.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "api.h"
#include "schedule.h"

namespace lk::sm90 {

// The copy of an operand that TMA cannot read, because its rows are no multiple of 16 bytes or lie too close together.
// The copy has a row stride of `pitch`, a multiple of 8. The columns from `cols` to `pitch` are never used:
// the tensor maps end at `cols`.
struct PrepJob {
  const void* from;
  void* to;
  int64_t ld;
  int rows, cols, pitch, chunks;
};
constexpr int kPrepJobs = 3;

struct Common {
  PrepJob prep[kPrepJobs];
  int* counters;
  int counter_count;
  const int64_t* seed;
  uint32_t threshold;
  float rescale, scale;
  int M, N, K, R;
  int pitch;  // row stride of the low-rank operand in the workspace: s · h forward, g backward
};

struct ForwardParams : Common {
  CUtensorMap x, w, a, b;
  // s · h, rounded once from fp32, which the low-rank steps read. The h that is saved is not scaled by s.
  CUtensorMap sh;
  CUtensorMap y;
  void* sh_pointer;
  void* h;           // or null
  const void* bias;  // or null
  Plan plan;
};

struct BackwardParams : Common {
  CUtensorMap dy_rows, b;            // g tiles: [128, 64] and [64 / cluster, RP]
  CUtensorMap g_rows, a, w, dx;      // dx tiles: [128, 64], [64, 64], [64, 64]
  CUtensorMap dy_columns, h;         // db tiles: [64, 64] and [64 / cluster, RP]
  CUtensorMap x_columns, g_columns;  // da tiles: [64, 64] and [64 / cluster, RP]
  void* g_pointer;
  void *da, *db;  // or null
  float *da_partials, *db_partials;
  Plan plan;
};

struct DecodeParams : Common {
  CUtensorMap x, w, a;
  const void* b;
  int64_t ldb;
  const void* bias;  // or null
  void *y, *h;       // h or null
  float* h_sum;      // [R, MP], fp32: h transposed
  float* partials;
  DecodePlan plan;
};

// Each pass and element type is instantiated in a file of its own, so that they compile in parallel.
template <class T>
cudaError_t launch_forward(const ForwardParams& p, Tiling tiling, int blocks, cudaStream_t stream);
template <class T>
cudaError_t launch_backward(const BackwardParams& p, Tiling tiling, int blocks, cudaStream_t stream);
template <class T>
cudaError_t launch_decode(const DecodeParams& p, int blocks, cudaStream_t stream);

}  // namespace lk::sm90
