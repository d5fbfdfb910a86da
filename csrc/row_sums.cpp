// Sums of rows that lists, or bits, select; see row_sums.h.
#include "row_sums.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

#if defined(SPIKEDECODER_AVX2)
constexpr int SUMS_AT_ONCE = 12;  // vectors in registers, of several rows if rows are narrow
#elif defined(SPIKEDECODER_LEAN)
constexpr int SUMS_AT_ONCE = 1;
#else
constexpr int SUMS_AT_ONCE = 16;
#endif

// The sum of some rows of a panel of V vectors, in registers. Every loop over the sums is unrolled before the compiler
// decides where to keep them: a single loop that is not would keep them in memory and store all of them at each row.
template <int V, bool Whole>
struct PanelSum {
  F sums[V];

  SPIKEDECODER_INLINE_MEMBER void start(const Panel& p) {
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) sums[j] = p.bias ? load_up_to(p.bias + j * W, lanes(p, j)) : zero();
  }
  SPIKEDECODER_INLINE_MEMBER void add_row(const Panel& p, const float* row) {
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) {
      sums[j] = add(sums[j], (Whole || j < V - 1) ? load(row + j * W) : load_n(row + j * W, p.lanes));
    }
  }
  template <class E>
  SPIKEDECODER_INLINE_MEMBER void write(const Panel& p, E* out) {
    if (p.accumulate) {
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) sums[j] = add(load_up_to(out + j * W, lanes(p, j)), sums[j]);
    }
    if (p.past) {
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) stream(out + j * W, sums[j]);
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) store_up_to(out + j * W, sums[j], lanes(p, j));
    }
  }

 private:
  static SPIKEDECODER_INLINE_MEMBER int lanes(const Panel& p, int vector) {
    return Whole || vector < V - 1 ? W : p.lanes;
  }
};

// out[0 .. V vectors] = sum of the rows of the panel in list.
template <int V, bool Whole, class E>
void sum_list(const uint16_t* list, int64_t n, const Panel& p, E* out) {
  PanelSum<V, Whole> sum;
  sum.start(p);
  for (int64_t i = 0; i < n; i++) sum.add_row(p, p.source + list[i] * p.stride);
  sum.write(p, out);
}

template <int V, class E>
auto sum_lists_of(int vectors, bool whole) -> void (*)(const uint16_t*, int64_t, const Panel&, E*) {
  if constexpr (V == 0) {
    return nullptr;
  } else {
    if (vectors == V) return whole ? sum_list<V, true, E> : sum_list<V, false, E>;
    return sum_lists_of<V - 1, E>(vectors, whole);
  }
}

// R rows at once, because the additions to a single row depend on each other.
template <int R, int V, bool Whole, class E>
SPIKEDECODER_INLINE void sum_words(const Words& s, const uint64_t* words, const Panel& p, E* out, int64_t out_stride) {
  PanelSum<V, Whole> sum[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) sum[r].start(p);
  const float* source = p.source;
  for (int64_t w = 0; w < s.n; w++, source += 65 * p.stride) {
    uint64_t left[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) left[r] = words[r * s.stride + w];
    for (int i = s.steps[w]; i; i--) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        sum[r].add_row(p, source + first_bit(left[r]) * p.stride);
        left[r] &= left[r] - 1;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      for (; left[r]; left[r] &= left[r] - 1) sum[r].add_row(p, source + first_bit(left[r]) * p.stride);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) sum[r].write(p, out + r * out_stride);
}

template <int V, bool Whole, class E>
void sum_rows_of_words(const Words& s, int64_t rows, const Panel& p, E* out, int64_t out_stride) {
  constexpr int R = V <= SUMS_AT_ONCE / 4 ? 4 : V <= SUMS_AT_ONCE / 2 ? 2 : 1;
  const uint64_t* words = s.words;
  int64_t r = 0;
  for (; r + R <= rows; r += R) sum_words<R, V, Whole>(s, words + r * s.stride, p, out + r * out_stride, out_stride);
  for (; R > 1 && r < rows; r++) sum_words<1, V, Whole>(s, words + r * s.stride, p, out + r * out_stride, out_stride);
}

template <int V, class E>
auto sum_words_of(int vectors, bool whole) -> void (*)(const Words&, int64_t, const Panel&, E*, int64_t) {
  if constexpr (V == 0) {
    return nullptr;
  } else {
    if (vectors == V) return whole ? sum_rows_of_words<V, true, E> : sum_rows_of_words<V, false, E>;
    return sum_words_of<V - 1, E>(vectors, whole);
  }
}

}  // namespace

template <class E>
void sum_panel(const Sums<E>& s, const Lists& lists, int64_t begin, int64_t end, int64_t first, int vectors) {
  int used;
  const Panel panel = s.panel(first, vectors, used);
  const auto sum = sum_lists_of<MOST_VECTORS, E>(used, panel.lanes == W);
  for (int64_t r = begin; r < end; r++) {
    int64_t n;
    const uint16_t* list = lists.list(r, n);
    sum(list, n, panel, s.out + r * s.columns + first);
  }
}

template <class E>
void sum_panel(const Sums<E>& s, const Words& words, int64_t rows, int64_t first, int vectors) {
  int used;
  const Panel panel = s.panel(first, vectors, used);
  sum_words_of<MOST_VECTORS, E>(used, panel.lanes == W)(words, rows, panel, s.out + first, s.columns);
}

template void sum_panel(const Sums<float>&, const Lists&, int64_t, int64_t, int64_t, int);
template void sum_panel(const Sums<bfloat16>&, const Lists&, int64_t, int64_t, int64_t, int);
template void sum_panel(const Sums<float>&, const Words&, int64_t, int64_t, int);
template void sum_panel(const Sums<bfloat16>&, const Words&, int64_t, int64_t, int);

SumList sum_list_of(int vectors, bool whole) {
  if (FEW_VECTORS > MOST_VECTORS && vectors == FEW_VECTORS && whole) return sum_list<FEW_VECTORS, true, float>;
  return sum_lists_of<MOST_VECTORS, float>(vectors, whole);
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
