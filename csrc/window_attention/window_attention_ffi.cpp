// XLA FFI handlers for window_attention: dense buffers, q, k, v (frames, H, W, heads, dim), extra tokens (frames, E, heads, dim).
#include "window_attention/window_attention.h"

#include "common/ffi.h"

namespace fourdperf {

namespace {

GridStrides dense_grid(const WindowAttentionArgs& a) {
  return {a.height * a.width * a.heads * a.dim, a.width * a.heads * a.dim, a.heads * a.dim, a.dim};
}

bool same(ffi::AnyBuffer x, ffi::AnyBuffer y) {
  return x.element_type() == y.element_type() && x.dimensions() == y.dimensions();
}

// Fills what forward and backward share; an error names what does not fit.
const char* fill(WindowAttentionArgs& args, const FfiLaunch& launch, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                 ffi::AnyBuffer extra_k, ffi::AnyBuffer extra_v, int64_t window_y, int64_t window_x, int64_t dilation_y,
                 int64_t dilation_x, int64_t border, double scale) {
  const auto dims = q.dimensions(), extra = extra_k.dimensions();
  if (!ffi_dtype(q.element_type(), &args.dtype)) return "window_attention: q must be f64, f32, bf16 or f16";
  if (dims.size() != 5 || !same(q, k) || !same(q, v)) return "window_attention: q, k and v must share (frames, H, W, heads, dim)";
  if (extra.size() != 4 || !same(extra_k, extra_v) || extra_k.element_type() != q.element_type() || extra[0] != dims[0] ||
      extra[2] != dims[3] || extra[3] != dims[4]) {
    return "window_attention: extra_k and extra_v must be (frames, E, heads, dim)";
  }
  if (window_y < 1 || window_x < 1 || dilation_y < 1 || dilation_x < 1 || border < 0 || border > 2) {
    return "window_attention: window and dilation must be at least 1, border 0, 1 or 2";
  }
  args.q = q.untyped_data();
  args.k = k.untyped_data();
  args.v = v.untyped_data();
  args.extra_k = extra_k.untyped_data();
  args.extra_v = extra_v.untyped_data();
  args.frames = dims[0];
  args.height = dims[1];
  args.width = dims[2];
  args.heads = dims[3];
  args.dim = dims[4];
  args.extra = extra[1];
  args.q_strides = args.k_strides = args.v_strides = args.d_out_strides = dense_grid(args);
  args.extra_k_strides = args.extra_v_strides = {args.extra * args.heads * args.dim, args.heads * args.dim, args.dim};
  args.window_y = window_y;
  args.window_x = window_x;
  args.dilation_y = dilation_y;
  args.dilation_x = dilation_x;
  args.border = WindowBorder(border);
  args.scale = scale;
  args.threads = launch.threads;
  args.stream = launch.stream;
  return nullptr;
}

bool is_lse(const WindowAttentionArgs& a, ffi::AnyBuffer lse) {
  const auto dims = lse.dimensions();
  return lse.element_type() == (a.dtype == DType::f64 ? ffi::F64 : ffi::F32) && dims.size() == 4 && dims[0] == a.frames &&
         dims[1] == a.heads && dims[2] == a.height && dims[3] == a.width;
}

}  // namespace

static ffi::Error window_attention_ffi(FfiLaunch launch, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer extra_k,
                                       ffi::AnyBuffer extra_v, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                                       int64_t window_y, int64_t window_x, int64_t dilation_y, int64_t dilation_x, int64_t border,
                                       double scale) {
  WindowAttentionArgs args{};
  const char* error = fill(args, launch, q, k, v, extra_k, extra_v, window_y, window_x, dilation_y, dilation_x, border, scale);
  if (error) return ffi::Error::InvalidArgument(error);
  if (!same(q, *out) || !is_lse(args, *lse)) return ffi::Error::InvalidArgument("window_attention: out and lse do not fit q");
  args.out = out->untyped_data();
  args.lse = lse->untyped_data();
  return ffi_guard([&] { FOURDPERF_LAUNCH(window_attention)(args); });
}

static ffi::Error window_attention_backward_ffi(FfiLaunch launch, ffi::AnyBuffer d_out, ffi::AnyBuffer out, ffi::AnyBuffer lse,
                                                ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer extra_k,
                                                ffi::AnyBuffer extra_v, ffi::Result<ffi::AnyBuffer> d_q, ffi::Result<ffi::AnyBuffer> d_k,
                                                ffi::Result<ffi::AnyBuffer> d_v, ffi::Result<ffi::AnyBuffer> d_extra_k,
                                                ffi::Result<ffi::AnyBuffer> d_extra_v, int64_t window_y, int64_t window_x,
                                                int64_t dilation_y, int64_t dilation_x, int64_t border, double scale) {
  WindowAttentionArgs args{};
  const char* error = fill(args, launch, q, k, v, extra_k, extra_v, window_y, window_x, dilation_y, dilation_x, border, scale);
  if (error) return ffi::Error::InvalidArgument(error);
  if (!same(q, d_out) || !same(q, out) || !is_lse(args, lse) || !same(q, *d_q) || !same(q, *d_k) || !same(q, *d_v) ||
      !same(extra_k, *d_extra_k) || !same(extra_k, *d_extra_v)) {
    return ffi::Error::InvalidArgument("window_attention: d_out, out, lse or the gradients do not fit q and the extra tokens");
  }
  args.d_out = d_out.untyped_data();
  args.out = out.untyped_data();
  args.lse = lse.untyped_data();
  args.d_q = d_q->untyped_data();
  args.d_k = d_k->untyped_data();
  args.d_v = d_v->untyped_data();
  args.d_extra_k = d_extra_k->untyped_data();
  args.d_extra_v = d_extra_v->untyped_data();
  return ffi_guard([&] {
    if (launch.scratch) {
      args.workspace = launch.allocate<char>(2 * args.frames * args.heads * args.height * args.width * (args.dtype == DType::f64 ? 8 : 4));
    }
    FOURDPERF_LAUNCH(window_attention_backward)(args);
  });
}

}  // namespace fourdperf

FOURDPERF_FFI_TARGET(window_attention, window_attention_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("window_y").Attr<int64_t>("window_x")
                         .Attr<int64_t>("dilation_y").Attr<int64_t>("dilation_x").Attr<int64_t>("border").Attr<double>("scale"))
FOURDPERF_FFI_TARGET(window_attention_backward, window_attention_backward_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                         .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("window_y")
                         .Attr<int64_t>("window_x").Attr<int64_t>("dilation_y").Attr<int64_t>("dilation_x")
                         .Attr<int64_t>("border").Attr<double>("scale"))
