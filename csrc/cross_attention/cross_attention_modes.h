// How cross_attention multiplies on the CPU: numbers one by one, pairs of bf16 (AVX512-BF16), tiles of them (AMX-BF16).
//
// maths     out[r, l] += sum_s rows[s, r] lanes[s, l], as cross_attention_tile.h says
// shapes    a mode's sizes: kRows rows by kLanes = kVectors vectors of lanes are multiplied at a time; steps (of `pair` numbers
//           each) come in multiples of kStep
// work      AMX: 2 x 2 tiles of 16 x 16 sums; a tile of rows is 16 rows of 16 steps, which lie side by side in memory
// numerics  pairs of bf16 are multiplied exactly and added in float; AMX takes numbers below 2^-126 for zero. Its weights are
//           made in 16 bits: exponents to 1/128, then bf16, off by 1/150 at most; forward and backward use the same
// limits    tiles have to be configured in each thread (Session)
#pragma once
#include <math.h>

#include "common/buffer.h"
#include "common/simd.h"
#include "cross_attention/cross_attention.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int64_t kBlock = 64;  // rows that are scored before they are summed
constexpr int64_t kTiles = 4;   // tiles of lanes that share a pass over the packed rows
constexpr int64_t kAhead = 16;  // rows between a prefetch and its use

// Steps that are summed in one go: without fma every product is rounded too, and shorter sums make up for it.
#if defined(__FMA__)
constexpr int64_t kLongest = 1024;
#else
constexpr int64_t kLongest = 16;
#endif

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t pieces(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One head of an operand; token t is row index[t] (or t) of the memory.
template <class T> struct Head {
  const T* data;
  int64_t token, channel, tokens;
  const int64_t* index;
  const T* row(int64_t t) const { return data + (index ? index[t] : t) * token; }
  Head from(int64_t t) const {
    return {index ? data : data + t * token, token, channel, tokens - t, index ? index + t : nullptr};
  }
  // Rows are often pages apart, where no hardware prefetcher follows.
  void expect(int64_t t, int64_t channels) const {
    if (t >= tokens || channel != 1) return;
    const char* p = reinterpret_cast<const char*>(row(t));
    for (int64_t at = 0; at < channels * int64_t(sizeof(T)); at += 64) __builtin_prefetch(p + at);
  }
};

// `tokens` of the memory are named by `index`, or are the first ones.
template <class T> Head<T> head_of(const Strided& x, int64_t b, int64_t h, int64_t tokens, const int64_t* index) {
  return {static_cast<const T*>(x.data) + b * x.batch + h * x.head, x.token, x.channel, tokens, index};
}

// How numbers of type T are multiplied, and the sizes of its tiles.
template <class T> struct Plain {
  static constexpr int kVectors = 3;
#if defined(__AVX512F__)
  static constexpr int kRows = 8;  // 3 x 8 sums + 3 lanes + 1 broadcast of 32 registers
#else
  static constexpr int kRows = 4;  // 3 x 4 + 3 + 1 of 16
#endif
  static constexpr int64_t kStep = 1;
  struct Session {};  // what a thread needs while it multiplies
  using Type = T;
  using A = acc_t<T>;
  using Unit = A;
  using Units = vec<A>;
  static constexpr int pair = 1;
  static Unit unit(const T* x) { return to_float(*x); }
  static Unit unit(const T* x, const T*) { return to_float(*x); }
  static vec<A> units(const T* x) { return load<A>(x); }  // lanes<A> of them
  static Unit half_unit(const T* x) { return to_float(*x); }
  static Unit negative(Unit x) { return -x; }
  static void copy(const T* x, int64_t n, Unit* to) {
    for_vectors<A>(n, [&](int64_t i, auto width) { store(to + i, load<A>(x + i, width), width); });
  }
  static void copy(const T* x, const T*, int64_t n, Unit* to) { copy(x, n, to); }
  static vec<A> madd(vec<A> sum, Units lane, Unit row) { return sum + lane * broadcast<A>(row); }
  static vec<A> power(vec<A> x) { return exp2(x); }
  static vec<A> near(vec<A> m, A) { return m; }
  static void put(Unit* p, const vec<A>* x) { store(p, x[0]); }
};

#ifdef __AVX512BF16__
struct Dot {
  static constexpr int kVectors = 3, kRows = 8;
  static constexpr int64_t kStep = 1;
  struct Session {};
  using Type = bf16_t;
  using A = float;
  using Unit = uint32_t;
  typedef uint32_t Units __attribute__((vector_size(kVectorBytes)));
  static constexpr int pair = 2;
  static Unit unit(const bf16_t* x) {
    Unit u;
    memcpy(&u, x, sizeof(u));
    return u;
  }
  static vec<float> units(const bf16_t* x) {
    vec<float> v;
    memcpy(&v, x, sizeof(v));
    return v;
  }
  static Unit unit(const bf16_t* x, const bf16_t* y) { return x->bits | Unit(y->bits) << 16; }
  static Unit half_unit(const bf16_t* x) { return x->bits; }
  static void copy(const bf16_t* x, int64_t n, Unit* to) {
    if (n % 2) to[n / 2] = half_unit(x + n - 1);
    memcpy(to, x, size_t(n / 2) * sizeof(Unit));
  }
  static void copy(const bf16_t* x, const bf16_t* y, int64_t n, Unit* to) {
    const auto wide = [](const bf16_t* p, __mmask16 which) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, p)); };
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 which = __mmask16((1u << smaller(n - i, 16)) - 1u);
      _mm512_mask_storeu_epi32(to + i, which, _mm512_or_si512(wide(x + i, which), _mm512_slli_epi32(wide(y + i, which), 16)));
    }
  }
  static Unit negative(Unit x) { return x ^ 0x80008000u; }
  static vec<float> madd(vec<float> sum, Units lane, Unit row) {
    return (vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lane, (__m512bh)_mm512_set1_epi32(int(row)));
  }
  static vec<float> power(vec<float> x) { return exp2_coarse(x); }
  static vec<float> near(vec<float> m, float) { return m; }
  // lanes of two neighbouring rows to units
  static void put(Unit* p, const vec<float>* x) {
    const __m512i order = (__m512i)(Units){0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                           0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
  }
};
#endif

#ifdef __AMX_BF16__
// 2^f, read as the bits of a bf16, lies so much below 1 + f: by the seven bits of f.
struct Below {
  alignas(64) uint8_t at[128];
  constexpr Below() : at() {
    double power = 1.;
    for (int i = 0; i < 128; ++i, power *= 1.0054299011128028) at[i] = uint8_t(i - int(128. * (power - 1.) + 0.5));
  }
};
constexpr Below kBelow;

// Packed rows: [tile of kRows][kStep steps][kRows][kStep] units.
struct Amx : Dot {
  static constexpr int kVectors = 2, kRows = 32;
  static constexpr int64_t kStep = 16;

  struct Session {
    Session() {
      alignas(64) struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {};
      config.palette = 1;
      for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
  };

  // m, so that c m is a multiple of 1/128: 2^(c (m - m)) is 1
  static vec<float> near(vec<float> m, float c) {
    const vec<float> k = (vec<float>)_mm512_roundscale_ps((__m512)(m * broadcast<float>(128.f * c)), _MM_FROUND_TO_NEAREST_INT);
    return k / broadcast<float>(128.f * c);
  }

  // 2^(c (x - m)) in bf16 by integers: k = 128 (c (x - m) + 127), rounded, are its bits but for kBelow. NaN stays NaN.
  struct Weights {
    static constexpr float kMagic = 0x1.8p23f;  // adding it leaves k in the low bits
    const __m512i low = _mm512_load_si512(kBelow.at), high = _mm512_load_si512(kBelow.at + 64);
    vec<float> c, shift;
    Weights(vec<float> m, float factor) : c(broadcast<float>(128.f * factor)), shift(broadcast<float>(kMagic + 127 * 128) - m * c) {}
    __m512i bits(vec<float> x) const {
      const __m512 k = _mm512_max_ps(_mm512_set1_ps(kMagic), (__m512)(x * c + shift));
      return (__m512i)_mm512_min_ps(k, _mm512_set1_ps(kMagic + 0x7fc0));  // (of a NaN: its second operand)
    }
    vec<float> of(vec<float> x) const {
      const __m512i k = bits(x), p = _mm512_sub_epi16(k, _mm512_maskz_permutex2var_epi8(0x1111111111111111u, low, k, high));
      return (vec<float>)_mm512_slli_epi32(p, 16);
    }
    // of two rows, as units
    __m512i of(vec<float> x, vec<float> y) const {
      const __m512i k = _mm512_mask_blend_epi16(0xaaaaaaaau, bits(x), _mm512_slli_epi32(bits(y), 16));
      return _mm512_sub_epi16(k, _mm512_maskz_permutex2var_epi8(0x5555555555555555u, low, k, high));
    }
  };

  // weights of `count` scores a lane, zeros from there on to a whole step; their sum
  static vec<float> weigh(const float* scores, int64_t count, vec<float> m, float c, Unit* weights) {
    constexpr int64_t kLanes = 32;
    const Weights w(m, c);
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    __m512 total = {};
    int64_t r = 0;
    for (; r < count; r += 2, weights += kLanes) {
      const float* x = scores + r * kLanes;
      const __m512i p = w.of(load<float>(x), r + 1 < count ? load<float>(x + kLanes) : broadcast<float>(-INFINITY));
      total = _mm512_dpbf16_ps(total, (__m512bh)p, ones);
      _mm512_storeu_si512(weights, p);
    }
    for (; r < pieces(count, 2 * kStep) * 2 * kStep; r += 2, weights += kLanes) _mm512_storeu_si512(weights, __m512i{});
    return (vec<float>)total;
  }

  template <bool kAdd> static void product(const Unit* rows, const Unit* lane, int64_t steps, float* out) {
    constexpr int64_t kLanes = 32, kBytes = kLanes * 4, kTile = 16 * kLanes;
    asm volatile("" ::: "memory");  // the compiler does not know that tiles read memory
    if constexpr (kAdd) {
      _tile_loadd(0, out, kBytes);
      _tile_loadd(1, out + 16, kBytes);
      _tile_loadd(2, out + kTile, kBytes);
      _tile_loadd(3, out + kTile + 16, kBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s += kStep) {
      _tile_loadd(4, rows + s * kRows, 64);
      _tile_loadd(6, lane + s * kLanes, kBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, lane + s * kLanes + 16, kBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, rows + s * kRows + 256, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, kBytes);
    _tile_stored(1, out + 16, kBytes);
    _tile_stored(2, out + kTile, kBytes);
    _tile_stored(3, out + kTile + 16, kBytes);
  }

  // One tile of tokens as rows; rows beyond `count` and channels beyond the end are zero.
  static void pack_rows(const Head<bf16_t>& x, int64_t first, int64_t count, int64_t channels, bool negate, Unit* dst) {
    constexpr int64_t kWide = 2 * kStep;  // channels of one tile
    for (int64_t c = 0; c < channels; c += kWide, dst += kRows * kStep) {
      const int64_t width = smaller(channels - c, kWide);
      if (count < kRows || width < kWide) memset(dst, 0, size_t(kRows * kStep) * sizeof(*dst));
      for (int64_t r = 0; r < count; ++r) {
        const bf16_t* p = x.row(first + r) + c * x.channel;
        bf16_t* to = reinterpret_cast<bf16_t*>(dst + r * kStep);
        if (x.channel == 1 && width == kWide) {
          memcpy(to, p, kWide * sizeof(*p));
        } else {
          for (int64_t i = 0; i < width; ++i) to[i] = p[i * x.channel];
        }
      }
      for (int64_t i = 0; i < (negate ? kRows * kStep : 0); ++i) dst[i] = negative(dst[i]);
    }
  }

  // One block of channels as rows, tokens first .. first + count summed over.
  static void pack_block(const Head<bf16_t>& x, int64_t first, int64_t count, int64_t channels, Unit* dst) {
    for (int64_t c = 0; c < channels; c += kRows) {
      for (int64_t t = 0; t < kBlock; t += 2 * kStep, dst += kRows * kStep) {
        for (int64_t half = 0; half < kRows; half += 16) {
          const int64_t width = smaller(channels - c - half, 16);
          vec<float> pairs[16];
          for (int64_t i = 0; i < 16; ++i) pairs[i] = (vec<float>)pair_of(x, first, t + 2 * i, count, c + half, width);
          transpose(pairs);
          for (int64_t i = 0; i < 16; ++i) memcpy(dst + (half + i) * kStep, &pairs[i], 64);
        }
      }
    }
  }

  // Two neighbouring tokens' channels c .. c + width as units; zero beyond `count` tokens.
  static Units pair_of(const Head<bf16_t>& x, int64_t first, int64_t t, int64_t count, int64_t c, int64_t width) {
    Units units = {};
    if (width <= 0) return units;
    for (int64_t i = 0; i < 2 && t + i < count; ++i) {
      const bf16_t* p = x.row(first + t + i) + c * x.channel;
      Units u = {};
      if (x.channel == 1) {
        u = (Units)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << width) - 1u), p));
      } else {
        for (int64_t k = 0; k < width; ++k) u[k] = p[k * x.channel].bits;
      }
      units |= i ? u << 16 : u;
    }
    return units;
  }
};
#endif

template <class T> struct mode_of { using type = Plain<T>; };
#if defined(__AMX_BF16__)
template <> struct mode_of<bf16_t> { using type = Amx; };
#elif defined(__AVX512BF16__)
template <> struct mode_of<bf16_t> { using type = Dot; };
#endif

// V vectors of lanes, where queries fill no more; with one, more rows keep the multipliers busy.
template <class M, int V> struct Narrow : M {
  static constexpr int kVectors = V, kRows = V == 1 ? 8 : M::kRows;
};

template <class M> constexpr int64_t kLanes = M::kVectors * lanes<typename M::A>;

// Steps that so many channels or tokens take.
template <class M> int64_t steps_of(int64_t count) { return pieces(pieces(count, M::pair), M::kStep) * M::kStep; }

}  // namespace
}  // namespace fourdperf::FOURDPERF_ISA
