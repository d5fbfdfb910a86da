// The arguments for running tokens through a whole model; see decode.cpp, and spikedecoder/ext/cpu/decode.py, which
// fills them in. Included by kernels.h.
#pragma once

#include "integers.h"

namespace spikedecoder {

// How the head joins the timesteps.
enum class Reunite : int { average = 0, accumulate = 1, concatenate = 2, final = 3 };

// The neurons of a block, in the order of `Decode::thresholds`. Those that a model lacks are not `present`.
enum BlockNeuron : int {
  block_input,       // before the attention, as the residual stream
  attention_input,   // before q, k, v
  q_neuron,
  k_neuron,
  v_neuron,
  attention_neuron,  // of the attention's result
  attention_output,
  attention_residual,
  residual_sum,      // after the attention's sum
  mlp_input,
  fc1_neuron,
  mlp_output,
  neurons_per_block
};

// The arrays of one block that a token changes: the running sum of k^T v [T, B, H, d, d], and what the two token shifts
// remember, [T, B, shift - 1, E] (null if there is no shift).
struct DecodeState {
  float *attention, *attention_shift, *mlp_shift;
};

// A model, and the next S tokens of each of B sequences. Sizes as in spikedecoder/config.py.
//
// weights: per block  q, k and v side by side, [attention norm], projection, fc1, fc2; then the head. Each is a matrix
// [inputs, outputs], its bias, and (except for the head) its norm: weight, bias and, for channel statistics, mean and
// rstd. Before a norm with row statistics, each row of the matrix and the bias have mean 0 over the outputs, since the
// norm would subtract their means. Outputs are padded with zeros to a multiple of 16, those of q, k and v separately.
// The matrices of the blocks are stored as panels of `decode_panel` columns, one after another. `decode_weights` is the
// number of floats.
struct Decode {
  // the model
  Neuron neuron;
  float levels, per_unit;  // of I-LIF neurons (T = 1): the largest integer, and 1 / v_threshold; levels 0: LIF
  NormKind norm;
  Reunite reunite;
  bool attention_norm, float_reunite, head_neuron;
  float eps, scale;
  int64_t blocks, T, E, hidden, H, V, token_shift, mlp_token_shift;
  const float *weights, *thresholds, *decay;  // thresholds (of LIF): as `present`, then the head's; decay [H] or null
  const uint8_t* present;                     // [blocks, neurons_per_block]
  int64_t token_width;

  // the tokens: `embedded` [B, S, E] or, if that is null (S = 1), row tokens[b] of `token_rows` [.., token_width]
  // followed by row positions[b] - first_position of `position_rows` [.., E - token_width]
  const float *embedded, *token_rows, *position_rows;
  const int64_t *tokens, *positions;  // [B]
  int64_t first_position;
  const DecodeState* states;          // [blocks]
  float* logits;                      // [B, S, V], or after the last token only: [B, V]
  bool last_only;
  void* scratch;                      // decode_scratch bytes, 64-byte aligned
  int64_t B, S;
  int threads;
};

static constexpr int64_t decode_padded(int64_t n) { return round_up(n, 16); }

// Inputs of the head's Linear.
static inline int64_t decode_head_inputs(const Decode& a) {
  return a.reunite == Reunite::concatenate ? a.T * a.E : a.E;
}

static inline int64_t decode_linear(const Decode& a, int64_t inputs, int64_t outputs) {
  return outputs * (inputs + 1 + (a.norm == NormKind::channel ? 4 : 2));
}

// Floats in `weights`.
static inline int64_t decode_weights(const Decode& a) {
  const int64_t E = decode_padded(a.E), hidden = decode_padded(a.hidden);
  const int64_t block = decode_linear(a, a.E, 3 * E) + decode_linear(a, a.E, E) + decode_linear(a, a.E, hidden) +
                        decode_linear(a, a.hidden, E) + (a.attention_norm ? decode_linear(a, -1, E) : 0);
  return a.blocks * block + decode_padded(a.V) * (decode_head_inputs(a) + 1);
}

// Columns of a panel of a weight with this many inputs. Those rows of a panel that are used at all stay in a
// first-level cache, so that a panel is read from farther away only once for all sequences. Where only narrow panels
// would fit, long rows are better.
static inline int64_t decode_panel(int64_t inputs) {
  const int64_t columns = (40 << 10) / (inputs * 64) * 16;
  return columns < 64 || columns > 128 ? 128 : columns;
}

// Most nodes of the trees of timesteps (decode_sums.h).
static constexpr int64_t decode_nodes(int64_t T) { return 2 * T; }

// How many tokens a thread takes through the blocks together, so that the weights are read from memory once for all of
// them: one each of several sequences, or neighbours of one. Limited by the size of their lists of spikes.
static inline int64_t decode_chunk(const Decode& a) {
  const int64_t room = (1 << 21) / (a.T * larger(a.E, a.hidden));
  return room < 1 ? 1 : room > 32 ? 32 : room;
}

// How many of these go through a Linear together: as many as have their results in a part of the second-level cache.
static inline int64_t decode_group(const Decode& a) {
  const int64_t room = (96 << 10) / (a.T * larger(3 * decode_padded(a.E), decode_padded(a.hidden)));
  return room < 1 ? 1 : room > 16 ? 16 : room;
}

// The number of 16-bit entries in a list of channels.
static inline int64_t decode_channels(const Decode& a) { return decode_padded(a.E) + 64; }

// Where the parts of one thread's scratch memory begin, in floats. In order: residual streams [chunk, T, E]; results of
// a Linear [group, T, columns]; results of the attention [T, E]; spikes [2, T, E]; the first channel of each channel's
// head [E]; statistics [T]; squares [group, T, 16]; the head's input; words of bits [T, inputs / 64]; the channels at
// which q and k spike [2, T, E] (16 bits each) and their numbers [2, T]; lists of spikes [chunk, T * inputs] (16 bits
// each, and for I-LIF the integers); where the list of each node ends [chunk, nodes]. All rows are padded.
struct DecodeScratch {
  int64_t y, z, spikes, first_of, statistics, squares, joined, words, channels, lists, ends, size;
  int64_t y_size, words_size, channels_size, list_size, ends_size;  // of one token, or one set of words or channels
};

static inline DecodeScratch decode_scratch_parts(const Decode& a) {
  const int64_t E = decode_padded(a.E), hidden = decode_padded(a.hidden), widest = larger(a.E, a.hidden);
  const int64_t chunk = decode_chunk(a), inputs = decode_padded(decode_head_inputs(a));
  DecodeScratch s{};
  s.y_size = larger(3 * E, hidden) * a.T;
  s.words_size = decode_padded(2 * words_for(widest) * a.T);
  s.channels_size = decode_padded(a.T * decode_channels(a) / 2 + a.T);
  s.list_size = decode_padded((a.T * widest + 64) / 2 + 1) + (a.levels > 0 ? decode_padded(widest + 16) : 0);
  s.ends_size = decode_padded(decode_nodes(a.T));
  s.y = chunk * a.T * E;
  s.z = s.y + decode_group(a) * s.y_size;
  s.spikes = s.z + E * a.T;
  s.first_of = s.spikes + 2 * E * a.T;
  s.statistics = s.first_of + E;
  s.squares = s.statistics + decode_padded(a.T);
  s.joined = s.squares + decode_group(a) * a.T * 16;
  s.words = s.joined + inputs;
  s.channels = s.words + s.words_size;
  s.lists = s.channels + 2 * s.channels_size;
  s.ends = s.lists + larger(chunk * s.list_size, inputs);
  s.size = s.ends + chunk * s.ends_size;
  return s;
}

// Bytes of scratch memory: each thread's own, and for up to `threads` sequences how far each block has got (Progress).
static inline int64_t decode_scratch(const Decode& a, int threads) {
  const int64_t own = decode_scratch_parts(a).size + decode_padded(2 * a.blocks);
  return static_cast<int64_t>(sizeof(float)) * threads * own;
}

}  // namespace spikedecoder
