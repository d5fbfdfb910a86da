// Integer LIF: s = clip(floor(x / v_threshold + 1/2), 0, levels), and one byte where the gradient passes.
// Bytes moved per element: forward 4 read + 4 written (5 in training); backward 5 read + 4 written.
// Plain loops: the compiler's vectors of this variant serve them.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

// levels + 1/2 < 2^31, so the conversion to an integer, which cuts off, is floor; a NaN stays one
SPIKEDECODER_INLINE float count(float u, float levels) {
  const float v = u + 0.5f, above = v > 0 ? v : 0.f, inside = above < levels ? above : levels;
  const float whole = static_cast<float>(static_cast<int32_t>(inside));
  return v == v ? whole : v;
}

}  // namespace

void ilif_forward(const IlifForward& a) {
  parallel(threads_for(0.3 * static_cast<double>(a.n), a.threads), [&](int thread, int threads) {
    const Range mine = share(a.n, thread, threads, 16 * W);
    const float scale = a.scale, levels = a.levels, low = a.low, high = a.high;
    const float* __restrict x = a.x;
    float* __restrict out = a.out;
    uint8_t* __restrict mask = a.mask;
    if (!mask) {
      for (int64_t i = mine.begin; i < mine.end; i++) out[i] = count(x[i] * scale, levels);
      return;
    }
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const float u = x[i] * scale;
      out[i] = count(u, levels);
      mask[i] = static_cast<uint8_t>((u >= low) & (u <= high));
    }
  });
}

void ilif_backward(const IlifBackward& a) {
  parallel(threads_for(0.3 * static_cast<double>(a.n), a.threads), [&](int thread, int threads) {
    const Range mine = share(a.n, thread, threads, 16 * W);
    const float scale = a.scale;
    const float* __restrict grad = a.grad;
    const uint8_t* __restrict mask = a.mask;
    float* __restrict out = a.out;
    for (int64_t i = mine.begin; i < mine.end; i++) out[i] = mask[i] ? grad[i] * scale : 0.f;
  });
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
