// Products of bfloat16 rows (linear.h) in NEON, with instructions that read the even values of a
// vector, or the odd ones, and add as an FMA does. So the bits are those of the vectors' code.
#pragma once

#include "linear.h"

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

#include <arm_neon.h>

#include <cstdint>

namespace mxfp4 {

inline __attribute__((always_inline)) bfloat16x8_t load_bf16(const char* source) {
  return vreinterpretq_bf16_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(source)));
}

template <>
template <int S, int T>
inline __attribute__((always_inline)) void Held<Bf16Values>::multiply_line(
    const char* w, int64_t w_stride, const char* x, int64_t x_stride, Vector (&sums)[S][T]) {
#pragma GCC unroll 4
  for (int at = 0; at < LINE; at += UNIT) {
    bfloat16x8_t rows[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) rows[t] = load_bf16(x + t * x_stride + at);
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
      const bfloat16x8_t values = load_bf16(w + s * w_stride + at);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        auto sum = reinterpret_cast<float32x4_t>(sums[s][t]);
        sum = vbfmlaltq_f32(vbfmlalbq_f32(sum, values, rows[t]), values, rows[t]);
        sums[s][t] = reinterpret_cast<Vector>(sum);
      }
    }
  }
}

}  // namespace mxfp4

#endif
