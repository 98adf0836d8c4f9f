// XLA FFI handlers for modulated_siren. Every tensor has one batch axis in front, or, under vmap, more; an input may have
// length 1 where the outputs do not, which is then shared. d_map comes out in the dtype that is summed in.
#include "modulated_siren/modulated_siren.h"

#include "common/ffi.h"

namespace fourdperf {

// One call: the tensors are taken one by one, and the first that does not fit is named.
class SineCall {
  FfiLaunch& launch_;
  FfiDims shape_;  // of pre: batch axes, points, channels
  SineArgs args_{};
  FfiLead pre_, map_, xy_, d_out_, v_pre_, v_map_;
  const char* wrong_ = nullptr;

  void expect(bool holds, const char* what) {
    if (!holds && !wrong_) wrong_ = what;
  }
  size_t axes() const { return shape_.size() - 2; }
  int64_t map_channels() const { return args_.channels * (args_.modulate == Modulate::both ? 2 : 1); }
  bool is_dtype(ffi::DataType type, DType wanted) const {
    DType dtype;
    return ffi_dtype(type, &dtype) && dtype == wanted;
  }
  DType sums() const { return args_.dtype == DType::f64 ? DType::f64 : DType::f32; }

  // An input whose last axes are those of `own`
  template <size_t N>
  const void* input(const ffi::AnyBuffer& x, DType dtype, const int64_t (&own)[N], FfiLead& lead, const char* name) {
    if (wrong_) return nullptr;
    const FfiDims dims = x.dimensions();
    bool fits = is_dtype(x.element_type(), dtype) && lead.fit(dims, N, shape_, 2);
    for (size_t i = 0; fits && i < N; ++i) fits = dims[dims.size() - N + i] == own[i];
    expect(fits, name);
    return x.untyped_data();
  }
  const void* rows(const ffi::AnyBuffer& x, FfiLead& lead, PointStrides& strides, const char* name) {
    const void* data = input(x, args_.dtype, {args_.points, args_.channels}, lead, name);
    strides = {lead.stride[axes() - 1], args_.channels};
    return data;
  }
  const void* pixels(const ffi::AnyBuffer& x, FfiLead& lead, PixelStrides& strides, const char* name) {
    const void* data = input(x, args_.dtype, {args_.height, args_.width, map_channels()}, lead, name);
    strides = {lead.stride[axes() - 1], args_.width * map_channels(), map_channels()};
    return data;
  }

 public:
  // shape: of the first output, which is like pre
  SineCall(FfiLaunch& launch, FfiDims shape, const ffi::AnyBuffer& pre, const ffi::AnyBuffer& map, const ffi::AnyBuffer& xy,
           double omega, int64_t modulate, bool bilinear)
      : launch_(launch), shape_(shape) {
    const FfiDims dims = map.dimensions();
    expect(shape.size() >= 3 && shape.size() - 2 <= FfiLead::most && dims.size() == shape.size() + 1, "the ranks");
    expect(ffi_dtype(pre.element_type(), &args_.dtype), "the dtype of pre");
    expect(modulate >= 0 && modulate <= 2, "modulate");
    if (wrong_) return;
    args_.batch = shape[axes() - 1], args_.points = shape[axes()], args_.channels = shape[axes() + 1];
    args_.height = dims[dims.size() - 3], args_.width = dims[dims.size() - 2];
    args_.omega = omega, args_.modulate = Modulate(modulate), args_.bilinear = bilinear;
    args_.threads = launch.threads, args_.stream = launch.stream;
    args_.pre = rows(pre, pre_, args_.pre_strides, "pre");
    args_.map = pixels(map, map_, args_.map_strides, "map");
    args_.xy = input(xy, sums(), {args_.points, 2}, xy_, "xy");
    args_.xy_stride = xy_.stride[axes() - 1];
    expect(args_.height * args_.width > 0 || args_.points == 0, "a map without pixels");
  }

  SineCall& d_out(const ffi::AnyBuffer& x) {
    if (!wrong_) args_.d_out = rows(x, d_out_, args_.d_out_strides, "d_out");
    return *this;
  }
  SineCall& cotangents(const ffi::AnyBuffer& v_pre, const ffi::AnyBuffer& v_map) {
    if (!wrong_) args_.v_pre = rows(v_pre, v_pre_, args_.v_pre_strides, "v_pre");
    if (!wrong_) args_.v_map = pixels(v_map, v_map_, args_.v_map_strides, "v_map");
    return *this;
  }
  SineCall& output(void* SineArgs::* field, ffi::AnyBuffer& x, const char* name) {
    const FfiDims dims = x.dimensions();
    bool fits = is_dtype(x.element_type(), args_.dtype) && dims.size() == shape_.size();
    for (size_t i = 0; fits && i < dims.size(); ++i) fits = dims[i] == shape_[i];
    expect(fits, name);
    args_.*field = x.untyped_data();
    return *this;
  }
  SineCall& d_map(ffi::AnyBuffer& x) {
    if (wrong_) return *this;
    const FfiDims dims = x.dimensions();
    FfiLead lead;
    input(x, sums(), {args_.height, args_.width, map_channels()}, lead, "d_map");
    for (size_t i = 0; !wrong_ && i < axes(); ++i) expect(dims[i] == shape_[i], "d_map");
    args_.d_map = x.untyped_data();
    if (!wrong_) ffi_clear(launch_, args_.d_map, x.size_bytes());
    return *this;
  }

  template <class Run> ffi::Error run(Run&& run) {
    if (wrong_) return ffi::Error::InvalidArgument(std::string("modulated_siren: shapes or dtypes do not fit: ") + wrong_);
    const FfiDims lead(shape_.begin(), axes());
    const int64_t size = size_of(args_.dtype), acc = size_of(sums()), outputs = args_.batch * args_.points * args_.channels;
    int64_t outer = 1;
    for (size_t i = 0; i + 1 < axes(); ++i) outer *= lead[i];
    return ffi_guard([&] {
      for (int64_t o = 0; o < outer; ++o) {
        SineArgs part = args_;
        part.pre = ffi_at(args_.pre, pre_.offset(lead, o), size);
        part.map = ffi_at(args_.map, map_.offset(lead, o), size);
        part.xy = ffi_at(args_.xy, xy_.offset(lead, o), acc);
        part.d_out = ffi_at(args_.d_out, d_out_.offset(lead, o), size);
        part.v_pre = ffi_at(args_.v_pre, v_pre_.offset(lead, o), size);
        part.v_map = ffi_at(args_.v_map, v_map_.offset(lead, o), size);
        part.out = ffi_at(args_.out, o * outputs, size);
        part.d_pre = ffi_at(args_.d_pre, o * outputs, size);
        part.d_d_out = ffi_at(args_.d_d_out, o * outputs, size);
        part.d_map = ffi_at(args_.d_map, o * args_.batch * args_.height * args_.width * map_channels(), acc);
        run(part);
      }
    });
  }
};

using Input = ffi::AnyBuffer;
using Output = ffi::Result<ffi::AnyBuffer>;

static ffi::Error sine_fwd_ffi(FfiLaunch launch, Input pre, Input map, Input xy, Output out, double omega, int64_t modulate,
                               bool bilinear) {
  return SineCall(launch, out->dimensions(), pre, map, xy, omega, modulate, bilinear)
      .output(&SineArgs::out, *out, "out")
      .run([](const SineArgs& a) { FOURDPERF_LAUNCH(modulated_sine_fwd)(a); });
}

static ffi::Error sine_bwd_ffi(FfiLaunch launch, Input d_out, Input pre, Input map, Input xy, Output d_pre, Output d_map,
                               double omega, int64_t modulate, bool bilinear) {
  return SineCall(launch, d_pre->dimensions(), pre, map, xy, omega, modulate, bilinear)
      .d_out(d_out)
      .output(&SineArgs::d_pre, *d_pre, "d_pre")
      .d_map(*d_map)
      .run([](const SineArgs& a) { FOURDPERF_LAUNCH(modulated_sine_bwd)(a); });
}

static ffi::Error sine_bwd_bwd_ffi(FfiLaunch launch, Input v_pre, Input v_map, Input d_out, Input pre, Input map, Input xy,
                                   Output d_d_out, Output d_pre, Output d_map, double omega, int64_t modulate, bool bilinear) {
  return SineCall(launch, d_pre->dimensions(), pre, map, xy, omega, modulate, bilinear)
      .d_out(d_out)
      .cotangents(v_pre, v_map)
      .output(&SineArgs::d_d_out, *d_d_out, "d_d_out")
      .output(&SineArgs::d_pre, *d_pre, "d_pre")
      .d_map(*d_map)
      .run([](const SineArgs& a) { FOURDPERF_LAUNCH(modulated_sine_bwd_bwd)(a); });
}

}  // namespace fourdperf

#define FOURDPERF_SINE_RULE .Attr<double>("omega").Attr<int64_t>("modulate").Attr<bool>("bilinear")

FOURDPERF_FFI_TARGET(modulated_sine_fwd, sine_fwd_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                         FOURDPERF_SINE_RULE)
FOURDPERF_FFI_TARGET(modulated_sine_bwd, sine_bwd_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>() FOURDPERF_SINE_RULE)
FOURDPERF_FFI_TARGET(modulated_sine_bwd_bwd, sine_bwd_bwd_ffi,
                     .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                         .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                         .Ret<ffi::AnyBuffer>() FOURDPERF_SINE_RULE)
