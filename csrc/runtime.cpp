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
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(SPIKEDECODER_AMX_BUILT)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
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

#if defined(SPIKEDECODER_AMX_BUILT)
// The kernels of AVX-512, except for those that the matrix unit is used for.
const Kernels amx_kernels = [] {
  Kernels kernels = avx512::kernels;
  kernels.name = "amx";
  kernels.tile_sums = amx::tile_sums;
  kernels.tile_weight_grad = amx::tile_weight_grad;
  return kernels;
}();

// Whether the CPU has tiles of bfloat16 and of bytes, and Linux lets this process use them, which has to be requested.
bool has_tiles() {
  constexpr unsigned TILES = 1u << 22 | 1u << 24 | 1u << 25;
  constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILES) != TILES) return false;
  return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#endif

#if defined(SPIKEDECODER_X86)
// What both vector variants are compiled for. A hypervisor may hide some of it but not AVX-512.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}
#endif

const Kernels* find(const char* name) {
#if defined(SPIKEDECODER_X86)
  __builtin_cpu_init();
#if defined(SPIKEDECODER_AVX512_BUILT)
  if (!std::strcmp(name, "avx512")) {
    const bool has = has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vbmi2");
    return has ? &avx512::kernels : nullptr;
  }
#endif
#if defined(SPIKEDECODER_AMX_BUILT)
  if (!std::strcmp(name, "amx")) {
    static const bool has = find("avx512") && __builtin_cpu_supports("avx512vbmi") && has_tiles();
    return has ? &amx_kernels : nullptr;
  }
#endif
#if defined(SPIKEDECODER_AVX2_BUILT)
  if (!std::strcmp(name, "avx2")) return has_avx2() ? &avx2::kernels : nullptr;
#endif
#endif
  return std::strcmp(name, "baseline") ? nullptr : &baseline::kernels;
}

}  // namespace

const char* const variant_names[4] = {"amx", "avx512", "avx2", "baseline"};

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

// Not an aligned allocation, which would fragment the heap: see spikedecoder/ext/cpu/_memory.py.
Scratch::Scratch(size_t bytes) : memory_(std::malloc(bytes + 64)) {
  if (!memory_) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(memory_); }

void* Scratch::get() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64); }
float* Scratch::floats() const { return static_cast<float*>(get()); }

#if defined(__GLIBC__)
namespace {

// Where the heap ended when huge pages were last requested; 0: none are wanted.
std::atomic<uintptr_t> heap_end{0};

uintptr_t end_of_heap() { return reinterpret_cast<uintptr_t>(sbrk(0)); }

}  // namespace
#endif

void ask_for_huge_pages() {
#if defined(__GLIBC__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 4096, HUGE_PAGE = 2 << 20;
  uintptr_t before = heap_end;
  const uintptr_t now = end_of_heap();
  if (!before || now < before + HUGE_PAGE || !heap_end.compare_exchange_strong(before, now)) return;
  const uintptr_t begin = before / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(begin), now / PAGE * PAGE - begin, MADV_HUGEPAGE);  // a hint: it may be refused
#endif
}

bool keep_freed_memory() {
#if defined(__GLIBC__)
  heap_end = end_of_heap();
  // glibc gives blocks above its mmap threshold (at most 32 MiB) back to the system when they are freed and
  // faults them in again, page by page, at the next allocation. Tensors of that size come and go in every
  // training step: serve them from the heap, and keep the heap's top.
  return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, -1) && mallopt(M_TOP_PAD, 64 << 20);
#else
  return false;
#endif
}

}  // namespace spikedecoder
