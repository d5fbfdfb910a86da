// The two ends of the model in decode.cpp: a token's embedding, and the head with its logits.
#pragma once

#include "decode_levels.h"
#include "decode_neurons.h"
#include "decode_parts.h"
#include "kernels.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

SPIKEDECODER_INLINE void copy(const float* from, int64_t n, float* to) {
  memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
}

template <class Kind>
class Ends {
 public:
  // joined, rows: memory for the head's inputs, padded, and for the numbers of those that are not 0.
  Ends(const Decode& a, const Kind& cell, const Neurons<Kind>& neurons, float* joined, int32_t* rows)
      : a_(a), cell_(cell), neurons_(neurons), E_(decode_padded(a.E)), joined_(joined), rows_(rows) {}

  // Writes the residual stream x of token i, the same at each timestep.
  SPIKEDECODER_OUTLINE_MEMBER void embed(int64_t i, float* x) const {
    const int64_t width = a_.token_width, rest = a_.E - width;
    if (a_.embedded) {
      copy(a_.embedded + i * a_.E, a_.E, x);
    } else {
      copy(a_.token_rows + a_.tokens[i] * width, width, x);
      copy(a_.position_rows + (a_.positions[i] - a_.first_position) * rest, rest, x + width);
    }
    for (int64_t c = a_.E; c < E_; c++) x[c] = 0;
    for (int64_t t = 1; t < a_.T; t++) copy(x, E_, x + t * E_);
  }

  // Writes the logits of the stream x, which is changed. r is at the weights of the head.
  SPIKEDECODER_OUTLINE_MEMBER void head(Reader r, const Rows& x, float* logits) const {
    const int64_t columns = decode_padded(a_.V), inputs = decode_head_inputs(a_);
    const float *weight = r.take(inputs * columns), *bias = r.take(columns);
    const float threshold = a_.thresholds[a_.blocks * neurons_per_block];
    if (a_.head_neuron && !a_.float_reunite) neurons_.fire(x, a_.E, threshold, x.start, nullptr);
    join(x);
    if (a_.head_neuron && a_.float_reunite) {
      for (int64_t i = 0; i < inputs; i += W) {
        if constexpr (of_integers<Kind>) {
          store(joined_ + i, cell_(load(joined_ + i)));
        } else {
          const Mask fired = ge(cell_.charge(load(joined_ + i), zero()), set1(threshold));
          store(joined_ + i, keep(fired, set1(1)));
        }
      }
    }
    // moves the inputs that are not 0 to the front
    int64_t n = 0;
    for (int64_t i = 0; i < inputs; i++) {
      const float value = joined_[i];
      joined_[n] = value;
      rows_[n] = static_cast<int32_t>(i);
      n += value != 0;
    }
    for (int64_t c = 0; c < a_.V; c += LEVEL_VECTORS * W) {
      const int64_t vectors = (a_.V - c + W - 1) / W;
      with_vectors<LEVEL_VECTORS>(vectors < LEVEL_VECTORS ? vectors : LEVEL_VECTORS, [&](auto known) {
        constexpr int U = decltype(known)::count;
        F total[U];
        for (int u = 0; u < U; u++) total[u] = load(bias + c + u * W);
        for (int64_t i = 0; i < n; i++) {
          const float* row = weight + rows_[i] * columns + c;
          const F times = set1(joined_[i]);
          for (int u = 0; u < U; u++) total[u] = fma(times, load(row + u * W), total[u]);
        }
        for (int u = 0; u < U; u++) {
          const int64_t left = a_.V - c - u * W;
          store_up_to(logits + c + u * W, total[u], static_cast<int>(left < W ? left : W));
        }
      });
    }
  }

 private:
  // joined = the head's input, padded with 0.
  void join(const Rows& x) const {
    if (a_.reunite == Reunite::concatenate) {
      for (int64_t i = decode_head_inputs(a_) / W * W; i < decode_padded(decode_head_inputs(a_)); i++) joined_[i] = 0;
      for (int64_t t = 0; t < a_.T; t++) copy(x[t], a_.E, joined_ + t * a_.E);
      return;
    }
    const int64_t first = a_.reunite == Reunite::final ? a_.T - 1 : 0;
    for (int64_t c = 0; c < E_; c += W) {
      F total = load(x[first] + c);
      for (int64_t t = first + 1; t < a_.T; t++) total = add(total, load(x[t] + c));
      if (a_.reunite == Reunite::average) total = div(total, set1(static_cast<float>(a_.T)));
      store(joined_ + c, total);
    }
  }

  const Decode& a_;
  const Kind& cell_;
  const Neurons<Kind>& neurons_;
  const int64_t E_;
  float* const joined_;
  int32_t* const rows_;
};

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
