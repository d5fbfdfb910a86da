// Spikes as bits: word w of a row holds channels 64 w .. 64 w + 63, bit i for channel 64 w + i.
// Threads share the rows. Bytes moved per spike, the minimum: 4 read + 1/8 written to pack float32, the other way round
// to unpack.
#include "bits.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {

namespace {

SPIKEDECODER_INLINE uint64_t word_of(const uint8_t* p, int n) {
#if defined(SPIKEDECODER_AVX512)
  const __m512i bytes = _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - n), p);
  return _mm512_test_epi8_mask(bytes, bytes);
#else
  uint64_t word = 0;
#if defined(__SSE2__)
  if (n == 64) {
    for (int i = 0; i < 64; i += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
      const int zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
      word |= static_cast<uint64_t>(~zeros & 0xffff) << i;
    }
    return word;
  }
#endif
  for (int i = 0; i < n; i++) word |= static_cast<uint64_t>(p[i] != 0) << i;
  return word;
#endif
}

template <class E>
SPIKEDECODER_INLINE uint64_t word_of(const E* p, int n) {
  return word_of_floats(p, n);
}

// How many bytes ahead spikes are prefetched: by itself, a core has too few cache lines in flight to read at the speed
// of the memory.
constexpr int64_t AHEAD = 8192;

template <class E>
void pack_from(const Pack& a, const E* values) {
  // local copies: for all the compiler knows, what is stored might change those in `a`
  const int64_t C = a.C, words = words_for(C);
  uint64_t* const out = a.words;
  const int threads = threads_for(0.2 * static_cast<double>(a.rows) * static_cast<double>(C), a.threads);
  int64_t total = 0;
  parallel(threads, [&](int thread, int all) {
    const Range rows = share(a.rows, thread, all);
    const E* from = values + rows.begin * C;
    uint64_t* to = out + rows.begin * words;
    int64_t set = 0;
    for (int64_t r = rows.begin; r < rows.end; r++, from += C) {
      for (int64_t c = 0; c < C; c += 64) {
        const char* const ahead = reinterpret_cast<const char*>(from + c) + AHEAD;
        for (size_t i = 0; i < 64 * sizeof(E); i += 64) __builtin_prefetch(ahead + i, 0, 2);
        const uint64_t word = word_of(from + c, C - c < 64 ? static_cast<int>(C - c) : 64);
        *to++ = word;
        set += __builtin_popcountll(word);
      }
    }
    __atomic_fetch_add(&total, set, __ATOMIC_RELAXED);
  });
  if (a.count) *a.count = total;
}

}  // namespace

void pack(const Pack& a) {
  switch (a.type) {
    case Element::byte: return pack_from(a, static_cast<const uint8_t*>(a.values));
    case Element::bfloat16: return pack_from(a, static_cast<const bfloat16*>(a.values));
    default: return pack_from(a, static_cast<const float*>(a.values));
  }
}

void count_bits(const CountBits& a) {
  const int64_t words = words_for(a.C);
  const uint64_t beyond = a.C % 64 ? ~uint64_t{0} << a.C % 64 : 0;
  const int threads = threads_for(0.4 * static_cast<double>(a.rows * words), a.threads);
  int64_t total = 0;
  uint64_t stray = 0;
  parallel(threads, [&](int thread, int all) {
    const Range rows = share(a.rows, thread, all);
    const uint64_t* word = a.words + rows.begin * words;
    int64_t set = 0;
    uint64_t last = 0;
    for (int64_t r = rows.begin; r < rows.end; r++) {
      for (int64_t w = 0; w < words; w++) set += __builtin_popcountll(*word++);
      if (words) last |= word[-1];
    }
    __atomic_fetch_add(&total, set, __ATOMIC_RELAXED);
    __atomic_fetch_or(&stray, last & beyond, __ATOMIC_RELAXED);
  });
  *a.count = total;
  *a.stray = stray;
}

namespace {

template <class E>
void unpack_to(const Unpack& a, E* values) {
  const int64_t words = words_for(a.C);
  const int threads = threads_for(0.2 * static_cast<double>(a.rows) * static_cast<double>(a.C), a.threads);
  parallel(threads, [&](int thread, int all) {
    const Range rows = share(a.rows, thread, all);
    for (int64_t r = rows.begin; r < rows.end; r++) {
      for (int64_t c = 0; c < a.C; c += W) {
        const uint64_t word = a.words[r * words + c / 64];
        const Mask fired = mask_of(static_cast<uint32_t>(word >> (c % 64)) & ((1u << W) - 1));
        store_spikes(values + r * a.C + c, fired, static_cast<int>(a.C - c < W ? a.C - c : W), false);
      }
    }
  });
}

}  // namespace

void unpack(const Unpack& a) {
  if (a.type == Element::float32) {
    unpack_to(a, static_cast<float*>(a.values));
  } else {
    unpack_to(a, static_cast<bfloat16*>(a.values));
  }
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
