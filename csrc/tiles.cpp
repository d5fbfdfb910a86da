// Sums of the rows of a source that bits pick, in the matrix unit (AMX) that some CPUs have.
//
// The unit multiplies tiles of bfloat16 and sums in float32. A spike is 0 or 1 there too, and a float is the sum of
// three bfloat16, of 8 of its 24 bits each: three products with spikes are the product with the float itself, at any
// spike rate, in a third of the unit's time, which is several times faster than dense float32. Parts that are all 0,
// as those of a source that was bfloat16 before, are left out. (Parts below 2^-126 count as 0; a source that is
// infinite or NaN is multiplied as a whole.)
//
// A task is a panel of some columns for a range of rows: the source of the panel is split into tiles of its parts, a
// slice of its rows at a time, and stays in the second-level cache, as do the sums; spikes become tiles for a block of
// rows at a time. Operations: 3 multiply-adds of the unit per row, bit and column, at most. Bytes moved: the bits once
// per panel, the source once per range of rows, the output written once.
#include "bits.h"
#include "gradient_rows.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "transpose.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

#if defined(SPIKEDECODER_AMX)

namespace {

constexpr int64_t SIDE = 16, TILE = 1024;  // rows of a tile and its bytes: 16 rows of 16 floats, or of 32 bfloat16
constexpr int64_t STEP = 32;               // bits of a row of a tile
constexpr int64_t DEPTH = 512;             // bits of a slice
constexpr int64_t BLOCKS = 8;              // of a panel, at most, each the columns of a tile
constexpr int64_t ROWS = 4 * SIDE;         // of a block, at most: four tiles of sums hide the unit's latency
constexpr int64_t RANGE = 1024;            // rows of a task, at most
constexpr int PARTS = 3;                   // of a float

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t parts_of(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// All eight tiles as 16 rows of 64 bytes, on this thread, while this lives.
class Tiles {
 public:
  Tiles() {
    Layout layout;
    for (int i = 0; i < 8; i++) {
      layout.row_bytes[i] = 64;
      layout.rows[i] = SIDE;
    }
    _tile_loadconfig(&layout);
  }
  ~Tiles() { _tile_release(); }

 private:
  struct alignas(64) Layout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

// Where rows of 16 floats lie, `stride` floats apart (0: they are all the same).
struct Place {
  float* at;
  int64_t stride;
};

inline Place place_in(float* out, int64_t stride) { return {out, stride}; }
inline Place place_in(bfloat16*, int64_t) { return {nullptr, 0}; }  // no sums fit there

// sums [N tiles of 16 rows] = start + spikes source, over `steps` steps. spikes [steps][ROWS][STEP],
// source [steps][All][pairs of bits][columns][2], of whose parts the first are multiplied.
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

// For this many tiles of sums and parts of the source.
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

// The number's upper half, and what is left of it: exact.
SPIKEDECODER_INLINE __m512i take_part(F& a) {
  const __m512i part = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  const Mask whole = _mm512_fpclass_ps_mask(a, 0x99);  // NaN, infinity
  a = _mm512_maskz_sub_ps(_knot_mask16(whole), a, _mm512_castsi512_ps(part));
  return part;
}

// Rows of a source, `stride` apart, as tiles of their parts [blocks][steps][PARTS][pairs][columns][2]. How many parts
// hold anything but 0.
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

// The same of a source that is its only part.
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

// Words of some rows, `stride` apart, as tiles of bfloat16 [steps][ROWS][STEP]; rows up to the next multiple of a
// tile's become 0.
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

template <class S>
struct Job {
  const uint64_t* words;
  int64_t stride, rows, bits;  // words from one row to the next
  const S* source;
  int64_t columns;

  int64_t panels() const { return parts_of(columns, BLOCKS * SIDE); }
  int64_t width() const { return round_up(parts_of(columns, panels()), SIDE); }
  int64_t ranges() const { return parts_of(rows, RANGE); }
};

// What a thread needs for a task.
class Room {
 public:
  Room() : memory_(sums_at + static_cast<size_t>(RANGE * BLOCKS * SIDE) * sizeof(float)) {}
  char* spikes() const { return static_cast<char*>(memory_.get()); }
  char* source() const { return spikes() + source_at; }
  float* sums() const { return reinterpret_cast<float*>(spikes() + sums_at); }

 private:
  static constexpr size_t source_at = DEPTH / STEP * ROWS * 64 + 4096;
  static constexpr size_t sums_at = source_at + DEPTH / STEP * BLOCKS * PARTS * TILE + 4096;
  Scratch memory_;
};

// out[r, c] = bias[c] + the sum of source[q, c] over the bits q of row r, for these rows, bits and columns. While the
// unit multiplies, the slice that follows is fetched.
template <class S, class E>
void sum_panel(const Job<S>& job, Range rows, Range bits, Range columns, const float* bias, E* out, bool past,
               const Room& room) {
  const int64_t width = columns.end - columns.begin, blocks = parts_of(width, SIDE), all = rows.end - rows.begin;
  const int64_t row_blocks = parts_of(all, ROWS), at_once = round_up(parts_of(all, row_blocks), SIDE);
  alignas(64) float biases[BLOCKS * SIDE] = {};
  if (bias) memcpy(biases, bias + columns.begin, static_cast<size_t>(width) * sizeof(float));
  for (int64_t bit = bits.begin; bit < bits.end; bit += DEPTH) {
    const int64_t depth = smaller(DEPTH, bits.end - bit), steps = parts_of(depth, STEP);
    const S* const source = job.source + bit * job.columns + columns.begin;
    const int parts = split(source, job.columns, depth, width, room.source());
    const bool first = bit == bits.begin, last = bit + depth == bits.end;
    const int64_t ahead = smaller(DEPTH, bits.end - bit - depth), turns = parts_of(all, at_once) * blocks;
    int64_t turn = 0;
    float* sums = room.sums();
    for (int64_t r = rows.begin; r < rows.end; r += at_once) {
      const int64_t n = smaller(at_once, rows.end - r);
      E* const to = out + r * job.columns + columns.begin;
      // no other place is needed
      const bool there = last && !past && place_in(to, 0).at && n % SIDE == 0 && width % SIDE == 0;
      spread(job.words + r * job.stride + bit / 64, job.stride, n, words_for(depth), room.spikes());
      const Multiply multiply_tiles = multiply_of<parts_in<S>>(parts_of(n, SIDE), parts);
      for (int64_t b = 0; b < blocks; b++, turn++) {
        const Place kept{sums + b * ROWS * SIDE, SIDE};
        multiply_tiles(room.spikes(), room.source() + b * steps * parts_in<S> * TILE, steps,
                       first ? Place{biases + b * SIDE, 0} : kept, there ? place_in(to + b * SIDE, job.columns) : kept);
        for (int64_t q = ahead * turn / turns; q < ahead * (turn + 1) / turns; q++) {
          const S* const next = source + (depth + q) * job.columns;
          for (int64_t c = 0; c < width; c += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(next + c, 0, 2);
        }
      }
      for (int64_t i = 0; last && !there && i < n; i++) {
        for (int64_t c = 0; c < width; c += SIDE) {
          const int lanes = static_cast<int>(smaller(SIDE, width - c));
          store_result(to + i * job.columns + c, load(sums + c * ROWS + i * SIDE), lanes, past);
        }
      }
      if (!(first && last)) sums += blocks * ROWS * SIDE;
    }
  }
}

// All rows and columns, of bits that are shared out to `groups`, whose sums go to out(group).
template <class S, class Out>
void sum_all(const Job<S>& job, int64_t groups, const float* bias, bool past, int most, const Out& out) {
  const int64_t panels = job.panels(), width = job.width();
  const int64_t depth = round_up(parts_of(job.bits, groups), DEPTH);
  const double columns = static_cast<double>(job.columns);
  const double sums = 0.0012 * static_cast<double>(job.rows) * static_cast<double>(job.bits) * columns;
  const double moved = 0.1 * static_cast<double>(job.rows + job.bits) * columns;
  const int threads = threads_for(sums + moved, most);
  int64_t ranges = job.ranges();  // more of them where threads would have nothing to do, as long as they are long
  while (groups * ranges * panels < 2 * threads && job.rows / (ranges + 1) >= 2 * ROWS) ranges++;
  const int64_t range = round_up(parts_of(job.rows, ranges), SIDE);
  ranges = parts_of(job.rows, range);
  Tasks tasks(groups * ranges * panels);
  team(threads, [&](int, int) {
    const Room room;
    const Tiles tiles;
    for (int64_t task; tasks.next(task);) {
      const int64_t r = task / panels % ranges * range, c = task % panels * width, group = task / panels / ranges;
      const Range bits{group * depth, smaller((group + 1) * depth, job.bits)};
      sum_panel(job, {r, smaller(r + range, job.rows)}, bits, {c, smaller(c + width, job.columns)}, bias, out(group),
                past, room);
    }
    finish_stores();
  });
}

template <class E>
void sum_to(const SumRows& a, E* out) {
  const Job<float> job{a.words, words_for(a.bits), a.rows, a.bits, a.source, a.columns};
  const bool past = a.columns % SIDE == 0 && past_cache(out, a.rows * a.columns, a.columns);
  sum_all(job, 1, a.bias, past, a.threads, [&](int64_t) { return out; });
}

template <class S>
void sum_gradients(const WeightGrad& a, const uint64_t* by_channel, const S* grad, float* sums) {
  const Job<S> job{by_channel, words_for(a.M), a.K, a.M, grad, a.N};
  // tasks enough for some threads, whose number changes no result
  constexpr int64_t TASKS = 16, ROWS_AT_LEAST = 1024;
  const int64_t wanted = smaller(parts_of(TASKS, job.panels() * job.ranges()), a.M / ROWS_AT_LEAST);
  const int64_t each = round_up(parts_of(a.M, wanted < 1 ? 1 : wanted), DEPTH), groups = parts_of(a.M, each);
  const int64_t n = a.K * a.N;
  Scratch more(sizeof(float) * static_cast<size_t>((groups - 1) * n));
  sum_all(job, groups, nullptr, false, a.threads,
          [&](int64_t group) { return group ? more.floats() + (group - 1) * n : sums; });
  add_sums(sums, more.floats(), n, groups - 1, a.threads);
}

}  // namespace

void tile_sums(const SumRows& a) {
  if (!a.rows || !a.columns) return;
  if (!a.bits) return avx512::gather(a);
  if (a.out_type == Element::float32) {
    sum_to(a, static_cast<float*>(a.out));
  } else {
    sum_to(a, static_cast<bfloat16*>(a.out));
  }
}

void tile_weight_grad(const WeightGrad& a) {
  if (!a.K || !a.N) return;
  if (!a.M) return avx512::gather_weight_grad(a);
  Scratch by_channel(sizeof(uint64_t) * static_cast<size_t>(a.K * words_for(a.M)));
  Scratch sums(sizeof(float) * static_cast<size_t>(a.K * a.N));
  uint64_t* const words = static_cast<uint64_t*>(by_channel.get());
  const double work = 0.04 * static_cast<double>(a.M) * static_cast<double>(a.K);
  team(threads_for(work, a.threads),
       [&](int thread, int threads) { transpose_bits(a.words, a.M, a.K, words, thread, threads); });
  if (a.grad_type == Element::float32) {
    sum_gradients(a, words, static_cast<const float*>(a.grad), sums.floats());
  } else {
    sum_gradients(a, words, static_cast<const bfloat16*>(a.grad), sums.floats());
  }
  avx512::transpose({sums.floats(), a.grad_weight, a.K, a.N, a.threads});
}

#else

void tile_sums(const SumRows& a) { gather(a); }
void tile_weight_grad(const WeightGrad& a) { gather_weight_grad(a); }

#endif

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
