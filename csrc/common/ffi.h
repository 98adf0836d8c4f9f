// What the XLA FFI handlers share. An <op>_ffi.cpp is compiled into _cpu and, with FOURDPERF_FFI_CUDA, into _cuda:
//
//   ffi::Error resize_ffi(FfiLaunch launch, ffi::AnyBuffer x, ...)     fills the op's Args and calls FOURDPERF_LAUNCH(resize)
//   FOURDPERF_FFI_TARGET(resize, resize_ffi, .Arg<ffi::AnyBuffer>()...)  makes it known to Python as "fourdperf_resize"
#pragma once
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <omp.h>

#include "common/half.h"
#include "common/launch.h"
#include "xla/ffi/api/ffi.h"
#ifdef FOURDPERF_FFI_CUDA
#include <cuda_runtime.h>
#endif

namespace fourdperf {

namespace ffi = xla::ffi;

// Where a handler runs: the threads of the CPU, or a CUDA stream with its scratch memory.
struct FfiLaunch {
  int threads = 0;
  void* stream = nullptr;
  std::optional<ffi::ScratchAllocator> scratch;

  template <class T> T* allocate(int64_t n) {
    const auto memory = scratch->Allocate(size_t(n) * sizeof(T), 64);
    if (!memory) throw std::bad_alloc();
    return static_cast<T*>(*memory);
  }
};

std::vector<std::pair<std::string, XLA_FFI_Handler*>>& ffi_targets();  // defined in bindings.cpp

struct FfiTarget {
  FfiTarget(const char* name, XLA_FFI_Handler* handler) { ffi_targets().emplace_back(name, handler); }
};

inline bool ffi_dtype(ffi::DataType type, DType* dtype) {
  switch (type) {
    case ffi::F64: *dtype = DType::f64; return true;
    case ffi::F32: *dtype = DType::f32; return true;
    case ffi::BF16: *dtype = DType::bf16; return true;
    case ffi::F16: *dtype = DType::f16; return true;
    default: return false;
  }
}

using FfiDims = ffi::Span<const int64_t>;

// The batch axes of an input against those of the results: elements to go on by for a step along each axis, 0 where the
// input has length 1 (is shared). The launcher goes over the last of them, a loop around it over the others.
struct FfiLead {
  static constexpr size_t most = 8;
  int64_t stride[most] = {};

  // own: axes of one element of the batch. False where shapes do not fit.
  bool fit(FfiDims dims, size_t own, FfiDims result, size_t result_own) {
    const size_t axes = result.size() - result_own;
    if (result.size() < result_own || axes > most || dims.size() != axes + own) return false;
    int64_t size = 1;
    for (size_t i = axes; i < dims.size(); ++i) size *= dims[i];
    for (size_t i = axes; i-- > 0; size *= dims[i]) {
      if (dims[i] != result[i] && dims[i] != 1) return false;
      stride[i] = dims[i] == 1 ? 0 : size;
    }
    return true;
  }

  // Elements to index `outer` of all batch axes but the last; `lead`: the lengths of the batch axes.
  int64_t offset(FfiDims lead, int64_t outer) const {
    int64_t elements = 0;
    for (size_t i = lead.size() - 1; i-- > 0; outer /= lead[i]) elements += outer % lead[i] * stride[i];
    return elements;
  }
};

inline const void* ffi_at(const void* p, int64_t elements, int64_t size) {
  return p ? static_cast<const char*>(p) + elements * size : nullptr;
}
inline void* ffi_at(void* p, int64_t elements, int64_t size) { return p ? static_cast<char*>(p) + elements * size : nullptr; }

inline void ffi_clear(const FfiLaunch& launch, void* p, size_t bytes) {
#ifdef FOURDPERF_FFI_CUDA
  cudaMemsetAsync(p, 0, bytes, cudaStream_t(launch.stream));
#else
  (void)launch;
  memset(p, 0, bytes);
#endif
}

template <class F> ffi::Error ffi_guard(F&& f) {
  try {
    f();
    return ffi::Error::Success();
  } catch (const std::exception& e) {
    return ffi::Error::InvalidArgument(e.what());
  }
}

}  // namespace fourdperf

namespace xla::ffi {
template <> struct CtxDecoding<fourdperf::FfiLaunch> {
  using Type = fourdperf::FfiLaunch;
  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* ctx, DiagnosticEngine& diagnostic) {
    Type launch;
#ifdef FOURDPERF_FFI_CUDA
    const auto stream = CtxDecoding<PlatformStream<void*>>::Decode(api, ctx, diagnostic);
    if (!stream) return std::nullopt;
    launch.stream = *stream;
    auto scratch = CtxDecoding<ScratchAllocator>::Decode(api, ctx, diagnostic);
    if (!scratch) return std::nullopt;
    launch.scratch.emplace(std::move(*scratch));
#else
    (void)api, (void)ctx, (void)diagnostic;
    launch.threads = omp_get_max_threads();
#endif
    return launch;
  }
};
}  // namespace xla::ffi

#define FOURDPERF_FFI_TARGET(op, impl, binding)                                                                       \
  namespace fourdperf {                                                                                               \
  XLA_FFI_DEFINE_HANDLER(op##_ffi_handler, impl, ffi::Ffi::Bind().Ctx<FfiLaunch>() binding);                         \
  static const FfiTarget op##_ffi_target("fourdperf_" #op, op##_ffi_handler);                                        \
  }
