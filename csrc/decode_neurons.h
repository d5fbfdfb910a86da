// Norms and neurons of one token, inside decode.cpp.
#pragma once

#include "decode_levels.h"
#include "decode_parts.h"
#include "kernels.h"
#include "neuron.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

struct Rows {
  float* start;
  int64_t stride;

  float* operator[](int64_t t) const { return start + t * stride; }
};

// Kind: Cell<...> of LIF neurons, or Counts.
template <class Kind>
class Neurons {
 public:
  // statistics: memory for [T]. Per timestep, bits are written as a row of `word_stride` words, spikes as a row of E.
  Neurons(const Decode& a, const Kind& cell, int64_t word_stride, float* statistics)
      : a_(a), cell_(cell), E_(decode_padded(a.E)), word_stride_(word_stride), statistics_(statistics) {}

  // Subtracts each row's mean.
  SPIKEDECODER_OUTLINE_MEMBER void centre(const Rows& y, int64_t C) const {
    for (int64_t t = 0; t < a_.T; t++) {
      F total = zero();
      for (int64_t c = 0; c < C; c += W) {
        total = add(total, load_up_to(y[t] + c, static_cast<int>(C - c < W ? C - c : W)));
      }
      const F mean = set1(sum(total) / static_cast<float>(C));
      for (int64_t c = 0; c < C; c += W) {
        const int n = static_cast<int>(C - c < W ? C - c : W);
        store_up_to(y[t] + c, sub(load_up_to(y[t] + c, n), mean), n);
      }
    }
  }

  // y = norm(y), in place. For row statistics the rows must have mean 0; each row of `squares` [T, W] adds up to the
  // sum of their squares, or `squares` is null if these are not known yet.
  SPIKEDECODER_OUTLINE_MEMBER void normalise(const Rows& y, int64_t C, const Norm& norm, const float* squares) const {
    if (norm.mean) {
      normalise_by<Normed<false>>(y, C, norm);
    } else {
      row_statistics(y, C, squares);
      normalise_by<Normed<true>>(y, C, norm);
    }
  }

  // The spikes of neurons with input norm(y), or y itself without a norm, as floats [T, E] and as bits; either may be
  // null. The integers of I-LIF always go to `spikes`, which may be y. Norm and squares are as above.
  SPIKEDECODER_OUTLINE_MEMBER void fire(const Rows& y, int64_t C, float threshold, float* spikes, uint64_t* words,
                                        const Norm& norm = {}, const float* squares = nullptr) const {
    if (words) clear(words);
    if (!norm.weight) {
      fire_with<Plain>(y, C, threshold, spikes, words, norm);
    } else if (norm.mean) {
      fire_with<Normed<false>>(y, C, threshold, spikes, words, norm);
    } else {
      row_statistics(y, C, squares);
      fire_with<Normed<true>>(y, C, threshold, spikes, words, norm);
    }
  }

  void clear(uint64_t* words) const {
    for (int64_t i = 0; i < word_stride_ * a_.T; i++) words[i] = 0;
  }

 private:
  // statistics[t] = 1 / sqrt(variance + eps) of a row of mean 0.
  void row_statistics(const Rows& y, int64_t C, const float* squares) const {
    for (int64_t t = 0; t < a_.T; t++) {
      const F total = squares ? load(squares + t * W) : squares_of(y[t], C);
      statistics_[t] = 1 / __builtin_sqrtf(sum(total) / static_cast<float>(C) + a_.eps);
    }
  }

  F squares_of(const float* row, int64_t C) const {
    F total = zero();
    for (int64_t c = 0; c < C; c += W) {
      const F v = load_up_to(row + c, static_cast<int>(C - c < W ? C - c : W));
      total = fma(v, v, total);
    }
    return total;
  }

  template <class Norm_>
  void normalise_by(const Rows& y, int64_t C, const Norm& norm) const {
    for (int64_t c = 0; c < C; c += W) {
      Norm_ normed;
      normed.read(norm, c);
      for (int64_t t = 0; t < a_.T; t++) store(y[t] + c, normed(load(y[t] + c), statistics_[t]));
    }
  }

  // One vector of channels of a norm, with statistics per row (OfRows) or per channel.
  template <bool OfRows>
  struct Normed {
    F weight, bias, mean, rstd;

    SPIKEDECODER_INLINE_MEMBER void read(const Norm& n, int64_t c) {
      weight = load(n.weight + c);
      bias = load(n.bias + c);
      if (OfRows) return;
      mean = load(n.mean + c);
      rstd = load(n.rstd + c);
    }
    SPIKEDECODER_INLINE_MEMBER F operator()(F y, float row_rstd) const {
      return fma(OfRows ? mul(y, set1(row_rstd)) : mul(sub(y, mean), rstd), weight, bias);
    }
  };

  // No norm.
  struct Plain {
    SPIKEDECODER_INLINE_MEMBER void read(const Norm&, int64_t) {}
    SPIKEDECODER_INLINE_MEMBER F operator()(F y, float) const { return y; }
  };

  template <class Input>
  void fire_with(const Rows& y, int64_t C, float threshold, float* spikes, uint64_t* words, const Norm& norm) const {
    if constexpr (of_integers<Kind>) {
      for (int64_t c = 0; c < decode_padded(C); c += W) {
        Input input;
        input.read(norm, c);
        store(spikes + c, cell_(input(load(y.start + c), statistics_[0])));
      }
    } else {
      constexpr int KNOWN = usual<Kind> ? 4 : 0;
      a_.T == KNOWN ? spike_with<Input, KNOWN>(y, C, threshold, spikes, words, norm)
                    : spike_with<Input, 0>(y, C, threshold, spikes, words, norm);
    }
  }

  // Known: the number of timesteps if it is known at compile time, else 0.
  template <class Input, int Known>
  void spike_with(const Rows& y, int64_t C, float threshold, float* spikes, uint64_t* words, const Norm& norm) const {
    const auto run = [&](auto vectors, int64_t c) SPIKEDECODER_INLINE_LAMBDA {
      constexpr int U = decltype(vectors)::count;
      Input input[U];
      F limit[U], v[U];
      for (int u = 0; u < U; u++) {
        input[u].read(norm, c + u * W);
        const int64_t left = C - c - u * W;
        limit[u] = set1(threshold);
        if (left < W) limit[u] = select(mask_of(left > 0 ? (1u << left) - 1 : 0), limit[u], set1(__builtin_inff()));
        v[u] = zero();
      }
      for (int64_t t = 0; t < (Known ? Known : a_.T); t++) {
        uint64_t word = 0;
        for (int u = 0; u < U; u++) {
          const F x = input[u](load(y[t] + c + u * W), statistics_[t]);
          const F h = cell_.charge(x, v[u]);
          const Mask fired = ge(h, limit[u]);
          v[u] = cell_.after(h, fired, limit[u]);
          if (spikes) store(spikes + t * E_ + c + u * W, keep(fired, set1(1)));
          word |= static_cast<uint64_t>(bits(fired)) << (u * W);
        }
        if (words) words[t * word_stride_ + c / 64] |= word << (c % 64);
      }
    };
    const int64_t padded = decode_padded(C);
    int64_t c = 0;
    for (; c + AT_ONCE * W <= padded; c += AT_ONCE * W) run(Vectors<AT_ONCE>{}, c);
    for (; c < padded; c += W) run(Vectors<1>{}, c);
  }

  const Decode& a_;
  const Kind& cell_;
  const int64_t E_, word_stride_;
  float* const statistics_;
};

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
