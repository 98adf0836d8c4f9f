// From a DType at run time to a type at compile time: with_dtype(dtype, [&](auto tag) { using T = untag<decltype(tag)>; ... })
#pragma once
#include <stdexcept>

#include "common/half.h"

namespace fourdperf {

template <class T> struct Tag { using type = T; };
template <class T> using untag = typename T::type;

namespace {

template <class F> void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(Tag<double>{});
    case DType::f32: return f(Tag<float>{});
    case DType::bf16: return f(Tag<bf16_t>{});
    case DType::f16: return f(Tag<f16_t>{});
  }
  throw std::invalid_argument("dtype must be f64, f32, bf16 or f16");
}

}  // namespace
}  // namespace fourdperf
