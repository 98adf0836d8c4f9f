// XLA FFI handlers for gather_patches and its gradients: video (B, T, H, W, C), points (B, N, 2), t (B, N) int32.
#include "gather_patches/gather_patches.h"

#include "common/ffi.h"

namespace fourdperf {

static bool patch_sizes(FfiLaunch& launch, ffi::AnyBuffer video, ffi::AnyBuffer points, ffi::AnyBuffer t, int64_t size,
                        int64_t mode, int64_t coordinates, int64_t border, PatchArgs* args) {
  const auto v = video.dimensions(), p = points.dimensions(), n = t.dimensions();
  DType dtype = DType::f32;
  if (v.size() != 5 || p.size() != 3 || n.size() != 2 || p[0] != v[0] || p[2] != 2 || n[0] != p[0] || n[1] != p[1]) return false;
  if (video.element_type() != ffi::U8 && !ffi_dtype(video.element_type(), &dtype)) return false;
  if (!ffi_dtype(points.element_type(), &args->point_dtype) || t.element_type() != ffi::S32) return false;
  if (args->point_dtype != DType::f32 && args->point_dtype != DType::f64) return false;
  if (size < 1 || mode < 0 || mode > 2 || coordinates < 0 || coordinates > 3 || border < 0 || border > 1) return false;
  args->dtype = video.element_type() == ffi::U8 ? kUint8 : int(dtype);
  args->video = video.untyped_data();
  args->points = points.untyped_data();
  args->t32 = static_cast<const int32_t*>(t.untyped_data());
  args->batch = v[0], args->frames = v[1], args->height = v[2], args->width = v[3], args->channels = v[4];
  int64_t stride = 1;
  for (int i = 4; i >= 0; stride *= v[i], --i) args->strides[i] = stride;
  args->points_per_batch = p[1];
  args->size = size;
  args->mode = PatchMode(mode);
  args->coordinates = Coordinates(coordinates);
  args->border = PatchBorder(border);
  args->threads = launch.threads;
  args->stream = launch.stream;
  return stride == 0 || p[1] == 0 || border == 1 || (v[2] >= size && v[3] >= size);
}

static bool is_patches(ffi::AnyBuffer out, const PatchArgs& args, ffi::DataType video) {
  const int64_t want[5] = {args.batch, args.points_per_batch, args.size, args.size, args.channels};
  const auto dims = out.dimensions();
  if (dims.size() != 5) return false;
  for (int i = 0; i < 5; ++i) {
    if (dims[i] != want[i]) return false;
  }
  return out.element_type() == (video == ffi::U8 && args.mode == PatchMode::bilinear ? ffi::F32 : video);
}

static ffi::Error gather_patches_ffi(FfiLaunch launch, ffi::AnyBuffer video, ffi::AnyBuffer points, ffi::AnyBuffer t,
                                     ffi::Result<ffi::AnyBuffer> out, int64_t size, int64_t mode, int64_t coordinates,
                                     int64_t border) {
  PatchArgs args{};
  if (!patch_sizes(launch, video, points, t, size, mode, coordinates, border, &args) ||
      !is_patches(*out, args, video.element_type())) {
    return ffi::Error::InvalidArgument("gather_patches: video (B, T, H, W, C), points (B, N, 2), t (B, N) int32 do not fit");
  }
  args.out = out->untyped_data();
  return ffi_guard([&] { FOURDPERF_LAUNCH(gather_patches)(args); });
}

static ffi::Error gather_patches_backward_ffi(FfiLaunch launch, ffi::AnyBuffer d_out, ffi::AnyBuffer video,
                                              ffi::AnyBuffer points, ffi::AnyBuffer t, ffi::Result<ffi::AnyBuffer> d_video,
                                              ffi::Result<ffi::AnyBuffer> d_points, int64_t size, int64_t mode,
                                              int64_t coordinates, int64_t border) {
  PatchArgs args{};
  if (!patch_sizes(launch, video, points, t, size, mode, coordinates, border, &args) ||
      !is_patches(d_out, args, video.element_type()) || d_video->element_count() != (args.dtype == kUint8 ? 0 : video.element_count()) ||
      d_video->element_type() != d_out.element_type() || d_points->element_count() != points.element_count() ||
      d_points->element_type() != points.element_type()) {
    return ffi::Error::InvalidArgument("gather_patches_backward: d_out, video, points, t and their gradients do not fit");
  }
  args.d_out = d_out.untyped_data();
  args.d_video = args.dtype == kUint8 ? nullptr : d_video->untyped_data();
  args.d_points = d_points->untyped_data();
  return ffi_guard([&] { FOURDPERF_LAUNCH(gather_patches_backward)(args); });
}

}  // namespace fourdperf

FOURDPERF_FFI_TARGET(gather_patches, gather_patches_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                         .Attr<int64_t>("size").Attr<int64_t>("mode").Attr<int64_t>("coordinates").Attr<int64_t>("border"))
FOURDPERF_FFI_TARGET(gather_patches_backward, gather_patches_backward_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                         .Attr<int64_t>("size").Attr<int64_t>("mode").Attr<int64_t>("coordinates").Attr<int64_t>("border"))
