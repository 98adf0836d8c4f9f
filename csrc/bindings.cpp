// Every launcher by name, for Python: pointers and sizes as integers. Compiled into fourdperf/_cpu and, with
// FOURDPERF_CUDA_MODULE, into fourdperf/_cuda. `where` is the number of threads (CPU) or the stream (CUDA).
// Launchers release the GIL; a C++ std::invalid_argument arrives in Python as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/isa.h"
#include "common/launch.h"
#include "cross_attention/cross_attention.h"
#include "resize/resize.h"
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

#ifndef FOURDPERF_CUDA_MODULE
using Axes = std::array<int64_t, 4>;

static Strided operand(address data, const Axes& stride) { return {pointer(data), stride[0], stride[1], stride[2], stride[3]}; }

// sizes: B, Q, K, H, D, E
static CrossAttentionArgs cross_attention_args(address q, const Axes& q_stride, address k, const Axes& k_stride, address v,
                                               const Axes& v_stride, address padding, const std::array<int64_t, 6>& sizes,
                                               double scale, int dtype, address stats, address where) {
  CrossAttentionArgs args{};
  args.q = operand(q, q_stride);
  args.k = operand(k, k_stride);
  args.v = operand(v, v_stride);
  args.padding = static_cast<const uint8_t*>(pointer(padding));
  args.batch = sizes[0];
  args.queries = sizes[1];
  args.keys = sizes[2];
  args.heads = sizes[3];
  args.size = sizes[4];
  args.value_size = sizes[5];
  args.scale = scale;
  args.dtype = DType(dtype);
  args.stats = pointer(stats);
  place(args, where);
  return args;
}

static void cross_attention_binding(address q, const Axes& q_stride, address k, const Axes& k_stride, address v,
                                    const Axes& v_stride, address padding, const std::array<int64_t, 6>& sizes, double scale,
                                    int dtype, address out, address stats, address where) {
  CrossAttentionArgs args = cross_attention_args(q, q_stride, k, k_stride, v, v_stride, padding, sizes, scale, dtype, stats, where);
  args.out = pointer(out);
  cross_attention_cpu(args);
}

static void cross_attention_backward_binding(address q, const Axes& q_stride, address k, const Axes& k_stride, address v,
                                             const Axes& v_stride, address padding, const std::array<int64_t, 6>& sizes,
                                             double scale, int dtype, address stats, address d_out,
                                             const Axes& d_out_stride, address d_q, address d_k, address d_v, address where) {
  CrossAttentionArgs args =
      cross_attention_args(q, q_stride, k, k_stride, v, v_stride, padding, sizes, scale, dtype, stats, where);
  args.d_out = operand(d_out, d_out_stride);
  args.d_q = pointer(d_q);
  args.d_k = pointer(d_k);
  args.d_v = pointer(d_v);
  cross_attention_backward_cpu(args);
}
#endif

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
  m.def("cross_attention", &cross_attention_binding, nogil());
  m.def("cross_attention_backward", &cross_attention_backward_binding, nogil());
#endif
  m.def("resize", &resize_binding, nogil());
  m.def("resize_workspace", [](int64_t n_in, int64_t n_out, int filter, bool antialias, bool adjoint) {
    return resize_workspace(n_in, n_out, Filter(filter), antialias, adjoint);
  });

#ifdef FOURDPERF_FFI
  py::dict targets;
  for (const auto& [name, handler] : ffi_targets()) targets[name.c_str()] = py::capsule(reinterpret_cast<void*>(handler));
  m.attr("ffi_targets") = targets;
#endif
}
