// A source of floats as tiles of bytes. The unit multiplies twice as many bytes as bfloat16 at a time, and sums them
// exactly, in integers.
//
// The numbers in a column of a slice of the source are rounded to 24-bit integers times a power of two, the column's
// unit. An integer is three digits of one byte, of which the highest has a sign. A number is then off by at most 2^-23
// of the column's largest, and a sum by that times the number of spikes; adding rounds nothing. If the numbers of a
// column are of similar size, this is the precision of a float or better. If the largest is many times the usual size,
// or infinite or NaN, or if all are tiny, split_digits returns false and tile_parts.h is used.
#pragma once

#include "bits.h"
#include "tile_unit.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t BYTES = 64;  // bits of a row of a tile of bytes
constexpr int DIGITS = 3;      // of a number
constexpr int64_t DIGITS_PAY = 128;  // bits of a slice from which on digits are faster than parts: their sums cost more

// How many times the geometric mean the largest number of a column may be, as a power of two; a number of that mean
// size keeps 23 bits less this. Gradients vary more in size than weights, and a step along them needs no more than half
// of a float's bits.
constexpr int LIKE_WEIGHTS = 6, LIKE_GRADIENTS = 10;

using Counts = int32_t[DIGITS * 2][SIDE][SIDE];

// sums [N tiles of 16 rows] = start + unit * (spikes source), over `steps` steps. spikes [steps][ROWS][BYTES],
// source [steps][DIGITS][fours of bits][columns][4].
template <int N>
void multiply_digits(const char* spikes, const char* source, int64_t steps, Place start, Place sums, F unit,
                     Counts& counts) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  if constexpr (N > 1) {
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  }
  for (int64_t step = 0; step < steps; step++, spikes += 4 * TILE, source += DIGITS * TILE) {
    _tile_loadd(7, source, 64);
    _tile_loadd(6, spikes, 64);
    _tile_dpbuud(0, 6, 7);
    if constexpr (N > 1) {
      _tile_loadd(6, spikes + TILE, 64);
      _tile_dpbuud(3, 6, 7);
      _tile_loadd(7, source + TILE, 64);
      _tile_dpbuud(4, 6, 7);
      _tile_loadd(6, spikes, 64);
    } else {
      _tile_loadd(7, source + TILE, 64);
    }
    _tile_dpbuud(1, 6, 7);
    _tile_loadd(7, source + 2 * TILE, 64);
    _tile_dpbusd(2, 6, 7);
    if constexpr (N > 1) {
      _tile_loadd(6, spikes + TILE, 64);
      _tile_dpbusd(5, 6, 7);
    }
  }
  _tile_stored(0, counts[0], 64);
  _tile_stored(1, counts[1], 64);
  _tile_stored(2, counts[2], 64);
  if constexpr (N > 1) {
    _tile_stored(3, counts[3], 64);
    _tile_stored(4, counts[4], 64);
    _tile_stored(5, counts[5], 64);
  }
  const F high = set1(65536);
  for (int t = 0; t < N; t++) {
    const auto* const digits = counts + DIGITS * t;
    for (int64_t r = 0; r < SIDE; r++, start.at += start.stride, sums.at += sums.stride) {
      const __m512i second = _mm512_slli_epi32(_mm512_load_si512(digits[1][r]), 8);
      const F low = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(digits[0][r]), second));
      const F number = fma(_mm512_cvtepi32_ps(_mm512_load_si512(digits[2][r])), high, low);
      store(sums.at, fma(number, unit, load(start.at)));
    }
  }
}

// Splits rows of a source, `stride` apart, into tiles of their digits [blocks][steps][DIGITS][fours][columns][4], and
// finds the unit of each column. False if the numbers of a column differ too much in size; `alike`: see LIKE_WEIGHTS.
bool split_digits(const float* source, int64_t stride, int64_t rows, int64_t columns, int alike, char* tiles,
                  float* units) {
  const int64_t blocks = parts_of(columns, SIDE), steps = parts_of(rows, BYTES);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __mmask16 there[BLOCKS] = {};
  for (int64_t b = 0; b < blocks; b++) there[b] = static_cast<__mmask16>((1u << smaller(SIDE, columns - b * SIDE)) - 1);
  // of what is not 0: the largest, the sum of logarithms (a float's upper bits, in 128ths of a power of two), how many
  __m512i most[BLOCKS], total[BLOCKS], count[BLOCKS];
  F inverse[BLOCKS];
  constexpr int64_t AT_ONCE = 4;  // blocks whose columns are scanned together, in registers
  for (int64_t first = 0; first < blocks; first += AT_ONCE) {
    __m512i m[AT_ONCE] = {}, t[AT_ONCE] = {}, n[AT_ONCE] = {};
    const float* from = source + first * SIDE;
    for (int64_t row = 0; row < rows; row++, from += stride) {
#pragma GCC unroll 4
      for (int b = 0; b < AT_ONCE; b++) {
        const F number = _mm512_maskz_loadu_ps(there[first + b], from + b * SIDE);
        const __m512i bits = _mm512_and_si512(_mm512_castps_si512(number), magnitude);
        m[b] = _mm512_max_epu32(m[b], bits);  // ordered like the floats, with NaN above them
        t[b] = _mm512_add_epi32(t[b], _mm512_srli_epi32(bits, 16));
        n[b] = _mm512_mask_add_epi32(n[b], _mm512_test_epi32_mask(bits, bits), n[b], _mm512_set1_epi32(1));
      }
    }
    for (int b = 0; b < AT_ONCE; b++) most[first + b] = m[b], total[first + b] = t[b], count[first + b] = n[b];
  }
  constexpr int LEAST = 32, INFINITE = 255, ONE = 127;  // exponents as they are stored
  for (int64_t b = 0; b < blocks; b++) {
    const __m512i exponent = _mm512_srli_epi32(most[b], 23);
    const __mmask16 none = _mm512_testn_epi32_mask(most[b], most[b]);
    const __mmask16 in_range = _mm512_cmpge_epi32_mask(exponent, _mm512_set1_epi32(LEAST)) &
                               _mm512_cmplt_epi32_mask(exponent, _mm512_set1_epi32(INFINITE));
    const __m512i least_mean = _mm512_sub_epi32(_mm512_srli_epi32(most[b], 16), _mm512_set1_epi32(128 * alike));
    const __mmask16 near = _mm512_cmpge_epi32_mask(total[b], _mm512_mullo_epi32(least_mean, count[b]));
    if (static_cast<__mmask16>(none | (in_range & near)) != 0xffff) return false;
    // 2^(22 - exponent): the largest is below 2^23
    const __m512i up = _mm512_sub_epi32(_mm512_set1_epi32(2 * ONE + 22), exponent);
    const __m512i down = _mm512_sub_epi32(exponent, _mm512_set1_epi32(22));
    inverse[b] = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(_knot_mask16(none), up, 23));
    store(units + b * SIDE, _mm512_castsi512_ps(_mm512_maskz_slli_epi32(_knot_mask16(none), down, 23)));
  }
  const F largest = set1(8388607);
  const auto interleaved = [](int digit) {  // of two numbers: this digit of each, then the next of each
    const int at = digit | (64 + digit) << 8 | (digit + 1) << 16 | (65 + digit) << 24;
    const __m512i lane = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(0x04040404));
    return _mm512_add_epi8(lane, _mm512_set1_epi32(at));
  };
  const __m512i low = interleaved(0), high = interleaved(2);
  constexpr __mmask32 UPPER = 0xaaaaaaaa;  // halves of the lanes
  for (int64_t row = 0; row < steps * BYTES; row += 4) {
    char* to = tiles + row / BYTES * DIGITS * TILE + row % BYTES / 4 * 64;
    const float* from = source + row * stride;
    for (int64_t b = 0; b < blocks; b++, from += SIDE, to += steps * DIGITS * TILE) {
      __m512i q[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const F number = _mm512_maskz_loadu_ps(row + i < rows ? there[b] : 0, from + i * stride);
        q[i] = _mm512_cvtps_epi32(_mm512_min_ps(mul(number, inverse[b]), largest));
      }
      const __m512i first = _mm512_permutex2var_epi8(q[0], low, q[1]), second = _mm512_permutex2var_epi8(q[2], low, q[3]);
      const __m512i third = _mm512_permutex2var_epi8(q[0], high, q[1]), fourth = _mm512_permutex2var_epi8(q[2], high, q[3]);
      _mm512_store_si512(to, _mm512_mask_mov_epi16(first, UPPER, _mm512_slli_epi32(second, 16)));
      _mm512_store_si512(to + TILE, _mm512_mask_mov_epi16(_mm512_srli_epi32(first, 16), UPPER, second));
      _mm512_store_si512(to + 2 * TILE, _mm512_mask_mov_epi16(third, UPPER, _mm512_slli_epi32(fourth, 16)));
    }
  }
  return true;
}

// Expands words of some rows, `stride` apart, to tiles of bytes [steps][ROWS][BYTES], with rows of 0 up to the next
// multiple of a tile's rows.
void spread_bytes(const uint64_t* words, int64_t stride, int64_t rows, int64_t count, char* tiles) {
  const __m512i one = _mm512_set1_epi8(1);
  const int64_t all = round_up(rows, SIDE);
  for (int64_t w = 0; w < count; w++) {
    char* to = tiles + w * ROWS * BYTES;
    for (int64_t r = 0; r < all; r++, to += BYTES) {
      _mm512_store_si512(to, _mm512_maskz_mov_epi8(r < rows ? words[r * stride + w] : 0, one));
    }
  }
}

}  // namespace
}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
