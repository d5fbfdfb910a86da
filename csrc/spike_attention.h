// Causal attention without softmax as a scan over tokens with a state of d x d:
//
//     state = decay state + u[i]^T x[i];   out[i] = scale r[i] state
//
// In forward, u, x, r are k, v, q. The gradients are such scans as well (spikedecoder/reference/spike_attention.py):
// dq with v, k, g forward in time; dv with q, g, k and dk with g, q, v backward in time. The state stays in a near
// cache. Where u or r are spikes, only the rows of the state at which they are 1 are touched, unless the state is
// small: then all of it is updated in registers (dense_scan.cpp).
#pragma once

#include "bits.h"
#include "kernels.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

SPIKEDECODER_INLINE int64_t state_columns(int64_t d) { return (d + W - 1) / W * W; }
SPIKEDECODER_INLINE int64_t state_size(int64_t d) { return (d * state_columns(d) + 15) / 16 * 16; }

// The tokens of one head: where token `first` starts, and the distance in floats from one token to the next.
template <class T>
struct Tokens {
  T* start;
  int64_t stride, first = 0;

  SPIKEDECODER_INLINE_MEMBER T* operator[](int64_t i) const { return start + (i - first) * stride; }
};

struct Scan {
  Tokens<const float> u, x, r;
  Tokens<float> out;
  float* state;  // [d, state_columns(d)]
  int64_t d;
  float decay, scale;
  bool reverse, integers = false;  // integers: u and r are any numbers
};

// body(row) for each row where the spikes are 1.
template <class Body>
SPIKEDECODER_INLINE void for_spikes(const float* spikes, int64_t d, const Body& body) {
  for (int64_t first = 0; first < d; first += 64) {
    uint64_t word = word_of_floats(spikes + first, static_cast<int>(d - first < 64 ? d - first : 64));
    for (; word; word &= word - 1) body(first + __builtin_ctzll(word));
  }
}

// How many tokens ahead values are prefetched: tokens lie so far apart that the CPU does not recognise the pattern
// itself.
constexpr int64_t AHEAD = 4;

// Prefetches what scan_columns reads and writes at token i.
template <int V>
SPIKEDECODER_INLINE void fetch(const Scan& s, int64_t i, int64_t column) {
  constexpr int64_t LINE = 16;  // floats
  for (int64_t c = 0; c < s.d; c += LINE) {
    __builtin_prefetch(s.u[i] + c);
    __builtin_prefetch(s.r[i] + c);
  }
  for (int64_t c = column; c < column + V * W; c += LINE) {
    __builtin_prefetch(s.x[i] + c);
    __builtin_prefetch(s.out[i] + c, 1);
  }
}

// Tokens begin .. end - 1, V vectors of columns from `column` on, the last with `last` lanes. DenseU (DenseR): u (r)
// does not hold spikes.
template <int V, bool DenseU, bool DenseR>
static void scan_columns(const Scan& s, int64_t begin, int64_t end, int64_t column, int last) {
  const int64_t columns = state_columns(s.d);
  float* const state = s.state + column;
  const F decay = set1(s.decay), scale = set1(s.scale);
  const auto token = [&](int64_t n) { return s.reverse ? end - 1 - n : begin + n; };
  for (int64_t n = 0; n < AHEAD && n < end - begin; n++) fetch<V>(s, token(n), column);
  for (int64_t n = 0; n < end - begin; n++) {
    const int64_t i = token(n);
    if (n + AHEAD < end - begin) fetch<V>(s, token(n + AHEAD), column);
    const float *u = s.u[i], *r = s.r[i], *from = s.x[i] + column;
    F x[V], sum[V];
    for (int j = 0; j < V; j++) {
      x[j] = load_up_to(from + j * W, j < V - 1 ? W : last);
      sum[j] = zero();
    }
    if (s.decay != 1) {
      for (int64_t row = 0; row < s.d; row++) {
        for (int j = 0; j < V; j++) {
          float* at = state + row * columns + j * W;
          store(at, mul(load(at), decay));
        }
      }
    }
    const auto update = [&](int64_t row, auto product) SPIKEDECODER_INLINE_LAMBDA {
      for (int j = 0; j < V; j++) {
        float* at = state + row * columns + j * W;
        store(at, product(x[j], load(at)));
      }
    };
    if (DenseU) {
      for (int64_t row = 0; row < s.d; row++) {
        const F weight = set1(u[row]);
        update(row, [weight](F a, F b) SPIKEDECODER_INLINE_LAMBDA { return fma(weight, a, b); });
      }
    } else {
      for_spikes(u, s.d, [&](int64_t row) SPIKEDECODER_INLINE_LAMBDA { update(row, [](F a, F b) SPIKEDECODER_INLINE_LAMBDA { return add(a, b); }); });
    }
    if (DenseR) {
      for (int64_t row = 0; row < s.d; row++) {
        const F weight = set1(r[row]);
        for (int j = 0; j < V; j++) sum[j] = fma(weight, load(state + row * columns + j * W), sum[j]);
      }
    } else {
      for_spikes(r, s.d, [&](int64_t row) SPIKEDECODER_INLINE_LAMBDA {
        for (int j = 0; j < V; j++) sum[j] = add(sum[j], load(state + row * columns + j * W));
      });
    }
    float* out = s.out[i] + column;
    for (int j = 0; j < V; j++) store_up_to(out + j * W, mul(sum[j], scale), j < V - 1 ? W : last);
  }
}

// Tokens begin .. end - 1 where u and r may be any numbers: dense_scan.cpp.
void dense_scan(const Scan& s, int64_t begin, int64_t end);

// Whether updating all of a state takes less time than finding the spikes, or u and r are not spikes at all.
template <bool DenseU, bool DenseR>
static bool is_dense(const Scan& s) {
  return s.integers || s.d <= (W < 16 || DenseU || DenseR || s.decay != 1 ? 2 * W : W);
}

// Tokens begin .. end - 1 of one head; the state carries over from call to call.
template <bool DenseU = false, bool DenseR = false>
static void scan(const Scan& s, int64_t begin, int64_t end) {
  if (is_dense<DenseU, DenseR>(s)) return dense_scan(s, begin, end);
  for (int64_t column = 0; column < s.d; column += 4 * W) {
    const int64_t left = s.d - column;
    const int vectors = left >= 4 * W ? 4 : static_cast<int>((left + W - 1) / W);
    const int last = left >= 4 * W ? W : static_cast<int>(left - (vectors - 1) * W);
    switch (vectors) {
      case 1: scan_columns<1, DenseU, DenseR>(s, begin, end, column, last); break;
      case 2: scan_columns<2, DenseU, DenseR>(s, begin, end, column, last); break;
      case 3: scan_columns<3, DenseU, DenseR>(s, begin, end, column, last); break;
      default: scan_columns<4, DenseU, DenseR>(s, begin, end, column, last);
    }
  }
}

SPIKEDECODER_INLINE void clear(float* p, int64_t n) {
  for (int64_t i = 0; i < n; i++) p[i] = 0;
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
