// Sums of rows picked by bits, by tables of subset sums: for four rows of the source and one column, the 16
// sums of their subsets fill one AVX-512 register, and four bits of each of 16 output rows look theirs up in
// one instruction. Cost does not depend on how many bits are set: one look-up and one addition for every 4
// bits, 16 rows and column. Only the AVX-512 variant has it; subset_tables.cpp is the others'.
#include "gradient_rows.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "transpose.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

#if defined(SPIKEDECODER_AVX512)

namespace {

constexpr int COLUMNS = 16;            // of a table
constexpr int HALF = 8;                // columns summed at a time: 8 x 3 sums in registers
constexpr int64_t BITS = 2048;         // of a table: 512 KiB, which stays in the second-level cache
constexpr int64_t ROWS_AT_LEAST = 512;  // for one build of a table

// Words of bits [rows, words_for(bits)] -> [rows / 16][32-bit words][16 rows]; rows past the last hold 0.
SPIKEDECODER_OUTLINE void interleave(const uint64_t* words, int64_t rows, int64_t bits, uint32_t* out, Range groups) {
  const int64_t stride = words_for(bits);
  for (int64_t g = groups.begin; g < groups.end; g++) {
    for (int64_t w = 0; w < stride; w++) {
      uint32_t* low = out + (g * stride + w) * 32;
      for (int i = 0; i < 16; i++) {
        const uint64_t word = g * 16 + i < rows ? words[(g * 16 + i) * stride + w] : 0;
        low[i] = static_cast<uint32_t>(word);
        low[16 + i] = static_cast<uint32_t>(word >> 32);
      }
    }
  }
}

// tables[group of 4 rows][column][subset] for `bits` rows of the source from `source` on, padded with zeros
// to a multiple of 4 bits.
void build_tables(const float* source, int64_t stride, int64_t bits, int columns, float* tables) {
  for (int64_t g = 0; g < (bits + 3) / 4; g++) {
    alignas(64) float rows[4][16];
    for (int i = 0; i < 4; i++) {
      const bool there = 4 * g + i < bits;
      store(rows[i], there ? load_n(source + (4 * g + i) * stride, columns) : zero());
    }
    for (int c = 0; c < COLUMNS; c++) {
      __m512 t = _mm512_maskz_mov_ps(0xaaaa, set1(rows[0][c]));
      t = _mm512_mask_add_ps(t, 0xcccc, t, set1(rows[1][c]));
      t = _mm512_mask_add_ps(t, 0xf0f0, t, set1(rows[2][c]));
      t = _mm512_mask_add_ps(t, 0xff00, t, set1(rows[3][c]));
      store(tables + (g * COLUMNS + c) * 16, t);
    }
  }
}

// sums[column][V x 16 rows] of HALF columns.
template <int V>
void look_up(const uint32_t* bits, int64_t stride, int64_t groups, const float* tables, float* sums) {
  __m512 total[HALF][V];
  for (int j = 0; j < HALF; j++) {
    for (int v = 0; v < V; v++) total[j][v] = zero();
  }
  for (int64_t first = 0; first < groups; first += 8, bits += 16) {
    __m512i four_bits[V];
    for (int v = 0; v < V; v++) four_bits[v] = _mm512_loadu_si512(bits + v * stride);
    for (int64_t g = first; g < smaller(first + 8, groups); g++) {
      const float* table = tables + g * COLUMNS * 16;
#pragma GCC unroll 8
      for (int j = 0; j < HALF; j++) {
        const __m512 t = load(table + j * 16);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          total[j][v] = add(total[j][v], _mm512_permutexvar_ps(four_bits[v], t));
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) four_bits[v] = _mm512_srli_epi32(four_bits[v], 4);
    }
  }
  for (int j = 0; j < HALF; j++) {
    for (int v = 0; v < V; v++) store(sums + (j * V + v) * 16, total[j][v]);
  }
}

// Where the sums go: out [rows, columns], or transposed [columns, rows].
template <class E>
struct Output {
  E* out;
  int64_t rows, columns;
  bool transposed, accumulate;
  const float* bias;
  bool past;  // see past_cache

  // The sums of 16 rows from `row` on (those that exist) and `n` columns from `column` on.
  void write(const float* sums, int stride, int64_t row, int64_t column, int n) const {
    const int there = static_cast<int>(smaller(16, rows - row));
    if (transposed) {
      for (int j = 0; j < n; j++) {
        E* to = out + (column + j) * rows + row;
        F value = load(sums + j * stride);
        if (accumulate) value = add(value, load_n(to, there));
        store_n(to, value, there);
      }
      return;
    }
    __m512 r[16];
    for (int j = 0; j < 16; j++) r[j] = load(sums + j * stride);
    transpose_16(r);
    const F start = bias && !accumulate ? load_n(bias + column, n) : zero();
    for (int i = 0; i < 16; i++) {
      if (i >= there) break;
      E* to = out + (row + i) * columns + column;
      store_result(to, add(r[i], accumulate ? load_n(to, n) : start), n, past);
    }
  }
};

struct Job {
  const uint32_t* interleaved;
  int64_t rows, bits;
  const float* source;
  int64_t columns;
};

// Rows groups.begin .. groups.end (of 16) of COLUMNS columns from `column` on.
template <class E>
void sum_block(const Job& job, const Output<E>& output, int64_t column, Range groups, float* tables) {
  const int n = static_cast<int>(smaller(COLUMNS, job.columns - column));
  const int64_t stride = words_for(job.bits) * 32;
  alignas(64) float sums[COLUMNS * 3 * 16];
  for (int64_t bit = 0; bit < job.bits; bit += BITS) {
    const int64_t bits = smaller(BITS, job.bits - bit), quarters = (bits + 3) / 4;
    build_tables(job.source + bit * job.columns + column, job.columns, bits, n, tables);
    Output<E> to = output;
    to.accumulate = output.accumulate || bit > 0;
    for (int64_t g = groups.begin; g < groups.end;) {
      const uint32_t* at = job.interleaved + g * stride + bit / 32 * 16;
      const int v = static_cast<int>(smaller(groups.end - g, 3));
      const auto half = v == 3 ? look_up<3> : v == 2 ? look_up<2> : look_up<1>;
      half(at, stride, quarters, tables, sums);
      half(at, stride, quarters, tables + HALF * 16, sums + HALF * v * 16);
      for (int i = 0; i < v; i++) to.write(sums + 16 * i, v * 16, (g + i) * 16, column, n);
      g += v;
    }
  }
}

// sum(slice, column, groups of rows, room for tables): all of them, each task on one thread.
template <class Sum>
void share_out(int64_t slices, int64_t rows, int64_t bits, int64_t columns, int most, const Sum& sum) {
  const int64_t groups = (rows + 15) / 16, blocks = (columns + COLUMNS - 1) / COLUMNS;
  const double work = 0.03 * static_cast<double>(slices * rows * bits) * static_cast<double>(columns) / 4;
  const int threads = threads_for(work, most);
  int64_t parts = 1;  // of the rows, so that each thread has some tasks to choose from
  while (slices * blocks * parts < 3 * threads && groups * 16 / (parts + 1) >= ROWS_AT_LEAST) parts++;
  const int64_t table_floats = words_for(smaller(BITS, bits)) * 16 * COLUMNS * 16;
  Scratch tables(sizeof(float) * static_cast<size_t>(table_floats * threads));
  Tasks tasks(slices * blocks * parts);
  parallel(threads, [&](int thread, int) {
    for (int64_t task; tasks.next(task);) {
      const Range part = share(groups, static_cast<int>(task % parts), static_cast<int>(parts), 3);
      const int64_t block = task / parts;
      sum(block / blocks, block % blocks * COLUMNS, part, tables.floats() + table_floats * thread);
    }
  });
}

template <class E>
void sum_to(const SumRows& a, const Job& job, E* out) {
  // where a table's columns are whole lines
  const bool past = COLUMNS * sizeof(E) == 64 && a.bits <= BITS && past_cache(out, a.rows * a.columns, a.columns);
  const Output<E> output{out, a.rows, a.columns, false, false, a.bias, past};
  share_out(1, a.rows, a.bits, a.columns, a.threads, [&](int64_t, int64_t column, Range groups, float* tables) {
    sum_block(job, output, column, groups, tables);
  });
}

size_t interleaved_size(int64_t rows, int64_t bits) {
  return sizeof(uint32_t) * static_cast<size_t>((rows + 15) / 16 * words_for(bits) * 32);
}

}  // namespace

void subset_sums(const SumRows& a) {
  if (!a.rows || !a.columns) return;
  if (!a.bits) return gather(a);
  Scratch interleaved(interleaved_size(a.rows, a.bits));
  uint32_t* const bits = static_cast<uint32_t*>(interleaved.get());
  parallel(threads_for(0.1 * static_cast<double>(a.rows * a.bits) / 8, a.threads), [&](int thread, int threads) {
    interleave(a.words, a.rows, a.bits, bits, share((a.rows + 15) / 16, thread, threads));
  });
  const Job job{bits, a.rows, a.bits, a.source, a.columns};
  if (a.out_type == Element::float32) {
    sum_to(a, job, static_cast<float*>(a.out));
  } else {
    sum_to(a, job, static_cast<bfloat16*>(a.out));
  }
}

void subset_sums_weight_grad(const WeightGrad& a) {
  if (!a.K || !a.N) return;
  if (!a.M) return gather_weight_grad(a);
  const Slices slices(a.M, BITS, (a.N + COLUMNS - 1) / COLUMNS, a.K * a.N, a.threads);
  const int64_t n = a.K * a.N, rows_at_once = slices.at_once * slices.rows;
  const int64_t bits_each = a.K * words_for(slices.rows);
  const int64_t interleaved_each = static_cast<int64_t>(interleaved_size(a.K, slices.rows) / sizeof(uint32_t));
  Scratch bits(sizeof(uint64_t) * static_cast<size_t>(slices.at_once * bits_each));
  Scratch interleaved(sizeof(uint32_t) * static_cast<size_t>(slices.at_once * interleaved_each));
  Scratch more(sizeof(float) * static_cast<size_t>((slices.at_once - 1) * n));  // sums of all slices but the first
  const GradientRows grad(a, smaller(a.M, rows_at_once));
  for (int64_t m = 0; m < a.M; m += rows_at_once) {
    const int64_t rows = smaller(rows_at_once, a.M - m), count = (rows + slices.rows - 1) / slices.rows;
    const float* const source = grad.from(m, rows);
    const auto rows_of = [&](int64_t slice) { return smaller(slices.rows, rows - slice * slices.rows); };
    const auto groups_of = [&](int64_t slice) {
      return static_cast<uint32_t*>(interleaved.get()) + slice * interleaved_each;
    };
    const double work = 0.3 * static_cast<double>(rows) * static_cast<double>(a.K);
    team(threads_for(work, a.threads), [&](int thread, int threads) {
      uint64_t* const transposed = static_cast<uint64_t*>(bits.get());
      for (int64_t s = 0; s < count; s++) {
        const uint64_t* words = a.words + (m + s * slices.rows) * words_for(a.K);
        transpose_bits(words, rows_of(s), a.K, transposed + s * bits_each, thread, threads);
      }
      barrier();
      const Range mine = share((a.K + 15) / 16, thread, threads);
      for (int64_t s = 0; s < count; s++) {
        interleave(transposed + s * bits_each, a.K, rows_of(s), groups_of(s), mine);
      }
    });
    share_out(count, a.K, slices.rows, a.N, a.threads, [&](int64_t s, int64_t column, Range groups, float* tables) {
      const Job job{groups_of(s), a.K, rows_of(s), source + s * slices.rows * a.N, a.N};
      float* const out = s ? more.floats() + (s - 1) * n : a.grad_weight;
      sum_block(job, Output<float>{out, a.K, a.N, true, !s && m, nullptr, false}, column, groups, tables);
    });
    add_sums(a.grad_weight, more.floats(), n, count - 1, a.threads);
  }
}

#endif

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
