// Dense products c = a b + bias with a small b or a narrow c, as the linear layers of a spiking model need them: for
// the gradient of their input, and for spikes too many to gather.
//
// b is copied once into panels of a few vectors of columns. A task is a chunk of rows of a times some panels. Its rows
// and a panel stay in the nearer caches, and ROWS x VECTORS sums in registers. Spikes stored as bits become numbers
// when they are copied to a tile. Products of two bfloat16 use the CPU's dot product of pairs where it has one.
// Bytes moved: a and b read once, c written once per DEPTH rows of b (once if c is bfloat16).
#include <type_traits>

#include "kernels.h"
#include "matmul_tile.h"
#include "parallel.h"
#include "simd.h"

namespace spikedecoder {
namespace SPIKEDECODER_VARIANT {
namespace {

constexpr int64_t CHUNK = 16 * ROWS;  // rows of a whose tiles lie in the cache together, with a panel
constexpr int64_t DEPTH = 1280;       // most rows of b in a panel
constexpr int64_t RUN = 64;           // chunks whose sums are added up before they join those before
constexpr int64_t PACKED = 16;        // rows of b that one task copies to all panels

// One block of the product: `depth` rows of b from row `first` on, as panels.
struct Block {
  const Matmul& p;
  int64_t first, depth, vectors, panels;
  bool dot, past;

  int64_t columns() const { return vectors * W; }
  int64_t stride() const { return round_up(depth, 64) + 16; }  // from one row of a tile to the next, not a power of two
  int64_t tile_values() const { return round_up(CHUNK * stride(), 64); }
  int64_t sums_stride() const { return round_up(p.K, 64); }  // from one chunk's sums of columns to the next
  int64_t panel_floats() const { return (dot ? (depth + 1) / 2 : depth) * columns(); }
};

template <Element type>
SPIKEDECODER_INLINE F row_of_b(const Block& s, int64_t k, int64_t column) {
  const int64_t n = s.p.N - column;
  return k >= s.depth || n <= 0 ? zero() : row_part<type>(s.p.b, s.first + k, s.p.N, column, n);
}

// Copies rows begin .. end - 1 of the block to all panels, floats [depth][vectors]. Rows are read from one end to the
// other, since reading parts that lie far apart is slow.
template <Element type>
void pack_rows(const Block& s, int64_t begin, int64_t end, float* packed) {
  for (int64_t k = begin; k < end; k++) {
    float* to = packed + k * s.columns();
    for (int64_t panel = 0; panel < s.panels; panel++, to += s.panel_floats()) {
      for (int64_t j = 0; j < s.vectors; j++) store(to + j * W, row_of_b<type>(s, k, panel * s.columns() + j * W));
    }
  }
}

#if defined(SPIKEDECODER_AVX512)
// The same as pairs of bfloat16 [depth / 2][vectors][16][2]; begin is even.
void pack_pairs(const Block& s, int64_t begin, int64_t end, float* packed) {
  constexpr Element type = Element::bfloat16;
  for (int64_t k = begin; k < end; k += 2) {
    float* to = packed + k / 2 * s.columns();
    for (int64_t panel = 0; panel < s.panels; panel++, to += s.panel_floats()) {
      for (int64_t j = 0; j < s.vectors; j++) {
        const int64_t column = panel * s.columns() + j * W;
        store(to + j * W, pairs_of(row_of_b<type>(s, k, column), row_of_b<type>(s, k + 1, column)));
      }
    }
  }
}
#endif

template <Element type>
void copy_parts(const Block& s, int64_t r, float* to) {
  for (int64_t k = 0; k < s.depth; k += W) {
    prefetch_part<type>(s.p.a, r + AHEAD, s.p.K, s.first + k);
    store(to + k, row_part<type>(s.p.a, r, s.p.K, s.first + k, s.depth - k));
  }
}

// Copies `depth` values of row r of a, from first on, as floats or bfloat16, and zeros up to the next multiple of 16.
void copy_row(const Block& s, int64_t r, float* to) {
  if (s.p.a_type == Element::float32) return copy_parts<Element::float32>(s, r, to);
  if (s.p.a_type == Element::bits) return copy_parts<Element::bits>(s, r, to);
  copy_parts<Element::bfloat16>(s, r, to);
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
template <class A, class E>
void multiply(const Block& s, int64_t chunk, Range panels, const float* packed, A* tiles, float* sums) {
  // what the loop over a tile takes as one value: a float, or a pair of bfloat16
  using Value = std::conditional_t<std::is_same_v<A, float>, float, Pair>;
  constexpr int64_t each = sizeof(Value) / sizeof(A);
  const int64_t begin = chunk * CHUNK, rows = smaller(CHUNK, s.p.M - begin), stride = s.stride();
  for (int64_t r = 0; r < rows; r++) copy_row(s, begin + r, tiles + r * stride);
  if (sums && !panels.begin) add_rows(tiles, stride, rows, s.depth, sums + chunk * s.sums_stride() + s.first);
  for (int64_t r = rows; r < round_up(rows, ROWS); r++) memset(tiles + r * stride, 0, sizeof(A) * static_cast<size_t>(stride));
  for (int64_t panel = panels.begin; panel < panels.end; panel++) {
    const int64_t column = panel * s.columns(), width = smaller(s.columns(), s.p.N - column);
    const int used = static_cast<int>((width + W - 1) / W);
    for (int64_t r = 0; r < rows; r += ROWS) {
      const Target<E> target{static_cast<E*>(s.p.c) + (begin + r) * s.p.N + column, s.p.N,
                             s.p.bias && !s.first ? s.p.bias + column : nullptr,
                             static_cast<int>(smaller(ROWS, rows - r)), static_cast<int>(width - (used - 1) * W),
                             s.first > 0, s.past};
      tile_of(used, reinterpret_cast<const Value*>(tiles + r * stride), ByRows{stride / each},
              packed + panel * s.panel_floats(), s.columns(), (s.depth + each - 1) / each, target);
    }
  }
}

template <class A, class E>
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
      pack_rows<Element::float32>(s, begin, end, packed);
    } else {
      pack_rows<Element::bfloat16>(s, begin, end, packed);
    }
  }
  barrier();
  for (int64_t task; tasks.next(task);) {
    const Range panels = share(s.panels, static_cast<int>(task % groups), static_cast<int>(groups));
    multiply<A, E>(s, task / groups, panels, packed, tiles, sums);
  }
  finish_stores();
}

template <class A>
void multiply_all(const Matmul& p, bool dot) {
  const int64_t vectors_in_all = (p.N + W - 1) / W, panels = (vectors_in_all + VECTORS - 1) / VECTORS;
  const int64_t vectors = (vectors_in_all + panels - 1) / panels;
  const double work = (dot ? 0.01 : 0.02) * (16 / W) * static_cast<double>(p.M * p.N) * static_cast<double>(p.K);
  const int threads = threads_for(work, p.threads);
  const int64_t chunks = (p.M + CHUNK - 1) / CHUNK;
  int64_t groups = 1;  // of panels: more until each thread has some tasks to choose from
  while (chunks * groups < 4 * threads && groups < panels) groups++;
  // sums that are rounded when they are stored must be stored only once
  const int64_t blocks = (p.K + DEPTH - 1) / DEPTH;
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
      if (p.c_type == Element::float32) {
        block<A, float>(s, pack_tasks, tasks, groups, packed.floats(), mine, sums);
      } else {
        block<A, bfloat16>(s, pack_tasks, tasks, groups, packed.floats(), mine, sums);
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

}  // namespace SPIKEDECODER_VARIANT
}  // namespace spikedecoder
