// XLA FFI handlers for bilinear_sample. Every tensor has one batch axis in front, or, under vmap, more; an input may have
// length 1 where the outputs do not, which is then shared. d_map and d_xy come out in the dtype that is summed in.
#include "bilinear_sample/bilinear_sample.h"

#include "common/ffi.h"

namespace fourdperf {

using Dims = FfiDims;
using Lead = FfiLead;

static ffi::Error sample_error(const char* what) { return ffi::Error::InvalidArgument(std::string("bilinear_sample: ") + what); }

// Calls `run` once for every index of all batch axes but the last, over which the launcher itself goes.
template <class Run>
static ffi::Error over_batches(SampleArgs args, const FfiLaunch& launch, Dims lead, const Lead& map, const Lead& xy,
                               const Lead& d_out, const Lead& gg_map, const Lead& gg_xy, Run&& run) {
  const int64_t size = size_of(args.dtype), acc_size = args.dtype == DType::f64 ? 8 : 4;
  const size_t axes = lead.size();
  if (axes == 0) return sample_error("tensors must have a batch axis");
  args.batch = lead[axes - 1];
  args.map_stride = map.stride[axes - 1];
  args.xy_stride = xy.stride[axes - 1];
  args.d_out_stride = d_out.stride[axes - 1];
  args.gg_map_stride = gg_map.stride[axes - 1];
  args.gg_xy_stride = gg_xy.stride[axes - 1];
  args.threads = launch.threads;
  args.stream = launch.stream;
  int64_t outer = 1;
  for (size_t i = 0; i + 1 < axes; ++i) outer *= lead[i];
  const int64_t rows = args.batch * args.points * args.channels, pixels = args.batch * args.height * args.width * args.channels;
  return ffi_guard([&] {
    for (int64_t o = 0; o < outer; ++o) {
      SampleArgs part = args;
      part.map = ffi_at(args.map, map.offset(lead, o), size);
      part.xy = ffi_at(args.xy, xy.offset(lead, o), acc_size);
      part.d_out = ffi_at(args.d_out, d_out.offset(lead, o), size);
      part.gg_map = ffi_at(args.gg_map, gg_map.offset(lead, o), size);
      part.gg_xy = ffi_at(args.gg_xy, gg_xy.offset(lead, o), acc_size);
      part.out = ffi_at(args.out, o * rows, size);
      part.d_d_out = ffi_at(args.d_d_out, o * rows, size);
      part.d_map = ffi_at(args.d_map, o * pixels, acc_size);
      part.d_xy = ffi_at(args.d_xy, o * args.batch * args.points * 2, acc_size);
      run(part);
    }
  });
}

// Dtypes, sizes and rule; height, width, channels and points from the map's and the points' own axes.
static bool describe(SampleArgs& args, const ffi::AnyBuffer& map, const ffi::AnyBuffer& xy, int64_t mode, bool is_signed,
                     bool align_corners, int64_t border) {
  const auto dims = map.dimensions(), xy_dims = xy.dimensions();
  DType xy_dtype;
  if (!ffi_dtype(map.element_type(), &args.dtype) || !ffi_dtype(xy.element_type(), &xy_dtype)) return false;
  if (xy_dtype != (args.dtype == DType::f64 ? DType::f64 : DType::f32)) return false;
  if (dims.size() < 3 || xy_dims.size() < 2 || xy_dims[xy_dims.size() - 1] != 2) return false;
  if (mode < 0 || mode > 2 || border < 0 || border > 2) return false;
  args.map = map.untyped_data();
  args.xy = xy.untyped_data();
  args.height = dims[dims.size() - 3];
  args.width = dims[dims.size() - 2];
  args.channels = dims[dims.size() - 1];
  args.points = xy_dims[xy_dims.size() - 2];
  args.rule = {Sampling(mode), is_signed, align_corners, Border(border)};
  return true;
}

static bool is_rows(const SampleArgs& args, Dims dims) {
  return dims.size() >= 2 && dims[dims.size() - 2] == args.points && dims[dims.size() - 1] == args.channels;
}
static bool is_map(const SampleArgs& args, Dims dims) {
  const size_t n = dims.size();
  return n >= 3 && dims[n - 3] == args.height && dims[n - 2] == args.width && dims[n - 1] == args.channels;
}
static bool is_points(const SampleArgs& args, Dims dims) {
  return dims.size() >= 2 && dims[dims.size() - 2] == args.points && dims[dims.size() - 1] == 2;
}

static Dims lead_of(Dims dims, size_t own) { return Dims(dims.begin(), dims.size() - own); }

static ffi::Error sample_fwd_ffi(FfiLaunch launch, ffi::AnyBuffer map, ffi::AnyBuffer xy, ffi::Result<ffi::AnyBuffer> out,
                                 int64_t mode, bool is_signed, bool align_corners, int64_t border) {
  SampleArgs args{};
  Lead map_lead, xy_lead, none;
  const Dims dims = out->dimensions();
  if (!describe(args, map, xy, mode, is_signed, align_corners, border)) return sample_error("dtypes, ranks or rule");
  if (out->element_type() != map.element_type() || !is_rows(args, dims) || !map_lead.fit(map.dimensions(), 3, dims, 2) ||
      !xy_lead.fit(xy.dimensions(), 2, dims, 2)) {
    return sample_error("map (..., H, W, C), xy (..., N, 2) and out (..., N, C) must fit");
  }
  args.out = out->untyped_data();
  return over_batches(args, launch, lead_of(dims, 2), map_lead, xy_lead, none, none, none,
                      [](const SampleArgs& a) { FOURDPERF_LAUNCH(bilinear_sample_fwd)(a); });
}

static ffi::Error sample_bwd_ffi(FfiLaunch launch, ffi::AnyBuffer d_out, ffi::AnyBuffer map, ffi::AnyBuffer xy,
                                 ffi::Result<ffi::AnyBuffer> d_map, ffi::Result<ffi::AnyBuffer> d_xy, int64_t mode,
                                 bool is_signed, bool align_corners, int64_t border) {
  SampleArgs args{};
  Lead map_lead, xy_lead, d_out_lead, same, none;
  const Dims dims = d_map->dimensions();
  if (!describe(args, map, xy, mode, is_signed, align_corners, border)) return sample_error("dtypes, ranks or rule");
  if (d_out.element_type() != map.element_type() || d_map->element_type() != xy.element_type() ||
      d_xy->element_type() != xy.element_type() || !is_map(args, dims) || !is_points(args, d_xy->dimensions()) ||
      !is_rows(args, d_out.dimensions()) || !map_lead.fit(map.dimensions(), 3, dims, 3) ||
      !xy_lead.fit(xy.dimensions(), 2, dims, 3) || !d_out_lead.fit(d_out.dimensions(), 2, dims, 3) ||
      !same.fit(d_xy->dimensions(), 2, dims, 3)) {
    return sample_error("d_out, map, xy, d_map and d_xy must fit");
  }
  args.d_out = d_out.untyped_data();
  args.d_map = d_map->untyped_data();
  args.d_xy = d_xy->untyped_data();
  ffi_clear(launch, args.d_map, d_map->size_bytes());
  ffi_clear(launch, args.d_xy, d_xy->size_bytes());
  return over_batches(args, launch, lead_of(dims, 3), map_lead, xy_lead, d_out_lead, none, none,
                      [](const SampleArgs& a) { FOURDPERF_LAUNCH(bilinear_sample_bwd)(a); });
}

static ffi::Error sample_bwd_bwd_ffi(FfiLaunch launch, ffi::AnyBuffer gg_map, ffi::AnyBuffer gg_xy, ffi::AnyBuffer d_out,
                                     ffi::AnyBuffer map, ffi::AnyBuffer xy, ffi::Result<ffi::AnyBuffer> d_d_out,
                                     ffi::Result<ffi::AnyBuffer> d_map, ffi::Result<ffi::AnyBuffer> d_xy, bool is_signed,
                                     bool align_corners, int64_t border) {
  SampleArgs args{};
  Lead map_lead, xy_lead, d_out_lead, gg_map_lead, gg_xy_lead, same;
  const Dims dims = d_map->dimensions();
  if (!describe(args, map, xy, int64_t(Sampling::bilinear), is_signed, align_corners, border)) {
    return sample_error("dtypes, ranks or rule");
  }
  if (d_out.element_type() != map.element_type() || gg_map.element_type() != map.element_type() ||
      d_d_out->element_type() != map.element_type() || d_map->element_type() != xy.element_type() ||
      gg_xy.element_type() != xy.element_type() || d_xy->element_type() != xy.element_type() || !is_map(args, dims) ||
      !is_map(args, gg_map.dimensions()) || !is_points(args, gg_xy.dimensions()) || !is_points(args, d_xy->dimensions()) ||
      !is_rows(args, d_out.dimensions()) || !is_rows(args, d_d_out->dimensions()) ||
      !map_lead.fit(map.dimensions(), 3, dims, 3) || !xy_lead.fit(xy.dimensions(), 2, dims, 3) ||
      !d_out_lead.fit(d_out.dimensions(), 2, dims, 3) || !gg_map_lead.fit(gg_map.dimensions(), 3, dims, 3) ||
      !gg_xy_lead.fit(gg_xy.dimensions(), 2, dims, 3) || !same.fit(d_xy->dimensions(), 2, dims, 3) ||
      !same.fit(d_d_out->dimensions(), 2, dims, 3)) {
    return sample_error("gg_map, gg_xy, d_out, map, xy, d_d_out, d_map and d_xy must fit");
  }
  args.gg_map = gg_map.untyped_data();
  args.gg_xy = gg_xy.untyped_data();
  args.d_out = d_out.untyped_data();
  args.d_d_out = d_d_out->untyped_data();
  args.d_map = d_map->untyped_data();
  args.d_xy = d_xy->untyped_data();
  ffi_clear(launch, args.d_map, d_map->size_bytes());
  return over_batches(args, launch, lead_of(dims, 3), map_lead, xy_lead, d_out_lead, gg_map_lead, gg_xy_lead,
                      [](const SampleArgs& a) { FOURDPERF_LAUNCH(bilinear_sample_bwd_bwd)(a); });
}

}  // namespace fourdperf

#define FOURDPERF_SAMPLE_RULE .Attr<bool>("is_signed").Attr<bool>("align_corners").Attr<int64_t>("border")

FOURDPERF_FFI_TARGET(bilinear_sample_fwd, sample_fwd_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                         .Attr<int64_t>("mode") FOURDPERF_SAMPLE_RULE)
FOURDPERF_FFI_TARGET(bilinear_sample_bwd, sample_bwd_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("mode") FOURDPERF_SAMPLE_RULE)
FOURDPERF_FFI_TARGET(bilinear_sample_bwd_bwd, sample_bwd_bwd_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                         FOURDPERF_SAMPLE_RULE)
