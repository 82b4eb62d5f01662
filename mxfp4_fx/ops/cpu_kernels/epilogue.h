// The epilogue of a panel's sums: SwiGLU, gammas, and the order of the result's columns.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "panels.h"
#include "vectors.h"

namespace mxfp4 {

// As in torch.clamp, a NaN stays a NaN, and a bound that is NaN gives NaN.
inline Vector at_most(Vector x, Vector bound) { return (x <= bound) | (x != x) ? x : bound; }
inline Vector at_least(Vector x, Vector bound) { return (x >= bound) | (x != x) ? x : bound; }

// e^x within 2 ulp for x >= -87. Results from 2^128 on are infinite, and a NaN stays a NaN.
inline Vector exponential(Vector x) {
  x = at_least(at_most(x, vector_of(89.f)), vector_of(-87.f));
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vector shifted = x * 1.44269504f + 12582912.f;
  const Vector n = shifted - 12582912.f;
  // ln 2 in two parts; the product of n and the first part is exact (Cody and Waite).
  Vector r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vector p = vector_of(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  // Two factors, because 2^128 is no float32.
  const VectorBits power = (VectorBits)shifted - bits_of(12582912.f) + 127;
  const VectorBits half = (power + 127) >> 1;
  return p * (Vector)(half << 23) * (Vector)((power + 127 - half) << 23);
}

// The clamped SwiGLU of GPT-OSS. The upper bound comes last, so that it wins if the limit is
// negative.
inline Vector swiglu(Vector gate, Vector up, float alpha, float limit) {
  gate = at_most(gate, vector_of(limit));
  up = at_most(at_least(up, vector_of(-limit)), vector_of(limit));
  const Vector z = gate * alpha;
  return gate * (1.f / (1.f + exponential(-z))) * (up + 1.f);
}

// A row's sums [32] by position (16 h + r) -> its results by column.
inline void finish_row(const float* sums, bool gated, float alpha, float limit, float gamma,
                       float* out) {
  if (gated) {
    for (int r = 0; r < LANES; r += VECTOR) {
      const Vector gate = load_vector(sums + r), up = load_vector(sums + LANES + r);
      store_vector(out + r, swiglu(gate, up, alpha, limit) * gamma);
    }
    return;
  }
  for (int r = 0; r < LANES; r++) {
    out[2 * r] = sums[r] * gamma;
    out[2 * r + 1] = sums[LANES + r] * gamma;
  }
}

}  // namespace mxfp4
