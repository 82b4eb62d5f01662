// Threads: one OpenMP region a call, and the handing out of work inside it.
#pragma once

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <limits>

namespace mxfp4 {

// Set in a process that was forked. The threads of OpenMP's pool are not forked with it, and the
// runtime would wait for them forever. (mxfp4_init is told of forks before the library was loaded.)
static bool forked = false;

__attribute__((constructor)) static void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

// Arithmetic as IEEE 754 has it while it lives. torch.set_flush_denormal changes it for one thread
// and not for another, and results must not depend on the number of threads.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
};

// Runs body(thread, threads) on `threads` threads, or on as many as OpenMP gives, which the body is
// told; on this one alone, without OpenMP, where that could hang or would be nested. No exception
// may leave the body.
template <class F>
void parallel(int threads, F body) {
  const auto run = [&](int thread, int count) {
    const DefaultArithmetic arithmetic;
    body(thread, count);
  };
  if (threads <= 1 || forked || omp_in_parallel()) {
    run(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  run(omp_get_thread_num(), omp_get_num_threads());
}

// For the body of `parallel`, with its own number of threads: waits until all of them are here.
inline void barrier(int threads) {
  if (threads > 1) {
#pragma omp barrier
  }
}

// Hands out ranges of [0, count), the longer ones first, so that all threads end at the same time
// though nobody knows how fast they are. A range has `least` to `most` items, the last may have
// fewer.
class Cursor {
 public:
  Cursor(int64_t count, int threads, int64_t least = 1,
         int64_t most = std::numeric_limits<int64_t>::max())
      : count_(count), shares_(2 * std::max(threads, 1)), least_(least), most_(most) {}

  // The next range; false if there is none left.
  bool next(int64_t& begin, int64_t& end) {
    begin = position_.load(std::memory_order_relaxed);
    do {
      const int64_t left = count_ - begin;
      if (left <= 0) return false;
      const int64_t share = std::max(least_, std::min(most_, left / shares_));
      end = begin + std::min(left, share);
    } while (!position_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

 private:
  const int64_t count_, shares_, least_, most_;
  alignas(64) std::atomic<int64_t> position_{0};
};

}  // namespace mxfp4
