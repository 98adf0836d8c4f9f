// XLA FFI handlers for fourier_embed, its gradients, and fourier_linear: x (N, D), frequencies (F,), see fourier_embed.h.
#include "fourier_embed/fourier_embed.h"

#include "common/ffi.h"

namespace fourdperf {

// Sizes from x and frequencies; false where they do not fit each other.
static bool fourier_sizes(FfiLaunch& launch, ffi::AnyBuffer x, ffi::AnyBuffer frequencies, DType dtype, FourierArgs* args) {
  DType f_dtype;
  if (x.dimensions().size() != 2 || frequencies.dimensions().size() != 1) return false;
  if (!ffi_dtype(frequencies.element_type(), &f_dtype)) return false;
  if (f_dtype != (dtype == DType::f64 ? DType::f64 : DType::f32)) return false;
  args->x = x.untyped_data();
  args->frequencies = frequencies.untyped_data();
  args->dtype = dtype;
  args->rows = x.dimensions()[0];
  args->dims = x.dimensions()[1];
  args->bands = frequencies.dimensions()[0];
  args->threads = launch.threads;
  args->stream = launch.stream;
  return true;
}

static bool has_shape(ffi::AnyBuffer buffer, int64_t rows, int64_t columns, ffi::DataType type) {
  const auto dims = buffer.dimensions();
  return buffer.element_type() == type && dims.size() == 2 && dims[0] == rows && dims[1] == columns;
}

static ffi::Error fourier_embed_ffi(FfiLaunch launch, ffi::AnyBuffer x, ffi::AnyBuffer frequencies,
                                    ffi::Result<ffi::AnyBuffer> out) {
  FourierArgs args{};
  DType dtype;
  if (!ffi_dtype(x.element_type(), &dtype) || !fourier_sizes(launch, x, frequencies, dtype, &args) ||
      !has_shape(*out, args.rows, 2 * args.dims * args.bands, x.element_type())) {
    return ffi::Error::InvalidArgument("fourier_embed: x (N, D), frequencies (F,) and out (N, 2 D F) do not fit");
  }
  args.out = out->untyped_data();
  return ffi_guard([&] { FOURDPERF_LAUNCH(fourier_embed)(args); });
}

static ffi::Error fourier_embed_backward_ffi(FfiLaunch launch, ffi::AnyBuffer d_out, ffi::AnyBuffer x,
                                             ffi::AnyBuffer frequencies, ffi::Result<ffi::AnyBuffer> d_x,
                                             ffi::Result<ffi::AnyBuffer> d_frequencies) {
  FourierArgs args{};
  DType dtype;
  if (!ffi_dtype(x.element_type(), &dtype) || !fourier_sizes(launch, x, frequencies, dtype, &args) ||
      !has_shape(d_out, args.rows, 2 * args.dims * args.bands, x.element_type()) ||
      !has_shape(*d_x, args.rows, args.dims, x.element_type()) || d_frequencies->element_count() != size_t(args.bands) ||
      d_frequencies->element_type() != frequencies.element_type()) {
    return ffi::Error::InvalidArgument("fourier_embed_backward: d_out (N, 2 D F), x (N, D), frequencies (F,) do not fit");
  }
  args.d_out = d_out.untyped_data();
  args.d_x = d_x->untyped_data();
  args.d_frequencies = d_frequencies->untyped_data();
  return ffi_guard([&] {
    if (launch.scratch) args.workspace = launch.allocate<double>(fourier_workspace(args.rows, args.bands));
    FOURDPERF_LAUNCH(fourier_embed_backward)(args);
  });
}

static ffi::Error fourier_linear_ffi(FfiLaunch launch, ffi::AnyBuffer x, ffi::AnyBuffer frequencies, ffi::AnyBuffer weight,
                                     ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> out) {
  FourierArgs args{};
  DType dtype;
  if (!ffi_dtype(weight.element_type(), &dtype) || !fourier_sizes(launch, x, frequencies, dtype, &args) ||
      x.element_type() != frequencies.element_type() || bias.element_type() != weight.element_type() ||
      bias.dimensions().size() != 1 || !has_shape(weight, bias.dimensions()[0], 2 * args.dims * args.bands, weight.element_type()) ||
      !has_shape(*out, args.rows, bias.dimensions()[0], weight.element_type())) {
    return ffi::Error::InvalidArgument("fourier_linear: x (N, D), frequencies (F,), weight (M, 2 D F), bias (M,) do not fit");
  }
  args.features = bias.dimensions()[0];
  args.weight = weight.untyped_data();
  args.bias = bias.untyped_data();
  args.out = out->untyped_data();
  return ffi_guard([&] { FOURDPERF_LAUNCH(fourier_linear)(args); });
}

}  // namespace fourdperf

FOURDPERF_FFI_TARGET(fourier_embed, fourier_embed_ffi, .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>())
FOURDPERF_FFI_TARGET(fourier_embed_backward, fourier_embed_backward_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>())
FOURDPERF_FFI_TARGET(fourier_linear, fourier_linear_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Ret<ffi::AnyBuffer>())
