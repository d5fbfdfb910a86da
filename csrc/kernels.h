// The arguments of the compiled operators, and the table of operators that each variant fills.
//
// Arrays are contiguous float32 unless noted otherwise; sizes are in elements. Arguments have been checked before they
// arrive here (bindings*.cpp); kernels throw nothing but std::bad_alloc.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace spikedecoder {

static constexpr int64_t words_for(int64_t channels) { return (channels + 63) / 64; }

// The threshold of a neuron: one number, one per channel [C], or one per element of a timestep.
enum class ThresholdKind : int { scalar = 0, channel = 1, element = 2 };

// Numbered as in spikedecoder/surrogate.py.
enum class Surrogate : int { sigmoid = 0, atan = 1, rectangular = 2, triangle = 3, fast_sigmoid = 4 };

// The element type of an array that is not always float32. Numbered as in spikedecoder/ext/cpu/_arguments.py.
enum class Element : int { float32 = 0, bfloat16 = 1, byte = 2, bits = 3 };

// A LIF neuron or, if levels > 0, an integer one, for which only the last line is read (only norm_lif takes it).
// Equations: spikedecoder/params.py.
struct Neuron {
  float tau = 2, v_reset = 0, alpha = 4;
  float leak = 0.5f;  // 1 - 1 / tau, rounded once from double
  Surrogate surrogate = Surrogate::sigmoid;
  bool hard_reset = true, decay_input = true, detach_reset = true;
  float levels = 0, scale = 1, low = 0, high = 0;  // see IlifForward
};

struct Threshold {
  ThresholdKind kind = ThresholdKind::scalar;
  float value = 1;                // scalar
  const float* values = nullptr;  // channel, element
};

// x, spikes [T, rows, C] of `type`, float32 or bfloat16; v (or null), v_init (or null: zeros) [rows, C]. One timestep
// is [rows, C].
struct LifForward {
  Neuron neuron;
  Threshold threshold;
  Element type;
  const void* x;
  const float* v_init;
  void* spikes;
  float* v;
  int64_t T, rows, C;
  int threads;
};

// grad_spikes, x and grad_x are of `type`. grad_v and grad_v_init may be null. grad_threshold: null, or [1], [C]
// or [rows, C] by the threshold's kind.
struct LifBackward {
  Neuron neuron;
  Threshold threshold;
  Element type;
  const void* grad_spikes;
  const float* grad_v;
  const void* x;
  const float* v_init;
  void* grad_x;
  float *grad_threshold, *grad_v_init;
  int64_t T, rows, C;
  int threads;
};

// s = clip(floor(x scale + 1/2), 0, levels); mask is 1 where low <= x scale <= high, else 0; null if it is not wanted.
struct IlifForward {
  const float* x;
  float* out;
  uint8_t* mask;
  float scale, levels, low, high;
  int64_t n;
  int threads;
};

struct IlifBackward {
  const float* grad;
  const uint8_t* mask;
  float *out, scale;
  int64_t n;
  int threads;
};

struct Binarize {
  const float *x, *grad;  // grad null: spikes are written, else the gradient of x
  float* out;
  float alpha;
  int64_t n;
  int threads;
};

// values [rows, C], float32, bfloat16 or bytes -> words [rows, words_for(C)]; `count` gets the number of set bits.
struct Pack {
  const void* values;
  Element type;
  uint64_t* words;
  int64_t* count;
  int64_t rows, C;
  int threads;
};

// `count` gets the number of bits set in words [rows, words_for(C)], `stray` those beyond channel C of any row.
struct CountBits {
  const uint64_t* words;
  int64_t* count;
  uint64_t* stray;
  int64_t rows, C;
  int threads;
};

// Spikes [rows, C] and the words [rows, words_for(C)] of their bits, which are packed from `values` (float32, bfloat16
// or bytes) or, if `values` is null, are there already.
struct Spikes {
  const void* values;
  Element type;
  uint64_t* words;
  int64_t C;
};

// For some rows: how many bits are set, and which bits beyond channel C.
struct Found {
  int64_t count;
  uint64_t stray;
};

// Packs n rows from `begin` on or, if they are packed, counts and checks the bits of their words, by the given kernels.
static inline Found make_ready(const Spikes& s, int64_t begin, int64_t n, int threads, void (*pack)(const Pack&),
                               void (*count_bits)(const CountBits&)) {
  Found found{0, 0};
  uint64_t* const words = s.words + begin * words_for(s.C);
  if (s.values) {
    const int64_t size = s.type == Element::float32 ? 4 : s.type == Element::bfloat16 ? 2 : 1;
    pack({static_cast<const char*>(s.values) + begin * s.C * size, s.type, words, &found.count, n, s.C, threads});
  } else {
    count_bits({words, &found.count, &found.stray, n, s.C, threads});
  }
  return found;
}

struct Unpack {
  const uint64_t* words;
  void* values;
  Element type;  // float32 or bfloat16
  int64_t rows, C;
  int threads;
};

// x [rows, C] -> mean, variance (biased) of each channel; without centring mean = 0, var = mean of x^2.
struct Moments {
  Element type;  // of x
  const void* x;
  bool center;
  float *mean, *var;
  int64_t rows, C;
  int threads;
};

// Which statistics normalise an element: those of its row [T, rows], or those of its channel [C].
enum class NormKind : int { row = 0, channel = 1 };

// spikes = LIF(y) or I-LIF(y), y = z weight + bias, z = (x - mean) rstd. x, spikes [T, rows, C] of `type`; T = 1 with
// I-LIF, for which all are rows.
// Row statistics are computed and written here, channel statistics are read. The spikes may be a part of a larger
// tensor: their timesteps are `spikes_rows` rows apart.
struct NormLifForward {
  Neuron neuron;
  Threshold threshold;
  NormKind kind;
  Element type;
  const void* x;
  const float *weight, *bias;
  float eps;
  float *mean, *rstd;
  void* spikes;
  int64_t T, rows, C, spikes_rows;
  int threads;
};

// What a backward pass computes, from g = dL/dy, which each recomputes:
//   whole   row statistics: grad_x, grad_weight, grad_bias, grad_threshold
//   reduce  channel statistics: grad_weight = sum g z, grad_bias = sum g, grad_threshold
//   apply   channel statistics: grad_x = a g + b z + c, with a, b, c per channel
//   known   reduce and apply at once, for coefficients that do not depend on the sums
enum class NormLifPart : int { whole = 0, reduce = 1, apply = 2, known = 3 };

struct NormLifBackward {
  Neuron neuron;
  Threshold threshold;
  NormKind kind;
  NormLifPart part;
  Element type;  // of grad_spikes, x and grad_x
  const void *grad_spikes, *x;
  const float *weight, *bias, *mean, *rstd, *a, *b, *c;
  void* grad_x;
  float *grad_weight, *grad_bias, *grad_threshold;
  int64_t T, rows, C;
  int threads;
};

// q, k, v, out [T, B, S, H, d] in memory. q, k and v are spikes, or any numbers if `integers`; decay [H] or null (1);
// states [T, B, H, d, d] or null.
struct AttentionForward {
  const float *q, *k, *v, *decay, *state;
  float scale;
  bool integers;
  float *out, *final_state;
  int64_t T, B, S, H, d;
  int threads;
};

struct AttentionBackward {
  const float *grad, *q, *k, *v, *decay, *state;
  float scale;
  bool integers;
  float *grad_q, *grad_k, *grad_v;
  int64_t T, B, S, H, d;
  int threads;
};

// A threshold per channel is that of the channels of a head [d]; one per element is [B, S, H, d].
struct AttentionLifForward {
  Neuron neuron;
  Threshold threshold;
  const float *q, *k, *v, *decay;
  float scale;
  float* spikes;
  int64_t T, B, S, H, d;
  int threads;
};

struct AttentionLifBackward {
  Neuron neuron;
  Threshold threshold;
  const float *grad_spikes, *q, *k, *v, *decay;
  float scale;
  float *grad_q, *grad_k, *grad_v, *grad_threshold;
  int64_t T, B, S, H, d;
  int threads;
};

// Spikes that a kernel itself makes ready, some rows at a time, when it gets to them. `count` and `stray` receive the
// totals of what is Found. Rows in which bits are set beyond the last channel are left out.
struct Unready {
  Spikes spikes;
  int64_t* count;
  uint64_t* stray;
  int64_t sample;  // how many rows, evenly spaced, are ready before, ...
  double rate;     // ... and the share of their bits that are set
};

// out[r, :] = bias + sum of source[q, :] over the bits q that are set in row r of words.
// words [rows, words_for(bits)], source [bits, columns], out [rows, columns] float32 or bfloat16 (gather rounds once
// every 32768 bits, the others only at the end); bias [columns] or null.
struct SumRows {
  const uint64_t* words;
  const float *source, *bias;
  void* out;
  Element out_type;
  int64_t rows, bits, columns;
  int threads;
  const Unready* unready = nullptr;  // for gather: the words are not there yet, or have not been checked
};

// Packs and gathers a handful of rows in one go: from s [rows, bits], writing words (or null), or from words if s is
// null. The rest is as in SumRows, all float32.
struct GatherFew {
  const float* s;
  uint64_t* words;
  const float *source, *bias;
  float* out;
  int64_t rows, bits, columns;
  int threads;
};

// grad_weight[n, k] = sum of grad[m, n] over the rows m in which bit k is set.
// words [M, words_for(K)], grad [M, N] float32 or bfloat16, grad_weight [N, K].
struct WeightGrad {
  const uint64_t* words;
  const void* grad;
  Element grad_type;
  float* grad_weight;
  int64_t M, K, N;
  int threads;
};

// c = a b + bias. a [M, K]: float32, bfloat16 or bits; b [K, N], c [M, N]: float32 or bfloat16; bias [N] or null.
// Sums are float32. a_sums [K], or null, receives the sums of a's columns: the gradient of a bias, if a is dL/dy.
struct Matmul {
  const void *a, *b;
  const float* bias;
  void* c;
  float* a_sums;
  Element a_type, b_type, c_type;
  int64_t M, K, N;
  int threads;
};

// grad_weight [N, K] = the sum over M rows of grad[m, n] s[m, k]. s [M, K]: float32, bfloat16 or bits; grad [M, N]:
// float32 or bfloat16.
struct DenseWeightGrad {
  const void *s, *grad;
  Element s_type, grad_type;
  float* grad_weight;
  int64_t M, K, N;
  int threads;
};

// Channel group i of `groups` takes its values from the row i places back or, if `back` (the gradient), ahead, in each of
// the sequences of S rows; zeros where there is none. Widths differ by at most 1, the first groups being wider. x, out
// [sequences, S, C] of elements of `size` bytes.
struct TokenShift {
  const void* x;
  void* out;
  int64_t sequences, S, C, groups, size;
  bool back;
  int threads;
};

// x [rows, columns] -> out [columns, rows].
struct Transpose {
  const float* x;
  float* out;
  int64_t rows, columns;
  int threads;
};

}  // namespace spikedecoder

#include "decode.h"

namespace spikedecoder {

#define SPIKEDECODER_KERNELS(X)                   \
  X(lif_forward, LifForward)                      \
  X(lif_backward, LifBackward)                    \
  X(moments, Moments)                             \
  X(norm_lif_forward, NormLifForward)             \
  X(norm_lif_backward, NormLifBackward)           \
  X(attention_forward, AttentionForward)          \
  X(attention_backward, AttentionBackward)        \
  X(attention_lif_forward, AttentionLifForward)   \
  X(attention_lif_backward, AttentionLifBackward) \
  X(gather, SumRows)                              \
  X(gather_few, GatherFew)                        \
  X(gather_weight_grad, WeightGrad)               \
  X(subset_sums, SumRows)                         \
  X(subset_sums_weight_grad, WeightGrad)          \
  X(tile_sums, SumRows)                           \
  X(tile_weight_grad, WeightGrad)                 \
  X(matmul, Matmul)                               \
  X(dense_weight_grad, DenseWeightGrad)           \
  X(transpose, Transpose)                         \
  X(token_shift, TokenShift)                      \
  X(binarize, Binarize)                           \
  X(ilif_forward, IlifForward)                    \
  X(ilif_backward, IlifBackward)                  \
  X(pack, Pack)                                   \
  X(count_bits, CountBits)                        \
  X(unpack, Unpack)                               \
  X(decode, Decode)

struct Kernels {
  const char* name;
#define X(function, Arguments) void (*function)(const Arguments&);
  SPIKEDECODER_KERNELS(X)
#undef X
};

#define SPIKEDECODER_DECLARE(variant)                                   \
  namespace variant {                                                   \
  extern const Kernels kernels;                                         \
  SPIKEDECODER_KERNELS(SPIKEDECODER_DECLARE_KERNEL)                     \
  }
#define SPIKEDECODER_DECLARE_KERNEL(function, Arguments) void function(const Arguments&);
SPIKEDECODER_DECLARE(baseline)
SPIKEDECODER_DECLARE(avx2)
SPIKEDECODER_DECLARE(avx512)
SPIKEDECODER_DECLARE(amx)
#undef SPIKEDECODER_DECLARE
#undef SPIKEDECODER_DECLARE_KERNEL

}  // namespace spikedecoder
