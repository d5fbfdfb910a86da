// Takes the next tokens of sequences through a whole, fully spiking model, every block and the head: one token of each
// of many sequences, or many of one.
//
// A thread takes a chunk of tokens through one block after the other, and within a block a group of them through one
// Linear after the other. A Linear adds up the rows of its weight (stored by inputs) at which the input spikes
// (decode_sums.h; for integers decode_levels.h). It does so panel by panel, so that a panel's rows come from the
// first-level cache for all but the first tokens that need them. Norm and neurons follow. Attention adds v to the rows
// of the state at which k spikes, and sums the rows at which q spikes.
//
// If there are fewer sequences than threads, the threads take the chunks of a sequence in turn. Only attention and
// token shift depend on the chunk before, in the same block; a thread waits for that. So the threads work side by side,
// each some blocks behind the one with the chunk before.
#include <sched.h>

#include "bits.h"
#include "decode_ends.h"
#include "decode_levels.h"
#include "decode_neurons.h"
#include "decode_parts.h"
#include "decode_sums.h"
#include "kernels.h"
#include "neuron.h"
#include "parallel.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

// The work of one thread. Kind: Cell<...> for LIF neurons, whose spikes are listed from bits (words_), or Counts, whose
// integers are listed from floats.
template <class Kind>
class Step {
 public:
  // own: this thread's scratch memory.
  Step(const Decode& a, const Kind& cell, float* own)
      : a_(a),
        E_(decode_padded(a.E)),
        hidden_(decode_padded(a.hidden)),
        word_stride_(words_for(larger(a.E, a.hidden))),
        group_(decode_group(a)),
        parts_(decode_scratch_parts(a)),
        own_(own),
        neurons_(a, cell, word_stride_, own + parts_.statistics),
        ends_(a, cell, neurons_, own + parts_.joined, reinterpret_cast<int32_t*>(own + parts_.lists)) {
    y_ = own_ + parts_.y;
    z_ = own_ + parts_.z;
    spikes_ = own_ + parts_.spikes;
    values_ = spikes_ + a.T * E_;
    first_of_ = reinterpret_cast<int32_t*>(own_ + parts_.first_of);
    words_ = reinterpret_cast<uint64_t*>(own_ + parts_.words);
    q_ = channels(0);
    k_ = channels(1);
    for (int64_t c = 0; c < a.E; c++) first_of_[c] = static_cast<int32_t>(c - c % (a.E / a.H));
    // the lanes beyond the channels stay 0
    for (int64_t i = 0; i < a.T * E_; i++) z_[i] = spikes_[i] = 0;
  }

  // Runs the chunk's tokens, numbered across all sequences. before(n) and behind(n) are called around the part of block
  // n that depends on earlier tokens.
  template <class Before, class Behind>
  void run(Range chunk, const Before& before, const Behind& behind) const {
    for (int64_t i = chunk.begin; i < chunk.end; i++) ends_.embed(i, stream(i - chunk.begin).start);
    Reader reader{a_.weights, a_.norm};
    for (int64_t n = 0; n < a_.blocks; n++) {
      const BlockWeights w(a_, reader);
      before(n);
      by_groups(chunk, [&](Range group, int64_t first) { attention_of(w, n, group, first); });
      behind(n);
      by_groups(chunk, [&](Range group, int64_t first) { hidden_of(w, n, group, first); });
      by_groups(chunk, [&](Range group, int64_t first) { output_of(w, n, group, first); });
    }
    for (int64_t i = chunk.begin; i < chunk.end; i++) {
      if (!a_.last_only) {
        ends_.head(reader, stream(i - chunk.begin), a_.logits + i * a_.V);
      } else if (i % a_.S == a_.S - 1) {
        ends_.head(reader, stream(i - chunk.begin), a_.logits + i / a_.S * a_.V);
      }
    }
  }

 private:
  // body(tokens, place of the first one in the chunk) for each group of a chunk.
  template <class Body>
  void by_groups(Range chunk, const Body& body) const {
    for (int64_t b = chunk.begin; b < chunk.end; b += group_) {
      body(Range{b, b + group_ < chunk.end ? b + group_ : chunk.end}, b - chunk.begin);
    }
  }

  // The attention's half of a block, up to the spikes that fc1 reads.
  SPIKEDECODER_OUTLINE_MEMBER void attention_of(const BlockWeights& w, int64_t n, Range group, int64_t first) const {
    const float* threshold = a_.thresholds + n * neurons_per_block;
    const uint8_t* present = a_.present + n * neurons_per_block;
    const DecodeState& state = a_.states[n];
    const int64_t size = group.end - group.begin;
    const auto fire_if = [&](BlockNeuron neuron, const Rows& x) {
      if (present[neuron]) neurons_.fire(x, a_.E, threshold[neuron], x.start, nullptr);
    };

    for (int64_t g = 0; g < size; g++) {
      const Rows x = stream(first + g);
      fire_if(block_input, x);
      list_shifted(first + g, x, present[attention_input], threshold[attention_input], state.attention_shift,
                   a_.token_shift, (group.begin + g) / a_.S);
    }
    sum(w.qkv, a_.E, first, size);
    for (int64_t g = 0; g < size; g++) {
      attention(w.qkv.norm, threshold, y_ + g * parts_.y_size, state.attention, (group.begin + g) / a_.S);
      if (a_.attention_norm && a_.norm == NormKind::row) neurons_.centre({z_, E_}, a_.E);
      list_fired(first + g, {z_, E_}, a_.E, threshold[attention_neuron], w.attention);
    }
    sum(w.proj, a_.E, first, size);
    for (int64_t g = 0; g < size; g++) {
      const Rows x = stream(first + g), y{y_ + g * parts_.y_size, E_};
      neurons_.normalise(y, a_.E, w.proj.norm, squares_of(g));
      fire_if(attention_output, y);
      fire_if(attention_residual, y);
      add_to(x, y);
      fire_if(residual_sum, x);
      list_shifted(first + g, x, present[mlp_input], threshold[mlp_input], state.mlp_shift, a_.mlp_token_shift,
                   (group.begin + g) / a_.S);
    }
  }

  // The MLP, up to the spikes that fc2 reads.
  SPIKEDECODER_OUTLINE_MEMBER void hidden_of(const BlockWeights& w, int64_t n, Range group, int64_t first) const {
    const float threshold = a_.thresholds[n * neurons_per_block + fc1_neuron];
    const int64_t size = group.end - group.begin;
    sum(w.fc1, a_.E, first, size);
    for (int64_t g = 0; g < size; g++) {
      list_fired(first + g, {y_ + g * parts_.y_size, hidden_}, a_.hidden, threshold, w.fc1.norm, squares_of(g));
    }
  }

  SPIKEDECODER_OUTLINE_MEMBER void output_of(const BlockWeights& w, int64_t n, Range group, int64_t first) const {
    const int64_t neuron = n * neurons_per_block + mlp_output, size = group.end - group.begin;
    sum(w.fc2, a_.hidden, first, size);
    for (int64_t g = 0; g < size; g++) {
      const Rows y{y_ + g * parts_.y_size, E_};
      neurons_.normalise(y, a_.E, w.fc2.norm, squares_of(g));
      if (a_.present[neuron]) neurons_.fire(y, a_.E, a_.thresholds[neuron], y.start, nullptr);
      add_to(stream(first + g), y);
    }
  }

  Rows stream(int64_t place) const { return {own_ + place * a_.T * E_, E_}; }

  // Lists what a Linear reads: spikes of x, or x itself, after the token shift.
  SPIKEDECODER_OUTLINE_MEMBER void list_shifted(int64_t place, const Rows& x, bool own, float threshold, float* history,
                                                int64_t shift, int64_t b) const {
    if constexpr (of_integers<Kind>) {
      if (own) neurons_.fire(x, a_.E, threshold, spikes_, nullptr);
      const float* row = own ? spikes_ : x.start;
      if (shift > 1) shift_tokens(row, history + b * (shift - 1) * a_.E, shift, values_);
      list_levels(shift > 1 ? values_ : row, a_.E, levels_of(place));
    } else {
      spikes_of(x, own, threshold, history, shift, b);
      list(place, a_.E);
    }
  }

  // Lists the spikes of neurons with input norm(y), C per timestep; y is changed.
  void list_fired(int64_t place, const Rows& y, int64_t C, float threshold, const Norm& norm,
                  const float* squares = nullptr) const {
    if constexpr (of_integers<Kind>) {
      neurons_.fire(y, C, threshold, y.start, nullptr, norm, squares);
      list_levels(y.start, C, levels_of(place));
    } else {
      neurons_.fire(y, C, threshold, nullptr, words_, norm, squares);
      list(place, C);
    }
  }

  // words_ = the spikes of x, or x itself, after the token shift.
  void spikes_of(const Rows& x, bool own, float threshold, float* history, int64_t shift, int64_t b) const {
    if (own) neurons_.fire(x, a_.E, threshold, shift > 1 ? spikes_ : nullptr, words_);
    if (own && shift == 1) return;
    const Rows s{own ? spikes_ : x.start, E_};
    neurons_.clear(words_);
    for (int64_t t = 0; t < a_.T; t++) {
      const float* row = s[t];
      if (shift > 1) {
        shift_tokens(row, history + (t * a_.B + b) * (shift - 1) * a_.E, shift, values_);
        row = values_;
      }
      for (int64_t c = 0; c < a_.E; c += 64) {
        const int n = static_cast<int>(a_.E - c < 64 ? a_.E - c : 64);
        words_[t * word_stride_ + c / 64] = word_of_floats(row + c, n);
      }
    }
  }

  // Takes channel group i, of `shift` groups, from the token i places back. Moves `past` [shift - 1, E], oldest first,
  // on by one token.
  void shift_tokens(const float* now, float* past, int64_t shift, float* shifted) const {
    const int64_t E = a_.E;
    int64_t c = 0;
    for (int64_t i = 0; i < shift; i++) {
      const int64_t width = E / shift + (i < E % shift);
      copy((i ? past + (shift - 1 - i) * E : now) + c, width, shifted + c);
      c += width;
    }
    memmove(past, past + E, static_cast<size_t>((shift - 2) * E) * sizeof(float));
    copy(now, E, past + (shift - 2) * E);
  }

  SpikeLists lists_of(int64_t place) const {
    return {reinterpret_cast<uint16_t*>(own_ + parts_.lists + place * parts_.list_size),
            reinterpret_cast<int32_t*>(own_ + parts_.ends + place * parts_.ends_size)};
  }

  LevelList levels_of(int64_t place) const {
    const SpikeLists lists = lists_of(place);
    const int64_t channels = decode_padded((larger(a_.E, a_.hidden) + 64) / 2 + 1);
    return {lists.entries, reinterpret_cast<float*>(lists.entries) + channels, lists.ends};
  }

  // Lists the spikes of words_ (C per timestep) for one token of the chunk.
  void list(int64_t place, int64_t C) const { list_spikes(words_, a_.T, word_stride_, words_for(C), lists_of(place)); }

  // Where `sum` adds up the squares of its results for a group's token g; null for integers.
  float* squares_of(int64_t g) const {
    return of_integers<Kind> ? nullptr : own_ + parts_.squares + g * a_.T * 16;
  }

  // y [size, T, columns] = the Linear, with C inputs, of what is listed for `size` tokens from place `first` on.
  void sum(const Linear& l, int64_t C, int64_t first, int64_t size) const {
    if constexpr (of_integers<Kind>) {
      sum_integers(l, C, first, size);
    } else {
      sum_spikes(l, C, first, size);
    }
  }

  void sum_integers(const Linear& l, int64_t C, int64_t first, int64_t size) const {
    const int64_t width = decode_panel(C);
    for (int64_t begin = 0; begin < l.columns; begin += width) {
      const int64_t columns = l.columns - begin < width ? l.columns - begin : width;
      const float* panel = l.weight + begin * C;
      for (int64_t c = 0; c < columns; c += LEVEL_VECTORS * W) {
        const int64_t left = (columns - c) / W;
        const SumLevels add_up = sum_levels_of<LEVEL_VECTORS>(left < LEVEL_VECTORS ? left : LEVEL_VECTORS);
        for (int64_t g = 0; g < size; g++) {
          float* y = y_ + g * parts_.y_size + begin + c;
          add_up(panel + c, columns, levels_of(first + g), l.bias + begin + c, y);
        }
      }
    }
  }

  void sum_spikes(const Linear& l, int64_t C, int64_t first, int64_t size) const {
    const int64_t width = decode_panel(C);
    for (int64_t i = 0; i < size * a_.T * 16; i++) squares_of(0)[i] = 0;
    for (int64_t begin = 0; begin < l.columns; begin += width) {
      const int64_t columns = l.columns - begin < width ? l.columns - begin : width;
      const float* panel = l.weight + begin * C;
      for (int64_t c = 0; c < columns; c += MOST_VECTORS * W) {
        const int64_t left = (columns - c) / W;
        const SumTrees add_up = sum_trees_of<MOST_VECTORS>(left < MOST_VECTORS ? left : MOST_VECTORS);
        Strip strip{panel + c, l.bias + begin + c, columns, nullptr};
        for (int64_t g = 0; g < size; g++) {
          strip.squares = squares_of(g);
          add_up(strip, lists_of(first + g), a_.T, y_ + g * parts_.y_size + begin + c, l.columns);
        }
      }
    }
  }

  // The channels that spike at each timestep.
  struct Channels {
    uint16_t* lists;
    int32_t* counts;
    int64_t stride;

    uint16_t* list(int64_t t) const { return lists + t * stride; }
  };

  Channels channels(int64_t i) const {
    float* start = own_ + parts_.channels + i * parts_.channels_size;
    const int64_t stride = decode_channels(a_);
    return {reinterpret_cast<uint16_t*>(start), reinterpret_cast<int32_t*>(start + a_.T * stride / 2), stride};
  }

  // Lists the spikes of words_ [T, E], and prefetches the rows of sequence b's `states` that attention will touch.
  SPIKEDECODER_OUTLINE_MEMBER void list_timesteps(const Channels& to, const float* states, int64_t b) const {
    const int64_t d = a_.E / a_.H;
    for (int64_t t = 0; t < a_.T; t++) {
      const float* const state = states + (t * a_.B + b) * a_.E * d;
      const uint16_t* const list = to.list(t);
      const int64_t count = list_bits(words_ + t * word_stride_, a_.E, to.list(t));
      to.counts[t] = static_cast<int32_t>(count);
      for (int64_t i = 0; i < count; i++) {
        for (int64_t c = 0; c < d; c += 16) __builtin_prefetch(state + list[i] * d + c, 1);
      }
    }
  }

  // z = scale * (q state), with this token's k^T v added to the states before; y [T, 3, E]: the Linears' results.
  void attention(const Norm& norm, const float* threshold, float* y, float* states, int64_t b) const {
    const int64_t d = a_.E / a_.H;
    const F scale = set1(a_.scale);
    const auto part = [&](int i, BlockNeuron neuron, float* spikes, uint64_t* words) {
      neurons_.fire({y + i * E_, 3 * E_}, a_.E, threshold[neuron], spikes, words, norm.from(i * E_));
    };
    if constexpr (of_integers<Kind>) {
      part(0, q_neuron, y, nullptr);
      part(1, k_neuron, y + E_, nullptr);
      part(2, v_neuron, y + 2 * E_, nullptr);
      attend_levels(y, y + E_, y + 2 * E_, a_.E, d, a_.decay, scale, states + b * a_.E * d, z_);
    } else {
      part(0, q_neuron, nullptr, words_);
      list_timesteps(q_, states, b);
      part(1, k_neuron, nullptr, words_);
      list_timesteps(k_, states, b);
      part(2, v_neuron, values_, nullptr);
      for (int64_t t = 0; t < a_.T; t++) {
        const Attention at{q_.list(t), k_.list(t), q_.counts[t], k_.counts[t], values_ + t * E_,
                           a_.E,       d,          first_of_,    a_.decay};
        (d % W ? attend<false> : attend<true>)(at, scale, states + (t * a_.B + b) * a_.E * d, z_ + t * E_);
      }
    }
  }

  // x += y, both [T, E].
  void add_to(const Rows& x, const Rows& y) const {
    for (int64_t i = 0; i < a_.T * E_; i += W) store(x.start + i, add(load(x.start + i), load(y.start + i)));
  }

  const Decode& a_;
  const int64_t E_, hidden_, word_stride_, group_;
  const DecodeScratch parts_;
  float* const own_;
  const Neurons<Kind> neurons_;
  const Ends<Kind> ends_;
  float *y_, *z_, *spikes_, *values_;
  uint64_t* words_;
  int32_t* first_of_;
  Channels q_, k_;
};

// Estimated nanoseconds of one token on one thread, if a sixth of the neurons spike, or half of I-LIF neurons.
double work(const Decode& a) {
  const double E = static_cast<double>(a.E), hidden = static_cast<double>(a.hidden);
  const double sums = 4 * E * E + 2 * E * hidden, neurons = 8 * E + 2 * hidden;
  return 0.1 * static_cast<double>(a.blocks * a.T) * (sums / (a.levels > 0 ? 2 : 6) + 4 * neurons) / W;
}

// A pause after the n-th look at another thread's progress, which comes soon unless that thread has no core of its own.
void pause(int64_t n) {
  if (n % 64 == 63) {
    sched_yield();
  } else {
#if defined(__SSE2__)
    _mm_pause();
#endif
  }
}

// How many chunks of one sequence have passed each block, seen by all threads.
struct Progress {
  int64_t* done;  // [blocks]

  void wait_for(int64_t block, int64_t chunks) const {
    for (int64_t n = 0; __atomic_load_n(done + block, __ATOMIC_ACQUIRE) < chunks; n++) pause(n);
  }
  void set(int64_t block, int64_t chunks) const { __atomic_store_n(done + block, chunks, __ATOMIC_RELEASE); }
};

}  // namespace

void decode(const Decode& a) {
  const int64_t tokens = a.B * a.S, most = decode_chunk(a);
  int threads = threads_for(work(a) * static_cast<double>(tokens), a.threads);
  // if threads share a sequence: chunks so small that every thread has some, but large enough to share weights in them
  const bool shared = a.B < threads && a.S > 1;
  int64_t size = most;
  if (shared) {
    const int64_t even = (a.S + threads - 1) / threads;
    size = even < 8 ? larger(1, most < 8 ? most : 8) : even < most ? even : most;
  } else if (threads > a.B) {
    threads = static_cast<int>(a.B);
  }
  const int64_t own = decode_scratch_parts(a).size, counts = decode_padded(2 * a.blocks);
  float* scratch = static_cast<float*>(a.scratch);
  if (shared) memset(scratch + threads * own, 0, static_cast<size_t>(threads * counts) * sizeof(float));
  const auto with = [&](const auto& cell) {
    team(threads, [&](int thread, int all) {
      const Step step(a, cell, scratch + thread * own);
      const auto nothing = [](int64_t) {};
      if (!shared) {
        const Range mine = share(a.B, thread, all);
        for (int64_t i = mine.begin * a.S; i < mine.end * a.S; i += size) {
          step.run({i, i + size < mine.end * a.S ? i + size : mine.end * a.S}, nothing, nothing);
        }
        return;
      }
      const int64_t chunks = (a.S + size - 1) / size;
      for (int64_t b = 0; b < a.B; b++) {
        const Progress progress{reinterpret_cast<int64_t*>(scratch + threads * own + b * counts)};
        // in turn across all sequences, so that no thread is idle at the end of one
        for (int64_t c = (thread + all - b * chunks % all) % all; c < chunks; c += all) {
          const int64_t begin = b * a.S + c * size, end = b * a.S + (c + 1 < chunks ? (c + 1) * size : a.S);
          step.run({begin, end}, [&](int64_t n) { progress.wait_for(n, c); },
                   [&](int64_t n) { progress.set(n, c + 1); });
        }
      }
    });
  };
  if (a.levels > 0) {
    with(Counts(a));
  } else {
    with_cell(a.neuron, with);
  }
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
