// The epilogue of a panel's sums: SwiGLU, gammas, and the order of the result's columns.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "panels.h"

namespace mxfp4 {

// e^x within 2 ulp for x >= -87. Results from 2^128 on are infinite, and a NaN stays a NaN.
inline float exponential(float x) {
  x = x > 89.f ? 89.f : x;
  x = x < -87.f ? -87.f : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const float shifted = x * 1.44269504f + 12582912.f;
  const float n = shifted - 12582912.f;
  // ln 2 in two parts; the product of n and the first part is exact (Cody and Waite).
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  // Two factors, because 2^128 is no float32.
  const uint32_t power = bits_of(shifted) - bits_of(12582912.f) + 127;
  const uint32_t half = (power + 127) >> 1;
  return p * float_of(half << 23) * float_of((power + 127 - half) << 23);
}

// As in torch.clamp, a NaN stays a NaN, and a bound that is NaN gives NaN.
inline float at_most(float x, float bound) { return x <= bound || x != x ? x : bound; }
inline float at_least(float x, float bound) { return x >= bound || x != x ? x : bound; }

// The clamped SwiGLU of GPT-OSS. The upper bound comes last, so that it wins if the limit is
// negative.
inline float swiglu(float gate, float up, float alpha, float limit) {
  gate = at_most(gate, limit);
  up = at_most(at_least(up, -limit), limit);
  const float z = gate * alpha;
  return gate * (1.f / (1.f + exponential(-z))) * (up + 1.f);
}

// A row's sums [32] by position (16 h + r) -> its results by column. Returns the number of columns.
inline int64_t finish_row(const float* sums, bool gated, float alpha, float limit, float gamma,
                          float* out) {
  if (gated) {
    for (int r = 0; r < LANES; r++) out[r] = swiglu(sums[r], sums[LANES + r], alpha, limit) * gamma;
    return LANES;
  }
  for (int r = 0; r < LANES; r++) {
    out[2 * r] = sums[r] * gamma;
    out[2 * r + 1] = sums[LANES + r] * gamma;
  }
  return PANEL_ROWS;
}

}  // namespace mxfp4
