// Transposition of a matrix in tiles of 16 x 16, which threads share. Bytes moved per element: 4 read + 4 written.
#include "transpose.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

void transpose(const Transpose& a) {
  const int64_t across = (a.columns + 15) / 16, tiles = (a.rows + 15) / 16 * across;
  const double work = 0.4 * static_cast<double>(a.rows) * static_cast<double>(a.columns);
  parallel(threads_for(work, a.threads), [&](int thread, int threads) {
    const Range mine = share(tiles, thread, threads);
    for (int64_t tile = mine.begin; tile < mine.end; tile++) {
      const int64_t r = tile / across * 16, c = tile % across * 16;
      transpose_tile(a.x + r * a.columns + c, a.columns, a.out + c * a.rows + r, a.rows,
                     static_cast<int>(a.rows - r < 16 ? a.rows - r : 16),
                     static_cast<int>(a.columns - c < 16 ? a.columns - c : 16));
    }
  });
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
