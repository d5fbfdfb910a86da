// The parts of decode.cpp for I-LIF neurons, whose outputs are integers: one token, one timestep.
//
// An integer stands for its binary digits (spikedecoder/params.py). A Linear adds each weight row times the integer of
// its input, in one multiply-add; the rows of silent neurons are not touched.
#pragma once

#include "kernels.h"
#include "neuron.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

#if defined(SPIKEDECODER_AVX512)
constexpr int LEVEL_VECTORS = 8;  // of columns summed together, in registers
#else
constexpr int LEVEL_VECTORS = 4;
#endif

// I-LIF neurons; takes the place of a Cell.
struct Counts {
  F per_unit, levels;

  explicit Counts(const Decode& a) : per_unit(set1(a.per_unit)), levels(set1(a.levels)) {}

  SPIKEDECODER_INLINE_MEMBER F operator()(F x) const { return count(mul(x, per_unit), levels); }
};

template <class Kind>
constexpr bool of_integers = false;
template <>
constexpr bool of_integers<Counts> = true;

// The inputs of a Linear that are not 0, ascending.
struct LevelList {
  uint16_t* channels;
  float* values;
  int32_t* count;
};

// Lists those of C values. May write up to W more entries than there are.
inline void list_levels(const float* x, int64_t C, const LevelList& to) {
  int64_t n = 0;
#if defined(SPIKEDECODER_AVX512)
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t c = 0; c < C; c += W, at = _mm512_add_epi32(at, _mm512_set1_epi32(W))) {
    const F here = load_up_to(x + c, static_cast<int>(C - c < W ? C - c : W));
    const Mask set = not_zero(here);
    store(to.values + n, _mm512_maskz_compress_ps(set, here));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.channels + n),
                        _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(set, at)));
    n += __builtin_popcount(bits(set));
  }
#else
  for (int64_t c = 0; c < C; c++) {
    to.values[n] = x[c];
    to.channels[n] = static_cast<uint16_t>(c);
    n += x[c] != 0;
  }
#endif
  *to.count = static_cast<int32_t>(n);
}

// y = bias + the listed rows of a panel [inputs, width] times their integers, V vectors of columns.
template <int V>
void sum_levels(const float* panel, int64_t width, const LevelList& list, const float* bias, float* y) {
  F sums[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) sums[v] = load(bias + v * W);
  const int64_t n = *list.count;
  for (int64_t i = 0; i < n; i++) {
    const float* row = panel + list.channels[i] * width;
    const F times = set1(list.values[i]);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[v] = fma(times, load(row + v * W), sums[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) store(y + v * W, sums[v]);
}

using SumLevels = void (*)(const float*, int64_t, const LevelList&, const float*, float*);

template <int V>
SumLevels sum_levels_of(int64_t vectors) {
  if constexpr (V == 0) {
    return nullptr;
  } else {
    return vectors == V ? sum_levels<V> : sum_levels_of<V - 1>(vectors);
  }
}

// One token's attention with integers q, k and v [E]: the state [E, d], the heads' states one below the other, becomes
// decay * state + k^T v; out [E] = scale * q state. The products and, without a decay, the sums are integers.
inline void attend_levels(const float* q, const float* k, const float* v, int64_t E, int64_t d, const float* decay, F scale,
                          float* state, float* out) {
  for (int64_t first = 0; first < E; first += d) {
    const F kept = set1(decay ? decay[first / d] : 1);
    for (int64_t c = 0; c < d; c += W) {
      const int n = static_cast<int>(d - c < W ? d - c : W);
      const F value = load_up_to(v + first + c, n);
      F total = zero();
      for (int64_t row = first; row < first + d; row++) {
        float* at = state + row * d + c;
        const F sum = add(mul(load_up_to(at, n), kept), mul(set1(k[row]), value));
        store_up_to(at, sum, n);
        total = fma(set1(q[row]), sum, total);
      }
      store_up_to(out + first + c, mul(total, scale), n);
    }
  }
}

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
