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

// What this thread has streamed past the caches (simd.h) is there for the others.
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

// body(part, parts) for each part 0..parts, on as many threads as there are to be had: all parts are done
// even where the team turns out smaller. No barriers in here.
template <class Body>
inline void parallel(int parts, const Body& body) {
  team(parts, [&](int thread, int threads) {
    for (int part = thread; part < parts; part += threads) body(part, parts);
    finish_stores();
  });
}

// All threads of the team have come here. Only inside `team`.
inline void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// Numbers 0..n handed out to whichever thread asks next.
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

// The same in runs of neighbours, whose results may share lines of the cache: such a line goes to and fro between two
// threads that both write to it.
class Runs {
 public:
  // `together`: so many neighbours share lines with each other alone. Where that leaves too few runs to choose from,
  // each thread gets one, all of like length.
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

// The part of 0..n that is this thread's own, cut at multiples of `unit`.
inline Range share(int64_t n, int thread, int threads, int64_t unit = 1) {
  const int64_t units = (n + unit - 1) / unit;
  const int64_t begin = units * thread / threads * unit, end = units * (thread + 1) / threads * unit;
  return {begin < n ? begin : n, end < n ? end : n};
}

// Results too small for a normal float become 0 while this lives: denormals make gradients several times
// slower to compute. For gradients only; spikes are computed without it.
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
