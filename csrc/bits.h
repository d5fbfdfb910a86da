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
  const __m512i lane = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12,
                                        11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_add_epi16(lane, _mm512_set1_epi16(static_cast<short>(base)));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(32));
  const int64_t n = __builtin_popcount(static_cast<uint32_t>(word));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(static_cast<__mmask32>(word), low));
  if (!(word >> 32)) return n;
  _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi16(static_cast<__mmask32>(word >> 32), high));
  return n + __builtin_popcount(static_cast<uint32_t>(word >> 32));
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
