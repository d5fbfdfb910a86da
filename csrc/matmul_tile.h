// What the dense products share: a tile of ROWS x VECTORS sums that stay in registers, the loop that adds to them, and
// rows of operands as vectors of float32, or of pairs of bfloat16 for the CPU's dot product of pairs.
#pragma once

#include "bits.h"
#include "kernels.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

#if defined(SPIKEDECODER_AVX512)
constexpr int ROWS = 8, VECTORS = 3;  // 24 sums of 32 registers
#define SPIKEDECODER_DOT __attribute__((target("avx512bf16")))
#else
constexpr int ROWS = 6, VECTORS = 2;  // 12 sums of 16 registers
#endif

// While rows are copied, those so many rows ahead are prefetched: the CPU's own prefetching ends with each row.
constexpr int64_t AHEAD = 8;

// Two neighbouring values of an operand along the sum, both bfloat16. The earlier one has the lower bits.
struct __attribute__((may_alias)) Pair {
  int32_t bits;
};

// Lanes 0 .. n - 1 of values that start at `column` of a row of K values; the others are 0. n > 0.
template <Element type>
SPIKEDECODER_INLINE F row_part(const void* rows, int64_t row, int64_t K, int64_t column, int64_t n) {
  const int lanes = static_cast<int>(smaller(n, W));
  if constexpr (type == Element::bits) {
    const uint64_t word = static_cast<const uint64_t*>(rows)[row * words_for(K) + column / 64];
    return keep(mask_of(static_cast<uint32_t>(word >> (column % 64)) & ((1u << lanes) - 1)), set1(1));
  } else if constexpr (type == Element::bfloat16) {
    return load_up_to(static_cast<const bfloat16*>(rows) + row * K + column, lanes);
  } else {
    return load_up_to(static_cast<const float*>(rows) + row * K + column, lanes);
  }
}

// Bits are not prefetched: a line of them holds several rows. The row may be beyond the last one.
template <Element type>
SPIKEDECODER_INLINE void prefetch_part(const void* rows, int64_t row, int64_t K, int64_t column) {
  if (type == Element::bits) return;
  const int64_t at = (row * K + column) * (type == Element::float32 ? 4 : 2);
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(rows) + static_cast<uintptr_t>(at)));
}

#if defined(SPIKEDECODER_AVX512)
// Vectors of bfloat16 in float32 as vectors of pairs.
SPIKEDECODER_INLINE F pairs_of(F first, F second) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(second)));
}
#endif

// Where a tile's sums go.
template <class E>
struct Target {
  E* c;
  int64_t stride;
  const float* bias;
  int rows, last;  // how many rows, lanes of the last vector
  bool accumulate, past;

  template <int V>
  SPIKEDECODER_INLINE_MEMBER void write(F (&sums)[ROWS][V]) const {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      if (r >= rows) return;
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) {
        E* const to = c + r * stride + j * W;
        const int n = j < V - 1 ? W : last;
        F sum = sums[r][j];
        if (accumulate) sum = add(sum, load_up_to(to, n));
        if (bias) sum = add(sum, load_up_to(bias + j * W, n));
        store_result(to, sum, n, past);
      }
    }
  }
};

// Unrolled, like all loops over a tile's sums: a single one that is not would keep them in memory.
template <int V>
SPIKEDECODER_INLINE void clear(F (&sums)[ROWS][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) sums[r][j] = zero();
  }
}

// How a tile's part of an operand lies: its rows `stride` values apart, or ROWS values of each column together.
struct ByRows {
  int64_t stride;
  SPIKEDECODER_INLINE_MEMBER int64_t at(int r, int64_t k) const { return r * stride + k; }
};
struct ByColumns {
  SPIKEDECODER_INLINE_MEMBER int64_t at(int r, int64_t k) const { return k * ROWS + r; }
};

// The products of ROWS rows of a, `depth` values each, and the panel's V vectors, `panel_stride` floats apart.
template <int V, class Lay, class E>
void tile(const float* a, const Lay& lay, const float* panel, int64_t panel_stride, int64_t depth,
          const Target<E>& target) {
  F sums[ROWS][V];
  clear(sums);
  for (int64_t k = 0; k < depth; k++, panel += panel_stride) {
    F b[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) b[j] = load(panel + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const F x = set1(a[lay.at(r, k)]);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sums[r][j] = fma(x, b[j], sums[r][j]);
    }
  }
  target.template write<V>(sums);
}

#if defined(SPIKEDECODER_AVX512)
// The same of pairs; depth, strides and lay count pairs.
template <int V, class Lay, class E>
SPIKEDECODER_DOT void tile(const Pair* a, const Lay& lay, const float* panel, int64_t panel_stride, int64_t depth,
                           const Target<E>& target) {
  F sums[ROWS][V];
  clear(sums);
  for (int64_t k = 0; k < depth; k++, panel += panel_stride) {
    __m512bh b[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) b[j] = reinterpret_cast<__m512bh>(load(panel + j * W));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(a[lay.at(r, k)].bits));
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], x, b[j]);
    }
  }
  target.template write<V>(sums);
}
#endif

// The same for a panel of `vectors` vectors, 1 to VECTORS.
template <class A, class Lay, class E>
SPIKEDECODER_INLINE void tile_of(int vectors, const A* a, const Lay& lay, const float* panel, int64_t panel_stride,
                                 int64_t depth, const Target<E>& target) {
  switch (vectors) {
    case 1: return tile<1>(a, lay, panel, panel_stride, depth, target);
    case 2: return tile<2>(a, lay, panel, panel_stride, depth, target);
    default: return tile<VECTORS>(a, lay, panel, panel_stride, depth, target);
  }
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
