// cross_attention on the CPU, forward. The header states maths and shapes, cross_attention_tile.h the packing.
//
// maths     online softmax in powers of two: with x_j = +-q . k_j, c = |scale| log2(e) and m a number not far from the
//           largest x_j so far, out = sum_j 2^(c (x_j - m)) v_j / sum_j 2^(c (x_j - m))
// shapes    lanes are queries, rows are keys (for scores) and channels of the values (for sums)
// work      a task owns kTiles tiles of kLanes queries of one head and walks over all keys, kBlock at a time; where that is all
//           the queries, a task is a group of heads, and keys and values are copied when their turn comes
// numerics  m follows the largest score only when it lags by 8 bits or more, each lane for itself: sums stay below
//           2^8 times the number of keys and need rescaling rarely; sums are kept per block, then added
// limits    scores of -infinity get weight 0; a row of them only gives NaN, as in torch
#include "cross_attention/cross_attention_tile.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

// A stand-in for -infinity that can be multiplied by c and subtracted.
template <class A> constexpr A kLowest = sizeof(A) == 8 ? A(-1e300) : A(-1e30);

constexpr int64_t kGroup = 1 << 20;  // bytes that the tiles of the heads of a task may take

// A thread's room: the tiles of `heads` heads, and one block's scores and weights.
template <class M> struct Scratch {
  using A = typename M::A;
  int64_t tiles, lane_units, state;
  Buffer<typename M::Unit> queries, weights;
  Buffer<A> scores, sums;  // sums: per tile the maxima, the totals, then the sums of every value channel

  Scratch(const CrossAttentionArgs& a, int64_t heads)
      : tiles(smaller(kTiles, pieces(a.queries, kLanes<M>))), lane_units(steps_of<M>(a.size) * kLanes<M>), state(state_of(a)),
        queries(a.threads * heads * tiles * lane_units), weights(a.threads * kBlock / M::pair * kLanes<M>),
        scores(a.threads * kBlock * kLanes<M>), sums(a.threads * heads * tiles * state) {}
  static int64_t state_of(const CrossAttentionArgs& a) { return (2 + pieces(a.value_size, M::kRows) * M::kRows) * kLanes<M>; }
};

// What the scores of one block of keys ask of the state of one tile of queries: maxima that do not lag.
template <class M>
inline void follow(const typename M::A* scores, int64_t count, int64_t channels, typename M::A c, typename M::A* state) {
  using A = typename M::A;
  A *maxima = state, *totals = state + kLanes<M>, *sums = totals + kLanes<M>;
  for (int64_t at = 0; at < kLanes<M>; at += lanes<A>) {
    vec<A> most[4];  // four at a time: each waits for its last
    for (int64_t i = 0; i < 4; ++i) most[i] = load<A>(scores + smaller(i, count - 1) * kLanes<M> + at);
    for (int64_t r = 4; r < count; r += 4) {
      for (int64_t i = 0; i < 4; ++i) most[i] = max(load<A>(scores + smaller(r + i, count - 1) * kLanes<M> + at), most[i]);
    }
    const vec<A> largest = max(max(most[0], most[1]), max(most[2], most[3])), before = load<A>(maxima + at);
    const auto lags = (largest - before) * broadcast<A>(c) > broadcast<A>(A(8));
    if (!any(lags)) continue;
    const vec<A> m = lags ? M::near(largest, c) : before, shrink = exp2((before - m) * broadcast<A>(c));
    store(maxima + at, m);
    store(totals + at, load<A>(totals + at) * shrink);
    for (int64_t e = 0; e < channels; ++e) store(sums + e * kLanes<M> + at, load<A>(sums + e * kLanes<M> + at) * shrink);
  }
}

// Scores to weights, which are added to the totals; zeros from `count` on, to a whole step.
template <class M>
inline void weigh(const typename M::A* scores, int64_t count, typename M::A c, typename M::Unit* weights,
                  typename M::A* state) {
  using A = typename M::A;
  A* totals = state + kLanes<M>;
  for (int64_t at = 0; at < kLanes<M>; at += lanes<A>) {
    const vec<A> m = load<A>(state + at);
    vec<A> total = {};
    if constexpr (M::kStep > 1) {
      total = M::weigh(scores + at, count, m, c, weights + at);
      store(totals + at, load<A>(totals + at) + total);
      continue;
    }
    for (int64_t r = 0; r < steps_of<M>(count) * M::pair; r += M::pair) {
      vec<A> p[M::pair] = {};
      for (int i = 0; i < M::pair && r + i < count; ++i) {
        p[i] = weight<M>(load<A>(scores + (r + i) * kLanes<M> + at), m, c);
        total += p[i];
      }
      M::put(weights + r / M::pair * kLanes<M> + at, p);
    }
    store(totals + at, load<A>(totals + at) + total);
  }
}

// Queries from `first` on, up to kTiles tiles of them, of one head; `place` is theirs in the scratch.
template <class M> struct Task {
  using A = typename M::A;
  using T = typename M::Type;
  const CrossAttentionArgs& a;
  Scratch<M>& scratch;
  int64_t b, h, first, place;

  int64_t tiles() const { return smaller(kTiles, pieces(a.queries - first, kLanes<M>)); }
  typename M::Unit* queries(int64_t t) const { return &scratch.queries[(place * scratch.tiles + t) * scratch.lane_units]; }
  A* state(int64_t t) const { return &scratch.sums[(place * scratch.tiles + t) * scratch.state]; }

  void begin() const {
    for (int64_t t = 0; t < tiles(); ++t) {
      const int64_t q = first + t * kLanes<M>;
      pack_slots<M>(head_of<T>(a.q, b, h, a.queries, nullptr), q, smaller(a.queries - q, kLanes<M>), a.size, kLanes<M>,
                    a.scale < 0, queries(t));
      for (int64_t i = 0; i < kLanes<M>; ++i) state(t)[i] = kLowest<A>;
      memset(state(t) + kLanes<M>, 0, size_t(scratch.state - kLanes<M>) * sizeof(A));
    }
  }

  // One block of `count` keys and their values.
  template <class Keys, class Values> void add(const Keys& keys, const Values& values, int64_t count) const {
    const int64_t thread = omp_get_thread_num(), steps = steps_of<M>(a.size);
    const A c = A((a.scale < 0 ? -a.scale : a.scale) * 1.4426950408889634);
    A* scores = &scratch.scores[thread * kBlock * kLanes<M>];
    auto* weights = &scratch.weights[thread * kBlock / M::pair * kLanes<M>];
    for (int64_t t = 0; t < tiles(); ++t) {
      A* of = state(t);
      score<M>(keys, queries(t), count, steps, scores);
      follow<M>(scores, count, a.value_size, c, of);
      weigh<M>(scores, count, c, weights, of);
      gather<M>(values, weights, count, a.value_size, of + 2 * kLanes<M>);
    }
  }

  void finish(bool any) const {
    for (int64_t t = 0; t < tiles(); ++t) {
      const int64_t q = first + t * kLanes<M>, count = smaller(a.queries - q, kLanes<M>);
      A *maxima = state(t), *totals = maxima + kLanes<M>;
      A* stats = static_cast<A*>(a.stats) + (b * a.heads + h) * 2 * a.queries + q;
      for (int64_t l = 0; l < count; ++l) {
        totals[l] = any ? A(1) / totals[l] : A(0);
        stats[l] = maxima[l];
        stats[a.queries + l] = totals[l];
      }
      T* out = static_cast<T*>(a.out) + (b * a.queries * a.heads + h) * a.value_size;
      put_lanes<M>(totals + kLanes<M>, totals, count, a.value_size, out, a.heads * a.value_size, nullptr, q);
    }
  }
};

// Many queries: keys and values of a round of heads are packed first, for all tasks.
template <class M> void attend_many(const CrossAttentionArgs& a, Kept& kept) {
  using T = typename M::Type;
  using Unit = typename M::Unit;
  const int64_t heads = a.batch * a.heads, per_task = kTiles * kLanes<M>, tasks = pieces(a.queries, per_task);
  const int64_t round = heads_a_round(heads, tasks, a.threads), steps = steps_of<M>(a.size);
  const int64_t key_room = token_room<M>(a.keys, a.size), value_room = channel_room<M>(a.keys, a.value_size);
  const int64_t value_block = channel_room<M>(1, a.value_size);
  Buffer<Unit> packed_keys(round * key_room), packed_values(round * value_room);
  Scratch<M> scratch(a, 1);
#pragma omp parallel num_threads(a.threads)
  for (int64_t begin = 0; begin < heads; begin += round) {
    [[maybe_unused]] const typename M::Session session;
    const int64_t members = smaller(round, heads - begin);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < members * 2; ++i) {
      const int64_t b = (begin + i / 2) / a.heads, h = (begin + i / 2) % a.heads;
      const Head<T> x = head_of<T>(i % 2 ? a.v : a.k, b, h, kept.count[b], kept.of(b, a.keys));
      if (i % 2) {
        pack_channels<M>(x, kept.count[b], a.value_size, &packed_values[i / 2 * value_room]);
      } else {
        pack_tokens<M>(x, kept.count[b], a.size, false, &packed_keys[i / 2 * key_room]);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < members * tasks; ++i) {
      const int64_t member = i / tasks, b = (begin + member) / a.heads, h = (begin + member) % a.heads, keys = kept.count[b];
      const Task<M> task{a, scratch, b, h, i % tasks * per_task, omp_get_thread_num()};
      task.begin();
      for (int64_t k = 0; k < keys; k += kBlock) {
        task.add(packed_tokens<M>(&packed_keys[member * key_room + k * steps], steps),
                 packed_channels<M>(&packed_values[member * value_room + k / kBlock * value_block]), smaller(keys - k, kBlock));
      }
      task.finish(keys > 0);
    }
  }
}

// Few queries, one task a head: keys and values serve once, so a block of them at a time is copied to the first-level cache
// (packed for AMX). A thread takes neighbouring heads block by block, since they share pages.
template <class M> void attend_few(const CrossAttentionArgs& a, Kept& kept) {
  using T = typename M::Type;
  const int64_t width = pieces(a.size, M::pair), value_width = pieces(a.value_size, M::kRows) * M::kRows;
  const int64_t key_room = token_room<M>(kBlock, a.size), room = key_room + channel_room<M>(1, a.value_size);
  const int64_t state = pieces(a.queries, kLanes<M>) * (Scratch<M>::state_of(a) + steps_of<M>(a.size) * kLanes<M>);
  const int64_t fit = larger(1, kGroup / (state * int64_t(sizeof(typename M::A))));
  const int64_t group = smaller(fit, pieces(a.heads, pieces(a.threads, a.batch))), groups = pieces(a.heads, group);
  Buffer<typename M::Unit> blocks(a.threads * room);
  Scratch<M> scratch(a, group);
#pragma omp parallel num_threads(a.threads)
  {
    [[maybe_unused]] const typename M::Session session;
    auto *keys = &blocks[omp_get_thread_num() * room], *values = keys + key_room;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.batch * groups; ++i) {
      const int64_t b = i / groups, first = i % groups * group, heads = smaller(group, a.heads - first), count = kept.count[b];
      const auto task = [&](int64_t g) { return Task<M>{a, scratch, b, first + g, 0, omp_get_thread_num() * group + g}; };
      const auto head = [&](const Strided& x, int64_t g) { return head_of<T>(x, b, first + g, count, kept.of(b, a.keys)); };
      for (int64_t g = 0; g < heads; ++g) task(g).begin();
      for (int64_t k = 0; k < count; k += kBlock) {
        const int64_t some = smaller(count - k, kBlock);
        for (int64_t g = 0; g < heads; ++g) {
          if constexpr (M::kStep > 1) {
            pack_tokens<M>(head(a.k, g).from(k), some, a.size, false, keys);
            pack_channels<M>(head(a.v, g).from(k), some, a.value_size, values);
            task(g).add(packed_tokens<M>(keys, steps_of<M>(a.size)), packed_channels<M>(values), some);
          } else {
            copy_tokens<M>(head(a.k, g).from(k), some, a.size, width, keys);
            copy_channels<M>(head(a.v, g).from(k), some, a.value_size, value_width, values);
            task(g).add(TokenRows<M>{keys, width}, ChannelRows<M>{values, value_width}, some);
          }
        }
      }
      for (int64_t g = 0; g < heads; ++g) task(g).finish(count > 0);
    }
  }
}

template <class T> void run(const CrossAttentionArgs& a) {
  using M = typename mode_of<T>::type;
  Kept kept(a);
  if (a.queries > kTiles * kLanes<M>) return attend_many<M>(a, kept);
  if constexpr (M::kVectors == 3) {
    const int64_t vectors = pieces(a.queries, lanes<typename M::A>);
    if (vectors == 1) return attend_few<Narrow<M, 1>>(a, kept);
    const int64_t by_two = pieces(vectors, 2);
    if (by_two <= kTiles && 2 * by_two < 3 * pieces(vectors, 3)) return attend_few<Narrow<M, 2>>(a, kept);
  }
  attend_few<M>(a, kept);
}

}  // namespace

void cross_attention(const CrossAttentionArgs& a) {
  if (a.batch == 0 || a.heads == 0 || a.queries == 0) return;
  with_dtype(a.dtype, [&](auto tag) { run<untag<decltype(tag)>>(a); });
}

}  // namespace fourdperf::FOURDPERF_ISA
