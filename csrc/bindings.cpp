// Every launcher by name, for Python: pointers and sizes as integers. Compiled into fourdperf/_cpu and, with
// FOURDPERF_CUDA_MODULE, into fourdperf/_cuda. `where` is the number of threads (CPU) or the stream (CUDA).
// Launchers release the GIL; a C++ std::invalid_argument arrives in Python as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "common/launch.h"
#include "fourier_embed/fourier_embed.h"
#include "gather_patches/gather_patches.h"
#include "bilinear_sample/bilinear_sample.h"
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
  m.def("resize", &resize_binding, nogil());
  m.def("resize_workspace", [](int64_t n_in, int64_t n_out, int filter, bool antialias, bool adjoint) {
    return resize_workspace(n_in, n_out, Filter(filter), antialias, adjoint);
  });
  m.def("bilinear_sample_fwd", &bilinear_sample_fwd_binding, nogil());
  m.def("bilinear_sample_bwd", &bilinear_sample_bwd_binding, nogil());
  m.def("bilinear_sample_bwd_bwd", &bilinear_sample_bwd_bwd_binding, nogil());

#ifdef FOURDPERF_FFI
  py::dict targets;
  for (const auto& [name, handler] : ffi_targets()) targets[name.c_str()] = py::capsule(reinterpret_cast<void*>(handler));
  m.attr("ffi_targets") = targets;
#endif
}
