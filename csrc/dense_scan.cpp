// The scan of spike_attention.h for u and r that may be any numbers: every token updates all of the state and
// multiplies it by r, which takes two multiply-adds per element, and one multiplication if there is a decay.
//
// A part of the state stays in registers for a block of tokens. The state is multiplied by the decay at each token.
// Powers of the inverse decay in x would save that, but would round where everything else is exact, and so move values
// that lie exactly on a neuron's threshold.
#include "spike_attention.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

#if defined(SPIKEDECODER_AVX512)
constexpr int STATE_VECTORS = 16, MOST_COLUMNS = 4;  // of 32 registers
#else
constexpr int STATE_VECTORS = 8, MOST_COLUMNS = 2;  // of 16
#endif

constexpr int64_t BLOCK = 32;  // tokens

// R rows and V vectors of columns of the state, the last vector with `last` lanes, over n tokens from `first` on.
template <int V, int R, bool DECAYS>
SPIKEDECODER_INLINE void scan_part(const Scan& s, int64_t first, int64_t n, int64_t row, int64_t column,
                                   int last) {
  const int64_t columns = state_columns(s.d), turn = s.reverse ? -1 : 1;
  const int64_t next_u = turn * s.u.stride, next_x = turn * s.x.stride;
  const int64_t next_r = turn * s.r.stride, next_out = turn * s.out.stride;
  const float *u = s.u[first] + row, *x = s.x[first] + column, *r = s.r[first] + row;
  float* out = s.out[first] + column;
  float* const at = s.state + row * columns + column;
  const bool begins = row == 0, ends = row + R == s.d;
  const F decay = set1(s.decay), scale = set1(ends ? s.scale : 1);
  F state[R][V];
#pragma GCC unroll 16
  for (int k = 0; k < R; k++) {
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) state[k][j] = load(at + k * columns + j * W);
  }
  for (int64_t m = 0; m < n; m++, u += next_u, x += next_x, r += next_r, out += next_out) {
    F from[V], sum[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) {
      const int lanes = j < V - 1 ? W : last;
      from[j] = load_up_to(x + j * W, lanes);
      sum[j] = begins ? zero() : load_up_to(out + j * W, lanes);
    }
#pragma GCC unroll 16
    for (int k = 0; k < R; k++) {
      const F a = set1(u[k]), b = set1(r[k]);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) {
        state[k][j] = fma(a, from[j], DECAYS ? mul(state[k][j], decay) : state[k][j]);
        sum[j] = fma(b, state[k][j], sum[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) store_up_to(out + j * W, mul(sum[j], scale), j < V - 1 ? W : last);
  }
#pragma GCC unroll 16
  for (int k = 0; k < R; k++) {
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) store(at + k * columns + j * W, state[k][j]);
  }
}

// Tokens begin .. end - 1 of one head, the last one first if s.reverse.
template <bool DECAYS>
void scan_all(const Scan& s, int64_t begin, int64_t end) {
  for (int64_t done = 0; done < end - begin; done += BLOCK) {
    const int64_t n = end - begin - done < BLOCK ? end - begin - done : BLOCK;
    const int64_t first = s.reverse ? end - 1 - done : begin + done;
    for (int64_t column = 0; column < s.d; column += MOST_COLUMNS * W) {
      const int64_t left = s.d - column, vectors = left >= MOST_COLUMNS * W ? MOST_COLUMNS : (left + W - 1) / W;
      const int last = static_cast<int>(left < vectors * W ? left - (vectors - 1) * W : W);
      with_vectors<MOST_COLUMNS>(vectors, [&](auto part) {
        constexpr int V = decltype(part)::count, ROWS = STATE_VECTORS / V;
        // parts of similar size
        for (int64_t row = 0, parts = (s.d + ROWS - 1) / ROWS; row < s.d; parts--) {
          const int64_t rows = (s.d - row + parts - 1) / parts;
          with_vectors<ROWS>(rows, [&](auto of_rows) {
            scan_part<V, decltype(of_rows)::count, DECAYS>(s, first, n, row, column, last);
          });
          row += rows;
        }
      });
    }
  }
}

}  // namespace

void dense_scan(const Scan& s, int64_t begin, int64_t end) {
  s.decay == 1 ? scan_all<false>(s, begin, end) : scan_all<true>(s, begin, end);
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
