// Python objects as operands of the kernels. This is the only file that knows how PyTorch's tensors and the package's
// `Base`, `Adapter` and `QuantizedWeight` look. It reads them through Python's C API, so the module links to nothing of
// torch and serves every version of it. All reading needs the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/lora.h"
#include "cpu/quant.h"

namespace lk::python {

namespace py = pybind11;
using cpu::DType;
using cpu::i64;
using cpu::Tile;

// The Python objects that reading an operand compares with or looks up. They are made once, at import.
struct Names {
  PyTypeObject* tensor;                                    // torch.Tensor
  std::array<PyObject*, 3> dtypes;                         // in the order of DType
  std::array<PyObject*, 4> formats;                        // in the order of Format
  PyObject *data_ptr, *stride, *contiguous, *numel;        // methods of a tensor
  PyObject *shape, *dtype;                                 // attributes of a tensor
  PyObject *w, *bias;                                      // fields of a Base
  PyObject *a, *b, *scale, *p, *seed;                      // fields of an Adapter
  PyObject *format, *codes, *scales, *blocksize, *nested;  // fields of a QuantizedWeight
};

inline Names names;

// The 16 numbers that the codes of nf4 and fp4 stand for, in the order of Format. `set_levels` fills them.
inline std::array<std::array<float, 16>, 2> levels{};

inline void find_names() {
  const py::module_ torch = py::module_::import("torch");
  const auto kept = [](py::object object) { return object.release().ptr(); };  // for the life of the process
  names.tensor = reinterpret_cast<PyTypeObject*>(kept(torch.attr("Tensor")));
  names.dtypes = {kept(torch.attr("float32")), kept(torch.attr("bfloat16")), kept(torch.attr("float16"))};
  const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  names.formats = {name("nf4"), name("fp4"), name("int8"), name("fp8")};
  names.data_ptr = name("data_ptr"), names.stride = name("stride"), names.contiguous = name("contiguous");
  names.numel = name("numel");
  names.shape = name("shape"), names.dtype = name("dtype");
  names.w = name("w"), names.bias = name("bias");
  names.a = name("a"), names.b = name("b"), names.scale = name("scale"), names.p = name("p"), names.seed = name("seed");
  names.format = name("format"), names.codes = name("codes"), names.scales = name("scales");
  names.blocksize = name("blocksize"), names.nested = name("nested");
}

inline py::object checked(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

inline py::object get(py::handle object, PyObject* attribute) {
  return checked(PyObject_GetAttr(object.ptr(), attribute));
}

inline py::object call(py::handle object, PyObject* method) {
  PyObject* const arguments[] = {object.ptr()};
  return checked(PyObject_VectorcallMethod(method, arguments, 1, nullptr));
}

inline i64 integer(py::handle number) {
  const i64 value = PyLong_AsLongLong(number.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline double real(py::handle number) {
  const double value = PyFloat_AsDouble(number.ptr());
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The sizes or the strides of a tensor of one or two dimensions. The second number of one dimension is `missing`.
struct Two {
  i64 first, second;
};

inline Two two(const py::object& tuple, i64 missing) {
  const i64 count = PyTuple_Check(tuple.ptr()) ? PyTuple_GET_SIZE(tuple.ptr()) : 0;
  if (count != 1 && count != 2) throw std::invalid_argument("the CPU kernels take tensors of one or two dimensions");
  return {integer(PyTuple_GET_ITEM(tuple.ptr(), 0)), count == 2 ? integer(PyTuple_GET_ITEM(tuple.ptr(), 1)) : missing};
}

inline Two shape(py::handle tensor) { return two(get(tensor, names.shape), 1); }

inline void* address(py::handle tensor) {
  void* const data = reinterpret_cast<void*>(integer(call(tensor, names.data_ptr)));
  if (!data && integer(call(tensor, names.numel)))
    throw std::invalid_argument("the CPU kernels take tensors with memory, and a tensor on the meta device has none");
  return data;
}

inline DType dtype(py::handle of) {
  for (size_t i = 0; i < names.dtypes.size(); ++i)
    if (of.ptr() == names.dtypes[i]) return static_cast<DType>(i);
  throw py::type_error("the CPU kernels take float32, bfloat16 and float16, not " + std::string(py::str(of)));
}

// A tensor as a Tile, and the object that owns the tile's memory. No tensor (None) is a tile without data.
struct Operand {
  py::object owner;
  Tile tile{};
};

// A tensor for reading. If its last stride is not 1 it is copied, and the copy lives as long as the Operand.
inline Operand input(py::handle tensor) {
  if (tensor.is_none()) return {};
  Operand o{py::reinterpret_borrow<py::object>(tensor)};
  const auto strides = [&] {
    const py::object tuple = call(o.owner, names.stride);
    const Two s = two(tuple, 1);
    return PyTuple_GET_SIZE(tuple.ptr()) == 1 ? Two{0, s.first} : s;
  };
  Two s = strides();
  if (s.second != 1) {
    o.owner = call(o.owner, names.contiguous);
    s = strides();
  }
  o.tile = {address(o.owner), s.first, dtype(get(o.owner, names.dtype))};
  return o;
}

// A tensor for writing. Its last stride must be 1.
inline Tile output(py::handle tensor) {
  const Two s = two(call(tensor, names.stride), 1);
  if (s.second != 1) throw std::invalid_argument("the CPU kernels write to tensors whose last stride is 1");
  return {address(tensor), s.first, dtype(get(tensor, names.dtype))};
}

// No tensor (None) is a tile without data, which is not written.
inline Tile output_or_none(py::handle tensor) { return tensor.is_none() ? Tile{} : output(tensor); }

inline void require(py::handle tensor, const char* name) {
  if (tensor.is_none()) throw py::type_error("this call of the CPU kernels needs " + std::string(name) + ", got None");
}

// A Python list or tuple of operands.
class Items {
 public:
  explicit Items(py::handle sequence) : items_(checked(PySequence_Fast(sequence.ptr(), "expected a sequence"))) {}
  size_t size() const { return static_cast<size_t>(PySequence_Fast_GET_SIZE(items_.ptr())); }
  py::handle operator[](size_t i) const {
    if (i >= size()) throw std::invalid_argument("the lists of a call have different lengths");
    return PySequence_Fast_GET_ITEM(items_.ptr(), static_cast<Py_ssize_t>(i));
  }

 private:
  py::object items_;
};

inline cpu::Dropout dropout(double p, py::handle seed) {
  cpu::Dropout d;
  if (seed.is_none()) return d;
  d.threshold = cpu::dropout_threshold(p);
  const void* const data = address(seed);
  if (!data) throw std::invalid_argument("the seed of the dropout mask has no element");
  std::memcpy(&d.seed, data, sizeof(d.seed));
  return d;
}

// An Adapter as a Branch with a, b, their sizes, the scale and the dropout. It writes the columns of a to K, and adds
// the objects that own the memory of a and b to `owners`.
inline cpu::Branch branch(py::handle adapter, i64& K, std::vector<py::object>& owners) {
  cpu::Branch p{};
  py::object a = get(adapter, names.a), b = get(adapter, names.b);
  const Two size = shape(a);
  p.R = size.first;
  K = size.second;
  p.N = shape(b).first;
  p.scale = static_cast<float>(real(get(adapter, names.scale)));
  p.dropout = dropout(real(get(adapter, names.p)), get(adapter, names.seed));
  for (const auto& [tile, tensor] : {std::pair<Tile*, py::object*>{&p.a, &a}, {&p.b, &b}}) {
    Operand o = input(*tensor);
    *tile = o.tile;
    owners.push_back(std::move(o.owner));
  }
  return p;
}

inline const float* floats(py::handle tensor) { return static_cast<const float*>(address(tensor)); }

inline cpu::Quantized quantized(py::handle weight) {
  cpu::Quantized w{};
  const py::object format = get(weight, names.format), nested = get(weight, names.nested);
  if (!PyUnicode_Check(format.ptr())) throw py::type_error("the format of a quantised weight must be a string");
  size_t index = 0;
  while (index < names.formats.size() && PyUnicode_Compare(format.ptr(), names.formats[index])) ++index;
  if (index == names.formats.size())
    throw std::invalid_argument("the CPU kernels have no format " + std::string(py::str(format)));
  w.format = static_cast<cpu::Format>(index);
  const Two size = shape(weight);
  w.N = size.first;
  w.K = size.second;
  w.codes = static_cast<const uint8_t*>(address(get(weight, names.codes)));
  w.levels = w.four_bits() ? levels[index].data() : nullptr;
  const py::object scales = get(weight, names.scales);
  w.scales = address(scales);
  w.scale_rows = w.scale_cols = 1;
  if (w.format == cpu::Format::fp8) {
    const Two blocks = shape(scales);
    w.scale_rows = blocks.first;
    w.scale_cols = blocks.second;
  }
  w.blocksize = integer(get(weight, names.blocksize));
  if (!nested.is_none()) {  // (table, absmax, offset)
    const Items parts(nested);
    w.table = floats(parts[0]);
    w.absmax = floats(parts[1]);
    w.offset = *floats(parts[2]);
  }
  return w;
}

}  // namespace lk::python
