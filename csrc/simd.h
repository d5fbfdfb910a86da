// One vector of floats, in three widths.
//
// Every kernel source is compiled once per variant, with SPIKEDECODER_VARIANT naming the namespace and the compiler's
// target flags set for these objects alone (see CMakeLists.txt). Code for a newer CPU must never be linked into the
// path of an older one. Kernel sources therefore include nothing with external inline functions (of the C++ standard
// library only <type_traits>), and all they define is in the variant's namespace or has internal linkage. A test checks
// this in the object files.
//
// `F` holds W floats, `Mask` one truth value per lane. load_n/store_n touch only the first n lanes (n <= W; lanes that
// are not loaded are 0). The compiler contracts no a * b + c: fma() is called where it is wanted, which the baseline
// computes with two roundings. fma_where(m, a, b, c) is a * b + c in the lanes of m, c in the others (for finite b).
#pragma once

#include <stdint.h>
#include <string.h>

#include "runtime.h"

#if defined(SPIKEDECODER_AVX512) || defined(SPIKEDECODER_AVX2)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(SPIKEDECODER_SANITIZED)  // much less code to instrument, with the same checks
#define SPIKEDECODER_ALWAYS_INLINE
#else
#define SPIKEDECODER_ALWAYS_INLINE __attribute__((always_inline))
#endif
#define SPIKEDECODER_INLINE static inline SPIKEDECODER_ALWAYS_INLINE
#define SPIKEDECODER_INLINE_MEMBER inline SPIKEDECODER_ALWAYS_INLINE
#define SPIKEDECODER_INLINE_LAMBDA SPIKEDECODER_ALWAYS_INLINE
#define SPIKEDECODER_OUTLINE_MEMBER __attribute__((noinline))
#define SPIKEDECODER_OUTLINE static SPIKEDECODER_OUTLINE_MEMBER

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

#if defined(SPIKEDECODER_AVX512)

constexpr int W = 16;
using F = __m512;
using Mask = __mmask16;

SPIKEDECODER_INLINE Mask first_n(int n) { return static_cast<Mask>((1u << n) - 1); }
SPIKEDECODER_INLINE F zero() { return _mm512_setzero_ps(); }
SPIKEDECODER_INLINE F set1(float a) { return _mm512_set1_ps(a); }
SPIKEDECODER_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
SPIKEDECODER_INLINE F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_n(n), p); }
SPIKEDECODER_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
SPIKEDECODER_INLINE void store_n(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first_n(n), a); }
SPIKEDECODER_INLINE void stream(float* p, F a) { _mm512_stream_ps(p, a); }
SPIKEDECODER_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
SPIKEDECODER_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
SPIKEDECODER_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
SPIKEDECODER_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
SPIKEDECODER_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
SPIKEDECODER_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
SPIKEDECODER_INLINE F abs(F a) { return _mm512_abs_ps(a); }
SPIKEDECODER_INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
SPIKEDECODER_INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
SPIKEDECODER_INLINE Mask ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
SPIKEDECODER_INLINE Mask not_ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NGE_UQ); }
SPIKEDECODER_INLINE F fma_where(Mask m, F a, F b, F c) { return _mm512_mask3_fmadd_ps(a, b, c, m); }
SPIKEDECODER_INLINE Mask not_zero(F a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
SPIKEDECODER_INLINE F select(Mask m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
SPIKEDECODER_INLINE F keep(Mask m, F a) { return _mm512_maskz_mov_ps(m, a); }
SPIKEDECODER_INLINE F drop(Mask m, F a) { return _mm512_mask_mov_ps(a, m, _mm512_setzero_ps()); }
SPIKEDECODER_INLINE uint32_t bits(Mask m) { return m; }
SPIKEDECODER_INLINE Mask mask_of(uint32_t bits) { return static_cast<Mask>(bits); }

#elif defined(SPIKEDECODER_AVX2)

constexpr int W = 8;
using F = __m256;
using Mask = __m256;

SPIKEDECODER_INLINE __m256i first_n(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SPIKEDECODER_INLINE F zero() { return _mm256_setzero_ps(); }
SPIKEDECODER_INLINE F set1(float a) { return _mm256_set1_ps(a); }
SPIKEDECODER_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
SPIKEDECODER_INLINE F load_n(const float* p, int n) { return _mm256_maskload_ps(p, first_n(n)); }
SPIKEDECODER_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
SPIKEDECODER_INLINE void store_n(float* p, F a, int n) { _mm256_maskstore_ps(p, first_n(n), a); }
SPIKEDECODER_INLINE void stream(float* p, F a) { _mm256_stream_ps(p, a); }
SPIKEDECODER_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
SPIKEDECODER_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
SPIKEDECODER_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
SPIKEDECODER_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
SPIKEDECODER_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
SPIKEDECODER_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
SPIKEDECODER_INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
SPIKEDECODER_INLINE F minus_abs(F a) { return _mm256_or_ps(_mm256_set1_ps(-0.f), a); }
SPIKEDECODER_INLINE F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a 2^n for whole n, where neither a nor the result is 0 or denormal
SPIKEDECODER_INLINE F scale_by_exp2(F a, F n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
SPIKEDECODER_INLINE float sum(F a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
SPIKEDECODER_INLINE Mask ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
SPIKEDECODER_INLINE Mask not_ge(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NGE_UQ); }
SPIKEDECODER_INLINE F fma_where(Mask m, F a, F b, F c) { return _mm256_fmadd_ps(_mm256_and_ps(m, a), b, c); }
SPIKEDECODER_INLINE Mask not_zero(F a) { return _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NEQ_UQ); }
SPIKEDECODER_INLINE F select(Mask m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
SPIKEDECODER_INLINE F keep(Mask m, F a) { return _mm256_and_ps(m, a); }
SPIKEDECODER_INLINE F drop(Mask m, F a) { return _mm256_andnot_ps(m, a); }
SPIKEDECODER_INLINE uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
SPIKEDECODER_INLINE Mask mask_of(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane));
}

#else  // any CPU: the compiler's own vectors of four floats (SSE2, NEON, or scalar code)

constexpr int W = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));

SPIKEDECODER_INLINE F zero() { return F{0, 0, 0, 0}; }
SPIKEDECODER_INLINE F set1(float a) { return F{a, a, a, a}; }
SPIKEDECODER_INLINE F load(const float* p) {
  F a;
  memcpy(&a, p, sizeof a);
  return a;
}
SPIKEDECODER_INLINE F load_n(const float* p, int n) {
  F a = zero();
  memcpy(&a, p, sizeof(float) * static_cast<size_t>(n));
  return a;
}
SPIKEDECODER_INLINE void store(float* p, F a) { memcpy(p, &a, sizeof a); }
SPIKEDECODER_INLINE void store_n(float* p, F a, int n) { memcpy(p, &a, sizeof(float) * static_cast<size_t>(n)); }
SPIKEDECODER_INLINE void stream(float* p, F a) {
#if defined(__SSE2__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(a));
#else
  store(p, a);
#endif
}
SPIKEDECODER_INLINE F add(F a, F b) { return a + b; }
SPIKEDECODER_INLINE F sub(F a, F b) { return a - b; }
SPIKEDECODER_INLINE F mul(F a, F b) { return a * b; }
SPIKEDECODER_INLINE F div(F a, F b) { return a / b; }
SPIKEDECODER_INLINE F fma(F a, F b, F c) { return a * b + c; }
SPIKEDECODER_INLINE F bitwise_and(Mask m, F a) { return reinterpret_cast<F>(m & reinterpret_cast<Mask>(a)); }
SPIKEDECODER_INLINE F select(Mask m, F a, F b) {
  return reinterpret_cast<F>((m & reinterpret_cast<Mask>(a)) | (~m & reinterpret_cast<Mask>(b)));
}
SPIKEDECODER_INLINE F max(F a, F b) { return select(a > b, a, b); }
SPIKEDECODER_INLINE F abs(F a) { return bitwise_and(Mask{} + 0x7fffffff, a); }
SPIKEDECODER_INLINE F minus_abs(F a) {
  return reinterpret_cast<F>(reinterpret_cast<Mask>(a) | reinterpret_cast<Mask>(set1(-0.f)));
}
// Exact for |a| < 2^22, to the nearest, ties to even: adding 1.5 * 2^23 leaves no fraction bits.
SPIKEDECODER_INLINE F round(F a) { return (a + set1(12582912.f)) - set1(12582912.f); }
SPIKEDECODER_INLINE F scale_by_exp2(F a, F n) {
  Mask exponent;
  for (int i = 0; i < W; i++) exponent[i] = n[i] == n[i] ? static_cast<int32_t>(n[i]) * (1 << 23) : 0;
  return reinterpret_cast<F>(reinterpret_cast<Mask>(a) + exponent);
}
SPIKEDECODER_INLINE float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
SPIKEDECODER_INLINE Mask ge(F a, F b) { return a >= b; }
SPIKEDECODER_INLINE Mask not_ge(F a, F b) { return ~(a >= b); }
SPIKEDECODER_INLINE F fma_where(Mask m, F a, F b, F c) { return bitwise_and(m, a) * b + c; }
SPIKEDECODER_INLINE Mask not_zero(F a) { return a != zero(); }
SPIKEDECODER_INLINE F keep(Mask m, F a) { return bitwise_and(m, a); }
SPIKEDECODER_INLINE F drop(Mask m, F a) { return bitwise_and(~m, a); }
SPIKEDECODER_INLINE uint32_t bits(Mask m) {
#if defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(m)));
#else
  return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
#endif
}
SPIKEDECODER_INLINE Mask mask_of(uint32_t bits) {
  const Mask lane = {1, 2, 4, 8};
  return ((Mask{} + static_cast<int32_t>(bits)) & lane) == lane;
}

#endif

// A float of which only the upper 16 bits are stored. Read and written as vectors of floats; on writing, numbers are
// rounded to nearest, ties to even, as in torch. Denormal numbers may become 0.
struct bfloat16 {
  uint16_t bits;
};

#if defined(SPIKEDECODER_AVX512)

SPIKEDECODER_INLINE F widen(__m256i a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}
SPIKEDECODER_INLINE __m256i narrow(F a) {
  if (rounds_to_bfloat16) {
    __m256i rounded;
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(a));
    return rounded;
  }
  const __m512i x = _mm512_castps_si512(a);
  const __mmask16 odd = _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x10000));
  const __mmask16 number = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
  __m512i rounded = _mm512_mask_add_epi32(_mm512_or_si512(x, _mm512_set1_epi32(0x400000)), number, x, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_sub_epi32(rounded, odd & number, rounded, _mm512_set1_epi32(-1));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
SPIKEDECODER_INLINE F load(const bfloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SPIKEDECODER_INLINE F load_n(const bfloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first_n(n), p)); }
SPIKEDECODER_INLINE void store(bfloat16* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
SPIKEDECODER_INLINE void store_n(bfloat16* p, F a, int n) { _mm256_mask_storeu_epi16(p, first_n(n), narrow(a)); }
SPIKEDECODER_INLINE void stream(bfloat16* p, F a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a));
}

#else

#if defined(SPIKEDECODER_AVX2)

SPIKEDECODER_INLINE F load(const bfloat16* p) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
SPIKEDECODER_INLINE __m128i narrow(F a) {
  const __m256i x = _mm256_castps_si256(a), upper = _mm256_srli_epi32(x, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(x, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08));
}
SPIKEDECODER_INLINE void store(bfloat16* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
SPIKEDECODER_INLINE void stream(bfloat16* p, F a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }

#else

SPIKEDECODER_INLINE F load(const bfloat16* p) {
  uint32_t wide[W];
  for (int i = 0; i < W; i++) wide[i] = static_cast<uint32_t>(p[i].bits) << 16;
  F a;
  memcpy(&a, wide, sizeof a);
  return a;
}
SPIKEDECODER_INLINE void store(bfloat16* p, F a) {
  uint32_t wide[W];
  memcpy(wide, &a, sizeof a);
  for (int i = 0; i < W; i++) {
    const uint32_t x = wide[i], rounded = (x + 0x7fffu + (x >> 16 & 1)) >> 16;
    const bool nan = (x & 0x7fffffffu) > 0x7f800000u;
    p[i].bits = static_cast<uint16_t>(nan ? x >> 16 | 0x40 : rounded);
  }
}
SPIKEDECODER_INLINE void stream(bfloat16* p, F a) { store(p, a); }

#endif

SPIKEDECODER_INLINE F load_n(const bfloat16* p, int n) {
  bfloat16 there[W] = {};
  memcpy(there, p, sizeof(bfloat16) * static_cast<size_t>(n));
  return load(there);
}
SPIKEDECODER_INLINE void store_n(bfloat16* p, F a, int n) {
  bfloat16 all[W];
  store(all, a);
  memcpy(p, all, sizeof(bfloat16) * static_cast<size_t>(n));
}

#endif

// Load or store the first n lanes; hot loops pass the constant n = W.
template <class E>
SPIKEDECODER_INLINE F load_up_to(const E* p, int n) {
  return n >= W ? load(p) : load_n(p, n);
}
template <class E>
SPIKEDECODER_INLINE void store_up_to(E* p, F a, int n) {
  if (n >= W) {
    store(p, a);
  } else {
    store_n(p, a, n);
  }
}

// Whether an output of n values, in rows of `columns`, is to be written past the caches: it is too large to stay there,
// and a cache line that is written as a whole need not be read first. Only if all of its vectors are whole and aligned.
template <class E>
SPIKEDECODER_INLINE bool past_cache(const E* out, int64_t n, int64_t columns) {
  constexpr int64_t LARGE = (16 << 20) / sizeof(E);
  return n >= LARGE && columns % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// Stores the first n lanes of an output; `past` is what past_cache returned for it.
template <class E>
SPIKEDECODER_INLINE void store_result(E* p, F a, int n, bool past) {
  if (past) {
    stream(p, a);
  } else {
    store_up_to(p, a, n);
  }
}

// Stores 1 in the lanes that fired and 0 in the others, as store_result does.
SPIKEDECODER_INLINE void store_spikes(float* p, Mask fired, int n, bool past) {
  store_result(p, keep(fired, set1(1)), n, past);
}
SPIKEDECODER_INLINE void store_spikes(bfloat16* p, Mask fired, int n, bool past) {
#if defined(SPIKEDECODER_AVX512)
  const __m256i spikes = _mm256_maskz_set1_epi16(fired, 0x3f80);
  if (past) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), spikes);
  } else if (n >= W) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), spikes);
  } else {
    _mm256_mask_storeu_epi16(p, first_n(n), spikes);
  }
#else
  store_result(p, keep(fired, set1(1)), n, past);
#endif
}

// Four numbers, one for each of four vectors, with the compiler's own arithmetic.
typedef float Four __attribute__((vector_size(16)));

SPIKEDECODER_INLINE Four sqrt(Four a) {
#if defined(__SSE2__)
  return reinterpret_cast<Four>(_mm_sqrt_ps(reinterpret_cast<__m128>(a)));
#else
  for (int i = 0; i < 4; i++) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

// For each of four vectors, the sum of its lanes.
SPIKEDECODER_INLINE Four lane_sums(const F (&a)[4]) {
#if defined(SPIKEDECODER_AVX512)
  const F low = add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  const F high = add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  const __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
  const F four = add(_mm512_castpd_ps(_mm512_unpacklo_pd(l, h)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  return reinterpret_cast<Four>(_mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
#else
  return Four{sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])};
#endif
}

// How many vectors are processed at once, so that work on one hides the latency of another.
template <int U>
struct Vectors {
  static constexpr int count = U;
};
#if defined(SPIKEDECODER_AVX512)
constexpr int AT_ONCE = 4, BACK_AT_ONCE = 2;
#elif defined(SPIKEDECODER_LEAN)  // quickly compiled rather than fast
constexpr int AT_ONCE = 1, BACK_AT_ONCE = 1;
#else
constexpr int AT_ONCE = 2, BACK_AT_ONCE = 2;  // with half as many registers
#endif

// body(Vectors<vectors>) for a number of vectors <= Most that is only known at run time.
template <int Most, class Body>
SPIKEDECODER_INLINE void with_vectors(int64_t vectors, const Body& body) {
  if constexpr (Most == 1) {
    body(Vectors<1>{});
  } else if (vectors == Most) {
    body(Vectors<Most>{});
  } else {
    with_vectors<Most - 1>(vectors, body);
  }
}

// body(Vectors<U>, channel, lanes of each vector) over C channels; fewer than W lanes only in the last vector. The
// parts have similar sizes: a single vector would wait for its own results, so five are taken as three and two.
template <int Most = AT_ONCE, class Body>
SPIKEDECODER_INLINE void for_channels_evenly(int64_t C, const Body& body) {
  for (int64_t c = 0; c < C;) {
    const int64_t left = (C - c) / W;  // whole ones
    const int64_t vectors = left >= 2 * Most || left == Most ? Most : left > Most ? (left + 1) / 2 : left ? left : 1;
    with_vectors<Most>(vectors, [&](auto known) SPIKEDECODER_INLINE_LAMBDA {
      body(known, c, decltype(known)::count > 1 || left ? W : static_cast<int>(C - c));
    });
    c += vectors * W;
  }
}

// 2^-|a / EXP2_PARTS|, but never below 2^-110, so that products with it are not denormal numbers, which are slow. Keeps
// a NaN: max then returns its second argument. For gradients only, since it uses fma. Each step is done for U vectors
// before the next, which depends on it.
#if defined(SPIKEDECODER_AVX512)
// a = n + r with n whole. 2^(r / 16) = 1 + r p(r), accurate to 4.3e-7. 2^(n / 16) is one of sixteen numbers, looked up
// by the last four bits of n, with the bits above these added to its exponent. (The same addition adds the four bits to
// the mantissa; the table's numbers have that subtracted.) After 1.5 * 2^23 is added to a number, its last bits are n.
constexpr float EXP2_PARTS = 16;
alignas(64) constexpr uint32_t POWERS_OF_2[16] = {
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
      0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d,
};
template <int U>
SPIKEDECODER_INLINE void exp2_of_minus_abs(F (&a)[U]) {
  const F shift = set1(12582912.f), powers = _mm512_load_ps(POWERS_OF_2);
  F r[U], p[U];
  __m512i n[U];
  for (int u = 0; u < U; u++) a[u] = max(set1(-110 * EXP2_PARTS), _mm512_or_ps(set1(-0.f), a[u]));
  for (int u = 0; u < U; u++) p[u] = add(a[u], shift);
  for (int u = 0; u < U; u++) n[u] = _mm512_castps_si512(p[u]);
  for (int u = 0; u < U; u++) r[u] = sub(a[u], sub(p[u], shift));
  for (int u = 0; u < U; u++) p[u] = fma(set1(9.3842e-4f), r[u], set1(4.332424e-2f));
  for (int u = 0; u < U; u++) p[u] = mul(p[u], r[u]);
  for (int u = 0; u < U; u++) {
    const __m512i power = _mm512_castps_si512(_mm512_permutexvar_ps(n[u], powers));
    a[u] = _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(n[u], 23 - 4)));
  }
  for (int u = 0; u < U; u++) a[u] = fma(p[u], a[u], a[u]);
}
#else
constexpr float EXP2_PARTS = 1;
template <int U>
SPIKEDECODER_INLINE void exp2_of_minus_abs(F (&a)[U]) {
  F r[U], p[U], n[U];
  for (int u = 0; u < U; u++) a[u] = max(set1(-110.f), minus_abs(a[u]));
  for (int u = 0; u < U; u++) n[u] = round(a[u]);
  for (int u = 0; u < U; u++) r[u] = sub(a[u], n[u]);
  for (int u = 0; u < U; u++) p[u] = fma(set1(1.3400432165e-3f), r[u], set1(9.6721717360e-3f));
  for (int u = 0; u < U; u++) p[u] = fma(p[u], r[u], set1(5.5503272142e-2f));
  for (int u = 0; u < U; u++) p[u] = fma(p[u], r[u], set1(2.4022228148e-1f));
  for (int u = 0; u < U; u++) p[u] = fma(p[u], r[u], set1(6.9314720671e-1f));
  for (int u = 0; u < U; u++) p[u] = fma(p[u], r[u], set1(1.f));
  for (int u = 0; u < U; u++) a[u] = scale_by_exp2(p[u], n[u]);
}
#endif
SPIKEDECODER_INLINE F exp2_of_minus_abs(F a) {
  F one[1] = {a};
  exp2_of_minus_abs(one);
  return one[0];
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
