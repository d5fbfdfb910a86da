// Normalisation followed by LIF or I-LIF, in one pass over memory: the normalised value is never written.
//
//     y = z weight + bias, z = (x - mean) rstd;   spikes = LIF(y) or I-LIF(y)
//
// Threads share the rows; all timesteps of a row are processed together. Row statistics are computed for a few rows at
// a time, which are then normalised while they are in the first-level cache. Backward recomputes z and the membrane
// potentials of up to BLOCK channels of a row at a time, keeps them in that cache, and walks back through the neurons.
// With row statistics dL/dz is kept until the sums of the row are known, and a second pass over the row computes dL/dx.
// Each step depends on the one before, so several vectors or rows are processed side by side.
//
// Bytes moved per element, the minimum of each pass: forward 4 read + 4 written; backward 8 read + 4 written (whole,
// apply, known), 8 read (reduce). What a row needs again is read from the nearer caches. Limited by memory or, where
// that is fast, by arithmetic, mostly of the gradient (docs/performance.md).
#include "kernels.h"
#include "neuron.h"
#include "norm.h"
#include "parallel.h"
#include "threshold_sum.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

double work(int64_t T, int64_t rows, int64_t C, double per_element) {
  return per_element * static_cast<double>(T * rows) * static_cast<double>(C);
}

// How many vectors are processed at once: more for the usual neuron, whose steps are short and depend on each other.
#if defined(SPIKEDECODER_AVX512)
constexpr int MOST_AT_ONCE = 5, OTHERS_AT_ONCE = 2;
#else
constexpr int MOST_AT_ONCE = AT_ONCE, OTHERS_AT_ONCE = AT_ONCE;
#endif

template <bool ByRow, int KNOWN, class CellType, class E, bool Groups>
SPIKEDECODER_INLINE void forward_row(const CellType& cell, const NormLifForward& a, const Normal<E, Groups>& p,
                                     int64_t row, int64_t rows_ahead, E* spikes, bool past) {
  const int64_t T = p.T, row_step = p.step(), ahead = rows_ahead * p.stride() * p.C;
  const int64_t step = p.step() * p.C, spikes_step = (Groups ? 1 : a.spikes_rows) * p.C;
  constexpr int MOST = usual<CellType> ? MOST_AT_ONCE : OTHERS_AT_ONCE;
  for_channels_evenly<MOST>(p.C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
    constexpr int U = decltype(vectors)::count;
    const Normalise<U, ByRow> normalise(p, c, n);
    F threshold[U], v[U];
    for (int u = 0; u < U; u++) {
      threshold[u] = thresholds_at(a.threshold, row * p.C, c + u * W, n);
      v[u] = zero();
    }
    const E* x = p.x + p.at(0, row) + c;
    E* to = spikes + p.at(0, row) + c;
    const float *mean = p.mean + p.index(0, row), *rstd = p.rstd + p.index(0, row);
    for_steps<KNOWN>(T, [&](int64_t) SPIKEDECODER_INLINE_LAMBDA {
      for (int u = 0; u < U; u++) {
        const F h = cell.charge(normalise.y(u, normalise.z(u, load_up_to(x + u * W, n), mean, rstd)), v[u]);
        const Mask fired = ge(h, threshold[u]);
        v[u] = cell.after(h, fired, threshold[u]);
        cell.put(to + u * W, h, fired, n, past);
        __builtin_prefetch(x + ahead + u * W, 0, 2);
      }
      x += step;
      to += spikes_step;
      mean += row_step;
      rstd += row_step;
    });
  });
}

// One thread's rows.
template <bool ByRow, int KNOWN, class CellType, class E, bool Groups>
SPIKEDECODER_OUTLINE void forward_rows(const CellType& shared_cell, const NormLifForward& a,
                                       const Normal<E, Groups>& all, Range rows, E* spikes, bool past) {
  const auto cell = shared_cell;  // a copy of the thread's own stays in registers
  const int64_t together = ByRow ? rows_together(all) : 1;
  for (int64_t first = rows.begin; first < rows.end; first += together) {
    const int64_t end = first + together < rows.end ? first + together : rows.end;
    if (ByRow) row_statistics(all, first, end, a.eps, a.mean, a.rstd);
    for (int64_t row = first; row < end; row++) {
      forward_row<ByRow, KNOWN>(cell, a, all.of(row), row, together, spikes, past);
    }
  }
}

template <class E, class CellType>
void forward(const NormLifForward& a, const CellType& cell) {
  constexpr bool Groups = integers<CellType>;
  const Normal<E, Groups> all(a);
  E* const spikes = static_cast<E*>(a.spikes);
  const bool past = past_cache(spikes, a.T * a.spikes_rows * a.C, a.C);
  parallel(threads_for(work(a.T, a.rows, a.C, 0.25), a.threads), [&](int thread, int threads) {
    const Range rows = share(all.rows, thread, threads);
    if (a.kind == NormKind::channel) {
      forward_rows<false, 0>(cell, a, all, rows, spikes, past);
      return;
    }
    with_steps<CellType>(a.T, [&](auto steps) {
      forward_rows<true, decltype(steps)::known>(cell, a, all, rows, spikes, past);
    });
  });
}

// What backward has computed of a row before it walks back through its neurons.
struct Charged {
  float *mean, *rstd;  // [T]: the row's, if statistics are per row
  float *h, *z;        // [T, BLOCK]: membrane potentials and z of the current channels

  static constexpr int64_t BLOCK = 16 * W;  // channels whose potentials stay in the first-level cache

  static int64_t size(int64_t T) { return 2 * round_up(T, 16) + 2 * T * BLOCK; }
  Charged(float* memory, int64_t T)
      : mean(memory), rstd(mean + round_up(T, 16)), h(rstd + round_up(T, 16)), z(h + T * BLOCK) {}
};

// One thread's scratch for the backward pass.
struct RowScratch {
  Charged now, next;       // the current row, and the one after it
  float* g;                // [T, C] of one row: dL/dz
  float *sum_g, *sum_gz;   // [T rounded up to 4, 1 vector]: sums of the row's dL/dz and z dL/dz
  float *weight, *bias;    // [C]: sums of g z and of g over some rows
  double* totals;          // [2, C]: both over all rows
  float* threshold;
  int64_t padded;          // C, rounded up to 16

  void swap() {
    const Charged done = now;
    now = next;
    next = done;
  }

  static int64_t weight_at(int64_t T, int64_t C) {
    return 2 * Charged::size(T) + T * round_up(C, 16) + 2 * round_up(T, 4) * 16;
  }
  static int64_t totals_at(int64_t T, int64_t C) { return weight_at(T, C) + 2 * round_up(C, 16); }
  static int64_t threshold_at(int64_t T, int64_t C) { return totals_at(T, C) + 4 * round_up(C, 16); }
  static int64_t size(const Threshold& t, int64_t T, int64_t C) {
    return threshold_at(T, C) + ThresholdSum::size(t, C);
  }

  RowScratch(float* memory, int64_t T, int64_t C)
      : now(memory, T), next(memory + Charged::size(T), T), padded(round_up(C, 16)) {
    g = memory + 2 * Charged::size(T);
    sum_g = g + T * padded;
    sum_gz = sum_g + round_up(T, 4) * 16;
    weight = memory + weight_at(T, C);
    bias = weight + padded;
    totals = reinterpret_cast<double*>(memory + totals_at(T, C));
    threshold = memory + threshold_at(T, C);
    for (int64_t c = 0; c < 2 * padded; c++) weight[c] = 0, totals[c] = 0;
  }

  // Called after every so many rows, since there may be millions.
  void end_run() { end_of_rows(weight, totals, 2 * padded); }
};

// What the backward pass reads and writes.
template <class E, bool Groups>
struct Backward {
  const NormLifBackward& a;
  Normal<E, Groups> p;
  const E* grad_spikes;
  E* grad_x;
  bool past;

  explicit Backward(const NormLifBackward& of)
      : a(of),
        p(of),
        grad_spikes(static_cast<const E*>(of.grad_spikes)),
        grad_x(static_cast<E*>(of.grad_x)),
        past(past_cache(grad_x, p.all * of.C, of.C)) {}
};

// How many channels the block from `first` on has.
SPIKEDECODER_INLINE int64_t width_of_block(int64_t C, int64_t first) {
  return C - first < Charged::BLOCK ? C - first : Charged::BLOCK;
}

// z and membrane potentials of a row's channels from `first` on in all timesteps, exactly as in forward.
template <bool ByRow, int KNOWN, class CellType, class E, bool Groups>
SPIKEDECODER_INLINE void charge_row(const CellType& cell, const Backward<E, Groups>& b, int64_t row, int64_t first,
                                    const Charged& to) {
  const auto& p = b.p.of(row);
  // local copies: for all the compiler knows, a store to h or z might change these
  float *const potentials = to.h, *const normals = to.z, *const means = to.mean, *const rstds = to.rstd;
  const int64_t T = p.T, width = width_of_block(p.C, first);
  const int64_t step = p.step() * p.C, ahead = p.stride() * p.C;
  constexpr int MOST = usual<CellType> ? MOST_AT_ONCE : OTHERS_AT_ONCE;
  for (int64_t t = 0; ByRow && first == 0 && t < T; t++) {
    means[t] = p.mean[p.index(t, row)];
    rstds[t] = p.rstd[p.index(t, row)];
  }
  for_channels_evenly<MOST>(width, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
    constexpr int U = decltype(vectors)::count;
    const Normalise<U, ByRow> normalise(p, first + c, n);
    F threshold[U], v[U];
    for (int u = 0; u < U; u++) {
      threshold[u] = thresholds_at(b.a.threshold, row * p.C, first + c + u * W, n);
      v[u] = zero();
    }
    const E* x = p.x + p.at(0, row) + first + c;
    float *h = potentials + c, *normal = normals + c;
    for_steps<KNOWN>(T, [&](int64_t t) SPIKEDECODER_INLINE_LAMBDA {
      for (int u = 0; u < U; u++) {
        const F z = normalise.z(u, load_up_to(x + u * W, n), means + t, rstds + t);
        const F charged = cell.charge(normalise.y(u, z), v[u]);
        store(normal + u * W, z);
        store(h + u * W, charged);
        v[u] = cell.after(charged, ge(charged, threshold[u]), threshold[u]);
        __builtin_prefetch(x + ahead + u * W, 0, 2);
      }
      x += step;
      h += Charged::BLOCK;
      normal += Charged::BLOCK;
    });
  });
}

// g = dL/dy, back through the neurons, and its sums over rows (Sums). Apply: dL/dx = a g + b z + c, with coefficients
// that are known, is written at once. ByRow: dL/dz is kept until the sums of the row are known. Thresholds: the sums
// include dL/dthreshold.
template <bool ByRow, bool Sums, bool Apply, bool Thresholds, int KNOWN, class CellType, class E, bool Groups>
SPIKEDECODER_INLINE void back_through_lif(const CellType& cell, const Backward<E, Groups>& b,
                                          const Normal<E, Groups>& p, int64_t row, const RowScratch& s,
                                          ThresholdSum& threshold_sum, int64_t first) {
  const NormLifBackward& a = b.a;
  const int64_t T = p.T, width = width_of_block(p.C, first), padded = s.padded;
  const int64_t step = p.step() * p.C, ahead = p.stride() * p.C;
  E* const grad_x = b.grad_x;
  const bool apply = Apply && (usual<CellType> || a.part != NormLifPart::reduce), past = b.past;
  const bool writes = (ByRow || apply) && !past;  // through the cache, whose lines are then prefetched as well
  for_channels_evenly<BACK_AT_ONCE>(width, [&](auto vectors, int64_t at, int n) SPIKEDECODER_INLINE_LAMBDA {
    constexpr int U = decltype(vectors)::count;
    const int64_t c = first + at, last = p.at(p.T - 1, row) + c;
    F weight[U], of_g[U], of_z[U], of_1[U];
    F threshold[U], carry[U], falls[U], sum_g[U], sum_gz[U];
    for (int u = 0; u < U; u++) {
      const int64_t channel = c + u * W;
      if (ByRow) weight[u] = load_up_to(p.weight + channel, n);
      if (apply) {
        of_g[u] = load_up_to(a.a + channel, n);
        of_z[u] = load_up_to(a.b + channel, n);
        of_1[u] = load_up_to(a.c + channel, n);
      }
      threshold[u] = thresholds_at(a.threshold, row * p.C, channel, n);
      carry[u] = falls[u] = sum_g[u] = sum_gz[u] = zero();
    }
    const E* grad = b.grad_spikes + last;
    int64_t out = last;
    const int64_t last_step = (T - 1) * Charged::BLOCK + at;
    const float *h = s.now.h + last_step, *normal = s.now.z + last_step;
    float* kept = s.g + (T - 1) * padded + c;
    for_steps<KNOWN>(T, [&](int64_t) SPIKEDECODER_INLINE_LAMBDA {
      F potential[U], slope[U];
      for (int u = 0; u < U; u++) potential[u] = load(h + u * W);
      cell.slopes(potential, threshold, slope);
      for (int u = 0; u < U; u++) {
        const F z = load(normal + u * W), grad_spike = load_up_to(grad + u * W, n);
        __builtin_prefetch(grad + ahead + u * W, 0, 2);
        if (writes) __builtin_prefetch(grad_x + out + ahead + u * W, 1);
        const F g = cell.back(potential[u], threshold[u], slope[u], grad_spike, carry[u], falls[u]);
        if (apply) store_result(grad_x + out + u * W, fma(of_g[u], g, fma(of_z[u], z, of_1[u])), n, past);
        if (Sums) sum_g[u] = add(sum_g[u], g);
        if (Sums) sum_gz[u] = fma(g, z, sum_gz[u]);
        if (ByRow) store(kept + u * W, mul(g, weight[u]));
      }
      grad -= step;
      out -= step;
      h -= Charged::BLOCK;
      normal -= Charged::BLOCK;
      kept -= padded;
    });
    for (int u = 0; Sums && u < U; u++) {
      store(s.bias + c + u * W, add(load(s.bias + c + u * W), sum_g[u]));
      store(s.weight + c + u * W, add(load(s.weight + c + u * W), sum_gz[u]));
      if (Thresholds) threshold_sum.add_up(row * p.C, c + u * W, n, cell.threshold_gradient(falls[u]));
    }
  });
}

// Adds dL/dz and z dL/dz of the row's channels from `first` on to the sums of timesteps t .. t + 3. This is done after
// the gradients have been computed, because reading them again costs less than storing the sums again and again. If
// fewer timesteps are left, the first of them takes the place of the missing ones.
SPIKEDECODER_INLINE void add_up(const RowScratch& s, int64_t T, int64_t t, int64_t C, int64_t first, F (&of_g)[4],
                                F (&of_gz)[4]) {
  const int64_t width = width_of_block(C, first);
  const float *g[4], *z[4];
  for (int i = 0; i < 4; i++) {
    const int64_t step = t + i < T ? t + i : t;
    g[i] = s.g + step * s.padded + first;
    z[i] = s.now.z + step * Charged::BLOCK;
  }
  for (int64_t c = 0; c < width; c += W) {
    for (int i = 0; i < 4; i++) {
      const F grad_z = load(g[i] + c);
      of_g[i] = add(of_g[i], grad_z);
      of_gz[i] = fma(grad_z, load(z[i] + c), of_gz[i]);
    }
  }
}

// The same for all timesteps of a row that is processed in blocks.
SPIKEDECODER_OUTLINE void add_up_block(const RowScratch& s, int64_t T, int64_t C, int64_t first) {
  for (int64_t t = 0; t < T; t += 4) {
    float *const sum_g = s.sum_g + t * W, *const sum_gz = s.sum_gz + t * W;
    F of_g[4], of_gz[4];
    for (int i = 0; i < 4; i++) {
      of_g[i] = first ? load(sum_g + i * W) : zero();
      of_gz[i] = first ? load(sum_gz + i * W) : zero();
    }
    add_up(s, T, t, C, first, of_g, of_gz);
    for (int i = 0; i < 4; i++) {
      store(sum_g + i * W, of_g[i]);
      store(sum_gz + i * W, of_gz[i]);
    }
  }
}

// The second pass: dL/dx = (dL/dz - mean(dL/dz) - z mean(z dL/dz)) rstd. For short rows (Near) all z are still there;
// for others z is computed again from x, which is in a near cache.
template <bool Near, int KNOWN, class E>
SPIKEDECODER_OUTLINE void gradient_of_row(const E* x, E* out, int64_t T, int64_t step, int64_t C, bool past,
                                          const RowScratch& s) {
  const float over_C = -1 / static_cast<float>(C);
  for (int64_t t = 0; t < T; t += 4, x += 4 * step, out += 4 * step) {
    const float *const mean = s.now.mean + t, *const rstd = s.now.rstd + t;
    F of_g[4], of_gz[4];
    Four scale;
    for (int i = 0; i < 4; i++) {
      of_g[i] = Near ? zero() : load(s.sum_g + (t + i) * W);
      of_gz[i] = Near ? zero() : load(s.sum_gz + (t + i) * W);
      scale[i] = over_C * rstd[i];
    }
    if (Near) add_up(s, KNOWN ? KNOWN : T, t, C, 0, of_g, of_gz);
    const Four shift = lane_sums(of_g) * scale;
    Four slope = lane_sums(of_gz) * scale;
    for (int i = 0; !Near && i < 4; i++) slope[i] *= rstd[i];
    const int steps = T - t < 4 ? static_cast<int>(T - t) : 4;
    for_channels_evenly<MOST_AT_ONCE>(C, [&](auto vectors, int64_t c, int n) SPIKEDECODER_INLINE_LAMBDA {
      const E* from = x + c;
      E* to = out + c;
      const float *z = s.now.z + t * Charged::BLOCK + c, *g = s.g + t * s.padded + c;
      for_steps<KNOWN>(steps, [&](int64_t i) SPIKEDECODER_INLINE_LAMBDA {
        const F by_g = set1(rstd[i]), by_z = set1(slope[i]), rest = set1(shift[i]);
        for (int u = 0; u < decltype(vectors)::count; u++) {
          const F of_z = Near ? load(z + u * W) : sub(load_up_to(from + u * W, n), set1(mean[i]));
          store_result(to + u * W, fma(load(g + u * W), by_g, fma(of_z, by_z, rest)), n, past);
        }
        from += step;
        to += step;
        z += Charged::BLOCK;
        g += s.padded;
      });
    });
  }
}

// One thread's rows. Each kind of work is a function of its own, since a single one for all takes the compiler minutes.
template <bool ByRow, bool Sums, bool Apply, bool Thresholds, int KNOWN, class CellType, class E, bool Groups>
SPIKEDECODER_OUTLINE void back_through_rows(const CellType& shared_cell, const Backward<E, Groups>& b, Range rows,
                                            RowScratch& s, ThresholdSum& threshold_sum) {
  const auto cell = shared_cell;  // a copy of the thread's own stays in registers
  const bool near = ByRow && b.p.C <= Charged::BLOCK;
  const bool ahead = usual<CellType> && near;  // a row is charged before the one before it is finished
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const auto& p = b.p.of(row);
    for (int64_t c = 0; c < p.C; c += Charged::BLOCK) {
      if (!ahead || row == rows.begin) charge_row<ByRow, KNOWN>(cell, b, row, c, s.now);
      back_through_lif<ByRow, Sums, Apply, Thresholds, KNOWN>(cell, b, p, row, s, threshold_sum, c);
      if (ByRow && !near) add_up_block(s, p.T, p.C, c);
    }
    if (Sums && (row - rows.begin) % ThresholdSum::RUN == ThresholdSum::RUN - 1) s.end_run();
    if (!ByRow) continue;
    // in between, since the second pass has to wait for this row's sums
    if (ahead && row + 1 < rows.end) charge_row<ByRow, KNOWN>(cell, b, row + 1, 0, s.next);
    const auto second_pass = near ? gradient_of_row<true, KNOWN, E> : gradient_of_row<false, KNOWN, E>;
    second_pass(p.x + p.at(0, row), b.grad_x + p.at(0, row), p.T, p.step() * p.C, p.C, b.past, s);
    if (ahead) s.swap();
  }
}

template <class E, class CellType>
void backward(const NormLifBackward& a, const CellType& cell) {
  constexpr bool Groups = integers<CellType>;
  const Backward<E, Groups> b(a);
  const int most = threads_for(work(a.T, a.rows, a.C, 0.6), a.threads);
  const int64_t own = per_thread(RowScratch::size(a.threshold, b.p.T, a.C));
  Scratch scratch(sizeof(float) * static_cast<size_t>(own * most));
  const bool sums = a.part != NormLifPart::apply;
  float* const threshold_out = sums ? a.grad_threshold : nullptr;

  parallel(most, [&](int thread, int threads) {
    const FlushDenormals flush;
    RowScratch s(scratch.floats() + own * thread, b.p.T, a.C);
    ThresholdSum threshold_sum(a.threshold, a.C, threshold_out, s.threshold);
    const Range rows = share(b.p.rows, thread, threads);
    // for the usual neuron with row statistics, code is compiled for exactly what is requested; for others it may also
    // sum what is not read
    constexpr bool more = !usual<CellType>;
    switch (a.part) {
      case NormLifPart::whole:
        if (threshold_out) {
          back_through_rows<true, true, false, true, 0>(cell, b, rows, s, threshold_sum);
          break;
        }
        with_steps<CellType>(a.T, [&](auto steps) {
          back_through_rows<true, true, false, more, decltype(steps)::known>(cell, b, rows, s, threshold_sum);
        });
        break;
      case NormLifPart::reduce: back_through_rows<false, true, more, true, 0>(cell, b, rows, s, threshold_sum); break;
      case NormLifPart::apply: back_through_rows<false, more, true, more, 0>(cell, b, rows, s, threshold_sum); break;
      case NormLifPart::known: back_through_rows<false, true, true, true, 0>(cell, b, rows, s, threshold_sum); break;
    }
    threshold_sum.end_run();
    s.end_run();
  });

  if (!sums) return;
  const float* const thresholds = scratch.floats() + RowScratch::threshold_at(b.p.T, a.C);
  ThresholdSum::combine(a.threshold, a.C, threshold_out, thresholds, own, most);
  const int64_t padded = round_up(a.C, 16), first = RowScratch::totals_at(b.p.T, a.C);
  for (int64_t c = 0; c < a.C; c++) {
    double weight = 0, bias = 0;
    for (int thread = 0; thread < most; thread++) {
      const auto* totals = reinterpret_cast<const double*>(scratch.floats() + own * thread + first);
      weight += totals[c];
      bias += totals[padded + c];
    }
    a.grad_weight[c] = static_cast<float>(weight);
    a.grad_bias[c] = static_cast<float>(bias);
  }
}

}  // namespace

void norm_lif_forward(const NormLifForward& a) {
  with_neuron(a.neuron, a.type, [&](const auto& cell, auto element) { forward<decltype(element)>(a, cell); });
}

void norm_lif_backward(const NormLifBackward& a) {
  with_neuron(a.neuron, a.type, [&](const auto& cell, auto element) { backward<decltype(element)>(a, cell); });
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
