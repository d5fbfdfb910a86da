// Tests every kernel of every variant that this CPU has, on odd shapes, against obvious loops; built with
// AddressSanitizer and UndefinedBehaviorSanitizer. Arrays are allocated with their exact size, so that a read or write
// one element too far ends the program.
//
//     cmake -G Ninja -S csrc -B build -DSPIKEDECODER_PYTHON_MODULE=OFF -DSPIKEDECODER_NATIVE_TESTS=ON
//     cmake --build build && build/test_kernels
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "kernels.h"
#include "runtime.h"

using namespace spikedecoder;

namespace {

std::mt19937 random_bits(0);
int failures = 0;

#define CHECK(condition)                                                                    \
  do {                                                                                      \
    if (!(condition)) {                                                                     \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, kernels().name, #condition);       \
      failures++;                                                                           \
    }                                                                                       \
  } while (0)

template <class T>
std::vector<T> array(int64_t n) {
  return std::vector<T>(static_cast<size_t>(n));
}

// Multiples of 1/8: sums of a few of them are exact.
std::vector<float> dyadic(int64_t n, int low = -16, int high = 32) {
  std::uniform_int_distribution<int> numbers(low, high);
  auto x = array<float>(n);
  for (float& v : x) v = static_cast<float>(numbers(random_bits)) / 8;
  return x;
}

std::vector<float> spikes(int64_t n, double rate) {
  std::bernoulli_distribution fires(rate);
  auto s = array<float>(n);
  for (float& v : s) v = fires(random_bits) ? 1.f : 0.f;
  return s;
}

bool close(float a, float b, float tolerance = 1e-4f) {
  return std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

bool close(const std::vector<float>& a, const std::vector<float>& b, float tolerance = 1e-4f) {
  for (size_t i = 0; i < b.size(); i++) {
    if (!close(a[i], b[i], tolerance)) return false;
  }
  return a.size() == b.size();
}

// To bfloat16, for numbers that need no more bits, and back.
std::vector<uint16_t> narrowed(const std::vector<float>& x) {
  std::vector<uint16_t> out;
  for (float v : x) {
    uint32_t pattern;
    std::memcpy(&pattern, &v, sizeof pattern);
    out.push_back(static_cast<uint16_t>(pattern >> 16));
  }
  return out;
}

std::vector<float> widened(const std::vector<uint16_t>& x) {
  auto out = array<float>(static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); i++) {
    const uint32_t pattern = static_cast<uint32_t>(x[i]) << 16;
    std::memcpy(&out[i], &pattern, sizeof pattern);
  }
  return out;
}

std::vector<uint64_t> packed(const std::vector<float>& s, int64_t rows, int64_t C) {
  auto words = array<uint64_t>(rows * words_for(C));
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < C; c++) {
      if (s[r * C + c] != 0) words[r * words_for(C) + c / 64] |= uint64_t{1} << (c % 64);
    }
  }
  return words;
}

void test_pack(int64_t rows, int64_t C, int threads) {
  const auto s = spikes(rows * C, 0.3);
  const auto expected = packed(s, rows, C);
  auto words = array<uint64_t>(rows * words_for(C));
  int64_t count = -1, set = 0;
  for (float v : s) set += v != 0;
  kernels().pack({s.data(), Element::float32, words.data(), &count, rows, C, threads});
  CHECK(words == expected);
  CHECK(count == set);
  count = -1;
  uint64_t stray = 1;
  kernels().count_bits({words.data(), &count, &stray, rows, C, threads});
  CHECK(count == set && !stray);
  if (rows && C % 64) {
    words.back() |= uint64_t{1} << 63;
    kernels().count_bits({words.data(), &count, &stray, rows, C, threads});
    CHECK(count == set + 1 && stray);
  }
  std::vector<uint8_t> bytes(s.begin(), s.end());
  words.assign(words.size(), 0);
  kernels().pack({bytes.data(), Element::byte, words.data(), nullptr, rows, C, threads});
  CHECK(words == expected);
  const auto halves = narrowed(s);
  words.assign(words.size(), 0);
  kernels().pack({halves.data(), Element::bfloat16, words.data(), nullptr, rows, C, threads});
  CHECK(words == expected);
  auto back = array<float>(rows * C);
  kernels().unpack({words.data(), back.data(), Element::float32, rows, C, threads});
  CHECK(back == s);
}

float threshold_at(const Threshold& t, int64_t element, int64_t C) {
  if (t.kind == ThresholdKind::scalar) return t.value;
  return t.values[t.kind == ThresholdKind::channel ? element % C : element];
}

// One neuron's potentials before firing.
std::vector<float> potentials(const Neuron& n, float threshold, float v, const std::vector<float>& x) {
  std::vector<float> hs;
  for (float current : x) {
    const float over_rest = v - (n.hard_reset ? n.v_reset : 0);
    const float h = n.decay_input ? v + (current - over_rest) / n.tau : v + current - over_rest / n.tau;
    hs.push_back(h);
    v = h >= threshold ? (n.hard_reset ? n.v_reset : h - threshold) : h;
  }
  return hs;
}

void test_lif(const Neuron& n, ThresholdKind kind, int64_t T, int64_t rows, int64_t C, int threads) {
  const int64_t step = rows * C;
  const auto x = dyadic(T * step), v_init = dyadic(step), grad = dyadic(T * step), grad_v = dyadic(step);
  const auto limits = dyadic(kind == ThresholdKind::element ? step : C, 2, 10);
  const Threshold t{kind, 0.75f, kind == ThresholdKind::scalar ? nullptr : limits.data()};
  auto s = array<float>(T * step), v = array<float>(step);
  kernels().lif_forward({n, t, Element::float32, x.data(), v_init.data(), s.data(), v.data(), T, rows, C, threads});
  for (int64_t i = 0; i < step; i++) {
    std::vector<float> current;
    for (int64_t j = 0; j < T; j++) current.push_back(x[j * step + i]);
    const float threshold = threshold_at(t, i, C);
    const auto hs = potentials(n, threshold, v_init[i], current);
    for (int64_t j = 0; j < T; j++) CHECK(s[j * step + i] == (hs[j] >= threshold ? 1.f : 0.f));
  }
  auto grad_x = array<float>(T * step), grad_v_init = array<float>(step);
  auto grad_threshold = array<float>(kind == ThresholdKind::element ? step : kind == ThresholdKind::channel ? C : 1);
  kernels().lif_backward({n, t, Element::float32, grad.data(), grad_v.data(), x.data(), v_init.data(), grad_x.data(),
                          grad_threshold.data(), grad_v_init.data(), T, rows, C, threads});
  for (float g : grad_x) CHECK(std::isfinite(g));
  for (float g : grad_threshold) CHECK(std::isfinite(g));
  // multiples of 1/8 fit in bfloat16
  const auto x16 = narrowed(x), grad16 = narrowed(grad);
  auto s16 = narrowed(s), grad_x16 = narrowed(grad_x);
  auto v16 = array<float>(step), grad_threshold16 = grad_threshold, grad_v_init16 = grad_v_init;
  kernels().lif_forward({n, t, Element::bfloat16, x16.data(), v_init.data(), s16.data(), v16.data(), T, rows, C, threads});
  CHECK(widened(s16) == s);
  CHECK(v16 == v);
  kernels().lif_backward({n, t, Element::bfloat16, grad16.data(), grad_v.data(), x16.data(), v_init.data(),
                          grad_x16.data(), grad_threshold16.data(), grad_v_init16.data(), T, rows, C, threads});
  CHECK(close(widened(grad_x16), grad_x, 4e-3f));
  CHECK(grad_v_init16 == grad_v_init);
  // without any optional argument: only the gradient of x
  kernels().lif_backward({n, t, Element::float32, grad.data(), nullptr, x.data(), nullptr, grad_x.data(), nullptr, nullptr, T, rows, C,
                          threads});
}

void test_norm_lif(NormKind kind, int64_t T, int64_t rows, int64_t C, int threads) {
  const int64_t all = T * rows * C, statistics = kind == NormKind::channel ? C : T * rows;
  const auto x = dyadic(all), weight = dyadic(C, 4, 12), bias = dyadic(C), grad = dyadic(all);
  const auto a = dyadic(C), b = dyadic(C), c = dyadic(C);
  auto mean = array<float>(statistics), rstd = array<float>(statistics), s = array<float>(all);
  if (kind == NormKind::channel) {
    auto var = array<float>(C);
    kernels().moments({Element::float32, x.data(), true, mean.data(), var.data(), T * rows, C, threads});
    for (int64_t i = 0; i < C; i++) {
      double sum = 0, squares = 0;
      for (int64_t r = 0; r < T * rows; r++) sum += x[r * C + i];
      for (int64_t r = 0; r < T * rows; r++) squares += std::pow(x[r * C + i] - sum / (T * rows), 2);
      CHECK(close(mean[i], static_cast<float>(sum / (T * rows))));
      CHECK(close(var[i], static_cast<float>(squares / (T * rows))));
      rstd[i] = 1 / std::sqrt(var[i] + 1e-5f);
    }
  }
  const Neuron n;
  const Threshold t;
  kernels().norm_lif_forward({n, t, kind, Element::float32, x.data(), weight.data(), bias.data(), 1e-5f, mean.data(), rstd.data(),
                              s.data(), T, rows, C, rows, threads});
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t i = 0; i < C; i++) {
      std::vector<float> y;
      for (int64_t j = 0; j < T; j++) {
        const int64_t r = j * rows + row, at = kind == NormKind::channel ? i : r;
        y.push_back((x[r * C + i] - mean[at]) * rstd[at] * weight[i] + bias[i]);
      }
      const auto hs = potentials(n, 1, 0, y);
      for (int64_t j = 0; j < T; j++) {
        // so near the threshold, rounding may decide about a spike
        if (std::fabs(hs[j] - 1) < 1e-4f) break;
        CHECK(s[(j * rows + row) * C + i] == (hs[j] >= 1 ? 1.f : 0.f));
      }
    }
  }
  auto grad_x = array<float>(all), grad_weight = array<float>(C), grad_bias = array<float>(C);
  auto grad_threshold = array<float>(1);
  for (int part = kind == NormKind::channel ? 1 : 0; part < (kind == NormKind::channel ? 4 : 1); part++) {
    kernels().norm_lif_backward({n, t, kind, static_cast<NormLifPart>(part), Element::float32, grad.data(), x.data(), weight.data(),
                                 bias.data(), mean.data(), rstd.data(), a.data(), b.data(), c.data(), grad_x.data(),
                                 grad_weight.data(), grad_bias.data(), grad_threshold.data(), T, rows, C, threads});
  }
  for (float g : grad_x) CHECK(std::isfinite(g));
  for (float g : grad_weight) CHECK(std::isfinite(g));
  const auto x16 = narrowed(x), grad16 = narrowed(grad);
  auto s16 = narrowed(s), grad_x16 = narrowed(grad_x);
  auto grad_weight16 = grad_weight, grad_bias16 = grad_bias;
  kernels().norm_lif_forward({n, t, kind, Element::bfloat16, x16.data(), weight.data(), bias.data(), 1e-5f, mean.data(),
                              rstd.data(), s16.data(), T, rows, C, rows, threads});
  CHECK(widened(s16) == s);
  for (int part = kind == NormKind::channel ? 1 : 0; part < (kind == NormKind::channel ? 4 : 1); part++) {
    kernels().norm_lif_backward({n, t, kind, static_cast<NormLifPart>(part), Element::bfloat16, grad16.data(),
                                 x16.data(), weight.data(), bias.data(), mean.data(), rstd.data(), a.data(), b.data(),
                                 c.data(), grad_x16.data(), grad_weight16.data(), grad_bias16.data(), nullptr, T, rows,
                                 C, threads});
  }
  CHECK(close(widened(grad_x16), grad_x, 4e-3f));
  CHECK(grad_weight16 == grad_weight);
}

void test_spike_linear(int64_t M, int64_t K, int64_t N, double rate, int threads) {
  auto s = spikes(M * K, rate);
  if (rate == 0.1) {  // rows unlike the others: one with only spikes, one with none
    std::fill_n(s.begin() + M / 3 * K, K, 1.f);
    std::fill_n(s.begin() + M / 2 * K, K, 0.f);
  }
  const auto columns = dyadic(K * N), bias = dyadic(N), grad = dyadic(M * N);
  const auto words = packed(s, M, K);
  auto y = array<float>(M * N), expected = array<float>(M * N);
  auto dw = array<float>(N * K), expected_dw = array<float>(N * K);
  for (int64_t m = 0; m < M; m++) {
    for (int64_t n = 0; n < N; n++) expected[m * N + n] = bias[n];
    for (int64_t k = 0; k < K; k++) {
      if (s[m * K + k] == 0) continue;
      for (int64_t n = 0; n < N; n++) {
        expected[m * N + n] += columns[k * N + n];
        expected_dw[n * K + k] += grad[m * N + n];
      }
    }
  }
  const auto grad16 = narrowed(grad), columns16 = narrowed(columns);
  auto y16 = array<uint16_t>(M * N);
  for (auto kernel : {kernels().gather, kernels().subset_sums, kernels().tile_sums}) {
    y.assign(y.size(), NAN);
    kernel({words.data(), columns.data(), bias.data(), y.data(), Element::float32, M, K, N, threads});
    CHECK(close(y, expected));
    kernel({words.data(), columns.data(), bias.data(), y16.data(), Element::bfloat16, M, K, N, threads});
    CHECK(close(widened(y16), expected, 4e-3f));
  }
  for (const bool packs : {false, true}) {
    const float* const values = packs ? s.data() : nullptr;
    auto ready = packs ? array<uint64_t>(M * words_for(K)) : words;
    std::copy_n(words.begin(), std::min(words.size(), static_cast<size_t>(words_for(K))), ready.begin());
    int64_t count = 0, set = 0;
    uint64_t stray = 0;
    for (float spike : s) set += spike != 0;
    const Unready unready{{values, Element::float32, ready.data(), K}, &count, &stray, 1, rate};
    y.assign(y.size(), NAN);
    kernels().gather({ready.data(), columns.data(), bias.data(), y.data(), Element::float32, M, K, N, threads,
                      &unready});
    CHECK(close(y, expected) && (!K || !N || (ready == words && count == set)) && !stray);
  }
  const std::vector<uint64_t> none(words.size());
  const std::vector<float> minus_zero(static_cast<size_t>(N), -0.f);
  kernels().gather({none.data(), columns.data(), minus_zero.data(), y.data(), Element::float32, M, K, N, threads});
  for (float value : y) CHECK(value == 0 && std::signbit(value));
  auto few_words = array<uint64_t>(M * words_for(K));
  y.assign(y.size(), NAN);
  kernels().gather_few({s.data(), few_words.data(), columns.data(), bias.data(), y.data(), M, K, N, threads});
  CHECK(close(y, expected));
  CHECK(few_words == words);
  y.assign(y.size(), NAN);
  kernels().gather_few({nullptr, few_words.data(), columns.data(), bias.data(), y.data(), M, K, N, threads});
  CHECK(close(y, expected) && few_words == words);
  for (auto kernel : {kernels().gather_weight_grad, kernels().subset_sums_weight_grad, kernels().tile_weight_grad}) {
    for (Element type : {Element::float32, Element::bfloat16}) {
      dw.assign(dw.size(), NAN);
      const void* g = type == Element::float32 ? static_cast<const void*>(grad.data()) : grad16.data();
      kernel({words.data(), g, type, dw.data(), M, K, N, threads});
      CHECK(close(dw, expected_dw));
    }
  }
  // spikes times columns, from bits and from numbers, and the sums of the spikes
  const auto s16 = narrowed(s);
  const std::pair<Element, const void*> of_s[] = {
      {Element::float32, s.data()}, {Element::bfloat16, s16.data()}, {Element::bits, words.data()}};
  for (const auto& [type, values] : of_s) {
    for (const bool wide : {true, false}) {
      dw.assign(dw.size(), NAN);
      const void* g = wide ? static_cast<const void*>(grad.data()) : grad16.data();
      const Element of_g = wide ? Element::float32 : Element::bfloat16;
      kernels().dense_weight_grad({values, g, type, of_g, dw.data(), M, K, N, threads});
      CHECK(close(dw, expected_dw));
    }
  }
  auto sums = array<float>(K), expected_sums = array<float>(K);
  for (int64_t i = 0; i < M * K; i++) expected_sums[i % K] += s[i];
  for (const auto& [type, a] : of_s) {
    y.assign(y.size(), NAN);
    kernels().matmul({a, columns.data(), bias.data(), y.data(), nullptr, type, Element::float32, Element::float32, M, K, N, threads});
    CHECK(close(y, expected));
    kernels().matmul({a, columns16.data(), bias.data(), y16.data(), sums.data(), type, Element::bfloat16,
                      Element::bfloat16, M, K, N, threads});
    CHECK(close(widened(y16), expected, 4e-3f));
    CHECK(close(sums, expected_sums));
  }
  auto transposed = array<float>(K * N);
  kernels().transpose({columns.data(), transposed.data(), K, N, threads});
  for (int64_t k = 0; k < K; k++) {
    for (int64_t n = 0; n < N; n++) CHECK(transposed[n * K + k] == columns[k * N + n]);
  }
}

void test_token_shift(int64_t sequences, int64_t S, int64_t C, int64_t groups, int threads) {
  const auto x = dyadic(sequences * S * C);
  for (const bool back : {false, true}) {
    auto out = array<float>(sequences * S * C);
    kernels().token_shift({x.data(), out.data(), sequences, S, C, groups, sizeof(float), back, threads});
    for (int64_t row = 0; row < sequences * S; row++) {
      const int64_t wide = C / groups, wider = C % groups;
      for (int64_t c = 0; c < C; c++) {
        const int64_t group = c < wider * (wide + 1) ? c / (wide + 1) : wider + (c - wider * (wide + 1)) / wide;
        const int64_t place = row % S + (back ? group : -group);
        const float expected = place >= 0 && place < S ? x[(row / S * S + place) * C + c] : 0;
        CHECK(out[row * C + c] == expected);
      }
    }
  }
}

// The definition: out[i] = scale sum_{j <= i} decay^(i-j) (r[i] . u[j]) x[j], one head of d channels.
void test_attention(int64_t T, int64_t B, int64_t S, int64_t H, int64_t d, float decay_of_all, bool integers,
                    int threads) {
  const int64_t n = T * B * S * H * d, states = T * B * H * d * d;
  const auto values = [&] { return integers ? dyadic(n) : spikes(n, 0.3); };
  const auto q = values(), k = values(), v = values(), grad = dyadic(n);
  const std::vector<float> decay(static_cast<size_t>(H), decay_of_all);
  const float* decay_or_null = decay_of_all == 1 ? nullptr : decay.data();
  auto out = array<float>(n), state = array<float>(states), s = array<float>(n);
  kernels().attention_forward({q.data(), k.data(), v.data(), decay_or_null, nullptr, 0.5f, integers, out.data(),
                               state.data(), T, B, S, H, d, threads});
  const auto at = [&](int64_t group, int64_t i) { return ((group / H * S + i) * H + group % H) * d; };
  for (int64_t group = 0; group < T * B * H; group++) {
    for (int64_t i = 0; i < S; i++) {
      std::vector<float> expected(static_cast<size_t>(d));
      for (int64_t j = 0; j <= i; j++) {
        float score = 0;
        for (int64_t c = 0; c < d; c++) score += q[at(group, i) + c] * k[at(group, j) + c];
        for (int64_t c = 0; c < d; c++) {
          expected[c] += 0.5f * score * std::pow(decay_of_all, static_cast<float>(i - j)) * v[at(group, j) + c];
        }
      }
      for (int64_t c = 0; c < d; c++) CHECK(close(out[at(group, i) + c], expected[c]));
    }
  }
  auto dq = array<float>(n), dk = array<float>(n), dv = array<float>(n);
  kernels().attention_backward({grad.data(), q.data(), k.data(), v.data(), decay_or_null, state.data(), 0.5f, integers,
                                dq.data(), dk.data(), dv.data(), T, B, S, H, d, threads});
  const auto check_gradients = [&] {
    for (const auto* g : {&dq, &dk, &dv}) {
      for (float value : *g) CHECK(std::isfinite(value));
    }
  };
  check_gradients();
  if (integers) return;
  const Threshold t;
  kernels().attention_lif_forward({Neuron{}, t, q.data(), k.data(), v.data(), decay_or_null, 0.5f, s.data(), T, B, S,
                                   H, d, threads});
  auto spikes_of_result = array<float>(n), potential = array<float>(B * S * H * d);
  kernels().lif_forward({Neuron{}, t, Element::float32, out.data(), nullptr, spikes_of_result.data(), potential.data(), T, 1,
                         B * S * H * d, threads});
  CHECK(s == spikes_of_result);
  float grad_threshold;
  kernels().attention_lif_backward({Neuron{}, t, grad.data(), q.data(), k.data(), v.data(), decay_or_null, 0.5f,
                                    dq.data(), dk.data(), dv.data(), &grad_threshold, T, B, S, H, d, threads});
  check_gradients();
}

// A small model's states, as the kernel takes them.
struct States {
  std::vector<std::vector<float>> arrays;
  std::vector<DecodeState> blocks;

  explicit States(const Decode& a) {
    const int64_t d = a.E / a.H;
    for (int64_t i = 0; i < a.blocks; i++) {
      DecodeState state{};
      state.attention = add(a.T * a.B * a.H * d * d);
      state.attention_shift = a.token_shift > 1 ? add(a.T * a.B * (a.token_shift - 1) * a.E) : nullptr;
      state.mlp_shift = a.mlp_token_shift > 1 ? add(a.T * a.B * (a.mlp_token_shift - 1) * a.E) : nullptr;
      blocks.push_back(state);
    }
  }
  float* add(int64_t n) {
    arrays.push_back(array<float>(n));
    return arrays.back().data();
  }
};

void decode_into(Decode a, const std::vector<float>& embedded, int64_t S, States& states, std::vector<float>& logits,
                 int threads) {
  a.S = S;
  a.threads = threads;
  a.embedded = embedded.data();
  a.states = states.blocks.data();
  logits.assign(static_cast<size_t>(a.B * S * a.V), NAN);
  a.logits = logits.data();
  const auto bytes = static_cast<size_t>(decode_scratch(a, threads));
  a.scratch = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  std::memset(a.scratch, 0xff, bytes);  // NaN wherever it is read before it is written
  kernels().decode(a);
  std::free(a.scratch);
}

// Tokens read together must give the same as one after the other.
void test_decode(NormKind norm, Reunite reunite, int64_t B, int64_t S, int64_t E, int64_t H, int64_t shift, int threads,
                 float levels = 0) {
  Decode a{};
  a.norm = norm;
  a.reunite = reunite;
  a.head_neuron = reunite == Reunite::final;
  a.eps = 1e-5f;
  a.scale = 0.5f;
  a.blocks = 2;
  a.T = levels > 0 ? 1 : 3;
  a.levels = levels;
  a.per_unit = 4;
  a.B = B;
  a.E = E;
  a.H = H;
  a.hidden = 2 * E + 3;
  a.V = 11;
  a.token_shift = shift;
  a.mlp_token_shift = 1;
  const auto weights = dyadic(decode_weights(a), 1, 6);
  const auto thresholds = dyadic(a.blocks * neurons_per_block + 1, 4, 10), decay = dyadic(H, 4, 8);
  auto present = array<uint8_t>(a.blocks * neurons_per_block);
  for (size_t i = 0; i < present.size(); i++) present[i] = i % neurons_per_block != block_input;
  a.weights = weights.data();
  a.thresholds = thresholds.data();
  a.present = present.data();
  a.decay = shift > 1 ? decay.data() : nullptr;

  const auto embedded = dyadic(B * S * E);
  std::vector<float> together, one;
  States all(a), stepped(a);
  decode_into(a, embedded, S, all, together, threads);
  for (int64_t i = 0; i < S; i++) {
    std::vector<float> token;
    for (int64_t b = 0; b < B; b++) {
      token.insert(token.end(), embedded.begin() + (b * S + i) * E, embedded.begin() + (b * S + i + 1) * E);
    }
    decode_into(a, token, 1, stepped, one, threads);
    for (int64_t b = 0; b < B; b++) {
      for (int64_t v = 0; v < a.V; v++) CHECK(close(together[(b * S + i) * a.V + v], one[b * a.V + v]));
    }
  }
  CHECK(all.arrays == stepped.arrays);
}

void test_binarize(int64_t n, int threads) {
  const auto x = dyadic(n), grad = dyadic(n);
  auto out = array<float>(n);
  kernels().binarize({x.data(), nullptr, out.data(), 2, n, threads});
  for (int64_t i = 0; i < n; i++) CHECK(out[i] == (x[i] >= 0 ? 1.f : 0.f));
  kernels().binarize({x.data(), grad.data(), out.data(), 2, n, threads});
  for (int64_t i = 0; i < n; i++) {
    CHECK(close(out[i], grad[i] / static_cast<float>(1 + std::pow(std::acos(-1.0) * x[i], 2))));
  }
}

void test_ilif(int64_t n, int threads) {
  const auto x = dyadic(n), grad = dyadic(n);
  auto out = array<float>(n);
  std::vector<uint8_t> mask(static_cast<size_t>(n));
  for (uint8_t* wanted : {mask.data(), static_cast<uint8_t*>(nullptr)}) {
    kernels().ilif_forward({x.data(), out.data(), wanted, 2, 3, -0.5f, 3.5f, n, threads});
    for (int64_t i = 0; i < n; i++) {
      CHECK(out[i] == std::fmin(std::fmax(std::floor(2 * x[i] + 0.5f), 0.f), 3.f));
      CHECK(mask[i] == (2 * x[i] >= -0.5f && 2 * x[i] <= 3.5f));
    }
  }
  kernels().ilif_backward({grad.data(), mask.data(), out.data(), 2, n, threads});
  for (int64_t i = 0; i < n; i++) CHECK(out[i] == (mask[i] ? 2 * grad[i] : 0.f));
}

// Channel statistics: with values that round nothing. Row statistics: the gradients of a row add up to 0.
void test_norm_ilif(int64_t rows, int64_t C, int threads) {
  Neuron n;
  n.levels = 3;
  n.scale = 2;
  n.low = -0.5f;
  n.high = 3.5f;
  const Threshold t;
  const auto x = dyadic(rows * C), weight = dyadic(C, 4, 12), bias = dyadic(C), grad = dyadic(rows * C);
  const auto a = dyadic(C), b = dyadic(C), c = dyadic(C);
  auto mean = dyadic(C), rstd = std::vector<float>(static_cast<size_t>(C), 0.5f);
  auto s = array<float>(rows * C), grad_x = s, grad_weight = array<float>(C), grad_bias = grad_weight;
  const auto forward = [&](NormKind kind) {
    kernels().norm_lif_forward({n, t, kind, Element::float32, x.data(), weight.data(), bias.data(), 1e-5f, mean.data(),
                                rstd.data(), s.data(), 1, rows, C, rows, threads});
  };
  const auto backward = [&](NormKind kind, NormLifPart part) {
    kernels().norm_lif_backward({n, t, kind, part, Element::float32, grad.data(), x.data(), weight.data(), bias.data(),
                                 mean.data(), rstd.data(), a.data(), b.data(), c.data(), grad_x.data(),
                                 grad_weight.data(), grad_bias.data(), nullptr, 1, rows, C, threads});
  };
  forward(NormKind::channel);
  for (const auto part : {NormLifPart::reduce, NormLifPart::apply, NormLifPart::known}) backward(NormKind::channel, part);
  for (int64_t i = 0; i < C; i++) {
    float sum_g = 0, sum_gz = 0;
    for (int64_t at = i; at < rows * C; at += C) {
      const float z = (x[at] - mean[i]) * rstd[i], u = 2 * (z * weight[i] + bias[i]);
      const float g = u >= n.low && u <= n.high ? 2 * grad[at] : 0;
      CHECK(s[at] == std::fmin(std::fmax(std::floor(u + 0.5f), 0.f), 3.f));
      CHECK(grad_x[at] == a[i] * g + b[i] * z + c[i]);
      sum_g += g;
      sum_gz += g * z;
    }
    CHECK(grad_bias[i] == sum_g && grad_weight[i] == sum_gz);
  }
  mean = rstd = array<float>(rows);
  forward(NormKind::row);
  backward(NormKind::row, NormLifPart::whole);
  for (int64_t row = 0; row < rows; row++) {
    double sum = 0;
    for (int64_t i = 0; i < C; i++) sum += grad_x[row * C + i];
    CHECK(std::fabs(sum) < 1e-5 * rstd[row] * C);
  }
}

void test_all() {
  for (int threads : {1, 3}) {
    for (int64_t C : {1, 15, 16, 17, 63, 64, 65, 200}) {
      test_pack(3, C, threads);
      test_norm_lif(NormKind::row, 3, 5, C, threads);
      test_norm_lif(NormKind::channel, 2, 70, C, threads);
      test_binarize(C, threads);
      test_ilif(C, threads);
      for (int64_t rows : {1, 7, 64}) test_norm_ilif(rows, C, threads);
    }
    test_pack(3000, 70, threads);
    test_binarize(50'000, threads);
    test_ilif(50'000, threads);
    for (int surrogate = 0; surrogate < 5; surrogate++) {
      for (auto kind : {ThresholdKind::scalar, ThresholdKind::channel, ThresholdKind::element}) {
        Neuron n;
        n.surrogate = static_cast<Surrogate>(surrogate);
        test_lif(n, kind, 4, 3, 37, threads);
        n.hard_reset = surrogate % 2;
        n.v_reset = n.hard_reset ? -0.5f : 0;
        n.detach_reset = false;
        n.decay_input = surrogate % 3;
        test_lif(n, kind, 17, 40, 23, threads);
      }
    }
    const int64_t shapes[][3] = {{1, 1, 1}, {3, 70, 5}, {17, 16, 16}, {50, 130, 81}, {2100, 40, 20}, {700, 65, 130},
                                 {333, 80, 80}, {1030, 256, 3}, {267, 65, 33}, {259, 64, 16}, {2100, 70, 40},
                                 {150, 200, 200}};
    for (const auto& shape : shapes) {
      for (double rate : {0.0, 0.1, 1.0}) test_spike_linear(shape[0], shape[1], shape[2], rate, threads);
    }
    for (int64_t groups : {1, 4, 9, 50}) {
      test_token_shift(3, 17, 10, groups, threads);
      test_token_shift(40, 60, 33, groups, threads);
    }
    for (float decay : {1.f, 0.75f}) {
      for (int64_t d : {1, 8, 18, 33, 64, 70}) {
        for (bool integers : {false, true}) test_attention(2, 2, 40, 3, d, decay, integers, threads);
      }
    }
  }
  for (int threads : {1, 3}) {
    test_decode(NormKind::row, Reunite::average, 1, 1, 20, 2, 1, threads);
    test_decode(NormKind::row, Reunite::concatenate, 3, 5, 36, 3, 4, threads);
    test_decode(NormKind::channel, Reunite::accumulate, 2, 9, 17, 1, 2, threads);
    test_decode(NormKind::row, Reunite::final, 5, 2, 130, 2, 3, threads);
    test_decode(NormKind::channel, Reunite::final, 3, 9, 68, 2, 3, threads, 15);
    test_decode(NormKind::row, Reunite::average, 1, 40, 33, 1, 1, threads, 3);
  }
}

}  // namespace

int main() {
  for (const char* name : variant_names) {
    if (!use_variant(name)) {
      std::printf("%s: not on this CPU\n", name);
      continue;
    }
    test_all();
    std::printf("%s: %d failures so far\n", name, failures);
  }
  return failures ? 1 : 0;
}
