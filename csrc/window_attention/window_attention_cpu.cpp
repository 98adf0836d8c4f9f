// window_attention forward on the CPU. The header states maths and shapes, window_attention_tile.h the tiles.
//
// work      a task is a band of rows of one class, frame and head. Per strip of up to four query rows it packs the rows of
//           keys (transposed) and values that are new to it, then per tile of query columns: scores, softmax, sums of the
//           values.
// numerics  scale and log2(e) are folded into q, so that the softmax takes powers of two; the maximum is subtracted;
//           a NaN or infinity reaches the queries whose window holds it
// limits    scratch is O(window area + rows of a window) a thread: no buffer grows with the square of the tokens
#include <omp.h>

#include "common/dispatch.h"
#include "window_attention/window_attention_tile.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

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

template <class A> struct Softmax { vec<A> largest, sum; };  // in powers of two: sum = sum_j 2^(score[j] - largest)

// `count` vectors of scores become 2^(score - largest), each lane for itself. zeros[lane] keys of score 0 take part besides.
template <class A> inline Softmax<A> softmax(A* scores, int64_t count, vec<A> zeros) {
  constexpr int64_t L = lanes<A>;
  vec<A> peak[4];  // four at a time: each waits for its last
  for (int64_t i = 0; i < 4; ++i) peak[i] = load<A>(scores + smaller(i, count - 1) * L);
  int64_t i = 4;
  for (; i + 4 <= count; i += 4) {
    for (int64_t k = 0; k < 4; ++k) peak[k] = max(load<A>(scores + (i + k) * L), peak[k]);
  }
  for (; i < count; ++i) peak[0] = max(load<A>(scores + i * L), peak[0]);
  vec<A> largest = max(max(peak[0], peak[1]), max(peak[2], peak[3])), sum = {};
  largest = zeros > vec<A>{} ? max(vec<A>{}, largest) : largest;
  for (A* s = scores; s < scores + count * L; s += L) {
    const vec<A> weight = exp2(load<A>(s) - largest);
    store(s, weight);
    sum += weight;
  }
  return {largest, zeros > vec<A>{} ? sum + zeros * exp2(-largest) : sum};
}

template <class A, class T> struct Forward {
  const WindowAttentionArgs& a;
  const Plan<A> plan;
  const bool streamed;

  explicit Forward(const WindowAttentionArgs& a) : a(a), plan(a, false), streamed(streams<T>(a, a.out, kVectorBytes)) {}

  struct Scratch {
    Buffer<A> keys, values, extra_keys, extra_values, q, scores;
    Tiles<A> tiles;
    Scratch(const Plan<A>& p, const WindowAttentionArgs& a)
        : keys(p.ring * p.key_row), values(p.ring * p.value_row), extra_keys(a.extra * p.dim), extra_values(a.extra * p.dim),
          q(kStrip * a.dim * lanes<A>), scores(kStrip * p.scores), tiles(p) {
      memset(keys.data(), 0, size_t(p.ring * p.key_row) * sizeof(A));
    }
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
    for (int t = 0; t < threads; ++t) scratch[t] = new Scratch(plan, a);  // here: nothing may throw in there
    const int64_t chunk = larger(1, smaller(a.heads, tasks / (8 * threads)));  // neighbouring heads share pages
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, chunk)
      for (int64_t i = 0; i < tasks; ++i) {
        const Task task = task_of(i);
        if (task.begin < task.end) attend(task, task_of(smaller(i + 1, tasks - 1)), *scratch[omp_get_thread_num()]);
      }
      stream_fence();
    }
  }

  struct Task { ClassGrid grid; int64_t begin, end; };  // a band of query rows

  Task task_of(int64_t i) const {
    const int64_t classes = plan.classes_y * plan.classes_x, cls = i / plan.bands % classes, group = i / plan.bands / classes;
    const ClassGrid grid(a, group / a.heads, group % a.heads, cls / plan.classes_x, cls % plan.classes_x);
    const int64_t begin = i % plan.bands * plan.band;
    return {grid, begin, smaller(begin + plan.band, grid.rows.size)};
  }

  // `next`: the task that most often follows
  void attend(const Task& task, const Task& next, Scratch& s) {
    constexpr int64_t L = lanes<A>;
    const ClassGrid& grid = task.grid;
    const int64_t begin = task.begin, end = task.end;
    const Tokens<const T> q(a.q, a.q_strides, a, grid), k(a.k, a.k_strides, a, grid), v(a.v, a.v_strides, a, grid);
    if (a.extra) {
      pack_extra<A, T>(plan, a.extra_k, a.extra_k_strides, a, grid.frame, grid.head, s.extra_keys.data());
      pack_extra<A, T>(plan, a.extra_v, a.extra_v_strides, a, grid.frame, grid.head, s.extra_values.data());
    }
    s.tiles.set(plan, grid.columns);
    int64_t packed = grid.rows.first(begin);
    for (int64_t y = begin; y < end; y += kStrip) {
      const Strip strip = strip_from(grid.rows, y, end);
      for (; packed < strip.end[strip.count - 1]; ++packed) {
        pack_keys_transposed<A, T>(plan, k, packed, grid.columns.size, a.dim, &s.keys[plan.slot(packed) * plan.key_row]);
        pack_keys<A, T>(plan, v, packed, grid.columns.size, a.dim, &s.values[plan.slot(packed) * plan.value_row]);
      }
      const Ahead<T> ahead = y + kStrip < end ? Ahead<T>(a, grid, y + kStrip, end, packed) : Ahead<T>(a, next.grid, next.begin, next.end);
      for (int64_t t = 0; t < s.tiles.count; ++t) {
        const Tile& tile = s.tiles.tile[t];
        for (int r = 0; r < strip.count; ++r) {
          pack_transposed<A, T>(q.at(y + r, tile.begin), q.column, tile.end - tile.begin, a.dim, A(a.scale * 1.4426950408889634),
                                &s.q[r * a.dim * L], L);
        }
        score_tile(plan, strip, tile, s.tiles.inside(t), a.extra, a.dim, s.extra_keys.data(), s.keys.data(), s.q.data(),
                   s.scores.data(), A(-INFINITY));
        finish(grid, strip, tile, ahead, s);
      }
    }
  }

  // One tile of a strip: weights and lse from the scores, then the weighted sums of the values.
  void finish(const ClassGrid& grid, const Strip& strip, const Tile& tile, const Ahead<T>& ahead, Scratch& s) {
    constexpr int64_t L = lanes<A>;
    alignas(64) A zeros[L] = {}, inverse[kStrip][L], lse[L];
    for (int r = 0; r < strip.count; ++r) {
      const int64_t rows = strip.end[r] - strip.first[r], row = (strip.begin + r) * a.dilation_y + grid.y;
      for (int64_t x = tile.begin; a.border == WindowBorder::zero && x < tile.end; ++x) {
        const int64_t seen = rows * (grid.columns.end(x) - grid.columns.first(x));
        zeros[x - tile.begin] = A(double(a.window_y) * double(a.window_x) - double(seen));
      }
      const Softmax<A> soft = softmax(&s.scores[r * plan.scores], a.extra + rows * tile.offsets, load<A>(zeros));
      store(inverse[r], broadcast<A>(A(1)) / soft.sum);
      store(lse, soft.largest * broadcast<A>(A(0.6931471805599453)) + log_of(soft.sum));
      A* to = static_cast<A*>(a.lse) + ((grid.frame * a.heads + grid.head) * a.height + row) * a.width + grid.x;
      for (int64_t x = tile.begin; x < tile.end; ++x) to[x * a.dilation_x] = lse[x - tile.begin];
    }
    const Tokens<T> out(a.out, dense_strides(a), a, grid);
    for (int64_t x = tile.begin; x < tile.end; ++x) {
      ahead.queries(ahead.q, x);
      ahead.keys(ahead.k, x);
      ahead.keys(ahead.v, x);
      const Span span = span_of<A>(grid.columns, tile, x);
      each_block(plan, [&](auto vectors, int64_t d) {
        const auto put = [&](int r, int u, vec<A> sum) __attribute__((always_inline)) {
          const vec<A> factor = broadcast<A>(inverse[r][span.lane]);
          if (r < strip.count) store_head<A>(out.at(strip.begin + r, x), d + u * L, a.dim, sum * factor, streamed);
        };
        weighted_vectors<decltype(vectors)::value>(plan, strip, tile, span, a.extra, &s.extra_values[d], &s.values[d],
                                                   s.scores.data(), put);
      });
    }
  }
};

}  // namespace

void window_attention(const WindowAttentionArgs& a) {
  if (a.frames * a.height * a.width * a.heads * a.dim == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = untag<decltype(tag)>;
    Forward<acc_t<T>, T>(a).run();
  });
}

}  // namespace fourdperf::FOURDPERF_ISA
