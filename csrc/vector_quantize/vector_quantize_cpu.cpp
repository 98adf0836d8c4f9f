// vector_quantize and code_sums on the CPU. The header states maths and shapes.
//
// work      codes are packed by vectors: channel c of lanes<A> codes side by side. A tile is kRows rows against kVectors
//           vectors of codes, its scores in registers from the first term to the comparison; the least score of every lane
//           and the block that it came from stay in registers while the tile's rows go through a panel of codes, which
//           stays in the second-level cache. Threads share the rows. Sums: rows are sorted by code, threads share the codes.
// floor     rows codes channels multiply-adds; no score is ever stored
// numerics  a score is one chain of multiply-adds along the channels, wherever the code stands: equal codes have equal
//           scores. Half types are widened at the pack, so that their answer is that of float. Sums go in the order of rows.
// limits    fewer than 2^31 codes; scratch is the codebook in A, and one tile of rows a thread
#include <omp.h>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/simd.h"
#include "vector_quantize/vector_quantize.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int64_t kPanel = 1 << 18;  // bytes of packed codes that shall stay in a cache

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A> constexpr int64_t width = kVectors * lanes<A>;  // codes of a block
template <class A> using lane_index = decltype(mask<A>{}[0] + 0);

// A block: channels x width factors, negated, then width first terms. Lanes beyond the last code never win.
template <class T> void pack(const QuantizeArgs& a, int64_t block, acc_t<T>* to) {
  using A = acc_t<T>;
  const int64_t w = width<A>, first = block * w;
  A* half = to + a.channels * w;
  for (int64_t lane = 0; lane < w; ++lane) {
    if (first + lane >= a.codes) {
      for (int64_t c = 0; c < a.channels; ++c) to[c * w + lane] = 0;
      half[lane] = std::numeric_limits<A>::infinity();
      continue;
    }
    const T* code = static_cast<const T*>(a.codebook) + (first + lane) * a.channels;
    A square = 0;
    for (int64_t c = 0; c < a.channels; ++c) square += to_float(code[c]) * to_float(code[c]);
    const CodeTerms<A> terms = code_terms(square, a.metric);
    for (int64_t c = 0; c < a.channels; ++c) to[c * w + lane] = -terms.factor * to_float(code[c]);
    half[lane] = terms.half;
  }
}

// Offers to each of kRows rows, channel by channel in `z`, the codes of blocks [begin, end).
template <class A> void search(const A* packed, const A* z, int64_t channels, int64_t begin, int64_t end, Nearest<A>* nearest) {
  const int64_t w = width<A>;
  vec<A> least[kRows];
  mask<A> from[kRows];
  for (int r = 0; r < kRows; ++r) {
    least[r] = broadcast<A>(std::numeric_limits<A>::infinity());
    from[r] = mask<A>{};
  }
  for (int64_t block = begin; block < end; ++block) {
    const A* codes = packed + block * (channels + 1) * w;
    vec<A> score[kRows][kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const vec<A> half = load<A>(codes + channels * w + v * lanes<A>);
      for (int r = 0; r < kRows; ++r) score[r][v] = half;
    }
    for (int64_t c = 0; c < channels; ++c) {
      vec<A> code[kVectors];
      for (int v = 0; v < kVectors; ++v) code[v] = load<A>(codes + c * w + v * lanes<A>);
      for (int r = 0; r < kRows; ++r) {
        const vec<A> x = broadcast<A>(z[c * kRows + r]);
        for (int v = 0; v < kVectors; ++v) score[r][v] += x * code[v];
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const mask<A> here = mask<A>{} + lane_index<A>(block * kVectors + v);
      for (int r = 0; r < kRows; ++r) {
        const auto closer = score[r][v] < least[r];
        least[r] = closer ? score[r][v] : least[r];
        from[r] = closer ? here : from[r];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int lane = 0; lane < lanes<A>; ++lane) nearest[r].offer(least[r][lane], int64_t(from[r][lane]) * lanes<A> + lane);
  }
}

template <class T> void nearest_codes(const QuantizeArgs& a) {
  using A = acc_t<T>;
  const int64_t w = width<A>, blocks = (a.codes + w - 1) / w, stride = (a.channels + 1) * w;
  const int64_t panel = kPanel / (stride * int64_t(sizeof(A))) + 1, tiles = (a.rows + kRows - 1) / kRows;
  Buffer<A> packed(blocks * stride), scratch(a.threads * a.channels * kRows);
  Buffer<Nearest<A>> nearest(tiles * kRows);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) pack<T>(a, block, &packed[block * stride]);
    A* z = &scratch[omp_get_thread_num() * a.channels * kRows];
    for (int64_t begin = 0; begin < blocks; begin += panel) {
#pragma omp for schedule(static) nowait
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * kRows, rows = smaller(kRows, a.rows - first);
        for (int64_t r = 0; r < kRows; ++r) {
          const T* row = static_cast<const T*>(a.z) + (first + smaller(r, rows - 1)) * a.channels;
          for (int64_t c = 0; c < a.channels; ++c) z[c * kRows + r] = to_float(row[c]);
          if (begin == 0) nearest[first + r] = Nearest<A>();
        }
        search<A>(packed.data(), z, a.channels, begin, smaller(begin + panel, blocks), &nearest[first]);
        if (begin + panel < blocks) continue;
        for (int64_t r = 0; r < rows; ++r) put_index(a, first + r, nearest[first + r].index);
      }
    }
  }
}

template <class T> void sum_rows(const CodeSumsArgs& a) {
  using A = acc_t<T>;
  Buffer<int64_t> order(a.rows), starts(a.codes + 1);
  const auto counts = [&](int64_t n) { return a.indices[n] >= 0 && a.indices[n] < a.codes; };
  for (int64_t k = 0; k <= a.codes; ++k) starts[k] = 0;
  for (int64_t n = 0; n < a.rows; ++n) {
    if (counts(n)) ++starts[a.indices[n]];
  }
  for (int64_t k = 1; k <= a.codes; ++k) starts[k] += starts[k - 1];
  for (int64_t n = a.rows - 1; n >= 0; --n) {
    if (counts(n)) order[--starts[a.indices[n]]] = n;
  }
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 64)
  for (int64_t k = 0; k < a.codes; ++k) {
    T* out = static_cast<T*>(a.out) + k * a.channels;
    for_vectors<A>(a.channels, [&](int64_t c, auto n) {
      vec<A> sum = {};
      for (int64_t i = starts[k]; i < starts[k + 1]; ++i) {
        sum += load<A>(static_cast<const T*>(a.x) + order[i] * a.channels + c, n);
      }
      store(out + c, sum, n);
    });
  }
}

}  // namespace

void vector_quantize(const QuantizeArgs& a) {
  if (a.codes < 1 || a.codes > kMostCodes) throw std::invalid_argument("vector_quantize: there must be 1 to 2^31 - 1 codes");
  if (a.rows == 0) return;
  with_dtype(a.dtype, [&](auto tag) { nearest_codes<untag<decltype(tag)>>(a); });
}

void code_sums(const CodeSumsArgs& a) {
  if (a.codes == 0 || a.channels == 0) return;
  with_dtype(a.dtype, [&](auto tag) { sum_rows<untag<decltype(tag)>>(a); });
}

}  // namespace fourdperf::FOURDPERF_ISA
