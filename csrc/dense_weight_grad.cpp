// The weight gradient of a linear layer by dense products: dW [N, K] = dL/dy^T s, a sum over the M rows of both.
//
// A task is a region of dW and a part of the rows. It copies its columns of a block of rows to its thread's own memory,
// in the order in which the inner loop reads them, and multiplies them. Threads wait for each other only once, before
// the sums of the parts are added up. Where dW has few regions there are several parts. Their number and that of the
// rows in a block do not depend on the threads, and so neither do the last bits of the result; for many threads regions
// are made smaller.
//
// Bytes moved: s is read once per region of dL/dy's columns and dL/dy once per region of the channels; dW is read and
// written once per block, most of it in the second-level cache, where what is copied lies, too.
#include <type_traits>

#include "gradient_rows.h"
#include "kernels.h"
#include "matmul_tile.h"
#include "parallel.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t NARROW = 192, WIDE = 1024, LEAST = 48;  // limits of a region's sides, before they are rounded up
constexpr int64_t COPIED = 128 << 10;                     // floats of a block that a task copies
constexpr int64_t MOST_ROWS = 256, LEAST_ROWS = 64;       // of a block
constexpr int64_t PARTS = 8;                              // of the rows, if dW is one region

// n numbers as the fewest runs of up to `most` each, all of similar length, which is rounded up to a multiple of `unit`.
struct Cut {
  int64_t n, count, each;
  Cut(int64_t n_, int64_t most, int64_t unit)
      : n(n_), count((n_ + most - 1) / most), each(round_up((n_ + count - 1) / count, unit)) {
    count = (n + each - 1) / each;
  }
  Range operator[](int64_t i) const { return {i * each, smaller((i + 1) * each, n)}; }
};

// PAIRS: whether the CPU's products of pairs of bfloat16 are used.
template <Element s_type, Element grad_type, bool PAIRS>
class Product {
 public:
  explicit Product(const DenseWeightGrad& a) : a_(a) {
    const double work = (PAIRS ? 0.01 : 0.02) * (16 / W) * static_cast<double>(a.M * a.N) * static_cast<double>(a.K);
    threads_ = threads_for(work, a.threads);
    // long parts of the rows of s and dL/dy, but few rows of a wide dW, which would share lines of the cache
    const bool narrow = a.K <= NARROW && a.K < a.N;
    int64_t most_outputs = narrow ? WIDE : NARROW, most_channels = narrow ? NARROW : WIDE;
    cut(most_outputs, most_channels);
    const int64_t rows = COPIED / (outputs_.each + channels_.each) / 32 * 32;
    depth_ = rows > MOST_ROWS ? MOST_ROWS : rows < LEAST_ROWS ? LEAST_ROWS : rows;
    const int64_t blocks = (a.M + depth_ * TOGETHER - 1) / (depth_ * TOGETHER), wanted = PARTS / regions();
    parts_ = smaller(blocks, wanted > 1 ? wanted : 1);
    while (threads_ > 1 && regions() * parts_ < 2 * threads_ && (most_outputs > LEAST || most_channels > LEAST)) {
      (most_outputs > most_channels ? most_outputs : most_channels) /= 2;
      cut(most_outputs, most_channels);
    }
    const int64_t vectors = channels_.each / W;
    panels_ = (vectors + VECTORS - 1) / VECTORS;
    width_ = (vectors + panels_ - 1) / panels_ * W;
    past_ = parts_ == 1 && blocks == 1 && past_cache(a.grad_weight, a.N * a.K, a.K);
  }

  void run() const {
    const int64_t size = a_.N * a_.K;
    const int64_t own = per_thread(outputs_.each / ROWS * groups_apart() + panels_ * panels_apart());
    Scratch copies(sizeof(float) * static_cast<size_t>(own * threads_));
    Scratch sums(sizeof(float) * static_cast<size_t>((parts_ - 1) * size));  // of all parts but the first
    Tasks tasks(regions() * parts_);
    team(threads_, [&](int thread, int threads) {
      for (int64_t i; tasks.next(i);) {
        const int64_t part = i % parts_, region = i / parts_;
        const Range rows = share(a_.M, static_cast<int>(part), static_cast<int>(parts_), depth_ * TOGETHER);
        multiply(rows, outputs_[region / channels_.count], channels_[region % channels_.count],
                 copies.floats() + own * thread, part ? sums.floats() + (part - 1) * size : a_.grad_weight);
      }
      finish_stores();
      if (parts_ == 1) return;
      barrier();
      add_sums(a_.grad_weight, sums.floats(), size, parts_ - 1, thread, threads);
    });
  }

 private:
  static constexpr int64_t TOGETHER = PAIRS ? 2 : 1;  // rows of which one vector holds values

  void cut(int64_t most_outputs, int64_t most_channels) {
    outputs_ = Cut(a_.N, most_outputs, ROWS);
    channels_ = Cut(a_.K, most_channels, W);
  }

  int64_t regions() const { return outputs_.count * channels_.count; }

  // From one group of ROWS columns of dL/dy to the next, and from one panel of s to the next. A power of two would be
  // slow: all of them would share a few lines of the cache.
  int64_t groups_apart() const { return depth_ * ROWS + 16; }
  int64_t panels_apart() const { return depth_ * width_ + 16; }

  // Columns column .. column + n - 1 of row m as they are multiplied: with the next row's as pairs, or with 0 if that is
  // row `end`.
  template <Element type>
  SPIKEDECODER_INLINE_MEMBER F values(const void* rows, int64_t m, int64_t end, int64_t columns, int64_t column,
                                      int64_t n) const {
    if (n <= 0) return zero();
    for (int64_t i = 0; i < TOGETHER; i++) prefetch_part<type>(rows, m + AHEAD + i, columns, column);
    const F first = row_part<type>(rows, m, columns, column, n);
#if defined(SPIKEDECODER_AVX512)
    if constexpr (PAIRS) {
      return pairs_of(first, m + 1 < end ? row_part<type>(rows, m + 1, columns, column, n) : zero());
    }
#endif
    (void)end;
    return first;
  }

  // Copies columns of dL/dy as [groups][rows][ROWS].
  void copy_grad(Range rows, Range columns, float* to) const {
    for (int64_t m = rows.begin; m < rows.end; m += TOGETHER, to += ROWS) {
      float* group = to;
      for (int64_t n = columns.begin; n < columns.end; n += ROWS, group += groups_apart()) {
        for (int r = 0; r < ROWS; r += W) {
          store_n(group + r, values<grad_type>(a_.grad, m, rows.end, a_.N, n + r, columns.end - n - r),
                  static_cast<int>(smaller(W, ROWS - r)));
        }
      }
    }
  }

  // Copies columns of s as [panels][rows][width].
  void copy_s(Range rows, Range columns, float* to) const {
    for (int64_t m = rows.begin; m < rows.end; m += TOGETHER, to += width_) {
      float* panel = to;
      for (int64_t k = columns.begin; k < columns.end; k += width_, panel += panels_apart()) {
        for (int64_t j = 0; j < width_; j += W) {
          store(panel + j, values<s_type>(a_.s, m, rows.end, a_.K, k + j, columns.end - k - j));
        }
      }
    }
  }

  // The sums over some rows for a region of dw, which is dW or memory of its shape. Copies go to `own`.
  void multiply(Range rows, Range outputs, Range channels, float* own, float* dw) const {
    using Value = std::conditional_t<PAIRS, Pair, float>;
    float* const grads = own;
    float* const panels = own + outputs_.each / ROWS * groups_apart();
    for (int64_t m = rows.begin; m < rows.end; m += depth_ * TOGETHER) {
      const Range block{m, smaller(m + depth_ * TOGETHER, rows.end)};
      const int64_t depth = (block.end - block.begin + TOGETHER - 1) / TOGETHER;
      copy_grad(block, outputs, grads);
      copy_s(block, channels, panels);
      const float* panel = panels;
      for (int64_t k = channels.begin; k < channels.end; k += width_, panel += panels_apart()) {
        const int64_t columns = smaller(width_, channels.end - k);
        const int vectors = static_cast<int>((columns + W - 1) / W);
        const float* group = grads;
        for (int64_t n = outputs.begin; n < outputs.end; n += ROWS, group += groups_apart()) {
          const Target<float> target{dw + n * a_.K + k, a_.K, nullptr, static_cast<int>(smaller(ROWS, outputs.end - n)),
                                     static_cast<int>(columns - (vectors - 1) * W), m > rows.begin, past_};
          tile_of(vectors, reinterpret_cast<const Value*>(group), ByColumns{}, panel, width_, depth, target);
        }
      }
    }
  }

  const DenseWeightGrad& a_;
  Cut outputs_{1, 1, 1}, channels_{1, 1, 1};
  int threads_;
  int64_t depth_, parts_;   // of a block: its rows, in pairs if PAIRS
  int64_t panels_, width_;  // of a region, and the columns of one
  bool past_;               // as past_cache
};

template <Element s_type>
void multiply(const DenseWeightGrad& a) {
  if (a.grad_type == Element::float32) return Product<s_type, Element::float32, false>(a).run();
#if defined(SPIKEDECODER_AVX512)
  if constexpr (s_type != Element::float32) {
    if (bfloat16_products()) return Product<s_type, Element::bfloat16, true>(a).run();
  }
#endif
  Product<s_type, Element::bfloat16, false>(a).run();
}

}  // namespace

void dense_weight_grad(const DenseWeightGrad& a) {
  if (!a.N || !a.K) return;
  if (!a.M) {
    for (int64_t i = 0; i < a.N * a.K; i++) a.grad_weight[i] = 0;
    return;
  }
  if (a.s_type == Element::float32) return multiply<Element::float32>(a);
  if (a.s_type == Element::bits) return multiply<Element::bits>(a);
  multiply<Element::bfloat16>(a);
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
