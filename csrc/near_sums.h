// Sums of rows into few others, all of which stay in a core's first-level cache, inside kernels.
//
// Each spike adds its row of a panel to the sums of its channel, in one loop over all spikes: per spike and vector two
// loads and a store in that cache. The rows are read once and in order, and bits need not be transposed.
#pragma once

#include "bits.h"
#include "row_sums.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t NEAREST_BYTES = 26 << 10;  // of sums: the first-level cache is 32 KiB and more
#if defined(SPIKEDECODER_AVX512)
// of rows, from which on they come from memory: those of a nearer cache are gathered sooner, with half the loads
constexpr int64_t FAR_BYTES = 16 << 20;
#else
constexpr int64_t FAR_BYTES = 0;
#endif
constexpr int NEAR_VECTORS_AT_LEAST = 4;  // of a panel, for which a spike's row and channel are looked up
constexpr int64_t NEAR_ROWS = 512;        // whose spikes are listed in one task
constexpr int64_t SPIKES_AHEAD = 48;      // of whose rows those of the one at hand are added

// A spike: row of its NEAR_ROWS, and channel in the upper half.
using Spike = uint32_t;

// The panels of N columns in which the sums of K channels are near; count is 0 where they are too many, or M rows are not
// far enough.
inline Panels near_panels(int64_t M, int64_t K, int64_t N) {
  const int64_t fit = NEAREST_BYTES / (K * W * static_cast<int64_t>(sizeof(float)));
  Panels panels(N, larger(1, smaller(fit, MOST_VECTORS)));
  const bool far = M * N * static_cast<int64_t>(sizeof(float)) >= FAR_BYTES;
  if (!far || panels.vectors < NEAR_VECTORS_AT_LEAST || fit < panels.vectors) panels.count = 0;
  return panels;
}

// Lists the spikes of up to NEAR_ROWS rows of K channels, in order, and returns how many; SPIKES_AHEAD that can be
// looked at follow them. There is room for NEAR_ROWS * K + 64.
inline int64_t list_spikes(const uint64_t* words, int64_t K, int64_t rows, Spike* to) {
  const int64_t stride = words_for(K);
  const uint64_t last = ~uint64_t{0} >> (64 * stride - K);  // no bit of another channel is followed
  int64_t n = 0;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t w = 0; w < stride; w++) {
      uint64_t word = words[r * stride + w] & (w < stride - 1 ? ~uint64_t{0} : last);
      const Spike first = static_cast<Spike>(r + (w << 22));
      const int64_t end = n + __builtin_popcountll(word);
      // eight at a time, even of none: loops that differ in length cost more
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

// sums [channels, V vectors] += the rows of a panel in which each spiked; `lanes` of a row's last vector are there.
// `ask`: whether rows are asked for ahead, where they lie apart.
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
