// window_attention backward on the CPU. The header states maths and shapes, window_attention_tile.h the tiles.
//
// work      a task is a band of query rows of one class, frame and head, as in the forward pass. Per strip it recomputes
//           p = 2^(score - lse) and d_out.v with the same loop, then d_q (owned by the strip), and adds to d_k and d_v of
//           the band's keys, which stay in scratch. Where a class has several bands, all even ones run first and store
//           their keys, then the odd ones run and add: bands two apart share no key, so that nothing is written twice at
//           once and the order of every sum is fixed by the shapes. Extra tokens get one partial sum a task, added up last.
// numerics  p = 2^(score - lse) is divided by its own sum, and d_out.out is taken as sum_j p d_p: the rounding of lse and
//           out does no harm (out is not read); sums in float (double for double), one rounding at the end
// limits    memory is O(tokens): for 16-bit types in several bands, float copies of d_k and d_v
#include <omp.h>

#include "common/dispatch.h"
#include "window_attention/window_attention_tile.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

template <class A, class T> struct Backward {
  const WindowAttentionArgs& a;
  const Plan<A> plan;
  int64_t classes, tasks;
  A *sums_k = nullptr, *sums_v = nullptr;  // where bands of one class meet: like d_k and d_v, dense
  bool stream_q, stream_k, stream_v;
  A* extra_sums = nullptr;                 // [frame][head][class][band][k, v][extra][dim]

  Backward(const WindowAttentionArgs& a)
      : a(a), plan(a, true), classes(plan.classes_y * plan.classes_x), tasks(a.frames * a.heads * classes * plan.bands),
        stream_q(streams<T>(a, a.d_q, kVectorBytes)), stream_k(plan.bands == 1 && streams<T>(a, a.d_k, 64)),
        stream_v(plan.bands == 1 && streams<T>(a, a.d_v, 64)) {}

  struct Scratch {
    Buffer<A> keys, values, plain_keys, extra_keys, extra_values, q, d_out, heads, scores, d_scores, d_k, d_v;
    Tiles<A> tiles;
    Scratch(const Plan<A>& p, const WindowAttentionArgs& a)
        : keys(p.ring * p.key_row), values(p.ring * p.key_row), plain_keys(p.ring * p.value_row), extra_keys(a.extra * p.dim),
          extra_values(a.extra * p.dim), q(kStrip * a.dim * lanes<A>), d_out(kStrip * a.dim * lanes<A>), heads(kStrip * p.dim),
          scores(kStrip * p.scores), d_scores(kStrip * p.scores), d_k(p.band_keys * p.value_row),
          d_v(p.band_keys * p.value_row), tiles(p) {
      for (Buffer<A>* packed : {&keys, &values}) memset(packed->data(), 0, size_t(p.ring * p.key_row) * sizeof(A));
      memset(heads.data(), 0, size_t(kStrip * p.dim) * sizeof(A));
    }
  };

  // A band of query rows, and its sums for the extra tokens.
  struct Task { ClassGrid grid; int64_t begin, end; A* partial; };

  Task task_of(int64_t i, int64_t bands, int64_t parity) const {
    const int64_t band = i % bands * 2 + parity, cls = i / bands % classes, group = i / bands / classes, begin = band * plan.band;
    const ClassGrid grid(a, group / a.heads, group % a.heads, cls / plan.classes_x, cls % plan.classes_x);
    A* partial = extra_sums + ((group * classes + cls) * plan.bands + band) * 2 * a.extra * plan.dim;
    return {grid, begin, smaller(begin + plan.band, grid.rows.size), partial};
  }

  void run() {
    const bool shared = plan.bands > 1 && sizeof(T) != sizeof(A);
    const int64_t elements = a.frames * a.height * a.width * a.heads * a.dim;
    Buffer<A> wide(shared ? 2 * elements : 0), extra(tasks * 2 * a.extra * plan.dim);
    if constexpr (sizeof(T) == sizeof(A)) {
      sums_k = static_cast<A*>(a.d_k);
      sums_v = static_cast<A*>(a.d_v);
    } else if (shared) {
      sums_k = wide.data();
      sums_v = sums_k + elements;
    }
    extra_sums = extra.data();
    const int threads = int(smaller(a.threads, tasks));
    Scratch** scratch = new Scratch*[size_t(threads)]();
    struct Free {
      Scratch** scratch;
      int n;
      ~Free() {
        for (int t = 0; t < n; ++t) delete scratch[t];
        delete[] scratch;
      }
    } free{scratch, threads};
    for (int t = 0; t < threads; ++t) scratch[t] = new Scratch(plan, a);  // here: nothing may throw in there
    for (int64_t parity = 0; parity < (plan.bands > 1 ? 2 : 1); ++parity) {
      const int64_t bands = (plan.bands - parity + 1) / 2;
      const int64_t round = a.frames * a.heads * classes * bands;
#pragma omp parallel num_threads(threads)
      {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < round; ++i) {
          const Task task = task_of(i, bands, parity), next = task_of(smaller(i + 1, round - 1), bands, parity);
          for (int64_t e = 0; e < 2 * a.extra * plan.dim; ++e) task.partial[e] = A(0);
          if (task.begin < task.end) differentiate(task, next, *scratch[omp_get_thread_num()]);
        }
        stream_fence();
      }
    }
    if (shared) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t i = 0; i < elements; ++i) {
        static_cast<T*>(a.d_k)[i] = from_float<T>(sums_k[i]);
        static_cast<T*>(a.d_v)[i] = from_float<T>(sums_v[i]);
      }
    }
    for (int64_t i = 0; a.extra && i < a.frames * a.heads * a.extra; ++i) {
      const int64_t e = i % a.extra, head = i / a.extra % a.heads, frame = i / a.extra / a.heads;
      const int64_t parts = classes * plan.bands;
      for (int64_t d = 0; d < a.dim; ++d) {
        A sum[2] = {};
        for (int64_t part = 0; part < parts; ++part) {
          const A* partial = extra_sums + ((frame * a.heads + head) * parts + part) * 2 * a.extra * plan.dim;
          for (int kv = 0; kv < 2; ++kv) sum[kv] += partial[(kv * a.extra + e) * plan.dim + d];
        }
        const int64_t at = ((frame * a.extra + e) * a.heads + head) * a.dim + d;
        static_cast<T*>(a.d_extra_k)[at] = from_float<T>(sum[0] * A(0.6931471805599453));
        static_cast<T*>(a.d_extra_v)[at] = from_float<T>(sum[1]);
      }
    }
  }

  // `next`: the task that most often follows
  void differentiate(const Task& task, const Task& next, Scratch& s) {
    const ClassGrid& grid = task.grid;
    const int64_t begin = task.begin, end = task.end;
    const Tokens<const T> q(a.q, a.q_strides, a, grid), k(a.k, a.k_strides, a, grid), v(a.v, a.v_strides, a, grid),
        d_out(a.d_out, a.d_out_strides, a, grid);
    const int64_t key_row = grid.rows.first(begin), key_rows = grid.rows.end(end - 1) - key_row;
    if (a.extra) {
      pack_extra<A, T>(plan, a.extra_k, a.extra_k_strides, a, grid.frame, grid.head, s.extra_keys.data());
      pack_extra<A, T>(plan, a.extra_v, a.extra_v_strides, a, grid.frame, grid.head, s.extra_values.data());
    }
    s.tiles.set(plan, grid.columns);
    memset(s.d_k.data(), 0, size_t(key_rows * plan.value_row) * sizeof(A));
    memset(s.d_v.data(), 0, size_t(key_rows * plan.value_row) * sizeof(A));
    int64_t packed = key_row;
    for (int64_t y = begin; y < end; y += kStrip) {
      const Strip strip = strip_from(grid.rows, y, end);
      for (; packed < strip.end[strip.count - 1]; ++packed) {
        const int64_t slot = plan.slot(packed), columns = grid.columns.size;
        pack_keys_transposed<A, T>(plan, k, packed, columns, a.dim, &s.keys[slot * plan.key_row]);
        pack_keys_transposed<A, T>(plan, v, packed, columns, a.dim, &s.values[slot * plan.key_row]);
        pack_keys<A, T>(plan, k, packed, columns, a.dim, &s.plain_keys[slot * plan.value_row]);
      }
      const Ahead<T> ahead = y + kStrip < end ? Ahead<T>(a, grid, y + kStrip, end, packed) : Ahead<T>(a, next.grid, next.begin, next.end);
      for (int64_t t = 0; t < s.tiles.count; ++t) {
        const Tile& tile = s.tiles.tile[t];
        const int64_t columns = tile.end - tile.begin, strip_row = a.dim * lanes<A>;
        for (int r = 0; r < strip.count; ++r) {
          pack_transposed<A, T>(q.at(y + r, tile.begin), q.column, columns, a.dim, q_factor(), &s.q[r * strip_row], lanes<A>);
          pack_transposed<A, T>(d_out.at(y + r, tile.begin), d_out.column, columns, a.dim, A(1), &s.d_out[r * strip_row], lanes<A>);
        }
        const A* inside = s.tiles.inside(t);
        score_tile(plan, strip, tile, inside, a.extra, a.dim, s.extra_keys.data(), s.keys.data(), s.q.data(), s.scores.data(),
                   A(-INFINITY));
        score_tile(plan, strip, tile, inside, a.extra, a.dim, s.extra_values.data(), s.values.data(), s.d_out.data(),
                   s.d_scores.data(), A(0));
        finish(grid, strip, tile, key_row, q, d_out, ahead, task.partial, s);
      }
    }
    keep(grid, begin, end, key_row, key_rows, s.d_k.data(), sums_k, a.d_k, A(0.6931471805599453), stream_k);
    keep(grid, begin, end, key_row, key_rows, s.d_v.data(), sums_v, a.d_v, A(1), stream_v);
  }

  A q_factor() const { return A(a.scale * 1.4426950408889634); }

  // One tile of a strip: p and ds from the scores, then the three sums over them.
  void finish(const ClassGrid& grid, const Strip& strip, const Tile& tile, int64_t key_row, const Tokens<const T>& q,
              const Tokens<const T>& d_out, const Ahead<T>& ahead, A* partial, Scratch& s) {
    constexpr int64_t L = lanes<A>;
    alignas(64) A inverse[kStrip][L];
    for (int r = 0; r < strip.count; ++r) {
      const int64_t rows = strip.end[r] - strip.first[r], row = (strip.begin + r) * a.dilation_y + grid.y;
      const A* lse = static_cast<const A*>(a.lse) + ((grid.frame * a.heads + grid.head) * a.height + row) * a.width + grid.x;
      alignas(64) A lane[L] = {}, zeros[L] = {};
      for (int64_t x = tile.begin; x < tile.end; ++x) {
        lane[x - tile.begin] = lse[x * a.dilation_x];
        const int64_t seen = rows * (grid.columns.end(x) - grid.columns.first(x));
        if (a.border == WindowBorder::zero) zeros[x - tile.begin] = A(double(a.window_y) * double(a.window_x) - double(seen));
      }
      const vec<A> shift = load<A>(lane) * broadcast<A>(A(1.4426950408889634));
      A *scores = &s.scores[r * plan.scores], *d_scores = &s.d_scores[r * plan.scores];
      const int64_t size = (a.extra + rows * tile.offsets) * L;
      vec<A> total = {}, product = {};
      for (int64_t i = 0; i < size; i += L) {
        const vec<A> score = load<A>(scores + i), d_score = load<A>(d_scores + i), p = exp2(score - shift);
        store(scores + i, p);
        total += p;
        product += p * d_score;
      }
      if (a.border == WindowBorder::zero) total += load<A>(zeros) * exp2(-shift);
      const vec<A> delta = product / total;
      for (int64_t i = 0; i < size; i += L) store(d_scores + i, load<A>(scores + i) * (load<A>(d_scores + i) - delta));
      store(inverse[r], broadcast<A>(A(1)) / total);
    }
    // a pass each, so that what neighbouring columns share stays in the first-level cache
    const Tokens<T> d_q(a.d_q, dense_strides(a), a, grid);
    for (int64_t x = tile.begin; x < tile.end; ++x) {
      ahead.queries(ahead.q, x);
      ahead.queries(ahead.d_out, x);
      const Span span = span_of<A>(grid.columns, tile, x);
      each_block(plan, [&](auto vectors, int64_t d) {
        const auto put = [&](int r, int u, vec<A> sum) __attribute__((always_inline)) {
          const vec<A> factor = broadcast<A>(A(a.scale) * inverse[r][span.lane]);
          if (r < strip.count) store_head<A>(d_q.at(strip.begin + r, x), d + u * L, a.dim, sum * factor, stream_q);
        };
        weighted_vectors<decltype(vectors)::value>(plan, strip, tile, span, a.extra, &s.extra_keys[d], &s.plain_keys[d],
                                                   s.d_scores.data(), put);
      });
    }
    const auto scatter = [&](const Tokens<const T>& queries, const Tokens<const T>& next_keys, A scale, A* scores, A* extra_target, A* target) {
      for (int64_t x = tile.begin; x < tile.end; ++x) {
        ahead.keys(next_keys, x);
        const Span span = span_of<A>(grid.columns, tile, x);
        for (int r = 0; r < strip.count; ++r) {
          pack_row(queries.at(strip.begin + r, x), &s.heads[r * plan.dim], a.dim, plan.dim, inverse[r][span.lane] * scale);
        }
        each_block(plan, [&](auto vectors, int64_t d) {
          scatter_vectors<decltype(vectors)::value>(plan, strip, tile, span, key_row, a.extra, &s.heads[d], scores, extra_target + d,
                                                    target + d);
        });
      }
    };
    scatter(q, ahead.k, q_factor(), s.d_scores.data(), partial, s.d_k.data());
    scatter(d_out, ahead.v, A(1), s.scores.data(), partial + a.extra * plan.dim, s.d_v.data());
  }

  // A band's key gradients to where they belong: rows that a band of the first round has stored are added to.
  void keep(const ClassGrid& grid, int64_t begin, int64_t end, int64_t key_row, int64_t key_rows, const A* band, A* sums, void* out,
            A factor, bool streamed) const {
    const bool odd = begin / plan.band % 2 == 1;
    const int64_t shared_until = odd ? grid.rows.end(begin - 1) : 0;
    const int64_t shared_from = odd && end < grid.rows.size ? grid.rows.first(end) : grid.rows.size;
    const vec<A> f = broadcast<A>(factor);
    for (int64_t j = key_row; j < key_row + key_rows; ++j) {
      const bool add = j < shared_until || j >= shared_from;
      for (int64_t x = 0; x < grid.columns.size; ++x) {
        const A* from = band + (j - key_row) * plan.value_row + x * plan.dim;
        if (sums) {
          keep_token(from, Tokens<A>(sums, dense_strides(a), a, grid).at(j, x), f, add, streamed);
        } else {
          keep_token(from, Tokens<T>(out, dense_strides(a), a, grid).at(j, x), f, false, streamed);
        }
      }
    }
  }
  template <class To> void keep_token(const A* from, To* to, vec<A> f, bool add, bool streamed) const {
    for_vectors<A>(a.dim, [&](int64_t d, auto n) __attribute__((always_inline)) {
      store_head<A>(to, d, a.dim, load<A>(from + d) * f + (add ? load<A>(to + d, n) : vec<A>{}), streamed);
    });
  }
};

}  // namespace

void window_attention_backward(const WindowAttentionArgs& a) {
  if (a.frames * a.heads * a.dim == 0 || a.height * a.width == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = untag<decltype(tag)>;
    Backward<acc_t<T>, T>(a).run();
  });
}

}  // namespace fourdperf::FOURDPERF_ISA
