// mxfp4_routing, mxfp4_routing_routes.
#include "routing.h"

#include <cerrno>
#include <cstdint>
#include <limits>

#include "api.h"

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
