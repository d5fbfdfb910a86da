// Sums of the rows of a source that bits select, by the matrix unit (AMX) that some CPUs have.
//
// A spike is exactly 0 or 1 in any format of the unit. Floats become integers of three bytes (tile_digits.h) or, where
// these would lose too much, sums of three bfloat16 (tile_parts.h). This is several times faster than dense float32, at
// any spike rate.
//
// A task is a panel of columns for a range of rows. The source of the panel is turned into tiles, one slice of its rows
// at a time; these and the sums stay in the second-level cache. Spikes are turned into tiles for one block of rows at a
// time. Operations: at most 3 multiply-adds of the unit per row, bit and column; bytes cost half as much as bfloat16.
// Bytes moved: the bits once per panel, the source twice per range of rows, the output written once.
#include "bits.h"
#include "gradient_rows.h"
#include "kernels.h"
#include "parallel.h"
#include "transpose.h"
#if defined(SPIKEDECODER_AMX)
#include "tile_digits.h"
#include "tile_parts.h"
#endif

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

#if defined(SPIKEDECODER_AMX)

namespace {

template <class S>
struct Job {
  const uint64_t* words;
  int64_t stride, rows, bits;  // words from one row to the next
  const S* source;
  int64_t columns;
  int alike;  // see split_digits

  int64_t panels() const { return parts_of(columns, BLOCKS * SIDE); }
  int64_t width() const { return round_up(parts_of(columns, panels()), SIDE); }
  int64_t ranges() const { return parts_of(rows, RANGE); }
};

// A thread's own memory for a task, `bytes` in all.
class Room {
 public:
  explicit Room(char* memory) : memory_(memory) {}
  char* spikes() const { return memory_; }
  char* source() const { return spikes() + source_at; }
  float* units() const { return reinterpret_cast<float*>(spikes() + units_at); }
  Counts& counts() const { return *reinterpret_cast<Counts*>(spikes() + counts_at); }
  float* sums() const { return reinterpret_cast<float*>(spikes() + sums_at); }

 private:
  static constexpr size_t source_at = DEPTH / STEP * ROWS * 64 + 4096;
  static constexpr size_t units_at = source_at + DEPTH / STEP * BLOCKS * PARTS * TILE + 4096;
  static constexpr size_t counts_at = units_at + BLOCKS * SIDE * sizeof(float);
  static constexpr size_t sums_at = counts_at + sizeof(Counts) + 4096;
  char* const memory_;

 public:
  static constexpr size_t bytes = sums_at + static_cast<size_t>(RANGE * BLOCKS * SIDE) * sizeof(float) + 4096;
  static_assert(bytes % 64 == 0, "each thread's is aligned");
};

bool in_digits(const float* source, int64_t stride, int64_t rows, int64_t columns, int alike, const Room& room) {
  return rows >= DIGITS_PAY && split_digits(source, stride, rows, columns, alike, room.source(), room.units());
}
bool in_digits(const bfloat16*, int64_t, int64_t, int64_t, int, const Room&) { return false; }  // is one product

// The sums of block b for some tiles of rows.
void multiply_all_digits(const Room& room, int64_t b, int64_t steps, int64_t tiles, Place start, Place sums) {
  const char* const source = room.source() + b * steps * DIGITS * TILE;
  const F unit = load(room.units() + b * SIDE);
  for (int64_t t = 0; t < tiles; t += 2) {
    const auto multiply_two = tiles - t > 1 ? multiply_digits<2> : multiply_digits<1>;
    multiply_two(room.spikes() + t * TILE, source, steps, {start.at + t * SIDE * start.stride, start.stride},
                 {sums.at + t * SIDE * sums.stride, sums.stride}, unit, room.counts());
  }
}

// out[r, c] = bias[c] + the sum of source[q, c] over the set bits q of row r, for these rows, bits and columns. While
// the unit multiplies, the next slice is prefetched.
template <class S, class E>
void sum_panel(const Job<S>& job, Range rows, Range bits, Range columns, const float* bias, E* out, bool past,
               const Room& room) {
  const int64_t width = columns.end - columns.begin, blocks = parts_of(width, SIDE), all = rows.end - rows.begin;
  const int64_t row_blocks = parts_of(all, ROWS), at_once = round_up(parts_of(all, row_blocks), SIDE);
  alignas(64) float biases[BLOCKS * SIDE] = {};
  if (bias) memcpy(biases, bias + columns.begin, static_cast<size_t>(width) * sizeof(float));
  for (int64_t bit = bits.begin; bit < bits.end; bit += DEPTH) {
    const int64_t depth = smaller(DEPTH, bits.end - bit);
    const S* const source = job.source + bit * job.columns + columns.begin;
    const bool digits = in_digits(source, job.columns, depth, width, job.alike, room);
    const int parts = digits ? 0 : split(source, job.columns, depth, width, room.source());
    const bool first = bit == bits.begin, last = bit + depth == bits.end;
    const int64_t ahead = smaller(DEPTH, bits.end - bit - depth), turns = parts_of(all, at_once) * blocks;
    int64_t turn = 0;
    float* sums = room.sums();
    for (int64_t r = rows.begin; r < rows.end; r += at_once) {
      const int64_t n = smaller(at_once, rows.end - r);
      E* const to = out + r * job.columns + columns.begin;
      // whether the unit can store the final sums in `out` itself
      const bool there = last && !past && place_in(to, 0).at && n % SIDE == 0 && width % SIDE == 0;
      const uint64_t* const words = job.words + r * job.stride + bit / 64;
      (digits ? spread_bytes : spread)(words, job.stride, n, words_for(depth), room.spikes());
      const Multiply multiply_tiles = multiply_of<parts_in<S>>(parts_of(n, SIDE), parts);
      for (int64_t b = 0; b < blocks; b++, turn++) {
        const Place kept{sums + b * ROWS * SIDE, SIDE};
        const Place start = first ? Place{biases + b * SIDE, 0} : kept;
        const Place end = there ? place_in(to + b * SIDE, job.columns) : kept;
        if (digits) {
          multiply_all_digits(room, b, parts_of(depth, BYTES), parts_of(n, SIDE), start, end);
        } else {
          const int64_t steps = parts_of(depth, STEP);
          multiply_tiles(room.spikes(), room.source() + b * steps * parts_in<S> * TILE, steps, start, end);
        }
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

// Sums all rows and columns. The bits are divided into `groups`, each of which has its sums in out(group).
template <class S, class Out>
void sum_all(const Job<S>& job, int64_t groups, const float* bias, bool past, int most, const Out& out) {
  const int64_t panels = job.panels(), width = job.width();
  const int64_t depth = round_up(parts_of(job.bits, groups), DEPTH);
  const double columns = static_cast<double>(job.columns);
  const double sums = 0.0012 * static_cast<double>(job.rows) * static_cast<double>(job.bits) * columns;
  const double moved = 0.1 * static_cast<double>(job.rows + job.bits) * columns;
  const int threads = threads_for(sums + moved, most);
  int64_t ranges = job.ranges();  // more if threads would be idle, as long as each has enough rows
  while (groups * ranges * panels < 2 * threads && job.rows / (ranges + 1) >= 2 * ROWS) ranges++;
  const int64_t range = round_up(parts_of(job.rows, ranges), SIDE);
  ranges = parts_of(job.rows, range);
  Tasks tasks(groups * ranges * panels);
  Scratch rooms(Room::bytes * static_cast<size_t>(threads));  // allocated outside the team, where nothing can be thrown
  team(threads, [&](int thread, int) {
    const Room room(static_cast<char*>(rooms.get()) + Room::bytes * static_cast<size_t>(thread));
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
  const Job<float> job{a.words, words_for(a.bits), a.rows, a.bits, a.source, a.columns, LIKE_WEIGHTS};
  const bool past = a.columns % SIDE == 0 && past_cache(out, a.rows * a.columns, a.columns);
  sum_all(job, 1, a.bias, past, a.threads, [&](int64_t) { return out; });
}

template <class S>
void sum_gradients(const WeightGrad& a, const uint64_t* by_channel, const S* grad, float* sums) {
  const Job<S> job{by_channel, words_for(a.M), a.K, a.M, grad, a.N, LIKE_GRADIENTS};
  // enough tasks for some threads; the number of threads itself does not change the result
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
