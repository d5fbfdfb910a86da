// Sums of rows selected by bits, by tables of subset sums. For four rows of the source and a panel of columns, a table
// holds the sums of all 16 subsets of the four; four bits of an output row say which of these is added to its sum.
//
// The cost does not depend on how many bits are set: one load and one addition per 4 bits and vector of columns, plus
// 16 stores per 4 rows of the source and vector. A task is a panel of columns for up to PART output rows. The tables of
// 32 rows of the source stay in the first-level cache while the bits of these output rows are looked up, and the sums
// stay in the second-level cache. For the weight gradient the source is dL/dy, in slices, and the bits are transposed.
#include "gradient_rows.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "transpose.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

// Vectors of a panel: whole cache lines, and sums in registers.
#if defined(SPIKEDECODER_AVX512)
constexpr int MOST_VECTORS = 3;
#elif defined(SPIKEDECODER_AVX2)
constexpr int MOST_VECTORS = 6;
#else
constexpr int MOST_VECTORS = 8;
#endif
constexpr int FOURS = 8;         // tables, each of four rows of the source, at a time: at most 24 KiB
constexpr int BITS = 4 * FOURS;
constexpr int64_t PART = 1024;        // most output rows whose sums are kept at a time: at most 192 KiB
constexpr int64_t PART_AT_LEAST = 128;  // output rows that make a table worth building
constexpr int64_t SLICE = 4096;       // most rows of a gradient in a slice

// What is summed: rows of the source [bits, columns], selected by bits in halves of words [halves][rows].
struct Job {
  const uint32_t* halves;
  int64_t rows, bits;
  const float* source;
  int64_t columns;
};

// Where the sums go: out [rows, columns].
template <class E>
struct Output {
  using Type = E;
  E* out;
  const float* bias;
  bool accumulate, past;  // add to what out holds; see past_cache
};

// tables [four rows][subset][V vectors] of `rows` rows of the source, as if rows of zeros followed them. The last
// vector has `lanes` columns.
template <int V>
void build_tables(const float* source, int64_t stride, int64_t rows, int lanes, float* tables) {
  for (int64_t r = 0; r < round_up(rows, BITS / 2); r += 4, tables += 16 * V * W) {
    for (int j = 0; j < V; j++) {
      F sums[16];
      sums[0] = zero();
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const int n = j < V - 1 ? W : lanes;
        const F row = r + i < rows ? load_up_to(source + (r + i) * stride + j * W, n) : zero();
#pragma GCC unroll 8
        for (int k = 0; k < 1 << i; k++) sums[(1 << i) + k] = k ? add(sums[k], row) : row;
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) store(tables + (i * V + j) * W, sums[i]);
    }
  }
}

// Makes the compiler complete all additions to the sums that precede this. It would otherwise sum one vector after the
// other, for which it would need the addresses in all tables at once.
template <int V>
SPIKEDECODER_INLINE void in_order(F (&sums)[V]) {
#pragma GCC unroll 8
  for (int j = 0; j < V; j++) {
#if defined(__AVX512F__)
    asm("" : "+v"(sums[j]));
#elif defined(__SSE2__)
    asm("" : "+x"(sums[j]));
#elif defined(__aarch64__)
    asm("" : "+w"(sums[j]));
#endif
  }
}

// Splits the words of n rows, `stride` apart, into halves: out [halves][rows].
void halve(const uint64_t* words, int64_t stride, int64_t n, uint32_t* out, int64_t rows) {
  for (int64_t w = 0; w < stride; w++, out += 2 * rows) {
    for (int64_t r = 0; r < n; r++) {
      out[r] = static_cast<uint32_t>(words[r * stride + w]);
      out[rows + r] = static_cast<uint32_t>(words[r * stride + w] >> 32);
    }
  }
}

// to [rows][V vectors] = from, `from_stride` apart, + the rows of G tables that each row's bits select.
template <int V, int G>
void look_up(const uint32_t* halves, int64_t rows, const float* tables, const float* from, int64_t from_stride,
             float* to) {
  for (int64_t r = 0; r < rows; r++, from += from_stride, to += V * W) {
    const uint32_t bits = halves[r];
    F sums[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) sums[j] = load(from + j * W);
#pragma GCC unroll 8
    for (int g = 0; g < G; g++) {
      const float* row = tables + (g * 16 + (bits >> 4 * g & 15)) * V * W;
#pragma GCC unroll 8
      for (int j = 0; j < V; j++) sums[j] = add(sums[j], load(row + j * W));
      in_order(sums);
    }
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) store(to + j * W, sums[j]);
  }
}

// Computes some rows of the sums, V vectors from `column` on, the last with `lanes` lanes. room: for tables, then sums.
template <int V, class E>
void sum_panel(const Job& job, const Output<E>& output, Range rows, int64_t column, int lanes, float* room) {
  float* const sums = room + 16 * FOURS * V * W;
  const auto lanes_of = [&](int j) { return j < V - 1 ? W : lanes; };
  alignas(64) const float zeros[V * W] = {};
  const float* from = zeros;
  const int64_t stride = job.columns, n = rows.end - rows.begin, step = (n + 3) / 4;
  const float* source = job.source + column;
  for (int64_t bit = 0; bit < job.bits; bit += BITS, source += BITS * stride, from = sums) {
    const int64_t bits = smaller(BITS, job.bits - bit), next = smaller(BITS, job.bits - bit - bits);
    build_tables<V>(source, stride, bits, lanes, room);
    const auto kernel = bits > BITS / 2 ? look_up<V, FOURS> : look_up<V, FOURS / 2>;
    const uint32_t* halves = job.halves + bit / BITS * job.rows + rows.begin;
    const int64_t from_stride = bit ? V * W : 0;
    for (int64_t r = 0, ahead = 0; r < n; r += step) {
      // the next rows of the source are prefetched piece by piece: only so many lines can be in flight at a time
      for (const int64_t end = smaller(ahead + FOURS, next); ahead < end; ahead++) {
        for (int64_t c = 0; c < V * W; c += 16) __builtin_prefetch(source + (BITS + ahead) * stride + c, 0, 2);
      }
      kernel(halves + r, smaller(step, n - r), room, from + r * from_stride, from_stride, sums + r * V * W);
    }
  }
  E* out = output.out + rows.begin * job.columns + column;
  for (int64_t r = rows.begin; r < rows.end; r++, out += job.columns, from += V * W) {
    for (int j = 0; j < V; j++) {
      F sum = load(from + j * W);
      if (output.accumulate) sum = add(load_up_to(out + j * W, lanes_of(j)), sum);
      if (output.bias) sum = add(sum, load_up_to(output.bias + column + j * W, lanes_of(j)));
      store_result(out + j * W, sum, lanes_of(j), output.past);
    }
  }
}

template <class E>
using SumPanel = void (*)(const Job&, const Output<E>&, Range, int64_t, int, float*);

template <int V, class E>
SumPanel<E> sum_panel_of(int64_t vectors) {
  if constexpr (V == 0) {
    return nullptr;
  } else {
    return vectors == V ? sum_panel<V, E> : sum_panel_of<V - 1, E>(vectors);
  }
}

// How the sums [slices, rows, columns] are divided into tasks: into panels, and these into parts of their rows, more of
// them if there are few tasks.
struct Plan {
  int64_t panels, width, parts, part;
  int threads;

  Plan(int64_t slices, int64_t rows, int64_t bits, int64_t columns, int most) {
    const int64_t vectors = (columns + W - 1) / W;
    panels = (vectors + MOST_VECTORS - 1) / MOST_VECTORS;
    // whole cache lines, unless there are few vectors
    width = (panels > 2 ? MOST_VECTORS : (vectors + panels - 1) / panels) * W;
    const double work = 0.1 * static_cast<double>(slices * rows * bits) * static_cast<double>(columns) / 4;
    threads = threads_for(work, most);
    parts = (rows + PART - 1) / PART;
    while (slices * panels * parts < 3 * threads && rows >= PART_AT_LEAST * (parts + 1)) parts++;
    part = (rows + parts - 1) / parts;
  }
};

// Sums all slices, each as job_of(slice) and output_of(slice) say.
template <class JobOf, class OutputOf>
void sum_all(int64_t slices, const Plan& plan, const JobOf& job_of, const OutputOf& output_of) {
  const int64_t each = per_thread((16 * FOURS + plan.part) * plan.width);
  Scratch room(sizeof(float) * static_cast<size_t>(each * plan.threads));
  Tasks tasks(slices * plan.panels * plan.parts);
  team(plan.threads, [&](int thread, int) {
    for (int64_t task; tasks.next(task);) {
      const int64_t slice = task / (plan.panels * plan.parts), panel = task / plan.parts % plan.panels;
      const Job job = job_of(slice);
      const auto output = output_of(slice);
      const Range rows{task % plan.parts * plan.part, smaller((task % plan.parts + 1) * plan.part, job.rows)};
      if (rows.begin >= rows.end) continue;
      const int64_t column = panel * plan.width, vectors = (smaller(plan.width, job.columns - column) + W - 1) / W;
      const int lanes = static_cast<int>(smaller(W, job.columns - column - (vectors - 1) * W));
      sum_panel_of<MOST_VECTORS, typename decltype(output)::Type>(vectors)(job, output, rows, column, lanes,
                                                                         room.floats() + each * thread);
    }
    finish_stores();
  });
}

template <class E>
void sum_to(const SumRows& a, E* out) {
  const Plan plan(1, a.rows, a.bits, a.columns, a.threads);
  const bool lines = plan.width * static_cast<int64_t>(sizeof(E)) % 64 == 0;
  const Output<E> output{out, a.bias, false, lines && past_cache(out, a.rows * a.columns, a.columns)};
  Scratch halves(sizeof(uint64_t) * static_cast<size_t>(a.rows * words_for(a.bits)));
  const Job job{static_cast<uint32_t*>(halves.get()), a.rows, a.bits, a.source, a.columns};
  parallel(threads_for(0.03 * static_cast<double>(a.rows * a.bits), a.threads), [&](int thread, int threads) {
    const int64_t words = words_for(a.bits);
    const Range mine = share(a.rows, thread, threads, 64);
    for (int64_t r = mine.begin; r < mine.end; r += 64) {
      halve(a.words + r * words, words, smaller(64, mine.end - r), static_cast<uint32_t*>(halves.get()) + r, a.rows);
    }
  });
  sum_all(1, plan, [&](int64_t) { return job; }, [&](int64_t) { return output; });
}

}  // namespace

void subset_sums(const SumRows& a) {
  if (!a.rows || !a.columns) return;
  if (!a.bits) return gather(a);
  if (a.out_type == Element::float32) {
    sum_to(a, static_cast<float*>(a.out));
  } else {
    sum_to(a, static_cast<bfloat16*>(a.out));
  }
}

void subset_sums_weight_grad(const WeightGrad& a) {
  if (!a.K || !a.N) return;
  if (!a.M) return gather_weight_grad(a);
  const Plan whole(1, a.K, a.M, a.N, a.threads);
  const Slices slices(a.M, SLICE, whole.panels, a.K * a.N, whole.threads);
  const int64_t n = a.K * a.N, rows_at_once = slices.at_once * slices.rows;
  const int64_t stride = words_for(a.K), halves_each = 2 * a.K * words_for(slices.rows);
  Scratch halves(sizeof(uint32_t) * static_cast<size_t>(slices.at_once * halves_each));
  Scratch by_channel(sizeof(float) * static_cast<size_t>(slices.at_once * n));  // [slice, K, N]; the first is the total
  const GradientRows grad(a, smaller(a.M, rows_at_once));
  for (int64_t m = 0; m < a.M; m += rows_at_once) {
    const int64_t rows = smaller(rows_at_once, a.M - m), count = (rows + slices.rows - 1) / slices.rows;
    const float* const source = grad.from(m, rows);
    const auto rows_of = [&](int64_t slice) { return smaller(slices.rows, rows - slice * slices.rows); };
    const auto halves_of = [&](int64_t slice) { return static_cast<uint32_t*>(halves.get()) + slice * halves_each; };
    Tasks tasks(count * stride);
    team(threads_for(0.3 * static_cast<double>(rows) * static_cast<double>(a.K), a.threads), [&](int, int) {
      for (int64_t task; tasks.next(task);) {
        const int64_t s = task / stride, w = task % stride, channels = smaller(64, a.K - 64 * w);
        const uint64_t* words = a.words + (m + s * slices.rows) * stride + w;
        for (int64_t r = 0; r < rows_of(s); r += 64, words += 64 * stride) {
          uint64_t turned[64];
          transpose_64(words, stride, smaller(64, rows_of(s) - r), turned);
          halve(turned, 1, channels, halves_of(s) + r / BITS * a.K + 64 * w, a.K);
        }
      }
    });
    sum_all(
        count, Plan(count, a.K, slices.rows, a.N, a.threads),
        [&](int64_t s) { return Job{halves_of(s), a.K, rows_of(s), source + s * slices.rows * a.N, a.N}; },
        [&](int64_t s) { return Output<float>{by_channel.floats() + s * n, nullptr, !s && m, false}; });
    add_sums(by_channel.floats(), by_channel.floats() + n, n, count - 1, a.threads);
  }
  transpose({by_channel.floats(), a.grad_weight, a.K, a.N, a.threads});
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
