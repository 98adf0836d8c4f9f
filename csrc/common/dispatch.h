// From a DType at run time to a type at compile time: with_dtype(dtype, [&](auto tag) { using T = untag<decltype(tag)>; ... })
#pragma once
#include <stdexcept>
#include <string>

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
  throw std::invalid_argument("dtype: unknown code " + std::to_string(int(dtype)));
}

}  // namespace
}  // namespace fourdperf
