// Words of bits, inside kernels.
#pragma once

#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

// Bit i is set where p[i] is not 0 (NaN is not), for the first n <= 64 values.
SPIKEDECODER_INLINE uint64_t word_of_floats(const float* p, int n) {
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

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
