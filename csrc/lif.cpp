// Multi-timestep LIF, forward and backward, each in one pass over memory. Equations: LIFParams in
// spikedecoder/params.py.
//
// Threads share the neurons. A few vectors of neurons (AT_ONCE, backward BACK_AT_ONCE) run through all T timesteps
// together with their membrane potentials in registers. Backward computes the potentials again from x, and with them
// the slopes of the surrogate; it keeps both, in registers for the usual neuron at T = 4, else in the thread's scratch
// memory, and then walks back through the timesteps.
//
// Bytes moved per neuron and timestep, the minimum: forward 4 read + 4 written; backward 8 read + 4 written; and per
// neuron the final potential, and what is requested of threshold and initial potential. Limited by memory. Large
// outputs are written past the caches, so that their lines are not read first.
#include "kernels.h"
#include "neuron.h"
#include "parallel.h"
#include "threshold_sum.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

// body(Vectors<U>, first element of the row, channel, lanes) for this thread's part of a timestep.
template <int AT_ONCE, class Body>
SPIKEDECODER_INLINE void for_neurons(int64_t rows, int64_t C, int thread, int threads, const Body& body) {
  const int64_t blocks = (C + AT_ONCE * W - 1) / (AT_ONCE * W);
  const Range mine = share(rows * blocks, thread, threads);
  int64_t row = blocks ? mine.begin / blocks : 0, c = blocks ? mine.begin % blocks * AT_ONCE * W : 0;
  for (int64_t i = mine.begin; i < mine.end; i++) {
    if (c + AT_ONCE * W <= C) {
      body(Vectors<AT_ONCE>{}, row * C, c, W);
    } else {
      int64_t at = c;
      for (; AT_ONCE > 1 && at + W <= C; at += W) body(Vectors<1>{}, row * C, at, W);
      if (at < C) body(Vectors<1>{}, row * C, at, static_cast<int>(C - at));
    }
    c += AT_ONCE * W;
    if (c >= C) {
      c = 0;
      row++;
    }
  }
}

double work(int64_t T, int64_t elements, double per_element) {
  return per_element * static_cast<double>(T) * static_cast<double>(elements);
}

template <class E>
void forward(const LifForward& a) {
  const int64_t step = a.rows * a.C;
  const E* const first = static_cast<const E*>(a.x);
  E* const out = static_cast<E*>(a.spikes);
  const bool past = past_cache(out, a.T * step, a.C);
  with_cell_and_steps(a.neuron, a.T, [&](const auto& cell, auto steps) {
    parallel(threads_for(work(a.T, step, 0.3), a.threads), [&](int thread, int threads) {
      for_neurons<AT_ONCE>(a.rows, a.C, thread, threads,
                  [&](auto vectors, int64_t row, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
        constexpr int U = decltype(vectors)::count;
        const E* x = first + row + c;
        E* spikes = out + row + c;
        F threshold[U], v[U];
        for (int u = 0; u < U; u++) {
          threshold[u] = thresholds_at(a.threshold, row, c + u * W, n);
          v[u] = a.v_init ? load_up_to(a.v_init + row + c + u * W, n) : zero();
        }
        for_steps<decltype(steps)::known>(a.T, [&](int64_t) SPIKEDECODER_INLINE_LAMBDA {
          for (int u = 0; u < U; u++) {
            const F h = cell.charge(load_up_to(x + u * W, n), v[u]);
            const Mask fired = ge(h, threshold[u]);
            v[u] = cell.after(h, fired, threshold[u]);
            store_spikes(spikes + u * W, fired, n, past);
          }
          x += step;
          spikes += step;
        });
        for (int u = 0; a.v && u < U; u++) store_up_to(a.v + row + c + u * W, v[u], n);
      });
    });
  });
}

template <class E>
void backward(const LifBackward& a) {
  const int64_t step = a.rows * a.C;
  const E *const x = static_cast<const E*>(a.x), *const grad_spikes = static_cast<const E*>(a.grad_spikes);
  E* const out = static_cast<E*>(a.grad_x);
  const int most = threads_for(work(a.T, step, 0.6), a.threads);
  const bool past = past_cache(out, a.T * step, a.C);
  // per thread: membrane potentials h of a few vectors of neurons, their slopes, and its share of dL/dthreshold
  const int64_t for_each = round_up(a.T * BACK_AT_ONCE * W, 16), for_both = 2 * for_each;
  const int64_t own = per_thread(for_both + ThresholdSum::size(a.threshold, a.C));
  Scratch scratch(sizeof(float) * static_cast<size_t>(own * most));

  with_cell_and_steps(a.neuron, a.T, [&](const auto& shared_cell, auto steps) {
    constexpr int KNOWN = decltype(steps)::known;
    const int64_t T = KNOWN ? KNOWN : a.T;
    parallel(most, [&](int thread, int threads) {
      const auto cell = shared_cell;  // a copy of the thread's own stays in registers
      const FlushDenormals flush;
      float* const hs = scratch.floats() + own * thread;
      ThresholdSum sum(a.threshold, a.C, a.grad_threshold, hs + for_both);
      for_neurons<BACK_AT_ONCE>(a.rows, a.C, thread, threads,
                  [&](auto vectors, int64_t row, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
        constexpr int U = decltype(vectors)::count;
        F threshold[U], v[U], carry[U], falls[U];
        const int64_t at = row + c;
        for (int u = 0; u < U; u++) {
          threshold[u] = thresholds_at(a.threshold, row, c + u * W, n);
          v[u] = a.v_init ? load_up_to(a.v_init + at + u * W, n) : zero();
          carry[u] = a.grad_v ? load_up_to(a.grad_v + at + u * W, n) : zero();
          falls[u] = zero();
        }
        PerStep<KNOWN, U> potentials(hs), slopes(hs + for_each);
        for_steps<KNOWN>(T, [&](int64_t t) SPIKEDECODER_INLINE_LAMBDA {
          F h[U], slope[U];
          for (int u = 0; u < U; u++) {
            h[u] = cell.charge(load_up_to(x + t * step + at + u * W, n), v[u]);
            v[u] = cell.after(h[u], ge(h[u], threshold[u]), threshold[u]);
            potentials.put(t, u, h[u]);
          }
          cell.slopes(h, threshold, slope);
          for (int u = 0; u < U; u++) slopes.put(t, u, slope[u]);
        });
        for_steps<KNOWN>(T, [&](int64_t before) SPIKEDECODER_INLINE_LAMBDA {
          const int64_t t = T - 1 - before;
          for (int u = 0; u < U; u++) {
            const F grad_spike = load_up_to(grad_spikes + t * step + at + u * W, n);
            const F grad_x =
                cell.back(potentials.get(t, u), threshold[u], slopes.get(t, u), grad_spike, carry[u], falls[u]);
            store_result(out + t * step + at + u * W, grad_x, n, past);
          }
        });
        for (int u = 0; u < U; u++) {
          if (a.grad_v_init) store_up_to(a.grad_v_init + at + u * W, carry[u], n);
          sum.add_up(row, c + u * W, n, cell.threshold_gradient(falls[u]));
        }
      });
      sum.end_run();
    });
  });
  ThresholdSum::combine(a.threshold, a.C, a.grad_threshold, scratch.floats() + for_both, own, most);
}

}  // namespace

void lif_forward(const LifForward& a) { (a.type == Element::float32 ? forward<float> : forward<bfloat16>)(a); }
void lif_backward(const LifBackward& a) { (a.type == Element::float32 ? backward<float> : backward<bfloat16>)(a); }

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
