// From the operands of api.h to a launch: checks, plan, scratch memory, tensor maps.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "params.h"

namespace lk::sm90 {
namespace {

// ---- tensor maps. The driver's entry point is looked up at run time, so that nothing links against libcuda and a
// machine without it can import the module.
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

cudaError_t encode_tiled(EncodeTiled* to) {
  static EncodeTiled found = nullptr;  // a race is harmless: both threads write the same address
  if (found == nullptr) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess) return status;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorCallRequiresNewerDriver;
    found = reinterpret_cast<EncodeTiled>(function);
  }
  *to = found;
  return cudaSuccess;
}

// Encodes tensor maps and keeps the first failure.
class Maps {
 public:
  explicit Maps(bool bf16) : bf16_(bf16), status_(encode_tiled(&encode_)) {}

  // Encodes the map of a row-major matrix [rows, columns] with row stride ld, in boxes of box_rows x box_columns. The
  // swizzle is that of the bytes in a row of a box. Elements outside the matrix load as zeros and are not stored.
  void add(CUtensorMap* map, const void* p, int rows, int columns, int64_t ld, int box_rows, int box_columns) {
    if (status_ != cudaSuccess) return;
    const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t stride[1] = {static_cast<cuuint64_t>(ld) * 2};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)},
                     step[2] = {1, 1};
    const CUtensorMapSwizzle swizzle = box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B;
    const CUresult result = encode_(map, bf16_ ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                                    const_cast<void*>(p), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
      status_ = static_cast<cudaError_t>(result);  // the two enumerations agree on their values
  }
  cudaError_t status() const { return status_; }

 private:
  bool bf16_;
  EncodeTiled encode_ = nullptr;
  cudaError_t status_;
};

// ---- scratch memory
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}
  void* take(size_t bytes) {
    char* const p = base_ + bytes_;
    bytes_ += (bytes + 255) / 256 * 256;
    return p;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

bool aligned(const void* p, int64_t ld) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ld % 8 == 0; }
// A tensor map cannot describe rows that overlap, such as one row expanded.
bool apart(int rows, int columns, int64_t ld) { return rows == 1 || ld >= columns; }

// A matrix that TMA reads: the operand itself, or its copy in scratch.
struct Matrix {
  const void* p;
  int64_t ld;
};

// Returns the matrix that TMA reads for an operand. Plans a copy where TMA cannot read the operand itself.
Matrix readable(const void* p, int rows, int columns, int64_t ld, Scratch& scratch, PrepJob& job, int& chunks) {
  if (aligned(p, ld) && apart(rows, columns, ld)) return {p, ld};
  const int pitch = round_up(columns, 8);
  job = {p, scratch.take(static_cast<size_t>(rows) * pitch * 2), ld, rows, columns, pitch, prep_chunks(rows, pitch)};
  chunks += job.chunks;
  return {job.to, pitch};
}

// Makes the device current and sets `sms` to its number of multiprocessors. This module has a CUDA runtime of its own,
// which does not know the device that torch chose.
cudaError_t multiprocessors(int device, int* sms) {
  const cudaError_t status = cudaSetDevice(device);
  return status != cudaSuccess ? status : cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, device);
}

bool supported(const Operands& o) {
  const int64_t limit = int64_t{1} << 31;
  return o.M >= 1 && o.N >= 8 && o.K >= 8 && o.N % 8 == 0 && o.K % 8 == 0 && o.R >= 1 && o.R <= kMaxRank &&
         o.threshold < 65536 && int64_t{o.R} * o.K < limit && int64_t{o.R} * o.N < limit && aligned(o.w, o.ldw) &&
         (o.x == nullptr || aligned(o.x, o.ldx)) && (o.threshold == 0 || o.seed != nullptr) &&
         ((o.columns == 0 && o.cluster == 0) || is_compiled({o.columns, o.cluster}));
}

void common(const Operands& o, Common& p) {
  p.counters = o.counters;
  p.seed = o.seed;
  p.threshold = o.threshold;
  p.rescale = o.threshold > 0 ? o.rescale : 1.f;
  p.scale = o.scale;
  p.M = o.M;
  p.N = o.N;
  p.K = o.K;
  p.R = o.R;
  p.pitch = round_up(o.R, 8);
}

bool is_decode(const ForwardArgs& o) { return o.M <= kDecodeRows && o.threshold == 0 && o.columns == 0; }

// Returns the tiling that was asked for, or the one that the rule chooses for a y or dx with `columns` columns.
Tiling tiling_of(const Operands& o, int columns, int sms) {
  return o.columns == 0 ? tiling(o.M, columns, sms) : Tiling{o.columns, o.cluster};
}
// Returns the number of blocks, in whole clusters: no more than there are multiprocessors or items.
int blocks_of(const Plan& plan, int sms) {
  return std::max(1, std::min(plan.items(), sms / plan.cluster)) * plan.cluster;
}

struct Decode {
  DecodeParams p{};
  Matrix a;
  Workspace needed;

  Decode(const ForwardArgs& o, int sms) {
    common(o, p);
    Scratch scratch(o.scratch);
    a = readable(o.a, o.R, o.K, o.lda, scratch, p.prep[0], p.plan.prep);
    p.plan.a_tiles = ceil_div(o.R, kTileM);
    p.plan.w_tiles = ceil_div(o.N, kTileM);
    p.plan.blocks = ceil_div(o.K, kTileK);
    p.plan.splits = decode_splits(p.plan.tiles(), p.plan.blocks, sms);
    const int rows = decode_rows(o.M);
    p.h_sum = static_cast<float*>(scratch.take(sizeof(float) * o.R * rows));
    if (p.plan.splits > 1)
      p.partials = static_cast<float*>(
          scratch.take(sizeof(float) * partial_index(p.plan.splits, p.plan.tiles(), 0, rows / 2, 0, 0)));
    p.counter_count = decode_counters(p.plan);
    p.b = o.b;
    p.ldb = o.ldb;
    p.bias = o.bias;
    p.y = o.y;
    p.h = o.h;
    needed = {static_cast<size_t>(p.counter_count), scratch.bytes()};
  }
  cudaError_t run(const ForwardArgs& o, int sms) {
    Maps maps(o.bf16);
    maps.add(&p.x, o.x, o.M, o.K, o.ldx, decode_rows(o.M), kTileK);
    maps.add(&p.w, o.w, o.N, o.K, o.ldw, kTileM, kTileK);
    maps.add(&p.a, a.p, o.R, o.K, a.ld, kTileM, kTileK);
    if (maps.status() != cudaSuccess) return maps.status();
    const int blocks = std::min(p.plan.items(), sms);
    const cudaStream_t stream = static_cast<cudaStream_t>(o.stream);
    return o.bf16 ? launch_decode<__nv_bfloat16>(p, blocks, stream) : launch_decode<__half>(p, blocks, stream);
  }
};

struct Forward {
  ForwardParams p{};
  Matrix a, b;
  Tiling tiling;
  Workspace needed;

  Forward(const ForwardArgs& o, int sms) : tiling(tiling_of(o, o.N, sms)) {
    common(o, p);
    Scratch scratch(o.scratch);
    Plan& plan = p.plan;
    plan.cluster = tiling.cluster;
    a = readable(o.a, o.R, o.K, o.lda, scratch, p.prep[0], plan.prep);
    b = readable(o.b, o.N, o.R, o.ldb, scratch, p.prep[1], plan.prep);
    plan.prep = round_up(plan.prep, plan.cluster);
    plan.rank_tiles = rank_tiles(o.R);
    plan.blocks = plan.tiles_m = round_up(ceil_div(o.M, kTileM), plan.cluster);
    plan.tiles_n = ceil_div(o.N, tiling.columns);
    p.sh_pointer = scratch.take(static_cast<size_t>(o.M) * p.pitch * 2);
    p.counter_count = counters(plan);
    p.bias = o.bias;
    p.h = o.h;
    needed = {static_cast<size_t>(p.counter_count), scratch.bytes()};
  }
  cudaError_t run(const ForwardArgs& o, int sms) {
    Maps maps(o.bf16);
    maps.add(&p.x, o.x, o.M, o.K, o.ldx, kTileM, kTileK);
    maps.add(&p.w, o.w, o.N, o.K, o.ldw, tiling.columns / tiling.cluster, kTileK);
    maps.add(&p.a, a.p, o.R, o.K, a.ld, padded_rank(o.R) / tiling.cluster, kTileK);
    maps.add(&p.b, b.p, o.N, o.R, b.ld, tiling.columns / tiling.cluster, kTileK);
    maps.add(&p.sh, p.sh_pointer, o.M, o.R, p.pitch, kTileM, kTileK);
    maps.add(&p.y, o.y, o.M, o.N, o.N, 64, 64);
    if (maps.status() != cudaSuccess) return maps.status();
    const int blocks = blocks_of(p.plan, sms);
    const cudaStream_t stream = static_cast<cudaStream_t>(o.stream);
    return o.bf16 ? launch_forward<__nv_bfloat16>(p, tiling, blocks, stream)
                  : launch_forward<__half>(p, tiling, blocks, stream);
  }
};

struct Backward {
  BackwardParams p{};
  Matrix a{}, b{}, h{};
  Tiling tiling;
  Workspace needed;

  Backward(const BackwardArgs& o, int sms) : tiling(tiling_of(o, o.K, sms)) {
    common(o, p);
    Scratch scratch(o.scratch);
    const bool need_g = o.dx != nullptr || o.da != nullptr;
    Plan& plan = p.plan;
    plan.cluster = tiling.cluster;
    plan.rank_tiles = rank_tiles(o.R);
    const int row_blocks = round_up(ceil_div(o.M, kTileM), plan.cluster);
    if (need_g) {
      b = readable(o.b, o.N, o.R, o.ldb, scratch, p.prep[0], plan.prep);
      plan.blocks = row_blocks;
      p.g_pointer = scratch.take(static_cast<size_t>(o.M) * p.pitch * 2);
    }
    if (o.dx != nullptr) {
      a = readable(o.a, o.R, o.K, o.lda, scratch, p.prep[1], plan.prep);
      plan.tiles_m = row_blocks;
      plan.tiles_n = ceil_div(o.K, tiling.columns);
    }
    if (o.db != nullptr) {
      h = readable(o.h, o.M, o.R, o.R, scratch, p.prep[2], plan.prep);
      plan.db_tiles = round_up(ceil_div(o.N, 128), plan.cluster) * plan.rank_tiles;
      plan.db_splits = gradient_splits(plan.db_tiles, o.M, sms);
      p.db_partials = partials(scratch, plan.db_tiles, plan.db_splits);
    }
    if (o.da != nullptr) {
      plan.da_tiles = round_up(ceil_div(o.K, 128), plan.cluster) * plan.rank_tiles;
      plan.da_splits = gradient_splits(plan.da_tiles, o.M, sms);
      p.da_partials = partials(scratch, plan.da_tiles, plan.da_splits);
    }
    plan.prep = round_up(plan.prep, plan.cluster);
    p.counter_count = counters(plan);
    p.da = o.da;
    p.db = o.db;
    needed = {static_cast<size_t>(p.counter_count), scratch.bytes()};
  }
  cudaError_t run(const BackwardArgs& o, int sms) {
    const int rank_box = rank_width(padded_rank(o.R)) / 2, rank_rows = kTileK / tiling.cluster;
    Maps maps(o.bf16);
    if (p.plan.blocks > 0) {
      maps.add(&p.dy_rows, o.dy, o.M, o.N, o.lddy, kTileM, kTileK);
      maps.add(&p.b, b.p, o.N, o.R, b.ld, rank_rows, rank_box);
    }
    if (o.dx != nullptr) {
      maps.add(&p.g_rows, p.g_pointer, o.M, o.R, p.pitch, kTileM, kTileK);
      maps.add(&p.a, a.p, o.R, o.K, a.ld, kTileK, 64);
      maps.add(&p.w, o.w, o.N, o.K, o.ldw, kTileK, 64);
      maps.add(&p.dx, o.dx, o.M, o.K, o.K, 64, 64);
    }
    if (o.db != nullptr) {
      maps.add(&p.dy_columns, o.dy, o.M, o.N, o.lddy, kTileK, 64);
      maps.add(&p.h, h.p, o.M, o.R, h.ld, rank_rows, rank_box);
    }
    if (o.da != nullptr) {
      maps.add(&p.x_columns, o.x, o.M, o.K, o.ldx, kTileK, 64);
      maps.add(&p.g_columns, p.g_pointer, o.M, o.R, p.pitch, rank_rows, rank_box);
    }
    if (maps.status() != cudaSuccess) return maps.status();
    const int blocks = blocks_of(p.plan, sms);
    const cudaStream_t stream = static_cast<cudaStream_t>(o.stream);
    return o.bf16 ? launch_backward<__nv_bfloat16>(p, tiling, blocks, stream)
                  : launch_backward<__half>(p, tiling, blocks, stream);
  }

 private:
  float* partials(Scratch& scratch, int tiles, int splits) const {
    if (splits == 1) return nullptr;
    return static_cast<float*>(
        scratch.take(sizeof(float) * partial_index(splits, tiles, 0, padded_rank(p.R) / 2, 0, 0)));
  }
};

bool supported(const ForwardArgs& o) {
  return supported(static_cast<const Operands&>(o)) && o.x != nullptr && reinterpret_cast<uintptr_t>(o.bias) % 4 == 0;
}
bool supported(const BackwardArgs& o) {
  return supported(static_cast<const Operands&>(o)) && aligned(o.dy, o.lddy) && (o.da == nullptr || o.x != nullptr) &&
         (o.db == nullptr || o.h != nullptr) && (o.dx != nullptr || o.da != nullptr || o.db != nullptr);
}

template <class PASS, class ARGS>
cudaError_t measure(const ARGS& o, Workspace* needed) {
  int sms = 0;
  const cudaError_t status = multiprocessors(o.device, &sms);
  if (status == cudaSuccess) *needed = PASS(o, sms).needed;
  return status;
}
template <class PASS, class ARGS>
cudaError_t run(const ARGS& o) {
  int sms = 0;
  const cudaError_t status = multiprocessors(o.device, &sms);
  return status != cudaSuccess ? status : PASS(o, sms).run(o, sms);
}

}  // namespace

extern "C" {

int lk_sm90_forward_workspace(const ForwardArgs* args, Workspace* needed) {
  if (!supported(*args)) return cudaErrorInvalidValue;
  return is_decode(*args) ? measure<Decode>(*args, needed) : measure<Forward>(*args, needed);
}
int lk_sm90_forward(const ForwardArgs* args) {
  if (!supported(*args)) return cudaErrorInvalidValue;
  return is_decode(*args) ? run<Decode>(*args) : run<Forward>(*args);
}
int lk_sm90_backward_workspace(const BackwardArgs* args, Workspace* needed) {
  return supported(*args) ? measure<Backward>(*args, needed) : cudaErrorInvalidValue;
}
int lk_sm90_backward(const BackwardArgs* args) {
  return supported(*args) ? run<Backward>(*args) : cudaErrorInvalidValue;
}

}  // extern "C"

}  // namespace lk::sm90
