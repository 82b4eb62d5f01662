// Routing: the rows of each expert, in the order of their slots (token * A + choice). See
// ops/reference.py.
//
// mxfp4_routing and mxfp4_routing_routes are a counting sort. Each thread has a range of tokens and
// counts its slots for each expert. The counts of smaller experts and of earlier threads give the
// rows of its slots. The result is the same for any number of threads.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "api.h"
#include "numbers.h"
#include "parallel.h"

namespace mxfp4 {

// The fewest logits, or routes, per thread: with fewer, waking the thread does not pay.
constexpr int64_t LOGITS_OF_THREAD = 2048, ROUTES_OF_THREAD = 8192;

struct Candidate {
  float value;
  int32_t expert;
};

struct IsLarger {
  static bool is_nan(float value) { return value != value; }
  bool operator()(const Candidate& a, const Candidate& b) const {
    return (is_nan(a.value) && !is_nan(b.value)) || a.value > b.value;
  }
};

// Moves the `top_k` largest candidates to the front, in order. The algorithm decides among equal
// ones. It is that of torch.topk on the CPU (topk_impl_loop), so both choose the same experts.
inline void select_largest(Candidate* candidates, int64_t count, int64_t top_k) {
  Candidate* end = candidates + count;
  if (top_k * 64 <= count) {
    std::partial_sort(candidates, candidates + top_k, end, IsLarger());
  } else {
    std::nth_element(candidates, candidates + top_k - 1, end, IsLarger());
    std::sort(candidates, candidates + top_k - 1, IsLarger());
  }
}

// The softmax of candidates. The first must be the largest, or a NaN if there is one.
inline void softmax(const Candidate* candidates, int64_t count, float* weights) {
  float sum = 0.f;
  for (int64_t i = 0; i < count; i++) {
    weights[i] = std::exp(candidates[i].value - candidates[0].value);
    sum += weights[i];
  }
  for (int64_t i = 0; i < count; i++) weights[i] /= sum;
}

// Memory for one call. It is on the stack if it is small, as for one token.
class CallMemory {
 public:
  explicit CallMemory(int64_t bytes) {
    if (bytes <= static_cast<int64_t>(sizeof small_)) return;
    large_.reset(new (std::nothrow) char[static_cast<size_t>(bytes)]);
    is_large_ = true;
  }

  // Null if there is no memory.
  char* get() { return is_large_ ? large_.get() : small_; }

 private:
  alignas(64) char small_[8192];
  std::unique_ptr<char[]> large_;
  bool is_large_ = false;
};

// The outputs of both functions, and the sort.
struct Routes {
  int64_t tokens, per_token;
  int64_t experts, first;  // those that are held here: how many, and the first one's id
  float* gammas;
  int32_t *gather, *scatter, *offsets;

  bool fits() const {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    return experts >= 0 && experts < most && (per_token == 0 || tokens <= most / per_token);
  }

  int64_t first_token(int thread, int threads) const { return tokens * thread / threads; }

  // Of the experts held here the number of an id, or else `experts`.
  int64_t expert_of(int64_t id) const {
    // Unsigned, because a signed difference of two ids could overflow.
    const uint64_t expert = static_cast<uint64_t>(id) - static_cast<uint64_t>(first);
    return static_cast<int64_t>(std::min(expert, static_cast<uint64_t>(experts)));
  }

  // Replaces counts[thread][expert], a number of slots, by the row of the first of them. The entry
  // after the last expert counts slots whose expert is not held here.
  void start_rows(int32_t* counts, int threads) const {
    int32_t row = 0;
    for (int64_t expert = 0; expert <= experts; expert++) {
      offsets[expert] = row;
      for (int thread = 0; thread < threads; thread++) {
        int32_t& count = counts[thread * (experts + 1) + expert];
        const int32_t start = row;
        row += count;
        count = start;
      }
    }
  }

  // Sorts the slots of one thread. expert_of(slot) is `experts` if the expert is not held here.
  template <class Expert, class Weight>
  void sort(int thread, int threads, int32_t* counts, Expert expert_of, Weight weight_of) const {
    const int64_t begin = first_token(thread, threads), end = first_token(thread + 1, threads);
    int32_t* rows = counts + thread * (experts + 1);
    std::fill(rows, rows + experts + 1, 0);
    for (int64_t slot = begin * per_token; slot < end * per_token; slot++) rows[expert_of(slot)]++;
    barrier(threads);
    if (thread == 0) start_rows(counts, threads);
    barrier(threads);
    for (int64_t token = begin; token < end; token++) {
      for (int64_t slot = token * per_token; slot < (token + 1) * per_token; slot++) {
        const int64_t expert = expert_of(slot);
        const int32_t row = rows[expert]++;
        gammas[row] = expert < experts ? weight_of(slot) : 0.f;
        gather[row] = static_cast<int32_t>(token);
        scatter[row] = static_cast<int32_t>(slot);
      }
    }
  }
};

inline int threads_for(int64_t work, int64_t of_thread, int32_t threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work / of_thread)));
}

}  // namespace mxfp4
