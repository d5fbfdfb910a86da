// Adds rows to a few sums, all of which stay in a core's first-level cache; for use inside kernels.
//
// One loop over all spikes adds each spike's row of a panel to the sums of its channel: two loads and a store in that
// cache per spike and vector. The rows are read once and in order, and bits need not be transposed.
#pragma once

#include "bits.h"
#include "row_sums.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t NEAREST_BYTES = 26 << 10;  // of sums: the first-level cache has 32 KiB or more
#if defined(SPIKEDECODER_AVX512)
// of rows, from which on they come from memory: rows in a nearer cache are gathered faster, with half the loads
constexpr int64_t FAR_BYTES = 16 << 20;
#else
constexpr int64_t FAR_BYTES = 0;
#endif
constexpr int NEAR_VECTORS_AT_LEAST = 4;  // of a panel, to be worth looking up a spike's row and channel
constexpr int64_t NEAR_ROWS = 512;        // whose spikes are listed in one task
constexpr int64_t SPIKES_AHEAD = 48;      // how many spikes ahead their rows are prefetched

// A spike: its row among NEAR_ROWS in the lower half, its channel in the upper half.
using Spike = uint32_t;

// The panels of N columns in which the sums of K channels stay in that cache; count is 0 if there are too many sums, or
// if the M rows are so small that they are in a cache themselves.
inline Panels near_panels(int64_t M, int64_t K, int64_t N) {
  const int64_t fit = NEAREST_BYTES / (K * W * static_cast<int64_t>(sizeof(float)));
  Panels panels(N, larger(1, smaller(fit, MOST_VECTORS)));
  const bool far = M * N * static_cast<int64_t>(sizeof(float)) >= FAR_BYTES;
  if (!far || panels.vectors < NEAR_VECTORS_AT_LEAST || fit < panels.vectors) panels.count = 0;
  return panels;
}

// Lists the spikes of up to NEAR_ROWS rows of K channels, in order, and returns how many there are. They are followed
// by SPIKES_AHEAD valid entries, for prefetching. `to` has room for NEAR_ROWS * K + 64.
inline int64_t list_spikes(const uint64_t* words, int64_t K, int64_t rows, Spike* to) {
  const int64_t stride = words_for(K);
  const uint64_t last = ~uint64_t{0} >> (64 * stride - K);  // drops bits beyond the last channel
  int64_t n = 0;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t w = 0; w < stride; w++) {
      uint64_t word = words[r * stride + w] & (w < stride - 1 ? ~uint64_t{0} : last);
      const Spike first = static_cast<Spike>(r + (w << 22));
      const int64_t end = n + __builtin_popcountll(word);
      // eight at a time, even if there are none: loops of varying length cost more
      do {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++, word &= word - 1) to[n + i] = first + (static_cast<Spike>(first_bit(word)) << 16);
        n += 8;
      } while (n < end);
      n = end;
    }
  }
  for (int64_t i = n; i < n + SPIKES_AHEAD; i++) to[i] = 0;
  return n;
}

// sums [channels, V vectors] += the rows of a panel in which each channel spiked. A row's last vector has `lanes`
// lanes. `ask`: prefetch rows, for panels whose rows do not follow each other in memory.
template <int V, bool Whole>
void add_spikes(const Spike* spikes, int64_t n, const float* panel, int64_t stride, int lanes, bool ask, float* sums) {
  constexpr int LINE = 64 / static_cast<int>(sizeof(float));
  const auto row_of = [&](Spike spike) { return panel + static_cast<int64_t>(spike & 0xffff) * stride; };
  for (int64_t i = 0; i < n; i++) {
    const float* row = row_of(spikes[i]);
    float* to = sums + static_cast<int64_t>(spikes[i] >> 16) * (V * W);
    if (ask) {
      const float* soon = row_of(spikes[i + SPIKES_AHEAD]);
#pragma GCC unroll 16
      for (int c = 0; c < V * W; c += LINE) __builtin_prefetch(soon + c, 0, 3);
    }
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) {
      const F value = Whole || j < V - 1 ? load(row + j * W) : load_n(row + j * W, lanes);
      store(to + j * W, add(load(to + j * W), value));
    }
  }
}

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
