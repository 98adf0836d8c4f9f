// cross_attention on the CPU, forward. The header states maths and shapes, cross_attention_tile.h the packing.
//
// maths     online softmax in powers of two: with x_j = +-q . k_j, c = |scale| log2(e) and m a number not far from the
//           largest x_j so far, out = sum_j 2^(c (x_j - m)) v_j / sum_j 2^(c (x_j - m))
// shapes    lanes are queries, rows are keys (for scores) and channels of the values (for sums)
// work      a task owns kTiles tiles of kLanes queries of one head and walks over all keys, kBlock at a time
// numerics  m follows the largest score only when it lags by 8 bits or more, each lane for itself: sums stay below
//           2^8 times the number of keys and need rescaling rarely; sums are kept per block, then added
// limits    scores of -infinity get weight 0; a row of them only gives NaN, as in torch
#include "cross_attention/cross_attention_tile.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

// A stand-in for -infinity that can be multiplied by c and subtracted.
template <class A> constexpr A kLowest = sizeof(A) == 8 ? A(-1e300) : A(-1e30);

template <class M> struct Scratch {
  using A = typename M::A;
  int64_t lane_units, state;
  Buffer<typename M::Unit> queries, weights;
  Buffer<A> scores, sums;  // sums: per tile the maxima, the totals, then the sums of every value channel

  Scratch(const CrossAttentionArgs& a)
      : lane_units(steps_of<M>(a.size) * kLanes<M>), state((2 + pieces(a.value_size, M::kRows) * M::kRows) * kLanes<M>),
        queries(a.threads * kTiles * lane_units), weights(a.threads * kBlock / M::pair * kLanes<M>),
        scores(a.threads * kBlock * kLanes<M>), sums(a.threads * kTiles * state) {}
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

template <class T> void run(const CrossAttentionArgs& a) {
  using M = typename mode_of<T>::type;
  using A = typename M::A;
  using Unit = typename M::Unit;
  Kept kept(a);
  const int64_t heads = a.batch * a.heads, per_task = kTiles * kLanes<M>, tasks = pieces(a.queries, per_task);
  const int64_t round = heads_a_round(heads, tasks, a.threads), steps = steps_of<M>(a.size);
  const int64_t key_room = token_room<M>(a.keys, a.size), value_room = channel_room<M>(a.keys, a.value_size);
  const int64_t value_block = channel_room<M>(1, a.value_size);
  Buffer<Unit> packed_keys(round * key_room), packed_values(round * value_room);
  Scratch<M> scratch(a);
  const A c = A((a.scale < 0 ? -a.scale : a.scale) * 1.4426950408889634);
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
    for (int64_t task = 0; task < members * tasks; ++task) {
      const int64_t member = task / tasks, b = (begin + member) / a.heads, h = (begin + member) % a.heads;
      const int64_t first = task % tasks * per_task, thread = omp_get_thread_num(), keys = kept.count[b];
      const int64_t tiles = pieces(smaller(a.queries - first, per_task), kLanes<M>);
      Unit* queries = &scratch.queries[thread * kTiles * scratch.lane_units];
      A* state = &scratch.sums[thread * kTiles * scratch.state];
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t q = first + t * kLanes<M>;
        pack_slots<M>(head_of<T>(a.q, b, h, a.queries, nullptr), q, smaller(a.queries - q, kLanes<M>), a.size, kLanes<M>, a.scale < 0,
                      queries + t * scratch.lane_units);
        A* s = state + t * scratch.state;
        for (int64_t i = 0; i < kLanes<M>; ++i) s[i] = kLowest<A>;
        memset(s + kLanes<M>, 0, size_t(scratch.state - kLanes<M>) * sizeof(A));
      }
      A* scores = &scratch.scores[thread * kBlock * kLanes<M>];
      Unit* weights = &scratch.weights[thread * kBlock / M::pair * kLanes<M>];
      for (int64_t k = 0; k < keys; k += kBlock) {
        const int64_t count = smaller(keys - k, kBlock);
        for (int64_t t = 0; t < tiles; ++t) {
          A* of = state + t * scratch.state;
          score<M>(&packed_keys[member * key_room + k * steps], queries + t * scratch.lane_units, count, steps, scores);
          follow<M>(scores, count, a.value_size, c, of);
          weigh<M>(scores, count, c, weights, of);
          gather<M>(&packed_values[member * value_room + k / kBlock * value_block], weights, count, a.value_size,
                    of + 2 * kLanes<M>);
        }
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t q = first + t * kLanes<M>, count = smaller(a.queries - q, kLanes<M>);
        A *maxima = state + t * scratch.state, *totals = maxima + kLanes<M>;
        A* stats = static_cast<A*>(a.stats) + (b * a.heads + h) * 2 * a.queries + q;
        for (int64_t l = 0; l < count; ++l) {
          totals[l] = keys ? A(1) / totals[l] : A(0);
          stats[l] = maxima[l];
          stats[a.queries + l] = totals[l];
        }
        T* out = static_cast<T*>(a.out) + (b * a.queries * a.heads + h) * a.value_size;
        put_lanes<M>(totals + kLanes<M>, totals, count, a.value_size, out, a.heads * a.value_size, nullptr, q);
      }
    }
  }
}

}  // namespace

void cross_attention(const CrossAttentionArgs& a) {
  if (a.batch == 0 || a.heads == 0 || a.queries == 0) return;
  with_dtype(a.dtype, [&](auto tag) { run<untag<decltype(tag)>>(a); });
}

}  // namespace fourdperf::FOURDPERF_ISA
