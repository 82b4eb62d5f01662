// MXFP8 (core/mxfp8.py): conversions between values and codes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "mxfp8_decoder.h"
#include "numbers.h"
#include "parallel.h"
#include "vectors.h"

namespace mxfp4::mxfp8 {

// Rounds a float32 of at most 448 to an E4M3 code: to nearest, ties to even.
inline uint8_t code_of(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  const uint32_t normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  // Adding 2^14 rounds at 2^-9, its ulp.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
  return static_cast<uint8_t>((bits >> 24 & 0x80) | (magnitude < 0x3c800000 ? subnormal : normal));
}

inline void quantize_block(const float* values, uint8_t* codes, uint8_t* scale) {
  uint32_t largest = 0;
  for (int i = 0; i < BLOCK; i++) largest = std::max(largest, bits_of(values[i]) & 0x7fffffff);
  if (largest >= 0x7f800000) {  // a NaN or an infinity
    std::memset(codes, 0, BLOCK);
    *scale = 255;
    return;
  }
  // The smallest exponent with largest <= 1.75 * 2^(exponent + 8).
  const uint32_t exponent = (largest + 0x1fffff) >> 23, biased = exponent > 8 ? exponent - 8 : 0;
  const float inverse = float_of((254 - biased) << 23);
  for (int i = 0; i < BLOCK; i++) codes[i] = code_of(values[i] * inverse);
  *scale = largest == 0 ? 127 : static_cast<uint8_t>(biased);
}

constexpr int64_t ENOUGH = 64 << 10;  // values for which another thread pays

inline int threads_for(int64_t values, int32_t threads) {
  return static_cast<int>(std::clamp<int64_t>(values / ENOUGH, 1, threads));
}

inline void quantize(const void* source, int32_t dtype, int64_t n, int64_t k, int64_t stride,
                     uint8_t* codes, uint8_t* scales, int32_t threads) {
  Cursor cursor(n, threads);
  parallel(threads_for(n * k, threads), [&](int, int) {
    int64_t begin, end;
    while (cursor.next(begin, end)) {
      for (int64_t row = begin; row < end; row++) {
        for (int64_t at = 0; at < k; at += BLOCK) {
          float values[BLOCK];
          to_f32(element(source, dtype, row * stride + at), dtype, BLOCK, values);
          quantize_block(values, codes + row * k + at, scales + (row * k + at) / BLOCK);
        }
      }
    }
  });
}

// The values of whole steps of codes that lie one behind the other, in order.
inline void dequantize_step(const Decoder& decoder, const uint8_t* codes, const uint8_t* scales,
                            int32_t dtype, void* out) {
  Vector values[Decoder::VECTORS];
  decoder.values(codes, values);
  const Vector scale = Decoder::scale(scales);
  for (Vector& value : values) value = value * scale;
  // With these scales every value is normal in bfloat16, or zero.
  if (dtype == MXFP4_BF16 && scales[0] >= 10 && scales[STEP / BLOCK - 1] >= 10)
    return Decoder::store_bf16(values, out);
  if (dtype == MXFP4_F32) return Decoder::store(values, static_cast<float*>(out));
  float in_order[STEP];
  Decoder::store(values, in_order);
  from_f32(in_order, dtype, STEP, out);
}

inline void dequantize(const uint8_t* codes, const uint8_t* scales, int64_t n, int64_t k,
                       int32_t dtype, void* values, int32_t threads) {
  const int64_t total = n * k, steps = total / STEP;
  Cursor cursor(steps, threads);
  parallel(threads_for(total, threads), [&](int, int) {
    const Decoder decoder;
    int64_t begin, end;
    while (cursor.next(begin, end))
      for (int64_t at = begin * STEP; at < end * STEP; at += STEP)
        dequantize_step(decoder, codes + at, scales + at / BLOCK, dtype,
                        element(values, dtype, at));
  });
  if (const int64_t at = steps * STEP; at < total) {  // one more block
    const DefaultArithmetic arithmetic;
    uint8_t rest[STEP] = {}, scale[STEP / BLOCK] = {};
    std::memcpy(rest, codes + at, BLOCK);
    scale[0] = scales[at / BLOCK];
    float numbers[STEP];
    dequantize_step(Decoder(), rest, scale, MXFP4_F32, numbers);
    from_f32(numbers, dtype, BLOCK, element(values, dtype, at));
  }
}

}  // namespace mxfp4::mxfp8
