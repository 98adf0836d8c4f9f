// Every launcher by name, for Python: pointers and sizes as integers. Compiled into fourdperf/_cpu and, with
// FOURDPERF_CUDA_MODULE, into fourdperf/_cuda. `where` is the number of threads (CPU) or the stream (CUDA).
// Launchers release the GIL; a C++ std::invalid_argument arrives in Python as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "bilinear_sample/bilinear_sample.h"
#include "common/isa.h"
#include "common/launch.h"
#include "cross_attention/cross_attention.h"
#include "fourier_embed/fourier_embed.h"
#include "gather_patches/gather_patches.h"
#include "modulated_siren/modulated_siren.h"
#include "procrustes/procrustes.h"
#include "resize/resize.h"
#include "vector_quantize/vector_quantize.h"
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

static FourierArgs fourier_args(int dtype, address x, address frequencies, int64_t rows, int64_t dims, int64_t bands,
                                address where) {
  FourierArgs args{};
  args.dtype = DType(dtype);
  args.x = pointer(x);
  args.frequencies = pointer(frequencies);
  args.rows = rows;
  args.dims = dims;
  args.bands = bands;
  place(args, where);
  return args;
}

static void fourier_embed_binding(address x, address frequencies, address out, int dtype, int64_t rows, int64_t dims,
                                  int64_t bands, address where) {
  FourierArgs args = fourier_args(dtype, x, frequencies, rows, dims, bands, where);
  args.out = pointer(out);
  FOURDPERF_LAUNCH(fourier_embed)(args);
}

#ifndef FOURDPERF_CUDA_MODULE
static void fourier_embed_ones_binding(address x, address frequencies, address out, int dtype, int64_t rows, int64_t dims,
                                       int64_t bands, address where) {
  FourierArgs args = fourier_args(dtype, x, frequencies, rows, dims, bands, where);
  args.out = pointer(out);
  fourier_embed_ones_cpu(args);
}
#endif

static void fourier_embed_backward_binding(address d_out, address x, address frequencies, address d_x, address d_frequencies,
                                           int dtype, int64_t rows, int64_t dims, int64_t bands, address workspace,
                                           address where) {
  FourierArgs args = fourier_args(dtype, x, frequencies, rows, dims, bands, where);
  args.d_out = pointer(d_out);
  args.d_x = pointer(d_x);
  args.d_frequencies = pointer(d_frequencies);
  args.workspace = static_cast<double*>(pointer(workspace));
  FOURDPERF_LAUNCH(fourier_embed_backward)(args);
}

static void fourier_linear_binding(address x, address frequencies, address weight, address bias, address out, int dtype,
                                   int64_t rows, int64_t dims, int64_t bands, int64_t features, address where) {
  FourierArgs args = fourier_args(dtype, x, frequencies, rows, dims, bands, where);
  args.weight = pointer(weight);
  args.bias = pointer(bias);
  args.out = pointer(out);
  args.features = features;
  FOURDPERF_LAUNCH(fourier_linear)(args);
}

static PatchArgs patch_args(address video, address t, address points, int dtype, int point_dtype, int64_t batch,
                            int64_t frames, int64_t height, int64_t width, int64_t channels, int64_t stride_b,
                            int64_t stride_t, int64_t stride_h, int64_t stride_w, int64_t stride_c, int64_t points_per_batch,
                            int64_t size, int mode, int coordinates, int border, address where) {
  PatchArgs args{};
  args.video = pointer(video);
  args.t = static_cast<const int64_t*>(pointer(t));
  args.points = pointer(points);
  args.dtype = dtype;
  args.point_dtype = DType(point_dtype);
  args.batch = batch;
  args.frames = frames;
  args.height = height;
  args.width = width;
  args.channels = channels;
  const int64_t strides[5] = {stride_b, stride_t, stride_h, stride_w, stride_c};
  for (int i = 0; i < 5; ++i) args.strides[i] = strides[i];
  args.points_per_batch = points_per_batch;
  args.size = size;
  args.mode = PatchMode(mode);
  args.coordinates = Coordinates(coordinates);
  args.border = PatchBorder(border);
  place(args, where);
  return args;
}

template <class... Rest>
static void gather_patches_binding(address video, address t, address points, address out, Rest... rest) {
  PatchArgs args = patch_args(video, t, points, rest...);
  args.out = pointer(out);
  FOURDPERF_LAUNCH(gather_patches)(args);
}

template <class... Rest>
static void gather_patches_backward_binding(address d_out, address video, address t, address points, address d_video,
                                            address d_points, Rest... rest) {
  PatchArgs args = patch_args(video, t, points, rest...);
  args.d_out = pointer(d_out);
  args.d_video = pointer(d_video);
  args.d_points = pointer(d_points);
  FOURDPERF_LAUNCH(gather_patches_backward)(args);
}

// dtypes, the video's sizes and strides, points, size, mode, coordinates, border, where
#define PATCH_TYPES int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, \
                    int64_t, int64_t, int, int, int, address

// strides: along the batch, of map, xy, d_out, gg_map, gg_xy; sizes: batch, height, width, channels, points
using SampleStrides = std::vector<int64_t>;
using SampleSizes = std::array<int64_t, 5>;
using SampleCodes = std::tuple<int, bool, bool, int>;  // mode, is_signed, align_corners, border

static SampleArgs sample_args(address map, address xy, const SampleStrides& strides, int dtype, const SampleSizes& sizes,
                              const SampleCodes& rule, address where) {
  SampleArgs args{};
  args.map = pointer(map);
  args.xy = pointer(xy);
  args.map_stride = strides.at(0);
  args.xy_stride = strides.at(1);
  args.dtype = DType(dtype);
  args.batch = sizes[0];
  args.height = sizes[1];
  args.width = sizes[2];
  args.channels = sizes[3];
  args.points = sizes[4];
  args.rule = {Sampling(std::get<0>(rule)), std::get<1>(rule), std::get<2>(rule), Border(std::get<3>(rule))};
  place(args, where);
  return args;
}

static void bilinear_sample_fwd_binding(address map, address xy, address out, const SampleStrides& strides, int dtype,
                                        const SampleSizes& sizes, const SampleCodes& rule, address where) {
  SampleArgs args = sample_args(map, xy, strides, dtype, sizes, rule, where);
  args.out = pointer(out);
  FOURDPERF_LAUNCH(bilinear_sample_fwd)(args);
}

static void bilinear_sample_bwd_binding(address d_out, address map, address xy, address d_map, address d_xy, address order,
                                        address starts, const SampleStrides& strides, int dtype, const SampleSizes& sizes,
                                        const SampleCodes& rule, address where) {
  SampleArgs args = sample_args(map, xy, strides, dtype, sizes, rule, where);
  args.d_out = pointer(d_out);
  args.d_out_stride = strides.at(2);
  args.d_map = pointer(d_map);
  args.d_xy = pointer(d_xy);
  args.order = static_cast<const int64_t*>(pointer(order));
  args.starts = static_cast<const int64_t*>(pointer(starts));
  FOURDPERF_LAUNCH(bilinear_sample_bwd)(args);
}

static void bilinear_sample_bwd_bwd_binding(address gg_map, address gg_xy, address d_out, address map, address xy,
                                            address d_d_out, address d_map, address d_xy, address order, address starts,
                                            const SampleStrides& strides, int dtype, const SampleSizes& sizes,
                                            const SampleCodes& rule, address where) {
  SampleArgs args = sample_args(map, xy, strides, dtype, sizes, rule, where);
  args.gg_map = pointer(gg_map);
  args.gg_xy = pointer(gg_xy);
  args.gg_map_stride = strides.at(3);
  args.gg_xy_stride = strides.at(4);
  args.d_out = pointer(d_out);
  args.d_out_stride = strides.at(2);
  args.d_d_out = pointer(d_d_out);
  args.d_map = pointer(d_map);
  args.d_xy = pointer(d_xy);
  args.order = static_cast<const int64_t*>(pointer(order));
  args.starts = static_cast<const int64_t*>(pointer(starts));
  FOURDPERF_LAUNCH(bilinear_sample_bwd_bwd)(args);
}

// tensors: pre, map, xy, d_out, v_pre, v_map, as many as there are, with the strides of all their axes but the channels
// ((batch, point), (batch, y, x); empty where the tensor is null); sizes: batch, points, channels, height, width
using SineTensors = std::vector<address>;
using SineStrides = std::vector<std::vector<int64_t>>;

static SineArgs sine_args(const SineTensors& tensors, const SineStrides& strides, int dtype, const std::array<int64_t, 5>& sizes,
                          double omega, int modulate, int mode, address where) {
  const auto data = [&](size_t i) { return i < tensors.size() ? pointer(tensors[i]) : nullptr; };
  const auto points = [&](size_t i) {
    return data(i) ? PointStrides{strides.at(i).at(0), strides.at(i).at(1)} : PointStrides{};
  };
  const auto pixels = [&](size_t i) {
    return data(i) ? PixelStrides{strides.at(i).at(0), strides.at(i).at(1), strides.at(i).at(2)} : PixelStrides{};
  };
  SineArgs args{};
  args.pre = data(0), args.map = data(1), args.xy = data(2), args.d_out = data(3), args.v_pre = data(4), args.v_map = data(5);
  args.pre_strides = points(0), args.map_strides = pixels(1), args.d_out_strides = points(3);
  args.v_pre_strides = points(4), args.v_map_strides = pixels(5);
  args.xy_stride = strides.at(2).at(0);
  args.dtype = DType(dtype);
  args.batch = sizes[0];
  args.points = sizes[1];
  args.channels = sizes[2];
  args.height = sizes[3];
  args.width = sizes[4];
  args.omega = omega;
  args.modulate = Modulate(modulate);
  args.bilinear = mode == 1;
  place(args, where);
  return args;
}

// dtype, sizes, omega, modulate, mode, where
#define SINE_TYPES int, const std::array<int64_t, 5>&, double, int, int, address

template <class... Rest>
static void modulated_sine_fwd_binding(const SineTensors& tensors, const SineStrides& strides, address out, Rest... rest) {
  SineArgs args = sine_args(tensors, strides, rest...);
  args.out = pointer(out);
  FOURDPERF_LAUNCH(modulated_sine_fwd)(args);
}

template <class... Rest>
static void modulated_sine_bwd_binding(const SineTensors& tensors, const SineStrides& strides, address d_pre, address d_map,
                                       address order, address starts, Rest... rest) {
  SineArgs args = sine_args(tensors, strides, rest...);
  args.d_pre = pointer(d_pre);
  args.d_map = pointer(d_map);
  args.order = static_cast<const int64_t*>(pointer(order));
  args.starts = static_cast<const int64_t*>(pointer(starts));
  FOURDPERF_LAUNCH(modulated_sine_bwd)(args);
}

template <class... Rest>
static void modulated_sine_bwd_bwd_binding(const SineTensors& tensors, const SineStrides& strides, address d_d_out,
                                           address d_pre, address d_map, address order, address starts, Rest... rest) {
  SineArgs args = sine_args(tensors, strides, rest...);
  args.d_d_out = pointer(d_d_out);
  args.d_pre = pointer(d_pre);
  args.d_map = pointer(d_map);
  args.order = static_cast<const int64_t*>(pointer(order));
  args.starts = static_cast<const int64_t*>(pointer(starts));
  FOURDPERF_LAUNCH(modulated_sine_bwd_bwd)(args);
}

static void procrustes_binding(address x, address out, address flip, int dtype, int64_t batch, int64_t n, bool special,
                               address where) {
  ProcrustesArgs args{};
  args.x = pointer(x);
  args.out = pointer(out);
  args.flip = pointer(flip);
  args.dtype = DType(dtype);
  args.batch = batch;
  args.n = n;
  args.special = special;
  place(args, where);
  FOURDPERF_LAUNCH(procrustes)(args);
}

static void procrustes_solve_binding(address h, address p, address flip, address y, int dtype, int64_t batch, int64_t n,
                                     address where) {
  ProcrustesArgs args{};
  args.x = pointer(h);
  args.p = pointer(p);
  args.flip = pointer(flip);
  args.out = pointer(y);
  args.dtype = DType(dtype);
  args.batch = batch;
  args.n = n;
  place(args, where);
  FOURDPERF_LAUNCH(procrustes_solve)(args);
}

static void vector_quantize_binding(address z, address codebook, address indices, int dtype, int64_t rows, int64_t codes,
                                    int64_t channels, int metric, address terms, address where) {
  QuantizeArgs args{};
  args.z = pointer(z);
  args.codebook = pointer(codebook);
  args.indices = static_cast<int64_t*>(pointer(indices));
  args.dtype = DType(dtype);
  args.rows = rows;
  args.codes = codes;
  args.channels = channels;
  args.metric = CodeMetric(metric);
  args.terms = pointer(terms);
  place(args, where);
  FOURDPERF_LAUNCH(vector_quantize)(args);
}

static void code_sums_binding(address x, address indices, address out, int dtype, int64_t rows, int64_t codes, int64_t channels,
                              address order, address starts, address where) {
  CodeSumsArgs args{};
  args.x = pointer(x);
  args.indices = static_cast<const int64_t*>(pointer(indices));
  args.out = pointer(out);
  args.dtype = DType(dtype);
  args.rows = rows;
  args.codes = codes;
  args.channels = channels;
  args.order = static_cast<const int64_t*>(pointer(order));
  args.starts = static_cast<const int64_t*>(pointer(starts));
  place(args, where);
  FOURDPERF_LAUNCH(code_sums)(args);
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
  args.border = WindowBorder(border);
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
  m.def("fourier_embed", &fourier_embed_binding, nogil());
  m.def("fourier_embed_backward", &fourier_embed_backward_binding, nogil());
  m.def("fourier_linear", &fourier_linear_binding, nogil());
  m.def("fourier_workspace", &fourier_workspace);
  m.def("gather_patches", &gather_patches_binding<PATCH_TYPES>, nogil());
  m.def("gather_patches_backward", &gather_patches_backward_binding<PATCH_TYPES>, nogil());
  m.def("modulated_sine_fwd", &modulated_sine_fwd_binding<SINE_TYPES>, nogil());
  m.def("modulated_sine_bwd", &modulated_sine_bwd_binding<SINE_TYPES>, nogil());
  m.def("modulated_sine_bwd_bwd", &modulated_sine_bwd_bwd_binding<SINE_TYPES>, nogil());
  m.def("procrustes", &procrustes_binding, nogil());
  m.def("procrustes_solve", &procrustes_solve_binding, nogil());
  m.def("resize", &resize_binding, nogil());
  m.def("resize_workspace", [](int64_t n_in, int64_t n_out, int filter, bool antialias, bool adjoint) {
    return resize_workspace(n_in, n_out, Filter(filter), antialias, adjoint);
  });
  m.def("bilinear_sample_fwd", &bilinear_sample_fwd_binding, nogil());
  m.def("bilinear_sample_bwd", &bilinear_sample_bwd_binding, nogil());
  m.def("bilinear_sample_bwd_bwd", &bilinear_sample_bwd_bwd_binding, nogil());
  m.def("vector_quantize", &vector_quantize_binding, nogil());
  m.def("code_sums", &code_sums_binding, nogil());
#ifndef FOURDPERF_CUDA_MODULE
  m.def("fourier_embed_ones", &fourier_embed_ones_binding, nogil());
  m.def("cross_attention", &cross_attention_binding, nogil());
  m.def("cross_attention_backward", &cross_attention_backward_binding, nogil());
#endif
  m.def("window_attention", &window_attention_binding, nogil());
  m.def("window_attention_backward", &window_attention_backward_binding, nogil());

#ifdef FOURDPERF_FFI
  py::dict targets;
  for (const auto& [name, handler] : ffi_targets()) targets[name.c_str()] = py::capsule(reinterpret_cast<void*>(handler));
  m.attr("ffi_targets") = targets;
#endif
}
