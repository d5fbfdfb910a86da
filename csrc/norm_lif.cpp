// Normalisation followed by LIF, in one pass over memory: the normalised value is never written.
// Bytes moved per element: forward 4 read + 4 written; backward 8 read + 4 written (whole), 8 read (reduce),
// 8 read + 4 written (apply). A row is read again from the first-level cache.
#include "kernels.h"
#include "neuron.h"
#include "parallel.h"
#include "threshold_sum.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

double work(int64_t T, int64_t rows, int64_t C, double per_element) {
  return per_element * static_cast<double>(T * rows) * static_cast<double>(C);
}

SPIKEDECODER_INLINE int lanes(int64_t C, int64_t c) { return static_cast<int>(C - c < W ? C - c : W); }

// What both passes read, and z and y from it.
template <class E>
struct Normal {
  NormKind kind;
  const E* x;
  const float *weight, *bias, *mean, *rstd;
  int64_t T, rows, C;

  int64_t at(int64_t t, int64_t row) const { return (t * rows + row) * C; }
};

// Weight and bias of W channels, and their statistics where those are per channel.
struct Channels {
  F weight, bias, mean, rstd;

  template <class E>
  SPIKEDECODER_INLINE_MEMBER void read(const Normal<E>& p, int64_t c, int n) {
    const bool own = p.kind == NormKind::channel;
    weight = load_up_to(p.weight + c, n);
    bias = load_up_to(p.bias + c, n);
    mean = own ? load_up_to(p.mean + c, n) : zero();
    rstd = own ? load_up_to(p.rstd + c, n) : zero();
  }

  template <class E>
  SPIKEDECODER_INLINE_MEMBER F z(const Normal<E>& p, int64_t t, int64_t row, int64_t c, int n) const {
    const F x = load_up_to(p.x + p.at(t, row) + c, n);
    if (p.kind == NormKind::channel) return mul(sub(x, mean), rstd);
    const int64_t r = t * p.rows + row;
    return mul(sub(x, set1(p.mean[r])), set1(p.rstd[r]));
  }

  SPIKEDECODER_INLINE_MEMBER F y(F z) const { return fma(z, weight, bias); }
};

// Mean and 1 / sqrt(variance + eps) of a row in all timesteps, four of them together, in two passes.
template <class E>
SPIKEDECODER_INLINE void row_statistics(const Normal<E>& p, int64_t row, float eps, float* mean, float* rstd) {
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
      mean[(t + i) * p.rows + row] = mean_of[i];
      rstd[(t + i) * p.rows + row] = 1 / __builtin_sqrtf(squares_of[i] / n + eps);
    }
  }
}

template <class E>
void forward(const NormLifForward& a) {
  const Normal<E> p{a.kind, static_cast<const E*>(a.x), a.weight, a.bias, a.mean, a.rstd, a.T, a.rows, a.C};
  E* const spikes = static_cast<E*>(a.spikes);
  const bool past = past_cache(spikes, a.T * a.spikes_rows * a.C, a.C);
  with_cell(a.neuron, [&](const auto& cell) {
    parallel(threads_for(work(a.T, a.rows, a.C, 0.4), a.threads), [&](int thread, int threads) {
      const Range rows = share(a.rows, thread, threads);
      for (int64_t row = rows.begin; row < rows.end; row++) {
        if (a.kind == NormKind::row) row_statistics(p, row, a.eps, a.mean, a.rstd);
        for_channels_evenly(a.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
          constexpr int U = decltype(vectors)::count;
          Channels channels[U];
          F threshold[U], v[U];
          for (int u = 0; u < U; u++) {
            channels[u].read(p, c + u * W, n);
            threshold[u] = thresholds_at(a.threshold, row * a.C, c + u * W, n);
            v[u] = zero();
          }
          for (int64_t t = 0; t < a.T; t++) {
            for (int u = 0; u < U; u++) {
              const F h = cell.charge(channels[u].y(channels[u].z(p, t, row, c + u * W, n)), v[u]);
              const Mask fired = ge(h, threshold[u]);
              v[u] = cell.after(h, fired, threshold[u]);
              store_spikes(spikes + (t * a.spikes_rows + row) * a.C + c + u * W, fired, n, past);
              __builtin_prefetch(p.x + p.at(t, row + 1) + c + u * W);  // its statistics come next
            }
          }
        });
      }
    });
  });
}

// One thread's scratch for the backward pass.
struct RowScratch {
  float* g;                // [T, C] of one row: dL/dz
  float* steps;            // [2, T, BACK_AT_ONCE vectors]: z and h of the channels at hand, where T is not known
  float *sum_g, *sum_gz;   // [T to a multiple of 16, 1 vector]: of the row's dL/dz, and of its products with z
  float *weight, *bias;    // [C]: sums over rows of g z and of g
  float* threshold;
  int64_t padded;          // C, to whole vectors

  static int64_t steps_size(int64_t T) { return round_up(2 * BACK_AT_ONCE * T * W, 16); }
  static int64_t weight_at(int64_t T, int64_t C) {
    return T * round_up(C, 16) + steps_size(T) + 2 * round_up(T, 16) * W;
  }
  static int64_t threshold_at(int64_t T, int64_t C) { return weight_at(T, C) + 2 * round_up(C, 16); }
  static int64_t size(const Threshold& t, int64_t T, int64_t C) {
    return threshold_at(T, C) + ThresholdSum::size(t, C);
  }

  RowScratch(float* memory, int64_t T, int64_t C) : padded(round_up(C, 16)) {
    g = memory;
    steps = g + T * padded;
    sum_g = steps + steps_size(T);
    sum_gz = sum_g + round_up(T, 16) * W;
    weight = memory + weight_at(T, C);
    bias = weight + padded;
    threshold = memory + threshold_at(T, C);
    for (int64_t c = 0; c < padded; c++) weight[c] = bias[c] = 0;
  }
};

// What the backward pass does besides going back through the LIF.
template <class E>
struct Backward {
  const NormLifBackward& a;
  Normal<E> p;
  const E* grad_spikes;
  E* grad_x;
  bool past, whole, sums, apply;

  explicit Backward(const NormLifBackward& of)
      : a(of),
        p{of.kind, static_cast<const E*>(of.x), of.weight, of.bias, of.mean, of.rstd, of.T, of.rows, of.C},
        grad_spikes(static_cast<const E*>(of.grad_spikes)),
        grad_x(static_cast<E*>(of.grad_x)),
        past(past_cache(grad_x, p.at(of.T, 0), of.C)),
        whole(of.part == NormLifPart::whole),
        sums(of.part != NormLifPart::apply),
        apply(of.part == NormLifPart::apply) {}
};

// The first of two passes over a row: g = dL/dy through the LIF, and all sums. Where channels have the
// statistics (apply), dL/dx is known at once; where rows have them, dL/dz is kept until the row's sums are.
template <int Known, class CellType, class E>
SPIKEDECODER_INLINE void back_through_lif(const CellType& cell, const Backward<E>& b, int64_t row, const RowScratch& s,
                      ThresholdSum& threshold_sum) {
  const NormLifBackward& a = b.a;
  const Normal<E>& p = b.p;
  const int64_t T = Known ? Known : p.T;
  const bool whole = b.whole, apply = b.apply;
  for (int64_t t = 0; t < T; t++) {
    store(s.sum_g + t * W, zero());
    store(s.sum_gz + t * W, zero());
  }
  for_channels_evenly<BACK_AT_ONCE>(p.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
    constexpr int U = decltype(vectors)::count;
    PerStep<Known, U> z(s.steps), h(s.steps + T * U * W);
    Channels channels[U];
    F threshold[U], v[U], carry[U], falls[U], sum_g[U], sum_gz[U];
    for (int u = 0; u < U; u++) {
      channels[u].read(p, c + u * W, n);
      threshold[u] = thresholds_at(a.threshold, row * p.C, c + u * W, n);
      v[u] = carry[u] = falls[u] = sum_g[u] = sum_gz[u] = zero();
    }
#pragma GCC unroll 4
    for (int64_t t = 0; t < T; t++) {
      for (int u = 0; u < U; u++) {
        const F normal = channels[u].z(p, t, row, c + u * W, n);
        const F potential = cell.charge(channels[u].y(normal), v[u]);
        z.put(t, u, normal);
        h.put(t, u, potential);
        v[u] = cell.after(potential, ge(potential, threshold[u]), threshold[u]);
        __builtin_prefetch(p.x + p.at(t, row + 1) + c + u * W);
      }
    }
#pragma GCC unroll 4
    for (int64_t t = T - 1; t >= 0; t--) {
      F of_row = zero(), of_row_z = zero();
      for (int u = 0; u < U; u++) {
        const int64_t at = p.at(t, row) + c + u * W;
        const F grad_spike = load_up_to(b.grad_spikes + at, n), normal = z.get(t, u);
        __builtin_prefetch(b.grad_spikes + p.at(t, row + 1) + c + u * W);
        const F g = cell.back(h.get(t, u), threshold[u], grad_spike, carry[u], falls[u]);
        if (apply) {
          const F rest = fma(load_up_to(a.b + c + u * W, n), normal, load_up_to(a.c + c + u * W, n));
          store_result(b.grad_x + at, fma(load_up_to(a.a + c + u * W, n), g, rest), n, b.past);
          continue;
        }
        sum_g[u] = add(sum_g[u], g);
        sum_gz[u] = fma(g, normal, sum_gz[u]);
        const F grad_z = mul(g, channels[u].weight);
        of_row = add(of_row, grad_z);
        of_row_z = fma(grad_z, normal, of_row_z);
        if (whole) store(s.g + t * s.padded + c + u * W, grad_z);
      }
      if (whole) {
        store(s.sum_g + t * W, add(load(s.sum_g + t * W), of_row));
        store(s.sum_gz + t * W, add(load(s.sum_gz + t * W), of_row_z));
      }
    }
    for (int u = 0; u < U; u++) {
      if (!apply) {
        store(s.bias + c + u * W, add(load(s.bias + c + u * W), sum_g[u]));
        store(s.weight + c + u * W, add(load(s.weight + c + u * W), sum_gz[u]));
      }
      threshold_sum.add_up(row * p.C, c + u * W, n, cell.threshold_gradient(falls[u]));
    }
  });
}

// The sums of the lanes of four vectors, over C.
SPIKEDECODER_INLINE void means_of_four(const float* sums, float C, float* out) {
  const F vectors[4] = {load(sums), load(sums + W), load(sums + 2 * W), load(sums + 3 * W)};
  lane_sums(vectors, out);
  for (int i = 0; i < 4; i++) out[i] /= C;
}

// The second pass: dL/dx = (dL/dz - its mean - z times the mean of z dL/dz) rstd, x still in a near cache.
template <class E>
SPIKEDECODER_INLINE void gradient_of_row(const Backward<E>& b, int64_t row, const RowScratch& s) {
  const Normal<E>& p = b.p;
  float mean_g[4], mean_gz[4];
  for (int64_t t = 0; t < p.T; t++) {
    if (t % 4 == 0) {
      means_of_four(s.sum_g + t * W, static_cast<float>(p.C), mean_g);
      means_of_four(s.sum_gz + t * W, static_cast<float>(p.C), mean_gz);
    }
    const float r = p.rstd[t * p.rows + row];
    const F rstd = set1(r), mean = set1(p.mean[t * p.rows + row]);
    const F shift = set1(-r * mean_g[t % 4]), slope = set1(-r * r * mean_gz[t % 4]);
    const E* const x = p.x + p.at(t, row);
    const float* const g = s.g + t * s.padded;
    E* const out = b.grad_x + p.at(t, row);
    for_channels(p.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
      for (int u = 0; u < decltype(vectors)::count; u++, c += W) {
        const F rest = fma(sub(load_up_to(x + c, n), mean), slope, shift);
        store_result(out + c, fma(load(g + c), rstd, rest), n, b.past);
      }
    });
  }
}

template <class E>
void backward(const NormLifBackward& a) {
  const Backward<E> b(a);
  const int most = threads_for(work(a.T, a.rows, a.C, 0.8), a.threads);
  const int64_t own = RowScratch::size(a.threshold, a.T, a.C);
  Scratch scratch(sizeof(float) * static_cast<size_t>(own * most));
  float* const threshold_out = b.sums ? a.grad_threshold : nullptr;

  with_cell_and_steps(a.neuron, a.T, [&](const auto& shared_cell, auto steps) {
    parallel(most, [&](int thread, int threads) {
      const auto cell = shared_cell;  // this thread's own stays in registers
      const FlushDenormals flush;
      const RowScratch s(scratch.floats() + own * thread, a.T, a.C);
      ThresholdSum threshold_sum(a.threshold, a.C, threshold_out, s.threshold);
      const Range rows = share(a.rows, thread, threads);
      for (int64_t row = rows.begin; row < rows.end; row++) {
        back_through_lif<decltype(steps)::known>(cell, b, row, s, threshold_sum);
        if (b.whole) gradient_of_row(b, row, s);
      }
      threshold_sum.end_run();
    });
  });

  if (!b.sums) return;
  ThresholdSum::combine(a.threshold, a.C, threshold_out, scratch.floats() + RowScratch::threshold_at(a.T, a.C), own, most);
  const int64_t padded = round_up(a.C, 16), first = RowScratch::weight_at(a.T, a.C);
  for (int64_t c = 0; c < a.C; c++) {
    double weight = 0, bias = 0;
    for (int thread = 0; thread < most; thread++) {
      const float* of_thread = scratch.floats() + own * thread + first;
      weight += static_cast<double>(of_thread[c]);
      bias += static_cast<double>(of_thread[padded + c]);
    }
    a.grad_weight[c] = static_cast<float>(weight);
    a.grad_bias[c] = static_cast<float>(bias);
  }
}

}  // namespace

void norm_lif_forward(const NormLifForward& a) { (a.type == Element::float32 ? forward<float> : forward<bfloat16>)(a); }
void norm_lif_backward(const NormLifBackward& a) {
  (a.type == Element::float32 ? backward<float> : backward<bfloat16>)(a);
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
