// A linear layer on spikes, by gathering: out[r] = bias + the sum of the rows of the weight [channels, columns] whose
// bits are set in row r of words (row_sums.h).
//
// Operations: one addition per set bit and column, and a few additions of -0 where that saves mispredicted branches; no
// multiplication.
//
// Work: threads share the output rows and, in the last of three ways, panels of columns; the sums of a row are held in
// registers. A weight that stays in the first-level cache is added directly as bits are found (sum_by_words). One that
// stays in the second-level cache has its rows listed and summed in one go (sum_near). Of a larger one a panel of
// columns stays in that cache: all rows are listed first and then summed panel by panel (sum_by_panels).
//
// Memory: the weight is read `rate * rows` times, from the cache where a panel of it fits (bits * panel * 4 bytes), and
// is copied once, by panels, where that pays; the output is written once per 32768 bits.
#include "kernels.h"
#include "parallel.h"
#include "row_sums.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t SEGMENT_WORDS = 512;                 // row numbers are 16 bits wide
constexpr int64_t LIST_ROWS = 64, CHUNK = 256;         // most rows listed, and summed, in one task; powers of 2
constexpr int64_t NEAR_BYTES = 512 << 10;              // of a source that stays in the second-level cache
constexpr int64_t NEAREST_BYTES = 48 << 10;            // of one that stays in the first-level cache
constexpr int64_t PANEL_BYTES = 240 << 10;             // of a panel, whose rows are read in any order, ...
constexpr int64_t LINE = 16 / W, LEAST_VECTORS = 2 * LINE;  // ... in whole cache lines, at least two per row
constexpr int64_t MOST_WORDS = 4, MOST_COLUMNS = 128;  // of a row whose bits are not listed
constexpr int64_t WORD_ROWS = 512;                     // of these, made ready and summed in one go

template <class E>
struct Sum : Sums<E> {
  const uint64_t* words;
  int64_t word_stride, rows, bits;
  const Unready* unready = nullptr;
  int64_t first = 0;  // number of the first row among all that are unready
};

// Makes the words of these rows ready; false if bits are set for which the source has no row.
template <class E>
bool make_ready(const Sum<E>& s, Range rows) {
  if (!s.unready) return true;
  const Found found =
      make_ready(s.unready->spikes, s.first + rows.begin, rows.end - rows.begin, 1, pack, count_bits);
  __atomic_fetch_add(s.unready->count, found.count, __ATOMIC_RELAXED);
  __atomic_fetch_or(s.unready->stray, found.stray, __ATOMIC_RELAXED);
  return !found.stray;
}

template <class E>
bool has_stray(const Sum<E>& s) {
  return s.unready && __atomic_load_n(s.unready->stray, __ATOMIC_RELAXED);
}

// Nanoseconds on one thread.
template <class E>
double work_to_make_ready(const Sum<E>& s) {
  if (!s.unready) return 0;
  return (s.unready->spikes.values ? 0.2 : 0.006) * static_cast<double>(s.rows * s.bits);
}

// to = all panels of the source, one after another.
template <class E>
void copy_panels(const Sum<E>& s, const Panels& panels, float* to, Tasks& tasks) {
  for (int64_t task; tasks.next(task);) {
    const int64_t first = task % panels.count * panels.width(), row = task / panels.count * CHUNK;
    copy_panel(s.source + row * s.columns + first, s.columns, smaller(CHUNK, s.bits - row),
               smaller(panels.width(), s.columns - first), panels, to + first * s.bits + row * panels.width());
  }
  barrier();
}

// How the sums of some rows are divided into tasks; all bits of a row fit in one segment.
struct Plan {
  int64_t group, chunk;  // rows listed, rows summed in one task
  Panels panels;
};

// For a source that stays in the second-level cache: rows are listed and summed in one go.
template <class E>
void sum_near(const Sum<E>& s, const Lists& mine, const Plan& plan, Tasks& tasks) {
  for (int64_t task; tasks.next(task);) {
    const int64_t r = task * plan.group, rows = smaller(plan.group, s.rows - r);
    if (!make_ready(s, {r, r + rows})) continue;
    Sum<E> part = s;
    part.out += r * s.columns;
    mine.fill(s.words + r * s.word_stride, s.word_stride, words_for(s.bits), {0, rows});
    for (int64_t panel = 0; panel < plan.panels.count; panel++) {
      sum_panel(part, mine, 0, rows, panel * plan.panels.width(), plan.panels.vectors);
    }
  }
}

// For any source: all rows are listed first and then summed panel by panel; each panel stays in the second-level cache.
template <class E>
void sum_by_panels(const Sum<E>& s, const Lists& lists, const Plan& plan, Tasks& list_tasks, Tasks& tasks) {
  for (int64_t task; list_tasks.next(task);) {
    const Range rows{task * plan.group, smaller((task + 1) * plan.group, s.rows)};
    if (make_ready(s, rows)) lists.fill(s.words, s.word_stride, words_for(s.bits), rows);
  }
  barrier();
  if (has_stray(s)) return;
  const int64_t chunks = (s.rows + plan.chunk - 1) / plan.chunk;
  for (int64_t task; tasks.next(task);) {
    const int64_t begin = task % chunks * plan.chunk;
    const int64_t end = smaller(begin + plan.chunk, s.rows);
    sum_panel(s, lists, begin, end, task / chunks * plan.panels.width(), plan.panels.vectors);
  }
}

// For a source that stays in the first-level cache: its rows are added as bits are found, without lists. Each thread
// takes the same rows as in the kernels of neurons, so that their values are in its caches.
template <class E>
void sum_by_words(const Sum<E>& whole, int most) {
  const Panels panels(whole.columns);
  const int64_t words = words_for(whole.bits), panel_floats = 65 * words * panels.width();
  const int64_t sample = whole.unready ? whole.unready->sample : smaller(256, whole.rows);
  const int64_t apart = whole.rows / sample * whole.word_stride;
  int steps[MOST_WORDS];
  double additions = 0;
  for (int64_t w = 0; w < words; w++) additions += steps[w] = steps_for(whole.words + w, apart, sample);
  const double rows = static_cast<double>(whole.rows * panels.count * panels.vectors);
  const int threads = threads_for(0.3 * (additions + 1) * rows + work_to_make_ready(whole), most);
  Scratch copy(sizeof(float) * static_cast<size_t>(panels.count * panel_floats));
  Sum<E> from = whole;
  from.source = copy.floats();
  from.stride = panels.width();
  from.panel_stride = 65 * words;
  from.past = past_cache(whole.out, whole.rows * whole.columns, whole.columns);
  Tasks copying(panels.count * words);
  team(threads, [&](int thread, int all) {
    for (int64_t task; copying.next(task);) {
      const int64_t first = task / words * panels.width(), row = task % words * 64;
      float* const to = copy.floats() + task * 65 * panels.width();
      copy_panel(whole.source + row * whole.columns + first, whole.columns, smaller(64, whole.bits - row),
                 smaller(panels.width(), whole.columns - first), panels, to);
      end_panel(panels, to);
    }
    barrier();
    const Range mine = share(whole.rows, thread, all, 16);
    for (int64_t r = mine.begin, end; r < mine.end; r = end) {
      end = smaller(r + WORD_ROWS, mine.end);
      if (!make_ready(whole, {r, end})) continue;
      const Words picks{whole.words + r * whole.word_stride, whole.word_stride, words, steps};
      Sum<E> part = from;
      part.out += r * whole.columns;
      for (int64_t first = 0; first < whole.columns; first += panels.width()) {
        sum_panel(part, picks, end - r, first, panels.vectors);
      }
    }
    finish_stores();
  });
}

template <class E>
void gather_sum(const Sum<E>& whole, double rate, int most) {
  const int64_t vectors_in_all = (whole.columns + W - 1) / W;
  const int64_t segment = smaller(whole.bits, 64 * SEGMENT_WORDS);
  const int64_t rows_at_a_time = smaller(round_up(BITS_AT_A_TIME / segment + 1, CHUNK), whole.rows);
  const double additions = rate * static_cast<double>(whole.rows) * static_cast<double>(whole.bits);
  const double sums = 0.4 * (additions + static_cast<double>(whole.rows)) * static_cast<double>(vectors_in_all);
  const int threads = threads_for(sums + work_to_make_ready(whole), most);
  // fewer until each thread has some tasks to choose from
  const auto task_rows = [&](int64_t at_most, int64_t tasks_a_row) {
    while (at_most > 8 && rows_at_a_time * tasks_a_row < 4 * threads * at_most) at_most /= 2;
    return at_most;
  };
  const int64_t fit = PANEL_BYTES / (segment * LINE * W * static_cast<int64_t>(sizeof(float))) * LINE;
  const Panels panels(whole.columns, larger(LEAST_VECTORS, smaller(fit, MOST_VECTORS)));
  const Plan plan{task_rows(LIST_ROWS, 1), task_rows(CHUNK, panels.count), panels};
  const bool near = segment * whole.columns * static_cast<int64_t>(sizeof(float)) <= NEAR_BYTES;
  const int64_t groups = near ? threads : (rows_at_a_time + plan.group - 1) / plan.group;
  const int64_t room = plan.group * segment + 64;
  // worthwhile if a row of the source is part of enough sums (rate * rows), all of which are then faster
  const bool copied = panels.count > 1 && rate * static_cast<double>(whole.rows) >= (whole.columns % SHARED ? 64 : 8);
  Scratch copy(sizeof(float) * static_cast<size_t>(copied ? segment * panels.count * panels.width() : 0));
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
      part.accumulate = bit > 0;
      part.first = r;
      if (bit) part.bias = nullptr, part.unready = nullptr;
      part.past = whole.bits <= segment && past_cache(whole.out, whole.rows * whole.columns, whole.columns);
      Sum<E> from = part;
      if (copied) {
        from.source = copy.floats();
        from.stride = panels.width();
        from.panel_stride = part.bits;
      }
      Tasks copying((part.bits + CHUNK - 1) / CHUNK * panels.count);
      Tasks by_group((part.rows + plan.group - 1) / plan.group);
      Tasks by_chunk((part.rows + plan.chunk - 1) / plan.chunk * panels.count);
      team(threads, [&](int thread, int) {
        if (copied) copy_panels(part, panels, copy.floats(), copying);
        if (near) {
          sum_near(from, lists_from(thread, part.bits), plan, by_group);
        } else {
          sum_by_panels(from, lists_from(0, part.bits), plan, by_group, by_chunk);
        }
        finish_stores();
      });
      if (has_stray(whole)) return;
    }
  }
}

template <class E>
void gather_rows(const SumRows& a, E* out) {
  if (!a.bits) {
    for (int64_t i = 0; i < a.rows * a.columns; i++) store_n(out + i, set1(a.bias ? a.bias[i % a.columns] : 0), 1);
    return;
  }
  const Sums<E> sums{a.source, a.columns, 1, a.columns, a.bias, out, false, false};
  const Sum<E> sum{sums, a.words, words_for(a.bits), a.rows, a.bits, a.unready};
  const bool nearest = a.bits * a.columns * static_cast<int64_t>(sizeof(float)) <= NEAREST_BYTES;
  if (nearest && words_for(a.bits) <= MOST_WORDS && a.columns <= MOST_COLUMNS && a.rows >= 4 * a.bits) {
    sum_by_words(sum, a.threads);
  } else {
    gather_sum(sum, a.unready ? a.unready->rate : rate_of(a.words, a.rows, a.bits), a.threads);
  }
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
  const double work = 0.04 * static_cast<double>(a.rows * a.bits) * static_cast<double>(vectors);  // if a tenth are set
  const int threads = threads_for(work, a.threads);
  const int64_t own = a.rows * a.bits + 64;
  Scratch entries(sizeof(uint16_t) * static_cast<size_t>(own * threads));
  Scratch offsets(sizeof(int64_t) * static_cast<size_t>((a.rows + 1) * threads));
  parallel(threads, [&](int thread, int all) {
    // each thread lists the bits for itself, which takes less time than waiting for another
    uint16_t* const lists = static_cast<uint16_t*>(entries.get()) + own * thread;
    int64_t* const at = static_cast<int64_t*>(offsets.get()) + (a.rows + 1) * thread;
    int64_t n = 0;
    for (int64_t r = 0; r < a.rows; r++) {
      at[r] = n;
      for (int64_t w = 0; w < stride; w++) {
        const int64_t left = a.bits - 64 * w;
        uint64_t word;
        if (a.s) {
          word = word_of_floats(a.s + r * a.bits + 64 * w, static_cast<int>(left < 64 ? left : 64));
          if (a.words && !thread) a.words[r * stride + w] = word;
        } else {
          word = a.words[r * stride + w];
        }
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
      const SumList sum = sum_list_of(used, panel.lanes == W);
      for (int64_t r = 0; r < a.rows; r++) sum(lists + at[r], at[r + 1] - at[r], panel, a.out + r * a.columns + first);
      first += width;
    }
  });
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
