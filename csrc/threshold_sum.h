// Sums dL/dthreshold. Where neurons share a threshold, each part (a thread or a head) has sums of its own, which are
// combined at the end; where each neuron has its own threshold, the gradient is written in place. Sums may run over
// millions of rows, so runs of 256 vectors, or rows, are summed first.
#pragma once

#include "kernels.h"
#include "runtime.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

// Adds the channels' sums over some rows to the totals over all rows, and clears them.
SPIKEDECODER_OUTLINE void end_of_rows(float* sums, double* totals, int64_t C) {
  for (int64_t c = 0; c < C; c++) {
    totals[c] += static_cast<double>(sums[c]);
    sums[c] = 0;
  }
}

class ThresholdSum {
 public:
  // Floats of scratch that each part needs.
  static int64_t size(const Threshold& t, int64_t C) {
    return t.kind == ThresholdKind::channel ? 3 * round_up(C, 16) : 16;
  }

  // `out` is null if no gradient is wanted; `scratch` belongs to this part alone.
  ThresholdSum(const Threshold& t, int64_t C, float* out, float* scratch)
      : kind_(t.kind),
        out_(out),
        sums_(scratch),
        totals_(reinterpret_cast<double*>(scratch + round_up(C, 16))),
        channels_(C),
        run_(zero()) {
    const bool channel = kind_ == ThresholdKind::channel;
    most_ = channel ? RUN * ((C + W - 1) / W) : RUN;
    for (int64_t i = 0; i < (channel ? round_up(C, 16) : 16); i++) sums_[i] = 0;
    for (int64_t c = 0; channel && c < C; c++) totals_[c] = 0;
  }

  // The gradients of n <= W neurons from channel c on, in a row that starts at element `row`; lanes past n
  // hold 0.
  SPIKEDECODER_INLINE_MEMBER void add_up(int64_t row, int64_t c, int n, F gradient) {
    if (!out_) return;
    if (kind_ == ThresholdKind::element) {
      store_up_to(out_ + row + c, gradient, n);
    } else if (kind_ == ThresholdKind::channel) {
      store_up_to(sums_ + c, add(load_up_to(sums_ + c, n), gradient), n);
      if (++run_length_ == most_) end_run();
    } else {
      run_ = add(run_, gradient);
      if (++run_length_ == most_) end_run();
    }
  }

  SPIKEDECODER_INLINE_MEMBER void end_run() {
    if (kind_ == ThresholdKind::scalar) store(sums_, add(load(sums_), run_));
    if (kind_ == ThresholdKind::channel) end_of_rows(sums_, totals_, channels_);
    run_ = zero();
    run_length_ = 0;
  }

  // After the threads have ended: adds up the parts' sums, which start at `scratch` and are `stride` apart, into `out`.
  static void combine(const Threshold& t, int64_t C, float* out, const float* scratch, int64_t stride, int64_t parts) {
    if (!out || t.kind == ThresholdKind::element) return;
    const bool scalar = t.kind == ThresholdKind::scalar;
    for (int64_t c = 0; c < (scalar ? 1 : C); c++) {
      double total = 0;
      for (int64_t part = 0; part < parts; part++) {
        const float* const own = scratch + part * stride;
        if (!scalar) total += reinterpret_cast<const double*>(own + round_up(C, 16))[c];
        for (int i = 0; scalar && i < W; i++) total += static_cast<double>(own[i]);
      }
      out[c] = static_cast<float>(total);
    }
  }

  static constexpr int64_t RUN = 256;

 private:
  ThresholdKind kind_;
  float *out_, *sums_;
  double* totals_;
  int64_t channels_, most_, run_length_ = 0;
  F run_;
};

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
