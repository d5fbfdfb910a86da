// Spikes as bits on the GPU. To pack, a warp makes 32 words: for each, lane i reads channels i and 32 + i, and two
// ballots make the word; a single store of 256 bytes then writes all 32. To unpack, each thread writes one spike. To
// transpose, a warp turns a tile of 64 x 64 bits, also with ballots.
// Bytes moved per spike, the minimum: size of the element read + 1/8 written, or the other way round.
#include "cuda_common.cuh"

namespace spikedecoder {
namespace cuda {
namespace {

constexpr int WARPS = 8;  // per block
constexpr unsigned ALL = 0xffffffffu;

template <class T>
__global__ void __launch_bounds__(32 * WARPS) pack_kernel(const T* values, uint64_t* words, int64_t total, int64_t C,
                                                          int64_t words_of_row) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32) * 32;
  int64_t row = first / words_of_row, w = first % words_of_row;
  uint64_t mine = 0;
  for (int j = 0; j < 32; j++) {
    const int64_t c = w * 64 + lane;
    const bool there = first + j < total;
    const T* p = values + row * C + c;
    const unsigned low = __ballot_sync(ALL, there && c < C && to_float(p[0]) != 0);
    const unsigned high = __ballot_sync(ALL, there && c + 32 < C && to_float(p[32]) != 0);
    if (lane == j) mine = static_cast<uint64_t>(high) << 32 | low;
    if (++w == words_of_row) {
      w = 0;
      row++;
    }
  }
  if (first + lane < total) words[first + lane] = mine;
}

template <class T>
__global__ void __launch_bounds__(256) unpack_kernel(const uint64_t* words, T* values, int64_t C,
                                                     int64_t words_of_row) {
  const int64_t row = blockIdx.x, c = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (c >= C) return;
  values[row * C + c] = from_float<T>(words[row * words_of_row + c / 64] >> (c % 64) & 1 ? 1.f : 0.f);
}

// One warp transposes a tile of 64 x 64 bits.
__global__ void __launch_bounds__(32 * WARPS) transpose_kernel(const uint64_t* words, uint64_t* out, int64_t rows,
                                                               int64_t C, int64_t in_stride, int64_t out_stride) {
  const int lane = threadIdx.x % 32;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (tile >= in_stride * out_stride) return;
  const int64_t w = tile % in_stride, r = tile / in_stride;
  const int64_t low_row = 64 * r + lane, high_row = low_row + 32;
  const uint64_t low = low_row < rows ? words[low_row * in_stride + w] : 0;
  const uint64_t high = high_row < rows ? words[high_row * in_stride + w] : 0;
  for (int half = 0; half < 2; half++) {
    uint64_t mine = 0;
    for (int j = 0; j < 32; j++) {
      const int bit = 32 * half + j;
      const unsigned a = __ballot_sync(ALL, low >> bit & 1), b = __ballot_sync(ALL, high >> bit & 1);
      if (lane == j) mine = static_cast<uint64_t>(b) << 32 | a;
    }
    const int64_t channel = 64 * w + 32 * half + lane;
    if (channel < C) out[channel * out_stride + r] = mine;
  }
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) throw std::runtime_error("sizes: too many elements for one launch");
  return static_cast<unsigned>(blocks);
}

template <class T>
void pack_as(const void* values, uint64_t* words, int64_t rows, int64_t C, cudaStream_t stream) {
  const int64_t total = rows * words_for(C);
  pack_kernel<<<blocks_for(total, 32 * WARPS), 32 * WARPS, 0, stream>>>(static_cast<const T*>(values), words, total, C,
                                                                       words_for(C));
}

}  // namespace

void pack(const void* values, Type type, uint64_t* words, int64_t rows, int64_t C, Queue queue) {
  if (!rows || !C) return;
  const cudaStream_t stream = enter(queue, "pack");
  switch (type) {
    case Type::float32: pack_as<float>(values, words, rows, C, stream); break;
    case Type::float16: pack_as<__half>(values, words, rows, C, stream); break;
    case Type::bfloat16: pack_as<__nv_bfloat16>(values, words, rows, C, stream); break;
    case Type::byte: pack_as<uint8_t>(values, words, rows, C, stream); break;
  }
  check(cudaGetLastError(), "pack");
}

void unpack(const uint64_t* words, void* values, Type type, int64_t rows, int64_t C, Queue queue) {
  if (!rows || !C) return;
  const cudaStream_t stream = enter(queue, "unpack");
  with_float_type(type, [&](auto element) {
    using T = decltype(element);
    const unsigned threads = C >= 256 ? 256 : blocks_for(C, 32) * 32;
    const dim3 grid(blocks_for(rows, 1), blocks_for(C, threads));
    if (grid.y > 0xffff) throw std::runtime_error("sizes: too many channels for one launch");
    unpack_kernel<<<grid, threads, 0, stream>>>(words, static_cast<T*>(values), C, words_for(C));
  });
  check(cudaGetLastError(), "unpack");
}

void transpose_bits(const uint64_t* words, uint64_t* transposed, int64_t rows, int64_t C, Queue queue) {
  if (!rows || !C) return;
  const cudaStream_t stream = enter(queue, "transpose_bits");
  const int64_t in_stride = words_for(C), out_stride = words_for(rows);
  transpose_kernel<<<blocks_for(in_stride * out_stride, WARPS), 32 * WARPS, 0, stream>>>(words, transposed, rows, C,
                                                                                       in_stride, out_stride);
  check(cudaGetLastError(), "transpose_bits");
}

}  // namespace cuda
}  // namespace spikedecoder
