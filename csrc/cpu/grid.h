// How work is cut into tasks. A cut that decides the order of a sum depends on the shape alone. So results depend
// neither on the number of threads nor on which thread took which task.
#pragma once

#include <algorithm>

#include "kernels.h"

#ifdef _OPENMP
extern "C" int omp_get_thread_num();  // not from <omp.h>, which Apple's compiler lacks
#endif

namespace lk::cpu {

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

// The row stride of a panel, in floats. It is an odd number of cache lines; else the rows of a panel would all map to
// the same few places of an L1 cache.
inline i64 panel_stride(i64 cols) { return (ceil_div(cols, 16) | 1) * 16; }

// S slabs of rows by C chunks of columns. A chunk is a multiple of 64 wide, so that its keep bits are whole words.
struct Grid {
  i64 M, cols, S, slab, C, chunk;

  i64 size() const { return S * C; }
  i64 m0(i64 t) const { return t / C * slab; }
  i64 k0(i64 t) const { return t % C * chunk; }
  i64 rows(i64 t) const { return std::max<i64>(0, std::min(slab, M - m0(t))); }
  i64 width(i64 t) const { return std::max<i64>(0, std::min(chunk, cols - k0(t))); }
};

inline Grid make_grid(i64 M, i64 cols, i64 slab, i64 chunk) {
  slab = std::max<i64>(slab, 1);
  chunk = std::max<i64>(chunk, 1);
  return {M, cols, std::max<i64>(1, ceil_div(M, slab)), slab, std::max<i64>(1, ceil_div(cols, chunk)), chunk};
}

// The number of threads for work of this many operations: one, or all of torch's. Forking a team costs microseconds, so
// little work stays on the calling thread. A smaller team is not used, because libgomp then ends the threads that it
// leaves out, and has to start them again later.
inline int team(int threads, double flops) { return flops < 2e6 ? 1 : std::max(threads, 1); }

inline int worker() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace lk::cpu
