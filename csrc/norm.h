// The normalisation of norm_lif: statistics of rows, and z and y as both passes compute them.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

// For an integer neuron timesteps are no different from rows: so many rows are processed together in their place.
constexpr int64_t TOGETHER = 4;

// What both passes read: T timesteps of `rows` rows, or `rows` groups of T rows (Groups).
template <class E, bool Groups>
struct Normal {
  const E* x;
  const float *weight, *bias, *mean, *rstd;
  int64_t T, rows, C, all;  // all: number of rows in memory

  template <class Arguments>
  explicit Normal(const Arguments& a)
      : x(static_cast<const E*>(a.x)), weight(a.weight), bias(a.bias), mean(a.mean), rstd(a.rstd),
        T(Groups ? TOGETHER : a.T), rows(Groups ? (a.T * a.rows + TOGETHER - 1) / TOGETHER : a.rows), C(a.C),
        all(a.T * a.rows) {}

  // Distances from one timestep to the next and from one row to the next, in rows of memory.
  int64_t step() const { return Groups ? 1 : rows; }
  static constexpr int64_t stride() { return Groups ? TOGETHER : 1; }
  int64_t index(int64_t t, int64_t row) const { return t * step() + row * stride(); }
  int64_t at(int64_t t, int64_t row) const { return index(t, row) * C; }
  // The same, with T as it is for this row: the last group may be smaller.
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

// Four timesteps of a row from t on; if it has fewer, the first of them is repeated.
template <class E>
struct FourSteps {
  const E* x[4];

  template <bool Groups>
  SPIKEDECODER_INLINE_MEMBER FourSteps(const Normal<E, Groups>& p, int64_t row, int64_t t) {
    for (int i = 0; i < 4; i++) x[i] = p.x + p.at(t + i < p.T ? t + i : t, row);
  }
  // For each of the four, f(sum so far, vector, timestep, valid lanes) accumulated over C channels.
  template <class Of>
  SPIKEDECODER_INLINE_MEMBER Four sums(int64_t C, const Of& f) const {
    F sums[4] = {zero(), zero(), zero(), zero()};
    const int64_t whole = C / W * W;
    for (int64_t c = 0; c < whole; c += W) {
      for (int i = 0; i < 4; i++) sums[i] = f(sums[i], load(x[i] + c), i, W);
    }
    if (whole < C) {
      const int n = static_cast<int>(C - whole);
      for (int i = 0; i < 4; i++) sums[i] = f(sums[i], load_n(x[i] + whole, n), i, n);
    }
    return lane_sums(sums);
  }
};

// How many rows have their statistics computed together, each step for all of them before the next, which depends on
// it: as many as stay in the first-level cache until they are normalised.
constexpr int64_t MOST_ROWS = 8;
template <class E, bool Groups>
SPIKEDECODER_INLINE int64_t rows_together(const Normal<E, Groups>& p) {
  const int64_t rows = (16 << 10) / (static_cast<int64_t>(sizeof(E)) * p.T * p.C + 1);
  return rows > MOST_ROWS ? MOST_ROWS : rows > 1 ? rows : 1;
}

// Means and 1 / sqrt(variance + eps) of up to MOST_ROWS rows in all timesteps, in two passes over them.
template <class E, bool Groups>
SPIKEDECODER_OUTLINE void row_statistics(const Normal<E, Groups>& all, int64_t first, int64_t end, float eps,
                                         float* mean, float* rstd) {
  const int64_t C = all.C;
  const float n = static_cast<float>(C);
  for (int64_t t = 0; t < all.T; t += 4) {
    Four means[MOST_ROWS], squares[MOST_ROWS];
    for (int64_t row = first; row < end; row++) {
      means[row - first] = FourSteps<E>(all.of(row), row, t).sums(
          C, [](F sum, F x, int, int) SPIKEDECODER_INLINE_LAMBDA { return add(sum, x); });
    }
    for (int64_t row = 0; row < end - first; row++) means[row] /= n;
    for (int64_t row = first; row < end; row++) {
      F mean_of[4];
      for (int i = 0; i < 4; i++) mean_of[i] = set1(means[row - first][i]);
      squares[row - first] = FourSteps<E>(all.of(row), row, t).sums(
          C, [&](F sum, F x, int i, int lanes) SPIKEDECODER_INLINE_LAMBDA {
            F d = sub(x, mean_of[i]);
            if (lanes < W) d = keep(mask_of((1u << lanes) - 1), d);
            return fma(d, d, sum);
          });
    }
    // (NaN where the variance overflows: the result would otherwise look sound)
    for (int64_t row = 0; row < end - first; row++) {
      const Four variance = squares[row] / n;
      squares[row] = 1 / sqrt(variance + eps) + 0 * variance;
    }
    for (int64_t row = first; row < end; row++) {
      const auto& p = all.of(row);
      for (int i = 0; i < 4 && t + i < p.T; i++) {
        mean[p.index(t + i, row)] = means[row - first][i];
        rstd[p.index(t + i, row)] = squares[row - first][i];
      }
    }
  }
}

// Channels of a row from c on: y = z weight + bias, z = (x - mean) rstd, as both forward and backward compute it.
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
