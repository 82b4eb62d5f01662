// The products of few_rows.h in NEON, with the dot product of signed bytes.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "neon.h"
#include "panels.h"
#include "row_block.h"

namespace mxfp4 {

using RowVector = float32x4_t;
constexpr int ROW_LANES = 4;

#if defined(__ARM_FEATURE_MATMUL_INT8)

// Vectors of output rows that are computed together: they share what is loaded of the activations,
// and their sums fit the registers.
template <int ROWS>
constexpr int row_vectors() {
  return ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
}

inline __attribute__((always_inline)) int32x4_t low_halves(const int32x4_t (&x)[2]) {
  return vreinterpretq_s32_s64(
      vzip1q_s64(vreinterpretq_s64_s32(x[0]), vreinterpretq_s64_s32(x[1])));
}

inline __attribute__((always_inline)) int32x4_t high_halves(const int32x4_t (&x)[2]) {
  return vreinterpretq_s32_s64(
      vzip2q_s64(vreinterpretq_s64_s32(x[0]), vreinterpretq_s64_s32(x[1])));
}

// The sums of a block for V vectors of output rows and each of ROWS rows of activations, whose
// limbs before limb FIRST are zero, in units of limb 2 if FIRST is 2, else of limb 0. Codes of
// group g are at codes + 64 g.
//
// smmla multiplies two vectors of eight bytes with two others. Here those are two output rows, and
// two limbs of a row of activations.
template <int FIRST, int ROWS, int V>
inline __attribute__((always_inline)) void limb_products(const uint8_t* codes,
                                                         const RowBlock* const (&x)[ROWS],
                                                         RowVector (&products)[ROWS][V]) {
  // Of each vector: output rows 0 and 1, output rows 2 and 3.
  int32x4_t sums[LIMBS / 2][ROWS][V][2] = {};
#pragma GCC unroll 2
  for (int two = 0; two < 2; two++) {
    Doubled weights[V][2];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const auto group = [&](int g) {
        return vreinterpretq_u32_u8(vld1q_u8(codes + 64 * (2 * two + g) + 16 * v));
      };
      weights[v][0] = Doubled(vreinterpretq_u8_u32(vzip1q_u32(group(0), group(1))));
      weights[v][1] = Doubled(vreinterpretq_u8_u32(vzip2q_u32(group(0), group(1))));
    }
#pragma GCC unroll 2
    for (int high = 0; high < 2; high++) {
      const int part = 2 * two + high;
#pragma GCC unroll 2
      for (int pair = FIRST / 2; pair < LIMBS / 2; pair++) {
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
          const int8x16_t limbs = vld1q_s8(&x[r]->limbs[2 * pair][0] + 16 * part);
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
              int32x4_t& into = sums[pair][r][v][h];
              into = vmmlaq_s32(into, limbs, high ? weights[v][h].high : weights[v][h].low);
            }
          }
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const auto two_limbs = [&](int pair) {
        const int32x4_t(&sum)[2] = sums[pair][r][v];
        return vcvtq_f32_s32(vmlaq_n_s32(low_halves(sum), high_halves(sum), 256));
      };
      products[r][v] = two_limbs(1);
      if constexpr (FIRST < 2) products[r][v] = vfmaq_n_f32(two_limbs(0), products[r][v], 65536.f);
    }
  }
}

#else

// Vectors of output rows that are computed together, for few rows of activations: they share what
// is loaded of the activations.
template <int ROWS>
constexpr int row_vectors() {
  return ROWS <= 2 ? 2 : 1;
}

// The same with dot products of a limb's bytes.
template <int FIRST, int ROWS, int V>
inline __attribute__((always_inline)) void limb_products(const uint8_t* codes,
                                                         const RowBlock* const (&x)[ROWS],
                                                         RowVector (&products)[ROWS][V]) {
  Doubled weights[V][4];
#pragma GCC unroll 2
  for (int v = 0; v < V; v++)
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) weights[v][g] = Doubled(vld1q_u8(codes + 64 * g + 16 * v));
#pragma GCC unroll 2
  for (int pair = 1; pair >= 0; pair--) {
    if (2 * pair + 1 < FIRST) continue;
    int32x4_t sums[ROWS][V] = {};
#pragma GCC unroll 2
    for (int upper = 1; upper >= 0; upper--) {
      const int limb = 2 * pair + upper;
      if (limb < FIRST) continue;
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) {
        const int8x16_t first = vld1q_s8(x[r]->limbs[limb]),
                        second = vld1q_s8(x[r]->limbs[limb] + 16);
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          int32x4_t& into = sums[r][v];
          into = vdotq_laneq_s32(into, weights[v][0].low, first, 0);
          into = vdotq_laneq_s32(into, weights[v][0].high, first, 1);
          into = vdotq_laneq_s32(into, weights[v][1].low, first, 2);
          into = vdotq_laneq_s32(into, weights[v][1].high, first, 3);
          into = vdotq_laneq_s32(into, weights[v][2].low, second, 0);
          into = vdotq_laneq_s32(into, weights[v][2].high, second, 1);
          into = vdotq_laneq_s32(into, weights[v][3].low, second, 2);
          into = vdotq_laneq_s32(into, weights[v][3].high, second, 3);
          if (upper) into = vshlq_n_s32(into, 8);
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        const float32x4_t sum = vcvtq_f32_s32(sums[r][v]);
        products[r][v] = pair ? sum : vfmaq_n_f32(sum, products[r][v], 65536.f);
      }
    }
  }
}

#endif

// The same in float32, from the block's values.
inline __attribute__((always_inline)) RowVector float_products(const uint8_t* codes,
                                                               const float* values) {
  const uint8x16_t order = vld1q_u8(DWORDS_IN_KORDER);
  float32x4_t sums[4] = {};  // of each row, of its weights j of all groups
#pragma GCC unroll 4
  for (int g = 0; g < 4; g++) {
    const uint8x16_t eight = vld1q_u8(codes + 64 * g);
#pragma GCC unroll 2
    for (int high = 0; high < 2; high++) {
      const uint8x16_t four = vld1q_u8(reinterpret_cast<const uint8_t*>(values + 8 * g + 4 * high));
      const float32x4_t x = vreinterpretq_f32_u8(vqtbl1q_u8(four, order));
      const Halves weights =
          halves_of_e2m1(high ? vshrq_n_u8(eight, 4) : vandq_u8(eight, vdupq_n_u8(15)));
#pragma GCC unroll 4
      for (int row = 0; row < 4; row++) sums[row] = vfmaq_f32(sums[row], weights.four(row), x);
    }
  }
  return vpaddq_f32(vpaddq_f32(sums[0], sums[1]), vpaddq_f32(sums[2], sums[3]));
}

// Scales of ROW_LANES rows as float32; they are in [SCALE_MIN, SCALE_MAX].
inline __attribute__((always_inline)) RowVector row_scales(const uint8_t* scales) {
  uint32_t four;
  std::memcpy(&four, scales, sizeof four);
  const uint16x8_t upper = vshll_n_u8(vcreate_u8(four), 7);  // as bfloat16
  return vreinterpretq_f32_u16(vzip1q_u16(vdupq_n_u16(0), upper));
}

}  // namespace mxfp4
