// What the tile kernels are written in: the registers V of one instruction set (LK_ISA_*), and a few helpers. Files
// that include this are compiled once per instruction set, with its flags. So they use no templates of the standard
// library and define nothing with external linkage: the linker could merge such code into the baseline.
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

// The elements of a tile, whose dtype the caller knows.
template <class T>
LK_INLINE Rows<T> rows_of(Tile t) {
  return {static_cast<T*>(t.data), t.ld};
}

template <class T>
inline T* row(Tile t, i64 m) {
  return static_cast<T*>(t.data) + m * t.ld;
}

// Prefetch a line of a later row. Rows lie pages apart, and the hardware's prefetchers stop at the end of a page. A
// prefetch past the end of the operand is harmless.
template <class T>
inline void ahead(const T* p) {
  __builtin_prefetch(p, 0, 2);  // into L2
}

}  // namespace
}  // namespace lk::cpu
