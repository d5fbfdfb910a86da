// What the .cu files share: element types, launch checks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda_kernels.h"

namespace spikedecoder {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline cudaStream_t enter(const Queue& queue, const char* what) {
  check(cudaSetDevice(queue.device), what);
  return static_cast<cudaStream_t>(queue.stream);
}

inline int64_t words_for(int64_t channels) { return (channels + 63) / 64; }

__device__ inline float to_float(float a) { return a; }
__device__ inline float to_float(__half a) { return __half2float(a); }
__device__ inline float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ inline float to_float(uint8_t a) { return static_cast<float>(a); }

template <class T>
__device__ T from_float(float a);
template <>
__device__ inline float from_float<float>(float a) {
  return a;
}
template <>
__device__ inline __half from_float<__half>(float a) {
  return __float2half_rn(a);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float a) {
  return __float2bfloat16_rn(a);
}

// Calls body with a value of the element type; throws for `byte`.
template <class Body>
void with_float_type(Type type, const Body& body) {
  switch (type) {
    case Type::float32: return body(float{});
    case Type::float16: return body(__half{});
    case Type::bfloat16: return body(__nv_bfloat16{});
    case Type::byte: break;
  }
  throw std::runtime_error("type: takes float32, float16 or bfloat16");
}

}  // namespace cuda
}  // namespace spikedecoder
