// Linears whose weights are MXFP8 (mxfp8_linear.h) in NEON.
#pragma once

#if defined(__aarch64__)

#include <arm_neon.h>

#include <algorithm>
#include <cstdint>

#include "api.h"
#include "mxfp8.h"
#include "neon.h"
#include "panels.h"
#include "vectors.h"

namespace mxfp4::mxfp8 {

// Weights of `Linears` (linear.h); x is float32 as `arrange_f32` has it (mxfp8_linear.h).
//
// A row of a weight that has a NaN has NaN as its results. So codes are asked for one at the end.
struct NeonWeights {
  using Linear = mxfp8_linear;
  static constexpr int64_t BYTES = 1;
  static constexpr int MOST = 2, FAR_STREAMS = 4;
  static constexpr int streams(int t) { return t == MOST ? 4 : 8; }
  static constexpr int group(int64_t) { return 8; }

  template <int S, int T>
  static void multiply(const mxfp4_linear_group& a, const Linear& weight, int64_t n, int64_t apart,
                       int64_t row, Vector (&sums)[S][T]) {
    const int64_t blocks = a.k / BLOCK, w_stride = apart * a.k, s_stride = apart * blocks;
    const uint8_t* codes = weight.codes + n * a.k;
    const uint8_t* scales = weight.scales + n * blocks;
    const float* x = static_cast<const float*>(a.x) + row * BLOCK;
    uint8x16_t largest = vdupq_n_u8(0);  // twice the codes, without their signs
    for (int64_t block = 0; block < blocks; block++, x += a.x_stride) {
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
        const uint8_t* from = codes + s * w_stride + block * BLOCK;
        __builtin_prefetch(from + AHEAD);
        multiply_block(from, SCALES[scales[s * s_stride + block]], x, sums[s], largest);
      }
    }
    if (!is_nan(vmaxvq_u8(largest))) return;
    for (int s = 0; s < S; s++)
      if (std::any_of(codes + s * w_stride, codes + s * w_stride + a.k,
                      [](uint8_t code) { return is_nan(static_cast<uint8_t>(2 * code)); }))
        for (Vector& sum : sums[s]) sum = vector_of(SCALES[SCALE_NAN]);
  }

 private:
  static constexpr int64_t AHEAD = 512;  // bytes

  static bool is_nan(uint8_t twice) { return twice == 2 * 0x7f; }

  template <int T>
  static inline __attribute__((always_inline)) void multiply_block(const uint8_t* codes,
                                                                   float scale, const float* x,
                                                                   Vector (&sums)[T],
                                                                   uint8x16_t& largest) {
    float32x4_t products[T] = {};
#pragma GCC unroll 2
    for (int at = 0; at < BLOCK; at += 16) {
      const uint8x16_t bytes = vld1q_u8(codes + at);
      largest = vmaxq_u8(largest, vshlq_n_u8(bytes, 1));
      const Halves weights = halves_of_e4m3(bytes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const float32x4_t four = weights.four(i);
#pragma GCC unroll 2
        for (int t = 0; t < T; t++)
          products[t] = vfmaq_f32(products[t], four, vld1q_f32(x + t * BLOCK + at + 4 * i));
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) {
      // Products are of 2^-8 of the codes' values, and SCALES have the factor 2^7.
      const float32x4_t twice = vaddq_f32(products[t], products[t]);
      sums[t] = sums[t] + reinterpret_cast<Vector>(twice) * scale;
    }
  }
};

}  // namespace mxfp4::mxfp8

#endif
