// XLA FFI handlers for cross_attention on the CPU: q (B, Q, H, D), k (B, K, H, D), v (B, K, H, E), padding (B, K) or (0,).
#ifndef FOURDPERF_CUDA_MODULE
#include "cross_attention/cross_attention.h"

#include "common/ffi.h"

namespace fourdperf {

static Strided contiguous(ffi::AnyBuffer x) {
  const auto d = x.dimensions();
  return {x.untyped_data(), d[1] * d[2] * d[3], d[2] * d[3], d[3], 1};
}

static bool fill(CrossAttentionArgs& args, FfiLaunch& launch, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                 ffi::AnyBuffer padding, double scale) {
  const auto x = q.dimensions(), y = k.dimensions(), z = v.dimensions();
  if (!ffi_dtype(q.element_type(), &args.dtype) || k.element_type() != q.element_type() || v.element_type() != q.element_type() ||
      x.size() != 4 || y.size() != 4 || z.size() != 4 || y[0] != x[0] || y[2] != x[2] || y[3] != x[3] || z[0] != x[0] ||
      z[1] != y[1] || z[2] != x[2]) {
    return false;
  }
  args.q = contiguous(q);
  args.k = contiguous(k);
  args.v = contiguous(v);
  const bool masked = padding.dimensions().size() == 2;
  if (masked && (padding.dimensions()[0] != x[0] || padding.dimensions()[1] != y[1] || padding.element_type() != ffi::PRED)) return false;
  args.padding = masked ? static_cast<const uint8_t*>(padding.untyped_data()) : nullptr;
  args.batch = x[0];
  args.queries = x[1];
  args.keys = y[1];
  args.heads = x[2];
  args.size = x[3];
  args.value_size = z[3];
  args.scale = scale;
  args.threads = launch.threads;
  return true;
}

static bool has_shape(ffi::AnyBuffer x, ffi::DataType type, std::initializer_list<int64_t> shape) {
  const auto d = x.dimensions();
  if (x.element_type() != type || d.size() != shape.size()) return false;
  size_t i = 0;
  for (const int64_t n : shape) {
    if (d[i++] != n) return false;
  }
  return true;
}

static const char* const kMismatch = "cross_attention: shapes or dtypes of the arrays do not fit together";

static bool stats_fit(ffi::AnyBuffer stats, const CrossAttentionArgs& a) {
  return has_shape(stats, a.dtype == DType::f64 ? ffi::F64 : ffi::F32, {a.batch, a.heads, 2, a.queries});
}

static ffi::Error cross_attention_ffi(FfiLaunch launch, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                      ffi::AnyBuffer padding, ffi::Result<ffi::AnyBuffer> out,
                                      ffi::Result<ffi::AnyBuffer> stats, double scale) {
  CrossAttentionArgs args{};
  if (!fill(args, launch, q, k, v, padding, scale) || !stats_fit(*stats, args) ||
      !has_shape(*out, q.element_type(), {args.batch, args.queries, args.heads, args.value_size})) {
    return ffi::Error::InvalidArgument(kMismatch);
  }
  args.out = out->untyped_data();
  args.stats = stats->untyped_data();
  return ffi_guard([&] { cross_attention_cpu(args); });
}

static ffi::Error cross_attention_backward_ffi(FfiLaunch launch, ffi::AnyBuffer d_out, ffi::AnyBuffer q, ffi::AnyBuffer k,
                                               ffi::AnyBuffer v, ffi::AnyBuffer padding, ffi::AnyBuffer stats,
                                               ffi::Result<ffi::AnyBuffer> d_q, ffi::Result<ffi::AnyBuffer> d_k,
                                               ffi::Result<ffi::AnyBuffer> d_v, double scale) {
  CrossAttentionArgs args{};
  const auto type = q.element_type();
  if (!fill(args, launch, q, k, v, padding, scale) || !stats_fit(stats, args) ||
      !has_shape(d_out, type, {args.batch, args.queries, args.heads, args.value_size}) ||
      !has_shape(*d_q, type, {args.batch, args.queries, args.heads, args.size}) ||
      !has_shape(*d_k, type, {args.batch, args.keys, args.heads, args.size}) ||
      !has_shape(*d_v, type, {args.batch, args.keys, args.heads, args.value_size})) {
    return ffi::Error::InvalidArgument(kMismatch);
  }
  args.d_out = contiguous(d_out);
  args.stats = stats.untyped_data();
  args.d_q = d_q->untyped_data();
  args.d_k = d_k->untyped_data();
  args.d_v = d_v->untyped_data();
  return ffi_guard([&] { cross_attention_backward_cpu(args); });
}

}  // namespace fourdperf

FOURDPERF_FFI_TARGET(cross_attention, cross_attention_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<double>("scale"))
FOURDPERF_FFI_TARGET(cross_attention_backward, cross_attention_backward_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                         .Ret<ffi::AnyBuffer>().Attr<double>("scale"))
#endif
