// lora_kernels._C: the CPU kernels for Python. The functions that run kernels read their operands (operands.h), refuse
// sizes that do not fit together, release the GIL, and run. The caller has checked that the dtypes fit together.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "cpu/isa.h"
#include "cpu/lora.h"
#include "cpu/quant.h"
#include "experts.h"
#include "operands.h"
#include "philox.h"

namespace py = pybind11;
using lk::cpu::i64;
using lk::cpu::Tile;
using namespace lk::python;

namespace {

// The product of many rows with a w [N, K], dense of any strides or quantised: x w^T, or x w where `transposed`.
std::unique_ptr<lk::cpu::ManyRows> many_rows(py::handle w, i64 M, i64 N, i64 K, bool transposed, Tile x, Tile y,
                                             bool add, Tile bias) {
  if (!is_tensor(w)) return lk::cpu::many_rows(M, quantized(w, N, K), transposed, x, y, add, bias);
  const View v = view(w);
  require_size("w", v.size, N, K);
  if (v.dtype != x.dtype) throw py::type_error("a launch multiplies many rows by a w of their own dtype only");
  const Two stride = transposed ? Two{v.stride.second, v.stride.first} : v.stride;
  return lk::cpu::many_rows(M, transposed ? K : N, transposed ? N : K, x, {v.data, stride.first, v.dtype},
                            stride.second, y, add, bias);
}

void forward(int threads, py::handle x, py::handle bases, py::handle adapters, py::handle ys, py::handle hs,
             py::handle products) {
  const Items base_list(bases), adapter_list(adapters), y_list(ys), h_list(hs), product_list(products);
  require_one_each(adapter_list, {&base_list, &y_list, &h_list, &product_list});
  require(x, "x");
  const Operand rows = input(x);
  const i64 M = rows.size.first, K = rows.size.second;
  Owners owners;
  std::vector<lk::cpu::Branch> branches;
  for (size_t i = 0; i < adapter_list.size(); ++i) {
    lk::cpu::Branch p = branch(adapter_list[i], K, owners);
    require(y_list[i], "y");
    p.y = owners.keep(sized(output(y_list[i]), "y", M, p.N));
    p.h = owners.keep(sized(output_or_none(h_list[i]), "h", M, p.R));
    p.bias = owners.keep(sized(input(get(base_list[i], names.bias)), "bias", p.N, 1));
    if (product_list[i].ptr() == Py_True) {
      const py::object w = get(base_list[i], names.w);
      require(w, "w");
      const bool few = M <= lk::cpu::kFewRows, dense = is_tensor(w);
      if (!few)
        p.many = many_rows(w, M, p.N, K, false, rows.tile, p.y, false, p.y.dtype == DType::f32 ? Tile{} : p.bias);
      else if (dense)
        p.base = lk::cpu::few_rows(M, p.N, K, rows.tile, owners.keep(sized(input(w), "w", p.N, K)), p.y);
      else
        p.base = lk::cpu::few_rows(M, quantized(w, p.N, K), rows.tile, p.y);
    }
    branches.push_back(std::move(p));
  }
  py::gil_scoped_release unlocked;
  lk::cpu::forward(threads, M, K, rows.tile, branches);
}

void backward(int threads, py::handle dys, py::handle x, py::handle bases, py::handle adapters, py::handle hs,
              py::handle dx, py::handle das, py::handle dbs, py::handle products) {
  const Items dy_list(dys), base_list(bases), adapter_list(adapters), h_list(hs), da_list(das), db_list(dbs),
      product_list(products);
  require_one_each(adapter_list, {&dy_list, &base_list, &h_list, &da_list, &db_list, &product_list});
  if (!adapter_list.size()) throw std::invalid_argument("a backward needs one adapter at least, got none");
  const py::object first_a = get(adapter_list[0], names.a);
  require(first_a, "a");
  const i64 M = view(dy_list[0]).size.first, K = view(first_a).size.second;
  Owners owners;
  const Tile out = owners.keep(sized(output_or_none(dx), "dx", M, K));
  Tile rows{};
  bool add = false;  // whether dx holds the product of another base already
  for (size_t i = 0; i < product_list.size(); ++i) add |= product_list[i].ptr() != Py_True;
  std::vector<lk::cpu::Branch> branches;
  for (size_t i = 0; i < adapter_list.size(); ++i) {
    lk::cpu::Branch p = branch(adapter_list[i], K, owners);
    p.dy = owners.keep(sized(input(dy_list[i]), "dy", M, p.N));
    p.da = owners.keep(sized(output_or_none(da_list[i]), "da", p.R, K));
    p.db = owners.keep(sized(output_or_none(db_list[i]), "db", p.N, p.R));
    if (p.da && !rows) {
      require(x, "x");
      rows = owners.keep(sized(input(x), "x", M, K));
    }
    if (p.db) {
      require(h_list[i], "h");
      p.h = owners.keep(sized(input(h_list[i]), "h", M, p.R));
    }
    if (product_list[i].ptr() == Py_True) {
      const py::object w = get(base_list[i], names.w);
      require(dx, "dx");
      require(w, "w");
      if (M <= lk::cpu::kFewRows)
        p.base = lk::cpu::few_rows_back(M, p.N, K, p.dy, owners.keep(sized(input(w), "w", p.N, K)), out, add);
      else
        p.many = many_rows(w, M, p.N, K, true, p.dy, out, add, {});
      add = true;
    }
    branches.push_back(std::move(p));
  }
  py::gil_scoped_release unlocked;
  lk::cpu::backward(threads, M, K, rows, out, branches);
}

// The adapters of a call that have rows, and their numbers.
struct Members {
  std::vector<lk::cpu::Owned> adapters;
  std::vector<size_t> numbers;
  Owners owners;
};

// With a bias, which the launch adds to y, rows without an adapter are members too, whose rank is 0 and which have no
// number.
void read_members(const Items& given, const Groups& rows, const lk::cpu::Shared& call, bool bias, Members& members) {
  const auto rest = [&](i64 from, i64 to) {
    lk::cpu::Owned o{};
    o.rows = rows.order + from;
    o.M = to - from;
    o.transposed = true;
    if (bias && o.M) members.adapters.push_back(o);
  };
  for (size_t i = 0; i < given.size(); ++i) {
    if (given[i].is_none()) {
      rest(rows.starts[i], rows.starts[i + 1]);
    } else if (rows.count(i)) {
      members.adapters.push_back(owned(given[i], rows, i, call.N, call.K, members.owners));
      members.numbers.push_back(i);
    }
  }
  rest(rows.starts[given.size()], rows.M);
}

// The h [M, R] of an adapter within that of all adapters, from element `first` on.
Tile part_of(const Operand& all, i64 first, const lk::cpu::Owned& o) {
  if (first + o.M * o.R > all.size.first)
    throw std::invalid_argument("the CPU kernels take an h of at least " + std::to_string(first + o.M * o.R) +
                                " elements here, got " + std::to_string(all.size.first));
  return {static_cast<char*>(all.tile.data) + first * size_of(all.tile.dtype), o.R, all.tile.dtype};
}

void forward_multi(int threads, py::handle x, py::handle base, py::handle adapters, py::handle order, py::handle starts,
                   py::handle y, py::handle h, bool product) {
  const Items given(adapters);
  const Operand in = input(x), out = output(y);
  lk::cpu::Shared call{};
  call.M = in.size.first, call.K = in.size.second, call.N = out.size.second;
  require_size("y", out.size, call.M, call.N);
  call.x = in.tile, call.y = out.tile;
  const Groups rows = groups(order, starts, call.M, given.size());
  Members members;
  const py::object w = get(base, names.w);
  call.bias = members.owners.keep(sized(input(get(base, names.bias)), "bias", call.N, 1));
  if (product && is_tensor(w))
    call.base = lk::cpu::few_rows(call.M, call.N, call.K, call.x,
                                  members.owners.keep(sized(input(w), "w", call.N, call.K)), call.y);
  else if (product)
    call.base = lk::cpu::few_rows(call.M, quantized(w, call.N, call.K), call.x, call.y);
  read_members(given, rows, call, call.bias && !product, members);
  if (!h.is_none()) {
    const Operand all = output(h);
    i64 first = 0;
    for (lk::cpu::Owned& o : members.adapters) {
      if (o.R) o.h = part_of(all, first, o);
      first += o.M * o.R;
    }
  }
  py::gil_scoped_release unlocked;
  lk::cpu::forward_multi(threads, call, members.adapters);
}

void backward_multi(int threads, py::handle dy, py::handle x, py::handle base, py::handle adapters, py::handle order,
                    py::handle starts, py::handle h, py::handle dx, py::handle das, py::handle dbs, bool product) {
  const Items given(adapters), da_list(das), db_list(dbs);
  require_one_each(given, {&da_list, &db_list});
  lk::cpu::Shared call{};
  Members members;
  const Two size = two(get(get(base, names.w), tensor_names.shape));
  call.M = view(dy).size.first, call.N = size.first, call.K = size.second;
  call.dy = members.owners.keep(sized(input(dy), "dy", call.M, call.N));
  call.x = members.owners.keep(sized(input(x), "x", call.M, call.K));
  call.dx = members.owners.keep(sized(output_or_none(dx), "dx", call.M, call.K));
  const Groups rows = groups(order, starts, call.M, given.size());
  if (product) {
    require(dx, "dx");
    const Tile w = members.owners.keep(sized(input(get(base, names.w)), "w", call.N, call.K));
    call.base = lk::cpu::few_rows_back(call.M, call.N, call.K, call.dy, w, call.dx, false);
  }
  read_members(given, rows, call, false, members);
  const Operand all = input(h);
  i64 first = 0;
  for (size_t j = 0; j < members.adapters.size(); ++j) {
    lk::cpu::Owned& o = members.adapters[j];
    const size_t i = members.numbers[j];
    o.da = members.owners.keep(sized(output_or_none(da_list[i]), "da", o.R, call.K));
    o.db = members.owners.keep(sized(output_or_none(db_list[i]), "db", call.N, o.R));
    if (o.da) require(x, "x");
    if (o.db) {
      require(h, "h");
      o.h = part_of(all, first, o);
    }
    first += o.M * o.R;
  }
  py::gil_scoped_release unlocked;
  lk::cpu::backward_multi(threads, call, members.adapters);
}

void forward_experts(int threads, py::handle x, py::handle a, py::handle b, double scale, double p, py::handle seed,
                     py::handle order, py::handle starts, py::handle y, py::handle h, py::handle bias) {
  const Operand in = input(x), out = output(y);
  lk::cpu::Shared call{};
  call.M = in.size.first, call.K = in.size.second, call.N = out.size.second;
  require_size("y", out.size, call.M, call.N);
  call.x = in.tile, call.y = out.tile;
  const Stack all_a = stack(a);
  const Groups rows = groups(order, starts, call.M, all_a.count);
  const Operand own_h = sized(output_or_none(h), "h", call.M, all_a.size.first);
  const Operand added = sized(input(bias), "bias", all_a.count, call.N);
  if (added.tile && added.tile.dtype != DType::f32) throw py::type_error("a bias of experts is added in float32 here");
  std::vector<lk::cpu::Owned> adapters;
  read_experts(a, b, scale, p, seed, rows, all_a.count, call, added.tile, own_h.tile, py::none(), py::none(), adapters);
  py::gil_scoped_release unlocked;
  lk::cpu::forward_multi(threads, call, adapters);
}

void backward_experts(int threads, py::handle dy, py::handle x, py::handle a, py::handle b, double scale, double p,
                      py::handle seed, py::handle order, py::handle starts, py::handle h, py::handle dx, py::handle da,
                      py::handle db) {
  const Stack all_a = stack(a);
  const Operand rows_y = input(dy);
  lk::cpu::Shared call{};
  call.M = rows_y.size.first, call.N = rows_y.size.second, call.K = all_a.size.second;
  const Operand rows_x = sized(input(x), "x", call.M, call.K), out = sized(output_or_none(dx), "dx", call.M, call.K);
  const Operand own_h = sized(input(h), "h", call.M, all_a.size.first);
  if (!da.is_none()) require(x, "x");
  if (!db.is_none()) require(h, "h");
  call.dy = rows_y.tile, call.x = rows_x.tile, call.dx = out.tile;
  const Groups rows = groups(order, starts, call.M, all_a.count);
  std::vector<lk::cpu::Owned> adapters;
  read_experts(a, b, scale, p, seed, rows, all_a.count, call, {}, own_h.tile, da, db, adapters);
  py::gil_scoped_release unlocked;
  lk::cpu::backward_multi(threads, call, adapters);
}

void gemm_experts(int threads, py::handle x, py::handle w, py::handle order, py::handle starts, py::handle y,
                  py::handle bias) {
  const Stack all = stack(w);
  const i64 M = view(x).size.first, N = all.size.first, K = all.size.second;
  const Operand in = sized(input(x), "x", M, K), out = sized(output(y), "y", M, N);
  const Operand added = sized(input(bias), "bias", all.count, N);
  const Groups rows = groups(order, starts, M, all.count);
  py::gil_scoped_release unlocked;
  std::vector<lk::cpu::Product> products;
  for (i64 e = 0; e < all.count; ++e) {
    const i64 m = rows.starts[e];
    if (rows.count(e))
      products.push_back({rows.count(e), in.tile.at(m, 0), all.at(e), out.tile.at(m, 0), one_bias(added.tile, e)});
  }
  lk::cpu::gemm_each(threads, N, K, all.stride.second, products);
}

void gemm(int threads, py::handle x, py::handle w, py::handle y, bool add, py::handle bias) {
  const View weight = view(w);
  const i64 M = view(x).size.first, N = weight.size.first, K = weight.size.second;
  const Operand rows = sized(input(x), "x", M, K);
  const Operand out = sized(output(y), "y", M, N), added = sized(input(bias), "bias", N, 1);
  py::gil_scoped_release unlocked;
  lk::cpu::gemm(threads, M, N, K, rows.tile, {weight.data, weight.stride.first, weight.dtype}, weight.stride.second,
                out.tile, add, added.tile);
}

void quantized_gemm(int threads, py::handle x, py::handle w, bool transposed, py::handle y, py::handle bias) {
  const lk::cpu::Quantized weight = quantized(w);
  const i64 M = view(x).size.first;
  const Operand rows = sized(input(x), "x", M, transposed ? weight.N : weight.K);
  const i64 columns = transposed ? weight.K : weight.N;
  const Operand out = sized(output(y), "y", M, columns), added = sized(input(bias), "bias", columns, 1);
  py::gil_scoped_release unlocked;
  lk::cpu::quantized_gemm(threads, M, weight, transposed, rows.tile, out.tile, added.tile);
}

void dequantize(int threads, py::handle w, i64 n0, i64 k0, py::handle out) {
  const lk::cpu::Quantized weight = quantized(w);
  const Operand to = output(out);
  py::gil_scoped_release unlocked;
  lk::cpu::dequantize(threads, weight, n0, to.size.first, k0, to.size.second, to.tile);
}

void keep_mask(int threads, double p, py::handle seed, py::handle out) {
  const lk::cpu::Dropout drop = dropout(p, seed);
  const Operand to = output(out);
  py::gil_scoped_release unlocked;
  lk::cpu::keep_mask(threads, drop, to.size.first, to.size.second, to.tile);
}

void row_norm(int threads, py::handle w, py::handle a, py::handle b, double scale, py::handle n) {
  require(w, "w");
  require(a, "a");
  require(b, "b");
  const bool dense = is_tensor(w);
  const lk::cpu::Quantized codes = dense ? lk::cpu::Quantized{} : quantized(w);
  const i64 N = dense ? view(w).size.first : codes.N, K = dense ? view(w).size.second : codes.K;
  const i64 R = view(a).size.first;
  const Operand weight = dense ? input(w) : Operand{}, own_a = sized(input(a), "a", R, K);
  const Operand own_b = sized(input(b), "b", N, R), out = sized(output(n), "n", N, 1);
  if (out.tile.dtype != DType::f32) throw py::type_error("row_norm writes norms in float32");
  float* const norms = static_cast<float*>(out.tile.data);
  const float s = static_cast<float>(scale);
  py::gil_scoped_release unlocked;
  if (dense)
    lk::cpu::row_norm(threads, N, K, R, weight.tile, own_a.tile, own_b.tile, s, norms);
  else
    lk::cpu::row_norm(threads, codes, R, own_a.tile, own_b.tile, s, norms);
}

void column_sums(int threads, py::handle w, py::handle a_t, py::handle square, py::handle low, py::handle gram) {
  require(w, "w");
  require(a_t, "a_t");
  const Operand weight = input(w);
  const View a = view(a_t);
  const i64 V = weight.size.first, D = weight.size.second, R = a.size.second;
  require_size("lora_a_t", a.size, V, R);
  const bool turned = a.stride.first == 1 && a.stride.second != 1;
  const Operand own_a =
      turned ? Operand{py::reinterpret_borrow<py::object>(a_t), {a.data, a.stride.second, a.dtype}} : input(a_t);
  const Operand of_w = sized(output(square), "square", D, 1), of_both = sized(output(low), "low", R, D);
  const Operand of_a = sized(output(gram), "gram", R, R);
  for (const Operand* out : {&of_w, &of_both, &of_a})
    if (out->tile.dtype != DType::f32) throw py::type_error("column_sums writes sums in float32");
  float* const squares = static_cast<float*>(of_w.tile.data);
  py::gil_scoped_release unlocked;
  lk::cpu::column_sums(threads, V, D, R, weight.tile, own_a.tile, turned, squares, of_both.tile, of_a.tile);
}

void set_levels(const std::string& format, const std::array<float, 16>& values) {
  const size_t index = position(py::str(format), names.formats);
  if (index >= levels.size()) throw std::invalid_argument("only formats of nf4 and fp4 have levels, not " + format);
  levels[index] = values;
}

py::tuple dropout_rule(double p) {
  const lk::cpu::Dropout d{lk::cpu::dropout_threshold(p), 0};
  return py::make_tuple(d.threshold, d.rescale());
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

py::dict cpu_paths() {
  py::dict all;
  for (const lk::cpu::Path& p : lk::cpu::paths()) all[p.name] = py::make_tuple(p.table != nullptr, p.processor);
  return all;
}

void set_cpu_isa(const std::string& name) {
  if (lk::cpu::choose_isa(name)) return;
  std::string have;
  for (const auto& isa : lk::cpu::available_isas()) have += (have.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("this machine cannot run cpu isa '" + name + "'; it can run: " + have);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  find_names();
  m.doc() = "CPU kernels of a LoRA linear layer";
  m.attr("FEW_ROWS") = lk::cpu::kFewRows;
  m.attr("dlpack") = tensor_names.exchange != nullptr;
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("cpu_isa", [] { return std::string(lk::cpu::kernels().name); }, "Return the instruction set in use.");
  m.def("cpu_isas", &lk::cpu::available_isas, "Return the instruction sets that this machine can run, best first.");
  m.def("cpu_paths", &cpu_paths,
        "Return, for each instruction set of this architecture, best first: whether it was compiled, and whether the "
        "processor has it.");
  m.def("set_cpu_isa", &set_cpu_isa, "Use another of cpu_isas(). ValueError if this machine cannot run it.");
  m.def("forward", &forward,
        "Compute, for each base and adapter: h = c keep(x) a^T, then y += s h b^T + bias. Where products[i] is True, "
        "y[i] is first written as x w^T + bias, rounded once. An h that is None is not written.");
  m.def(
      "backward", &backward,
      "Compute, for each base and adapter: g = s dy b; db = s dy^T h; dx += c keep(g a); da = c g^T keep(x). Where "
      "products[i] is True, dy[i] w is added to dx first; where all are True, dx need not hold anything before. A dx, "
      "da or db that is None is not written.");
  m.def("forward_multi", &forward_multi,
        "Compute, for the rows of each adapter: h = c keep(x) a^T, then y += s h b^T. A bias in fp32 is added to all "
        "rows of y. Where product is True, y is first written as x w^T + bias. An h that is None is not written; else "
        "it holds the h of one adapter after the other.");
  m.def(
      "backward_multi", &backward_multi,
      "Compute, for the rows of each adapter: g = s dy b; db = s dy^T h; dx += c keep(g a); da = c g^T keep(x). Where "
      "product is True, dx is first written as dy w. A dx, da or db that is None is not written.");
  m.def(
      "forward_experts", &forward_experts,
      "Compute, for the rows of each expert: h = c keep(x) a^T, then y += s h b^T + bias, a bias in fp32. The mask of "
      "a row is that of its number in x. An h or a bias that is None is not there.");
  m.def("backward_experts", &backward_experts,
        "Compute, for the rows of each expert: g = s dy b; db = s dy^T h; dx += c keep(g a); da = c g^T keep(x). A dx, "
        "da or db that is None is not written, nor is the part of da and db of an expert without rows.");
  m.def("gemm_experts", &gemm_experts,
        "Write y = x w^T for the rows of each expert, or y = x w^T + bias in 16 bits. x has a dtype of has_gemm.");
  m.def("gemm", &gemm,
        "Write y = x w^T, or add it to y, or write y = x w^T + bias in 16 bits. x has a dtype of has_gemm, or, without "
        "add, at most FEW_ROWS rows beside a w whose rows are contiguous.");
  m.def("is_small", &lk::cpu::is_small,
        "Return whether forward and backward compute the base products of x [M, K] and w [N, K] faster than any GEMM.");
  m.def(
      "has_gemm", [](py::handle of) { return lk::cpu::gemm_of(dtype(of)); },
      "Return whether gemm and quantized_gemm take any number of rows of this dtype.");
  m.def("quantized_gemm", &quantized_gemm,
        "Write y = x w^T, or, transposed, y = x w; in 16 bits with a bias. x has a dtype of has_gemm, or, not "
        "transposed, "
        "at most FEW_ROWS rows.");
  m.def("dequantize", &dequantize,
        "Write to out, dequantised, as many rows and columns of w as out has, from row n0 and column k0 on.");
  m.def("set_levels", &set_levels, "Set the 16 numbers that the codes of a format of nf4 or fp4 stand for.");
  m.def("keep_mask", &keep_mask, "Write 1 to out where dropout keeps an element, else 0.");
  m.def("column_sums", &column_sums, "Write the sums of the norms of w + s (b a)^T by columns, in float32.");
  m.def("row_norm", &row_norm, "Write n = ||w + scale b a|| by rows, in float32.");
  m.def("dropout_rule", &dropout_rule, "Return (threshold, rescale) for the probability p of dropout.");
  m.def("philox", &philox, "Return Philox4x32-10 of one counter and key.");
  m.def("keep_bits", &keep_bits,
        "Return the dropout bits of rows m0 to m0 + rows - 1, eight columns to a byte, each row padded to 8 bytes.");
}
