// The parts of decode.cpp that do not depend on the order of a model's layers: weights, and the attention on spikes.
#pragma once

#include "bits.h"
#include "kernels.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

struct Norm {
  const float *weight = nullptr, *bias = nullptr, *mean = nullptr, *rstd = nullptr;  // the last two: of channels

  Norm from(int64_t column) const {
    return {weight + column, bias + column, mean ? mean + column : nullptr, rstd ? rstd + column : nullptr};
  }
};

struct Linear {
  const float *weight, *bias;  // panels of decode_panel columns, each [inputs, its columns]; [columns]
  Norm norm;
  int64_t columns;
};

// Reads `Decode::weights` in order.
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

// One timestep of one token's attention: the channels at which q and k spike, v [E], and the first channel of each
// channel's head.
struct Attention {
  const uint16_t *q, *k;
  int64_t q_count, k_count;
  const float* v;
  int64_t E, d;
  const int32_t* first_of;
  const float* decay;  // [E / d] or null
};

// Lists the set bits among E, ascending, and returns how many. May write up to 64 more entries.
SPIKEDECODER_INLINE int64_t list_bits(const uint64_t* words, int64_t E, uint16_t* list) {
  int64_t n = 0;
  for (int64_t w = 0; w < words_for(E); w++) n += indices_of(words[w], static_cast<uint16_t>(64 * w), list + n);
  return n;
}

// Adds v to the rows of the state [E, d], the heads' states one below the other, at which k spikes; out [E, padded] =
// scale * the sum, in each head, of the rows at which q spikes. Whole: d is a multiple of W.
template <bool Whole>
void attend(const Attention& a, F scale, float* state, float* out) {
  const int64_t E = a.E, d = a.d;
  const int32_t* const first_of = a.first_of;
  const auto for_columns = [d](const auto& body) SPIKEDECODER_INLINE_LAMBDA {
    for (int64_t c = 0; c < d; c += W) body(c, static_cast<int>(Whole || d - c >= W ? W : d - c));
  };
  if (a.decay) {
    for (int64_t row = 0; row < E; row++) {
      const F decay = set1(a.decay[first_of[row] / d]);
      float* at = state + row * d;
      for_columns([&](int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
        store_up_to(at + c, mul(load_up_to(at + c, n), decay), n);
      });
    }
  }
  for (const uint16_t *k = a.k, *const end = k + a.k_count; k < end; k++) {
    float* at = state + *k * d;
    const float* v = a.v + first_of[*k];
    for_columns([&](int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
      store_up_to(at + c, add(load_up_to(at + c, n), load_up_to(v + c, n)), n);
    });
  }
  for (int64_t c = 0; c < E; c += W) store(out + c, zero());
  for (const uint16_t *q = a.q, *const end = q + a.q_count; q < end; q++) {
    const float* at = state + *q * d;
    float* sum = out + first_of[*q];
    for_columns([&](int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
      store_up_to(sum + c, add(load_up_to(sum + c, n), load_up_to(at + c, n)), n);
    });
  }
  for (int64_t c = 0; c < E; c += W) store(out + c, mul(load(out + c), scale));
}

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
