// The experts of one layer: each has some of the rows of x, which follow each other, and a matrix in every stack.
// Python keeps the tensors of a call alive.
#pragma once

#include "operands.h"

namespace lk::python {

inline void require_stack(const char* name, const Stack& s, i64 count, i64 rows, i64 cols) {
  require_size(name, s.size, rows, cols);
  if (s.count != count)
    throw std::invalid_argument("the CPU kernels take " + std::string(name) + " of " + std::to_string(count) +
                                " experts here, got " + std::to_string(s.count));
}

// A stack whose rows are contiguous, or, without a tensor (None), one without data.
inline Stack rows_of_stack(py::handle tensor, const char* name, i64 count, i64 rows, i64 cols) {
  if (tensor.is_none()) return {};
  const Stack s = stack(tensor);
  require_stack(name, s, count, rows, cols);
  if (s.stride.second != 1)
    throw std::invalid_argument("the CPU kernels take " + std::string(name) +
                                " of experts with a last stride of 1, got " + std::to_string(s.stride.second));
  return s;
}

// The bias [N] of one expert from those of all [E, N], which may be absent. All rows of y read the same.
inline Tile one_bias(Tile bias, i64 e) { return bias ? Tile{bias.at(e, 0).data, 0, bias.dtype} : Tile{}; }

// Adds the adapter of each expert that has rows to `adapters`. A b whose columns are contiguous is read as b^T. `h` is
// that of all rows [M, R]; it, the bias [E, N] and the gradients may be absent.
inline void read_experts(py::handle a, py::handle b, double scale, double p, py::handle seed, const Groups& rows,
                         i64 count, const cpu::Shared& call, Tile bias, Tile h, py::handle da, py::handle db,
                         std::vector<cpu::Owned>& adapters) {
  const i64 R = stack(a).size.first;
  const Stack all_a = rows_of_stack(a, "lora_a", count, R, call.K), given = stack(b);
  require_stack("lora_b", given, count, call.N, R);
  const bool transposed = given.stride.first == 1 && (given.stride.second != 1 || R == 1);
  if (!transposed && given.stride.second != 1)
    throw std::invalid_argument("the CPU kernels take lora_b of experts with contiguous rows or columns");
  const Stack all_b = transposed ? given.t() : given;
  const Stack all_da = rows_of_stack(da, "da", count, R, call.K), all_db = rows_of_stack(db, "db", count, call.N, R);
  cpu::Owned o{};
  o.R = R;
  o.scale = static_cast<float>(scale);
  o.dropout = dropout(p, seed);
  o.transposed = transposed;
  for (i64 e = 0; e < count; ++e) {
    o.rows = rows.order + rows.starts[e];
    o.M = rows.count(e);
    if (!o.M) continue;
    o.mask_row = rows.starts[e];
    o.a = all_a.at(e), o.b = all_b.at(e);
    if (all_da.data) o.da = all_da.at(e);
    if (all_db.data) o.db = all_db.at(e);
    o.bias = one_bias(bias, e);
    if (h) o.h = h.at(rows.starts[e], 0);
    adapters.push_back(o);
  }
}

}  // namespace lk::python
