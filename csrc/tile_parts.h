// A source as tiles of bfloat16. A float is the sum of three of them, each with 8 of its 24 bits, so that three
// products with spikes add up to the product with the float itself. Parts that are 0 throughout, as for a source that
// was bfloat16 before, are left out. (Parts below 2^-126 count as 0; an infinity or NaN is not split.)
#pragma once

#include "bits.h"
#include "tile_unit.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t STEP = 32;  // bits of a row of a tile
constexpr int PARTS = 3;       // of a float

// sums [N tiles of 16 rows] = start + spikes source, over `steps` steps. spikes [steps][ROWS][STEP],
// source [steps][All][pairs of bits][columns][2]. Of its All parts the first `Parts` are multiplied.
template <int N, int Parts, int All>
void multiply(const char* spikes, const char* source, int64_t steps, Place start, Place sums) {
  const int64_t bytes = start.stride * 4, next = start.stride * SIDE;
  _tile_loadd(0, start.at, bytes);
  if constexpr (N > 1) _tile_loadd(1, start.at + next, bytes);
  if constexpr (N > 2) _tile_loadd(2, start.at + 2 * next, bytes);
  if constexpr (N > 3) _tile_loadd(3, start.at + 3 * next, bytes);
#define SPIKEDECODER_TILE(i)                                  \
  if constexpr (N > i) {                                      \
    _tile_loadd(7, spikes + i * TILE, 64);                    \
    _tile_dpbf16ps(i, 7, 4);                                  \
    if constexpr (Parts > 1) _tile_dpbf16ps(i, 7, 5);         \
    if constexpr (Parts > 2) _tile_dpbf16ps(i, 7, 6);         \
  }
  for (int64_t step = 0; step < steps; step++, spikes += 4 * TILE, source += All * TILE) {
    _tile_loadd(4, source, 64);
    if constexpr (Parts > 1) _tile_loadd(5, source + TILE, 64);
    if constexpr (Parts > 2) _tile_loadd(6, source + 2 * TILE, 64);
    SPIKEDECODER_TILE(0)
    SPIKEDECODER_TILE(1)
    SPIKEDECODER_TILE(2)
    SPIKEDECODER_TILE(3)
  }
#undef SPIKEDECODER_TILE
  const int64_t sums_bytes = sums.stride * 4, next_sums = sums.stride * SIDE;
  _tile_stored(0, sums.at, sums_bytes);
  if constexpr (N > 1) _tile_stored(1, sums.at + next_sums, sums_bytes);
  if constexpr (N > 2) _tile_stored(2, sums.at + 2 * next_sums, sums_bytes);
  if constexpr (N > 3) _tile_stored(3, sums.at + 3 * next_sums, sums_bytes);
}

using Multiply = void (*)(const char*, const char*, int64_t, Place, Place);

// The function for this many tiles of sums and parts of the source.
template <int All, int N = 4, int Parts = All>
Multiply multiply_of(int64_t tiles, int parts) {
  if constexpr (Parts > 1) {
    if (parts < Parts) return multiply_of<All, N, Parts - 1>(tiles, parts);
  }
  if constexpr (N > 1) {
    if (tiles < N) return multiply_of<All, N - 1, Parts>(tiles, parts);
  }
  return multiply<N, Parts, All>;
}

template <class S>
constexpr int parts_in = PARTS;
template <>
constexpr int parts_in<bfloat16> = 1;

// Returns the numbers' upper halves and leaves in `a` what remains of them, exactly.
SPIKEDECODER_INLINE __m512i take_part(F& a) {
  const __m512i part = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  const Mask whole = _mm512_fpclass_ps_mask(a, 0x99);  // NaN, infinity
  a = _mm512_maskz_sub_ps(_knot_mask16(whole), a, _mm512_castsi512_ps(part));
  return part;
}

// Splits rows of a source, `stride` apart, into tiles of their parts [blocks][steps][PARTS][pairs][columns][2]. Returns
// how many parts hold anything but 0.
int split(const float* source, int64_t stride, int64_t rows, int64_t columns, char* tiles) {
  const int64_t blocks = parts_of(columns, SIDE), steps = parts_of(rows, STEP);
  __m512i left[PARTS - 1] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t row = 0; row < steps * STEP; row += 2) {
    char* to = tiles + row / STEP * PARTS * TILE + row % STEP / 2 * 64;
    for (int64_t b = 0; b < blocks; b++, to += steps * PARTS * TILE) {
      const float* const from = source + row * stride + b * SIDE;
      const int there = static_cast<int>(smaller(SIDE, columns - b * SIDE));
      F even = row < rows ? load_up_to(from, there) : zero();
      F odd = row + 1 < rows ? load_up_to(from + stride, there) : zero();
      for (int p = 0; p < PARTS; p++) {
        const __m512i first = take_part(even), second = take_part(odd);
        _mm512_store_si512(to + p * TILE, _mm512_or_si512(_mm512_srli_epi32(first, 16), second));
        if (p < PARTS - 1) {
          left[p] = _mm512_or_si512(left[p], _mm512_or_si512(_mm512_castps_si512(even), _mm512_castps_si512(odd)));
        }
      }
    }
  }
  for (int p = PARTS - 1; p > 0; p--) {
    if (_mm512_test_epi32_mask(left[p - 1], left[p - 1])) return p + 1;
  }
  return 1;
}

// The same for a source that is bfloat16 and so its only part.
int split(const bfloat16* source, int64_t stride, int64_t rows, int64_t columns, char* tiles) {
  const int64_t blocks = parts_of(columns, SIDE), steps = parts_of(rows, STEP);
  for (int64_t row = 0; row < steps * STEP; row += 2) {
    char* to = tiles + row / STEP * TILE + row % STEP / 2 * 64;
    for (int64_t b = 0; b < blocks; b++, to += steps * TILE) {
      const bfloat16* const from = source + row * stride + b * SIDE;
      const __mmask16 there = static_cast<__mmask16>((1u << smaller(SIDE, columns - b * SIDE)) - 1);
      const __m256i even = _mm256_maskz_loadu_epi16(row < rows ? there : 0, from);
      const __m256i odd = _mm256_maskz_loadu_epi16(row + 1 < rows ? there : 0, from + stride);
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
      _mm512_store_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
    }
  }
  return 1;
}

// Expands words of some rows, `stride` apart, to tiles of bfloat16 [steps][ROWS][STEP], with rows of 0 up to the next
// multiple of a tile's rows.
void spread(const uint64_t* words, int64_t stride, int64_t rows, int64_t count, char* tiles) {
  const __m512i one = _mm512_set1_epi16(0x3f80);
  const int64_t all = round_up(rows, SIDE);
  for (int64_t w = 0; w < count; w++) {
    char* to = tiles + w * 2 * ROWS * 64;
    for (int64_t r = 0; r < all; r++, to += 64) {
      const uint64_t word = r < rows ? words[r * stride + w] : 0;
      _mm512_store_si512(to, _mm512_maskz_mov_epi16(static_cast<__mmask32>(word), one));
      _mm512_store_si512(to + ROWS * 64, _mm512_maskz_mov_epi16(static_cast<__mmask32>(word >> 32), one));
    }
  }
}

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
