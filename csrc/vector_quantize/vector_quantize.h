// vector_quantize: the nearest code of each row, and the sums of the rows that have a code in common.
//
//   vector_quantize   indices[n] = the k with the least score f_k |c_k|^2 / 2 - z_n . f_k c_k
//                     l2: f_k = 1, which orders as |z - c|^2 does; cosine: f_k = 1 / |c_k| and no first term
//   code_sums         out[k] = sum of x[n] over the n with indices[n] = k
//
// z, x        (rows, channels), codebook and out (codes, channels), contiguous, of one dtype; indices (rows)
//
// The lowest index wins where scores are equal. A score that is NaN is never the least; a row without a score below
// infinity gets index 0. An index outside [0, codes) is left out of the sums.
#pragma once
#include <cmath>
#include <limits>

#include "common/half.h"
#include "common/isa.h"

namespace fourdperf {

enum class CodeMetric : int { l2 = 0, cosine = 1 };
constexpr int64_t kMostCodes = (int64_t(1) << 31) - 1;

struct QuantizeArgs {
  const void *z, *codebook;
  int64_t* indices;    // one of these two
  int32_t* indices32;
  DType dtype;
  int64_t rows, codes, channels;
  CodeMetric metric;
  void* terms;         // CUDA: 2 codes numbers, double for f64 and float for all else
  int threads;         // CPU
  void* stream;        // CUDA
};

struct CodeSumsArgs {
  const void* x;
  const int64_t* indices;
  void* out;
  DType dtype;
  int64_t rows, codes, channels;
  const int64_t *order, *starts;  // CUDA: rows sorted by index, stably; where each code's begin (codes + 1)
  int threads;                    // CPU
  void* stream;                   // CUDA
};

FOURDPERF_DECLARE_CPU(vector_quantize, QuantizeArgs)
FOURDPERF_DECLARE_CPU(code_sums, CodeSumsArgs)
void vector_quantize_cuda(const QuantizeArgs& args);
void code_sums_cuda(const CodeSumsArgs& args);

namespace {

// What a code adds to its scores, and what multiplies it in them.
template <class A> struct CodeTerms { A half, factor; };

template <class A> FOURDPERF_HOST_DEVICE CodeTerms<A> code_terms(A square, CodeMetric metric) {
  if (metric == CodeMetric::l2) return {square / 2, A(1)};
  const A length = sqrt(square);
  return {square == square ? A(0) : square, 1 / (length > A(1e-12) ? length : A(1e-12))};
}

template <class A> struct Nearest {
  A score = std::numeric_limits<A>::infinity();
  int64_t index = 0;

  FOURDPERF_HOST_DEVICE void offer(A other, int64_t at) {
    if (other < score || (other == score && at < index)) score = other, index = at;
  }
};

FOURDPERF_HOST_DEVICE void put_index(const QuantizeArgs& a, int64_t row, int64_t index) {
  if (a.indices) a.indices[row] = index;
  else a.indices32[row] = int32_t(index);
}

}  // namespace
}  // namespace fourdperf
