// Threads inside a kernel. Everything has internal linkage: see simd.h.
#pragma once

#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "runtime.h"

namespace spikedecoder {
namespace {

// Makes what this thread has written past the caches (`stream` in simd.h) visible to the others.
inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// body(thread, threads) on a team of up to `threads` threads; `threads` as body sees it is the team's size.
template <class Body>
inline void team(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#else
  (void)threads;
#endif
  body(0, 1);
}

// body(part, parts) for each part 0 .. parts - 1, on up to `parts` threads. All parts are done even if the team turns
// out smaller, so body must not contain a barrier.
template <class Body>
inline void parallel(int parts, const Body& body) {
  team(parts, [&](int thread, int threads) {
    for (int part = thread; part < parts; part += threads) body(part, parts);
    finish_stores();
  });
}

// Waits until all threads of the team have arrived. Only inside `team`.
inline void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// Hands out the numbers 0 .. n - 1, each to whichever thread asks next.
class Tasks {
 public:
  explicit Tasks(int64_t n) : n_(n) {}
  // False when there are no more.
  bool next(int64_t& task) {
    task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
    return task < n_;
  }

 private:
  int64_t n_, next_ = 0;
};

// Hands out runs of neighbouring numbers. The results of neighbours may share cache lines, and a line that two threads
// write moves back and forth between them.
class Runs {
 public:
  // `together`: a run of this many neighbours shares no cache lines with other runs. Where that makes too few runs to
  // choose from, each thread gets a single one, all of similar length.
  Runs(int64_t n, int64_t together, int threads)
      : n_(n), each_(n >= 2 * threads * together ? together : (n + threads - 1) / threads),
        tasks_(n ? (n + each_ - 1) / each_ : 0) {}
  template <class Body>
  void each(const Body& body) {
    for (int64_t run; tasks_.next(run);) {
      for (int64_t i = run * each_; i < n_ && i < (run + 1) * each_; i++) body(i);
    }
  }

 private:
  int64_t n_, each_;
  Tasks tasks_;
};

struct Range {
  int64_t begin, end;
};

// This thread's part of 0 .. n - 1, cut at multiples of `unit`.
inline Range share(int64_t n, int thread, int threads, int64_t unit = 1) {
  const int64_t units = (n + unit - 1) / unit;
  const int64_t begin = units * thread / threads * unit, end = units * (thread + 1) / threads * unit;
  return {begin < n ? begin : n, end < n ? end : n};
}

// While an object of this class lives, results too small for a normal float become 0: denormal numbers make gradients
// several times slower to compute. For gradients only; spikes are computed without it.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

}  // namespace
}  // namespace spikedecoder
