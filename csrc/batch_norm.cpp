// BatchNorm in training; see batch_norm.h.
#include "batch_norm.h"

#include <cmath>
#include <vector>

#include "runtime.h"

namespace spikedecoder {
namespace {

// As torch's lerp, with the same roundings.
float between(float from, float to, float weight) {
  return weight < 0.5f ? std::fma(weight, to - from, from) : std::fma(weight - 1, to - from, to);
}

}  // namespace

void batch_statistics(const BatchStatistics& a) {
  const Moments& m = a.moments;
  kernels().moments(m);
  const double rows = static_cast<double>(m.rows);
  const float unbiased = static_cast<float>(rows / (rows - 1));
  for (int64_t c = 0; c < m.C; c++) {
    const float var = m.var[c];
    a.running_mean[c] = between(a.running_mean[c], m.mean[c], a.momentum);
    a.running_var[c] = between(a.running_var[c], var * unbiased, a.momentum);
    m.var[c] = 1 / std::sqrt(var + a.eps);
  }
}

void batch_norm_lif_backward(const NormLifBackward& reduce) {
  kernels().norm_lif_backward(reduce);
  const int64_t C = reduce.C;
  const float rows = static_cast<float>(reduce.T * reduce.rows);
  std::vector<float> coefficients(3 * static_cast<size_t>(C));
  float *const of_g = coefficients.data(), *const of_z = of_g + C, *const of_1 = of_z + C;
  for (int64_t c = 0; c < C; c++) {
    of_g[c] = reduce.weight[c] * reduce.rstd[c];
    const float share = of_g[c] / -rows;
    of_z[c] = share * reduce.grad_weight[c];
    of_1[c] = share * reduce.grad_bias[c];
  }
  NormLifBackward apply = reduce;
  apply.part = NormLifPart::apply;
  apply.a = of_g;
  apply.b = of_z;
  apply.c = of_1;
  kernels().norm_lif_backward(apply);
}

}  // namespace spikedecoder
