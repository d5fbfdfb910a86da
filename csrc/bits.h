// Words of bits, inside kernels.
#pragma once

#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

// Bit i is set where p[i] is not 0 (NaN is not), for the first n <= 64 values.
template <class E>
SPIKEDECODER_INLINE uint64_t word_of_floats(const E* p, int n) {
  uint64_t word = 0;
  if (n == 64) {
    for (int i = 0; i < 64; i += W) word |= static_cast<uint64_t>(bits(not_zero(load(p + i)))) << i;
  } else {
    for (int i = 0; i < n; i += W) {
      word |= static_cast<uint64_t>(bits(not_zero(load_up_to(p + i, n - i)))) << i;
    }
  }
  return word;
}

// Writes base + i for each set bit i, ascending, and returns how many. May write up to 64 entries.
SPIKEDECODER_INLINE int64_t indices_of(uint64_t word, uint16_t base, uint16_t* out) {
#if defined(SPIKEDECODER_AVX512)
  alignas(64) static constexpr uint8_t number[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                     16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                                     32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                                     48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  const __m512i set = _mm512_maskz_compress_epi8(word, _mm512_load_si512(number));
  const __m512i from = _mm512_set1_epi16(static_cast<short>(base));
  const int64_t n = __builtin_popcountll(word);
  _mm512_storeu_si512(out, _mm512_add_epi16(from, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(set))));
  if (n > 32) {
    const __m512i rest = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(set, 1));
    _mm512_storeu_si512(out + 32, _mm512_add_epi16(from, rest));
  }
  return n;
#else
  int64_t n = 0;
  for (; word; word &= word - 1) out[n++] = static_cast<uint16_t>(base + __builtin_ctzll(word));
  return n;
#endif
}

// In place, the transpose of a 64 x 64 matrix of bits: bit j of a[i] becomes bit i of a[j].
SPIKEDECODER_INLINE void transpose_64(uint64_t* a) {
  uint64_t mask = 0x00000000ffffffffull;
  for (int j = 32; j; j >>= 1, mask ^= mask << j) {
    for (int k = 0; k < 64; k = ((k | j) + 1) & ~j) {
      const uint64_t t = ((a[k] >> j) ^ a[k | j]) & mask;
      a[k] ^= t << j;
      a[k | j] ^= t;
    }
  }
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
