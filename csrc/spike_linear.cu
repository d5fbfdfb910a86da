// Sums of rows selected by bits, on the GPU: out[r] = bias + the sum of source[q] over the bits q set in row r. With
// the weight as source this is a linear layer on spikes; with dL/dy, and the bits transposed, it is the weight
// gradient.
//
// A block sums one output row for a tile of columns. All of its threads read the same words, so that they never
// diverge. Each holds the sums of 16 bytes' worth of neighbouring columns in float32 registers (a single column where
// addresses or widths are not aligned), and loads them with one access per row.
// Bytes moved: the selected rows of the source (from the second-level cache if it fits there), the output once.
#include "cuda_common.cuh"

namespace spikedecoder {
namespace cuda {
namespace {

// COUNT neighbouring elements; if they are 16 bytes, they are loaded and stored in one access.
template <class T, int COUNT>
struct Pack {
  T values[COUNT];
};

template <class T>
constexpr int WIDE = 16 / sizeof(T);

template <class T, int COUNT>
__device__ inline void add_to(float (&sums)[COUNT], const T* p) {
  alignas(16) Pack<T, COUNT> pack;
  if constexpr (COUNT * sizeof(T) == 16) {
    *reinterpret_cast<uint4*>(&pack) = __ldg(reinterpret_cast<const uint4*>(p));
  } else {
    for (int i = 0; i < COUNT; i++) pack.values[i] = p[i];
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) sums[i] += to_float(pack.values[i]);
}

template <class T, int COUNT>
__global__ void __launch_bounds__(128) gather_kernel(const uint64_t* __restrict__ words, const T* __restrict__ source,
                                                     const T* __restrict__ bias, T* __restrict__ out,
                                                     int64_t words_of_row, int64_t columns) {
  const int64_t row = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * COUNT;
  if (column >= columns) return;
  float sums[COUNT] = {};
  if (bias) add_to<T, COUNT>(sums, bias + column);
  const uint64_t* bits_of_row = words + row * words_of_row;
  const T* at = source + column;
  for (int64_t w = 0; w < words_of_row; w++, at += 64 * columns) {
    uint64_t bits = __ldg(bits_of_row + w);
    while (bits) {
      // two at a time, so that their loads do not wait for each other
      const int first = __ffsll(static_cast<long long>(bits)) - 1;
      bits &= bits - 1;
      const int second = __ffsll(static_cast<long long>(bits)) - 1;  // -1: there is none
      bits &= bits - 1;                                              // 0 stays 0
      float more[COUNT] = {};
      if (second >= 0) add_to<T, COUNT>(more, at + second * columns);
      add_to<T, COUNT>(sums, at + first * columns);
#pragma unroll
      for (int i = 0; i < COUNT; i++) sums[i] += more[i];
    }
  }
  alignas(16) Pack<T, COUNT> result;
#pragma unroll
  for (int i = 0; i < COUNT; i++) result.values[i] = from_float<T>(sums[i]);
  T* to = out + row * columns + column;
  if constexpr (COUNT * sizeof(T) == 16) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&result);
  } else {
    for (int i = 0; i < COUNT; i++) to[i] = result.values[i];
  }
}

template <class T, int COUNT>
void launch(const uint64_t* words, const void* source, const void* bias, void* out, int64_t rows, int64_t bits,
            int64_t columns, cudaStream_t stream) {
  const int64_t threads_wanted = (columns + COUNT - 1) / COUNT;
  const unsigned threads = threads_wanted >= 128 ? 128 : static_cast<unsigned>((threads_wanted + 31) / 32 * 32);
  const int64_t tiles = (threads_wanted + threads - 1) / threads;
  if (rows > 0x7fffffff || tiles > 0xffff) throw std::runtime_error("sizes: too many elements for one launch");
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(tiles));
  gather_kernel<T, COUNT><<<grid, threads, 0, stream>>>(words, static_cast<const T*>(source),
                                                        static_cast<const T*>(bias), static_cast<T*>(out),
                                                        words_for(bits), columns);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

void gather(const uint64_t* words, const void* source, const void* bias, void* out, Type type, int64_t rows,
            int64_t bits, int64_t columns, Queue queue) {
  if (!rows || !columns) return;
  const cudaStream_t stream = enter(queue, "gather");
  with_float_type(type, [&](auto element) {
    using T = decltype(element);
    if (columns % WIDE<T> == 0 && aligned(source) && aligned(bias) && aligned(out)) {
      launch<T, WIDE<T>>(words, source, bias, out, rows, bits, columns, stream);
    } else {
      launch<T, 1>(words, source, bias, out, rows, bits, columns, stream);
    }
  });
  check(cudaGetLastError(), "gather");
}

}  // namespace cuda
}  // namespace spikedecoder
