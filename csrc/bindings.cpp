// lora_kernels._C: pointers, sizes and strides in, nothing of torch. The caller (backends/cpu.py) has checked dtypes,
// shapes and unit last strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <variant>
#include <vector>

#include "cpu/isa.h"
#include "cpu/lora.h"
#include "cpu/quant.h"
#include "philox.h"

namespace py = pybind11;
using lk::cpu::DType;
using lk::cpu::i64;
using lk::cpu::Tile;

namespace {

Tile tile(uintptr_t data, i64 ld, int dtype) { return {reinterpret_cast<void*>(data), ld, static_cast<DType>(dtype)}; }

struct DTypes {
  int dtype, adapter_dtype;
};

// Of a branch forward: N, R, a, stride_ar, b, stride_bn, bias, y, stride_ym, h, stride_hm, scale, threshold, seed.
using Forward = std::tuple<i64, i64, uintptr_t, i64, uintptr_t, i64, uintptr_t, uintptr_t, i64, uintptr_t, i64, double,
                           uint32_t, uintptr_t>;

// And backward: N, R, dy, stride_dym, a, stride_ar, b, stride_bn, h, stride_hm, da, stride_dar, db, stride_dbn, scale,
// threshold, seed.
using Backward = std::tuple<i64, i64, uintptr_t, i64, uintptr_t, i64, uintptr_t, i64, uintptr_t, i64, uintptr_t, i64,
                            uintptr_t, i64, double, uint32_t, uintptr_t>;

lk::cpu::Dropout dropout(uint32_t threshold, uintptr_t seed) {
  lk::cpu::Dropout d;
  if (threshold) {
    d.threshold = threshold;
    std::memcpy(&d.seed, reinterpret_cast<const void*>(seed), sizeof(d.seed));
  }
  return d;
}

lk::cpu::Branch branch(const DTypes& c, const Forward& f) {
  const auto& [N, R, a, stride_ar, b, stride_bn, bias, y, stride_ym, h, stride_hm, scale, threshold, seed] = f;
  lk::cpu::Branch p{N, R, static_cast<float>(scale), dropout(threshold, seed), {}, {}, {}, {}, {}, {}, {}, {}, {}};
  p.a = tile(a, stride_ar, c.adapter_dtype);
  p.b = tile(b, stride_bn, c.adapter_dtype);
  p.bias = tile(bias, N, c.dtype);
  p.y = tile(y, stride_ym, c.dtype);
  p.h = tile(h, stride_hm, c.dtype);
  return p;
}

lk::cpu::Branch branch(const DTypes& c, const Backward& g) {
  const auto& [N, R, dy, stride_dym, a, stride_ar, b, stride_bn, h, stride_hm, da, stride_dar, db, stride_dbn, scale,
               threshold, seed] = g;
  lk::cpu::Branch p{N, R, static_cast<float>(scale), dropout(threshold, seed), {}, {}, {}, {}, {}, {}, {}, {}, {}};
  p.dy = tile(dy, stride_dym, c.dtype);
  p.a = tile(a, stride_ar, c.adapter_dtype);
  p.b = tile(b, stride_bn, c.adapter_dtype);
  p.h = tile(h, stride_hm, c.dtype);
  p.da = tile(da, stride_dar, c.adapter_dtype);
  p.db = tile(db, stride_dbn, c.adapter_dtype);
  return p;
}

template <class Of>
std::vector<lk::cpu::Branch> branches(const DTypes& c, const std::vector<Of>& given) {
  std::vector<lk::cpu::Branch> all;
  for (const Of& each : given) all.push_back(branch(c, each));
  return all;
}

// format, N, K, codes, levels, scales, scale_rows, scale_cols, blocksize, table, absmax, offset (an address)
using QuantizedWeight =
    std::tuple<int, i64, i64, uintptr_t, uintptr_t, uintptr_t, i64, i64, i64, uintptr_t, uintptr_t, uintptr_t>;

lk::cpu::Quantized quantized(const QuantizedWeight& w) {
  const auto& [format, N, K, codes, levels, scales, scale_rows, scale_cols, blocksize, table, absmax, offset] = w;
  return {static_cast<lk::cpu::Format>(format),
          N,
          K,
          reinterpret_cast<const uint8_t*>(codes),
          reinterpret_cast<const float*>(levels),
          reinterpret_cast<const void*>(scales),
          scale_rows,
          scale_cols,
          blocksize,
          reinterpret_cast<const float*>(table),
          reinterpret_cast<const float*>(absmax),
          offset ? *reinterpret_cast<const float*>(offset) : 0.0f};
}

// w of a branch whose base product forward shall compute: nothing, or w and stride_wn, or codes
using Base = std::variant<std::monostate, std::tuple<uintptr_t, i64>, QuantizedWeight>;

void forward(int threads, int dtype, int adapter_dtype, i64 M, i64 K, uintptr_t x, i64 stride_xm,
             const std::vector<Forward>& adapters, const std::vector<Base>& bases) {
  py::gil_scoped_release unlocked;
  const Tile rows = tile(x, stride_xm, dtype);
  std::vector<lk::cpu::Branch> all = branches({dtype, adapter_dtype}, adapters);
  for (size_t i = 0; i < bases.size() && i < all.size(); ++i) {
    if (const auto* dense = std::get_if<1>(&bases[i]))
      all[i].base =
          lk::cpu::few_rows(M, all[i].N, K, rows, tile(std::get<0>(*dense), std::get<1>(*dense), dtype), all[i].y);
    else if (const auto* codes = std::get_if<2>(&bases[i]))
      all[i].base = lk::cpu::few_rows(M, quantized(*codes), rows, all[i].y);
  }
  lk::cpu::forward(threads, M, K, rows, all);
}

void backward(int threads, int dtype, int adapter_dtype, i64 M, i64 K, uintptr_t x, i64 stride_xm, uintptr_t dx,
              i64 stride_dxm, const std::vector<Backward>& adapters) {
  py::gil_scoped_release unlocked;
  lk::cpu::backward(threads, M, K, tile(x, stride_xm, dtype), tile(dx, stride_dxm, dtype),
                    branches({dtype, adapter_dtype}, adapters));
}

void gemm(int threads, int dtype, i64 M, i64 N, i64 K, uintptr_t x, i64 stride_xm, uintptr_t w, i64 stride_wn,
          i64 stride_wk, uintptr_t y, i64 stride_ym, bool add) {
  py::gil_scoped_release unlocked;
  lk::cpu::gemm(threads, M, N, K, tile(x, stride_xm, dtype), tile(w, stride_wn, dtype), stride_wk,
                tile(y, stride_ym, dtype), add);
}

void dequantize(int threads, const QuantizedWeight& w, i64 n0, i64 rows, i64 k0, i64 cols, int dtype, uintptr_t out,
                i64 stride_out) {
  py::gil_scoped_release unlocked;
  lk::cpu::dequantize(threads, quantized(w), n0, rows, k0, cols, tile(out, stride_out, dtype));
}

void quantized_gemm(int threads, int dtype, i64 M, const QuantizedWeight& w, bool transposed, uintptr_t x,
                    i64 stride_xm, uintptr_t y, i64 stride_ym) {
  py::gil_scoped_release unlocked;
  lk::cpu::quantized_gemm(threads, M, quantized(w), transposed, tile(x, stride_xm, dtype), tile(y, stride_ym, dtype));
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> key) {
  const lk::Philox4 r = lk::philox4x32_10(c[0], c[1], c[2], c[3], key[0], key[1]);
  return {r.word[0], r.word[1], r.word[2], r.word[3]};
}

py::bytes keep_bits(uint64_t seed, uint32_t threshold, i64 m0, i64 rows, i64 cols) {
  const i64 ld = (cols + 63) / 64 * 8;
  std::string bits(static_cast<size_t>(rows * ld), '\0');
  lk::cpu::kernels().keep_bits(seed, threshold, m0, 0, rows, cols, reinterpret_cast<uint8_t*>(bits.data()), ld);
  return bits;
}

void set_cpu_isa(const std::string& name) {
  if (lk::cpu::choose_isa(name)) return;
  std::string have;
  for (const auto& isa : lk::cpu::available_isas()) have += (have.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("this machine cannot run cpu isa '" + name + "'; it can run: " + have);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of a LoRA linear layer";
  m.attr("F32") = static_cast<int>(DType::f32);
  m.attr("BF16") = static_cast<int>(DType::bf16);
  m.attr("F16") = static_cast<int>(DType::f16);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("cpu_isa", [] { return std::string(lk::cpu::kernels().name); }, "The instruction set in use.");
  m.def("cpu_isas", &lk::cpu::available_isas, "The instruction sets that this machine can run, best first.");
  m.def("set_cpu_isa", &set_cpu_isa, "Use another of cpu_isas(); ValueError if this machine cannot run it.");
  m.def("forward", &forward,
        "For each branch: y = x w^T where its base is given, for few rows; h = c keep(x) a^T where x is given; "
        "y += s h b^T + bias where y is given. Null: absent.");
  m.def("backward", &backward,
        "For each branch: g = s dy b; db = s dy^T h; dx += c keep(g a); da = c g^T keep(x). Null: absent.");
  m.def("gemm", &gemm,
        "y = x w^T, or with add y += that: dtypes of gemm_of, or, without add, any where gemm_few(M, stride_wk).");
  m.def(
      "gemm_of", [](int dtype) { return lk::cpu::gemm_of(static_cast<DType>(dtype)); },
      "Whether gemm and quantized_gemm take any number of rows of this dtype.");
  m.def("gemm_few", &lk::cpu::gemm_few, "Whether gemm reads w as it is: for few rows of x, w's own lying along k.");
  m.def("dequantize", &dequantize, "out = w[n0.., k0..], dequantised.");
  m.def("quantized_gemm", &quantized_gemm,
        "y = x w^T, or transposed y = x w: dtypes of gemm_of, or any where quantized_few(M, transposed).");
  m.def("quantized_few", &lk::cpu::quantized_few, "Whether quantized_gemm reads the codes as they are.");
  m.def("philox", &philox, "Philox4x32-10 of one counter and key.");
  m.def("keep_bits", &keep_bits,
        "The dropout bits of rows m0.., packed eight columns to a byte, rows padded to 8 bytes.");
}
