// Causal spiking attention, with a cost linear in the number of tokens: see spike_attention.h. A task is one head of
// one sequence at one timestep, whose state stays in the first- or second-level cache.
// Bytes moved per element of q: forward 12 read + 4 written, the minimum. Backward is three scans of 12 read + 4
// written; the minimum is 16 read + 12 written.
#include "parallel.h"
#include "spike_attention.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

// One head's part of tensors laid out [T, B, S, H, d]; `group` counts over [T, B, H].
struct Layout {
  int64_t S, H, d;

  int64_t stride() const { return H * d; }
  int64_t at(int64_t group) const { return group / H * S * H * d + group % H * d; }
};

void read_state(const float* from, int64_t d, bool transposed, float* state) {
  clear(state, state_size(d));
  if (!from) return;
  for (int64_t i = 0; i < d; i++) {
    for (int64_t j = 0; j < d; j++) {
      (transposed ? state[j * state_columns(d) + i] : state[i * state_columns(d) + j]) = from[i * d + j];
    }
  }
}

void write_state(const float* state, int64_t d, float* to) {
  for (int64_t i = 0; i < d; i++) {
    for (int64_t j = 0; j < d; j++) to[i * d + j] = state[i * state_columns(d) + j];
  }
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  const Layout l{a.S, a.H, a.d};
  const int64_t groups = a.T * a.B * a.H, own = per_thread(state_size(a.d));
  const double work = static_cast<double>(groups * a.S) * static_cast<double>(a.d * a.d) / W;
  const int threads = threads_for((a.integers ? 0.9 : 0.1) * work, a.threads);
  Scratch states(sizeof(float) * static_cast<size_t>(own * threads));
  Runs runs(groups, a.H, threads);
  parallel(threads, [&](int thread, int) {
    float* state = states.floats() + own * thread;
    runs.each([&](int64_t g) {
      read_state(a.state ? a.state + g * a.d * a.d : nullptr, a.d, false, state);
      const int64_t at = l.at(g);
      const int64_t stride = l.stride();
      const float decay = a.decay ? a.decay[g % a.H] : 1;
      scan(Scan{{a.k + at, stride}, {a.v + at, stride}, {a.q + at, stride}, {a.out + at, stride}, state, a.d, decay,
                a.scale, false, a.integers},
           0, a.S);
      if (a.final_state) write_state(state, a.d, a.final_state + g * a.d * a.d);
    });
  });
}

void attention_backward(const AttentionBackward& a) {
  const Layout l{a.S, a.H, a.d};
  const int64_t groups = a.T * a.B * a.H, size = state_size(a.d), own = per_thread(size), stride = l.stride();
  const double work = static_cast<double>(groups * a.S) * static_cast<double>(a.d * a.d) / W;
  const int threads = threads_for((a.integers ? 2.5 : 0.3) * work, a.threads);
  Scratch states(sizeof(float) * static_cast<size_t>(own * threads));
  Runs runs(groups, a.H, threads);
  parallel(threads, [&](int thread, int) {
    const FlushDenormals flush;
    float* state = states.floats() + own * thread;
    runs.each([&](int64_t group) {
      const int64_t at = l.at(group);
      const Tokens<const float> q{a.q + at, stride}, k{a.k + at, stride}, v{a.v + at, stride}, g{a.grad + at, stride};
      const Tokens<float> dq{a.grad_q + at, stride}, dk{a.grad_k + at, stride}, dv{a.grad_v + at, stride};
      const float decay = a.decay ? a.decay[group % a.H] : 1;
      read_state(a.state ? a.state + group * a.d * a.d : nullptr, a.d, true, state);
      scan<false, true>(Scan{v, k, g, dq, state, a.d, decay, a.scale, false, a.integers}, 0, a.S);
      clear(state, size);
      scan<false, false>(Scan{q, g, k, dv, state, a.d, decay, a.scale, true, a.integers}, 0, a.S);
      clear(state, size);
      scan<true, false>(Scan{g, q, v, dk, state, a.d, decay, a.scale, true, a.integers}, 0, a.S);
    });
  });
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
