// Spikes: 1 where x >= 0, else 0; backward by the derivative of the ATan surrogate. Threads share the elements.
// Bytes moved per element, the minimum: forward 4 read + 4 written; backward 8 read + 4 written.
#include "kernels.h"
#include "neuron.h"
#include "parallel.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

void binarize(const Binarize& a) {
  const F alpha = set1(a.alpha), one = set1(1);
  parallel(threads_for(0.3 * static_cast<double>(a.n), a.threads), [&](int thread, int threads) {
    const Range mine = share(a.n, thread, threads, 16 * W);
    for (int64_t i = mine.begin; i < mine.end; i += W) {
      const int n = static_cast<int>(mine.end - i < W ? mine.end - i : W);
      const F x = load_up_to(a.x + i, n);
      const F out = a.grad ? mul(load_up_to(a.grad + i, n), atan_derivative(x, alpha))
                           : keep(ge(x, zero()), one);
      store_up_to(a.out + i, out, n);
    }
  });
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
