// The package's `Base`, `Adapter` and `QuantizedWeight` as operands of the kernels. The names of their fields stand
// here only; bindings.cpp reads `w` and `bias` of a Base by them. All reading needs the GIL.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/multi.h"
#include "cpu/quant.h"
#include "tensor.h"

namespace lk::python {

// The Python objects that reading an operand compares with or looks up. They are made once, at import.
struct Names {
  std::array<PyObject*, 7> formats;                        // those with levels first
  std::array<PyObject*, 6> layouts;                        // the formats of weights in integers, as in IntLayout
  PyObject *w, *bias;                                      // fields of a Base
  PyObject *a, *b, *scale, *p, *seed;                      // fields of an Adapter
  PyObject *format, *codes, *scales, *blocksize, *nested;  // fields of a QuantizedWeight
  PyObject* integers;                                      // and one more: (zeros, order), which may be empty
};

inline Names names;

// The 16 numbers that the codes of 4-bit formats stand for, in the order of Names::formats. `set_levels` fills them.
inline std::array<std::array<float, 16>, 5> levels{};

inline void find_names() {
  find_tensor_names();
  const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  names.formats = {name("nf4"),  name("fp4"), name("nf4-torchao"), name("nf4-torchao-bf16"), name("nf4-torchao-fp16"),
                   name("int8"), name("fp8")};
  names.layouts = {name("int8-group"), name("uint8-group"), name("uint4-group"),
                   name("gptq4"),      name("gptq8"),       name("awq4")};
  names.w = name("w"), names.bias = name("bias");
  names.a = name("a"), names.b = name("b"), names.scale = name("scale"), names.p = name("p"), names.seed = name("seed");
  names.format = name("format"), names.codes = name("codes"), names.scales = name("scales");
  names.blocksize = name("blocksize"), names.nested = name("nested");
  names.integers = name("integers");
}

inline double real(py::handle number) {
  const double value = PyFloat_AsDouble(number.ptr());
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// A Python list or tuple of operands. An index must be below its size.
class Items {
 public:
  explicit Items(py::handle sequence) : items_(checked(PySequence_Fast(sequence.ptr(), "expected a sequence"))) {}
  size_t size() const { return static_cast<size_t>(PySequence_Fast_GET_SIZE(items_.ptr())); }
  py::handle operator[](size_t i) const { return PySequence_Fast_GET_ITEM(items_.ptr(), static_cast<Py_ssize_t>(i)); }

 private:
  py::object items_;
};

// Throws unless every list of a call has an entry for each adapter.
inline void require_one_each(const Items& adapters, std::initializer_list<const Items*> lists) {
  for (const Items* list : lists)
    if (list->size() != adapters.size())
      throw std::invalid_argument("the lists of a call must have one entry for each adapter: there are " +
                                  std::to_string(adapters.size()) + " adapters, and a list of " +
                                  std::to_string(list->size()));
}

inline cpu::Dropout dropout(double p, py::handle seed) {
  cpu::Dropout d;
  if (seed.is_none()) return d;
  d.threshold = cpu::dropout_threshold(p);
  const void* const data = address(seed);
  if (!data) throw std::invalid_argument("the seed of the dropout mask has no element");
  std::memcpy(&d.seed, data, sizeof(d.seed));
  return d;
}

// The Python objects that own the memory of a call's tiles.
class Owners {
 public:
  // The tile of an operand, whose memory lives as long as this object.
  Tile keep(Operand o) {
    objects_.push_back(std::move(o.owner));
    return o.tile;
  }

 private:
  std::vector<py::object> objects_;
};

// An Adapter as a Branch with a [R, K], b [N, R], their sizes, the scale and the dropout.
inline cpu::Branch branch(py::handle adapter, i64 K, Owners& owners) {
  cpu::Branch p{};
  const py::object given_a = get(adapter, names.a), given_b = get(adapter, names.b);
  require(given_a, "a");
  require(given_b, "b");
  Operand a = input(given_a), b = input(given_b);
  p.R = a.size.first;
  p.N = b.size.first;
  p.a = owners.keep(sized(std::move(a), "lora_a", p.R, K));
  p.b = owners.keep(sized(std::move(b), "lora_b", p.N, p.R));
  p.scale = static_cast<float>(real(get(adapter, names.scale)));
  p.dropout = dropout(real(get(adapter, names.p)), get(adapter, names.seed));
  return p;
}

inline const float* floats(py::handle tensor, const char* name, i64 count) {
  return static_cast<const float*>(elements(tensor, name, count, 32));
}

// A scale for the whole of w [N, K], for each row, or for each block.
inline void require_fp8_scales(const cpu::Quantized& w) {
  const auto blocks = [](i64 n) { return (n + cpu::kFp8Block - 1) / cpu::kFp8Block; };
  const i64 rows = w.scale_rows, cols = w.scale_cols;
  if (cols == 1 && (rows == 1 || rows == w.N)) return;
  require_size("the scales", {rows, cols}, blocks(w.N), blocks(w.K));
}

// The position of `text` in `known`, or the number of texts that it has.
template <size_t COUNT>
inline size_t position(const py::object& text, const std::array<PyObject*, COUNT>& known) {
  size_t i = 0;
  while (i < COUNT && PyUnicode_Compare(text.ptr(), known[i])) ++i;
  return i;
}

inline bool is_empty(py::handle tensor) { return integer(call(tensor, tensor_names.numel)) == 0; }

// The parts of a weight in integers. Their sizes must be those of its layout, and the groups of its columns must exist.
inline cpu::Integers integers(py::handle weight, cpu::IntLayout layout) {
  cpu::Integers w{};
  w.layout = layout;
  const Two size = two(get(weight, tensor_names.shape));
  w.N = size.first;
  w.K = size.second;
  w.group = integer(get(weight, names.blocksize));
  if (w.group < 1) throw std::invalid_argument("a weight in integers needs a blocksize of at least 1");
  const bool halves = layout == cpu::IntLayout::halves, gptq8 = layout == cpu::IntLayout::gptq8;
  const i64 per_word = gptq8 ? 4 : 8, elements_of = w.N * w.K;
  const i64 words = w.turned() ? elements_of / per_word : halves ? elements_of / 2 : elements_of;
  if ((w.turned() && (w.N % 8 || (layout != cpu::IntLayout::awq4 && w.K % per_word))) || (halves && w.N % 2))
    throw std::invalid_argument("the sizes of a weight in integers are not whole words: QuantizedWeight.check() tells");
  w.codes = elements(get(weight, names.codes), "the codes", words, w.turned() ? 32 : 8);
  const py::object scales = get(weight, names.scales);
  i64 found = (elements_of + w.group - 1) / w.group;
  if (w.turned()) {
    const Two groups = two(get(scales, tensor_names.shape));
    found = groups.first;
    require_size("the scales", groups, found, w.N);
  }
  const i64 columns = w.turned() ? w.N : 1;
  const DType type = dtype(get(scales, tensor_names.dtype));
  const void* const read = elements(scales, "the scales", found * columns, static_cast<int>(8 * cpu::size_of(type)));
  w.scales = {const_cast<void*>(read), columns, type};
  const Items parts(get(weight, names.integers));
  if (parts.size() != 2) throw std::invalid_argument("a weight in integers needs (zeros, order)");
  const i64 count = found * columns;
  if (!is_empty(parts[0])) {
    const i64 bytes = integer(call(parts[0], tensor_names.element_size));
    const py::object of = get(parts[0], tensor_names.dtype);
    const bool packed = w.turned() && bytes == 4 && of.ptr() != tensor_names.dtypes[0];
    w.zeros = elements(parts[0], "the zeros", packed ? count / per_word : count, static_cast<int>(8 * bytes));
    w.zero_type = packed ? cpu::Integers::kPacked : bytes == 1 ? cpu::Integers::kInt8 : static_cast<int>(dtype(of));
  }
  if (w.turned() && is_empty(parts[1]) && found < (w.K + w.group - 1) / w.group)
    throw std::invalid_argument("the scales of a weight in integers are too few for its columns");
  if (!is_empty(parts[1])) {
    w.order = static_cast<const int32_t*>(elements(parts[1], "the order", w.K, 32));
    for (i64 k = 0; k < w.K; ++k)
      if (w.order[k] < 0 || w.order[k] >= found)
        throw std::invalid_argument("the groups of the columns must lie in 0.." + std::to_string(found - 1));
  }
  return w;
}

inline cpu::Quantized quantized(py::handle weight) {
  cpu::Quantized w{};
  const py::object format = get(weight, names.format), nested = get(weight, names.nested);
  if (!PyUnicode_Check(format.ptr())) throw py::type_error("the format of a quantised weight must be a string");
  const size_t index = position(format, names.formats);
  if (index == names.formats.size()) {
    const size_t layout = position(format, names.layouts);
    if (layout == names.layouts.size())
      throw std::invalid_argument("the CPU kernels have no format " + std::string(py::str(format)));
    w.format = cpu::Format::integers;
    w.integers = integers(weight, static_cast<cpu::IntLayout>(layout));
    w.N = w.integers.N;
    w.K = w.integers.K;
    w.codes = static_cast<const uint8_t*>(w.integers.codes);
    return w;
  }
  constexpr cpu::Format kinds[] = {cpu::Format::nf4, cpu::Format::fp4,  cpu::Format::nf4, cpu::Format::nf4,
                                   cpu::Format::nf4, cpu::Format::int8, cpu::Format::fp8};
  w.format = kinds[index];
  const Two size = two(get(weight, tensor_names.shape));
  w.N = size.first;
  w.K = size.second;
  w.codes = static_cast<const uint8_t*>(elements(get(weight, names.codes), "the codes", w.N * w.row_bytes(), 8));
  w.levels = w.four_bits() ? levels[index].data() : nullptr;
  w.blocksize = integer(get(weight, names.blocksize));
  if (w.four_bits() && w.blocksize < 1)
    throw std::invalid_argument("a weight in 4 bits needs a blocksize of at least 1, got " +
                                std::to_string(w.blocksize));
  const py::object scales = get(weight, names.scales);
  w.scale_rows = w.scale_cols = 1;
  if (w.format == cpu::Format::fp8) {
    const Two blocks = two(get(scales, tensor_names.shape));
    w.scale_rows = blocks.first;
    w.scale_cols = blocks.second;
    require_fp8_scales(w);
  }
  const i64 count = w.four_bits()                   ? (w.N * w.K + w.blocksize - 1) / w.blocksize
                    : w.format == cpu::Format::int8 ? w.N
                                                    : w.scale_rows * w.scale_cols;
  w.scales = elements(scales, "the scales", count, nested.is_none() ? 32 : 8);
  if (!nested.is_none()) {  // (table, absmax, offset)
    const Items parts(nested);
    if (!w.four_bits() || parts.size() != 3)
      throw std::invalid_argument("the nested scales of a weight in 4 bits are a table, absmax and an offset");
    w.table = floats(parts[0], "the table", 256);
    w.absmax = floats(parts[1], "the nested absmax", (count + cpu::kNested - 1) / cpu::kNested);
    w.offset = *floats(parts[2], "the nested offset", 1);
  }
  return w;
}

// A QuantizedWeight that must have the size [N, K].
inline cpu::Quantized quantized(py::handle weight, i64 N, i64 K) {
  const cpu::Quantized w = quantized(weight);
  require_size("w", {w.N, w.K}, N, K);
  return w;
}

// The rows of `order` that belong to each adapter: those of adapter i from starts[i] to starts[i + 1].
struct Groups {
  const int32_t *order, *starts;
  i64 M;

  i64 count(size_t i) const { return starts[i + 1] - starts[i]; }
};

inline Groups groups(py::handle order, py::handle starts, i64 M, size_t n) {
  const auto numbers = [](py::handle tensor, const char* name, i64 count) {
    return static_cast<const int32_t*>(elements(tensor, name, count, 32, "", ""));
  };
  const Groups g{numbers(order, "the order of the rows", M), numbers(starts, "the starts of the adapters", n + 1), M};
  bool fits = g.starts[0] == 0 && g.starts[n] <= M;
  for (size_t i = 0; i < n; ++i) fits &= g.count(i) >= 0;
  for (i64 m = 0; m < M; ++m) fits &= g.order[m] >= 0 && g.order[m] < M;
  if (!fits) throw std::invalid_argument("the rows of the adapters must lie in 0.." + std::to_string(M - 1));
  return g;
}

// An Adapter with its rows. A b whose columns are contiguous is read as b^T.
inline cpu::Owned owned(py::handle adapter, const Groups& rows, size_t i, i64 N, i64 K, Owners& owners) {
  cpu::Owned o{};
  o.rows = rows.order + rows.starts[i];
  o.M = rows.count(i);
  const py::object given_a = get(adapter, names.a), given_b = get(adapter, names.b);
  require(given_a, "a");
  require(given_b, "b");
  Operand a = input(given_a);
  o.R = a.size.first;
  const View b = view(given_b);
  require_size("lora_b", b.size, N, o.R);
  o.transposed = b.stride.first == 1 && (b.stride.second != 1 || o.R == 1);
  o.b = owners.keep(o.transposed ? Operand{given_b, {b.data, b.stride.second, b.dtype}, b.size} : input(given_b));
  o.a = owners.keep(sized(std::move(a), "lora_a", o.R, K));
  o.scale = static_cast<float>(real(get(adapter, names.scale)));
  o.dropout = dropout(real(get(adapter, names.p)), get(adapter, names.seed));
  return o;
}

}  // namespace lk::python
