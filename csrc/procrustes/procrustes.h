// procrustes: the orthogonal polar factor of square matrices, and the Sylvester equation that its derivative solves.
//
//   procrustes         x = U diag(s) V^T -> out = U V^T; special: U diag(1, .., 1, d) V^T with d = det(U V^T)
//   procrustes_solve   h, p -> y with h y + y h = p - p^T, for h = out^T x
//
// x, out, h, p, y    (batch, n, n), contiguous, f32 or f64
// flip               (batch, n): where d = -1 the right singular vector that was turned round, elsewhere zeros;
//                    may be null, and is then not written, or counts as zeros
//
// Forward: scaled Newton iteration x <- (mu x + x^-T / mu) / 2 (Higham, 1986; Byers and Xu, 2008) until the singular
// values lie within a few percent of each other, then the binomial series x (1 + z/2 + 3 z^2/8 + ..), z = 1 - x^T x.
// Solve: the same iteration for the sign of [[h, c], [0, -h]], which h and c alone describe (Roberts, 1971).
#pragma once
#include <cmath>
#include <limits>

#include "common/half.h"
#include "common/isa.h"

namespace fourdperf {

struct ProcrustesArgs {
  const void* x;    // procrustes_solve: h
  const void* p;    // procrustes_solve alone
  void* out;        // procrustes_solve: y
  void* flip;       // written by procrustes, read by procrustes_solve
  DType dtype;
  int64_t batch, n;
  bool special;
  int threads;      // CPU
  void* stream;     // CUDA
};

FOURDPERF_DECLARE_CPU(procrustes, ProcrustesArgs)
FOURDPERF_DECLARE_CPU(procrustes_solve, ProcrustesArgs)
void procrustes_cuda(const ProcrustesArgs& args);
void procrustes_solve_cuda(const ProcrustesArgs& args);

constexpr int64_t kProcrustesCudaSize = 64;  // the largest n of the CUDA kernels

namespace {

// The turn (cosine, sine) that makes two vectors orthogonal and the first the longer one, from their squared lengths and
// their product; false where they are orthogonal already, to `tolerance`.
template <class A> FOURDPERF_HOST_DEVICE bool jacobi_turn(A pp, A qq, A pq, A tolerance, A* cosine, A* sine) {
  if (!(fabs(pq) > tolerance * sqrt(pp) * sqrt(qq))) return false;
  const A zeta = (qq - pp) / (2 * pq);
  const A tangent = (zeta < 0 ? A(-1) : A(1)) / (fabs(zeta) + sqrt(1 + zeta * zeta));
  const A small = 1 / sqrt(1 + tangent * tangent);
  *cosine = pp < qq ? small * tangent : small;
  *sine = pp < qq ? -small : small * tangent;
  return true;
}

// What s_i + s_j weighs in the derivative: nothing where it is zero to rounding.
template <class A> FOURDPERF_HOST_DEVICE A procrustes_weight(A sum, A largest, int64_t n, A epsilon) {
  return fabs(sum) > A(n) * epsilon * largest ? 1 / sum : A(0);
}

// An entry of a fixed vector without structure, to start an iteration with.
FOURDPERF_HOST_DEVICE float start_entry(int64_t i) {
  const uint32_t bits = (uint32_t(i) + 1u) * 2654435761u;
  return float(int32_t(bits ^ bits >> 15)) * 0x1p-31f;
}

}  // namespace
}  // namespace fourdperf
