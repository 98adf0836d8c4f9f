// Scalar types shared by the CPU loops, the CUDA kernels and the bindings. No framework header.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FOURDPERF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FOURDPERF_HOST_DEVICE inline
#endif

namespace fourdperf {

enum class DType : int { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

inline int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Storage types: arithmetic happens in float, these only say how 16 bits are to be read.
struct bf16_t { uint16_t bits; };
struct f16_t { uint16_t bits; };

// The type that sums are kept in.
template <class T> struct accumulate { using type = float; };
template <> struct accumulate<double> { using type = double; };
template <class T> using acc_t = typename accumulate<T>::type;

namespace {  // internal linkage: a copy compiled for one instruction set must never serve another

template <class To, class From> FOURDPERF_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FOURDPERF_HOST_DEVICE float to_float(float x) { return x; }
FOURDPERF_HOST_DEVICE double to_float(double x) { return x; }
FOURDPERF_HOST_DEVICE float to_float(bf16_t x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

FOURDPERF_HOST_DEVICE float to_float(f16_t h) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(h.bits));
#endif
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  // 2^112 moves the exponent bias from 15 to 127; subnormals come out exact because the product is
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

template <class T> FOURDPERF_HOST_DEVICE T from_float(acc_t<T> x);
template <> FOURDPERF_HOST_DEVICE float from_float<float>(float x) { return x; }
template <> FOURDPERF_HOST_DEVICE double from_float<double>(double x) { return x; }

// Round to nearest, ties to even; NaN stays NaN.
template <> FOURDPERF_HOST_DEVICE bf16_t from_float<bf16_t>(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#endif
  const uint32_t u = bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t(u >> 16 | 0x40u)};
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}

template <> FOURDPERF_HOST_DEVICE f16_t from_float<f16_t>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#endif
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // from 65520 on: infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lets the float adder round to a multiple of 2^-24
    return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {uint16_t(sign | (rounded - 0x38000000u) >> 13)};
}

}  // namespace
}  // namespace fourdperf
