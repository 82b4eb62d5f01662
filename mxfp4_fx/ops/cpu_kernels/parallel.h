// Threads: one OpenMP region per call, and the distribution of work inside it.
#pragma once

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <limits>

namespace mxfp4 {

// Whether this process is a forked child. A child lacks the threads of OpenMP's pool, and the
// runtime would wait for them forever. A library has one such variable for all of its units;
// mxfp4_init_weights sets it for forks before the library was loaded.
inline bool forked = [] {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return false;
}();

// IEEE 754's default arithmetic in a scope. torch.set_flush_denormal changes the arithmetic of one
// thread only, and results must not depend on the number of threads.
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

// Runs body(thread, count) on `threads` threads, or on fewer if OpenMP gives fewer; `count` is
// their number. Runs it on this thread alone where OpenMP could hang or would be nested. The body
// must not throw.
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

// Waits for all threads of `parallel`; its body calls this with its `count`.
inline void barrier(int threads) {
  if (threads > 1) {
#pragma omp barrier
  }
}

// Hands out ranges of [0, count), longer ones first, so that threads of different speeds end at the
// same time. A range has `least` to `most` items; the last may have fewer.
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
