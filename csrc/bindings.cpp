// Every launcher by name, for Python: pointers and sizes as integers. Compiled into fourdperf/_cpu and, with
// FOURDPERF_CUDA_MODULE, into fourdperf/_cuda. `where` is the number of threads (CPU) or the stream (CUDA).
// Launchers release the GIL; a C++ std::invalid_argument arrives in Python as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/isa.h"
#include "common/launch.h"
#include "resize/resize.h"
#include "window_attention/window_attention.h"
#ifdef FOURDPERF_FFI
#include "common/ffi.h"
#endif

namespace py = pybind11;
using namespace fourdperf;

using address = uintptr_t;
using nogil = py::call_guard<py::gil_scoped_release>;

static void* pointer(address a) { return reinterpret_cast<void*>(a); }

template <class Args> void place(Args& args, address where) {
#ifdef FOURDPERF_CUDA_MODULE
  args.stream = pointer(where);
#else
  args.threads = int(where);
#endif
}

static void resize_binding(address x, address out, int x_dtype, int out_dtype, int64_t outer, int64_t n_in, int64_t n_out,
                           int64_t inner, int filter, bool antialias, bool adjoint, address workspace, address where) {
  ResizeArgs args{};
  args.x = pointer(x);
  args.out = pointer(out);
  args.x_dtype = DType(x_dtype);
  args.out_dtype = DType(out_dtype);
  args.outer = outer;
  args.n_in = n_in;
  args.n_out = n_out;
  args.inner = inner;
  args.filter = Filter(filter);
  args.antialias = antialias;
  args.adjoint = adjoint;
  args.workspace = static_cast<double*>(pointer(workspace));
  place(args, where);
  FOURDPERF_LAUNCH(resize)(args);
}

// Strides arrive as (frame, y, x, head) and (frame, token, head), sizes as (frames, height, width, heads, dim, extra),
// the window as (y, x) and then its dilation.
static WindowAttentionArgs window_attention_args(const std::array<address, 5>& tensors, int dtype, const std::array<int64_t, 6>& sizes,
                                                 const std::array<GridStrides, 3>& strides, const std::array<ExtraStrides, 2>& extra_strides,
                                                 const std::array<int64_t, 4>& window, int border, double scale, address where) {
  WindowAttentionArgs args{};
  args.q = pointer(tensors[0]);
  args.k = pointer(tensors[1]);
  args.v = pointer(tensors[2]);
  args.extra_k = pointer(tensors[3]);
  args.extra_v = pointer(tensors[4]);
  args.dtype = DType(dtype);
  args.frames = sizes[0];
  args.height = sizes[1];
  args.width = sizes[2];
  args.heads = sizes[3];
  args.dim = sizes[4];
  args.extra = sizes[5];
  args.q_strides = strides[0];
  args.k_strides = strides[1];
  args.v_strides = strides[2];
  args.extra_k_strides = extra_strides[0];
  args.extra_v_strides = extra_strides[1];
  args.window_y = window[0];
  args.window_x = window[1];
  args.dilation_y = window[2];
  args.dilation_x = window[3];
  args.border = Border(border);
  args.scale = scale;
  place(args, where);
  return args;
}

static GridStrides grid(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }
static ExtraStrides tokens(const std::array<int64_t, 3>& s) { return {s[0], s[1], s[2]}; }
using Grid = std::array<int64_t, 4>;
using Extra = std::array<int64_t, 3>;

static void window_attention_binding(const std::array<address, 5>& tensors, const std::array<address, 2>& outputs, int dtype,
                                     const std::array<int64_t, 6>& sizes, const std::array<Grid, 3>& strides,
                                     const std::array<Extra, 2>& extra_strides, const std::array<int64_t, 4>& window, int border,
                                     double scale, address where) {
  WindowAttentionArgs args = window_attention_args(tensors, dtype, sizes, {grid(strides[0]), grid(strides[1]), grid(strides[2])},
                                                   {tokens(extra_strides[0]), tokens(extra_strides[1])}, window, border, scale, where);
  args.out = pointer(outputs[0]);
  args.lse = pointer(outputs[1]);
  FOURDPERF_LAUNCH(window_attention)(args);
}

static void window_attention_backward_binding(const std::array<address, 5>& tensors, const std::array<address, 4>& saved,
                                              const std::array<address, 5>& gradients, int dtype, const std::array<int64_t, 6>& sizes,
                                              const std::array<Grid, 4>& strides, const std::array<Extra, 2>& extra_strides,
                                              const std::array<int64_t, 4>& window, int border, double scale, address where) {
  WindowAttentionArgs args = window_attention_args(tensors, dtype, sizes, {grid(strides[0]), grid(strides[1]), grid(strides[2])},
                                                   {tokens(extra_strides[0]), tokens(extra_strides[1])}, window, border, scale, where);
  args.out = pointer(saved[0]);
  args.lse = pointer(saved[1]);
  args.d_out = pointer(saved[2]);
  args.workspace = pointer(saved[3]);
  args.d_out_strides = grid(strides[3]);
  args.d_q = pointer(gradients[0]);
  args.d_k = pointer(gradients[1]);
  args.d_v = pointer(gradients[2]);
  args.d_extra_k = pointer(gradients[3]);
  args.d_extra_v = pointer(gradients[4]);
  FOURDPERF_LAUNCH(window_attention_backward)(args);
}

#ifdef FOURDPERF_FFI
std::vector<std::pair<std::string, XLA_FFI_Handler*>>& fourdperf::ffi_targets() {
  static std::vector<std::pair<std::string, XLA_FFI_Handler*>> targets;
  return targets;
}
#endif

#ifdef FOURDPERF_CUDA_MODULE
PYBIND11_MODULE(_cuda, m) {
#else
PYBIND11_MODULE(_cpu, m) {
  m.def("cpu_isa", &cpu_isa_name);
  m.def("cpu_isas", &cpu_isas);
  m.def("set_cpu_isa", &set_cpu_isa);
#endif
  m.def("resize", &resize_binding, nogil());
  m.def("resize_workspace", [](int64_t n_in, int64_t n_out, int filter, bool antialias, bool adjoint) {
    return resize_workspace(n_in, n_out, Filter(filter), antialias, adjoint);
  });

  m.def("window_attention", &window_attention_binding, nogil());
  m.def("window_attention_backward", &window_attention_backward_binding, nogil());

#ifdef FOURDPERF_FFI
  py::dict targets;
  for (const auto& [name, handler] : ffi_targets()) targets[name.c_str()] = py::capsule(reinterpret_cast<void*>(handler));
  m.attr("ffi_targets") = targets;
#endif
}
