// BatchNorm in training around the kernels: what is done for each channel, not for each element.
#pragma once

#include "kernels.h"

namespace spikedecoder {

// 1 / sqrt(variance + eps) takes the place of moments.var. The running mean and variance [C], that one unbiased, move on.
struct BatchStatistics {
  Moments moments;
  float *running_mean, *running_var;
  float momentum, eps;
};

void batch_statistics(const BatchStatistics& a);

// Both passes of dL/dx, which follows from the sums of the first: dL/dx = a (g - its mean - z times the mean of g z),
// a = weight rstd.
void batch_norm_lif_backward(const NormLifBackward& reduce);

}  // namespace spikedecoder
