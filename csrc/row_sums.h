// Sums of the rows of a source that bits select, for use inside kernels (row_sums.cpp).
//
// Bits are turned into lists of row numbers once. Then, for a panel of a few vectors of columns, the sum of each output
// row is held in registers while its list is walked. Where the source is in the nearest cache and there are few bits,
// the bits themselves are walked.
#pragma once

#include "bits.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

#if defined(SPIKEDECODER_AVX2)
constexpr int MOST_VECTORS = 10;  // of 16 registers
constexpr int FEW_VECTORS = 10;   // for a handful of rows, whose source is in a farther cache
#else
constexpr int MOST_VECTORS = 8;
constexpr int FEW_VECTORS = 16;
#endif
constexpr int64_t BITS_AT_A_TIME = 8 << 20;  // limits the size of lists, with 2 bytes per entry

// Divides a row's columns into panels with equal numbers of vectors, except for the last.
struct Panels {
  int64_t count;
  int vectors;

  explicit Panels(int64_t columns, int64_t most = MOST_VECTORS) {
    const int64_t all = (columns + W - 1) / W;
    count = (all + most - 1) / most;
    vectors = static_cast<int>((all + count - 1) / count);
  }
  int64_t width() const { return vectors * W; }
};

struct Panel {
  const float* source;
  int64_t stride;
  int lanes;  // of the last vector
  const float* bias;
  bool accumulate;  // add to what out holds
  bool past;        // see past_cache
};

// out = the sum of those n rows of a panel that are in a list.
using SumList = void (*)(const uint16_t* list, int64_t n, const Panel& panel, float* out);

// Lists of the set bits of rows. The lists of a group of rows are stored one after another.
struct Lists {
  uint16_t* entries;
  int64_t* offsets;  // [group + 1] for each group
  int64_t bits;
  int shift;  // a group has 2^shift rows: another division would take as long as a short list

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

// Rows of words whose bits select rows of a panel. In the panel each 64 rows are followed by a row of -0, which changes
// no sum. For word w of a row at least steps[w] rows are added, the row of -0 once there are no more bits: a loop whose
// length varies from row to row costs more than a few additions.
struct Words {
  const uint64_t* words;
  int64_t stride, n;
  const int* steps;
};

// The number of steps for `n` words, `stride` apart: the mean number of set bits per word plus one standard deviation.
inline int steps_for(const uint64_t* words, int64_t stride, int64_t n) {
  int64_t sum = 0, squares = 0, steps = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t set = __builtin_popcountll(words[i * stride]);
    sum += set;
    squares += set * set;
  }
  while (steps * n < sum || (steps * n - sum) * (steps * n - sum) < squares * n - sum * sum) steps++;
  return static_cast<int>(steps);
}

// What is summed, and where the sums go: rows of the source [.., columns], rows of out [.., columns]. The panel of the
// source from column c on begins at source + c * panel_stride, and its rows are `stride` apart.
template <class E>
struct Sums {
  const float* source;
  int64_t stride, panel_stride, columns;
  const float* bias;
  E* out;
  bool accumulate, past;

  // The panel of up to `vectors` vectors from column `first` on; `used` receives how many there are.
  Panel panel(int64_t first, int vectors, int& used) const {
    const int64_t width = smaller(vectors * W, columns - first);
    used = static_cast<int>((width + W - 1) / W);
    return {source + first * panel_stride, stride, static_cast<int>(width - (used - 1) * W),
            bias ? bias + first : nullptr, accumulate, past};
  }
};

// Sums rows begin .. end - 1 of out, in the panel of `vectors` vectors from column `first` on.
template <class E>
void sum_panel(const Sums<E>& s, const Lists& lists, int64_t begin, int64_t end, int64_t first, int vectors);

// The same for rows 0 .. rows - 1 of out and bits that are not listed.
template <class E>
void sum_panel(const Sums<E>& s, const Words& words, int64_t rows, int64_t first, int vectors);

// The function for `vectors` vectors, up to MOST_VECTORS or exactly FEW_VECTORS; whole: the last one has all its lanes.
SumList sum_list_of(int vectors, bool whole);

// Rows that lie a multiple of SHARED floats apart map to the same lines of a cache: a panel of them can use a quarter
// of the lines or less, whatever the cache's size, unless it is copied so that its rows follow each other.
constexpr int64_t SHARED = 512;

// For Words: writes the row of -0 behind the 64 rows of a panel that begins at `to`.
inline void end_panel(const Panels& panels, float* to) {
  for (int64_t c = 0; c < panels.width(); c += W) store(to + 64 * panels.width() + c, set1(-0.f));
}

// Copies `rows` rows of a panel with `width` columns: from `stride` apart to panels.width() apart.
inline void copy_panel(const float* from, int64_t stride, int64_t rows, int64_t width, const Panels& panels, float* to) {
  for (int64_t r = 0; r < rows; r++, from += stride, to += panels.width()) {
    for (int64_t c = 0; c < width; c += W) {
      const int there = static_cast<int>(smaller(W, width - c));
      store_up_to(to + c, load_up_to(from + c, there), there);
    }
  }
}

// The share of bits that are set, from a sample if there are many: accurate enough to choose a number of threads.
inline double rate_of(const uint64_t* words, int64_t rows, int64_t bits) {
  int64_t set = 0;
  const int64_t n = rows * words_for(bits);
  const int64_t step = n > 4096 ? n / 4096 : 1;
  int64_t seen = 0;
  for (int64_t i = 0; i < n; i += step, seen++) set += __builtin_popcountll(words[i]);
  return seen ? static_cast<double>(set) / static_cast<double>(64 * seen) : 0;
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
