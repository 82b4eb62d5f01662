// mxfp4_routing and mxfp4_routing_routes: the rows of each expert, in the order of their slots
// (token * A + choice). See ops/reference.py.
//
// Both are a counting sort. Each thread has a range of tokens and counts its slots for each expert.
// The counts of smaller experts and of earlier threads give the rows of its slots. The result is
// the same for any number of threads.
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

extern "C" int mxfp4_routing(const mxfp4_router* arguments) {
  using namespace mxfp4;
  const mxfp4_router& router = *arguments;
  const int64_t tokens = router.tokens, all = router.all, top_k = router.top_k;
  const int64_t experts = router.experts;
  const Routes routes{tokens,
                      top_k,
                      experts,
                      router.first,
                      router.gammas,
                      router.gather_index,
                      router.scatter_index,
                      router.expert_offsets};
  if (top_k < 1 || top_k > all || !routes.fits()) return EINVAL;
  if (all > std::numeric_limits<int32_t>::max()) return EINVAL;

  // Candidates and values of each thread, weights and experts of all slots, counts of each thread.
  const int most = threads_for(tokens * all, LOGITS_OF_THREAD, router.threads);
  const int64_t slots = tokens * top_k, candidates = most * all;
  CallMemory memory(candidates * static_cast<int64_t>(sizeof(Candidate) + sizeof(float)) +
                    slots * static_cast<int64_t>(sizeof(float) + sizeof(int32_t)) +
                    most * (experts + 1) * static_cast<int64_t>(sizeof(int32_t)));
  if (!memory.get()) return ENOMEM;
  auto* all_candidates = reinterpret_cast<Candidate*>(memory.get());
  auto* all_values = reinterpret_cast<float*>(all_candidates + candidates);
  float* weights = all_values + candidates;
  auto* chosen = reinterpret_cast<int32_t*>(weights + slots);
  int32_t* counts = chosen + slots;

  parallel(most, [&](int thread, int count) {
    Candidate* queue = all_candidates + thread * all;
    float* values = all_values + thread * all;
    const int64_t end = routes.first_token(thread + 1, count);
    for (int64_t token = routes.first_token(thread, count); token < end; token++) {
      to_f32(element(router.logits, router.dtype, token * router.stride), router.dtype, all,
             values);
      for (int64_t id = 0; id < all; id++) queue[id] = {values[id], static_cast<int32_t>(id)};
      select_largest(queue, all, top_k);
      softmax(queue, top_k, weights + token * top_k);
      for (int64_t i = 0; i < top_k; i++)
        chosen[token * top_k + i] = static_cast<int32_t>(routes.expert_of(queue[i].expert));
    }
    routes.sort(
        thread, count, counts, [&](int64_t slot) { return chosen[slot]; },
        [&](int64_t slot) { return weights[slot]; });
  });
  return 0;
}

extern "C" int mxfp4_routing_routes(const void* ids, int32_t index_dtype, const void* weights,
                                    int32_t dtype, int64_t tokens, int64_t per_token,
                                    int64_t experts, int64_t first, float* gammas, int32_t* gather,
                                    int32_t* scatter, int32_t* offsets, int32_t threads) {
  using namespace mxfp4;
  const Routes routes{tokens, per_token, experts, first, gammas, gather, scatter, offsets};
  if (!routes.fits()) return EINVAL;
  const int most = threads_for(tokens * per_token, ROUTES_OF_THREAD, threads);
  CallMemory memory(most * (experts + 1) * static_cast<int64_t>(sizeof(int32_t)));
  if (!memory.get()) return ENOMEM;
  auto* counts = reinterpret_cast<int32_t*>(memory.get());

  const auto expert_of = [&](int64_t slot) {
    const int64_t id = index_dtype == MXFP4_I64 ? static_cast<const int64_t*>(ids)[slot]
                                                : static_cast<const int32_t*>(ids)[slot];
    return routes.expert_of(id);
  };
  const auto weight_of = [&](int64_t slot) {
    float weight;
    to_f32(element(weights, dtype, slot), dtype, 1, &weight);
    return weight;
  };
  parallel(most, [&](int thread, int count) {
    routes.sort(thread, count, counts, expert_of, weight_of);
  });
  return 0;
}
