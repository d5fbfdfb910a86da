// Sums of rows picked by lists of their numbers, inside kernels.
//
// Bits become lists of row numbers once; then, for a panel of a few vectors of columns, the sum of each output row is
// held in registers while its list is walked.
#pragma once

#include "bits.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

#if defined(SPIKEDECODER_AVX2)
constexpr int MOST_VECTORS = 10;  // of 16 registers
#else
constexpr int MOST_VECTORS = 8;
#endif
constexpr int64_t BITS_AT_A_TIME = 8 << 20;  // bounds the lists: 2 bytes each

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A row's columns in panels of as many vectors each, but the last.
struct Panels {
  int64_t count;
  int vectors;

  explicit Panels(int64_t columns) {
    const int64_t all = (columns + W - 1) / W;
    count = (all + MOST_VECTORS - 1) / MOST_VECTORS;
    vectors = static_cast<int>((all + count - 1) / count);
  }
  int64_t width() const { return vectors * W; }
};

struct Panel {
  const float* source;
  int64_t stride;
  int lanes;  // of the last vector
  const float* bias;
  bool accumulate;  // to what out holds
  bool past;        // see past_cache
};

// out[0 .. V vectors] = sum of the rows of the panel in list. Every loop over the sums is unrolled before the compiler
// decides where they live: one that is not would keep them in memory, and store all of them at each row.
template <int V, bool Whole, class E>
void sum_list(const uint16_t* list, int64_t n, const Panel& p, E* out) {
  const int last = Whole ? W : p.lanes;
  F sums[V];
#pragma GCC unroll 16
  for (int j = 0; j < V; j++) sums[j] = p.bias ? load_up_to(p.bias + j * W, Whole || j < V - 1 ? W : last) : zero();
  for (int64_t i = 0; i < n; i++) {
    const float* row = p.source + list[i] * p.stride;
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) {
      sums[j] = add(sums[j], (Whole || j < V - 1) ? load(row + j * W) : load_n(row + j * W, last));
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < V; j++) {
    const int there = Whole || j < V - 1 ? W : last;
    if (p.accumulate) sums[j] = add(load_up_to(out + j * W, there), sums[j]);
    store_result(out + j * W, sums[j], there, p.past);
  }
}

template <class E>
using SumList = void (*)(const uint16_t*, int64_t, const Panel&, E*);

template <int V, class E>
SumList<E> sum_list_of(int vectors, bool whole) {
  if constexpr (V == 0) {
    return nullptr;
  } else {
    if (vectors == V) return whole ? sum_list<V, true, E> : sum_list<V, false, E>;
    return sum_list_of<V - 1, E>(vectors, whole);
  }
}

// Lists of the set bits of rows, those of a group of rows packed behind each other.
struct Lists {
  uint16_t* entries;
  int64_t* offsets;  // [group + 1] for each group
  int64_t bits;
  int shift;  // a group is 2^shift rows: dividing by any number would take as long as a short list

  int64_t group() const { return int64_t{1} << shift; }
  int64_t room() const { return group() * bits + 64; }

  void fill(const uint64_t* words, int64_t word_stride, int64_t segment_words, Range rows) const {
    const int64_t g = rows.begin >> shift;
    uint16_t* to = entries + g * room();
    int64_t* at = offsets + g * (group() + 1);
    int64_t n = 0;
    for (int64_t r = rows.begin; r < rows.end; r++) {
      *at++ = n;
      const uint64_t* row = words + r * word_stride;
      for (int64_t w = 0; w < segment_words; w++) {
        n += indices_of(row[w], static_cast<uint16_t>(64 * w), to + n);
      }
    }
    *at = n;
  }

  const uint16_t* list(int64_t row, int64_t& n) const {
    const int64_t g = row >> shift;
    const int64_t* at = offsets + g * (group() + 1) + (row - (g << shift));
    n = at[1] - at[0];
    return entries + g * room() + at[0];
  }
};

// What is summed, and where to: rows of the source [.., columns] to rows of out [.., columns]. The panel of the source
// from column c on begins at source + c * panel_stride, and its rows are `stride` apart.
template <class E>
struct Sums {
  const float* source;
  int64_t stride, panel_stride, columns;
  const float* bias;
  E* out;
  bool accumulate, past;
};

// Rows begin..end of out, of the panel of `vectors` vectors from column `first` on.
template <class E>
void sum_panel(const Sums<E>& s, const Lists& lists, int64_t begin, int64_t end, int64_t first, int vectors) {
  const int64_t width = smaller(vectors * W, s.columns - first);
  const int used = static_cast<int>((width + W - 1) / W);
  const Panel panel{s.source + first * s.panel_stride, s.stride, static_cast<int>(width - (used - 1) * W),
                    s.bias ? s.bias + first : nullptr, s.accumulate, s.past};
  const SumList<E> sum = sum_list_of<MOST_VECTORS, E>(used, panel.lanes == W);
  for (int64_t r = begin; r < end; r++) {
    int64_t n;
    const uint16_t* list = lists.list(r, n);
    sum(list, n, panel, s.out + r * s.columns + first);
  }
}

// Columns of rows that lie a multiple of SHARED floats apart share lines of a cache: a panel then has a quarter of them
// or less, whatever the cache's size, unless it is copied, its rows behind each other.
constexpr int64_t SHARED = 512;

// `rows` rows of a panel, of which `width` columns are there, `stride` apart -> to, panels.width() apart.
void copy_panel(const float* from, int64_t stride, int64_t rows, int64_t width, const Panels& panels, float* to) {
  for (int64_t r = 0; r < rows; r++, from += stride, to += panels.width()) {
    for (int64_t c = 0; c < width; c += W) {
      const int there = static_cast<int>(smaller(W, width - c));
      store_up_to(to + c, load_up_to(from + c, there), there);
    }
  }
}

// The share of bits that are set, from a sample where there are many: enough to decide on threads.
double rate_of(const uint64_t* words, int64_t rows, int64_t bits) {
  int64_t set = 0;
  const int64_t n = rows * words_for(bits);
  const int64_t step = n > 4096 ? n / 4096 : 1;
  int64_t seen = 0;
  for (int64_t i = 0; i < n; i += step, seen++) set += __builtin_popcountll(words[i]);
  return seen ? static_cast<double>(set) / static_cast<double>(64 * seen) : 0;
}

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
