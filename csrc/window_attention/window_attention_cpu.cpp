// window_attention forward on the CPU. The header states maths and shapes, window_attention_tile.h the tiles.
//
// work      a task is a band of rows of one class, frame and head. Per tile of columns it packs the keys (transposed) and
//           the values into cache; per strip of up to four query rows: scores, softmax, weighted sum of the values. The
//           scores use whole vectors of neighbouring keys (7 of 8 lanes for a window of 7), the sums exactly the window.
// numerics  scale and log2(e) are folded into q, so that the softmax takes powers of two; the maximum is subtracted;
//           a NaN or infinity reaches the queries whose window holds it
// limits    scratch is O(window area + tile) a thread: no buffer grows with the square of the tokens
#include <omp.h>

#include "common/dispatch.h"
#include "window_attention/window_attention_tile.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

template <class A> struct Softmax { A largest, sum; };  // in powers of two: sum = sum_j 2^(score[j] - largest)

// log of positive finite numbers; NaN and infinity give NaN
inline vec<float> log_of(vec<float> x) {
  constexpr float c[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                         -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  // x = 2^n (1 + f) with 1 + f in [1/sqrt 2, sqrt 2)
  const mask<float> bits = (mask<float>)x, n = (bits - 0x3f3504f3) >> 23;
  const vec<float> f = (vec<float>)(bits - (n << 23)) - broadcast<float>(1.f), square = f * f;
  vec<float> p = broadcast<float>(7.0376836292e-2f);
  for (const float k : c) p = p * f + broadcast<float>(k);
  return __builtin_convertvector(n, vec<float>) * broadcast<float>(0.69314718f) +
         (f + square * (f * p - broadcast<float>(0.5f))) + (x - x);
}
inline vec<double> log_of(vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// Scores become 2^(score - largest), zero outside the window. `zeros` keys of score 0 take part besides.
template <class A>
inline Softmax<A> softmax(const Plan<A>& plan, LaneMasks<A>& masks, int64_t column, A* scores, int64_t rows, double zeros) {
  const vec<A> lowest = broadcast<A>(A(-INFINITY));
  vec<A> peak = zeros > 0 ? vec<A>{} : lowest;
  each_score(plan, masks, column, scores, rows, [&](A* s, mask<A> inside) __attribute__((always_inline)) {
    peak = max(inside ? load<A>(s) : lowest, peak);
  });
  const A largest = reduce_max(peak);
  const vec<A> shift = broadcast<A>(largest);
  vec<A> sum = {};
  each_score(plan, masks, column, scores, rows, [&](A* s, mask<A> inside) __attribute__((always_inline)) {
    const vec<A> weight = inside ? exp2(load<A>(s) - shift) : vec<A>{};
    store(s, weight);
    sum += weight;
  });
  A total = reduce_add(sum);
  if (zeros > 0) total += A(zeros) * exp2(broadcast<A>(-largest))[0];
  return {largest, total};
}

template <class A, class T> struct Forward {
  const WindowAttentionArgs& a;
  const Plan<A> plan;

  struct Scratch {
    Buffer<A> keys, values, extra_keys, extra_values, q, scores, sums;
    LaneMasks<A> masks;
    Scratch(const Plan<A>& p, int64_t extra)
        : keys(p.dim * (p.band_keys + kStrip) * p.line), values(p.band_keys * p.line * p.dim), extra_keys(p.dim * p.extra),
          extra_values(p.extra * p.dim), q(p.columns * kStrip * p.dim), scores(p.columns * kStrip * p.scores),
          sums(kStrip * p.dim), masks(p, extra) {}
  };

  void run() {
    const int64_t classes = plan.classes_y * plan.classes_x, tasks = a.frames * a.heads * classes * plan.bands;
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
    for (int t = 0; t < threads; ++t) scratch[t] = new Scratch(plan, a.extra);  // here: nothing may throw in there
    const int64_t chunk = larger(1, smaller(a.heads, tasks / (8 * threads)));  // neighbouring heads share pages
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t begin = task % plan.bands * plan.band;
      const ClassGrid grid = grid_of(task);
      if (begin < grid.rows.size) {
        attend(grid, begin, smaller(begin + plan.band, grid.rows.size), *scratch[omp_get_thread_num()]);
      }
    }
  }

  ClassGrid grid_of(int64_t task) const {
    const int64_t classes = plan.classes_y * plan.classes_x, cls = task / plan.bands % classes, group = task / plan.bands / classes;
    return ClassGrid(a, group / a.heads, group % a.heads, cls / plan.classes_x, cls % plan.classes_x);
  }

  void attend(const ClassGrid& grid, int64_t begin, int64_t end, Scratch& s) {
    const Tokens<const T> q(a.q, a.q_strides, a, grid), k(a.k, a.k_strides, a, grid), v(a.v, a.v_strides, a, grid);
    const Tokens<T> out(a.out, dense_strides(a), a, grid);
    const int64_t key_row = grid.rows.first(begin), key_rows = grid.rows.end(end - 1) - key_row;
    if (a.extra) {
      pack_extra<A, T>(plan, a.extra_k, a.extra_k_strides, a, grid.frame, grid.head, s.extra_keys.data(), nullptr);
      pack_extra<A, T>(plan, a.extra_v, a.extra_v_strides, a, grid.frame, grid.head, nullptr, s.extra_values.data());
    }
    Tile tile;
    for (int64_t x0 = 0; x0 < grid.columns.size; x0 = tile.end) {
      tile = tile_from(grid.columns, x0, plan.line, plan.columns);
      const int64_t keys = grid.columns.end(tile.end - 1) - tile.first_key;
      pack_keys_transposed<A, T>(plan, k, key_row, key_rows, tile.first_key, keys, a.dim, s.keys.data());
      pack_keys<A, T>(plan, v, key_row, key_rows, tile.first_key, keys, a.dim, s.values.data());
      for (int64_t x = tile.begin; x < tile.end; ++x) s.masks.set(x - tile.begin, span_of(plan, grid.columns, tile, x));
      for (int64_t y = begin; y < end;) {
        const Strip strip = strip_from(grid.rows, y, end);
        for (int64_t x = tile.begin; x < tile.end; ++x) {
          for (int r = 0; r < strip.count; ++r) {
            pack_row(q.at(y + r, x), &s.q[((x - tile.begin) * kStrip + r) * plan.dim], a.dim, plan.dim,
                     A(a.scale * 1.4426950408889634));
          }
        }
        score_tile(plan, grid.columns, tile, strip, key_row, a.dim, s.keys.data(), s.extra_keys.data(), s.q.data(), s.scores.data());
        for (int64_t x = tile.begin; x < tile.end; ++x) finish(grid, tile, strip, x, key_row, out, s);
        y += strip.count;
      }
    }
  }

  // Softmax, weighted sum and the store of one query column of a strip.
  void finish(const ClassGrid& grid, const Tile& tile, const Strip& strip, int64_t x, int64_t key_row, const Tokens<T>& out, Scratch& s) {
    const Span span = span_of(plan, grid.columns, tile, x);
    A* scores = &s.scores[(x - tile.begin) * kStrip * plan.scores];
    alignas(64) A largest[16] = {}, sum[16] = {};
    for (int r = 0; r < strip.count; ++r) {
      const int64_t rows = strip.end[r] - strip.first[r];
      const double zeros = a.border == WindowBorder::zero ? double(a.window_y) * double(a.window_x) - double(rows * span.count) : 0.;
      const Softmax<A> soft = softmax(plan, s.masks, x - tile.begin, scores + r * plan.scores, rows, zeros);
      largest[r] = soft.largest;
      sum[r] = soft.sum;
    }
    each_block(plan, [&](auto vectors, int64_t d) {
      weighted_vectors<decltype(vectors)::value>(plan, strip, span, key_row, a.extra, &s.extra_values[d], &s.values[d], scores, &s.sums[d]);
    });
    for (int i = 0; i < kStrip; i += lanes<A>) {
      store(largest + i, load<A>(largest + i) * broadcast<A>(A(0.6931471805599453)) + log_of(load<A>(sum + i)));
    }
    for (int r = 0; r < strip.count; ++r) {
      const int64_t row = (strip.begin + r) * a.dilation_y + grid.y, column = x * a.dilation_x + grid.x;
      static_cast<A*>(a.lse)[((grid.frame * a.heads + grid.head) * a.height + row) * a.width + column] = largest[r];
      T* to = out.at(strip.begin + r, x);
      const vec<A> f = broadcast<A>(A(1) / sum[r]);
      int64_t d = 0;
      for (; d + lanes<A> <= a.dim; d += lanes<A>) store(to + d, load<A>(&s.sums[r * plan.dim + d]) * f);
      if (d < a.dim) store(to + d, load<A>(&s.sums[r * plan.dim + d]) * f, int(a.dim - d));
    }
  }
};

}  // namespace

void window_attention(const WindowAttentionArgs& a) {
  if (a.frames * a.height * a.width * a.heads * a.dim == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = untag<decltype(tag)>;
    Forward<acc_t<T>, T>{a, Plan<acc_t<T>>(a, false)}.run();
  });
}

}  // namespace fourdperf::FOURDPERF_ISA
