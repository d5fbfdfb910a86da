// What kernels share and is compiled once for any CPU: the choice of variant, threads, scratch memory.
#pragma once

#include "integers.h"
#include "kernels.h"

namespace spikedecoder {

// The table of kernels in use: the best one for this CPU, unless `use_variant` chose another.
const Kernels& kernels();
// Both return false if the CPU or this build lacks the variant, and throw nothing.
bool variant_available(const char* name);
bool use_variant(const char* name);
extern const char* const variant_names[4];  // best first

// Whether this CPU has an instruction for products of pairs of bfloat16; used by the AVX-512 variant.
bool bfloat16_products();
// Whether this CPU has an instruction that rounds vectors to bfloat16; the same CPUs have both.
extern const bool rounds_to_bfloat16;

// How many threads are worth waking for work that takes one thread `nanoseconds`: each gets at least about 3 us. At
// most `most`, and one in a forked child, where the parent's OpenMP threads no longer exist.
int threads_for(double nanoseconds, int most);

// Memory of a call or of a result: 64-byte aligned, uninitialised, freed with the object. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats() const;
  void* get() const;

 private:
  void* memory_;
};

// The distance in floats between the scratch memory of one thread and that of the next, if each needs n. It includes an
// extra page: a CPU also prefetches lines that follow those it reads, which would take the next thread's lines out of
// the cache in which they are being written.
static constexpr int64_t per_thread(int64_t n) { return round_up(n, 16) + 1024; }

// Makes the C library return unused memory to the system less eagerly; false if it has no such setting.
bool keep_freed_memory();
// After that: requests huge pages from Linux for what the heap has grown by since the last call, before it is written.
void ask_for_huge_pages();

}  // namespace spikedecoder
