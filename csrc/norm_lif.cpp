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
struct Normal {
  NormKind kind;
  const float *x, *weight, *bias, *mean, *rstd;
  int64_t T, rows, C;

  int64_t at(int64_t t, int64_t row) const { return (t * rows + row) * C; }
};

// Weight and bias of W channels, and their statistics where those are per channel.
struct Channels {
  F weight, bias, mean, rstd;

  SPIKEDECODER_INLINE_MEMBER Channels(const Normal& p, int64_t c, int n)
      : weight(load_up_to(p.weight + c, n)), bias(load_up_to(p.bias + c, n)) {
    const bool own = p.kind == NormKind::channel;
    mean = own ? load_up_to(p.mean + c, n) : zero();
    rstd = own ? load_up_to(p.rstd + c, n) : zero();
  }

  SPIKEDECODER_INLINE_MEMBER F z(const Normal& p, int64_t t, int64_t row, int64_t c, int n) const {
    const F x = load_up_to(p.x + p.at(t, row) + c, n);
    if (p.kind == NormKind::channel) return mul(sub(x, mean), rstd);
    const int64_t r = t * p.rows + row;
    return mul(sub(x, set1(p.mean[r])), set1(p.rstd[r]));
  }

  SPIKEDECODER_INLINE_MEMBER F y(F z) const { return fma(z, weight, bias); }
};

// Mean and 1 / sqrt(variance + eps) of one row, in two passes.
SPIKEDECODER_INLINE void row_statistics(const float* x, int64_t C, float eps, float& mean, float& rstd) {
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

}  // namespace

void norm_lif_forward(const NormLifForward& a) {
  const Normal p{a.kind, a.x, a.weight, a.bias, a.mean, a.rstd, a.T, a.rows, a.C};
  with_cell(a.neuron, [&](const auto& cell) {
    parallel(threads_for(work(a.T, a.rows, a.C, 0.4), a.threads), [&](int thread, int threads) {
      const Range rows = share(a.rows, thread, threads);
      const F one = set1(1);
      for (int64_t row = rows.begin; row < rows.end; row++) {
        if (a.kind == NormKind::row) {
          for (int64_t t = 0; t < a.T; t++) {
            const int64_t r = t * a.rows + row;
            row_statistics(a.x + r * a.C, a.C, a.eps, a.mean[r], a.rstd[r]);
          }
        }
        for (int64_t c = 0; c < a.C; c += W) {
          const int n = lanes(a.C, c);
          const Channels channels(p, c, n);
          const F threshold = thresholds_at(a.threshold, row * a.C, c, n);
          F v = zero();
          for (int64_t t = 0; t < a.T; t++) {
            const F h = cell.charge(channels.y(channels.z(p, t, row, c, n)), v);
            const Mask fired = ge(h, threshold);
            v = cell.after(h, fired, threshold);
            store_up_to(a.spikes + p.at(t, row) + c, keep(fired, one), n);
          }
        }
      }
    });
  });
}

void norm_lif_backward(const NormLifBackward& a) {
  const Normal p{a.kind, a.x, a.weight, a.bias, a.mean, a.rstd, a.T, a.rows, a.C};
  const int most = threads_for(work(a.T, a.rows, a.C, 0.8), a.threads);
  const bool whole = a.part == NormLifPart::whole, sums = a.part != NormLifPart::apply;
  // per thread: z and h of a vector of neurons and two sums of a row, by timestep; dL/dz of a row; sums
  // over all rows of g z and g; the share of dL/dthreshold
  const int64_t steps = round_up(a.T * W, 16), padded = round_up(a.C, 16);
  const int64_t row_size = whole ? a.T * padded : 0;
  const int64_t before_threshold = 4 * steps + row_size + 2 * padded;
  const int64_t own = before_threshold + ThresholdSum::size(a.threshold, a.C);
  Scratch scratch(sizeof(float) * static_cast<size_t>(own * most));
  float* const threshold_out = sums ? a.grad_threshold : nullptr;

  with_cell(a.neuron, [&](const auto& cell) {
    parallel(most, [&](int thread, int threads) {
      const FlushDenormals flush;
      float* const zs = scratch.floats() + own * thread;
      float *const hs = zs + steps, *const sum_g = hs + steps, *const sum_gz = sum_g + steps;
      float *const grad_z = sum_gz + steps, *const weight_sum = grad_z + row_size;
      float* const bias_sum = weight_sum + padded;
      for (int64_t c = 0; c < 2 * padded; c++) weight_sum[c] = 0;
      ThresholdSum threshold_sum(a.threshold, a.C, threshold_out, zs + before_threshold);
      const F channel_count = set1(static_cast<float>(a.C));

      const Range rows = share(a.rows, thread, threads);
      for (int64_t row = rows.begin; row < rows.end; row++) {
        for (int64_t i = 0; i < 2 * steps; i++) sum_g[i] = 0;
        for (int64_t c = 0; c < a.C; c += W) {
          const int n = lanes(a.C, c);
          const Channels channels(p, c, n);
          const F threshold = thresholds_at(a.threshold, row * a.C, c, n);
          F v = zero();
          for (int64_t t = 0; t < a.T; t++) {
            const F z = channels.z(p, t, row, c, n), h = cell.charge(channels.y(z), v);
            store(zs + t * W, z);
            store(hs + t * W, h);
            v = cell.after(h, ge(h, threshold), threshold);
          }
          F carry = zero(), grad_threshold = zero(), grad_weight = zero(), grad_bias = zero();
          for (int64_t t = a.T - 1; t >= 0; t--) {
            const int64_t at = p.at(t, row) + c;
            const F z = load(zs + t * W);
            const F grad_spike = load_up_to(a.grad_spikes + at, n);
            const F g = cell.back(load(hs + t * W), threshold, grad_spike, carry, grad_threshold);
            if (sums) {
              grad_weight = fma(g, z, grad_weight);
              grad_bias = add(grad_bias, g);
            }
            if (whole) {
              const F gz = mul(g, channels.weight);
              store(grad_z + t * padded + c, gz);
              store(sum_g + t * W, add(load(sum_g + t * W), gz));
              store(sum_gz + t * W, fma(gz, z, load(sum_gz + t * W)));
            } else if (a.part == NormLifPart::apply) {
              const F constant = fma(load_up_to(a.b + c, n), z, load_up_to(a.c + c, n));
              store_up_to(a.grad_x + at, fma(load_up_to(a.a + c, n), g, constant), n);
            }
          }
          if (sums) {
            store(weight_sum + c, add(load(weight_sum + c), grad_weight));
            store(bias_sum + c, add(load(bias_sum + c), grad_bias));
            threshold_sum.add_up(row * a.C, c, n, grad_threshold);
          }
        }
        if (!whole) continue;
        for (int64_t t = 0; t < a.T; t++) {
          const int64_t r = t * a.rows + row;
          const F mean_g = div(set1(sum(load(sum_g + t * W))), channel_count);
          const F mean_gz = div(set1(sum(load(sum_gz + t * W))), channel_count);
          const F rstd = set1(a.rstd[r]), mean = set1(a.mean[r]);
          for (int64_t c = 0; c < a.C; c += W) {
            const int n = lanes(a.C, c);
            const F z = mul(sub(load_up_to(a.x + r * a.C + c, n), mean), rstd);
            const F centred = sub(sub(load(grad_z + t * padded + c), mean_g), mul(z, mean_gz));
            store_up_to(a.grad_x + r * a.C + c, mul(centred, rstd), n);
          }
        }
      }
      threshold_sum.end_run();
    });
  });

  if (!sums) return;
  ThresholdSum::combine(a.threshold, a.C, threshold_out, scratch.floats() + before_threshold, own, most);
  for (int64_t c = 0; c < a.C; c++) {
    double weight = 0, bias = 0;
    for (int thread = 0; thread < most; thread++) {
      const float* weight_sum = scratch.floats() + own * thread + 4 * steps + row_size;
      weight += static_cast<double>(weight_sum[c]);
      bias += static_cast<double>(weight_sum[padded + c]);
    }
    a.grad_weight[c] = static_cast<float>(weight);
    a.grad_bias[c] = static_cast<float>(bias);
  }
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
