// Rows of a gradient as floats, and divided into slices, for kernels that read them many times.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "runtime.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

// dL/dy of a WeightGrad as float32: in place if it has that type, else converted, up to `most_rows` rows at a time.
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

// The rows of a gradient in slices. Each slice is summed by itself and then added to the sum of those before it. How
// many of them are processed at once, so that all threads have tasks, does not change the result.
struct Slices {
  int64_t rows, at_once;

  // M rows, of which a slice has at most `most` (a multiple of 64). Each slice makes `tasks` tasks and n sums.
  Slices(int64_t M, int64_t most, int64_t tasks, int64_t n, int threads) {
    constexpr int64_t TASKS = 8, ROWS_AT_LEAST = 1024, NEAR = (3 << 20) / sizeof(float);
    const int64_t few = (M + most - 1) / most, many = M / ROWS_AT_LEAST, wanted = (TASKS + tasks - 1) / tasks;
    int64_t slices = wanted < many ? wanted : many;
    if (slices < few) slices = few;
    if (slices < 1) slices = 1;
    rows = M ? round_up((M + slices - 1) / slices, 64) : 64;
    // several tasks per thread as far as the sums of the slices stay in a near cache, but at least one
    const int64_t least = (threads + tasks - 1) / tasks, enough = threads > 1 ? (4 * threads + tasks - 1) / tasks : 1;
    at_once = enough < 1 + NEAR / n ? enough : 1 + NEAR / n;
    if (at_once < least) at_once = least;
    if (at_once > slices) at_once = slices;
    const int64_t batches = (slices + at_once - 1) / at_once;
    at_once = (slices + batches - 1) / batches;
  }
};

// This thread's part of sums [n] += more [count, n], in order.
inline void add_sums(float* sums, const float* more, int64_t n, int64_t count, int thread, int threads) {
  const Range mine = share(n, thread, threads, W);
  for (int64_t i = mine.begin; i < mine.end; i += W) {
    const int there = static_cast<int>(mine.end - i < W ? mine.end - i : W);
    F sum = load_up_to(sums + i, there);
    for (int64_t s = 0; s < count; s++) sum = add(sum, load_up_to(more + s * n + i, there));
    store_up_to(sums + i, sum, there);
  }
}

inline void add_sums(float* sums, const float* more, int64_t n, int64_t count, int most) {
  if (count < 1) return;
  parallel(threads_for(0.05 * static_cast<double>(n * count), most),
           [&](int thread, int threads) { add_sums(sums, more, n, count, thread, threads); });
}

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
