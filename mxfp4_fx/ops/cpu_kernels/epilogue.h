// The epilogue of a panel's sums: activation, gammas, and the order of the result's columns.
#pragma once

#include <cstdint>

#include "api.h"
#include "numbers.h"
#include "panels.h"
#include "vectors.h"

namespace mxfp4 {

// As in torch.clamp, a NaN stays a NaN, and a bound that is NaN gives NaN.
inline Vector at_most(Vector x, Vector bound) { return ((x <= bound) | (x != x)) ? x : bound; }
inline Vector at_least(Vector x, Vector bound) { return ((x >= bound) | (x != x)) ? x : bound; }

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

inline Vector sigmoid(Vector x) { return 1.f / (1.f + exponential(-x)); }

// GELU in its tanh form: (1 + tanh(z)) / 2 is the sigmoid of 2 z, which loses no digits where tanh
// is near -1.
inline Vector gelu_tanh(Vector x) {
  return x * sigmoid((x * x * 0.044715f + 1.f) * x * 1.5957691216f);  // 2 sqrt(2 / pi)
}

// Gate and up of LANES columns, sums [32] by position, through a gated activation. The upper bound
// comes last, so that it wins if the limit is negative.
template <class F>
inline void finish_gated(const float* sums, const mxfp4_matmul& m, float gamma, float* out,
                         F of_gate) {
  const Vector limit = vector_of(m.limit);
  for (int r = 0; r < LANES; r += VECTOR) {
    const Vector gate = at_most(load_vector(sums + r), limit);
    const Vector up = at_most(at_least(load_vector(sums + LANES + r), -limit), limit);
    store_vector(out + r, of_gate(gate) * (up + m.up_offset) * gamma);
  }
}

inline bool is_gated(const mxfp4_matmul& m) {
  return m.activation == MXFP4_SWIGLU || m.activation == MXFP4_GEGLU_TANH;
}

// A row's sums [32] by position (16 h + r) -> its results by column.
inline void finish_row(const float* sums, const mxfp4_matmul& m, float gamma, float* out) {
  switch (m.activation) {
    case MXFP4_SWIGLU:
      return finish_gated(sums, m, gamma, out,
                          [&](Vector gate) { return gate * sigmoid(gate * m.alpha); });
    case MXFP4_GEGLU_TANH:
      return finish_gated(sums, m, gamma, out, gelu_tanh);
    case MXFP4_RELU2:
      for (int r = 0; r < LANES; r++) {
        for (int h = 0; h < 2; h++) {
          const float sum = sums[LANES * h + r];
          out[2 * r + h] = (sum <= 0 ? 0.f : sum * sum) * gamma;  // a NaN stays a NaN
        }
      }
      return;
    default:
      for (int r = 0; r < LANES; r++) {
        out[2 * r] = sums[r] * gamma;
        out[2 * r + 1] = sums[LANES + r] * gamma;
      }
  }
}

}  // namespace mxfp4
