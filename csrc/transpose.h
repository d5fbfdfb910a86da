// Transposition of bits and of 16 x 16 floats, for use inside kernels.
#pragma once

#include "bits.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

// Transposes up to 64 rows of up to 64 bits: from one word per row, `stride` words apart, to one word per bit,
// `out_stride` words apart.
SPIKEDECODER_INLINE void transpose_words(const uint64_t* words, int64_t stride, int64_t rows, uint64_t* out,
                                         int64_t out_stride, int64_t bits) {
  uint64_t a[64];
  transpose_64(words, stride, rows, a);
  for (int64_t i = 0; i < bits; i++) out[i * out_stride] = a[i];
}

// Does this thread's part of the transposition of bits from words [rows, words_for(K)] to out [K, words_for(rows)].
SPIKEDECODER_INLINE void transpose_bits(const uint64_t* words, int64_t rows, int64_t K, uint64_t* out, int thread,
                                        int threads) {
  const int64_t in_stride = words_for(K), out_stride = words_for(rows);
  const Range tiles = share(in_stride * out_stride, thread, threads);
  for (int64_t tile = tiles.begin; tile < tiles.end; tile++) {
    const int64_t r = tile / in_stride * 64, w = tile % in_stride;
    transpose_words(words + r * in_stride + w, in_stride, rows - r < 64 ? rows - r : 64,
                    out + 64 * w * out_stride + r / 64, out_stride, K - 64 * w < 64 ? K - 64 * w : 64);
  }
}

#if defined(SPIKEDECODER_AVX512)

// r[i] holds row i of a 16 x 16 matrix on entry, and column i on return.
SPIKEDECODER_INLINE void transpose_16(__m512 r[16]) {
  __m512 t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 2; j++) {
      const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + j + 2]);
      r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#endif

// One tile of at most 16 x 16: x [rows, columns] with stride x_stride -> out [columns, rows].
SPIKEDECODER_INLINE void transpose_tile(const float* x, int64_t x_stride, float* out, int64_t out_stride, int rows,
                                        int columns) {
#if defined(SPIKEDECODER_AVX512)
  __m512 r[16];
  for (int i = 0; i < 16; i++) r[i] = i < rows ? load_n(x + i * x_stride, columns) : zero();
  transpose_16(r);
  for (int i = 0; i < 16; i++) {
    if (i < columns) store_n(out + i * out_stride, r[i], rows);
  }
#else
  for (int i = 0; i < rows; i++) {
    for (int j = 0; j < columns; j++) out[j * out_stride + i] = x[i * x_stride + j];
  }
#endif
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
