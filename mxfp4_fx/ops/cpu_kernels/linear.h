// A few rows of activations times weights that stay as the model holds them, which are read once.
//
// A core reads memory faster from several places at once than from one. So a thread multiplies
// several rows of a weight side by side, which are far apart, and prefetches each. Each sum has
// a vector of float32 accumulators of its own, whatever is computed beside it. So its bits depend
// neither on the number of threads nor on the other rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "numbers.h"
#include "panels.h"
#include "parallel.h"
#include "vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mxfp4 {

// How the values of a dtype become float32: a unit of them is one vector or two.
struct Bf16Values {
  static constexpr int BYTES = 2, VECTORS = 2;

  // The even values, then the odd ones: a bfloat16 is the upper half of a float32.
  static void load(const char* source, Vector* values) {
    VectorBits words;
    std::memcpy(&words, source, sizeof words);
    values[0] = reinterpret_cast<Vector>(words << 16);
    values[1] = reinterpret_cast<Vector>(words & 0xffff0000u);
  }
};

struct F16Values {
  static constexpr int BYTES = 2, VECTORS = 1;

  static void load(const char* source, Vector* values) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    // gcc 12 warns of the form without a mask.
    values[0] = reinterpret_cast<Vector>(_mm512_maskz_cvtph_ps(0xffff, half));
#elif defined(__F16C__)
    EightHalves halves;
    std::memcpy(&halves, source, sizeof halves);
    values[0] = f16_to_f32(halves);
#elif defined(__aarch64__)
    const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t*>(source));
    values[0] = reinterpret_cast<Vector>(vcvt_f32_f16(vreinterpret_f16_u16(half)));
#else
    float numbers[VECTOR];
    to_f32(source, MXFP4_F16, VECTOR, numbers);
    values[0] = load_vector(numbers);
#endif
  }
};

struct F32Values {
  static constexpr int BYTES = 4, VECTORS = 1;

  static void load(const char* source, Vector* values) {
    std::memcpy(values, source, sizeof *values);
  }
};

inline float sum_of(Vector sums) {
  float lanes[VECTOR];
  store_vector(lanes, sums);
  for (int width = VECTOR / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// Weights as the model holds them, in the dtype of x. `Linears` has the meaning of the members.
template <class Values>
struct Held {
  using Linear = mxfp4_linear;
  static constexpr int64_t BYTES = Values::BYTES;
#if defined(__AVX512F__)
  static constexpr int MOST = 4;
#else
  static constexpr int MOST = 2;
#endif
  static constexpr int streams(int t) { return t == MOST ? 4 : 8; }
  static constexpr int group(int64_t) { return 8; }
  static constexpr int FAR_STREAMS = 2;

  template <int S, int T>
  static void multiply(const mxfp4_linear_group& a, const Linear& weight, int64_t n, int64_t apart,
                       int64_t row, Vector (&sums)[S][T]) {
    const int64_t stride = weight.stride * Values::BYTES, w_stride = stride * apart;
    const int64_t x_stride = a.x_stride * Values::BYTES;
    const char* w = static_cast<const char*>(weight.weight) + stride * n;
    const char* x = static_cast<const char*>(a.x) + x_stride * row;
    const int64_t bytes = a.k * Values::BYTES, whole = bytes / LINE * LINE;
    for (int64_t at = 0; at < whole; at += LINE) {
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) prefetch<S>(w + s * w_stride + at);
      multiply_line(w + at, w_stride, x + at, x_stride, sums);
    }
    if (whole < bytes) {  // a line that zeros complete
      char end[S + T][LINE] = {};
      const auto size = static_cast<size_t>(bytes - whole);
      for (int s = 0; s < S; s++) std::memcpy(end[s], w + s * w_stride + whole, size);
      for (int t = 0; t < T; t++) std::memcpy(end[S + t], x + t * x_stride + whole, size);
      multiply_line(end[0], LINE, end[S], LINE, sums);
    }
  }

 private:
  static constexpr int64_t LINE = 64;  // bytes of a row that are multiplied at a time
  static constexpr int UNIT = Values::VECTORS * VECTOR * Values::BYTES;  // bytes
  // How far ahead each row is prefetched, in bytes. With 256 to 1024 for many rows the speed is the
  // same.
  static constexpr int64_t NEAR = 512, FAR = 4096;

  // FAR_STREAMS are read only where there is room ahead, and by one row.
  template <int S>
  static inline __attribute__((always_inline)) void prefetch(const char* line) {
    constexpr int KEEPING = S == FAR_STREAMS ? READ_ONCE : KEPT;
    __builtin_prefetch(line + (S > FAR_STREAMS ? NEAR : FAR), 0, KEEPING);
  }

  template <int S, int T>
  static inline __attribute__((always_inline)) void multiply_line(const char* w, int64_t w_stride,
                                                                  const char* x, int64_t x_stride,
                                                                  Vector (&sums)[S][T]) {
#pragma GCC unroll 4
    for (int at = 0; at < LINE; at += UNIT) {
      Vector rows[T][Values::VECTORS];
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) Values::load(x + t * x_stride + at, rows[t]);
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
        Vector values[Values::VECTORS];
        Values::load(w + s * w_stride + at, values);
#pragma GCC unroll 2
        for (int v = 0; v < Values::VECTORS; v++)
#pragma GCC unroll 4
          for (int t = 0; t < T; t++) sums[s][t] = sums[s][t] + values[v] * rows[t][v];
      }
    }
  }
};

// `Weights` has a type `Linear` of one weight, the BYTES of an element, the most rows of x that are
// multiplied at once, MOST, how many rows of a weight are beside so many rows of x, `streams`, how
// many are taken together, `group`, how many, read far ahead, are the fastest for one row where the
// cache has room for them, FAR_STREAMS, and `multiply`, which adds to sums[s][t] the products of
// row n + s * apart of a weight and row `row` + t of x.
template <class Weights>
class Linears {
 public:
  using Linear = typename Weights::Linear;

  // Results begin at row `first` of y.
  Linears(const mxfp4_linear_group& arguments, const void* weights, int64_t first = 0)
      : a_(arguments), weights_(static_cast<const Linear*>(weights)), first_(first) {}

  void run() const {
    int64_t total = 0, bytes = 0;
    for (int64_t i = 0; i < a_.count; i++) {
      total += groups(weights_[i]);
      bytes += weights_[i].n * a_.k * Weights::BYTES;
    }
    const int threads = static_cast<int>(std::clamp<int64_t>(bytes / ENOUGH, 1, a_.threads));
    Cursor cursor(total, threads);
    parallel(threads, [&](int, int) {
      int64_t begin, end;
      while (cursor.next(begin, end)) {
        int64_t first = 0;  // group of the weight
        for (int64_t i = 0; i < a_.count; i++) {
          const int64_t next = first + groups(weights_[i]);
          if (begin < next && first < end)
            multiply(weights_[i], GROUP * (std::max(begin, first) - first),
                     std::min(weights_[i].n, GROUP * (std::min(end, next) - first)));
          first = next;
        }
      }
    });
  }

 private:
  static constexpr int GROUP = 8;  // rows of a weight that a thread takes at a time
  // Bytes of weights for which another thread pays: calling it takes as long as reading them.
  static constexpr int64_t ENOUGH = 256 << 10;
  // More rows of x than fit the registers are multiplied in turn, by weights that the cache has.
  static constexpr int MOST = Weights::MOST;

  static int64_t groups(const Linear& weight) { return (weight.n + GROUP - 1) / GROUP; }

  // Rows [begin, end) of a weight, times all of x.
  void multiply(const Linear& weight, int64_t begin, int64_t end) const {
    int64_t done = begin;
    if (a_.rows == 1 && has_room_ahead()) {
      constexpr int FAR = Weights::FAR_STREAMS;
      const int64_t count = (end - begin) / FAR;
      for (int64_t i = 0; i < count; i++) multiply_tile<FAR, 1>(weight, begin + i, count, 0);
      done = begin + FAR * count;
    }
    const int group = Weights::group(a_.rows);
    const int64_t count = (end - done) / group;
    for (int64_t i = 0; i < count; i++) multiply_group(weight, done + i, count, group);
    for (int64_t n = done + group * count; n < end; n++)
      for (int64_t row = 0; row < a_.rows; row++) multiply_tile<1, 1>(weight, n, 0, row);
  }

  // A group of rows that are `apart` rows apart, the first of which is row n, times all of x.
  void multiply_group(const Linear& weight, int64_t n, int64_t apart, int group) const {
    const int64_t passes = (a_.rows + MOST - 1) / MOST;
    for (int64_t pass = 0; pass < passes; pass++) {  // of equally many rows of x, where possible
      const int64_t row = a_.rows * pass / passes, next = a_.rows * (pass + 1) / passes;
      multiply_rows(weight, n, apart, group, row, next - row);
    }
  }

  template <int T = MOST>
  void multiply_rows(const Linear& weight, int64_t n, int64_t apart, int group, int64_t row,
                     int64_t rows) const {
    if constexpr (T > 0) {
      if (rows != T) return multiply_rows<T - 1>(weight, n, apart, group, row, rows);
      constexpr int STREAMS = Weights::streams(T);
      static_assert(GROUP % STREAMS == 0 && Weights::group(T) % STREAMS == 0,
                    "a group is of whole streams");
      for (int s = 0; s < group; s += STREAMS)
        multiply_tile<STREAMS, T>(weight, n + s * apart, apart, row);
    }
  }

  // S rows of a weight times T rows of x.
  template <int S, int T>
  void multiply_tile(const Linear& weight, int64_t n, int64_t apart, int64_t row) const {
    Vector sums[S][T] = {};
    Weights::multiply(a_, weight, n, apart, row, sums);
    for (int t = 0; t < T; t++)
      for (int s = 0; s < S; s++) store(weight, n + s * apart, row + t, sum_of(sums[s][t]));
  }

  void store(const Linear& weight, int64_t n, int64_t row, float sum) const {
    if (weight.bias != nullptr) {
      float bias;
      to_f32(element(weight.bias, a_.dtype, n), a_.dtype, 1, &bias);
      sum += bias;
    }
    store_value(sum, a_.dtype, element(weight.y, a_.dtype, (first_ + row) * weight.n + n));
  }

  const mxfp4_linear_group& a_;
  const Linear* const weights_;
  const int64_t first_;
};

}  // namespace mxfp4
