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

  SPIKEDECODER_INLINE_MEMBER void read(const Normal& p, int64_t c, int n) {
    const bool own = p.kind == NormKind::channel;
    weight = load_up_to(p.weight + c, n);
    bias = load_up_to(p.bias + c, n);
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
              store_up_to(a.spikes + p.at(t, row) + c + u * W, keep(fired, one), n);
            }
          }
        });
      }
    });
  });
}

void norm_lif_backward(const NormLifBackward& a) {
  const Normal p{a.kind, a.x, a.weight, a.bias, a.mean, a.rstd, a.T, a.rows, a.C};
  const int most = threads_for(work(a.T, a.rows, a.C, 0.8), a.threads);
  const bool whole = a.part == NormLifPart::whole, sums = a.part != NormLifPart::apply;
  // per thread: z and h of a few vectors of neurons and two sums of a row, by timestep; dL/dz of a row;
  // sums over all rows of g z and g; the share of dL/dthreshold
  const int64_t steps = round_up(a.T * AT_ONCE * W, 16), padded = round_up(a.C, 16);
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
        for_channels<2>(a.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
          constexpr int U = decltype(vectors)::count;
          Channels channels[U];
          F threshold[U], v[U], carry[U], grad_threshold[U], grad_weight[U], grad_bias[U];
          for (int u = 0; u < U; u++) {
            channels[u].read(p, c + u * W, n);
            threshold[u] = thresholds_at(a.threshold, row * a.C, c + u * W, n);
            v[u] = carry[u] = grad_threshold[u] = grad_weight[u] = grad_bias[u] = zero();
          }
          for (int64_t t = 0; t < a.T; t++) {
            for (int u = 0; u < U; u++) {
              const F z = channels[u].z(p, t, row, c + u * W, n), h = cell.charge(channels[u].y(z), v[u]);
              store(zs + (t * U + u) * W, z);
              store(hs + (t * U + u) * W, h);
              v[u] = cell.after(h, ge(h, threshold[u]), threshold[u]);
            }
          }
          for (int64_t t = a.T - 1; t >= 0; t--) {
            F total_g = zero(), total_gz = zero();
            for (int u = 0; u < U; u++) {
              const int64_t at = p.at(t, row) + c + u * W;
              const F z = load(zs + (t * U + u) * W), h = load(hs + (t * U + u) * W);
              const F g = cell.back(h, threshold[u], load_up_to(a.grad_spikes + at, n), carry[u], grad_threshold[u]);
              if (sums) {
                grad_weight[u] = fma(g, z, grad_weight[u]);
                grad_bias[u] = add(grad_bias[u], g);
              }
              if (whole) {
                const F gz = mul(g, channels[u].weight);
                store(grad_z + t * padded + c + u * W, gz);
                total_g = add(total_g, gz);
                total_gz = fma(gz, z, total_gz);
              } else if (a.part == NormLifPart::apply) {
                const F constant = fma(load_up_to(a.b + c + u * W, n), z, load_up_to(a.c + c + u * W, n));
                store_up_to(a.grad_x + at, fma(load_up_to(a.a + c + u * W, n), g, constant), n);
              }
            }
            if (whole) {
              store(sum_g + t * W, add(load(sum_g + t * W), total_g));
              store(sum_gz + t * W, add(load(sum_gz + t * W), total_gz));
            }
          }
          if (!sums) return;
          for (int u = 0; u < U; u++) {
            const int64_t at = c + u * W;
            store(weight_sum + at, add(load(weight_sum + at), grad_weight[u]));
            store(bias_sum + at, add(load(bias_sum + at), grad_bias[u]));
            threshold_sum.add_up(row * a.C, at, n, grad_threshold[u]);
          }
        });
        if (!whole) continue;
        for (int64_t t = 0; t < a.T; t++) {
          const int64_t r = t * a.rows + row;
          const F mean_g = div(set1(sum(load(sum_g + t * W))), channel_count);
          const F mean_gz = div(set1(sum(load(sum_gz + t * W))), channel_count);
          const F rstd = set1(a.rstd[r]), mean = set1(a.mean[r]);
          for_channels(a.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
            for (int u = 0; u < decltype(vectors)::count; u++, c += W) {
              const F z = mul(sub(load_up_to(a.x + r * a.C + c, n), mean), rstd);
              const F centred = sub(sub(load(grad_z + t * padded + c), mean_g), mul(z, mean_gz));
              store_up_to(a.grad_x + r * a.C + c, mul(centred, rstd), n);
            }
          });
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
