// Causal spiking attention followed by LIF over the timesteps: see spike_attention.h and neuron.h. A task is one head
// of one sequence with all its timesteps, CHUNK tokens at a time, so that the attention's result is only ever in the
// cache. Backward computes that result again, walks back through the neurons, keeps dL/d(result) of the head (T S d
// floats), and then runs the three scans of the attention's gradients.
// Bytes moved per element of q: forward 12 read + 4 written, the minimum. Backward 40 read + 12 written, and
// dL/d(result) written once and read three times; the minimum is 16 read + 12 written.
#include "neuron.h"
#include "parallel.h"
#include "spike_attention.h"
#include "threshold_sum.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t CHUNK = 32;  // tokens

// One head of one sequence in tensors laid out [T, B, S, H, d]; `head` counts over [B, H].
struct Layout {
  int64_t B, S, H, d;

  int64_t stride() const { return H * d; }
  int64_t timestep() const { return B * S * H * d; }
  int64_t at(int64_t head) const { return head / H * S * H * d + head % H * d; }
};

// body(row's first element, token, channel, lanes) for tokens begin .. end - 1 of the head at `at`.
template <class Body>
SPIKEDECODER_INLINE void for_tokens(const Layout& l, int64_t at, int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; i++) {
    for (int64_t c = 0; c < l.d; c += W) {
      body(at + i * l.stride(), i - begin, c, static_cast<int>(l.d - c < W ? l.d - c : W));
    }
  }
}

}  // namespace

void attention_lif_forward(const AttentionLifForward& a) {
  const Layout l{a.B, a.S, a.H, a.d};
  const int64_t heads = a.B * a.H, size = state_size(a.d), stride = l.stride();
  const int64_t chunk = CHUNK * a.d, own = per_thread(a.T * (size + chunk));
  const int threads = threads_for(
      0.1 * static_cast<double>(a.T * heads * a.S) * static_cast<double>(a.d * a.d) / W, a.threads);
  Scratch scratch(sizeof(float) * static_cast<size_t>(own * threads));
  Runs runs(heads, a.H, threads);
  with_cell(a.neuron, [&](const auto& cell) {
    parallel(threads, [&](int thread, int) {
      const F one = set1(1);
      float *states = scratch.floats() + own * thread, *current = states + a.T * size;
      runs.each([&](int64_t head) {
        clear(states, a.T * size);
        const float decay = a.decay ? a.decay[head % a.H] : 1;
        for (int64_t begin = 0; begin < a.S; begin += CHUNK) {
          const int64_t end = smaller(begin + CHUNK, a.S);
          for (int64_t t = 0; t < a.T; t++) {
            const int64_t at = t * l.timestep() + l.at(head);
            scan(Scan{{a.k + at, stride}, {a.v + at, stride}, {a.q + at, stride},
                      {current + t * chunk, a.d, begin}, states + t * size, a.d, decay, a.scale, false},
                 begin, end);
          }
          for_tokens(l, l.at(head), begin, end, [&](int64_t row, int64_t token, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
            const F threshold = thresholds_at(a.threshold, row, c, n);
            F v = zero();
            for (int64_t t = 0; t < a.T; t++) {
              const F h = cell.charge(load_up_to(current + t * chunk + token * a.d + c, n), v);
              const Mask fired = ge(h, threshold);
              v = cell.after(h, fired, threshold);
              store_up_to(a.spikes + t * l.timestep() + row + c, keep(fired, one), n);
            }
          });
        }
      });
    });
  });
}

void attention_lif_backward(const AttentionLifBackward& a) {
  const Layout l{a.B, a.S, a.H, a.d};
  const int64_t heads = a.B * a.H, size = state_size(a.d), stride = l.stride();
  // per thread: one state per timestep, dL/d(result) of a head, potentials and slopes of a vector
  const int64_t result = round_up(a.S * a.d, 16), potentials = round_up(2 * a.T * W, 16);
  const int64_t own = per_thread(a.T * (size + result) + potentials);
  const int threads = threads_for(
      0.4 * static_cast<double>(a.T * heads * a.S) * static_cast<double>(a.d * a.d) / W, a.threads);
  Scratch scratch(sizeof(float) * static_cast<size_t>(own * threads));
  // dL/dthreshold of each head by itself, so that the sum does not depend on which thread took it
  const int64_t of_head = ThresholdSum::size(a.threshold, a.d);
  Scratch thresholds(sizeof(float) * static_cast<size_t>(of_head * heads));
  Runs runs(heads, a.H, threads);
  with_cell(a.neuron, [&](const auto& cell) {
    parallel(threads, [&](int thread, int) {
      const FlushDenormals flush;
      float* const states = scratch.floats() + own * thread;
      float *const g = states + a.T * size, *const hs = g + a.T * result;  // g holds the result itself first
      float* const slopes = hs + a.T * W;
      runs.each([&](int64_t head) {
        ThresholdSum sum(a.threshold, a.d, a.grad_threshold, thresholds.floats() + of_head * head);
        clear(states, a.T * size);
        const float decay = a.decay ? a.decay[head % a.H] : 1;
        for (int64_t begin = 0; begin < a.S; begin += CHUNK) {
          const int64_t end = smaller(begin + CHUNK, a.S);
          for (int64_t t = 0; t < a.T; t++) {
            const int64_t at = t * l.timestep() + l.at(head);
            scan(Scan{{a.k + at, stride}, {a.v + at, stride}, {a.q + at, stride}, {g + t * result, a.d},
                      states + t * size, a.d, decay, a.scale, false},
                 begin, end);
          }
          for_tokens(l, l.at(head), begin, end, [&](int64_t row, int64_t token, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
            const F threshold = thresholds_at(a.threshold, row, c, n);
            float* const at = g + (begin + token) * a.d + c;
            F v = zero(), carry = zero(), falls = zero();
            for (int64_t t = 0; t < a.T; t++) {
              const F h = cell.charge(load_up_to(at + t * result, n), v);
              store(hs + t * W, h);
              store(slopes + t * W, cell.slope(h, threshold));
              v = cell.after(h, ge(h, threshold), threshold);
            }
            for (int64_t t = a.T - 1; t >= 0; t--) {
              const float* const from = a.grad_spikes + t * l.timestep() + row + c;
              __builtin_prefetch(from + AHEAD * stride);
              const F grad_spike = load_up_to(from, n);
              const F grad = cell.back(load(hs + t * W), threshold, load(slopes + t * W), grad_spike, carry, falls);
              store_up_to(at + t * result, grad, n);
            }
            sum.add_up(row, c, n, cell.threshold_gradient(falls));
          });
        }
        sum.end_run();
        for (int64_t t = 0; t < a.T; t++) {
          const int64_t at = t * l.timestep() + l.at(head);
          const Tokens<const float> q{a.q + at, stride}, k{a.k + at, stride}, v{a.v + at, stride};
          const Tokens<const float> grad{g + t * result, a.d};
          const Tokens<float> dq{a.grad_q + at, stride}, dk{a.grad_k + at, stride}, dv{a.grad_v + at, stride};
          clear(states, size);
          scan<false, true>(Scan{v, k, grad, dq, states, a.d, decay, a.scale, false}, 0, a.S);
          clear(states, size);
          scan<false, false>(Scan{q, grad, k, dv, states, a.d, decay, a.scale, true}, 0, a.S);
          clear(states, size);
          scan<true, false>(Scan{grad, q, v, dk, states, a.d, decay, a.scale, true}, 0, a.S);
        }
      });
    });
  });
  ThresholdSum::combine(a.threshold, a.d, a.grad_threshold, thresholds.floats(), of_head, heads);
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
