// The part of the CUDA runtime that csrc/*.cu needs, for a machine without a GPU: a launch is handed to a function that
// was set before, with the kernel's name and arguments. Linked in place of cudart (`nvcc -cudart none`).
#include <cuda_runtime.h>

#include <string>
#include <unordered_map>
#include <vector>

using Launched = void (*)(const char* name, const unsigned* grid_and_block, void** arguments, size_t shared);

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};

std::unordered_map<const void*, std::string>& names() {
  static std::unordered_map<const void*, std::string> all;
  return all;
}

std::vector<Configuration> configurations;
Launched launched = nullptr;
void* nothing = nullptr;

cudaError_t run(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared) {
  const auto found = names().find(kernel);
  if (found == names().end() || !launched) return cudaErrorInvalidDeviceFunction;
  const unsigned sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  launched(found->second.c_str(), sizes, arguments, shared);
  return cudaSuccess;
}

}  // namespace

extern "C" {

void launch_with(Launched function) { launched = function; }

void** __cudaRegisterFatBinary(void*) { return &nothing; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device_name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = device_name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return run(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared);
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return run(kernel, grid, block, arguments, shared);
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no such kernel"; }
}
