// Operations on words of bits, for use inside kernels.
#pragma once

#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

// Bit i is set where p[i] is not 0 (NaN counts as not 0), for the first n <= 64 values.
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

// The number of the lowest set bit, 64 if there is none.
SPIKEDECODER_INLINE int64_t first_bit(uint64_t word) {
#if defined(SPIKEDECODER_AVX512) || defined(SPIKEDECODER_AVX2)
  return static_cast<int64_t>(_tzcnt_u64(word));
#else
  return word ? __builtin_ctzll(word) : 64;
#endif
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
  // four at a time, since loops of varying length cost more; entries beyond the last are not read
  const int64_t n = __builtin_popcountll(word);
  for (int64_t i = 0; i < n; i += 4) {
#pragma GCC unroll 4
    for (int64_t j = i; j < i + 4; j++, word &= word - 1) out[j] = static_cast<uint16_t>(base + first_bit(word));
  }
  return n;
#endif
}

// A matrix of 64 x 64 bits is transposed in six steps. Each takes pairs of rows that are `apart` from each other,
// divides them into groups of 2 `bits`, and exchanges the upper half of each group in the first row with the lower half
// of the same group in the second.
template <int bits>
constexpr uint64_t LOWER = ~uint64_t{0} / ((uint64_t{1} << bits) + 1);

#if defined(SPIKEDECODER_AVX512)

template <int apart, int bits>
SPIKEDECODER_INLINE void exchange_bits(__m512i* rows) {
  const __m512i lower = _mm512_set1_epi64(static_cast<int64_t>(LOWER<bits>));
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    if (i & apart) continue;
    const __m512i upper = _mm512_srli_epi64(rows[i], bits);
    const __m512i t = _mm512_and_si512(_mm512_xor_si512(upper, rows[i | apart]), lower);
    rows[i] = _mm512_xor_si512(rows[i], _mm512_slli_epi64(t, bits));
    rows[i | apart] = _mm512_xor_si512(rows[i | apart], t);
  }
}

// Word j of rows[i] becomes word i of rows[j].
SPIKEDECODER_INLINE void transpose_8(__m512i* rows) {
  __m512i pairs[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi64(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi64(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; odd++) {
    const __m512i a = _mm512_shuffle_i64x2(pairs[odd], pairs[2 + odd], 0x88);
    const __m512i b = _mm512_shuffle_i64x2(pairs[odd], pairs[2 + odd], 0xdd);
    const __m512i c = _mm512_shuffle_i64x2(pairs[4 + odd], pairs[6 + odd], 0x88);
    const __m512i d = _mm512_shuffle_i64x2(pairs[4 + odd], pairs[6 + odd], 0xdd);
    rows[odd] = _mm512_shuffle_i64x2(a, c, 0x88);
    rows[2 + odd] = _mm512_shuffle_i64x2(b, d, 0x88);
    rows[4 + odd] = _mm512_shuffle_i64x2(a, c, 0xdd);
    rows[6 + odd] = _mm512_shuffle_i64x2(b, d, 0xdd);
  }
}

// a = the transpose of up to 64 rows of one word each, `stride` words apart: bit j of row i becomes bit i of a[j].
SPIKEDECODER_INLINE void transpose_64(const uint64_t* words, int64_t stride, int64_t rows, uint64_t* a) {
  const __m512i eighth = _mm512_mullo_epi64(_mm512_set_epi64(56, 48, 40, 32, 24, 16, 8, 0), _mm512_set1_epi64(stride));
  __m512i at[8];  // lane i of at[j] is row 8 i + j
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    const int there = rows > j ? static_cast<int>(rows - j + 7) / 8 : 0;
    const __mmask8 lanes = static_cast<__mmask8>((1u << there) - 1);
    at[j] = _mm512_mask_i64gather_epi64(_mm512_setzero_si512(), lanes, eighth, words + j * stride, 8);
  }
  exchange_bits<4, 4>(at);
  exchange_bits<2, 2>(at);
  exchange_bits<1, 1>(at);
  transpose_8(at);
  exchange_bits<4, 32>(at);
  exchange_bits<2, 16>(at);
  exchange_bits<1, 8>(at);
  for (int i = 0; i < 8; i++) _mm512_storeu_si512(a + 8 * i, at[i]);
}

#else

// Here a row is 8 words, each of which is treated in this way.
template <int apart, int bits>
SPIKEDECODER_INLINE void exchange_bits(uint64_t (*rows)[8]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    if (i & apart) continue;
    for (int j = 0; j < 8; j++) {
      const uint64_t t = ((rows[i][j] >> bits) ^ rows[i | apart][j]) & LOWER<bits>;
      rows[i][j] ^= t << bits;
      rows[i | apart][j] ^= t;
    }
  }
}

// a = the transpose of up to 64 rows of one word each, `stride` words apart: bit j of row i becomes bit i of a[j].
SPIKEDECODER_INLINE void transpose_64(const uint64_t* words, int64_t stride, int64_t rows, uint64_t* a) {
  uint64_t by_eight[8][8], by_one[8][8];  // [i][j], and [j][i], are row 8 i + j
  for (int i = 0; i < 8; i++) {
    for (int j = 0; j < 8; j++) by_one[j][i] = 8 * i + j < rows ? words[(8 * i + j) * stride] : 0;
  }
  exchange_bits<4, 4>(by_one);
  exchange_bits<2, 2>(by_one);
  exchange_bits<1, 1>(by_one);
  for (int i = 0; i < 8; i++) {
    for (int j = 0; j < 8; j++) by_eight[i][j] = by_one[j][i];
  }
  exchange_bits<4, 32>(by_eight);
  exchange_bits<2, 16>(by_eight);
  exchange_bits<1, 8>(by_eight);
  memcpy(a, by_eight, sizeof by_eight);
}

#endif

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
