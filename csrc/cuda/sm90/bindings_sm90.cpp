#include "bindings_sm90.h"

#include "../check.h"
#include "api.h"

namespace py = pybind11;

namespace lk::sm90 {
namespace {

using cuda::check;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The operands that both passes take, by name. Pointers are integers, 0 for null.
template <class ARGS>
ARGS operands(int device, int M, int N, int K, int R, bool bf16, uintptr_t x, uintptr_t w, uintptr_t a, uintptr_t b,
              int64_t ldx, int64_t ldw, int64_t lda, int64_t ldb, float scale, uintptr_t seed, uint32_t threshold,
              float rescale, uintptr_t stream, int columns, int cluster) {
  ARGS args{};
  args.device = device;
  args.M = M;
  args.N = N;
  args.K = K;
  args.R = R;
  args.bf16 = bf16;
  args.x = pointer<void>(x);
  args.w = pointer<void>(w);
  args.a = pointer<void>(a);
  args.b = pointer<void>(b);
  args.ldx = ldx;
  args.ldw = ldw;
  args.lda = lda;
  args.ldb = ldb;
  args.scale = scale;
  args.seed = pointer<const int64_t>(seed);
  args.threshold = threshold;
  args.rescale = rescale;
  args.stream = pointer<void>(stream);
  args.columns = columns;
  args.cluster = cluster;
  return args;
}

template <class ARGS>
py::class_<ARGS> bind_args(py::module_& m, const char* name, int (*workspace)(const ARGS*, Workspace*),
                           int (*launch)(const ARGS*)) {
  return py::class_<ARGS>(m, name)
      .def(py::init(&operands<ARGS>), py::kw_only(), py::arg("device"), py::arg("M"), py::arg("N"), py::arg("K"),
           py::arg("R"), py::arg("bf16"), py::arg("x"), py::arg("w"), py::arg("a"), py::arg("b"), py::arg("ldx"),
           py::arg("ldw"), py::arg("lda"), py::arg("ldb"), py::arg("scale"), py::arg("seed"), py::arg("threshold"),
           py::arg("rescale"), py::arg("stream"), py::arg("columns"), py::arg("cluster"))
      .def(
          "workspace",
          [workspace](const ARGS& args) {
            Workspace needed{};
            check(workspace(&args, &needed), "cannot plan the sm_90a launch");
            return py::make_tuple(needed.counters, needed.scratch);
          },
          "(int32 counters, bytes of scratch) that launch() needs.")
      .def(
          "launch",
          [launch](ARGS& args, uintptr_t counters, uintptr_t scratch) {
            args.counters = pointer<int>(counters);
            args.scratch = pointer<void>(scratch);
            int status;
            {
              py::gil_scoped_release unlocked;
              status = launch(&args);
            }
            check(status, "the sm_90a launch failed");
          },
          py::arg("counters"), py::arg("scratch"),
          "Launches. counters: zero before the first launch with them, left zero by every "
          "launch.");
}

}  // namespace

void bind_sm90(py::module_& m) {
  bind_args<ForwardArgs>(m, "Sm90Forward", lk_sm90_forward_workspace, lk_sm90_forward)
      .def(
          "results",
          [](ForwardArgs& args, uintptr_t bias, uintptr_t y, uintptr_t h) {
            args.bias = pointer<void>(bias);
            args.y = pointer<void>(y);
            args.h = pointer<void>(h);
          },
          py::arg("bias"), py::arg("y"), py::arg("h"));
  bind_args<BackwardArgs>(m, "Sm90Backward", lk_sm90_backward_workspace, lk_sm90_backward)
      .def(
          "results",
          [](BackwardArgs& args, uintptr_t dy, int64_t lddy, uintptr_t h, uintptr_t dx, uintptr_t da, uintptr_t db) {
            args.dy = pointer<void>(dy);
            args.lddy = lddy;
            args.h = pointer<void>(h);
            args.dx = pointer<void>(dx);
            args.da = pointer<void>(da);
            args.db = pointer<void>(db);
          },
          py::arg("dy"), py::arg("lddy"), py::arg("h"), py::arg("dx"), py::arg("da"), py::arg("db"));
}

}  // namespace lk::sm90
