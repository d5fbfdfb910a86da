// The normalisation of norm_lif: statistics of rows, and z and y as both passes compute them.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

SPIKEDECODER_INLINE int lanes(int64_t C, int64_t c) { return static_cast<int>(C - c < W ? C - c : W); }

// Timesteps of an integer neuron are only more rows: as many as are worked on together.
constexpr int64_t TOGETHER = 4;

// What both passes read: T timesteps of `rows` rows, or groups of T rows.
template <class E, bool Groups>
struct Normal {
  const E* x;
  const float *weight, *bias, *mean, *rstd;
  int64_t T, rows, C, all;  // all: rows of memory

  template <class Arguments>
  explicit Normal(const Arguments& a)
      : x(static_cast<const E*>(a.x)), weight(a.weight), bias(a.bias), mean(a.mean), rstd(a.rstd),
        T(Groups ? TOGETHER : a.T), rows(Groups ? (a.T * a.rows + TOGETHER - 1) / TOGETHER : a.rows), C(a.C),
        all(a.T * a.rows) {}

  // In rows of memory, from one timestep to the next and from one row to the next.
  int64_t step() const { return Groups ? 1 : rows; }
  static constexpr int64_t stride() { return Groups ? TOGETHER : 1; }
  int64_t index(int64_t t, int64_t row) const { return t * step() + row * stride(); }
  int64_t at(int64_t t, int64_t row) const { return index(t, row) * C; }
  // The same, with as many timesteps as there are of this row: the last group may be smaller.
  std::conditional_t<Groups, Normal, const Normal&> of(int64_t row) const {
    if constexpr (Groups) {
      Normal p = *this;
      if (all - row * TOGETHER < T) p.T = all - row * TOGETHER;
      return p;
    } else {
      return *this;
    }
  }
};

// Mean and 1 / sqrt(variance + eps) of a row in all timesteps, four of them together, in two passes.
template <class E, bool Groups>
SPIKEDECODER_OUTLINE void row_statistics(const Normal<E, Groups>& p, int64_t row, float eps, float* mean, float* rstd) {
  const float n = static_cast<float>(p.C);
  for (int64_t t = 0; t < p.T; t += 4) {
    const E* x[4];
    for (int i = 0; i < 4; i++) x[i] = p.x + p.at(t + i < p.T ? t + i : t, row);
    F sums[4] = {zero(), zero(), zero(), zero()}, means[4];
    for (int64_t c = 0; c < p.C; c += W) {
      for (int i = 0; i < 4; i++) sums[i] = add(sums[i], load_up_to(x[i] + c, lanes(p.C, c)));
    }
    float mean_of[4], squares_of[4];
    lane_sums(sums, mean_of);
    for (int i = 0; i < 4; i++) {
      mean_of[i] /= n;
      means[i] = set1(mean_of[i]);
      sums[i] = zero();
    }
    int64_t c = 0;
    for (; c + W <= p.C; c += W) {
      for (int i = 0; i < 4; i++) {
        const F d = sub(load(x[i] + c), means[i]);
        sums[i] = fma(d, d, sums[i]);
      }
    }
    if (c < p.C) {
      const int k = lanes(p.C, c);
      for (int i = 0; i < 4; i++) {
        const F d = keep(mask_of((1u << k) - 1), sub(load_up_to(x[i] + c, k), means[i]));
        sums[i] = fma(d, d, sums[i]);
      }
    }
    lane_sums(sums, squares_of);
    for (int64_t i = 0; i < 4 && t + i < p.T; i++) {
      mean[p.index(t + i, row)] = mean_of[i];
      rstd[p.index(t + i, row)] = 1 / __builtin_sqrtf(squares_of[i] / n + eps);
    }
  }
}

// Channels c.. of a row: y = z weight + bias, z = (x - mean) rstd, as forward and backward compute it.
template <int U, bool ByRow>
struct Normalise {
  F weight[U], bias[U], mean[U], rstd[U];

  template <class E, bool Groups>
  SPIKEDECODER_INLINE_MEMBER Normalise(const Normal<E, Groups>& p, int64_t c, int n) {
    for (int u = 0; u < U; u++, c += W) {
      weight[u] = load_up_to(p.weight + c, n);
      bias[u] = load_up_to(p.bias + c, n);
      if (ByRow) continue;
      mean[u] = load_up_to(p.mean + c, n);
      rstd[u] = load_up_to(p.rstd + c, n);
    }
  }
  SPIKEDECODER_INLINE_MEMBER F z(int u, F x, const float* row_mean, const float* row_rstd) const {
    return mul(sub(x, ByRow ? set1(*row_mean) : mean[u]), ByRow ? set1(*row_rstd) : rstd[u]);
  }
  SPIKEDECODER_INLINE_MEMBER F y(int u, F z) const { return fma(z, weight[u], bias[u]); }
};

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
