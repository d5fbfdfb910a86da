// Mean and variance of each channel over all rows, which are read from memory once. Threads share the rows and take
// them in blocks that stay in the cache. Each block has its own mean and sum of squared deviations, which are then
// combined (Chan, Golub & LeVeque, 1983). Bytes moved per element, the minimum: 4 read.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t BLOCK = 64;  // rows
constexpr int64_t RUN = 64;    // blocks combined with each other before they join those before, which may be many

// Adds a block of n_b values with mean_b and sum of squared deviations squares_b to one of n_a values.
SPIKEDECODER_INLINE void combine(double n_a, F& mean, F& squares, double n_b, F mean_b, F squares_b) {
  if (n_a == 0) {  // correct even where the square of the mean overflows
    mean = mean_b;
    squares = squares_b;
    return;
  }
  const double n = n_a + n_b;
  const F delta = sub(mean_b, mean);
  mean = add(mean, mul(delta, set1(static_cast<float>(n_b / n))));
  squares = add(add(squares, squares_b), mul(mul(delta, delta), set1(static_cast<float>(n_a * n_b / n))));
}

// One block's part of the channels at x (rows `stride` apart), U vectors, the first n lanes of each.
template <int U, class E>
SPIKEDECODER_INLINE void block_moments(const E* x, int64_t rows, int64_t stride, int n, bool center, F (&mean)[U],
                                       F (&squares)[U]) {
  for (int u = 0; u < U; u++) mean[u] = squares[u] = zero();
  if (center) {
    // relative to the first row, so that a constant channel has exactly its value as mean, and variance 0
    F first[U];
    for (int u = 0; u < U; u++) first[u] = load_up_to(x + u * W, n);
    for (int64_t r = 1; r < rows; r++) {
      for (int u = 0; u < U; u++) mean[u] = add(mean[u], sub(load_up_to(x + r * stride + u * W, n), first[u]));
    }
    for (int u = 0; u < U; u++) mean[u] = add(first[u], div(mean[u], set1(static_cast<float>(rows))));
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int u = 0; u < U; u++) {
      const F d = sub(load_up_to(x + r * stride + u * W, n), mean[u]);
      squares[u] = fma(d, d, squares[u]);
    }
  }
}

template <class E>
void moments_of(const Moments& a, const E* x) {
  const int threads = threads_for(0.3 * static_cast<double>(a.rows) * static_cast<double>(a.C), a.threads);
  const int64_t padded = round_up(a.C, 16), own = per_thread(4 * padded);
  Scratch scratch(sizeof(float) * static_cast<size_t>(own * threads));
  parallel(threads, [&](int thread, int all) {
    float *const all_means = scratch.floats() + own * thread, *const means = all_means + 2 * padded;
    float* const squares = means + padded;
    for (int64_t c = 0; c < 4 * padded; c++) all_means[c] = 0;
    const Range rows = share(a.rows, thread, all, BLOCK);
    int64_t first = rows.begin;  // of the current run
    for (int64_t r = rows.begin; r < rows.end; r += BLOCK) {
      const int64_t length = rows.end - r < BLOCK ? rows.end - r : BLOCK;
      for_channels_evenly(a.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
        constexpr int U = decltype(vectors)::count;
        F mean_b[U], squares_b[U];
        block_moments<U>(x + r * a.C + c, length, a.C, n, a.center, mean_b, squares_b);
        for (int u = 0; u < U; u++, c += W) {
          F mean = load(means + c), square = load(squares + c);
          combine(static_cast<double>(r - first), mean, square, static_cast<double>(length), mean_b[u], squares_b[u]);
          store(means + c, mean);
          store(squares + c, square);
        }
      });
      if (r + length - first < RUN * BLOCK && r + length < rows.end) continue;
      for (int64_t c = 0; c < padded; c += W) {
        F mean = load(all_means + c), square = load(all_means + padded + c);
        combine(static_cast<double>(first - rows.begin), mean, square, static_cast<double>(r + length - first),
                load(means + c), load(squares + c));
        store(all_means + c, mean);
        store(all_means + padded + c, square);
      }
      first = r + length;
    }
  });
  for (int64_t c = 0; c < a.C; c += W) {
    F mean = zero(), square = zero();
    int64_t before = 0;
    for (int thread = 0; thread < threads; thread++) {
      const Range rows = share(a.rows, thread, threads, BLOCK);
      if (rows.end == rows.begin) continue;
      const float* means = scratch.floats() + own * thread;
      combine(static_cast<double>(before), mean, square, static_cast<double>(rows.end - rows.begin), load(means + c),
              load(means + padded + c));
      before += rows.end - rows.begin;
    }
    const int n = static_cast<int>(a.C - c < W ? a.C - c : W);
    store_up_to(a.mean + c, mean, n);
    store_up_to(a.var + c, div(square, set1(static_cast<float>(a.rows))), n);
  }
}

}  // namespace

void moments(const Moments& a) {
  if (a.type == Element::float32) {
    moments_of(a, static_cast<const float*>(a.x));
  } else {
    moments_of(a, static_cast<const bfloat16*>(a.x));
  }
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
