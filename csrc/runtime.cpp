#include "runtime.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace spikedecoder {
namespace {

std::atomic<const Kernels*> in_force{nullptr};
std::atomic<bool> forked{false};

struct WatchForks {
  WatchForks() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
  }
} watch_forks;

const Kernels* find(const char* name) {
#if defined(SPIKEDECODER_X86)
  __builtin_cpu_init();
  if (!std::strcmp(name, "avx512")) {
    const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vbmi2");
    return has ? &avx512::kernels : nullptr;
  }
  if (!std::strcmp(name, "avx2")) {
    const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                     __builtin_cpu_supports("popcnt");
    return has ? &avx2::kernels : nullptr;
  }
#endif
  return std::strcmp(name, "baseline") ? nullptr : &baseline::kernels;
}

}  // namespace

const char* const variant_names[3] = {"avx512", "avx2", "baseline"};

bool variant_available(const char* name) { return find(name) != nullptr; }

bool use_variant(const char* name) {
  const Kernels* found = find(name);
  if (found) in_force = found;
  return found != nullptr;
}

const Kernels& kernels() {
  if (const Kernels* chosen = in_force) return *chosen;
  for (const char* name : variant_names) {
    if (use_variant(name)) break;
  }
  return *in_force;
}

bool bfloat16_products() {
#if defined(SPIKEDECODER_X86)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const bool rounds_to_bfloat16 = bfloat16_products();

int threads_for(double nanoseconds, int most) {
  if (forked || most <= 1) return 1;
  const double worth = nanoseconds / 3000;
  return worth >= most ? most : worth < 1 ? 1 : static_cast<int>(worth);
}

// Not an aligned allocation, which breaks the heap up: see spikedecoder/ext/cpu/_memory.py.
Scratch::Scratch(size_t bytes) : memory_(std::malloc(bytes + 64)) {
  if (!memory_) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(memory_); }

bool keep_freed_memory() {
#if defined(__GLIBC__)
  // glibc gives blocks above its mmap threshold (at most 32 MiB) back to the system when they are freed and
  // faults them in again, page by page, at the next allocation. Tensors of that size come and go in every
  // training step: serve them from the heap, and keep the heap's top.
  return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, -1) && mallopt(M_TOP_PAD, 64 << 20);
#else
  return false;
#endif
}

}  // namespace spikedecoder
