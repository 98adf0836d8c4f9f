// sin and cos of a product x * f, the same arithmetic for one float, one double and vectors of them, on CPU and GPU.
//
// maths     k = rint(x f / (pi/2)), r = x f - k pi/2 in [-pi/4, pi/4]; polynomials in r; k mod 4 swaps and negates.
// numerics  float: the product is exact (an FMA gives what rounding it loses), pi/2 in two parts: sin and cos are within
//           2^-23 of those of the exact product of the two floats, for |x f| up to 2^17. double: the product is rounded as
//           x * f always is; pi/2 in two parts, for |x f| up to 2^30. Beyond, Payne and Hanek's reduction: 2/pi to 1280 bits
//           in integers, one lane at a time (about ten times slower, as accurate; floats on AVX-512: in double, as vectors). No range is out of bounds: infinite
//           or NaN arguments give NaN. sine_product and cosine_product, which work out one of the two, are within 2^-22.9.
// limits    none; no local memory on a GPU
#pragma once
#include <cmath>

#include "common/half.h"
#ifndef __CUDACC__
#include "common/simd.h"
#endif

namespace fourdperf {
namespace {

// ---- per element type: unsigned integers as wide, and constants

template <class A> struct Trig;

template <> struct Trig<float> {
  static constexpr float two_over_pi = 0x1.45f306p-1f, half_pi = 0x1.921fb6p+0f, half_pi_low = -0x1.777a5cp-25f;
  static constexpr float shift = 0x1.8p23f;  // adding it rounds to a whole number, which then stands in the low bits
  static constexpr float limit = 0x1p17f;
  static constexpr int sign_shift = 30;
  template <class V> FOURDPERF_HOST_DEVICE static V sin_tail(V z) {
    return (z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f;
  }
  template <class V> FOURDPERF_HOST_DEVICE static V cos(V z) {
    const V tail = (z * 2.443315711809948e-5f - 1.388731625493765e-3f) * z + 4.166664568298827e-2f;
    return tail * (z * z) + (1.f - 0.5f * z);
  }
};

template <> struct Trig<double> {
  static constexpr double two_over_pi = 0x1.45f306dc9c883p-1, half_pi = 0x1.921fb54442d18p+0, half_pi_low = 0x1.1a62633145c07p-54;
  static constexpr double shift = 0x1.8p52;
  static constexpr double limit = 0x1p30;
  static constexpr int sign_shift = 62;
  template <class V> FOURDPERF_HOST_DEVICE static V sin_tail(V z) {
    const V high = (z * 1.58969099521155010221e-10 - 2.50507602534068634195e-8) * z + 2.75573137070700676789e-6;
    return ((high * z - 1.98412698298579493134e-4) * z + 8.33333333332248946124e-3) * z - 1.66666666666666324348e-1;
  }
  template <class V> FOURDPERF_HOST_DEVICE static V cos(V z) {
    const V high = (z * -1.13596475577881948265e-11 + 2.08757232129817482790e-9) * z - 2.75573143513906633035e-7;
    const V tail = ((high * z + 2.48015872894767294178e-5) * z - 1.38888888888741095749e-3) * z + 4.16666666666666019037e-2;
    const V half = 0.5 * z, most = 1. - half;
    return most + (((1. - most) - half) + tail * (z * z));
  }
};

template <class V> struct bits_of;
template <> struct bits_of<float> { using type = uint32_t; };
template <> struct bits_of<double> { using type = uint64_t; };

// a * b + c with one rounding
FOURDPERF_HOST_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
FOURDPERF_HOST_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

#ifndef __CUDACC__
typedef uint32_t uint32_lanes __attribute__((vector_size(kVectorBytes)));
typedef uint64_t uint64_lanes __attribute__((vector_size(kVectorBytes)));
template <> struct bits_of<vec<float>> { using type = uint32_lanes; };
template <> struct bits_of<vec<double>> { using type = uint64_lanes; };

#if defined(__AVX512F__)
inline vec<float> fused(vec<float> a, vec<float> b, vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
inline vec<double> fused(vec<double> a, vec<double> b, vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
inline bool beyond(vec<float> p, float limit) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(p), _mm512_set1_ps(limit), _CMP_NLE_UQ) != 0;
}
inline bool beyond(vec<double> p, double limit) {
  return _mm512_cmp_pd_mask(_mm512_abs_pd(p), _mm512_set1_pd(limit), _CMP_NLE_UQ) != 0;
}
#elif defined(__AVX2__)
inline vec<float> fused(vec<float> a, vec<float> b, vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
inline vec<double> fused(vec<double> a, vec<double> b, vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
inline bool beyond(vec<float> p, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.f), p), _mm256_set1_ps(limit), _CMP_NLE_UQ)) != 0;
}
inline bool beyond(vec<double> p, double limit) {
  return _mm256_movemask_pd(_mm256_cmp_pd(_mm256_andnot_pd(_mm256_set1_pd(-0.), p), _mm256_set1_pd(limit), _CMP_NLE_UQ)) != 0;
}
#else
template <class V> inline V fused_lanes(V a, V b, V c) {
  for (int i = 0; i < int(sizeof(V) / sizeof(c[0])); ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
}
inline vec<float> fused(vec<float> a, vec<float> b, vec<float> c) { return fused_lanes(a, b, c); }
inline vec<double> fused(vec<double> a, vec<double> b, vec<double> c) { return fused_lanes(a, b, c); }
// Whether any lane is larger than `limit` in magnitude, or NaN.
template <class V, class A> inline bool beyond(V p, A limit) {
  const auto inside = (p <= limit) & (p >= -limit);
  bool all = true;
  for (int i = 0; i < int(sizeof(V) / sizeof(A)); ++i) all &= inside[i] != 0;
  return !all;
}
#endif
#endif

// ---- reduction

template <class A, class V, class U> FOURDPERF_HOST_DEVICE void reduce_near(V p, V low, V& r, U& quadrant) {
  using C = Trig<A>;
  const V shifted = p * C::two_over_pi + C::shift;
  quadrant = bit_cast<U>(shifted);
  const V k = shifted - C::shift;
  r = fused(-k, V{} + C::half_pi, p);  // exact
  r = r - (k * C::half_pi_low - low);
}

FOURDPERF_HOST_DEVICE uint64_t high_product(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// p = r + quadrant pi/2 (mod 2 pi) for any |p| >= 2^-10; r to one unit in the last place of pi/4. NaN where p is not finite.
FOURDPERF_HOST_DEVICE double reduce_far(double p, uint64_t& quadrant) {
  static constexpr uint64_t table[] = {  // 64 zero bits, then 2/pi
      0x0000000000000000, 0xa2f9836e4e441529, 0xfc2757d1f534ddc0, 0xdb6295993c439041, 0xfe5163abdebbc561,
      0xb7246e3a424dd2e0, 0x06492eea09d1921c, 0xfe1deb1cb129a73e, 0xe88235f52ebb4484, 0xe99c7026b45f7e41,
      0x3991d639835339f4, 0x9c845f8bbdf9283b, 0x1ff897ffde05980f, 0xef2f118b5a0a6d1f, 0x6d367ecf27cb09b7,
      0x4f463f669e5fea2d, 0x7527bac7ebe5f17b, 0x3d0739f78a5292ea, 0x6bfb5fb11f8d5d08, 0x56033046fc7b6bab,
      0xf0cfbc209af4361d};
  quadrant = 0;
  const uint64_t bits = bit_cast<uint64_t>(p);
  const int exponent = int(bits >> 52 & 0x7ff);
  if (exponent == 0x7ff) return p - p;
  const uint64_t mantissa = (bits & 0xfffffffffffffu) | 0x10000000000000u;
  // bits of 2/pi that make multiples of 4 are left out; the next 192 give the quadrant (2 bits) and the fraction
  const int position = exponent - 1013, word = position >> 6, shift = position & 63;
  uint64_t window[3];
  for (int i = 0; i < 3; ++i) {
    window[i] = shift ? table[word + i] << shift | table[word + i + 1] >> (64 - shift) : table[word + i];
  }
  const uint64_t carry = high_product(mantissa, window[2]), middle = mantissa * window[1] + carry;
  const uint64_t top = mantissa * window[0] + high_product(mantissa, window[1]) + (middle < carry ? 1 : 0);
  quadrant = (top + (uint64_t(1) << 61)) >> 62;
  const auto fraction = int64_t(top - (quadrant << 62));
  const double r = (double(fraction) + double(middle) * 0x1p-64) * (0x1.921fb54442d18p+0 * 0x1p-62);
  if (bits >> 63) quadrant = 0 - quadrant;
  return bits >> 63 ? -r : r;
}

// ---- polynomials

template <class A, class V, class U> FOURDPERF_HOST_DEVICE void sincos_reduced(V r, U quadrant, V& sine, V& cosine) {
  using C = Trig<A>;
  const V z = r * r;
  const U s = bit_cast<U>(C::sin_tail(z) * (z * r) + r), c = bit_cast<U>(C::cos(z));
  const U odd = U{} - (quadrant & 1);
  sine = bit_cast<V>(((s & ~odd) | (c & odd)) ^ ((quadrant & 2) << C::sign_shift));
  cosine = bit_cast<V>(((c & ~odd) | (s & odd)) ^ (((quadrant + 1) & 2) << C::sign_shift));
}

FOURDPERF_HOST_DEVICE double far_angle(float x, float f) { return double(x) * double(f); }  // exact
FOURDPERF_HOST_DEVICE double far_angle(double x, double f) { return x * f; }

template <class A> FOURDPERF_HOST_DEVICE void sincos_product(A x, A f, A& sine, A& cosine) {
  using U = typename bits_of<A>::type;
  const A p = x * f;
  const A low = sizeof(A) == 4 ? fused(x, f, -p) : A(0);
  A r;
  U quadrant;
  if (fabs(p) <= Trig<A>::limit) {
    reduce_near<A>(p, low, r, quadrant);
  } else {
    uint64_t q;
    r = A(reduce_far(far_angle(x, f), q));
    quadrant = U(q);
  }
  sincos_reduced<A>(r, quadrant, sine, cosine);
}

#ifndef __CUDACC__
// Lanes beyond the limit, reduced one by one. Through memory and out of line, so that the fast path keeps its registers.
template <class A>
__attribute__((noinline, cold)) void reduce_lanes(const A* x, const A* f, A* r, typename bits_of<A>::type* quadrant) {
  for (int i = 0; i < lanes<A>; ++i) {
    if (fabs(x[i] * f[i]) <= Trig<A>::limit) continue;
    uint64_t q;
    r[i] = A(reduce_far(far_angle(x[i], f[i]), q));
    quadrant[i] = typename bits_of<A>::type(q);
  }
}

#if defined(__AVX512F__)
// 2/pi 2^(e - 47) mod 4, high + low: what a product in [2^e, 2^(e + 1)) of two floats, as a whole number of 48 bits, is
// multiplied by.
struct FarFactors {
  static constexpr int first = 17, last = 255;
  double high[last - first + 1]{}, low[last - first + 1]{};
  constexpr FarFactors() {
    constexpr uint64_t two_over_pi[] = {0xa2f9836e4e441529, 0xfc2757d1f534ddc0, 0xdb6295993c439041, 0xfe5163abdebbc561,
                                        0xb7246e3a424dd2e0};
    for (int e = first; e <= last; ++e) {
      const int start = e > 49 ? e - 49 : 0;  // the first bit that does not make multiples of 4
      uint64_t bits[2] = {};
      for (int i = 0; i < 106; ++i) {
        bits[i / 53] = bits[i / 53] << 1 | (two_over_pi[(start + i) / 64] >> (63 - (start + i) % 64) & 1);
      }
      double unit = 1;
      for (int i = e - start; i < 100; ++i) unit /= 2;
      high[e - first] = double(bits[0]) * unit;
      low[e - first] = double(bits[1]) * (unit * 0x1p-53);
    }
  }
};
constexpr FarFactors kFarFactors;

// The same for floats, eight lanes at a time in double; r to 2^-51.
template <>
__attribute__((noinline, cold)) void reduce_lanes<float>(const float* x, const float* f, float* r, uint32_t* quadrant) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  for (int i = 0; i < lanes<float>; i += 8) {
    const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(f + i);
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.f), _mm256_mul_ps(a, b));
    const __mmask8 far = _mm256_cmp_ps_mask(magnitude, _mm256_set1_ps(Trig<float>::limit), _CMP_NLE_UQ);
    const __m512d p = _mm512_mul_pd(_mm512_cvtps_pd(a), _mm512_cvtps_pd(b));
    const __m512i bits = _mm512_castpd_si512(p), exponent = _mm512_srli_epi64(_mm512_slli_epi64(bits, 1), 53);
    __m512i at = _mm512_sub_epi64(exponent, _mm512_set1_epi64(1023 + FarFactors::first));
    at = _mm512_max_epi64(at, _mm512_setzero_si512());
    at = _mm512_min_epi64(at, _mm512_set1_epi64(FarFactors::last - FarFactors::first));
    const __m512d high = _mm512_i64gather_pd(at, kFarFactors.high, 8), low = _mm512_i64gather_pd(at, kFarFactors.low, 8);
    const __m512i fraction = _mm512_andnot_si512(_mm512_set1_epi64(int64_t(0x7ff) << 52), bits);
    const __m512d whole = _mm512_castsi512_pd(_mm512_or_si512(fraction, _mm512_set1_epi64(int64_t(1023 + 47) << 52)));
    const __m512d turns = _mm512_mul_pd(whole, high), lost = _mm512_fmsub_pd(whole, high, turns);
    const __m512d k = _mm512_roundscale_pd(turns, nearest);
    const __m512d rest = _mm512_add_pd(_mm512_sub_pd(turns, k), _mm512_fmadd_pd(whole, low, lost));
    const __m512d more = _mm512_roundscale_pd(rest, nearest), nan = _mm512_sub_pd(p, p);  // NaN if p is not finite
    const __m512d angle = _mm512_fmadd_pd(_mm512_sub_pd(rest, more), _mm512_set1_pd(0x1.921fb54442d18p+0), nan);
    _mm256_mask_storeu_ps(r + i, far, _mm512_cvtpd_ps(angle));
    const __m512i q = _mm512_cvtpd_epi64(_mm512_add_pd(k, more));
    _mm256_mask_storeu_epi32(quadrant + i, far, _mm512_cvtepi64_epi32(q));
  }
}
#endif

template <class A> inline void sincos_product(vec<A> x, vec<A> f, vec<A>& sine, vec<A>& cosine) {
  using U = typename bits_of<vec<A>>::type;
  const vec<A> p = x * f;
  const vec<A> low = sizeof(A) == 4 ? fused(x, f, -p) : vec<A>{};
  vec<A> r;
  U quadrant;
  reduce_near<A>(p, low, r, quadrant);
  if (__builtin_expect(beyond(p, Trig<A>::limit), 0)) {
    alignas(64) A x_lane[lanes<A>], f_lane[lanes<A>], r_lane[lanes<A>];
    alignas(64) typename bits_of<A>::type q_lane[lanes<A>];
    store(x_lane, x), store(f_lane, f), store(r_lane, r);
    memcpy(q_lane, &quadrant, sizeof(quadrant));
    reduce_lanes<A>(x_lane, f_lane, r_lane, q_lane);
    r = load<A>(r_lane);
    memcpy(&quadrant, q_lane, sizeof(quadrant));
  }
  sincos_reduced<A>(r, quadrant, sine, cosine);
}
#endif

// ---- one of the two: float reduces by pi, to one polynomial on [-pi/2, pi/2]; double works out both

// sin(x) or, with Cosine, cos(x) = sin(x + pi/2), of x = p + low
template <bool Cosine, class V> FOURDPERF_HOST_DEVICE V one_near(V p, V low) {
  using U = typename bits_of<V>::type;
  constexpr float over_pi = 0x1.45f306p-2f, pi = 0x1.921fb6p+1f, pi_low = -0x1.777a5cp-24f, shift = Trig<float>::shift;
  const V shifted = Cosine ? (p * over_pi + 0.5f) + shift : p * over_pi + shift;
  const V k = Cosine ? shifted - shift - 0.5f : shifted - shift;
  V r = fused(-k, V{} + pi, p);  // exact
  r = r - (k * pi_low - low);
  const V z = r * r;
  const V tail = ((z * 2.60569081e-6f - 1.98095643e-4f) * z + 8.3330655e-3f) * z - 1.66666597e-1f;  // to 2^-26
  return bit_cast<V>(bit_cast<U>(tail * (z * r) + r) ^ ((bit_cast<U>(shifted) & 1) << 31));
}

template <bool Cosine, class A> FOURDPERF_HOST_DEVICE A one_product(A x, A f) {
  if constexpr (sizeof(A) == 4) {
    const A p = x * f;
    if (fabs(p) <= Trig<A>::limit) return one_near<Cosine>(p, fused(x, f, -p));
  }
  A sine, cosine;
  sincos_product<A>(x, f, sine, cosine);
  return Cosine ? cosine : sine;
}

#ifndef __CUDACC__
template <bool Cosine, class A> __attribute__((noinline, cold)) void one_far(const A* x, const A* f, A* result) {
  for (int i = 0; i < lanes<A>; ++i) result[i] = one_product<Cosine>(x[i], f[i]);
}

template <bool Cosine, class A> inline vec<A> one_product(vec<A> x, vec<A> f) {
  if constexpr (sizeof(A) == 8) {
    vec<A> sine, cosine;
    sincos_product<A>(x, f, sine, cosine);
    return Cosine ? cosine : sine;
  } else {
    const vec<A> p = x * f;
    vec<A> result = one_near<Cosine>(p, fused(x, f, -p));
    if (__builtin_expect(beyond(p, Trig<A>::limit), 0)) {
      alignas(64) A x_lane[lanes<A>], f_lane[lanes<A>], lane[lanes<A>];
      store(x_lane, x), store(f_lane, f);
      one_far<Cosine>(x_lane, f_lane, lane);
      result = load<A>(lane);
    }
    return result;
  }
}
#endif

// V: A, or a vector of them
template <class A, class V> FOURDPERF_HOST_DEVICE V sine_product(V x, V f) { return one_product<false, A>(x, f); }
template <class A, class V> FOURDPERF_HOST_DEVICE V cosine_product(V x, V f) { return one_product<true, A>(x, f); }

}  // namespace
}  // namespace fourdperf
