// Token shift: channel group i of a row comes from the row i places back or, for the gradient, ahead. Threads share the
// rows. Limited by memory: every byte is read and written once.
#include <string.h>

#include "kernels.h"
#include "parallel.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

void token_shift(const TokenShift& a) {
  const int64_t rows = a.sequences * a.S, bytes = a.C * a.size, groups = a.groups < a.C ? a.groups : a.C;
  const int64_t narrow = a.C / groups * a.size, wider = a.C % groups;
  const char* const x = static_cast<const char*>(a.x);
  char* const out = static_cast<char*>(a.out);
  parallel(threads_for(0.05 * static_cast<double>(rows * bytes), a.threads), [&](int thread, int threads) {
    const Range mine = share(rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; row++) {
      const int64_t place = row % a.S, left = a.back ? a.S - 1 - place : place;  // how many rows lie on that side
      int64_t first = row * bytes;
      for (int64_t i = 0; i < groups; i++) {
        const int64_t width = narrow + (i < wider ? a.size : 0);
        if (i <= left) {
          memcpy(out + first, x + first + (a.back ? i : -i) * bytes, static_cast<size_t>(width));
        } else {
          memset(out + first, 0, static_cast<size_t>(width));
        }
        first += width;
      }
    }
  });
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
