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
#endif

std::vector<const Kernels*> detect_tables() {
  std::vector<const Kernels*> tables;
#if defined(LK_X86)
  const Features f = detect();
  if (f.avx512_bf16) {
    static const Kernels with_bf16 = [] {
      Kernels k = kernels_avx512();
      k.name = "avx512_bf16";
      k.bf16 = &low_rank_avx512_bf16();
      k.quant_bf16 = &quant_avx512_bf16();
      k.gemm_bf16 = &gemm_avx512_bf16();
      return k;
    }();
    tables.push_back(&with_bf16);
  }
  if (f.avx512) tables.push_back(&kernels_avx512());
  if (f.avx2) tables.push_back(&kernels_avx2());
#endif
  tables.push_back(&kernels_baseline());
  return tables;
}

const std::vector<const Kernels*>& tables() {
  static const std::vector<const Kernels*> found = detect_tables();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* t : tables()) names.emplace_back(t->name);
  return names;
}

const Kernels& kernels() {
  const Kernels* t = chosen.load(std::memory_order_relaxed);
  return t ? *t : *tables().front();
}

bool choose_isa(const std::string& name) {
  for (const Kernels* t : tables())
    if (name == t->name) {
      chosen.store(t, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace lk::cpu
