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

// Vectors of output rows that are computed together, for few rows of activations: they share what
// is loaded of the activations.
template <int ROWS>
constexpr int row_vectors() {
  return ROWS <= 2 ? 2 : 1;
}

// The sums of a block for V vectors of output rows and each of ROWS rows of activations, whose
// limbs before limb FIRST are zero. Codes of group g are at codes + 64 g.
template <int FIRST, int ROWS, int V>
inline __attribute__((always_inline)) void limb_products(const uint8_t* codes,
                                                         const RowBlock* const (&x)[ROWS],
                                                         RowVector (&products)[ROWS][V]) {
  int32x4_t sum[ROWS][V];
  Doubled weights[V][4];
#pragma GCC unroll 2
  for (int v = 0; v < V; v++)
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) weights[v][g] = Doubled(codes + 64 * g + 16 * v);
  constexpr int ORDER[LIMBS] = {1, 0, 2};  // limb 0 goes to limb 1's sums, times 256
#pragma GCC unroll 3
  for (int step = 0; step < LIMBS; step++) {
    const int limb = ORDER[step];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      const int8x16_t first = vld1q_s8(x[r]->limbs[limb]),
                      second = vld1q_s8(x[r]->limbs[limb] + 16);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        int32x4_t& into = sum[r][v];
        if (limb == 0) into = vshlq_n_s32(into, 8);
        if (limb == 2) products[r][v] = vcvtq_f32_s32(into);
        if (limb < FIRST) continue;
        if (limb > 0) into = vdupq_n_s32(0);
        into = vdotq_laneq_s32(into, weights[v][0].low, first, 0);
        into = vdotq_laneq_s32(into, weights[v][0].high, first, 1);
        into = vdotq_laneq_s32(into, weights[v][1].low, first, 2);
        into = vdotq_laneq_s32(into, weights[v][1].high, first, 3);
        into = vdotq_laneq_s32(into, weights[v][2].low, second, 0);
        into = vdotq_laneq_s32(into, weights[v][2].high, second, 1);
        into = vdotq_laneq_s32(into, weights[v][3].low, second, 2);
        into = vdotq_laneq_s32(into, weights[v][3].high, second, 3);
        if (limb == 2) products[r][v] = vfmaq_n_f32(products[r][v], vcvtq_f32_s32(into), 65536.f);
      }
    }
  }
}

// The same in float32, from the block's values.
inline __attribute__((always_inline)) RowVector float_products(const uint8_t* codes,
                                                               const float* values) {
  float32x4_t sum[2] = {vdupq_n_f32(0), vdupq_n_f32(0)};
  for (int g = 0; g < 4; g++, values += 8) {
    const Doubled eight(codes + 64 * g);
    for (int j = 0; j < 4; j++) {
      sum[0] = vfmaq_n_f32(sum[0], halved(eight.low, j), values[KORDER[j]]);
      sum[1] = vfmaq_n_f32(sum[1], halved(eight.high, j), values[4 + KORDER[j]]);
    }
  }
  return vaddq_f32(sum[0], sum[1]);
}

// Scales of ROW_LANES rows as float32; they are in [SCALE_MIN, SCALE_MAX].
inline __attribute__((always_inline)) RowVector row_scales(const uint8_t* scales) {
  return vreinterpretq_f32_u32(vshlq_n_u32(four_bytes(scales), 23));
}

}  // namespace mxfp4
