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
  int64_t classes, tasks, width;  // width: columns of the widest class, padded to what a line may overhang
  A *sums_k = nullptr, *sums_v = nullptr;  // where bands of one class meet: like d_k and d_v, dense
  A* extra_sums = nullptr;                 // [frame][head][class][band][k, v][extra][dim]

  Backward(const WindowAttentionArgs& a)
      : a(a), plan(a, true), classes(plan.classes_y * plan.classes_x), tasks(a.frames * a.heads * classes * plan.bands),
        width(class_size(a.width, a.dilation_x, 0)) {}

  struct Scratch {
    Buffer<A> keys, values, plain_keys, extra_keys, extra_values, extra_plain_keys, q, d_out, scores, d_scores, sums, d_k, d_v;
    LaneMasks<A> masks;
    Scratch(const Plan<A>& p, int64_t extra, int64_t width)
        : keys(p.dim * (p.band_keys + kStrip) * p.line), values(p.dim * (p.band_keys + kStrip) * p.line),
          plain_keys(p.band_keys * p.line * p.dim), extra_keys(p.dim * p.extra), extra_values(p.dim * p.extra),
          extra_plain_keys(p.extra * p.dim), q(p.columns * kStrip * p.dim), d_out(p.columns * kStrip * p.dim),
          scores(p.columns * kStrip * p.scores), d_scores(p.columns * kStrip * p.scores), sums(kStrip * p.dim),
          d_k(p.band_keys * width * p.dim), d_v(p.band_keys * width * p.dim), masks(p, extra) {}
  };

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
    for (int t = 0; t < threads; ++t) scratch[t] = new Scratch(plan, a.extra, width);  // here: nothing may throw in there
    for (int64_t parity = 0; parity < (plan.bands > 1 ? 2 : 1); ++parity) {
      const int64_t bands = (plan.bands - parity + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
      for (int64_t task = 0; task < a.frames * a.heads * classes * bands; ++task) {
        const int64_t band = task % bands * 2 + parity, cls = task / bands % classes, group = task / bands / classes;
        const ClassGrid grid(a, group / a.heads, group % a.heads, cls / plan.classes_x, cls % plan.classes_x);
        A* partial = extra_sums + ((group * classes + cls) * plan.bands + band) * 2 * a.extra * plan.dim;
        for (int64_t i = 0; i < 2 * a.extra * plan.dim; ++i) partial[i] = A(0);
        const int64_t begin = band * plan.band;
        if (begin < grid.rows.size) {
          differentiate(grid, begin, smaller(begin + plan.band, grid.rows.size), partial, *scratch[omp_get_thread_num()]);
        }
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

  void differentiate(const ClassGrid& grid, int64_t begin, int64_t end, A* partial, Scratch& s) {
    const Tokens<const T> q(a.q, a.q_strides, a, grid), k(a.k, a.k_strides, a, grid), v(a.v, a.v_strides, a, grid),
        d_out(a.d_out, a.d_out_strides, a, grid);
    const Tokens<T> d_q(a.d_q, dense_strides(a), a, grid);
    const int64_t key_row = grid.rows.first(begin), key_rows = grid.rows.end(end - 1) - key_row;
    if (a.extra) {
      pack_extra<A, T>(plan, a.extra_k, a.extra_k_strides, a, grid.frame, grid.head, s.extra_keys.data(), s.extra_plain_keys.data());
      pack_extra<A, T>(plan, a.extra_v, a.extra_v_strides, a, grid.frame, grid.head, s.extra_values.data(), nullptr);
    }
    for (int64_t i = 0; i < key_rows * width * plan.dim; ++i) s.d_k[i] = s.d_v[i] = A(0);
    Tile tile;
    for (int64_t x0 = 0; x0 < grid.columns.size; x0 = tile.end) {
      tile = tile_from(grid.columns, x0, plan.line, plan.columns);
      const int64_t keys = grid.columns.end(tile.end - 1) - tile.first_key;
      pack_keys_transposed<A, T>(plan, k, key_row, key_rows, tile.first_key, keys, a.dim, s.keys.data());
      pack_keys_transposed<A, T>(plan, v, key_row, key_rows, tile.first_key, keys, a.dim, s.values.data());
      pack_keys<A, T>(plan, k, key_row, key_rows, tile.first_key, keys, a.dim, s.plain_keys.data());
      for (int64_t x = tile.begin; x < tile.end; ++x) s.masks.set(x - tile.begin, span_of(plan, grid.columns, tile, x));
      for (int64_t y = begin; y < end;) {
        const Strip strip = strip_from(grid.rows, y, end);
        for (int64_t x = tile.begin; x < tile.end; ++x) {
          for (int r = 0; r < strip.count; ++r) {
            const int64_t at = ((x - tile.begin) * kStrip + r) * plan.dim;
            pack_row(q.at(y + r, x), &s.q[at], a.dim, plan.dim, A(a.scale * 1.4426950408889634));
            pack_row(d_out.at(y + r, x), &s.d_out[at], a.dim, plan.dim, A(1));
          }
        }
        score_tile(plan, grid.columns, tile, strip, key_row, a.dim, s.keys.data(), s.extra_keys.data(), s.q.data(), s.scores.data());
        score_tile(plan, grid.columns, tile, strip, key_row, a.dim, s.values.data(), s.extra_values.data(), s.d_out.data(),
                   s.d_scores.data());
        for (int64_t x = tile.begin; x < tile.end; ++x) finish(grid, tile, strip, x, key_row, d_q, partial, s);
        y += strip.count;
      }
    }
    keep(grid, begin, end, key_row, key_rows, s.d_k.data(), sums_k, a.d_k, A(0.6931471805599453));
    keep(grid, begin, end, key_row, key_rows, s.d_v.data(), sums_v, a.d_v, A(1));
  }

  // One query column of a strip: p and ds from the scores, then the three sums over them.
  void finish(const ClassGrid& grid, const Tile& tile, const Strip& strip, int64_t x, int64_t key_row, const Tokens<T>& d_q,
              A* partial, Scratch& s) {
    const Span span = span_of(plan, grid.columns, tile, x);
    const int64_t column = x - tile.begin;
    A *scores = &s.scores[column * kStrip * plan.scores], *d_scores = &s.d_scores[column * kStrip * plan.scores];
    A *q = &s.q[column * kStrip * plan.dim], *d_out = &s.d_out[column * kStrip * plan.dim];
    A total[kStrip];
    for (int r = 0; r < strip.count; ++r) {
      const int64_t row = (strip.begin + r) * a.dilation_y + grid.y, col = x * a.dilation_x + grid.x;
      const int64_t rows = strip.end[r] - strip.first[r], behind = d_scores - scores;
      const A lse = static_cast<const A*>(a.lse)[((grid.frame * a.heads + grid.head) * a.height + row) * a.width + col];
      const vec<A> shift = broadcast<A>(lse * A(1.4426950408889634));
      vec<A> sum = {}, product = {};
      each_score(plan, s.masks, column, scores + r * plan.scores, rows, [&](A* score, mask<A> inside) __attribute__((always_inline)) {
        const vec<A> p = inside ? exp2(load<A>(score) - shift) : vec<A>{};
        store(score, p);
        sum += p;
        product += inside ? p * load<A>(score + behind) : vec<A>{};
      });
      total[r] = reduce_add(sum);
      if (a.border == WindowBorder::zero) {
        total[r] += A(double(a.window_y) * double(a.window_x) - double(rows * span.count)) * exp2(-shift)[0];
      }
      const vec<A> delta = broadcast<A>(reduce_add(product) / total[r]);
      each_score(plan, s.masks, column, scores + r * plan.scores, rows, [&](A* score, mask<A> inside) __attribute__((always_inline)) {
        store(score + behind, inside ? load<A>(score) * (load<A>(score + behind) - delta) : vec<A>{});
      });
      const vec<A> inverse = broadcast<A>(A(1) / total[r]);
      for (int64_t d = r * plan.dim; d < (r + 1) * plan.dim; d += lanes<A>) {
        store(q + d, load<A>(q + d) * inverse);
        store(d_out + d, load<A>(d_out + d) * inverse);
      }
    }
    each_block(plan, [&](auto vectors, int64_t d) {
      constexpr int N = decltype(vectors)::value;
      weighted_vectors<N>(plan, strip, span, key_row, a.extra, &s.extra_plain_keys[d], &s.plain_keys[d], d_scores, &s.sums[d]);
      // the tile's columns of the band's keys: line -> width
      A *d_k = &s.d_k[tile.first_key * plan.dim + d], *d_v = &s.d_v[tile.first_key * plan.dim + d];
      scatter_vectors<N>(plan, strip, span, key_row, a.extra, width, q + d, d_scores, partial + d, d_k);
      scatter_vectors<N>(plan, strip, span, key_row, a.extra, width, d_out + d, scores, partial + a.extra * plan.dim + d, d_v);
    });
    for (int r = 0; r < strip.count; ++r) {
      const vec<A> f = broadcast<A>(A(a.scale) / total[r]);
      T* to = d_q.at(strip.begin + r, x);
      int64_t d = 0;
      for (; d + lanes<A> <= a.dim; d += lanes<A>) store(to + d, load<A>(&s.sums[r * plan.dim + d]) * f);
      if (d < a.dim) store(to + d, load<A>(&s.sums[r * plan.dim + d]) * f, int(a.dim - d));
    }
  }

  // A band's key gradients to where they belong: rows that a band of the first round has stored are added to.
  void keep(const ClassGrid& grid, int64_t begin, int64_t end, int64_t key_row, int64_t key_rows, const A* band, A* sums, void* out,
            A factor) const {
    const bool odd = begin / plan.band % 2 == 1;
    const int64_t shared_until = odd ? grid.rows.end(begin - 1) : 0;
    const int64_t shared_from = odd && end < grid.rows.size ? grid.rows.first(end) : grid.rows.size;
    const vec<A> f = broadcast<A>(factor);
    for (int64_t j = key_row; j < key_row + key_rows; ++j) {
      const bool add = j < shared_until || j >= shared_from;
      for (int64_t x = 0; x < grid.columns.size; ++x) {
        const A* from = band + ((j - key_row) * width + x) * plan.dim;
        if (sums) {
          keep_token(from, Tokens<A>(sums, dense_strides(a), a, grid).at(j, x), f, add);
        } else {
          keep_token(from, Tokens<T>(out, dense_strides(a), a, grid).at(j, x), f, false);
        }
      }
    }
  }
  template <class To> void keep_token(const A* from, To* to, vec<A> f, bool add) const {
    int64_t d = 0;
    for (; d + lanes<A> <= a.dim; d += lanes<A>) store(to + d, load<A>(from + d) * f + (add ? load<A>(to + d) : vec<A>{}));
    if (d < a.dim) {
      const int n = int(a.dim - d);
      store(to + d, load<A>(from + d) * f + (add ? load<A>(to + d, n) : vec<A>{}), n);
    }
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
