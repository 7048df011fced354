// What the tile kernels of one instruction set (LK_ISA_*) are written in. They are compiled once for each, by
// kernels.cpp, with that set's flags; hence no standard library templates and nothing with external linkage.
#pragma once

#include "kernels.h"

#if defined(LK_ISA_AVX512)
#include "vec_avx512.h"
#elif defined(LK_ISA_AVX2)
#include "vec_avx2.h"
#else
#include "vec_baseline.h"
#endif

#define LK_UNROLL _Pragma("GCC unroll 16")

namespace lk::cpu {
namespace {

using reg = V::reg;
constexpr int W = V::W;

template <class T>
inline T* row(Tile t, i64 m) {
  return static_cast<T*>(t.data) + m * t.ld;
}

// Ask for a line of a later row now. Rows lie pages apart, and the hardware's prefetchers stop at the end of a page; a
// prefetch past the end of the operand is harmless.
template <class T>
inline void ahead(const T* p) {
  __builtin_prefetch(p, 0, 2);  // into L2
}

}  // namespace
}  // namespace lk::cpu
