// CUDA launch helpers. Included by *_cuda.cu only.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/half.h"

namespace fourdperf {
namespace {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// V consecutive elements, moved in one access of V * sizeof(T) bytes.
template <class T, int V> struct alignas(sizeof(T) * V) Pack { T lane[V]; };

// The widest V for which 16-byte accesses stay aligned.
template <class T> inline bool aligned16(const T* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace fourdperf
