// The pieces that forward and backward of cross_attention share on the CPU: packing, one matrix product, one loop.
//
// maths     every product of the op is  out[r, l] += sum_s rows[s, r] lanes[s, l]: `lanes` are kLanes queries (or keys)
//           side by side in vector registers, `rows` are broadcast one number at a time. Maxima, sums and scalings of the
//           softmax are then one vector operation each, and what happens to a query depends on nothing beside it.
// shapes    a unit is one number, or with AVX512-BF16 a pair of bf16 that vdpbf16ps multiplies and adds at once; steps
//           count units. Packed rows: [tile of kRows][step][kRows] units; packed lanes: [step][kLanes] units.
// work      packed rows are made once per head and shared by all tiles of lanes; heads are taken in rounds, enough at
//           a time to occupy the threads, so that the packed copies stay small. A task is kTiles tiles of one head.
// numerics  sums in float (double for float64); pairs of bf16 are multiplied exactly and added in float
// limits    rows and lanes beyond the end are packed as zeros; keys that are padding are never packed
#pragma once
#include <omp.h>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/simd.h"
#include "cross_attention/cross_attention.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int kVectors = 3;
#if defined(__AVX512F__)
constexpr int kRows = 8;  // 3 x 8 sums + 3 lanes + 1 broadcast of 32 registers
#else
constexpr int kRows = 4;  // 3 x 4 + 3 + 1 of 16
#endif
constexpr int64_t kBlock = 64;  // rows that are scored before they are summed
constexpr int64_t kTiles = 4;   // tiles of lanes that share a pass over the packed rows
constexpr int64_t kAhead = 16;  // rows between a prefetch and its use

// Steps that are summed in one go: without fma every product is rounded too, and shorter sums make up for it.
#if defined(__FMA__)
constexpr int64_t kLongest = 1024;
#else
constexpr int64_t kLongest = 16;
#endif

template <class A> constexpr int64_t kLanes = kVectors * lanes<A>;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t pieces(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How numbers of type T are multiplied.
template <class T> struct Plain {
  using Type = T;
  using A = acc_t<T>;
  using Unit = A;
  using Units = vec<A>;
  static constexpr int pair = 1;
  static Unit unit(const T* x) { return to_float(*x); }
  static Unit unit(const T* x, const T*) { return to_float(*x); }
  static Unit half_unit(const T* x) { return to_float(*x); }
  static Unit negative(Unit x) { return -x; }
  static vec<A> madd(vec<A> sum, Units lane, Unit row) { return sum + lane * broadcast<A>(row); }
  static vec<A> power(vec<A> x) { return exp2(x); }
  static void put(Unit* p, const vec<A>* x) { store(p, x[0]); }
};

#ifdef __AVX512BF16__
struct Dot {
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
  static Unit unit(const bf16_t* x, const bf16_t* y) { return x->bits | Unit(y->bits) << 16; }
  static Unit half_unit(const bf16_t* x) { return x->bits; }
  static Unit negative(Unit x) { return x ^ 0x80008000u; }
  static vec<float> madd(vec<float> sum, Units lane, Unit row) {
    return (vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lane, (__m512bh)_mm512_set1_epi32(int(row)));
  }
  static vec<float> power(vec<float> x) { return exp2_coarse(x); }
  // lanes of two neighbouring rows to units
  static void put(Unit* p, const vec<float>* x) {
    const __m512i order = (__m512i)(Units){0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                           0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
  }
};
#endif

template <class T> struct mode_of { using type = Plain<T>; };
#ifdef __AVX512BF16__
template <> struct mode_of<bf16_t> { using type = Dot; };
#endif

// One head of an operand; token t is row index[t] (or t) of the memory.
template <class T> struct Head {
  const T* data;
  int64_t token, channel, tokens;
  const int64_t* index;
  const T* row(int64_t t) const { return data + (index ? index[t] : t) * token; }
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

// ---- packing

// dst[step * slots + r] = channels (step, of a pair) of token first + r; slots beyond `count` are zero
template <class M>
inline void pack_slots(const Head<typename M::Type>& x, int64_t first, int64_t count, int64_t channels, int64_t slots,
                       bool negate, typename M::Unit* dst) {
  const int64_t steps = pieces(channels, M::pair), whole = channels / M::pair;
  if (count < slots) memset(dst, 0, size_t(steps * slots) * sizeof(*dst));
  for (int64_t r = 0; r < count; ++r) {
    const auto* p = x.row(first + r);
    x.expect(first + r + kAhead, channels);
    if (x.channel == 1) {
      for (int64_t s = 0; s < whole; ++s) dst[s * slots + r] = M::unit(p + s * M::pair);
    } else {
      for (int64_t s = 0; s < whole; ++s) {
        const auto* c = p + s * M::pair * x.channel;
        dst[s * slots + r] = M::unit(c, c + (M::pair - 1) * x.channel);
      }
    }
    if (whole < steps) dst[whole * slots + r] = M::half_unit(p + whole * M::pair * x.channel);
  }
  if (negate) {
    for (int64_t i = 0; i < steps * slots; ++i) dst[i] = M::negative(dst[i]);
  }
}

// Tokens as rows whose channels are summed over: [tile of kRows tokens][step of channels][kRows]
template <class M>
inline void pack_tokens(const Head<typename M::Type>& x, int64_t tokens, int64_t channels, bool negate,
                        typename M::Unit* dst) {
  const int64_t room = pieces(channels, M::pair) * kRows;
  for (int64_t first = 0; first < tokens; first += kRows, dst += room) {
    pack_slots<M>(x, first, smaller(tokens - first, kRows), channels, kRows, negate, dst);
  }
}

// Channels as rows, tokens summed over: [block of kBlock tokens][tile of kRows channels][step of tokens][kRows]
template <class M>
inline void pack_channels(const Head<typename M::Type>& x, int64_t tokens, int64_t channels, typename M::Unit* dst) {
  constexpr int64_t steps = kBlock / M::pair;
  const int64_t tiles = pieces(channels, kRows);
  for (int64_t first = 0; first < tokens; first += kBlock, dst += tiles * steps * kRows) {
    const int64_t count = smaller(tokens - first, kBlock);
    if (count < kBlock || channels % kRows) memset(dst, 0, size_t(tiles * steps * kRows) * sizeof(*dst));
    for (int64_t t = 0; t < count; t += M::pair) {
      for (int i = 0; i < M::pair; ++i) x.expect(first + t + i + kAhead, channels);
      const auto *p = x.row(first + t), *q = t + M::pair <= count ? x.row(first + t + M::pair - 1) : nullptr;
      auto* out = dst + t / M::pair * kRows;
      for (int64_t c = 0; c < channels; c += kRows, out += steps * kRows) {
        const int64_t width = smaller(channels - c, kRows);
        if (q && width == kRows && x.channel == 1) {
          for (int r = 0; r < kRows; ++r) out[r] = M::unit(p + c + r, q + c + r);
        } else {
          for (int64_t r = 0; r < width; ++r) {
            const int64_t at = (c + r) * x.channel;
            out[r] = q ? M::unit(p + at, q + at) : M::half_unit(p + at);
          }
        }
      }
    }
  }
}

// Units that the two layouts take.
template <class M> int64_t token_room(int64_t tokens, int64_t channels) {
  return pieces(tokens, kRows) * kRows * pieces(channels, M::pair);
}
template <class M> int64_t channel_room(int64_t tokens, int64_t channels) {
  return pieces(tokens, kBlock) * pieces(channels, kRows) * kRows * (kBlock / M::pair);
}

// ---- the product: out[r][l] = (kAdd ? out[r][l] : 0) + sum_s rows[s][r] lanes[s][l], r < kRows, l < kLanes
template <class M, bool kAdd>
inline void product(const typename M::Unit* rows, const typename M::Unit* lane, int64_t steps, typename M::A* out) {
  using A = typename M::A;
  constexpr int step = lanes<A>;
  // all loops over registers are unrolled before anything else, or gcc keeps the sums in memory
  vec<A> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) sum[r][j] = vec<A>{};
  }
  for (int64_t s = 0; s < steps; ++s) {
    typename M::Units x[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) memcpy(&x[j], lane + s * kLanes<A> + j * step, sizeof(x[j]));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto row = rows[s * kRows + r];
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sum[r][j] = M::madd(sum[r][j], x[j], row);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      A* p = out + r * kLanes<A> + j * step;
      store(p, kAdd ? load<A>(p) + sum[r][j] : sum[r][j]);
    }
  }
}

// c (x - m), so that what is lost to rounding is small beside the difference, not beside x
template <class A> struct Power {
  vec<A> c, shift;
  Power(vec<A> m, A factor) : c(broadcast<A>(factor)) {
#if defined(__FMA__)
    shift = m * c;
  }
  vec<A> of(vec<A> x) const { return x * c - shift; }
#else
    shift = m;
  }
  vec<A> of(vec<A> x) const { return (x - shift) * c; }
#endif
};

// scores[r][l] for the first `count` rows (rounded up to kRows) of packed tokens
template <class M>
inline void score(const typename M::Unit* rows, const typename M::Unit* lane, int64_t count, int64_t steps,
                  typename M::A* scores) {
  using A = typename M::A;
  for (int64_t r = 0; r < count; r += kRows, rows += steps * kRows, scores += kRows * kLanes<A>) {
    product<M, false>(rows, lane, smaller(steps, kLongest), scores);
    for (int64_t s = kLongest; s < steps; s += kLongest) {
      product<M, true>(rows + s * kRows, lane + s * kLanes<A>, smaller(steps - s, kLongest), scores);
    }
  }
}

// sums[c][l] += rows[..][c] weights[..][l] over the `count` tokens of one block of packed channels
template <class M>
inline void gather(const typename M::Unit* rows, const typename M::Unit* weights, int64_t count, int64_t channels,
                   typename M::A* sums) {
  using A = typename M::A;
  constexpr int64_t room = kBlock / M::pair * kRows;
  const int64_t steps = pieces(count, M::pair);
  for (int64_t c = 0; c < channels; c += kRows, rows += room) {
    for (int64_t s = 0; s < steps; s += kLongest) {
      product<M, true>(rows + s * kRows, weights + s * kLanes<A>, smaller(steps - s, kLongest), sums + c * kLanes<A>);
    }
  }
}

// out[l][c] = sums[c][l] * factor[l] for the first `count` lanes
template <class M>
inline void put_lanes(typename M::A* sums, const typename M::A* factor, int64_t count, int64_t channels,
                      typename M::Type* out, int64_t token, const int64_t* index, int64_t first) {
  for (int64_t l = 0; l < count; ++l) {
    auto* p = out + (index ? index[first + l] : first + l) * token;
    for (int64_t c = 0; c < channels; ++c) {
      p[c] = from_float<typename M::Type>(sums[c * kLanes<typename M::A> + l] * factor[l]);
    }
  }
}

// ---- which keys take part
struct Kept {
  bool all;
  Buffer<int64_t> index, count;  // (B, K), (B)

  explicit Kept(const CrossAttentionArgs& a) : all(!a.padding), index(all ? 0 : a.batch * a.keys), count(a.batch) {
    for (int64_t b = 0; b < a.batch; ++b) {
      count[b] = all ? a.keys : 0;
      for (int64_t j = 0; j < (all ? 0 : a.keys); ++j) {
        if (!a.padding[b * a.keys + j]) index[b * a.keys + count[b]++] = j;
      }
    }
  }
  const int64_t* of(int64_t b, int64_t keys) { return all ? nullptr : &index[b * keys]; }
};

// Heads that are packed at a time: enough for the threads to share their tasks evenly, at least one.
inline int64_t heads_a_round(int64_t heads, int64_t tasks_a_head, int threads) {
  const int64_t wanted = pieces(int64_t(threads) * 16, tasks_a_head > 0 ? tasks_a_head : 1);
  return smaller(heads, wanted > 1 ? wanted : 1);
}

}  // namespace
}  // namespace fourdperf::FOURDPERF_ISA
