// What forward and backward of window_attention share on the CPU: tiles, packing and three inner loops.
//
// A task is a band of query rows of one residue class of one frame and head. It is cut into tiles of some query columns
// whose keys fit a line of Plan::line columns. Within a tile, strips of up to kStrip query rows are worked on together.
//
//   keys, transposed   [dim][row][line]        scores(): lanes are neighbouring key columns, so a query's window takes
//                                              ceil(window_x / kLanes) vectors a row, shared by the queries of a strip
//   keys, as they are  [row][line][padded dim] weighted() and scatter(): lanes are the elements of a head
//   scores of a query  [extra tokens][row of its window][group * kLanes], lanes outside the window hold no weight
#pragma once
#include <math.h>

#include "common/buffer.h"
#include "common/simd.h"
#include "window_attention/window_attention.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int kStrip = 4;
constexpr int kKeyBytes = kVectorBytes < 32 ? kVectorBytes : 32;  // windows are narrow: 16 lanes would be half empty
#if defined(__AVX512F__)
constexpr int kScoreQueries = 4, kScoreRows = 5, kMostVectors = 6;  // what 32 registers hold
#else
constexpr int kScoreQueries = 2, kScoreRows = 5, kMostVectors = 3;  // 16 registers
#endif
constexpr int64_t kDimBlock = 32;  // so that the keys of a strip stay in the first-level cache

template <class A> struct key_of;
template <> struct key_of<float> { typedef float type __attribute__((vector_size(kKeyBytes))); };
template <> struct key_of<double> { typedef double type __attribute__((vector_size(kKeyBytes))); };
template <class A> using key_vec = typename key_of<A>::type;
template <class A> constexpr int kLanes = kKeyBytes / int(sizeof(A));

template <class A> inline key_vec<A> load_key(const A* p) {
  key_vec<A> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_to(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Sizes that every task shares. `band` is a function of the shapes alone: results do not depend on threads.
template <class A> struct Plan {
  int64_t dim;           // padded to whole vectors
  int64_t rows, groups;  // of a query's window: most rows, vectors a row
  int64_t line;          // columns of a tile of keys
  int64_t extra;         // extra tokens, padded to whole vectors
  int64_t scores;        // elements of a query's scores
  int64_t columns;       // most query columns of a tile
  int64_t band, bands;   // query rows of a task, tasks down the tallest class
  int64_t band_keys;     // most key rows of a task
  int64_t classes_y, classes_x;

  Plan(const WindowAttentionArgs& a, bool backward) {
    constexpr int64_t L = kLanes<A>, W = lanes<A>;
    classes_y = smaller(a.dilation_y, a.height);
    classes_x = smaller(a.dilation_x, a.width);
    const int64_t tall = class_size(a.height, a.dilation_y, 0), wide = class_size(a.width, a.dilation_x, 0);
    dim = ceil_to(a.dim, W);
    rows = smaller(a.window_y, tall);
    groups = (smaller(a.window_x, wide) + L - 1) / L;
    line = smaller(2 * groups * L, ceil_to(wide, L));
    extra = ceil_to(a.extra, W);
    scores = extra + ceil_to(rows * groups * L, W) + W;
    columns = larger(1, smaller(line, int64_t(65536) / (kStrip * scores * int64_t(sizeof(A)))));
    const int64_t row_bytes = 2 * line * dim * int64_t(sizeof(A)), cached = int64_t(512) << 10;
    // backward: bands two apart must not meet, see there
    band = backward ? larger(16, 2 * rows) : larger(larger(8, rows), cached / row_bytes - rows);
    band = smaller(band, tall);
    bands = (tall + band - 1) / band;
    band_keys = smaller(tall, band + 2 * rows);
  }
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

// Query columns [begin, end) of a tile and the first key column that its line holds.
struct Tile { int64_t begin, end, first_key; };

inline Tile tile_from(const WindowAxis& columns, int64_t begin, int64_t line, int64_t most) {
  Tile tile{begin, begin + 1, columns.first(begin)};
  while (tile.end < columns.size && tile.end - begin < most && columns.end(tile.end) <= tile.first_key + line) ++tile.end;
  return tile;
}

// Where the window of query column x lies in the line: the vectors start at `lane`, the keys are [skip, skip + count) of them.
struct Span { int64_t lane, skip, count; };

template <class A> inline Span span_of(const Plan<A>& plan, const WindowAxis& columns, const Tile& tile, int64_t x) {
  const int64_t first = columns.first(x) - tile.first_key;
  const int64_t lane = smaller(first, plan.line - plan.groups * kLanes<A>);
  return {lane, first - lane, columns.end(x) - columns.first(x)};
}

// Rows [begin, begin + count) of queries whose windows start at the same row (step 0) or one row apart each (step 1).
struct Strip { int64_t begin; int count, step; int64_t first[kStrip], end[kStrip]; };

inline Strip strip_from(const WindowAxis& rows, int64_t begin, int64_t limit) {
  Strip s{begin, 1, 0, {rows.first(begin)}, {rows.end(begin)}};
  while (s.count < kStrip && begin + s.count < limit) {
    const int64_t first = rows.first(begin + s.count), step = first - s.first[s.count - 1];
    if (s.count > 1 && step != s.step) break;
    s.step = int(step);
    s.first[s.count] = first;
    s.end[s.count] = rows.end(begin + s.count);
    ++s.count;
  }
  return s;
}

// ---- packing

template <class A, class T> inline void pack_row(const T* x, A* out, int64_t dim, int64_t padded, A factor) {
  constexpr int W = lanes<A>;
  const vec<A> f = broadcast<A>(factor);
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(out + d, load<A>(x + d) * f);
  if (d < padded) store(out + d, load<A>(x + d, int(dim - d)) * f);
}

#if defined(__AVX2__)
inline __m256 widen8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 widen8(const bf16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline __m256 widen8(const f16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#endif

// Tokens token(0) .. token(n - 1) -> out[d * stride + i], whole vectors of lanes; lanes beyond n repeat a token.
template <class A, class T, class Token>
inline void pack_transposed(Token token, int64_t n, int64_t dim, A* out, int64_t stride) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < n; i += L) {
    const T* source[L];
    for (int m = 0; m < L; ++m) source[m] = token(i + m < n ? i + m : i);
    int64_t d = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(A) == 4) {
      for (; d + 8 <= dim; d += 8) {
        __m256 r[8], t[8];
        for (int m = 0; m < 8; ++m) r[m] = widen8(source[m] + d);
        for (int m = 0; m < 8; m += 2) {
          t[m] = _mm256_unpacklo_ps(r[m], r[m + 1]);
          t[m + 1] = _mm256_unpackhi_ps(r[m], r[m + 1]);
        }
        for (int m = 0; m < 8; m += 4) {
          r[m] = _mm256_shuffle_ps(t[m], t[m + 2], 0x44);
          r[m + 1] = _mm256_shuffle_ps(t[m], t[m + 2], 0xee);
          r[m + 2] = _mm256_shuffle_ps(t[m + 1], t[m + 3], 0x44);
          r[m + 3] = _mm256_shuffle_ps(t[m + 1], t[m + 3], 0xee);
        }
        for (int m = 0; m < 4; ++m) {
          _mm256_storeu_ps(out + (d + m) * stride + i, _mm256_permute2f128_ps(r[m], r[m + 4], 0x20));
          _mm256_storeu_ps(out + (d + m + 4) * stride + i, _mm256_permute2f128_ps(r[m], r[m + 4], 0x31));
        }
      }
    }
#endif
    for (; d < dim; ++d) {
      for (int m = 0; m < L; ++m) out[d * stride + i + m] = to_float(source[m][d]);
    }
  }
}

// Key rows [row0, row0 + count) of a tile, transposed: out[dim][band_keys + kStrip][line].
template <class A, class T>
inline void pack_keys_transposed(const Plan<A>& plan, const Tokens<const T>& keys, int64_t row0, int64_t count, int64_t column,
                                 int64_t columns, int64_t dim, A* out) {
  const int64_t stride = (plan.band_keys + kStrip) * plan.line;
  for (int64_t r = 0; r < count; ++r) {
    pack_transposed<A, T>([&](int64_t i) { return keys.at(row0 + r, column + i); }, columns, dim, out + r * plan.line, stride);
  }
}

// The same rows as they are: out[row][line][padded dim].
template <class A, class T>
inline void pack_keys(const Plan<A>& plan, const Tokens<const T>& keys, int64_t row0, int64_t count, int64_t column,
                      int64_t columns, int64_t dim, A* out) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      pack_row(keys.at(row0 + r, column + c), out + (r * plan.line + c) * plan.dim, dim, plan.dim, A(1));
    }
  }
}

template <class A, class T>
inline void pack_extra(const Plan<A>& plan, const void* data, const ExtraStrides& s, const WindowAttentionArgs& a, int64_t frame,
                       int64_t head, A* transposed, A* plain) {
  const T* base = static_cast<const T*>(data) + frame * s.frame + head * s.head;
  if (transposed) {
    pack_transposed<A, T>([&](int64_t i) { return base + i * s.token; }, a.extra, a.dim, transposed, plan.extra);
  }
  for (int64_t e = 0; plain && e < a.extra; ++e) pack_row(base + e * s.token, plain + e * plan.dim, a.dim, plan.dim, A(1));
}

// ---- scores[r][a] (+)= sum_d q[r][d] keys[d][row a + STEP r][lanes], R queries, N key rows each

template <int R, int N, int STEP, class A>
inline void score_block(const A* keys, int64_t d_stride, int64_t row_stride, const A* q, int64_t q_stride, int64_t dims,
                        A* scores, int64_t query_stride, int64_t window_stride, bool add) {
  using V = key_vec<A>;
  V sum[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sum[r][n] = add ? load_key(scores + r * query_stride + n * window_stride) : V{};
  }
  for (int64_t d = 0; d < dims; ++d) {
    V query[R];
    for (int r = 0; r < R; ++r) query[r] = q[r * q_stride + d] - V{};
#pragma GCC unroll 16
    for (int j = 0; j < N + STEP * (R - 1); ++j) {
      const V key = load_key(keys + d * d_stride + j * row_stride);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int n = j - STEP * r;
        if (n >= 0 && n < N) sum[r][n] += query[r] * key;
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) memcpy(scores + r * query_stride + n * window_stride, &sum[r][n], sizeof(V));
  }
}

template <int R, int STEP, class A, class... Rest> inline void score_rows(int n, Rest... rest) {
  switch (n) {
    case 1: return score_block<R, 1, STEP, A>(rest...);
    case 2: return score_block<R, 2, STEP, A>(rest...);
    case 3: return score_block<R, 3, STEP, A>(rest...);
    case 4: return score_block<R, 4, STEP, A>(rest...);
    case 5: return score_block<R, 5, STEP, A>(rest...);
  }
}

// All `rows` key rows of `count` queries, in blocks that fit the registers.
template <class A>
inline void score_strip(int count, int step, int64_t rows, const A* keys, int64_t d_stride, int64_t row_stride, const A* q,
                        int64_t q_stride, int64_t dims, A* scores, int64_t query_stride, int64_t window_stride, bool add) {
  const int64_t blocks = (rows + kScoreRows - 1) / kScoreRows;
  for (int r = 0; r < count; r += kScoreQueries) {
    const int queries = count - r < kScoreQueries ? count - r : kScoreQueries;
    for (int64_t b = 0, row = 0; b < blocks; ++b) {
      const int n = int((rows * (b + 1)) / blocks - row);
      const A *k = keys + (row + step * r) * row_stride, *query = q + r * q_stride;
      A* s = scores + r * query_stride + row * window_stride;
      row += n;
      if (queries == 1) {
        score_rows<1, 0, A>(n, k, d_stride, row_stride, query, q_stride, dims, s, query_stride, window_stride, add);
      } else if (queries == 2) {
        step ? score_rows<2, 1, A>(n, k, d_stride, row_stride, query, q_stride, dims, s, query_stride, window_stride, add)
             : score_rows<2, 0, A>(n, k, d_stride, row_stride, query, q_stride, dims, s, query_stride, window_stride, add);
      } else if constexpr (kScoreQueries == 4) {
        if (queries == 3) {
          step ? score_rows<3, 1, A>(n, k, d_stride, row_stride, query, q_stride, dims, s, query_stride, window_stride, add)
               : score_rows<3, 0, A>(n, k, d_stride, row_stride, query, q_stride, dims, s, query_stride, window_stride, add);
        } else {
          step ? score_rows<4, 1, A>(n, k, d_stride, row_stride, query, q_stride, dims, s, query_stride, window_stride, add)
               : score_rows<4, 0, A>(n, k, d_stride, row_stride, query, q_stride, dims, s, query_stride, window_stride, add);
        }
      }
    }
  }
}

// Scores of a strip against its windows and the extra tokens, tile column by tile column.
// q [columns][kStrip][dim], scores [columns][kStrip][plan.scores]
template <class A>
inline void score_tile(const Plan<A>& plan, const WindowAxis& columns, const Tile& tile, const Strip& strip, int64_t key_row0,
                       int64_t dim, const A* keys, const A* extra_keys, const A* q, A* scores) {
  constexpr int L = kLanes<A>;
  const int64_t d_stride = (plan.band_keys + kStrip) * plan.line, width = plan.groups * L;
  int64_t rows = 0;
  for (int r = 0; r < strip.count; ++r) rows = larger(rows, strip.end[r] - strip.first[r]);
  for (int64_t d = 0; d < dim; d += kDimBlock) {
    const int64_t dims = smaller(kDimBlock, dim - d);
    for (int64_t x = tile.begin; x < tile.end; ++x) {
      const Span span = span_of(plan, columns, tile, x);
      const A* query = q + (x - tile.begin) * kStrip * plan.dim + d;
      A* s = scores + (x - tile.begin) * kStrip * plan.scores;
      const A* key = keys + d * d_stride + (strip.first[0] - key_row0) * plan.line + span.lane;
      for (int64_t e = 0; e < plan.extra; e += L) {
        score_strip(strip.count, 0, 1, extra_keys + d * plan.extra + e, plan.extra, 0, query, plan.dim, dims, s + e, plan.scores,
                    0, d > 0);
      }
      for (int64_t g = 0; g < plan.groups; ++g) {
        score_strip(strip.count, strip.step, rows, key + g * L, d_stride, plan.line, query, plan.dim, dims,
                    s + plan.extra + g * L, plan.scores, width, d > 0);
      }
    }
  }
}

// Which lanes of a query's scores hold keys, as ones and zeros: patterns of two window rows for each column of a tile.
template <class A> struct LaneMasks {
  int64_t period;
  Buffer<A> extra, columns;

  LaneMasks(const Plan<A>& plan, int64_t tokens) : period(2 * plan.groups * kLanes<A>), extra(plan.extra), columns(plan.columns * period) {
    for (int64_t e = 0; e < plan.extra; ++e) extra[e] = e < tokens ? A(1) : A(0);
  }

  void set(int64_t column, const Span& span) {
    A* pattern = &columns[column * period];
    for (int64_t i = 0; i < period; ++i) pattern[i] = A(0);
    for (int64_t i = 0; i < span.count; ++i) pattern[span.skip + i] = pattern[period / 2 + span.skip + i] = A(1);
  }
};

// Calls f(address of a vector of scores, its mask) for all scores of a query with `rows` rows at tile column `column`.
template <class A, class F>
inline __attribute__((always_inline)) void each_score(const Plan<A>& plan, LaneMasks<A>& masks, int64_t column, A* scores,
                                                      int64_t rows, F&& f) {
  constexpr int W = lanes<A>;
  for (int64_t i = 0; i < plan.extra; i += W) f(scores + i, load<A>(&masks.extra[i]) != vec<A>{});
  const A* pattern = &masks.columns[column * masks.period];
  const int64_t used = rows * masks.period / 2;
  scores += plan.extra;
  int64_t i = 0, at = 0;
  for (; i + W <= used; i += W) {
    f(scores + i, load<A>(pattern + at) != vec<A>{});
    at = at + W == masks.period ? 0 : at + W;
  }
  if (i < used) f(scores + i, load<A>(pattern + at, int(used - i)) != vec<A>{});
}

// ---- sums over the keys of a strip

template <int I> struct Int { static constexpr int value = I; };

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

// Calls row(r0, r1, keys, weights, n) for the extra tokens and for every key row of a strip at one query column:
// n keys in memory order from `keys` ([row][line][padded dim]) on, and weights[r][0 .. n) for the queries r0 .. r1 - 1.
template <class A, class P, class F>
inline __attribute__((always_inline)) void each_key_row(const Plan<A>& plan, const Strip& strip, const Span& span,
                                                        int64_t key_row0, int64_t extra, P* extra_keys, P* keys,
                                                        int64_t line, const A* scores, F&& row) {
  const A* weights[kStrip] = {scores, scores + plan.scores, scores + 2 * plan.scores, scores + 3 * plan.scores};
  if (extra) row(0, strip.count, extra_keys, weights, extra);
  for (int r = 0; r < kStrip; ++r) {  // as if row 0 of the tile were the first of the window
    weights[r] += plan.extra + span.skip - (r < strip.count ? strip.first[r] : 0) * plan.groups * kLanes<A>;
  }
  int r0 = 0, r1 = 0;
  for (int64_t j = strip.first[0]; j < strip.end[strip.count - 1]; ++j) {
    while (r1 < strip.count && strip.first[r1] <= j) ++r1;
    while (strip.end[r0] <= j) ++r0;
    const int64_t offset = j * plan.groups * kLanes<A>;
    const A* here[kStrip] = {weights[0] + offset, weights[1] + offset, weights[2] + offset, weights[3] + offset};
    row(r0, r1, keys + ((j - key_row0) * line + span.lane + span.skip) * plan.dim, here, span.count);
  }
}

// sums[r][dim] = sum_j weight[r][j] values[j], for the strip's queries at one query column; N vectors of the head at a time
template <int N, class A>
inline void weighted_vectors(const Plan<A>& plan, const Strip& strip, const Span& span, int64_t key_row0, int64_t extra,
                             const A* extra_values, const A* values, const A* scores, A* sums) {
  constexpr int W = lanes<A>;
  const int64_t dim = plan.dim;  // stores might alias the plan's
  vec<A> sum[kStrip][N] = {};
  each_key_row(plan, strip, span, key_row0, extra, extra_values, values, plan.line, scores,
               [&](int r0, int r1, const A* v, const A* const* weights, int64_t n) __attribute__((always_inline)) {
    with_queries(r0, r1, [&](auto from, auto to) __attribute__((always_inline)) {
      for (int64_t j = 0; j < n; ++j) {
        vec<A> value[N];
        for (int u = 0; u < N; ++u) value[u] = load<A>(v + j * dim + u * W);
#pragma GCC unroll 4
        for (int r = from.value; r < to.value; ++r) {
          const vec<A> weight = broadcast<A>(weights[r][j]);
#pragma GCC unroll 8
          for (int u = 0; u < N; ++u) sum[r][u] += weight * value[u];
        }
      }
    });
  });
#pragma GCC unroll 4
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) store(sums + r * dim + u * W, sum[r][u]);
  }
}

// target[j] += sum_r weight[r][j] x[r], for the strip's queries at one query column; target [row][line][padded dim]
template <int N, class A>
inline void scatter_vectors(const Plan<A>& plan, const Strip& strip, const Span& span, int64_t key_row0, int64_t extra,
                            int64_t line, const A* x, const A* scores, A* extra_target, A* target) {
  constexpr int W = lanes<A>;
  const int64_t dim = plan.dim;  // stores might alias the plan's
  vec<A> queries[kStrip][N];
#pragma GCC unroll 4
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) queries[r][u] = load<A>(x + r * dim + u * W);
  }
  each_key_row(plan, strip, span, key_row0, extra, extra_target, target, line, scores,
               [&](int r0, int r1, A* to_keys, const A* const* weights, int64_t n) __attribute__((always_inline)) {
    with_queries(r0, r1, [&](auto from, auto to) __attribute__((always_inline)) {
      for (int64_t j = 0; j < n; ++j) {
        vec<A> sum[N];
        for (int u = 0; u < N; ++u) sum[u] = load<A>(to_keys + j * dim + u * W);
#pragma GCC unroll 4
        for (int r = from.value; r < to.value; ++r) {
          const vec<A> weight = broadcast<A>(weights[r][j]);
#pragma GCC unroll 8
          for (int u = 0; u < N; ++u) sum[u] += weight * queries[r][u];
        }
        for (int u = 0; u < N; ++u) store(to_keys + j * dim + u * W, sum[u]);
      }
    });
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
