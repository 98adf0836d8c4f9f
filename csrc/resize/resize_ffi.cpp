// XLA FFI handler for resize: x (..., n, inner) -> out (..., rows, inner).
#include "resize/resize.h"

#include "common/ffi.h"

namespace fourdperf {

static ffi::Error resize_ffi(FfiLaunch launch, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out, int64_t n_in,
                             int64_t n_out, int64_t filter, bool antialias, bool adjoint) {
  const auto dims = x.dimensions(), out_dims = out->dimensions();
  const size_t rank = dims.size();
  ResizeArgs args{};
  if (!ffi_dtype(x.element_type(), &args.x_dtype) || out->element_type() != x.element_type()) {
    return ffi::Error::InvalidArgument("resize: x and out must have one dtype of f64, f32, bf16, f16");
  }
  if (rank < 2 || out_dims.size() != rank || n_in < 1 || n_out < 1 || dims[rank - 2] != (adjoint ? n_out : n_in) ||
      out_dims[rank - 2] != (adjoint ? n_in : n_out)) {
    return ffi::Error::InvalidArgument("resize: x and out must be (..., n, inner) with the lengths n_in and n_out");
  }
  args.x = x.untyped_data();
  args.out = out->untyped_data();
  args.out_dtype = args.x_dtype;
  args.outer = 1;
  for (size_t i = 0; i + 2 < rank; ++i) args.outer *= dims[i];
  args.inner = dims[rank - 1];
  args.n_in = n_in;
  args.n_out = n_out;
  args.filter = Filter(filter);
  args.antialias = antialias;
  args.adjoint = adjoint;
  return ffi_guard([&] {
    args.threads = launch.threads;
    args.stream = launch.stream;
    if (launch.scratch) {
      args.workspace = launch.allocate<double>(resize_workspace(n_in, n_out, args.filter, antialias, adjoint));
    }
    FOURDPERF_LAUNCH(resize)(args);
  });
}

}  // namespace fourdperf

FOURDPERF_FFI_TARGET(resize, resize_ffi,
                     .Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("n_in").Attr<int64_t>("n_out")
                         .Attr<int64_t>("filter").Attr<bool>("antialias").Attr<bool>("adjoint"))
