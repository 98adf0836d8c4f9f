// Vectors of floats for the instruction set of this translation unit: 4 lanes (baseline), 8 (AVX2), 16 (AVX-512);
// half as many doubles. Arithmetic is that of the compiler's vector types (+ - * /, a * b + c contracts to fma);
// here are only loads, stores and conversions. 16-bit types widen to float on load and round to nearest even on store.
//
//   vec<float>, vec<double>      lanes<A> of them
//   load<A>(const T*)            A = float or double, T = A or a 16-bit type
//   load<A>(const T*, n)         the first n lanes, zeros beyond (reads no byte past them)
//   store(T*, v), store(T*, v, n)
//   store_streaming(T*, v)       past the caches: whole vectors at aligned addresses; stream_fence() when done
//   broadcast<A>(x), reduce_add(v), max(v, w), reduce_max(v), mask<A> (a vector of 0 and -1: mask ? v : w selects), any(mask)
//   exp2(v)                      2^v to about an ulp; below the normal range 0; NaN stays NaN; from 2^127.5 (2^1023.5) on infinity
//   exp2_coarse(v)               the same to 13 bits and for v < 128, for what is rounded to bf16 next
//   for_vectors<A>(size, f)
//   hold(v)                      keeps v in a register
//   transpose(v)                 lanes<float> vectors as rows of a square, in place
#pragma once
#include <cstdint>
#include <cstring>

#include "common/half.h"
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace fourdperf {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A> struct vec_of;
template <> struct vec_of<float> { typedef float type __attribute__((vector_size(kVectorBytes))); };
template <> struct vec_of<double> { typedef double type __attribute__((vector_size(kVectorBytes))); };
template <class A> using vec = typename vec_of<A>::type;
template <class A> constexpr int lanes = kVectorBytes / int(sizeof(A));
template <class A> struct mask_of;
template <> struct mask_of<float> { typedef int32_t type __attribute__((vector_size(kVectorBytes))); };
template <> struct mask_of<double> { typedef int64_t type __attribute__((vector_size(kVectorBytes))); };
template <class A> using mask = typename mask_of<A>::type;

template <class A> inline vec<A> broadcast(A x) { return x - vec<A>{}; }

template <class A> inline vec<A> load(const A* p) {
  vec<A> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

template <class A> inline void store(A* p, vec<A> v) { memcpy(p, &v, sizeof(v)); }

// ---- 16-bit types
#if defined(__AVX512F__)
template <class A> inline vec<float> load(const bf16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}
template <class A> inline vec<float> load(const f16_t* p) {
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#if defined(__AVX512BF16__)
inline void store(bf16_t* p, vec<float> v) {  // (numbers below 2^-126 become zero)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#else
inline void store(bf16_t* p, vec<float> v) {
  const __m512i u = (__m512i)v;
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
#endif
inline void store(f16_t* p, vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
template <class A> inline vec<float> load(const bf16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
}
template <class A> inline vec<float> load(const f16_t* p) {
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(bf16_t* p, vec<float> v) {
  const __m256i u = (__m256i)v;
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(f16_t* p, vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class T> inline vec<float> widen(const T* p) {
  vec<float> v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class T> inline void narrow(T* p, vec<float> v) {
  for (int i = 0; i < lanes<float>; ++i) p[i] = from_float<T>(v[i]);
}
template <class A> inline vec<float> load(const bf16_t* p) { return widen(p); }
template <class A> inline vec<float> load(const f16_t* p) { return widen(p); }
inline void store(bf16_t* p, vec<float> v) { narrow(p, v); }
inline void store(f16_t* p, vec<float> v) { narrow(p, v); }
#endif

// ---- the first n lanes, n in [0, lanes]; with Full as n, all of them
struct Full {};

template <int Most, class T> inline void copy_few(T* to, const T* from, int n) {  // n < Most, in powers of two
  if constexpr (Most > 1) {
    if (n & Most / 2) {
      memcpy(to, from, Most / 2 * sizeof(T));
      to += Most / 2, from += Most / 2;
    }
    copy_few<Most / 2>(to, from, n);
  }
}
template <class A, class T> inline vec<A> load(const T* p, int n) {
  if (n == lanes<A>) return load<A>(p);
  alignas(64) T lane[lanes<A>];
  memset(lane, 0, sizeof(lane));
  copy_few<lanes<A>>(lane, p, n);
  return load<A>(lane);
}
template <class T, class V> inline void store(T* p, V v, int n) {
  if (n == lanes<acc_t<T>>) return store(p, v);
  alignas(64) T lane[lanes<acc_t<T>>];
  store(lane, v);
  copy_few<lanes<acc_t<T>>>(p, lane, n);
}
#if defined(__AVX512F__)
template <> inline vec<float> load<float, float>(const float* p, int n) {
  return (vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), p);
}
template <> inline vec<float> load<float, bf16_t>(const bf16_t* p, int n) {
  return (vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1u), p)), 16);
}
template <> inline vec<float> load<float, f16_t>(const f16_t* p, int n) {
  return (vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1u), p));
}
inline void store(float* p, vec<float> v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), (__m512)v); }
template <> inline vec<double> load<double, double>(const double* p, int n) {
  return (vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1u), p);
}
inline void store(double* p, vec<double> v, int n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1u), (__m512d)v); }
#elif defined(__AVX2__)
inline __m256i first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
template <> inline vec<float> load<float, float>(const float* p, int n) {
  return (vec<float>)_mm256_maskload_ps(p, first_lanes(n));
}
inline void store(float* p, vec<float> v, int n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)v); }
#endif

template <class A, class T> inline vec<A> load(const T* p, Full) { return load<A>(p); }
template <class T, class V> inline void store(T* p, V v, Full) { store(p, v); }

// f(i, n) over [0, size) in steps of one vector of A: n is Full, and an int below lanes<A> for what is left at the end.
template <class A, class F> inline void for_vectors(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + lanes<A> <= size; i += lanes<A>) f(i, Full{});
  if (i < size) f(i, int(size - i));
}

#if defined(__AVX512F__)
template <class A> inline void stream_vector(A* p, vec<A> v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v); }
inline void stream_half(void* p, const void* v) {
  _mm256_stream_si256(static_cast<__m256i*>(p), _mm256_load_si256(static_cast<const __m256i*>(v)));
}
#elif defined(__AVX2__)
template <class A> inline void stream_vector(A* p, vec<A> v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v); }
inline void stream_half(void* p, const void* v) {
  _mm_stream_si128(static_cast<__m128i*>(p), _mm_load_si128(static_cast<const __m128i*>(v)));
}
#else
template <class A> inline void stream_vector(A* p, vec<A> v) { store(p, v); }
inline void stream_half(void* p, const void* v) { memcpy(p, v, kVectorBytes / 2); }
#endif
inline void store_streaming(float* p, vec<float> v) { stream_vector<float>(p, v); }
inline void store_streaming(double* p, vec<double> v) { stream_vector<double>(p, v); }
template <class T> inline void store_streaming(T* p, vec<float> v) {
  alignas(64) T lane[lanes<float>];
  store(lane, v);
  stream_half(p, lane);
}
inline void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// ---- transposition
#if defined(__AVX512F__)
inline void transpose(vec<float> (&v)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + c]: column c of each group of four, for rows i .. i + 3
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 low2 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd), high2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    v[c] = (vec<float>)_mm512_shuffle_f32x4(low, high, 0x88);
    v[4 + c] = (vec<float>)_mm512_shuffle_f32x4(low2, high2, 0x88);
    v[8 + c] = (vec<float>)_mm512_shuffle_f32x4(low, high, 0xdd);
    v[12 + c] = (vec<float>)_mm512_shuffle_f32x4(low2, high2, 0xdd);
  }
}
#elif defined(__AVX2__)
inline void transpose(vec<float> (&v)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    v[c] = (vec<float>)_mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    v[4 + c] = (vec<float>)_mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}
#else
inline void transpose(vec<float> (&v)[lanes<float>]) {
  for (int i = 0; i < lanes<float>; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = x;
    }
  }
}
#endif
inline void transpose(vec<double> (&v)[lanes<double>]) {
  for (int i = 0; i < lanes<double>; ++i) {
    for (int j = 0; j < i; ++j) {
      const double x = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = x;
    }
  }
}

inline float reduce_add(vec<float> v) {
#if defined(__AVX512F__)
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#elif defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#elif defined(__SSE2__)
  __m128 s = (__m128)v;
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
#ifdef __SSE2__
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
#endif
}
inline double reduce_add(vec<double> v) {
  double sum = v[0];
  for (int i = 1; i < lanes<double>; ++i) sum += v[i];
  return sum;
}

// The larger of two; w where one is NaN.
template <class V> inline V max(V v, V w) { return v > w ? v : w; }
#if defined(__AVX512F__)
inline vec<float> max(vec<float> v, vec<float> w) { return (vec<float>)_mm512_max_ps((__m512)v, (__m512)w); }
#elif defined(__AVX2__)
inline vec<float> max(vec<float> v, vec<float> w) { return (vec<float>)_mm256_max_ps((__m256)v, (__m256)w); }
#endif

template <class V> inline auto reduce_max(V v) {
  auto largest = v[0];
  for (int i = 1; i < int(sizeof(v) / sizeof(v[0])); ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}
#if defined(__AVX512F__)
inline float reduce_max(vec<float> v) { return _mm512_reduce_max_ps((__m512)v); }
#endif

// Whether a comparison holds in any lane.
template <class V> inline bool any(V holds) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)holds, (__m512i)holds) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)holds, (__m256i)holds);
#else
  int64_t word[2];
  memcpy(word, &holds, sizeof(word));
  return (word[0] | word[1]) != 0;
#endif
}

// Keeps a vector in a register: gcc would rather read it again as an operand of every multiplication.
template <class V> inline void hold(V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#endif
}

// ---- 2^x = 2^n p(x - n), n the nearest integer (floats on AVX-512: floor); p(0) = 1.
// Adding `magic` leaves the nearest integer in the low bits. Comparisons are the way round that keeps NaN.
template <class A, int N> inline vec<A> polynomial(vec<A> f, const A (&c)[N]) {
  vec<A> p = broadcast<A>(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) p = p * f + broadcast<A>(c[i]);
  return p * f + broadcast<A>(A(1));
}

#if defined(__AVX512F__)
template <int N> inline vec<double> exp2_by(vec<double> x, const double (&c)[N]) {
  const __m512d n = _mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT);
  const __m512d f = _mm512_reduce_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT);  // of an infinity: 0
  return (vec<double>)_mm512_scalef_pd((__m512d)polynomial((vec<double>)f, c), n);
}
#else
template <int N> inline vec<double> exp2_by(vec<double> x, const double (&c)[N]) {
  const vec<double> low = broadcast<double>(-1023.), high = broadcast<double>(1024.), magic = broadcast<double>(0x1.8p52);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vec<double> shifted = x + magic, n = shifted - magic;
  const mask<double> power = ((mask<double>)shifted + (1023 - 0x4338000000000000)) << 52;
  return polynomial(x - n, c) * (vec<double>)power;
}
#endif

#if defined(__AVX512F__)
inline vec<float> exp2(vec<float> x) {
  constexpr float c[] = {0.693147044442803f,    0.24022930556092917f,   0.055485280572104556f,
                         0.009675451674029141f, 0.0012467845342075735f, 0.00021612919138890016f};
  const vec<float> f = (vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
  return (vec<float>)_mm512_scalef_ps((__m512)polynomial(f, c), (__m512)x);
}
#else
inline vec<float> exp2(vec<float> x) {
  constexpr float c[] = {6.93147188e-1f, 2.40226508e-1f, 5.5503571e-2f, 9.61808256e-3f, 1.33908634e-3f, 1.5453153e-4f};
  const vec<float> low = broadcast<float>(-127.f), high = broadcast<float>(128.f), magic = broadcast<float>(0x1.8p23f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vec<float> shifted = x + magic, n = shifted - magic;
  const mask<float> power = ((mask<float>)shifted + (127 - 0x4b400000)) << 23;
  return polynomial(x - n, c) * (vec<float>)power;
}
#endif

inline vec<float> exp2_coarse(vec<float> x) {
  constexpr float c[] = {0.693282928290234f, 0.2422109693231668f, 0.05500893088168022f};  // minimax on [-1/2, 1/2]
  const vec<float> low = broadcast<float>(-127.f), magic = broadcast<float>(0x1.8p23f);
  x = max(low, x);  // (NaN stays)
  const vec<float> shifted = x + magic, p = polynomial(x - (shifted - magic), c);
  return (vec<float>)((mask<float>)p + ((mask<float>)shifted << 23));
}

inline vec<double> exp2(vec<double> x) {  // ln(2)^k / k!
  constexpr double c[] = {0.6931471805599453,     0.2402265069591007,     0.055504108664821576,  0.009618129107628477,
                          0.0013333558146428441,  0.00015403530393381606, 1.5252733804059838e-05, 1.3215486790144305e-06,
                          1.0178086009239696e-07, 7.054911620801121e-09,  4.44553827187081e-10,   2.5678435993488196e-11,
                          1.3691488853904124e-12};
  return exp2_by(x, c);
}

}  // namespace
}  // namespace fourdperf
