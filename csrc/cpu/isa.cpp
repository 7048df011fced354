#include "isa.h"

#include <atomic>

#if defined(LK_X86)
#include <cpuid.h>
#endif

namespace lk::cpu {
namespace {

#if defined(LK_X86)
struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false;
};

Features detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
  const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave) return {};
  unsigned lo, hi;
  __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  const bool ymm = (lo & 0x06) == 0x06, zmm = (lo & 0xe6) == 0xe6;  // the system saves and restores these registers
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  const auto has = [&](int bit) { return (b >> bit & 1) != 0; };
  Features f;
  f.avx2 = ymm && fma && f16c && has(5);
  f.avx512 = f.avx2 && zmm && has(16) && has(17) && has(30) && has(31);  // F, DQ, BW, VL
  f.avx512_bf16 = f.avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) != 0;
  return f;
}

// The tables of the sets that the compiler could compile (LK_HAS_*: csrc/native_build.py); null for others.
const Kernels* with_avx2() {
#if defined(LK_HAS_AVX2)
  return &kernels_avx2();
#else
  return nullptr;
#endif
}

const Kernels* with_avx512() {
#if defined(LK_HAS_AVX512)
  return &kernels_avx512();
#else
  return nullptr;
#endif
}

const Kernels* with_avx512_bf16() {
#if defined(LK_HAS_AVX512) && defined(LK_HAS_AVX512_BF16)
  static const Kernels with_bf16 = [] {
    Kernels k = kernels_avx512();
    k.name = "avx512_bf16";
    k.bf16 = &low_rank_avx512_bf16();
    k.quant_bf16 = &quant_avx512_bf16();
    k.gemm_bf16 = &gemm_avx512_bf16();
    return k;
  }();
  return &with_bf16;
#else
  return nullptr;
#endif
}
#endif

std::vector<Path> detect_paths() {
  std::vector<Path> paths;
#if defined(LK_X86)
  const Features f = detect();
  paths = {{"avx512_bf16", f.avx512_bf16, with_avx512_bf16()},
           {"avx512", f.avx512, with_avx512()},
           {"avx2", f.avx2, with_avx2()}};
#endif
  paths.push_back({"baseline", true, &kernels_baseline()});
  return paths;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const std::vector<Path>& paths() {
  static const std::vector<Path> found = detect_paths();
  return found;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Path& p : paths())
    if (p.usable()) names.emplace_back(p.name);
  return names;
}

const Kernels& kernels() {
  if (const Kernels* t = chosen.load(std::memory_order_relaxed)) return *t;
  for (const Path& p : paths())
    if (p.usable()) return *p.table;
  return kernels_baseline();
}

bool choose_isa(const std::string& name) {
  for (const Path& p : paths())
    if (p.usable() && name == p.name) {
      chosen.store(p.table, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace lk::cpu
