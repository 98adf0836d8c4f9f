// XLA FFI handlers for procrustes: x (..., n, n) -> out (..., n, n), flip (..., n); h, p, flip -> y.
#include "procrustes/procrustes.h"

#include "common/ffi.h"

namespace fourdperf {

// Fills dtype, batch and n from matrices (..., n, n) of one shape and dtype, and `flip` (..., n).
static bool procrustes_shapes(std::initializer_list<ffi::AnyBuffer> matrices, ffi::AnyBuffer flip, ProcrustesArgs* args) {
  const auto dims = matrices.begin()->dimensions(), flip_dims = flip.dimensions();
  const auto type = matrices.begin()->element_type();
  const size_t rank = dims.size();
  if (rank < 2 || dims[rank - 1] != dims[rank - 2] || !ffi_dtype(type, &args->dtype)) return false;
  for (const auto& matrix : matrices) {
    if (matrix.element_type() != type || matrix.dimensions().size() != rank) return false;
    for (size_t i = 0; i < rank; ++i) {
      if (matrix.dimensions()[i] != dims[i]) return false;
    }
  }
  if (flip.element_type() != type || flip_dims.size() != rank - 1) return false;
  args->n = dims[rank - 1];
  args->batch = 1;
  for (size_t i = 0; i + 1 < rank; ++i) {
    if (flip_dims[i] != dims[i]) return false;
    if (i + 2 < rank) args->batch *= dims[i];
  }
  return true;
}

static ffi::Error procrustes_ffi(FfiLaunch launch, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out,
                                 ffi::Result<ffi::AnyBuffer> flip, bool special) {
  ProcrustesArgs args{};
  if (!procrustes_shapes({x, *out}, *flip, &args)) {
    return ffi::Error::InvalidArgument("procrustes: x and out must be (..., n, n) and flip (..., n), of one dtype");
  }
  args.x = x.untyped_data();
  args.out = out->untyped_data();
  args.flip = flip->untyped_data();
  args.special = special;
  args.threads = launch.threads;
  args.stream = launch.stream;
  return ffi_guard([&] { FOURDPERF_LAUNCH(procrustes)(args); });
}

static ffi::Error procrustes_solve_ffi(FfiLaunch launch, ffi::AnyBuffer h, ffi::AnyBuffer p, ffi::AnyBuffer flip,
                                       ffi::Result<ffi::AnyBuffer> y) {
  ProcrustesArgs args{};
  if (!procrustes_shapes({h, p, *y}, flip, &args)) {
    return ffi::Error::InvalidArgument("procrustes_solve: h, p and y must be (..., n, n) and flip (..., n), of one dtype");
  }
  args.x = h.untyped_data();
  args.p = p.untyped_data();
  args.flip = flip.untyped_data();
  args.out = y->untyped_data();
  args.threads = launch.threads;
  args.stream = launch.stream;
  return ffi_guard([&] { FOURDPERF_LAUNCH(procrustes_solve)(args); });
}

}  // namespace fourdperf

FOURDPERF_FFI_TARGET(procrustes, procrustes_ffi,
                     .Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<bool>("special"))
FOURDPERF_FFI_TARGET(procrustes_solve, procrustes_solve_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>())
