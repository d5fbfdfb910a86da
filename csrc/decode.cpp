// One token of each of B sequences through a whole fully spiking model: every block, and the head.
//
// A thread takes its sequences through one block after the other, so that a block's weights are read from memory
// once and come from the cache for all but the first sequence. A Linear adds up the rows of its weight (stored by
// inputs) at which the input spikes, for all timesteps; norm and neurons follow while the sums are in the
// first-level cache. Attention adds v to the rows of the state at which k spikes, and adds up those at which q does.
// The sums have the order of the operators' own kernels (spike_linear, norm_lif, spike_attention).
#include "bits.h"
#include "kernels.h"
#include "neuron.h"
#include "parallel.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

#if defined(SPIKEDECODER_AVX512)
constexpr int MOST_VECTORS = 16;  // of 32 registers
#elif defined(SPIKEDECODER_AVX2)
constexpr int MOST_VECTORS = 10;  // of 16
#else
constexpr int MOST_VECTORS = 8;
#endif

struct Norm {
  const float *weight = nullptr, *bias = nullptr, *mean = nullptr, *rstd = nullptr;  // the last two of channels

  Norm from(int64_t column) const {
    return {weight + column, bias + column, mean ? mean + column : nullptr, rstd ? rstd + column : nullptr};
  }
};

struct Linear {
  const float *weight, *bias;  // [inputs, columns], [columns]
  Norm norm;
  int64_t columns;
};

// Walks `Decode::weights`.
struct Reader {
  const float* at;
  NormKind kind;

  const float* take(int64_t n) {
    const float* here = at;
    at += n;
    return here;
  }
  Norm norm(int64_t columns) {
    Norm n;
    n.weight = take(columns);
    n.bias = take(columns);
    if (kind == NormKind::channel) {
      n.mean = take(columns);
      n.rstd = take(columns);
    }
    return n;
  }
  Linear linear(int64_t inputs, int64_t columns) {
    Linear l;
    l.weight = take(inputs * columns);
    l.bias = take(columns);
    l.norm = norm(columns);
    l.columns = columns;
    return l;
  }
};

struct BlockWeights {
  Linear qkv, proj, fc1, fc2;
  Norm attention;

  BlockWeights(const Decode& a, Reader& r) {
    const int64_t E = decode_padded(a.E), hidden = decode_padded(a.hidden);
    qkv = r.linear(a.E, 3 * E);
    if (a.attention_norm) attention = r.norm(E);
    proj = r.linear(a.E, E);
    fc1 = r.linear(a.E, hidden);
    fc2 = r.linear(a.hidden, E);
  }
};

// out[0 .. V vectors] = bias + the rows of a panel in `list`.
template <int V>
void sum_list(const uint16_t* list, int64_t n, const float* panel, int64_t stride, const float* bias, float* out) {
  F sums[V];
  for (int j = 0; j < V; j++) sums[j] = load(bias + j * W);
  for (int64_t i = 0; i < n; i++) {
    const float* row = panel + list[i] * stride;
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) sums[j] = add(sums[j], load(row + j * W));
  }
  for (int j = 0; j < V; j++) store(out + j * W, sums[j]);
}

using SumList = void (*)(const uint16_t*, int64_t, const float*, int64_t, const float*, float*);

template <int V>
SumList sum_list_of(int vectors) {
  if constexpr (V == 0) {
    return nullptr;
  } else {
    return vectors == V ? sum_list<V> : sum_list_of<V - 1>(vectors);
  }
}

// Bits first .. first + n of a row of words, n <= 64.
SPIKEDECODER_INLINE uint64_t take_bits(const uint64_t* words, int64_t first, int n) {
  const int64_t word = first / 64, shift = first % 64;
  uint64_t bits = words[word] >> shift;
  if (shift && shift + n > 64) bits |= words[word + 1] << (64 - shift);
  return n == 64 ? bits : bits & ((uint64_t{1} << n) - 1);
}

// body(i) for each bit i < n that is set from bit `first` on.
template <class Body>
SPIKEDECODER_INLINE void for_bits(const uint64_t* words, int64_t first, int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t word = take_bits(words, first + i, static_cast<int>(n - i < 64 ? n - i : 64));
    for (; word; word &= word - 1) body(i + __builtin_ctzll(word));
  }
}

struct HeadSpikes {
  const uint64_t *q, *k;
  int64_t first;   // the head's first channel
  const float* v;  // [d]
};

// One head and timestep: V vectors of the state's columns from `column` on, of which the last has `last` lanes.
template <int V>
SPIKEDECODER_INLINE void attend_columns(const HeadSpikes& s, int64_t d, int64_t column, int last, float decay, F scale,
                                        float* state, float* out) {
  F value[V], sums[V];
  const auto lanes = [last](int j) SPIKEDECODER_INLINE_LAMBDA { return j < V - 1 ? W : last; };
  for (int j = 0; j < V; j++) {
    value[j] = load_up_to(s.v + column + j * W, lanes(j));
    sums[j] = zero();
  }
  state += column;
  if (decay != 1) {
    for (int64_t row = 0; row < d; row++) {
      for (int j = 0; j < V; j++) {
        float* at = state + row * d + j * W;
        store_up_to(at, mul(load_up_to(at, lanes(j)), set1(decay)), lanes(j));
      }
    }
  }
  for_bits(s.k, s.first, d, [&](int64_t row) SPIKEDECODER_INLINE_LAMBDA {
    for (int j = 0; j < V; j++) {
      float* at = state + row * d + j * W;
      store_up_to(at, add(load_up_to(at, lanes(j)), value[j]), lanes(j));
    }
  });
  for_bits(s.q, s.first, d, [&](int64_t row) SPIKEDECODER_INLINE_LAMBDA {
    for (int j = 0; j < V; j++) sums[j] = add(sums[j], load_up_to(state + row * d + j * W, lanes(j)));
  });
  for (int j = 0; j < V; j++) store_up_to(out + column + j * W, mul(sums[j], scale), lanes(j));
}

void attend(const HeadSpikes& s, int64_t d, float decay, F scale, float* state, float* out) {
  for (int64_t column = 0; column < d; column += 4 * W) {
    const int64_t left = d - column;
    const int vectors = left >= 4 * W ? 4 : static_cast<int>((left + W - 1) / W);
    const int last = left >= 4 * W ? W : static_cast<int>(left - (vectors - 1) * W);
    switch (vectors) {
      case 1:
        if (last == W) {
          attend_columns<1>(s, d, column, W, decay, scale, state, out);
        } else {
          attend_columns<1>(s, d, column, last, decay, scale, state, out);
        }
        break;
      case 2: attend_columns<2>(s, d, column, last, decay, scale, state, out); break;
      case 3: attend_columns<3>(s, d, column, last, decay, scale, state, out); break;
      default: attend_columns<4>(s, d, column, last, decay, scale, state, out);
    }
  }
}

// What one thread does.
template <bool PlainCell>
class Step {
 public:
  Step(const Decode& a, const Cell<PlainCell>& cell, int thread)
      : a_(a),
        cell_(cell),
        E_(decode_padded(a.E)),
        hidden_(decode_padded(a.hidden)),
        word_stride_(words_for(larger(a.E, a.hidden))),
        list_stride_(2 * decode_padded((larger(a.E, a.hidden) + 64) / 2 + 1)) {
    const DecodeScratch parts = decode_scratch_parts(a);
    streams_ = static_cast<float*>(a.scratch);
    float* own = streams_ + a.B * a.T * E_ + thread * parts.size;
    y_ = own;
    z_ = own + parts.z;
    spikes_ = own + parts.spikes;
    values_ = spikes_ + a.T * E_;
    statistics_ = own + parts.statistics;
    joined_ = own + parts.joined;
    words_ = reinterpret_cast<uint64_t*>(own + parts.words);
    q_words_ = words_ + decode_padded(2 * word_stride_ * a.T) / 2;
    k_words_ = q_words_ + decode_padded(2 * word_stride_ * a.T) / 2;
    lists_ = reinterpret_cast<uint16_t*>(own + parts.lists);
    counts_ = reinterpret_cast<int64_t*>(own + parts.counts);
    // the lanes behind the channels stay 0
    for (int64_t i = 0; i < a.T * E_; i++) z_[i] = spikes_[i] = 0;
  }

  void embed(int64_t b) const {
    float* x = stream(b);
    const int64_t width = a_.token_width, rest = a_.E - width;
    if (a_.embedded) {
      copy(a_.embedded + b * a_.E, a_.E, x);
    } else {
      copy(a_.token_rows + a_.tokens[b] * width, width, x);
      copy(a_.position_rows + (a_.positions[b] - a_.first_position) * rest, rest, x + width);
    }
    for (int64_t c = a_.E; c < E_; c++) x[c] = 0;
    for (int64_t t = 1; t < a_.T; t++) copy(x, E_, x + t * E_);
  }

  void block(const BlockWeights& w, int64_t n, int64_t b) const {
    const float* threshold = a_.thresholds + n * neurons_per_block;
    const uint8_t* present = a_.present + n * neurons_per_block;
    const DecodeState& state = a_.states[n];
    const Rows x{stream(b), E_};
    if (present[block_input]) fire(x, a_.E, threshold[block_input], x.start, nullptr);

    const bool own_spikes = present[attention_input];
    spikes_of(x, own_spikes, threshold[attention_input], state.attention_shift, a_.token_shift, b);
    list(words_, a_.E);
    sum(w.qkv);
    const Rows q{y_, 3 * E_}, k{y_ + E_, 3 * E_}, v{y_ + 2 * E_, 3 * E_};
    fire(q, a_.E, threshold[q_neuron], nullptr, q_words_, w.qkv.norm);
    fire(k, a_.E, threshold[k_neuron], nullptr, k_words_, w.qkv.norm.from(E_));
    fire(v, a_.E, threshold[v_neuron], values_, nullptr, w.qkv.norm.from(2 * E_));
    attention(state.attention, b);
    fire({z_, E_}, a_.E, threshold[attention_neuron], nullptr, words_, w.attention);
    list(words_, a_.E);
    sum(w.proj);
    const Rows out{y_, E_};
    normalise(out, a_.E, w.proj.norm);
    if (present[attention_output]) fire(out, a_.E, threshold[attention_output], y_, nullptr);
    if (present[attention_residual]) fire(out, a_.E, threshold[attention_residual], y_, nullptr);
    add_to(x.start);
    if (present[residual_sum]) fire(x, a_.E, threshold[residual_sum], x.start, nullptr);

    spikes_of(x, present[mlp_input], threshold[mlp_input], state.mlp_shift, a_.mlp_token_shift, b);
    list(words_, a_.E);
    sum(w.fc1);
    fire({y_, hidden_}, a_.hidden, threshold[fc1_neuron], nullptr, words_, w.fc1.norm);
    list(words_, a_.hidden);
    sum(w.fc2);
    normalise(out, a_.E, w.fc2.norm);
    if (present[mlp_output]) fire(out, a_.E, threshold[mlp_output], y_, nullptr);
    add_to(x.start);
  }

  void head(Reader r, int64_t b) const {
    const int64_t columns = decode_padded(a_.V), inputs = decode_head_inputs(a_);
    const float *weight = r.take(inputs * columns), *bias = r.take(columns);
    const float threshold = a_.thresholds[a_.blocks * neurons_per_block];
    const Rows x{stream(b), E_};
    if (a_.head_neuron && !a_.float_reunite) fire(x, a_.E, threshold, x.start, nullptr);
    join(x);
    if (a_.head_neuron && a_.float_reunite) {
      for (int64_t i = 0; i < inputs; i += W) {
        const Mask fired = ge(cell_.charge(load(joined_ + i), zero()), set1(threshold));
        store(joined_ + i, keep(fired, set1(1)));
      }
    }
    // the inputs that are not 0 come first, their values in place
    int64_t n = 0;
    int32_t* rows = reinterpret_cast<int32_t*>(lists_);
    for (int64_t i = 0; i < inputs; i++) {
      const float value = joined_[i];
      joined_[n] = value;
      rows[n] = static_cast<int32_t>(i);
      n += value != 0;
    }
    for (int64_t c = 0; c < columns; c += W) {
      F total = load(bias + c);
      for (int64_t i = 0; i < n; i++) total = fma(set1(joined_[i]), load(weight + rows[i] * columns + c), total);
      const int64_t left = a_.V - c;
      if (left > 0) store_up_to(a_.logits + b * a_.V + c, total, static_cast<int>(left < W ? left : W));
    }
  }

 private:
  struct Rows {
    float* start;
    int64_t stride;

    float* operator[](int64_t t) const { return start + t * stride; }
  };

  float* stream(int64_t b) const { return streams_ + b * a_.T * E_; }

  static void copy(const float* from, int64_t n, float* to) {
    memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  }

  // Mean and 1 / sqrt(variance + eps) of each row.
  void row_statistics(const Rows& y, int64_t C) const {
    const float n = static_cast<float>(C);
    for (int64_t t = 0; t < a_.T; t++) {
      const float* row = y[t];
      F sums[4] = {zero(), zero(), zero(), zero()};
      int64_t c = 0;
      for (; c + 4 * W <= C; c += 4 * W) {
        for (int i = 0; i < 4; i++) sums[i] = add(sums[i], load(row + c + i * W));
      }
      for (; c < C; c += W) sums[0] = add(sums[0], load_up_to(row + c, static_cast<int>(C - c < W ? C - c : W)));
      const float mean = spikedecoder::SPIKEDECODER_VARIANT::sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) / n;
      const F m = set1(mean);
      for (F& s : sums) s = zero();
      for (c = 0; c + 4 * W <= C; c += 4 * W) {
        for (int i = 0; i < 4; i++) {
          const F d = sub(load(row + c + i * W), m);
          sums[i] = fma(d, d, sums[i]);
        }
      }
      for (; c < C; c += W) {
        const int64_t k = C - c;
        F d = sub(load(row + c), m);
        if (k < W) d = keep(mask_of((1u << k) - 1), d);
        sums[0] = fma(d, d, sums[0]);
      }
      const float squares =
          spikedecoder::SPIKEDECODER_VARIANT::sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
      statistics_[t] = mean;
      statistics_[a_.T + t] = 1 / __builtin_sqrtf(squares / n + a_.eps);
    }
  }

  // One vector of channels of a norm.
  struct Normed {
    F weight, bias, mean, rstd;
    bool rows;

    SPIKEDECODER_INLINE_MEMBER void read(const Norm& n, int64_t c) {
      rows = !n.mean;
      weight = load(n.weight + c);
      bias = load(n.bias + c);
      mean = rows ? zero() : load(n.mean + c);
      rstd = rows ? zero() : load(n.rstd + c);
    }
    SPIKEDECODER_INLINE_MEMBER F operator()(F y, float row_mean, float row_rstd) const {
      const F z = rows ? mul(sub(y, set1(row_mean)), set1(row_rstd)) : mul(sub(y, mean), rstd);
      return fma(z, weight, bias);
    }
  };

  // No norm.
  struct Plain {
    SPIKEDECODER_INLINE_MEMBER void read(const Norm&, int64_t) {}
    SPIKEDECODER_INLINE_MEMBER F operator()(F y, float, float) const { return y; }
  };

  // y = norm(y), in place.
  void normalise(const Rows& y, int64_t C, const Norm& norm) const {
    if (!norm.mean) row_statistics(y, C);
    for (int64_t c = 0; c < C; c += W) {
      Normed normed;
      normed.read(norm, c);
      for (int64_t t = 0; t < a_.T; t++) {
        store(y[t] + c, normed(load(y[t] + c), statistics_[t], statistics_[a_.T + t]));
      }
    }
  }

  // The spikes of neurons with input norm(y), or y itself, as floats [T, E] and as bits; either may be null.
  void fire(const Rows& y, int64_t C, float threshold, float* spikes, uint64_t* words, const Norm& norm = {}) const {
    if (words) clear(words);
    if (!norm.weight) {
      fire_with<Plain>(y, C, threshold, spikes, words, norm);
    } else {
      if (!norm.mean) row_statistics(y, C);
      fire_with<Normed>(y, C, threshold, spikes, words, norm);
    }
  }

  template <class Input>
  void fire_with(const Rows& y, int64_t C, float threshold, float* spikes, uint64_t* words, const Norm& norm) const {
    for_channels(decode_padded(C), [&](auto vectors, int64_t c, int) SPIKEDECODER_INLINE_LAMBDA {
      constexpr int U = decltype(vectors)::count;
      Input input[U];
      F limit[U], v[U];
      for (int u = 0; u < U; u++) {
        input[u].read(norm, c + u * W);
        const int64_t left = C - c - u * W;
        limit[u] = set1(threshold);
        if (left < W) limit[u] = select(mask_of(left > 0 ? (1u << left) - 1 : 0), limit[u], set1(__builtin_inff()));
        v[u] = zero();
      }
      for (int64_t t = 0; t < a_.T; t++) {
        uint64_t word = 0;
        for (int u = 0; u < U; u++) {
          const F x = input[u](load(y[t] + c + u * W), statistics_[t], statistics_[a_.T + t]);
          const F h = cell_.charge(x, v[u]);
          const Mask fired = ge(h, limit[u]);
          v[u] = cell_.after(h, fired, limit[u]);
          if (spikes) store(spikes + t * E_ + c + u * W, keep(fired, set1(1)));
          word |= static_cast<uint64_t>(bits(fired)) << (u * W);
        }
        if (words) words[t * word_stride_ + c / 64] |= word << (c % 64);
      }
    });
  }

  void clear(uint64_t* words) const {
    for (int64_t i = 0; i < word_stride_ * a_.T; i++) words[i] = 0;
  }

  // words_ = the spikes that a Linear reads: those of x, or x itself, after the token shift.
  void spikes_of(const Rows& x, bool own, float threshold, float* history, int64_t shift, int64_t b) const {
    if (own) fire(x, a_.E, threshold, shift > 1 ? spikes_ : nullptr, words_);
    if (own && shift == 1) return;
    const Rows s{own ? spikes_ : x.start, E_};
    clear(words_);
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

  // Channel group i of `shift` from the token i places back; moves `past` [shift - 1, E], oldest first, on.
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

  // Lists of the set bits of each timestep's row.
  void list(const uint64_t* words, int64_t C) const {
    for (int64_t t = 0; t < a_.T; t++) {
      uint16_t* entries = lists_ + t * list_stride_;
      int64_t n = 0;
      for (int64_t w = 0; w < words_for(C); w++) {
        const uint64_t word = words[t * word_stride_ + w];
        if (word) n += indices_of(word, static_cast<uint16_t>(64 * w), entries + n);
      }
      counts_[t] = n;
    }
  }

  // y [T, columns] = the Linear of the listed spikes.
  void sum(const Linear& l) const {
    const int64_t vectors = l.columns / W, panels = (vectors + MOST_VECTORS - 1) / MOST_VECTORS;
    for (int64_t p = 0; p < panels; p++) {
      const int64_t begin = vectors * p / panels, end = vectors * (p + 1) / panels, column = begin * W;
      const SumList add_up = sum_list_of<MOST_VECTORS>(static_cast<int>(end - begin));
      for (int64_t t = 0; t < a_.T; t++) {
        add_up(lists_ + t * list_stride_, counts_[t], l.weight + column, l.columns, l.bias + column,
               y_ + t * l.columns + column);
      }
    }
  }

  // z = scale * (q state), the states with this token's k^T v in them.
  void attention(float* states, int64_t b) const {
    const int64_t d = a_.E / a_.H;
    const F scale = set1(a_.scale);
    for (int64_t t = 0; t < a_.T; t++) {
      for (int64_t h = 0; h < a_.H; h++) {
        const HeadSpikes s{q_words_ + t * word_stride_, k_words_ + t * word_stride_, h * d, values_ + t * E_ + h * d};
        attend(s, d, a_.decay ? a_.decay[h] : 1, scale, states + ((t * a_.B + b) * a_.H + h) * d * d,
               z_ + t * E_ + h * d);
      }
    }
  }

  // x += y, both [T, E].
  void add_to(float* x) const {
    for (int64_t i = 0; i < a_.T * E_; i += W) store(x + i, add(load(x + i), load(y_ + i)));
  }

  // joined = the head's input; lanes behind it are 0.
  void join(const Rows& x) const {
    if (a_.reunite == Reunite::concatenate) {
      for (int64_t i = decode_head_inputs(a_) / W * W; i < decode_padded(decode_head_inputs(a_)); i++) joined_[i] = 0;
      for (int64_t t = 0; t < a_.T; t++) copy(x[t], a_.E, joined_ + t * a_.E);
      return;
    }
    const int64_t first = a_.reunite == Reunite::final ? a_.T - 1 : 0;
    for (int64_t c = 0; c < E_; c += W) {
      F total = load(x[first] + c);
      for (int64_t t = first + 1; t < a_.T; t++) total = add(total, load(x[t] + c));
      if (a_.reunite == Reunite::average) total = div(total, set1(static_cast<float>(a_.T)));
      store(joined_ + c, total);
    }
  }

  const Decode& a_;
  const Cell<PlainCell>& cell_;
  const int64_t E_, hidden_, word_stride_, list_stride_;
  float *streams_, *y_, *z_, *spikes_, *values_, *statistics_, *joined_;
  uint64_t *words_, *q_words_, *k_words_;
  uint16_t* lists_;
  int64_t* counts_;
};

// Nanoseconds of one sequence on one thread, at a guess: a sixth of the neurons spikes.
double work(const Decode& a) {
  const double E = static_cast<double>(a.E), hidden = static_cast<double>(a.hidden);
  const double sums = 4 * E * E + 2 * E * hidden, neurons = 8 * E + 2 * hidden;
  return 0.1 * static_cast<double>(a.blocks * a.T) * (sums / 6 + 4 * neurons) / W;
}

}  // namespace

void decode(const Decode& a) {
  int threads = threads_for(work(a) * static_cast<double>(a.B), a.threads);
  if (threads > a.B) threads = static_cast<int>(a.B);
  with_cell(a.neuron, [&](const auto& cell) {
    parallel(threads, [&](int thread, int all) {
      const Range mine = share(a.B, thread, all);
      const Step step(a, cell, thread);
      for (int64_t b = mine.begin; b < mine.end; b++) step.embed(b);
      Reader reader{a.weights, a.norm};
      for (int64_t n = 0; n < a.blocks; n++) {
        const BlockWeights weights(a, reader);
        for (int64_t b = mine.begin; b < mine.end; b++) step.block(weights, n, b);
      }
      for (int64_t b = mine.begin; b < mine.end; b++) step.head(reader, b);
    });
  });
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
