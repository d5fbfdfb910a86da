// Rows of a gradient as floats, inside kernels that read them many times over.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "runtime.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

// dL/dy of a WeightGrad: where it lies, if it is float32, else converted, `most_rows` at a time.
class GradientRows {
 public:
  GradientRows(const WeightGrad& a, int64_t most_rows)
      : a_(a), wide_(a.grad_type == Element::float32 ? 0 : sizeof(float) * static_cast<size_t>(most_rows * a.N)) {}

  // Rows m..m + rows; valid until the next call.
  const float* from(int64_t m, int64_t rows) const {
    if (a_.grad_type == Element::float32) return static_cast<const float*>(a_.grad) + m * a_.N;
    const bfloat16* narrow = static_cast<const bfloat16*>(a_.grad) + m * a_.N;
    const int64_t n = rows * a_.N;
    parallel(threads_for(0.1 * static_cast<double>(n), a_.threads), [&](int thread, int threads) {
      const Range mine = share(n, thread, threads, W);
      for (int64_t i = mine.begin; i < mine.end; i += W) {
        const int there = static_cast<int>(mine.end - i < W ? mine.end - i : W);
        store_up_to(wide_.floats() + i, load_up_to(narrow + i, there), there);
      }
    });
    return wide_.floats();
  }

 private:
  const WeightGrad& a_;
  Scratch wide_;
};

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
