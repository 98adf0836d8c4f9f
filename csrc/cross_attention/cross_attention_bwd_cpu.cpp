// cross_attention on the CPU, backward. The header states maths and shapes, cross_attention_tile.h the packing.
//
// maths     p[i, j] is computed again from lse. Two passes over all pairs (query, key): one sums d_q over the keys, one
//           d_k and d_v over the queries; each writes what it owns, so nothing is added across threads.
// shapes    first pass: lanes are queries, rows keys; second pass: lanes are keys, rows queries
// work      as in the forward: a task owns kTiles tiles of lanes of one head and walks over all rows, kBlock at a time
// numerics  seven products where five would do: the price of sums in one order, whatever the number of threads
// limits    d_k and d_v of keys that are padding are zero
#include "cross_attention/cross_attention_tile.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

template <class M> struct Scratch {
  using A = typename M::A;
  int64_t size_units, value_units, size_sums, value_sums, tile_units, tile_sums;
  Buffer<typename M::Unit> lanes_of, p, t;
  Buffer<A> scores, deltas, sums;

  Scratch(const CrossAttentionArgs& a)
      : size_units(pieces(a.size, M::pair) * kLanes<A>), value_units(pieces(a.value_size, M::pair) * kLanes<A>),
        size_sums(pieces(a.size, kRows) * kRows * kLanes<A>), value_sums(pieces(a.value_size, kRows) * kRows * kLanes<A>),
        tile_units(size_units + value_units), tile_sums(2 * kLanes<A> + size_sums + value_sums),
        lanes_of(a.threads * kTiles * tile_units), p(a.threads * kBlock / M::pair * kLanes<A>),
        t(a.threads * kBlock / M::pair * kLanes<A>), scores(a.threads * kBlock * kLanes<A>),
        deltas(a.threads * kBlock * kLanes<A>), sums(a.threads * kTiles * tile_sums) {}
};

// p = 2^(c scores - lse) and t = p (deltas - delta), for `count` rows; lse and delta belong to lanes, or to rows.
template <class M, bool kQueryLanes>
inline void weigh(typename M::A* scores, typename M::A* deltas, int64_t count, typename M::A c, const typename M::A* lse,
                  const typename M::A* delta, typename M::Unit* weights_p, typename M::Unit* weights_t) {
  using A = typename M::A;
  for (int j = 0; j < kVectors; ++j) {
    const int at = j * lanes<A>;
    for (int64_t r = 0; r < count; r += M::pair) {
      vec<A> p[M::pair] = {}, t[M::pair] = {};
      for (int i = 0; i < M::pair; ++i) {
        if (r + i < count) {
          const vec<A> l = kQueryLanes ? load<A>(lse + at) : broadcast<A>(lse[r + i]);
          const vec<A> d = kQueryLanes ? load<A>(delta + at) : broadcast<A>(delta[r + i]);
          p[i] = exp2(load<A>(scores + (r + i) * kLanes<A> + at) * broadcast<A>(c) - l);
          t[i] = p[i] * (load<A>(deltas + (r + i) * kLanes<A> + at) - d);
        }
      }
      if (!kQueryLanes) M::put(weights_p + r / M::pair * kLanes<A> + at, p);
      M::put(weights_t + r / M::pair * kLanes<A> + at, t);
    }
  }
}

template <class T> struct Pass {
  using M = typename mode_of<T>::type;
  using A = typename M::A;
  using Unit = typename M::Unit;
  const CrossAttentionArgs& a;
  Kept kept;
  int64_t heads;
  Scratch<M> scratch;
  A c;
  Buffer<A> delta;  // (B, H, Q)

  explicit Pass(const CrossAttentionArgs& a)
      : a(a), kept(a), heads(a.batch * a.heads), scratch(a),
        c(A((a.scale < 0 ? -a.scale : a.scale) * 1.4426950408889634)), delta(heads * a.queries) {}

  void deltas() {
    const T* out = static_cast<const T*>(a.out);
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t i = 0; i < heads * a.queries; ++i) {
      const int64_t b = i / a.queries / a.heads, h = i / a.queries % a.heads, q = i % a.queries;
      const T* x = head_of<T>(a.d_out, b, h, a.queries, nullptr).row(q);
      const T* y = out + ((b * a.queries + q) * a.heads + h) * a.value_size;
      A sum = 0;
      for (int64_t e = 0; e < a.value_size; ++e) sum += to_float(x[e * a.d_out.channel]) * to_float(y[e]);
      delta[i] = sum;
    }
  }

  // d_q (lanes are queries) or d_k and d_v (lanes are keys)
  template <bool kQueryLanes> void run() {
    const int64_t most_lanes = kQueryLanes ? a.queries : a.keys, most_rows = kQueryLanes ? a.keys : a.queries;
    const int64_t per_task = kTiles * kLanes<A>, tasks = pieces(most_lanes, per_task);
    const int64_t round = heads_a_round(heads, tasks, a.threads);
    const int64_t steps = pieces(a.size, M::pair), value_steps = pieces(a.value_size, M::pair);
    const int64_t room[4] = {token_room<M>(most_rows, a.size), token_room<M>(most_rows, a.value_size),
                             channel_room<M>(most_rows, a.size), kQueryLanes ? 0 : channel_room<M>(most_rows, a.value_size)};
    const int64_t head_room = room[0] + room[1] + room[2] + room[3];
    const int64_t size_block = channel_room<M>(1, a.size), value_block = channel_room<M>(1, a.value_size);
    Buffer<Unit> packed(round * head_room);
    const bool negate = a.scale < 0;
#pragma omp parallel num_threads(a.threads)
    for (int64_t begin = 0; begin < heads; begin += round) {
      const int64_t members = smaller(round, heads - begin);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < members * 4; ++i) {
        const int64_t b = (begin + i / 4) / a.heads, h = (begin + i / 4) % a.heads, part = i % 4;
        Unit* to = &packed[i / 4 * head_room];
        const int64_t rows = kQueryLanes ? kept.count[b] : a.queries;
        const int64_t* index = kQueryLanes ? kept.of(b, a.keys) : nullptr;
        const Head<T> x = head_of<T>(kQueryLanes ? a.k : a.q, b, h, rows, index);
        const Head<T> y = head_of<T>(kQueryLanes ? a.v : a.d_out, b, h, rows, index);
        if (part == 0) pack_tokens<M>(x, rows, a.size, !kQueryLanes && negate, to);
        if (part == 1) pack_tokens<M>(y, rows, a.value_size, false, to + room[0]);
        if (part == 2) pack_channels<M>(x, rows, a.size, to + room[0] + room[1]);
        if (part == 3 && !kQueryLanes) pack_channels<M>(y, rows, a.value_size, to + room[0] + room[1] + room[2]);
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < members * tasks; ++task) {
        const int64_t member = task / tasks, b = (begin + member) / a.heads, h = (begin + member) % a.heads;
        const int64_t *index = kept.of(b, a.keys), first = task % tasks * per_task, thread = omp_get_thread_num();
        const int64_t width = kQueryLanes ? a.queries : kept.count[b], rows = kQueryLanes ? kept.count[b] : a.queries;
        if (first >= width) continue;
        const int64_t tiles = pieces(smaller(width - first, per_task), kLanes<A>);
        const A *head_lse = static_cast<const A*>(a.lse) + (b * a.heads + h) * a.queries, *head_delta = &delta[(b * a.heads + h) * a.queries];
        Unit *lane_units = &scratch.lanes_of[thread * kTiles * scratch.tile_units], *rows_of = &packed[member * head_room];
        A* sums = &scratch.sums[thread * kTiles * scratch.tile_sums];
        A *scores = &scratch.scores[thread * kBlock * kLanes<A>], *deltas = &scratch.deltas[thread * kBlock * kLanes<A>];
        Unit* p = &scratch.p[thread * kBlock / M::pair * kLanes<A>];
        Unit* t = &scratch.t[thread * kBlock / M::pair * kLanes<A>];
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t lane = first + tile * kLanes<A>, count = smaller(width - lane, kLanes<A>);
          Unit* units = lane_units + tile * scratch.tile_units;
          const int64_t* lane_index = kQueryLanes ? nullptr : index;
          pack_slots<M>(head_of<T>(kQueryLanes ? a.q : a.k, b, h, width, lane_index), lane, count, a.size, kLanes<A>,
                        kQueryLanes && negate, units);
          pack_slots<M>(head_of<T>(kQueryLanes ? a.d_out : a.v, b, h, width, lane_index), lane, count, a.value_size, kLanes<A>, false,
                        units + scratch.size_units);
          A* state = sums + tile * scratch.tile_sums;  // lse, delta, then the sums
          memset(state, 0, size_t(scratch.tile_sums) * sizeof(A));
          if (kQueryLanes) {
            memcpy(state, head_lse + lane, size_t(count) * sizeof(A));
            memcpy(state + kLanes<A>, head_delta + lane, size_t(count) * sizeof(A));
          }
        }
        for (int64_t r = 0; r < rows; r += kBlock) {
          const int64_t count = smaller(rows - r, kBlock);
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const Unit* units = lane_units + tile * scratch.tile_units;
            A *state = sums + tile * scratch.tile_sums, *size_sums = state + 2 * kLanes<A>;
            score<M>(rows_of + r * steps, units, count, steps, scores);
            score<M>(rows_of + room[0] + r * value_steps, units + scratch.size_units, count, value_steps, deltas);
            weigh<M, kQueryLanes>(scores, deltas, count, c, kQueryLanes ? state : head_lse + r,
                                  kQueryLanes ? state + kLanes<A> : head_delta + r, p, t);
            const Unit* sum_rows = rows_of + room[0] + room[1];
            gather<M>(sum_rows + r / kBlock * size_block, t, count, a.size, size_sums);
            if (!kQueryLanes) {
              gather<M>(sum_rows + room[2] + r / kBlock * value_block, p, count, a.value_size, size_sums + scratch.size_sums);
            }
          }
        }
        A scale[kLanes<A>], one[kLanes<A>];
        for (int64_t l = 0; l < kLanes<A>; ++l) {
          scale[l] = A(a.scale);
          one[l] = A(1);
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t lane = first + tile * kLanes<A>, count = smaller(width - lane, kLanes<A>);
          A* size_sums = sums + tile * scratch.tile_sums + 2 * kLanes<A>;
          T* d_x = static_cast<T*>(kQueryLanes ? a.d_q : a.d_k) + (b * most_lanes * a.heads + h) * a.size;
          put_lanes<M>(size_sums, scale, count, a.size, d_x, a.heads * a.size, kQueryLanes ? nullptr : index, lane);
          if (!kQueryLanes) {
            T* d_v = static_cast<T*>(a.d_v) + (b * a.keys * a.heads + h) * a.value_size;
            put_lanes<M>(size_sums + scratch.size_sums, one, count, a.value_size, d_v, a.heads * a.value_size, index, lane);
          }
        }
      }
    }
  }

  void zero_padding() {
    if (!a.padding) return;
    for (int64_t i = 0; i < a.batch * a.keys; ++i) {
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
    Pass<untag<decltype(tag)>> pass(a);
    pass.deltas();
    pass.template run<true>();
    pass.template run<false>();
    pass.zero_padding();
  });
}

}  // namespace fourdperf::FOURDPERF_ISA
