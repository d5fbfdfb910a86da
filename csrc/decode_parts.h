// The parts of decode.cpp that know nothing of a model's course: its weights, one head's attention.
#pragma once

#include "bits.h"
#include "kernels.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

struct Norm {
  const float *weight = nullptr, *bias = nullptr, *mean = nullptr, *rstd = nullptr;  // the last two of channels

  Norm from(int64_t column) const {
    return {weight + column, bias + column, mean ? mean + column : nullptr, rstd ? rstd + column : nullptr};
  }
};

struct Linear {
  const float *weight, *bias;  // in panels of decode_panel columns, each [inputs, its columns]; [columns]
  Norm norm;
  int64_t columns;
};

// Walks `Decode::weights`.
struct Reader {
  const float* at;
  NormKind kind;

  const float* take(int64_t n) {
    const float* here = at;
    at += n;
    return here;
  }
  Norm norm(int64_t columns) {
    Norm n;
    n.weight = take(columns);
    n.bias = take(columns);
    if (kind == NormKind::channel) {
      n.mean = take(columns);
      n.rstd = take(columns);
    }
    return n;
  }
  Linear linear(int64_t inputs, int64_t columns) {
    Linear l;
    l.weight = take(inputs * columns);
    l.bias = take(columns);
    l.norm = norm(columns);
    l.columns = columns;
    return l;
  }
};

struct BlockWeights {
  Linear qkv, proj, fc1, fc2;
  Norm attention;

  BlockWeights(const Decode& a, Reader& r) {
    const int64_t E = decode_padded(a.E), hidden = decode_padded(a.hidden);
    qkv = r.linear(a.E, 3 * E);
    if (a.attention_norm) attention = r.norm(E);
    proj = r.linear(a.E, E);
    fc1 = r.linear(a.E, hidden);
    fc2 = r.linear(a.hidden, E);
  }
};

// Bits first .. first + n of a row of words, n <= 64.
SPIKEDECODER_INLINE uint64_t take_bits(const uint64_t* words, int64_t first, int n) {
  const int64_t word = first / 64, shift = first % 64;
  uint64_t bits = words[word] >> shift;
  if (shift && shift + n > 64) bits |= words[word + 1] << (64 - shift);
  return n == 64 ? bits : bits & ((uint64_t{1} << n) - 1);
}

// body(i) for each bit i < n that is set from bit `first` on.
template <class Body>
SPIKEDECODER_INLINE void for_bits(const uint64_t* words, int64_t first, int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t word = take_bits(words, first + i, static_cast<int>(n - i < 64 ? n - i : 64));
    for (; word; word &= word - 1) body(i + __builtin_ctzll(word));
  }
}

struct HeadSpikes {
  const uint64_t *q, *k;
  int64_t first;   // the head's first channel
  const float* v;  // [d]
};

// One head and timestep: V vectors of the state's columns from `column` on, of which the last has `last` lanes.
template <int V>
SPIKEDECODER_INLINE void attend_columns(const HeadSpikes& s, int64_t d, int64_t column, int last, float decay, F scale,
                                        float* state, float* out) {
  F value[V], sums[V];
  const auto lanes = [last](int j) SPIKEDECODER_INLINE_LAMBDA { return j < V - 1 ? W : last; };
  for (int j = 0; j < V; j++) {
    value[j] = load_up_to(s.v + column + j * W, lanes(j));
    sums[j] = zero();
  }
  state += column;
  if (decay != 1) {
    for (int64_t row = 0; row < d; row++) {
      for (int j = 0; j < V; j++) {
        float* at = state + row * d + j * W;
        store_up_to(at, mul(load_up_to(at, lanes(j)), set1(decay)), lanes(j));
      }
    }
  }
  for_bits(s.k, s.first, d, [&](int64_t row) SPIKEDECODER_INLINE_LAMBDA {
    for (int j = 0; j < V; j++) {
      float* at = state + row * d + j * W;
      store_up_to(at, add(load_up_to(at, lanes(j)), value[j]), lanes(j));
    }
  });
  for_bits(s.q, s.first, d, [&](int64_t row) SPIKEDECODER_INLINE_LAMBDA {
    for (int j = 0; j < V; j++) sums[j] = add(sums[j], load_up_to(state + row * d + j * W, lanes(j)));
  });
  for (int j = 0; j < V; j++) store_up_to(out + column + j * W, mul(sums[j], scale), lanes(j));
}

void attend(const HeadSpikes& s, int64_t d, float decay, F scale, float* state, float* out) {
  for (int64_t column = 0; column < d; column += 4 * W) {
    const int64_t left = d - column;
    const int vectors = left >= 4 * W ? 4 : static_cast<int>((left + W - 1) / W);
    const int last = left >= 4 * W ? W : static_cast<int>(left - (vectors - 1) * W);
    switch (vectors) {
      case 1:
        if (last == W) {
          attend_columns<1>(s, d, column, W, decay, scale, state, out);
        } else {
          attend_columns<1>(s, d, column, last, decay, scale, state, out);
        }
        break;
      case 2: attend_columns<2>(s, d, column, last, decay, scale, state, out); break;
      case 3: attend_columns<3>(s, d, column, last, decay, scale, state, out); break;
      default: attend_columns<4>(s, d, column, last, decay, scale, state, out);
    }
  }
}

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
