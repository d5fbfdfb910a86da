// Multi-timestep LIF. One pass: a vector of neurons runs through all T timesteps in registers.
// Bytes moved per neuron and timestep: forward 4 read + 4 written; backward 8 read + 4 written (and once per
// neuron the final potential, and what is asked for of threshold and initial potential).
#include "kernels.h"
#include "neuron.h"
#include "parallel.h"
#include "threshold_sum.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

// Calls body(element of the row's start, channel, lanes) for this thread's vectors of a timestep.
template <class Body>
SPIKEDECODER_INLINE void for_vectors(int64_t rows, int64_t C, int thread, int threads, const Body& body) {
  const int64_t per_row = (C + W - 1) / W;
  const Range mine = share(rows * per_row, thread, threads, 16);
  int64_t row = per_row ? mine.begin / per_row : 0, c = per_row ? mine.begin % per_row * W : 0;
  for (int64_t i = mine.begin; i < mine.end; i++) {
    const int64_t left = C - c;
    if (left > W) {
      body(row * C, c, W);
      c += W;
    } else {
      body(row * C, c, static_cast<int>(left));
      c = 0;
      row++;
    }
  }
}

double work(int64_t T, int64_t elements, double per_element) {
  return per_element * static_cast<double>(T) * static_cast<double>(elements);
}

}  // namespace

void lif_forward(const LifForward& a) {
  const int64_t step = a.rows * a.C;
  with_cell(a.neuron, [&](const auto& cell) {
    parallel(threads_for(work(a.T, step, 0.3), a.threads), [&](int thread, int threads) {
      const F one = set1(1);
      for_vectors(a.rows, a.C, thread, threads, [&](int64_t row, int64_t c, int n) {
        const F threshold = thresholds_at(a.threshold, row, c, n);
        const float* x = a.x + row + c;
        float* spikes = a.spikes + row + c;
        F v = a.v_init ? load_up_to(a.v_init + row + c, n) : zero();
        for (int64_t t = 0; t < a.T; t++, x += step, spikes += step) {
          const F h = cell.charge(load_up_to(x, n), v);
          const Mask fired = ge(h, threshold);
          v = cell.after(h, fired, threshold);
          store_up_to(spikes, keep(fired, one), n);
        }
        store_up_to(a.v + row + c, v, n);
      });
    });
  });
}

void lif_backward(const LifBackward& a) {
  const int64_t step = a.rows * a.C;
  const int most = threads_for(work(a.T, step, 0.6), a.threads);
  // per thread: the membrane potentials h of one vector of neurons, then its share of dL/dthreshold
  const int64_t potentials = round_up(a.T * W, 16), own = potentials + ThresholdSum::size(a.threshold, a.C);
  Scratch scratch(sizeof(float) * static_cast<size_t>(own * most));

  with_cell(a.neuron, [&](const auto& cell) {
    parallel(most, [&](int thread, int threads) {
      const FlushDenormals flush;
      float* hs = scratch.floats() + own * thread;
      ThresholdSum sum(a.threshold, a.C, a.grad_threshold, hs + potentials);
      for_vectors(a.rows, a.C, thread, threads, [&](int64_t row, int64_t c, int n) {
        const F threshold = thresholds_at(a.threshold, row, c, n);
        const int64_t at = row + c;
        F v = a.v_init ? load_up_to(a.v_init + at, n) : zero();
        for (int64_t t = 0; t < a.T; t++) {
          const F h = cell.charge(load_up_to(a.x + t * step + at, n), v);
          store(hs + t * W, h);
          v = cell.after(h, ge(h, threshold), threshold);
        }
        F carry = a.grad_v ? load_up_to(a.grad_v + at, n) : zero();
        F grad_threshold = zero();
        for (int64_t t = a.T - 1; t >= 0; t--) {
          const F grad_spike = load_up_to(a.grad_spikes + t * step + at, n);
          const F grad_x = cell.back(load(hs + t * W), threshold, grad_spike, carry, grad_threshold);
          store_up_to(a.grad_x + t * step + at, grad_x, n);
        }
        if (a.grad_v_init) store_up_to(a.grad_v_init + at, carry, n);
        sum.add_up(row, c, n, grad_threshold);
      });
      sum.end_run();
    });
  });
  ThresholdSum::combine(a.threshold, a.C, a.grad_threshold, scratch.floats() + potentials, own, most);
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
