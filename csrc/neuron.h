// One timestep of LIF and I-LIF neurons and its gradient, W neurons at a time; shared by lif, ilif, norm_lif,
// spike_attention_lif and decode. Equations: spikedecoder/params.py and spikedecoder/reference/lif.py, whose order of
// operations is kept, so that the same input gives the same spikes, bit for bit.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

// The integer of an I-LIF neuron with input u, in units of v_threshold: clip(floor(u + 1/2), 0, levels). Keeps a NaN:
// max then returns its second argument, and no comparison holds.
SPIKEDECODER_INLINE F count(F u, F levels) {
  const F above = max(zero(), add(u, set1(0.5f)));
  const F inside = select(ge(above, levels), levels, above);
  const F nearest = round(inside);
  return sub(nearest, drop(ge(inside, nearest), set1(1)));
}

// exp(-|a|) = exp2_of_minus_abs(TO_EXP2 a)
constexpr float TO_EXP2 = 1.44269504088896341f * EXP2_PARTS;

SPIKEDECODER_INLINE F sigmoid_derivative(F u, F alpha) {
  const F e = exp2_of_minus_abs(mul(mul(alpha, set1(TO_EXP2)), u));  // symmetric in u
  const F d = add(set1(1), e);
  return div(mul(alpha, e), mul(d, d));
}

SPIKEDECODER_INLINE F atan_derivative(F u, F alpha) {
  const F a = mul(mul(set1(1.57079632679489662f), alpha), u);
  return div(mul(set1(0.5f), alpha), add(set1(1), mul(a, a)));
}

SPIKEDECODER_INLINE F surrogate_derivative(Surrogate surrogate, F u, F alpha) {
  const F one = set1(1);
  switch (surrogate) {
    case Surrogate::sigmoid: return sigmoid_derivative(u, alpha);
    case Surrogate::atan: return atan_derivative(u, alpha);
    case Surrogate::rectangular: return keep(ge(set1(0.5f), mul(abs(u), alpha)), alpha);
    case Surrogate::triangle: return mul(alpha, max(zero(), sub(one, mul(alpha, abs(u)))));
    case Surrogate::fast_sigmoid: break;
  }
  const F d = add(one, mul(alpha, abs(u)));
  return div(one, mul(d, d));
}

// The neuron's constants in registers. Plain is the common case (hard reset to 0, decayed input, detached reset, tau =
// 2, sigmoid), for which the branches below are decided at compile time.
template <bool Plain>
struct Cell {
  F tau, inverse_tau, reset, leak, alpha, alpha_exp2, scale;
  Surrogate surrogate;
  bool exact_inverse, hard_reset, decay_input, detach_reset, shifted;

  explicit SPIKEDECODER_INLINE_MEMBER Cell(const Neuron& n)
      : tau(set1(n.tau)),
        inverse_tau(set1(1 / n.tau)),
        reset(set1(n.v_reset)),
        leak(set1(n.leak)),
        alpha(set1(n.alpha)),
        alpha_exp2(set1(n.alpha * TO_EXP2)),
        scale(set1(__builtin_sqrtf(n.tau / n.alpha))),
        surrogate(n.surrogate),
        exact_inverse(exact(n.tau)),
        hard_reset(n.hard_reset),
        decay_input(n.decay_input),
        detach_reset(n.detach_reset),
        shifted(n.hard_reset && n.v_reset != 0) {}

  static bool exact(float tau) {
    uint32_t pattern;
    memcpy(&pattern, &tau, sizeof pattern);
    return (pattern & 0x7fffffu) == 0;
  }
  static bool plain(const Neuron& n) {
    return n.hard_reset && n.v_reset == 0 && n.decay_input && n.detach_reset && n.tau == 2 &&
           n.surrogate == Surrogate::sigmoid;
  }

  SPIKEDECODER_INLINE_MEMBER F over_tau(F a) const {
    return Plain || exact_inverse ? mul(a, inverse_tau) : div(a, tau);
  }

  // The membrane potential before firing.
  SPIKEDECODER_INLINE_MEMBER F charge(F x, F v) const {
    if (Plain) return fma(sub(x, v), inverse_tau, v);  // times 1/2 is exact, so it rounds once either way
    const F over_rest = shifted ? sub(v, reset) : v;
    return decay_input ? add(v, over_tau(sub(x, over_rest))) : sub(add(v, x), over_tau(over_rest));
  }

  // The membrane potential after firing.
  SPIKEDECODER_INLINE_MEMBER F after(F h, Mask fired, F threshold) const {
    if (Plain) return drop(fired, h);
    return hard_reset ? select(fired, reset, h) : sub(h, keep(fired, threshold));
  }

  // Stores the output of this timestep, the first n lanes.
  template <class E>
  SPIKEDECODER_INLINE_MEMBER void put(E* to, F, Mask fired, int n, bool past) const {
    store_spikes(to, fired, n, past);
  }

  // The surrogate's derivatives at U vectors of h, for `back`. Plain: divided by tau, with as few multiplications as
  // possible: e / d^2 with e = exp(-alpha |h - threshold|) and d = (1 + e) sqrt(tau / alpha). Each step is done for all
  // vectors before the next, which depends on it.
  template <int U>
  SPIKEDECODER_INLINE_MEMBER void slopes(const F (&h)[U], const F (&threshold)[U], F (&slope)[U]) const {
    if (!Plain) {
      for (int u = 0; u < U; u++) slope[u] = surrogate_derivative(surrogate, sub(h[u], threshold[u]), alpha);
      return;
    }
    F d[U];
    for (int u = 0; u < U; u++) slope[u] = fma(h[u], alpha_exp2, mul(threshold[u], sub(zero(), alpha_exp2)));
    exp2_of_minus_abs(slope);
    for (int u = 0; u < U; u++) d[u] = fma(slope[u], scale, scale);
    for (int u = 0; u < U; u++) d[u] = mul(d[u], d[u]);
    for (int u = 0; u < U; u++) slope[u] = div(slope[u], d[u]);
  }

  SPIKEDECODER_INLINE_MEMBER F slope(F h, F threshold) const {
    const F h_of[1] = {h}, threshold_of[1] = {threshold};
    F slope_of[1];
    slopes(h_of, threshold_of, slope_of);
    return slope_of[0];
  }

  // One timestep backwards; returns dL/dx[t]. `slope` comes from `slopes`. `carry` is dL/dv[t] on entry and dL/dv[t-1]
  // on return. `falls` sums up -dL/dthreshold (Plain: divided by tau), for threshold_gradient().
  SPIKEDECODER_INLINE_MEMBER F back(F h, F threshold, F slope, F grad_spike, F& carry, F& falls) const {
    if (Plain) {
      const F by_spike = mul(grad_spike, slope);
      falls = add(falls, by_spike);
      carry = fma_where(not_ge(h, threshold), carry, inverse_tau, by_spike);
      return carry;  // the same as dL/dx: leak = 1 / tau
    }
    const Mask fired = ge(h, threshold);
    F through_reset;
    if (hard_reset) {
      through_reset = drop(fired, carry);
      if (!detach_reset) grad_spike = add(grad_spike, mul(carry, sub(reset, h)));
    } else {
      through_reset = carry;
      falls = add(falls, keep(fired, carry));
      if (!detach_reset) grad_spike = sub(grad_spike, mul(carry, threshold));
    }
    const F grad_u = mul(grad_spike, slope);
    falls = add(falls, grad_u);
    const F grad_h = add(grad_u, through_reset);
    carry = mul(grad_h, leak);
    return decay_input ? over_tau(grad_h) : grad_h;
  }

  // dL/dthreshold, from what `back` has summed up.
  SPIKEDECODER_INLINE_MEMBER F threshold_gradient(F falls) const {
    return sub(zero(), Plain ? mul(falls, tau) : falls);
  }
};

// body(Cell) with the cell's kind known at compile time.
template <class Body>
SPIKEDECODER_INLINE void with_cell(const Neuron& neuron, const Body& body) {
  if (Cell<true>::plain(neuron)) {
    body(Cell<true>(neuron));
  } else {
    body(Cell<false>(neuron));
  }
}

// Whether a cell is the usual (Plain) one, for which code is compiled for exactly what a call requests.
template <class CellType>
constexpr bool usual = std::is_same_v<CellType, Cell<true>>;

// An integer neuron in place of a Cell: h is the input in units of v_threshold, and nothing is left for a next
// timestep.
struct IntegerCell {
  F scale, levels, low, high;

  explicit SPIKEDECODER_INLINE_MEMBER IntegerCell(const Neuron& n)
      : scale(set1(n.scale)), levels(set1(n.levels)), low(set1(n.low)), high(set1(n.high)) {}

  SPIKEDECODER_INLINE_MEMBER F charge(F x, F) const { return mul(x, scale); }
  SPIKEDECODER_INLINE_MEMBER F after(F, Mask, F) const { return zero(); }
  template <class E>
  SPIKEDECODER_INLINE_MEMBER void put(E* to, F h, Mask, int n, bool past) const {
    store_result(to, count(h, levels), n, past);
  }
  template <int U>
  SPIKEDECODER_INLINE_MEMBER void slopes(const F (&)[U], const F (&)[U], F (&slope)[U]) const {
    for (int u = 0; u < U; u++) slope[u] = scale;
  }
  SPIKEDECODER_INLINE_MEMBER F back(F h, F, F slope, F grad_spike, F&, F&) const {
    return keep(ge(h, low), keep(ge(high, h), mul(grad_spike, slope)));
  }
  SPIKEDECODER_INLINE_MEMBER F threshold_gradient(F falls) const { return falls; }
};

template <class CellType>
constexpr bool integers = std::is_same_v<CellType, IntegerCell>;

// body(Cell or IntegerCell, float or bfloat16) with both known at compile time.
template <class Body>
SPIKEDECODER_INLINE void with_neuron(const Neuron& neuron, Element type, const Body& body) {
  const auto with_type = [&](const auto& cell) {
    type == Element::float32 ? body(cell, float{}) : body(cell, bfloat16{});
  };
  neuron.levels > 0 ? with_type(IntegerCell(neuron)) : with_cell(neuron, with_type);
}

// body(t) for T timesteps, with a copy of the code for each if their number is known at compile time. The addresses
// that one copy reads are then evenly spaced, so that the CPU prefetches them.
template <int KNOWN, class Body>
SPIKEDECODER_INLINE void for_steps(int64_t T, const Body& body) {
  if constexpr (KNOWN > 0) {
#pragma GCC unroll 4
    for (int64_t t = 0; t < KNOWN; t++) body(t);
  } else {
    for (int64_t t = 0; t < T; t++) body(t);
  }
}

// The number of timesteps if it is known at compile time, else 0.
template <int Known>
struct Steps {
  static constexpr int known = Known;
};

// body(Steps), with the number of timesteps known at compile time if both it and the cell are the usual ones.
template <class CellType, class Body>
SPIKEDECODER_INLINE void with_steps([[maybe_unused]] int64_t T, const Body& body) {
#if !defined(SPIKEDECODER_LEAN)
  if constexpr (usual<CellType>) {
    if (T == 4) {
      body(Steps<4>{});
      return;
    }
  }
#endif
  body(Steps<0>{});
}
template <class Body>
SPIKEDECODER_INLINE void with_cell_and_steps(const Neuron& neuron, int64_t T, const Body& body) {
  with_cell(neuron, [&](const auto& cell) {
    with_steps<std::decay_t<decltype(cell)>>(T, [&](auto steps) { body(cell, steps); });
  });
}

// A value per timestep and vector, in registers if the number of timesteps is known at compile time, else in memory.
template <int Known, int U>
class PerStep {
 public:
  explicit SPIKEDECODER_INLINE_MEMBER PerStep(float*) {}
  SPIKEDECODER_INLINE_MEMBER void put(int64_t t, int u, F a) { values_[t * U + u] = a; }
  SPIKEDECODER_INLINE_MEMBER F get(int64_t t, int u) const { return values_[t * U + u]; }

 private:
  F values_[Known * U];
};

template <int U>
class PerStep<0, U> {
 public:
  explicit SPIKEDECODER_INLINE_MEMBER PerStep(float* memory) : memory_(memory) {}
  SPIKEDECODER_INLINE_MEMBER void put(int64_t t, int u, F a) { store(memory_ + (t * U + u) * W, a); }
  SPIKEDECODER_INLINE_MEMBER F get(int64_t t, int u) const { return load(memory_ + (t * U + u) * W); }

 private:
  float* memory_;
};

// The thresholds of the n <= W channels from c on, in a row that starts at element `row`.
SPIKEDECODER_INLINE F thresholds_at(const Threshold& t, int64_t row, int64_t c, int n) {
  switch (t.kind) {
    case ThresholdKind::scalar: return set1(t.value);
    case ThresholdKind::channel: return load_up_to(t.values + c, n);
    case ThresholdKind::element: return load_up_to(t.values + row + c, n);
  }
  return zero();
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
