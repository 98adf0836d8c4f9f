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

#include "common/dispatch.h"
#include "cross_attention/cross_attention_modes.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

// ---- packing

// Tokens first .. first + count in tiles of `slots`: [tile][step of channels][slots]; slots beyond the end are zero
template <class M>
inline void pack_slots(const Head<typename M::Type>& x, int64_t first, int64_t count, int64_t channels, int64_t slots,
                       bool negate, typename M::Unit* dst) {
  using Unit = typename M::Unit;
  const int64_t steps = steps_of<M>(channels), whole = channels / M::pair, begun = pieces(channels, M::pair);
  const int64_t room = steps * slots, tiles = pieces(count, slots), zeros = begun < steps ? 0 : count / slots;
  memset(dst + zeros * room, 0, size_t((tiles - zeros) * room) * sizeof(Unit));
  const auto at = [&](int64_t r, int64_t s) { return dst + r / slots * room + s * slots + r % slots; };
  // whole squares of tokens and steps are transposed in registers
  constexpr int square = lanes<typename M::A>;
  const int64_t run = smaller(square, slots), squares = x.channel == 1 && square % run == 0 && slots % run == 0;
  const int64_t tokens_done = squares * (count / square * square), steps_done = whole / square * square;
  for (int64_t r = 0; r < tokens_done; r += square) {
    for (int i = 0; i < square; ++i) x.expect(first + r + square + i, channels);
    for (int64_t s = 0; s < steps_done; s += square) {
      vec<typename M::A> v[square];
      for (int i = 0; i < square; ++i) v[i] = M::units(x.row(first + r + i) + s * M::pair);
      transpose(v);
      for (int i = 0; i < square; ++i) {
        for (int64_t j = 0; j < square; j += run) {
          memcpy(at(r + j, s + i), reinterpret_cast<const char*>(&v[i]) + j * sizeof(Unit), size_t(run) * sizeof(Unit));
        }
      }
    }
  }
  for (int64_t r = steps_done == begun ? tokens_done : 0; r < count; ++r) {
    const auto* p = x.row(first + r);
    Unit* to = at(r, 0);
    x.expect(first + r + kAhead, channels);
    if (x.channel == 1) {
      for (int64_t s = r < tokens_done ? steps_done : 0; s < whole; ++s) to[s * slots] = M::unit(p + s * M::pair);
    } else {
      for (int64_t s = 0; s < whole; ++s) {
        const auto* c = p + s * M::pair * x.channel;
        to[s * slots] = M::unit(c, c + (M::pair - 1) * x.channel);
      }
    }
    if (whole < begun) to[whole * slots] = M::half_unit(p + whole * M::pair * x.channel);
  }
  for (int64_t i = 0; i < (negate ? tiles * room : 0); ++i) dst[i] = M::negative(dst[i]);
}

// Tokens as rows whose channels are summed over: [tile of kRows tokens][step of channels][kRows]
template <class M>
inline void pack_tokens(const Head<typename M::Type>& x, int64_t tokens, int64_t channels, bool negate,
                        typename M::Unit* dst) {
  if constexpr (M::kStep == 1) return pack_slots<M>(x, 0, tokens, channels, M::kRows, negate, dst);
  else {
    for (int64_t first = 0; first < tokens; first += M::kRows, dst += steps_of<M>(channels) * M::kRows) {
      M::pack_rows(x, first, smaller(tokens - first, M::kRows), channels, negate, dst);
    }
  }
}

// Channels as rows, tokens summed over: [block of kBlock tokens][tile of kRows channels][step of tokens][kRows]
template <class M>
inline void pack_channels(const Head<typename M::Type>& x, int64_t tokens, int64_t channels, typename M::Unit* dst) {
  constexpr int64_t steps = kBlock / M::pair;
  const int64_t tiles = pieces(channels, M::kRows);
  for (int64_t first = 0; first < tokens; first += kBlock, dst += tiles * steps * M::kRows) {
    const int64_t count = smaller(tokens - first, kBlock);
    if constexpr (M::kStep > 1) {
      M::pack_block(x, first, count, channels, dst);
      continue;
    }
    if (count < kBlock || channels % M::kRows) memset(dst, 0, size_t(tiles * steps * M::kRows) * sizeof(*dst));
    for (int64_t t = 0; t < count; t += M::pair) {
      for (int i = 0; i < M::pair; ++i) x.expect(first + t + i + kAhead, channels);
      const auto *p = x.row(first + t), *q = t + M::pair <= count ? x.row(first + t + M::pair - 1) : nullptr;
      auto* out = dst + t / M::pair * M::kRows;
      for (int64_t c = 0; c < channels; c += M::kRows, out += steps * M::kRows) {
        const int64_t width = smaller(channels - c, M::kRows);
        if (q && width == M::kRows && x.channel == 1) {
          for (int r = 0; r < M::kRows; ++r) out[r] = M::unit(p + c + r, q + c + r);
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

// One block of tokens as they come: [token][width] units; zeros beyond `count`
template <class M>
inline void copy_tokens(const Head<typename M::Type>& x, int64_t count, int64_t channels, int64_t width, typename M::Unit* dst) {
  if (count < kBlock) memset(dst + count * width, 0, size_t((kBlock - count) * width) * sizeof(*dst));
  for (int64_t t = 0; t < count; ++t, dst += width) {
    const auto* p = x.row(t);
    if (x.channel == 1) {
      M::copy(p, channels, dst);
      continue;
    }
    for (int64_t c = 0; c < channels; c += M::pair) {
      const auto* at = p + c * x.channel;
      dst[c / M::pair] = c + M::pair <= channels ? M::unit(at, at + (M::pair - 1) * x.channel) : M::half_unit(at);
    }
  }
}

// One block of tokens whose channels are rows: [step of tokens][width] units; zeros beyond `channels`
template <class M>
inline void copy_channels(const Head<typename M::Type>& x, int64_t count, int64_t channels, int64_t width, typename M::Unit* dst) {
  for (int64_t t = 0; t < count; t += M::pair, dst += width) {
    const auto *p = x.row(t), *q = t + M::pair <= count ? x.row(t + M::pair - 1) : nullptr;
    memset(dst + channels, 0, size_t(width - channels) * sizeof(*dst));
    if (x.channel == 1 && q) {
      M::copy(p, q, channels, dst);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      dst[c] = q ? M::unit(p + c * x.channel, q + c * x.channel) : M::half_unit(p + c * x.channel);
    }
  }
}

// Units that the two layouts take.
template <class M> int64_t token_room(int64_t tokens, int64_t channels) {
  return pieces(tokens, M::kRows) * M::kRows * steps_of<M>(channels);
}
template <class M> int64_t channel_room(int64_t tokens, int64_t channels) {
  return pieces(tokens, kBlock) * pieces(channels, M::kRows) * M::kRows * (kBlock / M::pair);
}

// ---- where the rows of products lie: packed, or token after token
template <class M> struct PackedRows {
  const typename M::Unit* at;
  int64_t tile;  // units of a tile
  typename M::Unit operator()(int64_t s, int r) const { return at[s * M::kRows + r]; }
  PackedRows from(int64_t i, int64_t s) const { return {at + i * tile + s * M::kRows, tile}; }
};
template <class M> PackedRows<M> packed_tokens(const typename M::Unit* from, int64_t steps) { return {from, steps * M::kRows}; }
template <class M> PackedRows<M> packed_channels(const typename M::Unit* block) { return {block, kBlock / M::pair * M::kRows}; }
template <class M> struct TokenRows {
  const typename M::Unit* at;
  int64_t token;
  typename M::Unit operator()(int64_t s, int r) const { return at[r * token + s]; }
  TokenRows from(int64_t i, int64_t s) const { return {at + i * M::kRows * token + s, token}; }
};
template <class M> struct ChannelRows {
  const typename M::Unit* at;
  int64_t token;
  typename M::Unit operator()(int64_t s, int r) const { return at[s * token + r]; }
  ChannelRows from(int64_t i, int64_t s) const { return {at + i * M::kRows + s * token, token}; }
};

// ---- the product: out[r][l] = (kAdd ? out[r][l] : 0) + sum_s rows[s][r] lanes[s][l], r < kRows, l < kLanes
template <class M, bool kAdd, class Rows>
inline void product(const Rows rows, const typename M::Unit* lane, int64_t steps, typename M::A* out) {
  if constexpr (M::kStep > 1) return M::template product<kAdd>(rows.at, lane, steps, out);
  using A = typename M::A;
  constexpr int step = lanes<A>;
  // all loops over registers are unrolled before anything else, or gcc keeps the sums in memory
  vec<A> sum[M::kRows][M::kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < M::kRows; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < M::kVectors; ++j) sum[r][j] = vec<A>{};
  }
  for (int64_t s = 0; s < steps; ++s) {
    typename M::Units x[M::kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < M::kVectors; ++j) {
      memcpy(&x[j], lane + s * kLanes<M> + j * step, sizeof(x[j]));
      hold(x[j]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < M::kRows; ++r) {
      const auto row = rows(s, r);
#pragma GCC unroll 3
      for (int j = 0; j < M::kVectors; ++j) sum[r][j] = M::madd(sum[r][j], x[j], row);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M::kRows; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < M::kVectors; ++j) {
      A* p = out + r * kLanes<M> + j * step;
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

// 2^(c (x - m))
template <class M, class A = typename M::A> inline vec<A> weight(vec<A> x, vec<A> m, A c) {
  if constexpr (M::kStep > 1) return typename M::Weights(m, c).of(x);
  else return M::power(Power<A>(m, c).of(x));
}

// scores[r][l] for the first `count` rows (rounded up to kRows) of tokens
template <class M, class Rows>
inline void score(const Rows& rows, const typename M::Unit* lane, int64_t count, int64_t steps, typename M::A* scores) {
  for (int64_t i = 0; i < pieces(count, M::kRows); ++i, scores += M::kRows * kLanes<M>) {
    product<M, false>(rows.from(i, 0), lane, smaller(steps, kLongest), scores);
    for (int64_t s = kLongest; s < steps; s += kLongest) {
      product<M, true>(rows.from(i, s), lane + s * kLanes<M>, smaller(steps - s, kLongest), scores);
    }
  }
}

// sums[c][l] += rows[..][c] weights[..][l] over the `count` tokens of one block of channels
template <class M, class Rows>
inline void gather(const Rows& rows, const typename M::Unit* weights, int64_t count, int64_t channels, typename M::A* sums) {
  const int64_t steps = steps_of<M>(count);
  for (int64_t i = 0; i < pieces(channels, M::kRows); ++i, sums += M::kRows * kLanes<M>) {
    for (int64_t s = 0; s < steps; s += kLongest) {
      product<M, true>(rows.from(i, s), weights + s * kLanes<M>, smaller(steps - s, kLongest), sums);
    }
  }
}

// out[l][c] = sums[c][l] * factor[l] for the first `count` lanes
template <class M>
inline void put_lanes(typename M::A* sums, const typename M::A* factor, int64_t count, int64_t channels,
                      typename M::Type* out, int64_t token, const int64_t* index, int64_t first) {
  using A = typename M::A;
  for (int64_t l = 0; l < count; l += lanes<A>) {
    for (int64_t c = 0; c < channels; c += lanes<A>) {
      vec<A> v[lanes<A>];
      for (int i = 0; i < lanes<A>; ++i) {
        v[i] = c + i < channels ? load<A>(sums + (c + i) * kLanes<M> + l) * load<A>(factor + l) : vec<A>{};
      }
      transpose(v);
      const int width = int(smaller(channels - c, lanes<A>));
      for (int64_t i = 0; i < smaller(count - l, lanes<A>); ++i) {
        store(out + (index ? index[first + l + i] : first + l + i) * token + c, v[i], width);
      }
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

// Heads that are packed at a time: enough for the threads to share their tasks evenly, two for each thread at most (fresh
// memory costs more than a turn of the threads).
inline int64_t heads_a_round(int64_t heads, int64_t tasks_a_head, int threads) {
  const int64_t wanted = pieces(int64_t(threads) * 16, tasks_a_head > 0 ? tasks_a_head : 1);
  return smaller(heads, smaller(wanted, 2 * int64_t(threads)));
}

}  // namespace
}  // namespace fourdperf::FOURDPERF_ISA
