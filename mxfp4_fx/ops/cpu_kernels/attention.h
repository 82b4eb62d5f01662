// Attention with sinks of one query for each head: keys and values are read once.
//
// Heads of queries that share keys are computed together, and the keys in parts of a fixed size, by
// any thread. Each part has weights relative to a maximum of its own, which is at least the sink:
// so a part that a mask hides has the weights zero, as in the whole. The parts of a head are added
// in their order. So the bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "api.h"
#include "epilogue.h"
#include "linear.h"
#include "numbers.h"
#include "parallel.h"
#include "vectors.h"

namespace mxfp4 {

// Lanes `first`, `first` + 2 and so on of two vectors, one after the other.
template <uint32_t FIRST>
inline Vector every_other(Vector a, Vector b) {
#if defined(__clang__) && defined(__aarch64__)
  return __builtin_shufflevector(a, b, FIRST, FIRST + 2, FIRST + 4, FIRST + 6);
#else
#if defined(__AVX512F__)
  const VectorBits even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#elif defined(__AVX2__)
  const VectorBits even = {0, 2, 4, 6, 8, 10, 12, 14};
#else
  const VectorBits even = {0, 2, 4, 6};
#endif
  return __builtin_shuffle(a, b, even + FIRST);
#endif
}

// The sum of each of VECTOR vectors, in the vectors' order. The vectors are overwritten.
inline Vector sums_of(Vector* vectors) {
  for (int count = VECTOR; count > 1; count /= 2)
    for (int i = 0; i < count / 2; i++)
      vectors[i] = every_other<0>(vectors[2 * i], vectors[2 * i + 1]) +
                   every_other<1>(vectors[2 * i], vectors[2 * i + 1]);
  return vectors[0];
}

template <class Values>
class Attention {
 public:
  explicit Attention(const mxfp4_attention& arguments)
      : a_(arguments),
        parts_((a_.keys + PART - 1) / PART),
        groups_(a_.heads / a_.key_heads),
        records_(static_cast<size_t>(a_.batch * a_.heads * parts_ * record())),
        scratch_(static_cast<size_t>(a_.threads * groups_ * (a_.size + PART))) {}

  // Whether heads of this size are computed here: whole vectors, and not too many.
  static bool takes(int64_t size) { return size > 0 && size % UNIT == 0 && size <= LARGEST; }

  void run() {
    const int64_t units = a_.batch * a_.key_heads * parts_;
    const int64_t bytes = 2 * units * PART * a_.size * Values::BYTES;
    const int threads = static_cast<int>(std::clamp<int64_t>(bytes / ENOUGH, 1, a_.threads));
    Cursor cursor(units, threads);
    parallel(threads, [&](int thread, int) {
      float* scratch = scratch_.data() + thread * groups_ * (a_.size + PART);
      int64_t begin, end;
      while (cursor.next(begin, end))
        for (int64_t unit = begin; unit < end; unit++) compute(unit, scratch);
    });
    for (int64_t row = 0; row < a_.batch * a_.heads; row++) add_parts(row);
  }

 private:
  static constexpr int UNIT = Values::VECTORS * VECTOR;  // values that are loaded at a time
  static constexpr int LARGEST = 256;                    // the largest head
  static constexpr int PART = 256;                       // keys
  static constexpr int GROUP = 4;                        // heads whose sums stay in registers
  static constexpr int64_t ENOUGH = 256 << 10;           // bytes for which another thread pays

  // What a part gives a head: its maximum, its sum of weights, and its weighted sum of values.
  int64_t record() const { return 2 + a_.size; }
  float* record_of(int64_t row, int64_t part) {
    return records_.data() + (row * parts_ + part) * record();
  }

  // One part of the keys of a head, for all heads of queries that share it.
  void compute(int64_t unit, float* scratch) {
    const int64_t part = unit % parts_, head = unit / parts_ % a_.key_heads;
    const int64_t batch = unit / parts_ / a_.key_heads, first = part * PART;
    const int64_t row = batch * a_.heads + head * groups_;  // the first that shares it
    const int64_t count = std::min<int64_t>(PART, a_.keys - first);
    float *queries = scratch, *weights = scratch + groups_ * a_.size;
    for (int64_t g = 0; g < groups_; g++)
      load(a_.query, batch * a_.query_batch + (head * groups_ + g) * a_.query_head,
           queries + g * a_.size);
    for (int64_t at = 0; at < count; at += VECTOR) {
      float keys[VECTOR * LARGEST];
      load_tile(a_.key, batch * a_.key_batch + head * a_.key_head, a_.key_token, first + at,
                std::min<int64_t>(VECTOR, count - at), keys);
      for_groups([&](auto heads, int64_t g) {
        multiply<heads>(queries + g * a_.size, keys, weights + g * PART + at);
      });
    }
    for (int64_t g = 0; g < groups_; g++)
      weigh(weights + g * PART, batch, head * groups_ + g, first, count, record_of(row + g, part));
    for (int64_t at = 0; at < count; at += VECTOR) {
      float values[VECTOR * LARGEST];
      load_tile(a_.value, batch * a_.value_batch + head * a_.value_head, a_.value_token, first + at,
                std::min<int64_t>(VECTOR, count - at), values);
      for_groups([&](auto heads, int64_t g) {
        float* sums[heads];
        for (int i = 0; i < heads; i++) sums[i] = record_of(row + g + i, part) + 2;
        add_values<heads>(weights + g * PART + at, values, sums);
      });
    }
  }

  // Calls body(a constant number of heads, the first of them) until all heads have been named.
  template <class F>
  void for_groups(F body) const {
    int64_t g = 0;
    for (; g + GROUP <= groups_; g += GROUP) body(std::integral_constant<int, GROUP>(), g);
    for (; g < groups_; g++) body(std::integral_constant<int, 1>(), g);
  }

  // A row of a tensor as float32, in the order in which Values gives it.
  void load(const void* tensor, int64_t offset, float* out) const {
    const char* source = static_cast<const char*>(tensor) + offset * Values::BYTES;
    for (int64_t i = 0; i < a_.size; i += UNIT) {
      Vector vectors[Values::VECTORS];
      Values::load(source + i * Values::BYTES, vectors);
      for (int v = 0; v < Values::VECTORS; v++) store_vector(out + i + v * VECTOR, vectors[v]);
    }
  }

  // VECTOR rows from `first` on; those behind the `count`th are zeros.
  void load_tile(const void* tensor, int64_t offset, int64_t stride, int64_t first, int64_t count,
                 float* out) const {
    for (int64_t t = 0; t < count; t++) {
      const int64_t at = offset + (first + t) * stride;
      const char* ahead = static_cast<const char*>(tensor) + (at + AHEAD * stride) * Values::BYTES;
      for (int64_t line = 0; line < a_.size * Values::BYTES; line += LINE)
        __builtin_prefetch(ahead + line);
      load(tensor, at, out + t * a_.size);
    }
    std::fill(out + count * a_.size, out + VECTOR * a_.size, 0.f);
  }
  static constexpr int64_t AHEAD = 32;  // rows that are prefetched before they are read
  static constexpr int64_t LINE = 64;   // bytes of a cache's line

  // The products of G queries with VECTOR keys, PART apart for each query.
  template <int G>
  void multiply(const float* queries, const float* keys, float* products) const {
    constexpr int KEYS = 4;  // whose sums stay in registers
    Vector sums[G][VECTOR];
    for (int t = 0; t < VECTOR; t += KEYS) {
      Vector some[G][KEYS] = {};
      for (int64_t i = 0; i < a_.size; i += VECTOR) {
        Vector rows[KEYS];
#pragma GCC unroll 4
        for (int k = 0; k < KEYS; k++) rows[k] = load_vector(keys + (t + k) * a_.size + i);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
          const Vector query = load_vector(queries + g * a_.size + i);
#pragma GCC unroll 4
          for (int k = 0; k < KEYS; k++) some[g][k] = some[g][k] + query * rows[k];
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int k = 0; k < KEYS; k++) sums[g][t + k] = some[g][k];
    }
    for (int g = 0; g < G; g++) store_vector(products + g * PART, sums_of(sums[g]));
  }

  // Replaces a part's products by weights, and notes their maximum and their sum.
  void weigh(float* weights, int64_t batch, int64_t head, int64_t first, int64_t count,
             float* record) const {
    float mask[PART] = {};
    if (a_.mask != nullptr)
      to_f32(element(a_.mask, a_.dtype, batch * a_.mask_batch + head * a_.mask_head + first),
             a_.dtype, count, mask);
    // Behind the last key: no weight, not even for a query that is infinite.
    std::fill(mask + count, mask + PART, -std::numeric_limits<float>::infinity());
    std::fill(weights + count, weights + PART, 0.f);
    const int64_t whole = (count + VECTOR - 1) / VECTOR * VECTOR;
    Vector largest = vector_of(sink(head));
    for (int64_t at = 0; at < whole; at += VECTOR) {
      const Vector logits = load_vector(weights + at) * a_.scale + load_vector(mask + at);
      largest = logits > largest ? logits : largest;
      store_vector(weights + at, logits);
    }
    float lanes[VECTOR];
    store_vector(lanes, largest);
    record[0] = *std::max_element(lanes, lanes + VECTOR);
    // Without a sink, all keys may be at minus infinity: then they have no weight in this part.
    const bool is_hidden = record[0] == -std::numeric_limits<float>::infinity();
    const Vector base = vector_of(is_hidden ? 0.f : record[0]);
    Vector sum = {};
    for (int64_t at = 0; at < whole; at += VECTOR) {
      const Vector below = load_vector(weights + at) - base;
      const Vector weight = below < vector_of(-87.f) ? Vector{} : exponential(below);
      sum = sum + weight;
      store_vector(weights + at, weight);
    }
    record[1] = sum_of(sum);
    std::fill(record + 2, record + 2 + a_.size, 0.f);
  }

  // Adds VECTOR rows of values to the sums of G heads, by their weights, which are PART apart.
  template <int G>
  void add_values(const float* weights, const float* values, float* const* sums) const {
    int64_t i = 0;
    for (; i + 2 * VECTOR <= a_.size; i += 2 * VECTOR) add_columns<G, 2>(weights, values, sums, i);
    for (; i < a_.size; i += VECTOR) add_columns<G, 1>(weights, values, sums, i);
  }

  // Of these, N vectors from column i on.
  template <int G, int N>
  void add_columns(const float* weights, const float* values, float* const* sums, int64_t i) const {
    Vector parts[G][N];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) parts[g][n] = load_vector(sums[g] + i + n * VECTOR);
    for (int t = 0; t < VECTOR; t++) {
      Vector row[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) row[n] = load_vector(values + t * a_.size + i + n * VECTOR);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) parts[g][n] = parts[g][n] + row[n] * weights[g * PART + t];
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) store_vector(sums[g] + i + n * VECTOR, parts[g][n]);
  }

  float sink(int64_t head) const {
    float value;
    to_f32(element(a_.sinks, a_.dtype, head * a_.sinks_stride), a_.dtype, 1, &value);
    return value;
  }

  // The result of one head. A head whose logits have no maximum but minus infinity is NaN.
  void add_parts(int64_t row) {
    float largest = sink(row % a_.heads), sums[LARGEST] = {}, result[LARGEST];
    for (int64_t part = 0; part < parts_; part++) {
      const float own = record_of(row, part)[0];
      if (own > largest || own != own) largest = own;
    }
    float total = std::exp(sink(row % a_.heads) - largest);
    for (int64_t part = 0; part < parts_; part++) {
      const float* record = record_of(row, part);
      const float factor = std::exp(record[0] - largest);
      total += factor * record[1];
      for (int64_t i = 0; i < a_.size; i++) sums[i] += factor * record[2 + i];
    }
    for (int64_t i = 0; i < a_.size; i++) {  // back to the order of the tensors
      const int64_t at = i % UNIT;
      result[i] = sums[i - at + at % Values::VECTORS * VECTOR + at / Values::VECTORS] / total;
    }
    from_f32(result, a_.dtype, a_.size, element(a_.result, a_.dtype, row * a_.size));
  }

  const mxfp4_attention& a_;
  const int64_t parts_, groups_;
  std::vector<float> records_, scratch_;  // a scratch is one thread's queries and weights
};

}  // namespace mxfp4
