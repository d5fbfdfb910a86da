// Sums of rows picked by bits: a linear layer on spikes, and (with the bits transposed) its weight gradient.
//
// Bits become lists of row numbers once; then, for a panel of up to 8 vectors of columns, the sum of each
// output row is held in registers while its list is walked. One addition per set bit and column, no
// multiplication. Memory: the source is read `rate * rows` times, from the cache where a panel of it fits
// (bits * panel * 4 bytes); the output is written once per 32768 bits.
#include "gradient_rows.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "transpose.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t SEGMENT_WORDS = 512;          // row numbers are 16 bits wide
constexpr int64_t BITS_AT_A_TIME = 8 << 20;     // bounds the lists: 2 bytes each
constexpr int64_t LIST_ROWS = 64, CHUNK = 256;  // rows listed, and rows summed, in one task, at most; powers of 2
constexpr int64_t PANEL_BYTES = 640 << 10;      // of dL/dy, which stay in the second-level cache
constexpr int64_t NEAR_BYTES = 512 << 10;       // of a source that does so as a whole
#if defined(SPIKEDECODER_AVX2)
constexpr int MOST_VECTORS = 10, FEW_VECTORS = 10;  // of 16 registers
#else
constexpr int MOST_VECTORS = 8, FEW_VECTORS = 16;  // FEW: of a handful of rows, whose source comes from afar
#endif

struct Panel {
  const float* source;
  int64_t stride;
  int lanes;  // of the last vector
  const float* bias;
  bool accumulate;
  bool past;  // see past_cache
};

// out[0 .. V vectors] = sum of the rows of the panel in list.
template <int V, bool Whole, class E>
void sum_list(const uint16_t* list, int64_t n, const Panel& p, E* out) {
  const int last = Whole ? W : p.lanes;
  F sums[V];
  for (int j = 0; j < V; j++) {
    const int there = Whole || j < V - 1 ? W : last;
    sums[j] = p.accumulate ? load_up_to(out + j * W, there) : p.bias ? load_up_to(p.bias + j * W, there) : zero();
  }
  for (int64_t i = 0; i < n; i++) {
    const float* row = p.source + list[i] * p.stride;
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) {
      sums[j] = add(sums[j], (Whole || j < V - 1) ? load(row + j * W) : load_n(row + j * W, last));
    }
  }
  for (int j = 0; j < V; j++) {
    if (Whole || j < V - 1) {
      store_result(out + j * W, sums[j], W, p.past);
    } else {
      store_n(out + j * W, sums[j], last);
    }
  }
}

template <class E>
using SumList = void (*)(const uint16_t*, int64_t, const Panel&, E*);

template <int V, class E>
SumList<E> sum_list_of(int vectors, bool whole) {
  if constexpr (V == 0) {
    return nullptr;
  } else {
    if (vectors == V) return whole ? sum_list<V, true, E> : sum_list<V, false, E>;
    return sum_list_of<V - 1, E>(vectors, whole);
  }
}

// Lists of the set bits of rows, those of a group of rows packed behind each other.
struct Lists {
  uint16_t* entries;
  int64_t* offsets;  // [group + 1] for each group
  int64_t bits;
  int shift;  // a group is 2^shift rows: dividing by any number would take as long as a short list

  int64_t group() const { return int64_t{1} << shift; }
  int64_t room() const { return group() * bits + 64; }

  void fill(const uint64_t* words, int64_t word_stride, int64_t segment_words, Range rows) const {
    const int64_t g = rows.begin >> shift;
    uint16_t* to = entries + g * room();
    int64_t* at = offsets + g * (group() + 1);
    int64_t n = 0;
    for (int64_t r = rows.begin; r < rows.end; r++) {
      *at++ = n;
      const uint64_t* row = words + r * word_stride;
      for (int64_t w = 0; w < segment_words; w++) {
        if (row[w]) n += indices_of(row[w], static_cast<uint16_t>(64 * w), to + n);
      }
    }
    *at = n;
  }

  const uint16_t* list(int64_t row, int64_t& n) const {
    const int64_t g = row >> shift;
    const int64_t* at = offsets + g * (group() + 1) + (row - (g << shift));
    n = at[1] - at[0];
    return entries + g * room() + at[0];
  }
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class E>
struct Sum {
  const uint64_t* words;
  int64_t word_stride, rows, bits;
  const float* source;
  int64_t columns;
  const float* bias;
  E* out;
  bool accumulate, past;
};

// Rows begin..end of the panel of `vectors` vectors from column `first` on.
template <class E>
void sum_panel(const Sum<E>& s, const Lists& lists, int64_t begin, int64_t end, int64_t first, int vectors) {
  const int64_t width = smaller(vectors * W, s.columns - first);
  const int used = static_cast<int>((width + W - 1) / W);
  const Panel panel{s.source + first, s.columns, static_cast<int>(width - (used - 1) * W),
                    s.bias ? s.bias + first : nullptr, s.accumulate, s.past};
  const SumList<E> sum = sum_list_of<MOST_VECTORS, E>(used, panel.lanes == W);
  for (int64_t r = begin; r < end; r++) {
    int64_t n;
    const uint16_t* list = lists.list(r, n);
    sum(list, n, panel, s.out + r * s.columns + first);
  }
}

// How the sums of some rows, all of whose bits fit in one segment, are shared out.
struct Plan {
  int64_t group, chunk;  // rows listed, rows summed in one task
  int64_t panels;
  int vectors;  // of a panel
};

// A source that is small enough to stay near: rows are listed and summed in one go.
template <class E>
void sum_near(const Sum<E>& s, const Lists& mine, const Plan& plan, Tasks& tasks) {
  for (int64_t task; tasks.next(task);) {
    const int64_t r = task * plan.group, rows = smaller(plan.group, s.rows - r);
    Sum<E> part = s;
    part.out += r * s.columns;
    mine.fill(s.words + r * s.word_stride, s.word_stride, words_for(s.bits), {0, rows});
    for (int64_t panel = 0; panel < plan.panels; panel++) {
      sum_panel(part, mine, 0, rows, panel * plan.vectors * W, plan.vectors);
    }
  }
}

// Any source: all rows are listed first, then summed panel by panel, each of which stays near.
template <class E>
void sum_by_panels(const Sum<E>& s, const Lists& lists, const Plan& plan, Tasks& list_tasks, Tasks& tasks) {
  for (int64_t task; list_tasks.next(task);) {
    lists.fill(s.words, s.word_stride, words_for(s.bits), {task * plan.group, smaller((task + 1) * plan.group, s.rows)});
  }
  barrier();
  const int64_t chunks = (s.rows + plan.chunk - 1) / plan.chunk;
  for (int64_t task; tasks.next(task);) {
    const int64_t begin = task % chunks * plan.chunk;
    sum_panel(s, lists, begin, smaller(begin + plan.chunk, s.rows), task / chunks * plan.vectors * W, plan.vectors);
  }
}

template <class E>
void gather_sum(const Sum<E>& whole, double rate, int most) {
  const int64_t vectors_in_all = (whole.columns + W - 1) / W;
  const int64_t segment = smaller(whole.bits, 64 * SEGMENT_WORDS);
  const int64_t rows_at_a_time = smaller(round_up(BITS_AT_A_TIME / segment + 1, CHUNK), whole.rows);
  const double additions = rate * static_cast<double>(whole.rows) * static_cast<double>(whole.bits);
  const int threads = threads_for(0.4 * (additions + static_cast<double>(whole.rows)) *
                                      static_cast<double>(vectors_in_all), most);
  // so that each thread has some tasks to choose from
  const auto task_rows = [&](int64_t at_most, int64_t tasks_a_row) {
    while (at_most > 8 && rows_at_a_time * tasks_a_row < 4 * threads * at_most) at_most /= 2;
    return at_most;
  };
  Plan plan;
  plan.panels = (vectors_in_all + MOST_VECTORS - 1) / MOST_VECTORS;
  plan.vectors = static_cast<int>((vectors_in_all + plan.panels - 1) / plan.panels);
  plan.group = task_rows(LIST_ROWS, 1);
  plan.chunk = task_rows(CHUNK, plan.panels);
  const bool near = segment * whole.columns * static_cast<int64_t>(sizeof(float)) <= NEAR_BYTES;
  const int64_t groups = near ? threads : (rows_at_a_time + plan.group - 1) / plan.group;
  const int64_t room = plan.group * segment + 64;
  Scratch entries(sizeof(uint16_t) * static_cast<size_t>(groups * room));
  Scratch offsets(sizeof(int64_t) * static_cast<size_t>(groups * (plan.group + 1)));
  const auto lists_from = [&](int64_t group, int64_t bits) {
    return Lists{static_cast<uint16_t*>(entries.get()) + group * room,
                 static_cast<int64_t*>(offsets.get()) + group * (plan.group + 1), bits,
                 __builtin_ctzll(static_cast<uint64_t>(plan.group))};
  };

  for (int64_t r = 0; r < whole.rows; r += rows_at_a_time) {
    for (int64_t bit = 0; bit < whole.bits; bit += segment) {
      Sum<E> part = whole;
      part.rows = smaller(rows_at_a_time, whole.rows - r);
      part.bits = smaller(segment, whole.bits - bit);
      part.words += r * whole.word_stride + bit / 64;
      part.source += bit * whole.columns;
      part.out += r * whole.columns;
      part.accumulate = whole.accumulate || bit > 0;
      part.past = whole.bits <= segment && past_cache(whole.out, whole.rows * whole.columns, whole.columns);
      Tasks by_group((part.rows + plan.group - 1) / plan.group);
      Tasks by_chunk((part.rows + plan.chunk - 1) / plan.chunk * plan.panels);
      team(threads, [&](int thread, int) {
        if (near) {
          sum_near(part, lists_from(thread, part.bits), plan, by_group);
        } else {
          sum_by_panels(part, lists_from(0, part.bits), plan, by_group, by_chunk);
        }
        finish_stores();
      });
    }
  }
}

double rate_of(const uint64_t* words, int64_t rows, int64_t bits) {
  int64_t set = 0;
  const int64_t n = rows * words_for(bits);
  // a sample is enough to decide on threads
  const int64_t step = n > 4096 ? n / 4096 : 1;
  int64_t seen = 0;
  for (int64_t i = 0; i < n; i += step, seen++) set += __builtin_popcountll(words[i]);
  return seen ? static_cast<double>(set) / static_cast<double>(64 * seen) : 0;
}

template <class E>
void gather_rows(const SumRows& a, E* out) {
  if (!a.bits) {
    for (int64_t i = 0; i < a.rows * a.columns; i++) store_n(out + i, set1(a.bias ? a.bias[i % a.columns] : 0), 1);
    return;
  }
  const Sum<E> sum{a.words, words_for(a.bits), a.rows, a.bits, a.source, a.columns, a.bias, out, false, false};
  gather_sum(sum, rate_of(a.words, a.rows, a.bits), a.threads);
}

}  // namespace

void gather(const SumRows& a) {
  if (!a.rows || !a.columns) return;
  if (a.out_type == Element::float32) {
    gather_rows(a, static_cast<float*>(a.out));
  } else {
    gather_rows(a, static_cast<bfloat16*>(a.out));
  }
}

void gather_few(const GatherFew& a) {
  const int64_t stride = words_for(a.bits), vectors = (a.columns + W - 1) / W;
  const double work = 0.04 * static_cast<double>(a.rows * a.bits) * static_cast<double>(vectors);  // a tenth of them set
  const int threads = threads_for(work, a.threads);
  const int64_t own = a.rows * a.bits + 64;
  Scratch entries(sizeof(uint16_t) * static_cast<size_t>(own * threads));
  Scratch offsets(sizeof(int64_t) * static_cast<size_t>((a.rows + 1) * threads));
  parallel(threads, [&](int thread, int all) {
    // each thread lists the bits for itself: that takes less time than to wait for another
    uint16_t* const lists = static_cast<uint16_t*>(entries.get()) + own * thread;
    int64_t* const at = static_cast<int64_t*>(offsets.get()) + (a.rows + 1) * thread;
    int64_t n = 0;
    for (int64_t r = 0; r < a.rows; r++) {
      at[r] = n;
      for (int64_t w = 0; w < stride; w++) {
        const int64_t left = a.bits - 64 * w;
        const uint64_t word = word_of_floats(a.s + r * a.bits + 64 * w, static_cast<int>(left < 64 ? left : 64));
        if (!thread) a.words[r * stride + w] = word;
        if (word) n += indices_of(word, static_cast<uint16_t>(64 * w), lists + n);
      }
    }
    at[a.rows] = n;
    const Range mine = share(a.columns, thread, all, W);
    for (int64_t first = mine.begin; first < mine.end;) {
      const int64_t left = mine.end - first;
      const bool wide = left >= FEW_VECTORS * W;
      const int64_t width = wide ? FEW_VECTORS * W : smaller(left, MOST_VECTORS * W);
      const int used = static_cast<int>((width + W - 1) / W);
      const Panel panel{a.source + first, a.columns, static_cast<int>(width - (used - 1) * W),
                        a.bias ? a.bias + first : nullptr, false, false};
      const SumList<float> sum =
          wide ? sum_list<FEW_VECTORS, true, float> : sum_list_of<MOST_VECTORS, float>(used, panel.lanes == W);
      for (int64_t r = 0; r < a.rows; r++) sum(lists + at[r], at[r + 1] - at[r], panel, a.out + r * a.columns + first);
      first += width;
    }
  });
}

void gather_weight_grad(const WeightGrad& a) {
  if (!a.K || !a.N) return;
  const int64_t panel_columns = smaller(round_up(a.N, W), MOST_VECTORS * W);
  const int64_t rows_at_a_time = PANEL_BYTES / 64 / (panel_columns * static_cast<int64_t>(sizeof(float))) * 64;
  const int64_t most_rows = smaller(a.M, rows_at_a_time);
  Scratch by_channel(sizeof(float) * static_cast<size_t>(a.K * a.N));  // [K, N]
  Scratch bits(sizeof(uint64_t) * static_cast<size_t>(a.K * words_for(most_rows) + 1));
  uint64_t* const transposed = static_cast<uint64_t*>(bits.get());
  GradientRows grad(a, most_rows);
  const double rate = rate_of(a.words, a.M, a.K);
  if (!a.M) memset(by_channel.get(), 0, sizeof(float) * static_cast<size_t>(a.K * a.N));
  for (int64_t m = 0; m < a.M; m += rows_at_a_time) {
    const int64_t rows = smaller(rows_at_a_time, a.M - m);
    const uint64_t* words = a.words + m * words_for(a.K);
    const double work = 0.3 * static_cast<double>(rows) * static_cast<double>(a.K);
    parallel(threads_for(work, a.threads),
             [&](int thread, int threads) { transpose_bits(words, rows, a.K, transposed, thread, threads); });
    const Sum<float> sum{transposed, words_for(rows), a.K, rows, grad.from(m, rows), a.N, nullptr,
                         by_channel.floats(), m > 0, false};
    gather_sum(sum, rate, a.threads);
  }
  transpose({by_channel.floats(), a.grad_weight, a.K, a.N, a.threads});
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
