// Dense products c = a b + bias with a small b or a narrow c, as the linear layers of a spiking model need them: for
// the gradient of their input, and for spikes too many to gather.
//
// b is copied once into panels of a few vectors of columns. A task is a chunk of rows of a times some panels. Its rows
// and a panel stay in the nearer caches, and ROWS x VECTORS sums in registers. Spikes stored as bits become numbers
// when they are copied to a tile. Products of two bfloat16 use the CPU's dot product of pairs where it has one.
// Bytes moved: a and b read once, c written once per DEPTH rows of b (once if c is bfloat16).
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "transpose.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

#if defined(SPIKEDECODER_AVX512)
constexpr int ROWS = 8, VECTORS = 3;  // 24 sums of 32 registers
#define SPIKEDECODER_DOT __attribute__((target("avx512bf16")))
#else
constexpr int ROWS = 6, VECTORS = 2;  // 12 sums of 16 registers
#endif

constexpr int64_t CHUNK = 16 * ROWS;  // rows of a whose tiles lie in the cache together, with a panel
constexpr int64_t DEPTH = 1280;       // most rows of b in a panel
// the same for an a that is stored by columns: few rows, each a long sum, so that all threads have some
constexpr int64_t COLUMNS_CHUNK = 48, COLUMNS_DEPTH = 512;
constexpr int64_t RUN = 64;           // chunks whose sums are added up before they join those before
constexpr int64_t PACKED = 16;        // rows of b that one task copies to all panels

// One block of the product: `depth` rows of b from row `first` on, as panels.
struct Block {
  const Matmul& p;
  int64_t first, depth, vectors, panels;
  bool dot, past;

  int64_t columns() const { return vectors * W; }
  int64_t chunk() const { return p.by_columns ? COLUMNS_CHUNK : CHUNK; }
  // from one row of a tile to the next, not a power of two; or from one column to the next
  int64_t stride() const { return p.by_columns ? COLUMNS_CHUNK : round_up(depth, 64) + 16; }
  int64_t tile_values() const { return round_up(p.by_columns ? depth * stride() : CHUNK * stride(), 64); }
  int64_t sums_stride() const { return round_up(p.K, 64); }  // from one chunk's sums of columns to the next
  int64_t panel_floats() const { return (dot ? (depth + 1) / 2 : depth) * columns(); }
};

template <class E>
SPIKEDECODER_INLINE F row_of_b(const Block& s, int64_t k, int64_t column) {
  const int64_t n = s.p.N - column;
  if (k >= s.depth || n <= 0) return zero();
  return load_up_to(static_cast<const E*>(s.p.b) + (s.first + k) * s.p.N + column, static_cast<int>(smaller(n, W)));
}

// Copies rows begin .. end - 1 of the block to all panels, floats [depth][vectors]. Rows are read from one end to the
// other, since reading parts that lie far apart is slow.
template <class E>
void pack_rows(const Block& s, int64_t begin, int64_t end, float* packed) {
  for (int64_t k = begin; k < end; k++) {
    float* to = packed + k * s.columns();
    for (int64_t panel = 0; panel < s.panels; panel++, to += s.panel_floats()) {
      for (int64_t j = 0; j < s.vectors; j++) store(to + j * W, row_of_b<E>(s, k, panel * s.columns() + j * W));
    }
  }
}

#if defined(SPIKEDECODER_AVX512)
// The same as pairs of bfloat16 [depth / 2][vectors][16][2]; begin is even.
void pack_pairs(const Block& s, int64_t begin, int64_t end, float* packed) {
  for (int64_t k = begin; k < end; k += 2) {
    float* to = packed + k / 2 * s.columns();
    for (int64_t panel = 0; panel < s.panels; panel++, to += s.panel_floats()) {
      for (int64_t j = 0; j < s.vectors; j++) {
        const int64_t column = panel * s.columns() + j * W;
        const __m512i even = _mm512_castps_si512(row_of_b<bfloat16>(s, k, column));
        const __m512i odd = _mm512_castps_si512(row_of_b<bfloat16>(s, k + 1, column));
        store(to + j * W, _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(even, 16), odd)));
      }
    }
  }
}
#endif

// Copies `depth` values of row r of a, from first on, as floats or bfloat16, and zeros up to the next multiple of 16.
void copy_row(const Block& s, int64_t r, float* to) {
  if (s.p.a_type == Element::bits) {
    const F one = set1(1);
    const uint64_t* words = static_cast<const uint64_t*>(s.p.a) + r * words_for(s.p.K) + s.first / 64;
    for (int64_t k = 0; k < s.depth; k += W) {
      store(to + k, keep(mask_of(static_cast<uint32_t>(words[k / 64] >> (k % 64)) & ((1u << W) - 1)), one));
    }
    return;
  }
  const int64_t at = r * s.p.K + s.first;
  for (int64_t k = 0; k < s.depth; k += W) {
    const int n = static_cast<int>(smaller(W, s.depth - k));
    store(to + k, s.p.a_type == Element::float32 ? load_up_to(static_cast<const float*>(s.p.a) + at + k, n)
                                                 : load_up_to(static_cast<const bfloat16*>(s.p.a) + at + k, n));
  }
}

#if defined(SPIKEDECODER_AVX512)
void copy_row(const Block& s, int64_t r, bfloat16* to) {
  if (s.p.a_type == Element::bits) {
    const uint64_t* words = static_cast<const uint64_t*>(s.p.a) + r * words_for(s.p.K) + s.first / 64;
    for (int64_t k = 0; k < s.depth; k += 32) {
      const __mmask32 mask = static_cast<__mmask32>(words[k / 64] >> (k % 64));
      _mm512_storeu_si512(to + k, _mm512_maskz_mov_epi16(mask, _mm512_set1_epi16(0x3f80)));
    }
    return;
  }
  const bfloat16* from = static_cast<const bfloat16*>(s.p.a) + r * s.p.K + s.first;
  memcpy(to, from, sizeof(bfloat16) * static_cast<size_t>(s.depth));
  memset(to + s.depth, 0, sizeof(bfloat16) * static_cast<size_t>(round_up(s.depth, 16) + 2 - s.depth));
}
#endif

// Copies `rows` rows of an a that is stored by columns, from row `begin` on, and zeros up to the stride.
void copy_columns(const Block& s, int64_t begin, int64_t rows, float* to) {
  const float* from = static_cast<const float*>(s.p.a) + s.first * s.p.M + begin;
  for (int64_t k = 0; k < s.depth; k++, from += s.p.M, to += s.stride()) {
    for (int64_t r = 0; r < s.stride(); r += W) {
      store(to + r, r < rows ? load_up_to(from + r, static_cast<int>(smaller(W, rows - r))) : zero());
    }
  }
}

// Where a tile's sums go.
template <class E>
struct Target {
  E* c;
  int64_t stride;
  const float* bias;
  int rows, last;  // how many rows, lanes of the last vector
  bool accumulate, past;

  template <int V>
  SPIKEDECODER_INLINE_MEMBER void write(F (&sums)[ROWS][V]) const {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      if (r >= rows) return;
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) {
        E* const to = c + r * stride + j * W;
        const int n = j < V - 1 ? W : last;
        F sum = sums[r][j];
        if (accumulate) sum = add(sum, load_up_to(to, n));
        if (bias) sum = add(sum, load_up_to(bias + j * W, n));
        store_result(to, sum, n, past);
      }
    }
  }
};

// Unrolled, like all loops over a tile's sums: a single one that is not would keep them in memory.
template <int V>
SPIKEDECODER_INLINE void clear(F (&sums)[ROWS][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) sums[r][j] = zero();
  }
}

template <int V, bool BY_COLUMNS, class E>
void tile(const float* a, int64_t stride, const float* panel, int64_t panel_stride, int64_t depth,
          const Target<E>& target) {
  F sums[ROWS][V];
  clear(sums);
  for (int64_t k = 0; k < depth; k++, panel += panel_stride) {
    F b[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) b[j] = load(panel + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const F x = set1(BY_COLUMNS ? a[k * stride + r] : a[r * stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sums[r][j] = fma(x, b[j], sums[r][j]);
    }
  }
  target.template write<V>(sums);
}

#if defined(SPIKEDECODER_AVX512)
template <int V, bool, class E>
SPIKEDECODER_DOT void tile(const bfloat16* a, int64_t stride, const float* panel, int64_t panel_stride, int64_t depth,
                           const Target<E>& target) {
  F sums[ROWS][V];
  clear(sums);
  for (int64_t k = 0; k < depth; k += 2, panel += panel_stride) {
    __m512bh b[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) b[j] = reinterpret_cast<__m512bh>(load(panel + j * W));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      int32_t pair;
      memcpy(&pair, a + r * stride + k, sizeof pair);
      const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], x, b[j]);
    }
  }
  target.template write<V>(sums);
}
#endif

// sums [depth] = the sum of the rows of a tile.
template <class A>
void add_rows(const A* tiles, int64_t stride, int64_t rows, int64_t depth, float* sums) {
  for (int64_t k = 0; k < depth; k += W) {
    F sum = zero();
    for (int64_t r = 0; r < rows; r++) sum = add(sum, load(tiles + r * stride + k));
    store(sums + k, sum);
  }
}

// Multiplies the rows of one chunk by some panels. A: the type of the tiles of a; E: the type of c.
template <class A, bool BY_COLUMNS, class E>
void multiply(const Block& s, int64_t chunk, Range panels, const float* packed, A* tiles, float* sums) {
  const int64_t begin = chunk * s.chunk(), rows = smaller(s.chunk(), s.p.M - begin), stride = s.stride();
  if constexpr (BY_COLUMNS) {
    copy_columns(s, begin, rows, tiles);
  } else {
    for (int64_t r = 0; r < rows; r++) copy_row(s, begin + r, tiles + r * stride);
    if (sums && !panels.begin) add_rows(tiles, stride, rows, s.depth, sums + chunk * s.sums_stride() + s.first);
    for (int64_t r = rows; r < round_up(rows, ROWS); r++) memset(tiles + r * stride, 0, sizeof(A) * static_cast<size_t>(stride));
  }
  for (int64_t panel = panels.begin; panel < panels.end; panel++) {
    const int64_t column = panel * s.columns(), width = smaller(s.columns(), s.p.N - column);
    const int used = static_cast<int>((width + W - 1) / W);
    for (int64_t r = 0; r < rows; r += ROWS) {
      const Target<E> target{static_cast<E*>(s.p.c) + (begin + r) * s.p.N + column, s.p.N,
                             s.p.bias && !s.first ? s.p.bias + column : nullptr,
                             static_cast<int>(smaller(ROWS, rows - r)), static_cast<int>(width - (used - 1) * W),
                             s.first > 0, s.past};
      const A* a = tiles + r * (BY_COLUMNS ? 1 : stride);
      const float* b = packed + panel * s.panel_floats();
      switch (used) {
        case 1: tile<1, BY_COLUMNS, E>(a, stride, b, s.columns(), s.depth, target); break;
        case 2: tile<2, BY_COLUMNS, E>(a, stride, b, s.columns(), s.depth, target); break;
        default: tile<VECTORS, BY_COLUMNS, E>(a, stride, b, s.columns(), s.depth, target);
      }
    }
  }
}

template <class A, bool BY_COLUMNS, class E>
void block(const Block& s, Tasks& pack_tasks, Tasks& tasks, int64_t groups, float* packed, A* tiles,
           float* sums) {
  for (int64_t task; pack_tasks.next(task);) {
    const int64_t begin = task * PACKED, end = smaller(begin + PACKED, s.depth);
#if defined(SPIKEDECODER_AVX512)
    if (s.dot) {
      pack_pairs(s, begin, end, packed);
      continue;
    }
#endif
    if (s.p.b_type == Element::float32) {
      pack_rows<float>(s, begin, end, packed);
    } else {
      pack_rows<bfloat16>(s, begin, end, packed);
    }
  }
  barrier();
  for (int64_t task; tasks.next(task);) {
    const Range panels = share(s.panels, static_cast<int>(task % groups), static_cast<int>(groups));
    multiply<A, BY_COLUMNS, E>(s, task / groups, panels, packed, tiles, sums);
  }
  finish_stores();
}

template <class A, bool BY_COLUMNS = false>
void multiply_all(const Matmul& p, bool dot) {
  const int64_t vectors_in_all = (p.N + W - 1) / W, panels = (vectors_in_all + VECTORS - 1) / VECTORS;
  const int64_t vectors = (vectors_in_all + panels - 1) / panels;
  const double work = (dot ? 0.01 : 0.02) * (16 / W) * static_cast<double>(p.M * p.N) * static_cast<double>(p.K);
  const int threads = threads_for(work, p.threads);
  const int64_t rows = BY_COLUMNS ? COLUMNS_CHUNK : CHUNK, chunks = (p.M + rows - 1) / rows;
  int64_t groups = 1;  // of panels: more until each thread has some tasks to choose from
  while (chunks * groups < 4 * threads && groups < panels) groups++;
  // sums that are rounded when they are stored must be stored only once
  const int64_t most = BY_COLUMNS ? COLUMNS_DEPTH : DEPTH, blocks = (p.K + most - 1) / most;
  const int64_t depth = p.c_type == Element::float32 ? smaller(p.K, round_up((p.K + blocks - 1) / blocks, 64)) : p.K;
  Block s{p, 0, depth, vectors, panels, dot, false};
  s.past = depth == p.K && (p.c_type == Element::float32
                                ? past_cache(static_cast<float*>(p.c), p.M * p.N, p.N)
                                : past_cache(static_cast<bfloat16*>(p.c), p.M * p.N, p.N));
  const int64_t own = s.tile_values();
  Scratch packed(sizeof(float) * static_cast<size_t>(s.panel_floats() * panels));
  Scratch tiles(sizeof(A) * static_cast<size_t>(own * threads));
  // one per chunk, so that they do not depend on which thread took it
  Scratch chunk_sums(sizeof(float) * static_cast<size_t>(p.a_sums ? chunks * s.sums_stride() : 0));
  float* const sums = p.a_sums ? chunk_sums.floats() : nullptr;
  for (; s.first < p.K; s.first += depth) {
    s.depth = smaller(depth, p.K - s.first);
    Tasks pack_tasks((s.depth + PACKED - 1) / PACKED), tasks(chunks * groups);
    team(threads, [&](int thread, int) {
      A* const mine = static_cast<A*>(tiles.get()) + own * thread;
      if (BY_COLUMNS || p.c_type == Element::float32) {
        block<A, BY_COLUMNS, float>(s, pack_tasks, tasks, groups, packed.floats(), mine, sums);
      } else {
        block<A, false, bfloat16>(s, pack_tasks, tasks, groups, packed.floats(), mine, sums);
      }
    });
  }
  for (int64_t k = 0; sums && k < p.K; k += W) {
    F sum = zero();
    for (int64_t first = 0; first < chunks; first += RUN) {  // there may be 100 000 chunks
      F run = zero();
      const int64_t end = smaller(first + RUN, chunks);
      for (int64_t chunk = first; chunk < end; chunk++) run = add(run, load(sums + chunk * s.sums_stride() + k));
      sum = add(sum, run);
    }
    store_up_to(p.a_sums + k, sum, static_cast<int>(smaller(W, p.K - k)));
  }
}

}  // namespace

void matmul(const Matmul& p) {
  if (!p.M || !p.N) {
    for (int64_t k = 0; p.a_sums && k < p.K; k++) p.a_sums[k] = 0;
    return;
  }
#if defined(SPIKEDECODER_AVX512)
  if (p.K && p.a_type != Element::float32 && p.b_type == Element::bfloat16 && bfloat16_products()) {
    return multiply_all<bfloat16>(p, true);
  }
#endif
  if (p.K && p.by_columns) return multiply_all<float, true>(p, false);
  if (p.K) return multiply_all<float>(p, false);
  for (int64_t i = 0; i < p.M * p.N; i++) {
    const F start = set1(p.bias ? p.bias[i % p.N] : 0);
    if (p.c_type == Element::float32) {
      store_n(static_cast<float*>(p.c) + i, start, 1);
    } else {
      store_n(static_cast<bfloat16*>(p.c) + i, start, 1);
    }
  }
}

void matmul_weight_grad(const WeightGrad& a) {
  if (!a.K || !a.N) return;
  Scratch bits(sizeof(uint64_t) * static_cast<size_t>(a.K * words_for(a.M) + 1));
  Scratch by_channel(sizeof(float) * static_cast<size_t>(a.K * a.N));  // [K, N]
  uint64_t* const transposed = static_cast<uint64_t*>(bits.get());
  const double work = 0.3 * static_cast<double>(a.M) * static_cast<double>(a.K);
  parallel(threads_for(work, a.threads),
           [&](int thread, int threads) { transpose_bits(a.words, a.M, a.K, transposed, thread, threads); });
  matmul({transposed, a.grad, nullptr, by_channel.get(), nullptr, Element::bits, a.grad_type, Element::float32, a.K, a.M, a.N,
          a.threads});
  transpose({by_channel.floats(), a.grad_weight, a.K, a.N, a.threads});
}

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
