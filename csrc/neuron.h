// One step of a LIF neuron and its gradient, W neurons at a time; shared by lif, norm_lif and
// spike_attention_lif. Equations: spikedecoder/params.py and spikedecoder/reference/lif.py, whose order of
// operations is kept, so that the same input gives the same spikes to the bit.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

SPIKEDECODER_INLINE F sigmoid_derivative(F u, F alpha) {
  const F e = exp2_of_negative(mul(mul(alpha, set1(-1.44269504088896341f)), abs(u)));  // symmetric in u
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
    case Surrogate::triangle: return mul(alpha, max(sub(one, mul(alpha, abs(u))), zero()));
    case Surrogate::fast_sigmoid: break;
  }
  const F d = add(one, mul(alpha, abs(u)));
  return div(one, mul(d, d));
}

// The neuron's constants in registers. Plain: hard reset to 0, decayed input, detached reset, tau a power of
// two and the sigmoid, the common case, in which the branches below are decided at compile time.
template <bool Plain>
struct Cell {
  F tau, inverse_tau, reset, leak, alpha;
  Surrogate surrogate;
  bool exact_inverse, hard_reset, decay_input, detach_reset, shifted;

  explicit SPIKEDECODER_INLINE_MEMBER Cell(const Neuron& n)
      : tau(set1(n.tau)),
        inverse_tau(set1(1 / n.tau)),
        reset(set1(n.v_reset)),
        leak(set1(n.leak)),
        alpha(set1(n.alpha)),
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
    return n.hard_reset && n.v_reset == 0 && n.decay_input && n.detach_reset && exact(n.tau) &&
           n.surrogate == Surrogate::sigmoid;
  }

  SPIKEDECODER_INLINE_MEMBER F over_tau(F a) const {
    return Plain || exact_inverse ? mul(a, inverse_tau) : div(a, tau);
  }

  // The membrane potential before firing.
  SPIKEDECODER_INLINE_MEMBER F charge(F x, F v) const {
    if (Plain) return add(v, mul(sub(x, v), inverse_tau));
    const F over_rest = shifted ? sub(v, reset) : v;
    return decay_input ? add(v, over_tau(sub(x, over_rest))) : sub(add(v, x), over_tau(over_rest));
  }

  // The membrane potential after firing.
  SPIKEDECODER_INLINE_MEMBER F after(F h, Mask fired, F threshold) const {
    if (Plain) return drop(fired, h);
    return hard_reset ? select(fired, reset, h) : sub(h, keep(fired, threshold));
  }

  // One step backwards. `carry` is dL/dv[t] on entry and dL/dv[t-1] on return; dL/dthreshold is added to
  // `threshold_gradient`. Returns dL/dx[t].
  SPIKEDECODER_INLINE_MEMBER F back(F h, F threshold, F grad_spike, F& carry, F& threshold_gradient) const {
    const Mask fired = ge(h, threshold);
    const F u = sub(h, threshold);
    const F slope = Plain ? sigmoid_derivative(u, alpha) : surrogate_derivative(surrogate, u, alpha);
    F through_reset;
    if (Plain || hard_reset) {
      through_reset = drop(fired, carry);
      if (!Plain && !detach_reset) grad_spike = add(grad_spike, mul(carry, sub(reset, h)));
    } else {
      through_reset = carry;
      threshold_gradient = sub(threshold_gradient, keep(fired, carry));
      if (!detach_reset) grad_spike = sub(grad_spike, mul(carry, threshold));
    }
    const F grad_u = mul(grad_spike, slope);
    threshold_gradient = sub(threshold_gradient, grad_u);
    const F grad_h = add(grad_u, through_reset);
    carry = mul(grad_h, leak);
    return Plain || decay_input ? over_tau(grad_h) : grad_h;
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
