// The embedding of a block of rows in the first-level cache: what the CPU kernels of fourier_embed and fourier_linear share.
#pragma once
#include "common/buffer.h"
#include "common/simd.h"
#include "fourier_embed/fourier_embed.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// n elements, converted
template <class A, class Y> inline void copy_row(const A* from, Y* to, int64_t n) {
  constexpr int64_t step = lanes<A>;
  int64_t i = 0;
  for (; i + step <= n; i += step) store(to + i, load<A>(from + i));
  if (i == n) return;
  if (n >= step) return store(to + n - step, load<A>(from + n - step));
  store(to + i, load<A>(from + i), int(n - i));
}

// What all blocks of a call share: for every vector of angles, its frequencies and the coordinates that it multiplies.
template <class A> struct Angles {
  using Lane = typename bits_of<A>::type;
  static constexpr int64_t kAngles = 1024;
  int64_t dims, bands, per_row, rows, room;
  Buffer<A> frequencies;
  Buffer<Lane> lane;        // which of the coordinates from first[v] on
  Buffer<int64_t> first;    // of vector v

  explicit Angles(const FourierArgs& a, int64_t multiple = 1)
      : dims(a.dims), bands(a.bands), per_row(a.dims * a.bands), rows(block_rows(per_row, multiple)),
        room((rows * per_row + lanes<A> - 1) / lanes<A> * lanes<A>), frequencies(room), lane(room), first(room / lanes<A>) {
    for (int64_t i = 0; i < room; ++i) {
      frequencies[i] = static_cast<const A*>(a.frequencies)[i % bands];
      if (i % lanes<A> == 0) first[i / lanes<A>] = i / bands;
      lane[i] = Lane(i / bands - first[i / lanes<A>]);
    }
  }
  // Rows of a block: about kAngles angles, and a multiple of `multiple` rows.
  static int64_t block_rows(int64_t per_row, int64_t multiple) {
    const int64_t rows = kAngles / per_row / multiple * multiple;
    return rows > multiple ? rows : multiple;
  }
  int64_t coordinates() const { return rows * dims + lanes<A>; }
  int64_t scratch() const { return 2 * room + coordinates(); }
};

template <class A> struct Block {
  Angles<A>* angles;
  A *sines, *cosines, *x;  // (rows, D, F) twice, (rows, D)

  Block(Angles<A>& shared, A* scratch)
      : angles(&shared), sines(scratch), cosines(sines + shared.room), x(cosines + shared.room) {
    for (int64_t i = 0; i < shared.coordinates(); ++i) x[i] = 0;
  }

  template <class X> void compute(const X* source, int64_t rows) const {
    constexpr int64_t step = lanes<A>;
    for (int64_t i = 0; i < rows * angles->dims; ++i) x[i] = to_float(source[i]);
    const A* f = angles->frequencies.data();
    const auto* lane = angles->lane.data();
    const int64_t *first = angles->first.data(), count = rows * angles->per_row;
    for (int64_t i = 0; i < count; i += step) {
      typename bits_of<vec<A>>::type pick;
      memcpy(&pick, lane + i, sizeof(pick));
      vec<A> s, c;
      sincos_product<A>(__builtin_shuffle(load<A>(x + *first++), pick), load<A>(f + i), s, c);
      store(sines + i, s);
      store(cosines + i, c);
    }
  }

  // (rows, 2 D F) at distances of `width`: the sines of a row, then its cosines
  template <class Y> void write(Y* out, int64_t rows, int64_t width) const {
    const int64_t n = angles->per_row;
    for (int64_t r = 0; r < rows; ++r) {
      copy_row(sines + r * n, out + r * width, n);
      copy_row(cosines + r * n, out + r * width + n, n);
    }
  }

  // sines <- d_sin cos a - d_cos sin a
  template <class Y> void weigh(const Y* d_out, int64_t rows) const {
    constexpr int64_t step = lanes<A>;
    const int64_t n = angles->per_row;
    for (int64_t r = 0; r < rows; ++r) {
      A *s = sines + r * n, *c = cosines + r * n;
      const Y *d_sin = d_out + r * 2 * n, *d_cos = d_sin + n;
      int64_t i = 0;
      for (; i + step <= n; i += step) {
        store(s + i, load<A>(d_sin + i) * load<A>(c + i) - load<A>(d_cos + i) * load<A>(s + i));
      }
      for (; i < n; ++i) s[i] = to_float(d_sin[i]) * c[i] - to_float(d_cos[i]) * s[i];
    }
  }
};

}  // namespace
}  // namespace fourdperf::FOURDPERF_ISA
