// cross_attention on the CPU, backward. The header states maths and shapes, cross_attention_tile.h the packing.
//
// maths     p[i, j] is computed again from stats. Two passes over all pairs (query, key): one sums d_q over the keys, one
//           d_k and d_v over the queries; each writes what it owns, so nothing is added across threads.
// shapes    first pass: lanes are queries, rows keys; second pass: lanes are keys, rows queries
// work      first pass: a task is one tile of queries, and keeps p and d_out . v for all keys, since delta comes before t;
//           second pass: as in the forward, kTiles tiles of lanes walk over the rows together, kBlock at a time
// numerics  delta_i = sum_j p[i, j] d_out_i . v_j, not d_out_i . out_i: with rounded outputs the difference t would be
//           noise wherever one key dominates. Seven products where five would do: the price of sums in one order.
// limits    d_k and d_v of keys that are padding are zero; scratch is 2 K kLanes numbers a thread
#include "cross_attention/cross_attention_tile.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

// What the softmax left behind for one tile of queries, or one block of them.
template <class A> struct Stats { const A *largest, *factor, *delta; };

// scores become p = 2^(c (scores - largest)) factor; delta += p deltas. Lanes are queries.
template <class M>
inline void weigh_queries(typename M::A* scores, const typename M::A* deltas, int64_t count, typename M::A c,
                          const typename M::A* largest, const typename M::A* factor, typename M::A* delta) {
  using A = typename M::A;
  for (int j = 0; j < M::kVectors; ++j) {
    const int at = j * lanes<A>;
    vec<A> sum = {};
    const vec<A> m = load<A>(largest + at);
    for (int64_t r = 0; r < count; ++r) {
      A* score = scores + r * kLanes<M> + at;
      const vec<A> p = weight<M>(load<A>(score), m, c) * load<A>(factor + at);
      store(score, p);
      sum += p * load<A>(deltas + r * kLanes<M> + at);
    }
    store(delta + at, load<A>(delta + at) + sum);
  }
}

// t = p (deltas - delta). Lanes are queries.
template <class M>
inline void differ_queries(const typename M::A* p, const typename M::A* deltas, int64_t count, const typename M::A* delta,
                           typename M::Unit* weights) {
  using A = typename M::A;
  for (int j = 0; j < M::kVectors; ++j) {
    const int at = j * lanes<A>;
    for (int64_t r = 0; r < steps_of<M>(count) * M::pair; r += M::pair) {
      vec<A> t[M::pair] = {};
      for (int i = 0; i < M::pair && r + i < count; ++i) {
        const int64_t row = (r + i) * kLanes<M> + at;
        t[i] = load<A>(p + row) * (load<A>(deltas + row) - load<A>(delta + at));
      }
      M::put(weights + r / M::pair * kLanes<M> + at, t);
    }
  }
}

// Both p and t, as units. Lanes are keys, stats belong to rows.
template <class M>
inline void weigh_keys(const typename M::A* scores, const typename M::A* deltas, int64_t count, typename M::A c,
                       Stats<typename M::A> stats, typename M::Unit* weights_p, typename M::Unit* weights_t) {
  using A = typename M::A;
  for (int j = 0; j < M::kVectors; ++j) {
    const int at = j * lanes<A>;
    for (int64_t r = 0; r < steps_of<M>(count) * M::pair; r += M::pair) {
      vec<A> p[M::pair] = {}, t[M::pair] = {};
      for (int i = 0; i < M::pair && r + i < count; ++i) {
        const int64_t row = (r + i) * kLanes<M> + at;
        p[i] = weight<M>(load<A>(scores + row), broadcast<A>(stats.largest[r + i]), c) * broadcast<A>(stats.factor[r + i]);
        t[i] = p[i] * (load<A>(deltas + row) - broadcast<A>(stats.delta[r + i]));
      }
      M::put(weights_p + r / M::pair * kLanes<M> + at, p);
      M::put(weights_t + r / M::pair * kLanes<M> + at, t);
    }
  }
}

template <class T> struct Backward {
  using M = typename mode_of<T>::type;
  using A = typename M::A;
  using Unit = typename M::Unit;
  const CrossAttentionArgs& a;
  Kept kept;
  const int64_t heads, steps, value_steps;                                  // steps of units along D and E
  const int64_t lane_units, value_lane_units, sums_room, value_sums_room;  // of one tile
  const bool negate;
  const A c;
  Buffer<A> delta;  // (B, H, Q)

  explicit Backward(const CrossAttentionArgs& a)
      : a(a), kept(a), heads(a.batch * a.heads), steps(steps_of<M>(a.size)), value_steps(steps_of<M>(a.value_size)),
        lane_units(steps * kLanes<M>), value_lane_units(value_steps * kLanes<M>),
        sums_room(pieces(a.size, M::kRows) * M::kRows * kLanes<M>), value_sums_room(pieces(a.value_size, M::kRows) * M::kRows * kLanes<M>),
        negate(a.scale < 0), c(A((negate ? -a.scale : a.scale) * 1.4426950408889634)), delta(heads * a.queries) {}

  Stats<A> stats(int64_t head) {
    const A* largest = static_cast<const A*>(a.stats) + head * 2 * a.queries;
    return {largest, largest + a.queries, &delta[head * a.queries]};
  }

  void for_queries() {
    const int64_t tasks = pieces(a.queries, kLanes<M>), round = heads_a_round(heads, tasks, a.threads);
    const int64_t key_room = token_room<M>(a.keys, a.size), value_room = token_room<M>(a.keys, a.value_size);
    const int64_t room = key_room + value_room + channel_room<M>(a.keys, a.size), block = channel_room<M>(1, a.size);
    const int64_t all = pieces(a.keys, kBlock) * kBlock * kLanes<M>;
    const int64_t state_room = 3 * kLanes<M> + sums_room;
    Buffer<Unit> packed(round * room), units(a.threads * (lane_units + value_lane_units));
    Buffer<Unit> weights(a.threads * kBlock / M::pair * kLanes<M>);
    Buffer<A> pairs(a.threads * 2 * all), states(a.threads * state_room);
#pragma omp parallel num_threads(a.threads)
    for (int64_t begin = 0; begin < heads; begin += round) {
      [[maybe_unused]] const typename M::Session session;
      const int64_t members = smaller(round, heads - begin);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < members * 3; ++i) {
        const int64_t b = (begin + i / 3) / a.heads, h = (begin + i / 3) % a.heads, keys = kept.count[b];
        const int64_t* index = kept.of(b, a.keys);
        Unit* to = &packed[i / 3 * room];
        if (i % 3 == 0) pack_tokens<M>(head_of<T>(a.k, b, h, keys, index), keys, a.size, false, to);
        if (i % 3 == 1) pack_tokens<M>(head_of<T>(a.v, b, h, keys, index), keys, a.value_size, false, to + key_room);
        if (i % 3 == 2) pack_channels<M>(head_of<T>(a.k, b, h, keys, index), keys, a.size, to + key_room + value_room);
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < members * tasks; ++task) {
        const int64_t member = task / tasks, head = begin + member, b = head / a.heads, h = head % a.heads;
        const int64_t q = task % tasks * kLanes<M>, count = smaller(a.queries - q, kLanes<M>), keys = kept.count[b];
        const int64_t thread = omp_get_thread_num();
        Unit *rows = &packed[member * room], *queries = &units[thread * (lane_units + value_lane_units)];
        Unit* t = &weights[thread * kBlock / M::pair * kLanes<M>];
        A *p = &pairs[thread * 2 * all], *deltas = p + all;
        A *largest = &states[thread * state_room], *factor = largest + kLanes<M>, *sum_delta = factor + kLanes<M>;
        A* sums = sum_delta + kLanes<M>;
        pack_slots<M>(head_of<T>(a.q, b, h, a.queries, nullptr), q, count, a.size, kLanes<M>, negate, queries);
        pack_slots<M>(head_of<T>(a.d_out, b, h, a.queries, nullptr), q, count, a.value_size, kLanes<M>, false,
                      queries + lane_units);
        memset(largest, 0, size_t(state_room) * sizeof(A));  // lanes beyond the end: factor 0
        memcpy(largest, stats(head).largest + q, size_t(count) * sizeof(A));
        memcpy(factor, stats(head).factor + q, size_t(count) * sizeof(A));
        for (int64_t k = 0; k < keys; k += kBlock) {
          const int64_t some = smaller(keys - k, kBlock);
          A *p_k = p + k * kLanes<M>, *deltas_k = deltas + k * kLanes<M>;
          score<M>(packed_tokens<M>(rows + k * steps, steps), queries, some, steps, p_k);
          score<M>(packed_tokens<M>(rows + key_room + k * value_steps, value_steps), queries + lane_units, some, value_steps, deltas_k);
          weigh_queries<M>(p_k, deltas_k, some, c, largest, factor, sum_delta);
        }
        for (int64_t k = 0; k < keys; k += kBlock) {
          const int64_t some = smaller(keys - k, kBlock);
          differ_queries<M>(p + k * kLanes<M>, deltas + k * kLanes<M>, some, sum_delta, t);
          gather<M>(packed_channels<M>(rows + key_room + value_room + k / kBlock * block), t, some, a.size, sums);
        }
        memcpy(&delta[head * a.queries + q], sum_delta, size_t(count) * sizeof(A));
        for (int64_t l = 0; l < count; ++l) factor[l] = A(a.scale);
        T* d_q = static_cast<T*>(a.d_q) + (b * a.queries * a.heads + h) * a.size;
        put_lanes<M>(sums, factor, count, a.size, d_q, a.heads * a.size, nullptr, q);
      }
    }
  }

  void for_keys() {
    const int64_t per_task = kTiles * kLanes<M>, tasks = pieces(a.keys, per_task), round = heads_a_round(heads, tasks, a.threads);
    const int64_t room[4] = {token_room<M>(a.queries, a.size), token_room<M>(a.queries, a.value_size),
                             channel_room<M>(a.queries, a.size), channel_room<M>(a.queries, a.value_size)};
    const int64_t starts[4] = {0, room[0], room[0] + room[1], room[0] + room[1] + room[2]}, all = starts[3] + room[3];
    const int64_t block = channel_room<M>(1, a.size), value_block = channel_room<M>(1, a.value_size);
    const int64_t tile_units = lane_units + value_lane_units, tile_sums = sums_room + value_sums_room;
    const int64_t score_room = kBlock * kLanes<M>, weight_room = kBlock / M::pair * kLanes<M>;
    Buffer<Unit> packed(round * all), units(a.threads * kTiles * tile_units), weights(a.threads * 2 * weight_room);
    Buffer<A> scores(a.threads * 2 * score_room), sums(a.threads * kTiles * tile_sums), factors(2 * kLanes<M>);
    A *scale = factors.data(), *one = scale + kLanes<M>;
    for (int64_t l = 0; l < kLanes<M>; ++l) {
      scale[l] = A(a.scale);
      one[l] = A(1);
    }
#pragma omp parallel num_threads(a.threads)
    for (int64_t begin = 0; begin < heads; begin += round) {
      [[maybe_unused]] const typename M::Session session;
      const int64_t members = smaller(round, heads - begin);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < members * 4; ++i) {
        const int64_t b = (begin + i / 4) / a.heads, h = (begin + i / 4) % a.heads;
        Unit* to = &packed[i / 4 * all + starts[i % 4]];
        const Head<T> x = head_of<T>(i % 2 ? a.d_out : a.q, b, h, a.queries, nullptr);
        const int64_t channels = i % 2 ? a.value_size : a.size;
        if (i % 4 < 2) {
          pack_tokens<M>(x, a.queries, channels, i % 2 == 0 && negate, to);
        } else {
          pack_channels<M>(x, a.queries, channels, to);
        }
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < members * tasks; ++task) {
        const int64_t member = task / tasks, head = begin + member, b = head / a.heads, h = head % a.heads;
        const int64_t *index = kept.of(b, a.keys), keys = kept.count[b], first = task % tasks * per_task;
        if (first >= keys) continue;
        const int64_t tiles = pieces(smaller(keys - first, per_task), kLanes<M>), thread = omp_get_thread_num();
        const Stats<A> of_head = stats(head);
        Unit *rows = &packed[member * all], *tile_of = &units[thread * kTiles * tile_units];
        Unit *p = &weights[thread * 2 * weight_room], *t = p + weight_room;
        A *x = &scores[thread * 2 * score_room], *deltas = x + score_room, *sums_of = &sums[thread * kTiles * tile_sums];
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t lane = first + tile * kLanes<M>, count = smaller(keys - lane, kLanes<M>);
          Unit* to = tile_of + tile * tile_units;
          pack_slots<M>(head_of<T>(a.k, b, h, keys, index), lane, count, a.size, kLanes<M>, false, to);
          pack_slots<M>(head_of<T>(a.v, b, h, keys, index), lane, count, a.value_size, kLanes<M>, false, to + lane_units);
        }
        memset(sums_of, 0, size_t(tiles * tile_sums) * sizeof(A));
        for (int64_t q = 0; q < a.queries; q += kBlock) {
          const int64_t count = smaller(a.queries - q, kBlock);
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const Unit* of = tile_of + tile * tile_units;
            A* d = sums_of + tile * tile_sums;
            score<M>(packed_tokens<M>(rows + q * steps, steps), of, count, steps, x);
            score<M>(packed_tokens<M>(rows + starts[1] + q * value_steps, value_steps), of + lane_units, count, value_steps, deltas);
            weigh_keys<M>(x, deltas, count, c, {of_head.largest + q, of_head.factor + q, of_head.delta + q}, p, t);
            gather<M>(packed_channels<M>(rows + starts[2] + q / kBlock * block), t, count, a.size, d);
            gather<M>(packed_channels<M>(rows + starts[3] + q / kBlock * value_block), p, count, a.value_size, d + sums_room);
          }
        }
        T* d_k = static_cast<T*>(a.d_k) + (b * a.keys * a.heads + h) * a.size;
        T* d_v = static_cast<T*>(a.d_v) + (b * a.keys * a.heads + h) * a.value_size;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t lane = first + tile * kLanes<M>, count = smaller(keys - lane, kLanes<M>);
          A* d = sums_of + tile * tile_sums;
          put_lanes<M>(d, scale, count, a.size, d_k, a.heads * a.size, index, lane);
          put_lanes<M>(d + sums_room, one, count, a.value_size, d_v, a.heads * a.value_size, index, lane);
        }
      }
    }
  }

  void zero_padding() {
    for (int64_t i = 0; i < (a.padding ? a.batch * a.keys : 0); ++i) {
      if (!a.padding[i]) continue;
      memset(static_cast<T*>(a.d_k) + i * a.heads * a.size, 0, size_t(a.heads * a.size) * sizeof(T));
      memset(static_cast<T*>(a.d_v) + i * a.heads * a.value_size, 0, size_t(a.heads * a.value_size) * sizeof(T));
    }
  }
};

}  // namespace

void cross_attention_backward(const CrossAttentionArgs& a) {
  if (a.batch == 0 || a.heads == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    Backward<untag<decltype(tag)>> backward(a);
    backward.for_queries();
    backward.for_keys();
    backward.zero_padding();
  });
}

}  // namespace fourdperf::FOURDPERF_ISA
