// What BatchNorm in training does per channel, around the kernels, which work per element.
#pragma once

#include "kernels.h"

namespace spikedecoder {

// Mean and variance, and then 1 / sqrt(variance + eps) in place of moments.var. Updates the running mean and the
// running variance [C]; the latter takes the unbiased variance.
struct BatchStatistics {
  Moments moments;
  float *running_mean, *running_var;
  float momentum, eps;
};

void batch_statistics(const BatchStatistics& a);

// Both passes of backward. The first sums g and g z over rows; the second uses the sums to compute
// dL/dx = a (g - mean(g) - z mean(g z)), a = weight rstd.
void batch_norm_lif_backward(const NormLifBackward& reduce);

}  // namespace spikedecoder
