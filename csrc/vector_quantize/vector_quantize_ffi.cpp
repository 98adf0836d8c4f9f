// XLA FFI handler for the search of vector_quantize: z (rows, channels), codebook (codes, channels) -> indices (rows) int32.
#include "vector_quantize/vector_quantize.h"

#include "common/ffi.h"

namespace fourdperf {

static ffi::Error vector_quantize_ffi(FfiLaunch launch, ffi::AnyBuffer z, ffi::AnyBuffer codebook,
                                      ffi::Result<ffi::AnyBuffer> indices, int64_t metric) {
  QuantizeArgs args{};
  const auto rows = z.dimensions(), codes = codebook.dimensions(), out = indices->dimensions();
  if (!ffi_dtype(z.element_type(), &args.dtype) || codebook.element_type() != z.element_type() ||
      indices->element_type() != ffi::S32 || rows.size() != 2 || codes.size() != 2 || out.size() != 1 ||
      rows[1] != codes[1] || out[0] != rows[0] || metric < 0 || metric > 1) {
    return ffi::Error::InvalidArgument(
        "vector_quantize: z (N, C) and codebook (K, C) must be of one dtype, and indices (N) int32");
  }
  args.z = z.untyped_data();
  args.codebook = codebook.untyped_data();
  args.indices32 = static_cast<int32_t*>(indices->untyped_data());
  args.rows = rows[0];
  args.codes = codes[0];
  args.channels = codes[1];
  args.metric = CodeMetric(metric);
  args.threads = launch.threads;
  args.stream = launch.stream;
  return ffi_guard([&] {
#ifdef FOURDPERF_FFI_CUDA
    args.terms = args.dtype == DType::f64 ? static_cast<void*>(launch.allocate<double>(2 * args.codes))
                                          : launch.allocate<float>(2 * args.codes);
#endif
    FOURDPERF_LAUNCH(vector_quantize)(args);
  });
}

}  // namespace fourdperf

FOURDPERF_FFI_TARGET(vector_quantize, vector_quantize_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("metric"))
