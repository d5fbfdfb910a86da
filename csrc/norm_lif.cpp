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

// Mean and 1 / sqrt(variance + eps) of one row, in two passes.
template <class E>
SPIKEDECODER_INLINE void row_statistics(const E* x, int64_t C, float eps, float& mean, float& rstd) {
  F sums[4] = {zero(), zero(), zero(), zero()};  // four chains hide the latency of the addition
  int64_t c = 0;
  for (; c + 4 * W <= C; c += 4 * W) {
    for (int i = 0; i < 4; i++) sums[i] = add(sums[i], load(x + c + i * W));
  }
  for (; c < C; c += W) sums[0] = add(sums[0], load_up_to(x + c, lanes(C, c)));
  const float n = static_cast<float>(C);
  mean = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) / n;

  const F m = set1(mean);
  for (F& s : sums) s = zero();
  for (c = 0; c + 4 * W <= C; c += 4 * W) {
    for (int i = 0; i < 4; i++) {
      const F d = sub(load(x + c + i * W), m);
      sums[i] = fma(d, d, sums[i]);
    }
  }
  for (; c < C; c += W) {
    const int k = lanes(C, c);
    F d = sub(load_up_to(x + c, k), m);
    if (k < W) d = keep(mask_of((1u << k) - 1), d);
    sums[0] = fma(d, d, sums[0]);
  }
  rstd = 1 / __builtin_sqrtf(sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) / n + eps);
}

template <class E>
void forward(const NormLifForward& a) {
  const Normal<E> p{a.kind, static_cast<const E*>(a.x), a.weight, a.bias, a.mean, a.rstd, a.T, a.rows, a.C};
  E* const spikes = static_cast<E*>(a.spikes);
  const bool past = past_cache(spikes, p.at(a.T, 0), a.C);
  with_cell(a.neuron, [&](const auto& cell) {
    parallel(threads_for(work(a.T, a.rows, a.C, 0.4), a.threads), [&](int thread, int threads) {
      const Range rows = share(a.rows, thread, threads);
      for (int64_t row = rows.begin; row < rows.end; row++) {
        if (a.kind == NormKind::row) {
          for (int64_t t = 0; t < a.T; t++) {
            const int64_t r = t * a.rows + row;
            row_statistics(p.x + r * a.C, a.C, a.eps, a.mean[r], a.rstd[r]);
          }
        }
        for_channels(a.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
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
              store_spikes(spikes + p.at(t, row) + c + u * W, fired, n, past);
              __builtin_prefetch(p.x + p.at(t, row + 1) + c + u * W);  // its statistics come next
            }
          }
        });
      }
    });
  });
}

// One thread's scratch for the backward pass, all of it for one row of all timesteps but the last line.
struct RowScratch {
  float *z, *g;            // [T, C]: the normalised x, dL/dy
  float* h;                // [T, AT_ONCE vectors]: membrane potentials
  float *sum_g, *sum_gz;   // [T, 1 vector]: for the row's mean of dL/dz and of z dL/dz
  float *weight, *bias;    // [C]: sums over rows of g z and of g
  float* threshold;
  int64_t padded;          // C, to whole vectors

  static int64_t threshold_at(int64_t T, int64_t C) {
    return (2 * T + 2) * round_up(C, 16) + round_up((AT_ONCE + 2) * T * W, 16);
  }
  static int64_t size(const Threshold& t, int64_t T, int64_t C) {
    return threshold_at(T, C) + ThresholdSum::size(t, C);
  }

  RowScratch(float* memory, int64_t T, int64_t C) : padded(round_up(C, 16)) {
    z = memory;
    g = z + T * padded;
    weight = g + T * padded;
    bias = weight + padded;
    sum_g = bias + padded;
    sum_gz = sum_g + T * W;
    h = sum_gz + T * W;
    threshold = memory + threshold_at(T, C);
    for (int64_t c = 0; c < padded; c++) weight[c] = bias[c] = 0;
  }
};

// Four passes over a row, each with much independent work, which hides latency better than one pass does:
// z; g, back through the LIF; the sums; dL/dx.
template <class E>
void normalise(const Normal<E>& p, int64_t row, const RowScratch& s) {
  for (int64_t t = 0; t < p.T; t++) {
    const int64_t r = t * p.rows + row;
    const E* x = p.x + p.at(t, row);
    const bool by_row = p.kind == NormKind::row;
    const F row_mean = by_row ? set1(p.mean[r]) : zero(), row_rstd = by_row ? set1(p.rstd[r]) : zero();
    for_channels(p.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
      for (int u = 0; u < decltype(vectors)::count; u++, c += W) {
        const F mean = by_row ? row_mean : load_up_to(p.mean + c, n);
        const F rstd = by_row ? row_rstd : load_up_to(p.rstd + c, n);
        store(s.z + t * s.padded + c, mul(sub(load_up_to(x + c, n), mean), rstd));
      }
    });
  }
}

template <class CellType, class E>
void back_through_lif(const CellType& cell, const Normal<E>& p, const Threshold& limits, const E* grad_spikes,
                      int64_t row, const RowScratch& s, ThresholdSum& threshold_sum) {
  for_channels(p.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
    constexpr int U = decltype(vectors)::count;
    F threshold[U], v[U], carry[U], grad_threshold[U];
    for (int u = 0; u < U; u++) {
      threshold[u] = thresholds_at(limits, row * p.C, c + u * W, n);
      v[u] = carry[u] = grad_threshold[u] = zero();
    }
    for (int64_t t = 0; t < p.T; t++) {
      for (int u = 0; u < U; u++) {
        const int64_t at = c + u * W;
        const F y = fma(load(s.z + t * s.padded + at), load_up_to(p.weight + at, n), load_up_to(p.bias + at, n));
        const F h = cell.charge(y, v[u]);
        store(s.h + (t * U + u) * W, h);
        __builtin_prefetch(p.x + p.at(t, row + 1) + at);
        v[u] = cell.after(h, ge(h, threshold[u]), threshold[u]);
      }
    }
    for (int64_t t = p.T - 1; t >= 0; t--) {
      for (int u = 0; u < U; u++) {
        const F grad_spike = load_up_to(grad_spikes + p.at(t, row) + c + u * W, n);
        const F h = load(s.h + (t * U + u) * W);
        __builtin_prefetch(grad_spikes + p.at(t, row + 1) + c + u * W);
        store(s.g + t * s.padded + c + u * W, cell.back(h, threshold[u], grad_spike, carry[u], grad_threshold[u]));
      }
    }
    for (int u = 0; u < U; u++) threshold_sum.add_up(row * p.C, c + u * W, n, grad_threshold[u]);
  });
}

template <class E>
void add_to_sums(const Normal<E>& p, const RowScratch& s, bool of_row) {
  for (int64_t i = 0; i < p.T * W; i++) s.sum_g[i] = s.sum_gz[i] = 0;
  for_channels<1>(p.C, [&](auto, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
    F weight = load(s.weight + c), bias = load(s.bias + c);
    const F scale = load_up_to(p.weight + c, n);
    for (int64_t t = 0; t < p.T; t++) {
      const F g = load(s.g + t * s.padded + c), z = load(s.z + t * s.padded + c);
      weight = fma(g, z, weight);
      bias = add(bias, g);
      if (of_row) {
        const F grad_z = mul(g, scale);
        store(s.sum_g + t * W, add(load(s.sum_g + t * W), grad_z));
        store(s.sum_gz + t * W, fma(grad_z, z, load(s.sum_gz + t * W)));
      }
    }
    store(s.weight + c, weight);
    store(s.bias + c, bias);
  });
}

template <class E>
void gradient_of_row(const Normal<E>& p, int64_t row, const RowScratch& s, E* grad_x) {
  const bool past = past_cache(grad_x, p.at(p.T, 0), p.C);
  const F channels = set1(static_cast<float>(p.C));
  for (int64_t t = 0; t < p.T; t++) {
    const F mean_g = div(set1(sum(load(s.sum_g + t * W))), channels);
    const F mean_gz = div(set1(sum(load(s.sum_gz + t * W))), channels);
    const F rstd = set1(p.rstd[t * p.rows + row]);
    for_channels(p.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
      for (int u = 0; u < decltype(vectors)::count; u++, c += W) {
        const F g = load(s.g + t * s.padded + c), z = load(s.z + t * s.padded + c);
        const F centred = sub(sub(mul(g, load_up_to(p.weight + c, n)), mean_g), mul(z, mean_gz));
        store_result(grad_x + p.at(t, row) + c, mul(centred, rstd), n, past);
      }
    });
  }
}

template <class E>
void gradient_by_channels(const NormLifBackward& a, const Normal<E>& p, int64_t row, const RowScratch& s, E* grad_x) {
  const bool past = past_cache(grad_x, p.at(p.T, 0), p.C);
  for (int64_t t = 0; t < p.T; t++) {
    for_channels(p.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
      for (int u = 0; u < decltype(vectors)::count; u++, c += W) {
        const F g = load(s.g + t * s.padded + c), z = load(s.z + t * s.padded + c);
        const F rest = fma(load_up_to(a.b + c, n), z, load_up_to(a.c + c, n));
        store_result(grad_x + p.at(t, row) + c, fma(load_up_to(a.a + c, n), g, rest), n, past);
      }
    });
  }
}

template <class E>
void backward(const NormLifBackward& a) {
  const Normal<E> p{a.kind, static_cast<const E*>(a.x), a.weight, a.bias, a.mean, a.rstd, a.T, a.rows, a.C};
  const E* const grad_spikes = static_cast<const E*>(a.grad_spikes);
  E* const grad_x = static_cast<E*>(a.grad_x);
  const int most = threads_for(work(a.T, a.rows, a.C, 0.8), a.threads);
  const bool whole = a.part == NormLifPart::whole, sums = a.part != NormLifPart::apply;
  const int64_t own = RowScratch::size(a.threshold, a.T, a.C);
  Scratch scratch(sizeof(float) * static_cast<size_t>(own * most));
  float* const threshold_out = sums ? a.grad_threshold : nullptr;

  with_cell(a.neuron, [&](const auto& cell) {
    parallel(most, [&](int thread, int threads) {
      const FlushDenormals flush;
      const RowScratch s(scratch.floats() + own * thread, a.T, a.C);
      ThresholdSum threshold_sum(a.threshold, a.C, threshold_out, s.threshold);
      const Range rows = share(a.rows, thread, threads);
      for (int64_t row = rows.begin; row < rows.end; row++) {
        normalise(p, row, s);
        back_through_lif(cell, p, a.threshold, grad_spikes, row, s, threshold_sum);
        if (sums) add_to_sums(p, s, whole);
        if (whole) gradient_of_row(p, row, s, grad_x);
        if (a.part == NormLifPart::apply) gradient_by_channels(a, p, row, s, grad_x);
      }
      threshold_sum.end_run();
    });
  });

  if (!sums) return;
  ThresholdSum::combine(a.threshold, a.C, threshold_out, scratch.floats() + RowScratch::threshold_at(a.T, a.C), own, most);
  const int64_t padded = round_up(a.C, 16);
  for (int64_t c = 0; c < a.C; c++) {
    double weight = 0, bias = 0;
    for (int thread = 0; thread < most; thread++) {
      const float* of_thread = scratch.floats() + own * thread + 2 * a.T * padded;
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
