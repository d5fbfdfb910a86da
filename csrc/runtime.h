// The CPU's variant, threads, scratch memory: what kernels share, compiled once for any CPU.
#pragma once

#include "integers.h"
#include "kernels.h"

namespace spikedecoder {

// The table in force: the best that the CPU has, unless `use_variant` named another.
const Kernels& kernels();
// False if the CPU lacks it, or this build does; throws nothing.
bool variant_available(const char* name);
bool use_variant(const char* name);
extern const char* const variant_names[4];  // best first

// Whether this CPU multiplies pairs of bfloat16; used by the AVX-512 variant.
bool bfloat16_products();
// Whether this CPU rounds vectors to bfloat16 itself; the same CPUs do.
extern const bool rounds_to_bfloat16;

// Threads worth waking for `nanoseconds` of work on one: at least about 3 us for each, never more than
// `most`, and one in a forked child, where the parent's OpenMP threads do not exist any more.
int threads_for(double nanoseconds, int most);

// Memory of a call, or a result: 64-byte aligned, uninitialised, freed with the object. Throws std::bad_alloc.
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

// How many floats lie between the scratch of one thread and that of the next, where each needs n: a page more, for a
// CPU that fetches what follows the lines that it reads would take it out of the cache where it is being written.
static constexpr int64_t per_thread(int64_t n) { return round_up(n, 16) + 1024; }

// Returns unused memory to the system less eagerly; false where the C library has no such setting.
bool keep_freed_memory();
// After that: asks Linux for huge pages where the heap has grown since the last call, before they are first written.
void ask_for_huge_pages();

}  // namespace spikedecoder
