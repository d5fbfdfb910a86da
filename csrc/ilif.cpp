// Integer LIF: s = clip(floor(x / v_threshold + 1/2), 0, levels), and a mask of one byte per element, 1 where the
// gradient passes; backward reads the mask and not x. Threads share the elements.
// Bytes moved per element: forward 4 read + 4 written (5 in training); backward 5 read + 4 written.
#include "kernels.h"
#include "neuron.h"
#include "parallel.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
void ilif_forward(const IlifForward& a) {
  parallel(threads_for(0.3 * static_cast<double>(a.n), a.threads), [&](int thread, int threads) {
    const Range mine = share(a.n, thread, threads, 16 * W);
    const F scale = set1(a.scale), levels = set1(a.levels), low = set1(a.low), high = set1(a.high), one = set1(1);
    constexpr int64_t BLOCK = 512;
    float passes[BLOCK];  // as floats first: the compiler vectorises their conversion to bytes
    for (int64_t first = mine.begin; first < mine.end; first += BLOCK) {
      const int64_t length = mine.end - first < BLOCK ? mine.end - first : BLOCK;
      for (int64_t i = 0; i < length; i += W) {
        const int n = static_cast<int>(length - i < W ? length - i : W);
        const F u = mul(load_up_to(a.x + first + i, n), scale);
        store_up_to(a.out + first + i, count(u, levels), n);
        store(passes + i, keep(ge(u, low), keep(ge(high, u), one)));
      }
      if (!a.mask) continue;
      uint8_t* const mask = a.mask + first;
      for (int64_t i = 0; i < length; i++) mask[i] = static_cast<uint8_t>(static_cast<int32_t>(passes[i]));
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
    for (int64_t i = mine.begin; i < mine.end; i++) {
      // keeps or clears the bits: an infinite gradient times 0 would be NaN, and a branch would prevent vectorisation
      const float through = grad[i] * scale;
      uint32_t bits;
      memcpy(&bits, &through, sizeof bits);
      bits &= 0 - static_cast<uint32_t>(mask[i]);
      memcpy(out + i, &bits, sizeof bits);
    }
  });
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
