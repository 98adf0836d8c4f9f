// What forward and backward of window_attention share on the CPU: tiles, packing and three inner loops.
//
// A task is a band of query rows of one residue class of one frame and head. Strips of up to kStrip query rows are worked
// on together; a strip is cut into tiles of up to L = lanes<A> query columns.
//
//   scores     lanes are the query columns of a tile: all keys at the same offset from their query (so many rows and
//              columns on) are multiplied at once, whatever the width of the window, and a softmax never sums across
//              lanes. Windows do not hold all offsets at the border: Tiles::inside
//                queries [strip row][dim][L]; keys [row][dim][line]; of a strip row [extra token][L], then
//                [row of its window][offset][L]
//   sums       lanes are the elements of a head: of one query column of a strip, over the keys of its window alone
//                values [row][column][padded dim]
//
// Packed rows of keys and values lie in a ring, which holds the rows that one strip sees.
#pragma once
#include <math.h>

#include "common/buffer.h"
#include "common/simd.h"
#include "window_attention/window_attention.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int kStrip = 4;
#if defined(__AVX512F__)
constexpr int kScoreQueries = 4, kMostVectors = 6;  // what 32 registers hold
#else
constexpr int kScoreQueries = 2, kMostVectors = 3;  // 16 registers
#endif
constexpr int kScoreKeys = 5;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_to(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Query columns [begin, end) of a tile; their windows hold keys at offsets [low, low + offsets).
struct Tile { int64_t begin, end, low, offsets; };

inline Tile tile_from(const WindowAxis& columns, int64_t begin, int64_t most) {
  Tile t{begin, smaller(begin + most, columns.size), columns.size, 0};
  int64_t end = -columns.size;
  for (int64_t x = t.begin; x < t.end; ++x) {
    t.low = smaller(t.low, columns.first(x) - x);
    end = larger(end, columns.end(x) - x);
  }
  t.offsets = end - t.low;
  return t;
}

// Sizes that every task shares. `band` is a function of the shapes alone: results do not depend on threads.
template <class A> struct Plan {
  int64_t dim;                  // padded to whole vectors
  int64_t tile, tiles;          // query columns of a tile, tiles of the widest class
  int64_t rows, offsets;        // of a query's window: most rows, most offsets
  int64_t line, before;         // places of a packed line of keys, of them before the first column
  int64_t key_row, value_row;   // elements of a packed row (a column more than there are: rows a power of two apart collide)
  int64_t ring;                 // packed rows, a power of two
  int64_t scores;               // elements of the scores of a strip row
  int64_t band, bands;          // query rows of a task, tasks down the tallest class
  int64_t band_keys;            // most key rows of a task
  int64_t classes_y, classes_x;

  Plan(const WindowAttentionArgs& a, bool backward) {
    constexpr int64_t L = lanes<A>;
    classes_y = smaller(a.dilation_y, a.height);
    classes_x = smaller(a.dilation_x, a.width);
    const int64_t tall = class_size(a.height, a.dilation_y, 0), wide = class_size(a.width, a.dilation_x, 0);
    dim = ceil_to(a.dim, L);
    rows = smaller(a.window_y, tall);
    tiles = (wide + L - 1) / L;
    tile = (wide + tiles - 1) / tiles;
    offsets = before = 0;
    int64_t after = ceil_to(wide, L);
    for (int64_t narrower = 0; narrower < smaller(2, wide); ++narrower) {  // classes differ by a column at most
      const WindowAxis columns(wide - narrower, a.window_x, a.border);
      for (int64_t x = 0; x < columns.size; x += tile) {
        const Tile t = tile_from(columns, x, tile);
        offsets = larger(offsets, t.offsets);
        before = larger(before, -t.low - x);
        after = larger(after, x + t.low + t.offsets + L - 1);
      }
    }
    line = ceil_to(before + after, L / 2);
    key_row = line * a.dim;
    value_row = (wide + 1) * dim;
    for (ring = 1; ring < smaller(tall, rows + kStrip - 1); ring *= 2) {}
    scores = (a.extra + rows * offsets) * L;
    // backward: bands two apart must not meet, see there
    band = backward ? larger(16, 2 * rows) : ceil_to(larger(16, 4 * rows), kStrip);
    band = smaller(band, tall);
    bands = (tall + band - 1) / band;
    band_keys = smaller(tall, band + 2 * rows);
  }
  int64_t slot(int64_t row) const { return row & (ring - 1); }
};

// One residue class of one frame and head.
struct ClassGrid {
  int64_t frame, head, y, x;  // y, x: the residues
  WindowAxis rows, columns;

  ClassGrid(const WindowAttentionArgs& a, int64_t frame, int64_t head, int64_t y, int64_t x)
      : frame(frame), head(head), y(y), x(x), rows(class_size(a.height, a.dilation_y, y), a.window_y, a.border),
        columns(class_size(a.width, a.dilation_x, x), a.window_x, a.border) {}
};

// The tokens of one class in a strided tensor: at(row, column) points at a head's elements.
template <class T> struct Tokens {
  T* base;
  int64_t row, column;

  template <class P> Tokens(P* data, const GridStrides& s, const WindowAttentionArgs& a, const ClassGrid& c)
      : base(static_cast<T*>(data) + c.frame * s.frame + c.head * s.head + c.y * s.y + c.x * s.x),
        row(a.dilation_y * s.y), column(a.dilation_x * s.x) {}
  T* at(int64_t y, int64_t x) const { return base + y * row + x * column; }
};

inline GridStrides dense_strides(const WindowAttentionArgs& a) {
  return {a.height * a.width * a.heads * a.dim, a.width * a.heads * a.dim, a.heads * a.dim, a.dim};
}

// The tiles of a class, and which lanes of them see a key at an offset: ones and zeros. Tiles away from the border share ones.
template <class A> struct Tiles {
  int64_t count = 0, size = 0, pattern;  // pattern: elements
  Buffer<Tile> tile;
  Buffer<int64_t> slot;
  Buffer<A> patterns;  // [slot][offset][L]

  Tiles(const Plan<A>& plan)
      : pattern(plan.offsets * lanes<A>), tile(plan.tiles), slot(plan.tiles),
        patterns((1 + smaller(plan.tiles, 2 * (plan.offsets / plan.tile + 2))) * pattern) {
    for (int64_t i = 0; i < pattern; ++i) patterns[i] = A(1);
  }

  void set(const Plan<A>& plan, const WindowAxis& columns) {
    if (size == columns.size) return;
    size = columns.size;
    count = 0;
    int64_t slots = 1;
    for (int64_t x = 0; x < size; x += plan.tile, ++count) {
      const Tile& t = tile[count] = tile_from(columns, x, plan.tile);
      bool whole = true;
      for (int64_t q = t.begin; q < t.end; ++q) whole = whole && columns.first(q) == q + t.low && columns.end(q) == q + t.low + t.offsets;
      slot[count] = whole ? 0 : slots++;
      for (int64_t i = 0; !whole && i < t.offsets * lanes<A>; ++i) {
        const int64_t query = x + i % lanes<A>, key = query + t.low + i / lanes<A>;
        patterns[slot[count] * pattern + i] = query < t.end && columns.first(query) <= key && key < columns.end(query) ? A(1) : A(0);
      }
    }
  }
  const A* inside(int64_t t) { return &patterns[slot[t] * pattern]; }
};

// Rows [begin, begin + count) of queries and the key rows that each sees.
struct Strip { int64_t begin; int count; int64_t first[kStrip], end[kStrip]; };

inline Strip strip_from(const WindowAxis& rows, int64_t begin, int64_t limit) {
  Strip s{begin, int(smaller(kStrip, limit - begin)), {}, {}};
  for (int r = 0; r < s.count; ++r) {
    s.first[r] = rows.first(begin + r);
    s.end[r] = rows.end(begin + r);
  }
  return s;
}

// What the strip at query row `y` has to read: its queries (and d_out), and the rows of keys and values from `packed` on.
// Tokens are often pages apart, where no hardware prefetcher follows.
template <class T> struct Ahead {
  Tokens<const T> q, k, v, d_out;
  int64_t columns, bytes, y, end, row, end_row;

  Ahead(const WindowAttentionArgs& a, const ClassGrid& grid, int64_t y, int64_t limit, int64_t packed)
      : q(a.q, a.q_strides, a, grid), k(a.k, a.k_strides, a, grid), v(a.v, a.v_strides, a, grid),
        d_out(a.d_out, a.d_out_strides, a, grid), columns(grid.columns.size), bytes(a.dim * int64_t(sizeof(T))), y(y),
        end(smaller(y + kStrip, limit)), row(packed), end_row(y < end ? grid.rows.end(end - 1) : packed) {}
  Ahead(const WindowAttentionArgs& a, const ClassGrid& grid, int64_t y, int64_t limit)
      : Ahead(a, grid, y, limit, grid.rows.first(y)) {}

  // column x of rows [row, end)
  void rows(const Tokens<const T>& tokens, int64_t row, int64_t end, int64_t x) const {
    for (; x < columns && row < end; ++row) {
      const char* p = reinterpret_cast<const char*>(tokens.at(row, x));
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 2);
    }
  }
  void queries(const Tokens<const T>& tokens, int64_t x) const { rows(tokens, y, end, x); }
  void keys(const Tokens<const T>& tokens, int64_t x) const { rows(tokens, row, end_row, x); }
};

// ---- packing

// out[0 .. padded) = factor x[0 .. dim), zeros beyond
template <class A, class T> inline void pack_row(const T* x, A* out, int64_t dim, int64_t padded, A factor) {
  constexpr int W = lanes<A>;
  const vec<A> f = broadcast<A>(factor);
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(out + d, load<A>(x + d) * f);
  if (d < padded) store(out + d, load<A>(x + d, int(dim - d)) * f);
}

// The vector at element d of a head of `dim` elements, or what the head has of it.
template <class A, class T> inline void store_head(T* to, int64_t d, int64_t dim, vec<A> v, bool streamed) {
  if (streamed) {
    store_streaming(to + d, v);
  } else if (d + lanes<A> <= dim) {
    store(to + d, v);
  } else {
    store(to + d, v, int(dim - d));
  }
}

// Whether a result is written past the caches: where it is large, and whole lines of it are made at a time, `at_once` bytes.
template <class T> inline bool streams(const WindowAttentionArgs& a, const void* out, int64_t at_once) {
  const int64_t head = a.dim * int64_t(sizeof(T)), bytes = a.frames * a.height * a.width * a.heads * head;
  return at_once % 64 == 0 && bytes >= int64_t(4) << 20 && head % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

inline constexpr bool within(int, Full) { return true; }
inline bool within(int i, int n) { return i < n; }

// `count` tokens, `step` apart -> out[d * stride + i] = factor token(i)[d], whole vectors of lanes: zeros from `count` on
template <class A, class T>
inline void pack_transposed(const T* x, int64_t step, int64_t count, int64_t dim, A factor, A* out, int64_t stride) {
  constexpr int W = lanes<A>;
  const vec<A> f = broadcast<A>(factor);
  for_vectors<A>(count, [&](int64_t i, auto tokens) __attribute__((always_inline)) {
    for_vectors<A>(dim, [&](int64_t d, auto width) __attribute__((always_inline)) {
      vec<A> v[W];
#pragma GCC unroll 16
      for (int m = 0; m < W; ++m) v[m] = within(m, tokens) ? load<A>(x + (i + m) * step + d, width) * f : vec<A>{};
      transpose(v);
#pragma GCC unroll 16
      for (int m = 0; m < W; ++m) {
        if (within(m, width)) store(out + (d + m) * stride + i, v[m]);
      }
    });
  });
}

// A row of keys: out[dim][line], column x at place plan.before + x. Places of no column keep the zeros that they began with.
template <class A, class T>
inline void pack_keys_transposed(const Plan<A>& plan, const Tokens<const T>& keys, int64_t row, int64_t columns, int64_t dim, A* out) {
  pack_transposed<A, T>(keys.at(row, 0), keys.column, columns, dim, A(1), out + plan.before, plan.line);
}

// The same row as it is: out[column][padded dim].
template <class A, class T>
inline void pack_keys(const Plan<A>& plan, const Tokens<const T>& keys, int64_t row, int64_t columns, int64_t dim, A* out) {
  for (int64_t x = 0; x < columns; ++x) pack_row(keys.at(row, x), out + x * plan.dim, dim, plan.dim, A(1));
}

template <class A, class T>
inline void pack_extra(const Plan<A>& plan, const void* data, const ExtraStrides& s, const WindowAttentionArgs& a, int64_t frame,
                       int64_t head, A* out) {
  const T* base = static_cast<const T*>(data) + frame * s.frame + head * s.head;
  for (int64_t e = 0; e < a.extra; ++e) pack_row(base + e * s.token, out + e * plan.dim, a.dim, plan.dim, A(1));
}

// ---- what a strip sees

template <int I> struct Int { static constexpr int value = I; };

// Calls f(r0, r1, j, scores): the queries r0 .. r1 - 1 of a strip see key row j; scores[r] are their scores of this row.
template <class A, class F>
inline __attribute__((always_inline)) void each_key_row(const Plan<A>& plan, const Strip& strip, const Tile& tile, int64_t extra,
                                                        A* scores, F&& f) {
  const int64_t step = tile.offsets * lanes<A>;
  A* here[kStrip];
  for (int r = 0; r < kStrip; ++r) here[r] = scores + r * plan.scores + extra * lanes<A> + (strip.first[0] - strip.first[r]) * step;
  int r0 = 0, r1 = 0;
  for (int64_t j = strip.first[0]; j < strip.end[strip.count - 1]; ++j) {
    while (r1 < strip.count && strip.first[r1] <= j) ++r1;
    while (strip.end[r0] <= j) ++r0;
    f(r0, r1, j, here);
    for (int r = 0; r < kStrip; ++r) here[r] += step;
  }
}

// f(Int<r0>, Int<r1>): the queries r0 .. r1 - 1 of a strip share a row of keys.
template <class F> inline __attribute__((always_inline)) void with_queries(int r0, int r1, F&& f) {
  switch (r0 * 4 + r1 - 1) {
    case 0: return f(Int<0>{}, Int<1>{});
    case 1: return f(Int<0>{}, Int<2>{});
    case 2: return f(Int<0>{}, Int<3>{});
    case 3: return f(Int<0>{}, Int<4>{});
    case 5: return f(Int<1>{}, Int<2>{});
    case 6: return f(Int<1>{}, Int<3>{});
    case 7: return f(Int<1>{}, Int<4>{});
    case 10: return f(Int<2>{}, Int<3>{});
    case 11: return f(Int<2>{}, Int<4>{});
    case 15: return f(Int<3>{}, Int<4>{});
  }
}

// ---- scores[r][n][L] = sum_d q[r][d][L] keys(d, n)[L]

// Neighbouring offsets of one row of keys.
template <class A> struct KeyRow {
  const A *keys, *inside;
  int64_t line;
  A outside;
  vec<A> operator()(int64_t d, int n) const { return load<A>(keys + d * line + n); }
  vec<A> seen(vec<A> score, int n) const { return load<A>(inside + n * lanes<A>) > vec<A>{} ? score : broadcast<A>(outside); }
  KeyRow from(int64_t n) const { return {keys + n, inside + n * lanes<A>, line, outside}; }
};

// Extra tokens, which every query sees.
template <class A> struct ExtraKeys {
  const A* keys;
  int64_t dim;
  vec<A> operator()(int64_t d, int n) const { return broadcast<A>(keys[n * dim + d]); }
  vec<A> seen(vec<A> score, int) const { return score; }
  ExtraKeys from(int64_t n) const { return {keys + n * dim, dim}; }
};

template <int R, int N, class A, class Keys>
inline void score_block(const A* q, int64_t dim, const Keys& keys, A* const* scores, int64_t at) {
  constexpr int64_t L = lanes<A>;
  const int64_t strip_row = dim * L;
  vec<A> sum[R][N] = {};
  for (int64_t d = 0; d < dim; ++d) {
    vec<A> query[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      query[r] = load<A>(q + r * strip_row + d * L);
      if (N > 1) hold(query[r]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      vec<A> key = keys(d, n);
      if (R > 1) hold(key);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][n] += query[r] * key;
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(scores[r] + (at + n) * L, keys.seen(sum[r][n], n));
  }
}

template <int R, class A, class Keys>
inline void score_some(int n, const A* q, int64_t dim, const Keys& keys, A* const* scores, int64_t at) {
  switch (n) {
    case 1: return score_block<R, 1>(q, dim, keys, scores, at);
    case 2: return score_block<R, 2>(q, dim, keys, scores, at);
    case 3: return score_block<R, 3>(q, dim, keys, scores, at);
    case 4: return score_block<R, 4>(q, dim, keys, scores, at);
    case 5: return score_block<R, 5>(q, dim, keys, scores, at);
  }
}

// `count` keys and the queries r0 .. r1 - 1 of a strip, in blocks that fit the registers.
template <class A, class Keys>
inline void score_keys(int r0, int r1, int64_t count, const A* q, int64_t dim, const Keys& keys, A* const* scores) {
  const int64_t blocks = (count + kScoreKeys - 1) / kScoreKeys;
  for (int64_t b = 0, at = 0; b < blocks; ++b) {
    const int n = int(count * (b + 1) / blocks - at);
    for (int r = r0; r < r1; r += kScoreQueries) {
      const A* query = q + r * dim * lanes<A>;
      switch (smaller(kScoreQueries, r1 - r)) {
        case 1: score_some<1>(n, query, dim, keys.from(at), scores + r, at); break;
        case 2: score_some<2>(n, query, dim, keys.from(at), scores + r, at); break;
#if defined(__AVX512F__)
        case 3: score_some<3>(n, query, dim, keys.from(at), scores + r, at); break;
        case 4: score_some<4>(n, query, dim, keys.from(at), scores + r, at); break;
#endif
      }
    }
    at += n;
  }
}

// All scores of a strip at one tile; `outside` where a window has no key.
template <class A>
inline void score_tile(const Plan<A>& plan, const Strip& strip, const Tile& tile, const A* inside, int64_t extra, int64_t dim,
                       const A* extra_keys, const A* keys, const A* q, A* scores, A outside) {
  A* first[kStrip];
  for (int r = 0; r < kStrip; ++r) first[r] = scores + r * plan.scores;
  score_keys(0, strip.count, extra, q, dim, ExtraKeys<A>{extra_keys, plan.dim}, first);
  each_key_row(plan, strip, tile, extra, scores, [&](int r0, int r1, int64_t j, A* const* here) {
    const A* row = keys + plan.slot(j) * plan.key_row + plan.before + tile.begin + tile.low;
    score_keys(r0, r1, tile.offsets, q, dim, KeyRow<A>{row, inside, plan.line, outside}, here);
  });
}

// ---- sums over the keys of a strip at one query column

// The key columns [first, first + count) of a query column, its lane, and where its scores of a row begin.
struct Span { int64_t first, count, lane, weight; };

template <class A> inline Span span_of(const WindowAxis& columns, const Tile& tile, int64_t x) {
  const int64_t first = columns.first(x);
  return {first, columns.end(x) - first, x - tile.begin, (first - x - tile.low) * lanes<A> + x - tile.begin};
}

// put(r, u, sum_j weight[r][j] values[j]) for the strip's queries; N vectors of the head at a time
template <int N, class A, class Put>
inline void weighted_vectors(const Plan<A>& plan, const Strip& strip, const Tile& tile, const Span& span, int64_t extra,
                             const A* extra_values, const A* values, A* scores, Put put) {
  constexpr int W = lanes<A>;
  const int64_t dim = plan.dim;  // stores might alias the plan's
  vec<A> sum[kStrip][N] = {};
  const auto add = [&](int r0, int r1, const A* v, A* const* scores, int64_t at, int64_t n) __attribute__((always_inline)) {
    with_queries(r0, r1, [&](auto from, auto to) __attribute__((always_inline)) {
      for (int64_t j = 0; j < n; ++j, at += W) {
        vec<A> value[N];
        for (int u = 0; u < N; ++u) value[u] = load<A>(v + j * dim + u * W);
#pragma GCC unroll 4
        for (int r = from.value; r < to.value; ++r) {
          const vec<A> weight = broadcast<A>(scores[r][at]);
#pragma GCC unroll 8
          for (int u = 0; u < N; ++u) sum[r][u] += weight * value[u];
        }
      }
    });
  };
  if (extra) {
    A* const first[kStrip] = {scores, scores + plan.scores, scores + 2 * plan.scores, scores + 3 * plan.scores};
    add(0, strip.count, extra_values, first, span.lane, extra);
  }
  each_key_row(plan, strip, tile, extra, scores, [&](int r0, int r1, int64_t j, A* const* here) __attribute__((always_inline)) {
    add(r0, r1, values + plan.slot(j) * plan.value_row + span.first * dim, here, span.weight, span.count);
  });
#pragma GCC unroll 4
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) put(r, u, sum[r][u]);
  }
}

// target[j] += sum_r weight[r][j] x[r] for the strip's queries; target [row - row0][column][padded dim]
template <int N, class A>
inline void scatter_vectors(const Plan<A>& plan, const Strip& strip, const Tile& tile, const Span& span, int64_t row0, int64_t extra,
                            const A* x, A* scores, A* extra_target, A* target) {
  constexpr int W = lanes<A>;
  const int64_t dim = plan.dim;  // stores might alias the plan's
  vec<A> queries[kStrip][N];
#pragma GCC unroll 4
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) queries[r][u] = load<A>(x + r * dim + u * W);
  }
  const auto add = [&](int r0, int r1, A* to_keys, A* const* scores, int64_t at, int64_t n) __attribute__((always_inline)) {
    with_queries(r0, r1, [&](auto from, auto to) __attribute__((always_inline)) {
      for (int64_t j = 0; j < n; ++j, at += W) {
        vec<A> sum[N];
        for (int u = 0; u < N; ++u) sum[u] = load<A>(to_keys + j * dim + u * W);
#pragma GCC unroll 4
        for (int r = from.value; r < to.value; ++r) {
          const vec<A> weight = broadcast<A>(scores[r][at]);
#pragma GCC unroll 8
          for (int u = 0; u < N; ++u) sum[u] += weight * queries[r][u];
        }
        for (int u = 0; u < N; ++u) store(to_keys + j * dim + u * W, sum[u]);
      }
    });
  };
  if (extra) {
    A* const first[kStrip] = {scores, scores + plan.scores, scores + 2 * plan.scores, scores + 3 * plan.scores};
    add(0, strip.count, extra_target, first, span.lane, extra);
  }
  each_key_row(plan, strip, tile, extra, scores, [&](int r0, int r1, int64_t j, A* const* here) __attribute__((always_inline)) {
    add(r0, r1, target + (j - row0) * plan.value_row + span.first * dim, here, span.weight, span.count);
  });
}

// f(Int<N>, first element) over the vectors of a head, in as even blocks of at most kMostVectors as there can be.
template <class A, class F> inline void each_block(const Plan<A>& plan, F&& f) {
  const int64_t vectors = plan.dim / lanes<A>, blocks = (vectors + kMostVectors - 1) / kMostVectors;
  for (int64_t b = 0, begin = 0; b < blocks; ++b) {
    const int64_t end = vectors * (b + 1) / blocks;
    switch (end - begin) {
      case 1: f(Int<1>{}, begin * lanes<A>); break;
      case 2: f(Int<2>{}, begin * lanes<A>); break;
      case 3: f(Int<3>{}, begin * lanes<A>); break;
#if defined(__AVX512F__)
      case 4: f(Int<4>{}, begin * lanes<A>); break;
      case 5: f(Int<5>{}, begin * lanes<A>); break;
      case 6: f(Int<6>{}, begin * lanes<A>); break;
#endif
    }
    begin = end;
  }
}

}  // namespace
}  // namespace fourdperf::FOURDPERF_ISA
