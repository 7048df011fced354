// PyTorch's tensors, read without linking to torch, so that the module serves every version of it.
//
// There are two ways. DLPack's table of C functions (`__dlpack_c_exchange_api__` of a recent torch.Tensor) fills in all
// fields of a tensor by one call. Without the table, and where that call fails, four attributes and methods of the
// Python object give the same. They take ten times as long, a few microseconds in every call. Reading needs the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace lk::python {

namespace py = pybind11;
using cpu::DType;
using cpu::i64;
using cpu::Tile;

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

// The structs of DLPack 1 that its table of functions needs (https://dmlc.github.io/dlpack). Fields that are not read
// have no type of their own.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLExchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *to_managed, *from_managed;
  int (*view)(void* object, DLTensor* out);  // not 0 on failure, with a Python error set
  void* stream;
};

// The Python objects that reading a tensor needs, made once, at import.
struct TensorNames {
  PyTypeObject* type;                                                               // torch.Tensor
  std::array<PyObject*, 3> dtypes;                                                  // in the order of DType
  PyObject *data_ptr, *stride, *contiguous, *numel, *element_size, *is_contiguous;  // methods
  PyObject *shape, *dtype;                                                          // attributes
  const DLExchange* exchange;                                                       // null where this torch has none
};

inline TensorNames tensor_names;

inline PyObject* kept(py::object object) { return object.release().ptr(); }  // for the life of the process

inline const DLExchange* find_exchange() {
  const py::object capsule =
      py::getattr(py::handle(reinterpret_cast<PyObject*>(tensor_names.type)), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* table = static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return table->major == 1 && table->view ? table : nullptr;
}

inline void find_tensor_names() {
  const py::module_ torch = py::module_::import("torch");
  const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  tensor_names.type = reinterpret_cast<PyTypeObject*>(kept(torch.attr("Tensor")));
  tensor_names.dtypes = {kept(torch.attr("float32")), kept(torch.attr("bfloat16")), kept(torch.attr("float16"))};
  tensor_names.data_ptr = name("data_ptr"), tensor_names.stride = name("stride");
  tensor_names.contiguous = name("contiguous"), tensor_names.numel = name("numel");
  tensor_names.element_size = name("element_size"), tensor_names.is_contiguous = name("is_contiguous");
  tensor_names.shape = name("shape"), tensor_names.dtype = name("dtype");
  tensor_names.exchange = find_exchange();
}

inline bool is_tensor(py::handle object) { return PyObject_TypeCheck(object.ptr(), tensor_names.type); }

struct Two {
  i64 first, second;
};

inline void require_two_dimensions(i64 dimensions) {
  if (dimensions != 1 && dimensions != 2)
    throw std::invalid_argument("the CPU kernels take tensors of one or two dimensions, got " +
                                std::to_string(dimensions) + ": pass x.reshape(-1, x.shape[-1])");
}

// Two sizes or strides, from a tuple of one or two numbers. The second of one number is 1.
inline Two two(const py::object& tuple) {
  const i64 count = PyTuple_Check(tuple.ptr()) ? PyTuple_GET_SIZE(tuple.ptr()) : 0;
  require_two_dimensions(count);
  return {integer(PyTuple_GET_ITEM(tuple.ptr(), 0)), count == 2 ? integer(PyTuple_GET_ITEM(tuple.ptr(), 1)) : 1};
}

// A tensor of one or two dimensions.
struct View {
  void* data;
  Two size;    // one dimension: its size and 1
  Two stride;  // one dimension: 0 and its stride
  DType dtype;
};

inline bool view_by_exchange(py::handle tensor, DLTensor& out) {
  if (!tensor_names.exchange || !is_tensor(tensor)) return false;
  if (tensor_names.exchange->view(tensor.ptr(), &out) == 0 && out.device_type == 1 && out.strides) {  // 1: a CPU
    out.data = static_cast<char*>(out.data) + out.byte_offset;
    return true;
  }
  PyErr_Clear();
  return false;
}

// The address of a tensor of any dtype and any number of dimensions. It is null only where there is no element.
inline void* address(py::handle tensor) {
  DLTensor t;
  if (view_by_exchange(tensor, t) && t.data) return t.data;
  void* const data = reinterpret_cast<void*>(integer(call(tensor, tensor_names.data_ptr)));
  if (!data && integer(call(tensor, tensor_names.numel)))
    throw std::invalid_argument("the CPU kernels take tensors with memory, and a tensor on the meta device has none");
  return data;
}

// The address of `count` elements of `bits` bits each, one after the other in memory. A kernel would read beyond the
// memory of a tensor that is smaller, and other elements of one that has strides.
inline const void* elements(py::handle tensor, const char* name, i64 count, int bits,
                            const char* of = " of a quantised weight",
                            const char* hint = ": QuantizedWeight.check() tells all that does not fit") {
  DLTensor t;
  if (view_by_exchange(tensor, t) && t.data) {
    i64 got = 1;
    bool in_order = true;
    for (int d = t.ndim - 1; d >= 0; got *= t.shape[d--]) in_order &= t.shape[d] == 1 || t.strides[d] == got;
    if (got == count && t.type_bits == bits && in_order) return t.data;
  } else if (integer(call(tensor, tensor_names.numel)) == count &&
             integer(call(tensor, tensor_names.element_size)) * 8 == bits &&
             PyObject_IsTrue(call(tensor, tensor_names.is_contiguous).ptr()) == 1) {
    return address(tensor);
  }
  throw std::invalid_argument("the CPU kernels take " + std::string(name) + of + " as a contiguous tensor of " +
                              std::to_string(count) + " elements of " + std::to_string(bits) + " bits, got " +
                              std::string(py::str(get(tensor, tensor_names.dtype))) + ", shape " +
                              std::string(py::str(get(tensor, tensor_names.shape))) + ", strides " +
                              std::string(py::str(call(tensor, tensor_names.stride))) + hint);
}

// The DType that stands for a torch.dtype.
inline DType dtype(py::handle of) {
  for (size_t i = 0; i < tensor_names.dtypes.size(); ++i)
    if (of.ptr() == tensor_names.dtypes[i]) return static_cast<DType>(i);
  throw py::type_error("the CPU kernels take float32, bfloat16 and float16, not " + std::string(py::str(of)));
}

// The DType of a tensor that view_by_exchange has read.
inline DType dtype(py::handle tensor, const DLTensor& t) {
  constexpr uint8_t kFloat = 2, kBfloat = 4;
  return t.type_code == kFloat && t.type_bits == 32    ? DType::f32
         : t.type_code == kFloat && t.type_bits == 16  ? DType::f16
         : t.type_code == kBfloat && t.type_bits == 16 ? DType::bf16
                                                       : dtype(get(tensor, tensor_names.dtype));
}

inline View view(py::handle tensor) {
  DLTensor t;
  if (view_by_exchange(tensor, t) && t.data) {
    require_two_dimensions(t.ndim);
    const DType type = dtype(tensor, t);
    if (t.ndim == 1) return {t.data, {t.shape[0], 1}, {0, t.strides[0]}, type};
    return {t.data, {t.shape[0], t.shape[1]}, {t.strides[0], t.strides[1]}, type};
  }
  const py::object strides = call(tensor, tensor_names.stride);
  const Two size = two(get(tensor, tensor_names.shape));
  Two stride = two(strides);
  if (PyTuple_GET_SIZE(strides.ptr()) == 1) stride = {0, stride.first};
  return {address(tensor), size, stride, dtype(get(tensor, tensor_names.dtype))};
}

// A tensor of three dimensions: matrices of one size.
struct Stack {
  void* data;
  i64 count, step;  // the number of matrices, and the elements from one to the next
  Two size, stride;
  DType dtype;

  Tile at(i64 i) const { return {static_cast<char*>(data) + i * step * size_of(dtype), stride.first, dtype}; }
  // The matrices transposed
  Stack t() const { return {data, count, step, {size.second, size.first}, {stride.second, stride.first}, dtype}; }
};

inline Stack stack(py::handle tensor) {
  std::array<i64, 3> size{}, stride{};
  DLTensor t;
  if (view_by_exchange(tensor, t) && t.data && t.ndim == 3) {
    std::copy_n(t.shape, 3, size.begin());
    std::copy_n(t.strides, 3, stride.begin());
    return {t.data, size[0], stride[0], {size[1], size[2]}, {stride[1], stride[2]}, dtype(tensor, t)};
  }
  const auto read = [](const py::object& tuple, std::array<i64, 3>& to) {
    const i64 count = PyTuple_Check(tuple.ptr()) ? PyTuple_GET_SIZE(tuple.ptr()) : 0;
    if (count != 3)
      throw std::invalid_argument("the CPU kernels take the weights of experts as tensors of three dimensions, got " +
                                  std::to_string(count));
    for (i64 i = 0; i < 3; ++i) to[i] = integer(PyTuple_GET_ITEM(tuple.ptr(), i));
  };
  read(get(tensor, tensor_names.shape), size);
  read(call(tensor, tensor_names.stride), stride);
  return {address(tensor),
          size[0],
          stride[0],
          {size[1], size[2]},
          {stride[1], stride[2]},
          dtype(get(tensor, tensor_names.dtype))};
}

// A tensor as a Tile with its size, and the object that owns the tile's memory. No tensor (None) is a tile without
// data.
struct Operand {
  py::object owner;
  Tile tile{};
  Two size{};
};

// A tensor for reading. If its last stride is not 1 it is copied, and the copy lives as long as the Operand.
inline Operand input(py::handle tensor) {
  if (tensor.is_none()) return {};
  Operand o{py::reinterpret_borrow<py::object>(tensor)};
  View v = view(tensor);
  if (v.stride.second != 1) {
    o.owner = call(tensor, tensor_names.contiguous);
    v = view(o.owner);
  }
  o.tile = {v.data, v.stride.first, v.dtype};
  o.size = v.size;
  return o;
}

// A tensor for writing. Its last stride must be 1.
inline Operand output(py::handle tensor) {
  const View v = view(tensor);
  if (v.stride.second != 1)
    throw std::invalid_argument("the CPU kernels write to tensors whose last stride is 1, got " +
                                std::to_string(v.stride.second) + ": pass a contiguous tensor");
  return {py::reinterpret_borrow<py::object>(tensor), {v.data, v.stride.first, v.dtype}, v.size};
}

// No tensor (None) is a tile without data, which is not written.
inline Operand output_or_none(py::handle tensor) { return tensor.is_none() ? Operand{} : output(tensor); }

// A kernel would read or write beyond the memory of an operand that is smaller.
inline void require_size(const char* name, Two got, i64 rows, i64 cols) {
  if (got.first == rows && got.second == cols) return;
  const auto text = [](i64 n, i64 m) { return "[" + std::to_string(n) + ", " + std::to_string(m) + "]"; };
  throw std::invalid_argument("the CPU kernels take " + std::string(name) + " of size " + text(rows, cols) +
                              " here, got " + text(got.first, got.second));
}

// The operand, if it has this size or is not there.
inline Operand sized(Operand o, const char* name, i64 rows, i64 cols) {
  if (o.owner) require_size(name, o.size, rows, cols);
  return o;
}

inline void require(py::handle tensor, const char* name) {
  if (tensor.is_none()) throw py::type_error("this call of the CPU kernels needs " + std::string(name) + ", got None");
}

}  // namespace lk::python
