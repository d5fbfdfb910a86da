// The weight gradient of a linear layer on spikes, by gathering: for each channel, the sum of the rows of dL/dy [M, N]
// in which it spiked (row_sums.h).
//
// Where there are few channels (and, with AVX-512, dL/dy is large), their sums stay in the first-level cache and rows
// are added to them (near_sums.h). Otherwise bits are transposed first, and rows are taken in slices. A task is a panel
// of columns of a slice, which stays in a core's second-level cache while all channels are summed: each value of dL/dy
// comes from memory once, to one core. The panel is copied where its rows would share cache lines.
//
// Memory: dL/dy is read once; the sums [channels, columns] are read and written once per slice.
#include "gradient_rows.h"
#include "kernels.h"
#include "near_sums.h"
#include "parallel.h"
#include "row_sums.h"
#include "simd.h"
#include "transpose.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

// The size of a panel of dL/dy. The next panel, and a copy of this one, lie beside it in the second-level cache, which
// is larger in CPUs with AVX-512. Narrow panels have more rows, which makes fewer slices, whose sums are read and
// written.
#if defined(SPIKEDECODER_AVX512)
constexpr int64_t PANEL_BYTES = 256 << 10, PANEL_VECTORS = 4;
#else
constexpr int64_t PANEL_BYTES = 128 << 10, PANEL_VECTORS = MOST_VECTORS;
#endif
constexpr int SHIFT = 6;                    // 2^SHIFT channels are transposed and listed in one task

size_t bytes(size_t each, int64_t count) { return each * static_cast<size_t>(count); }

// by_channel [channels, N] = the sums of channels first .. first + channels; first is a multiple of 64.
void gather_channels(const WeightGrad& a, int64_t first, int64_t channels, const GradientRows& grad,
                     const Slices& slices, double rate, int threads, float* by_channel) {
  const Panels panels(a.N, PANEL_VECTORS);
  const int64_t stride = words_for(a.K), groups = words_for(channels), words = slices.rows / 64, n = channels * a.N;
  const int64_t step = (channels + 127) / 128;  // after so many channels a part of the next panel is prefetched
  const Lists first_lists{nullptr, nullptr, slices.rows, SHIFT};
  const int64_t entries_each = groups * first_lists.room(), offsets_each = groups * (first_lists.group() + 1);
  const bool copied = a.N % SHARED == 0 && rate * static_cast<double>(channels) >= 4;  // how many sums a row is part of
  const int64_t panel_floats = slices.rows * panels.width();
  Scratch copies(bytes(sizeof(float), copied ? threads * panel_floats : 0));
  Scratch bits(bytes(sizeof(uint64_t), slices.at_once * channels * words));
  Scratch entries(bytes(sizeof(uint16_t), slices.at_once * entries_each));
  Scratch offsets(bytes(sizeof(int64_t), slices.at_once * offsets_each));
  Scratch more(bytes(sizeof(float), (slices.at_once - 1) * n));  // sums of all slices but the first
  for (int64_t m = 0; m < a.M; m += slices.at_once * slices.rows) {
    const int64_t rows = smaller(slices.at_once * slices.rows, a.M - m), count = (rows + slices.rows - 1) / slices.rows;
    const float* const source = grad.from(m, rows);
    const auto lists_of = [&](int64_t slice) {
      return Lists{static_cast<uint16_t*>(entries.get()) + slice * entries_each,
                   static_cast<int64_t*>(offsets.get()) + slice * offsets_each, slices.rows, SHIFT};
    };
    Tasks listing(count * groups), summing(count * panels.count);
    team(threads, [&](int thread, int) {
      for (int64_t task; listing.next(task);) {
        const int64_t slice = task / groups, group = task % groups, begin = slice * slices.rows;
        const int64_t in_slice = smaller(slices.rows, rows - begin);
        const Range range{64 * group, smaller(64 * (group + 1), channels)};
        uint64_t* const transposed = static_cast<uint64_t*>(bits.get()) + slice * channels * words;
        const uint64_t* from = a.words + (m + begin) * stride + first / 64 + group;
        for (int64_t r = 0; r < in_slice; r += 64, from += 64 * stride) {
          transpose_words(from, stride, smaller(64, in_slice - r), transposed + range.begin * words + r / 64, words,
                          range.end - range.begin);
        }
        lists_of(slice).fill(transposed, words, words_for(in_slice), range);
      }
      barrier();
      int64_t task, next;
      for (bool there = summing.next(task); there; task = next) {
        there = summing.next(next);
        const int64_t slice = task / panels.count, soon = next / panels.count;
        float* const out = slice ? more.floats() + (slice - 1) * n : by_channel;
        Sums<float> sums{source + slice * slices.rows * a.N, a.N, 1, a.N, nullptr, out, !slice && m, false};
        const int64_t column = task % panels.count * panels.width();
        if (copied) {
          float* const copy = copies.floats() + thread * panel_floats;
          copy_panel(sums.source + column, a.N, smaller(slices.rows, rows - slice * slices.rows),
                     smaller(panels.width(), a.N - column), panels, copy);
          sums.source = copy;
          sums.stride = panels.width();
          sums.panel_stride = 0;
        }
        // meanwhile the next panel is prefetched piece by piece, since only so many lines can be in flight at a time
        const float* ahead = source + soon * slices.rows * a.N + next % panels.count * panels.width();
        const int64_t rows_ahead = there ? smaller(slices.rows, rows - soon * slices.rows) : 0;
        for (int64_t k = 0, r = 0; k < channels; k += step) {
          const int64_t end = smaller(k + step, channels);
          for (const int64_t last = rows_ahead * end / channels; r < last; r++, ahead += a.N) {
            for (int64_t i = 0; i < panels.width(); i += 16) __builtin_prefetch(ahead + i, 0, 2);
          }
          sum_panel(sums, lists_of(slice), k, end, column, panels.vectors);
        }
      }
    });
    add_sums(by_channel, more.floats(), n, count - 1, threads);
  }
}

// sums [K, N], in panels whose sums stay in the first-level cache (near_sums.h).
void sum_near(const WeightGrad& a, const Panels& panels, int threads, float* sums) {
  const Slices slices(a.M, 2 * NEAR_ROWS, panels.count, a.K * a.N, threads);
  const int64_t n = a.K * a.N, rows_at_once = slices.at_once * slices.rows;
  const int64_t lists = (slices.rows + NEAR_ROWS - 1) / NEAR_ROWS, room = NEAR_ROWS * a.K + 64;
  const int64_t own = per_thread(a.K * panels.width());
  const GradientRows grad(a, smaller(a.M, rows_at_once));
  Scratch near(bytes(sizeof(float), own * threads));
  Scratch spikes(bytes(sizeof(Spike), slices.at_once * lists * room));
  Scratch counts(bytes(sizeof(int64_t), slices.at_once * lists));
  Scratch more(bytes(sizeof(float), (slices.at_once - 1) * n));  // sums of all slices but the first
  for (int64_t m = 0; m < a.M; m += rows_at_once) {
    const int64_t rows = smaller(rows_at_once, a.M - m), count = (rows + slices.rows - 1) / slices.rows;
    const float* const source = grad.from(m, rows);
    Spike* const listed = static_cast<Spike*>(spikes.get());
    int64_t* const how_many = static_cast<int64_t*>(counts.get());
    Tasks listing(count * lists), summing(count * panels.count);
    team(threads, [&](int thread, int) {
      for (int64_t task; listing.next(task);) {
        const int64_t slice = task / lists, first = slice * slices.rows + task % lists * NEAR_ROWS;
        const int64_t end = smaller(rows, (slice + 1) * slices.rows), there = smaller(NEAR_ROWS, end - first);
        const uint64_t* words = a.words + (m + first) * words_for(a.K);
        how_many[task] = there > 0 ? list_spikes(words, a.K, there, listed + task * room) : 0;
      }
      barrier();
      float* const own_sums = near.floats() + own * thread;
      for (int64_t task; summing.next(task);) {
        const int64_t slice = task / panels.count, column = task % panels.count * panels.width();
        const int64_t width = smaller(panels.width(), a.N - column), vectors = (width + W - 1) / W;
        const int last = static_cast<int>(width - (vectors - 1) * W);
        memset(own_sums, 0, bytes(sizeof(float), a.K * vectors * W));
        for (int64_t i = 0; i < lists; i++) {
          const int64_t list = slice * lists + i, first = slice * slices.rows + i * NEAR_ROWS;
          const float* const panel = source + first * a.N + column;
          with_vectors<MOST_VECTORS>(vectors, [&](auto known) {
            constexpr int V = decltype(known)::count;
            (last == W ? add_spikes<V, true> : add_spikes<V, false>)(listed + list * room, how_many[list], panel, a.N,
                                                                     last, panels.count > 1, own_sums);
          });
        }
        float* const out = (slice ? more.floats() + (slice - 1) * n : sums) + column;
        const bool accumulate = !slice && m;
        for (int64_t k = 0; k < a.K; k++) {
          for (int64_t c = 0; c < width; c += W) {
            const int there = static_cast<int>(smaller(W, width - c));
            F sum = load(own_sums + k * vectors * W + c);
            if (accumulate) sum = add(load_up_to(out + k * a.N + c, there), sum);
            store_up_to(out + k * a.N + c, sum, there);
          }
        }
      }
    });
    add_sums(sums, more.floats(), n, count - 1, threads);
  }
}

}  // namespace

void gather_weight_grad(const WeightGrad& a) {
  if (!a.K || !a.N) return;
  const Panels panels(a.N, PANEL_VECTORS);
  const double rate = rate_of(a.words, a.M, a.K);
  const double additions = rate * static_cast<double>(a.M) * static_cast<double>(a.K);
  const double work = (0.4 * additions + 0.3 * static_cast<double>(a.M)) * static_cast<double>((a.N + W - 1) / W);
  const int threads = threads_for(work, a.threads);
  Scratch by_channel(bytes(sizeof(float), a.K * a.N));  // [K, N]
  const Panels near = near_panels(a.M, a.K, a.N);
  if (a.M && near.count) {
    sum_near(a, near, threads, by_channel.floats());
    transpose({by_channel.floats(), a.grad_weight, a.K, a.N, a.threads});
    return;
  }
  const Slices slices(a.M, PANEL_BYTES / (64 * 4 * panels.width()) * 64, panels.count, a.K * a.N, threads);
  const int64_t rows = slices.at_once * slices.rows;
  const int64_t channels = BITS_AT_A_TIME / rows / 64 * 64 + 64;
  if (!a.M) memset(by_channel.get(), 0, sizeof(float) * static_cast<size_t>(a.K * a.N));
  const GradientRows grad(a, smaller(a.M, rows));
  for (int64_t k = 0; k < a.K; k += channels) {
    gather_channels(a, k, smaller(channels, a.K - k), grad, slices, rate, threads, by_channel.floats() + k * a.N);
  }
  transpose({by_channel.floats(), a.grad_weight, a.K, a.N, a.threads});
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
