// MXFP4's values, and conversions between float32 and the 16-bit dtypes.
#pragma once

#include <cstdint>
#include <cstring>

#include "api.h"
#include "vectors.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mxfp4 {

// The values of the codes: OCP Microscaling v1.0, table 5; see formats.py.
constexpr float E2M1[16] = {0.f,  .5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                            -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float bf16_to_f32(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

// Rounds to nearest, ties to even. A NaN stays a NaN.
inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float f16_to_f32(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
  const uint32_t magnitude = value & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return float_of(sign | ((magnitude + 0x1c000) << 13));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
}

inline uint16_t f32_to_f16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds at 2^-24, float32's ulp there
    const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

#if defined(__F16C__)
// _mm256_cvtph_ps, _mm256_cvtps_ph and _cvtss_sh, rounding to nearest. They stand here because
// <immintrin.h> takes longer to read than most units take to compile.
typedef float EightFloats __attribute__((vector_size(8 * sizeof(float))));
typedef float FourFloats __attribute__((vector_size(4 * sizeof(float))));
typedef short EightHalves __attribute__((vector_size(8 * sizeof(short))));

inline EightFloats f16_to_f32(EightHalves values) { return __builtin_ia32_vcvtph2ps256(values); }
inline EightHalves f32_to_f16(EightFloats values) { return __builtin_ia32_vcvtps2ph256(values, 0); }
inline uint16_t hardware_f16(float value) {
  return static_cast<uint16_t>(__builtin_ia32_vcvtps2ph(FourFloats{value}, 0)[0]);
}
#endif

// Conversions of many values, whole vectors first: compilers do not vectorize them by themselves.
typedef uint16_t HalfBits __attribute__((vector_size(VECTOR * sizeof(uint16_t))));

inline void bf16_to_f32(const char* source, int64_t count, float* out) {
  int64_t i = 0;
  for (; i < count / VECTOR * VECTOR; i += VECTOR) {
    HalfBits values;
    std::memcpy(&values, source + 2 * i, sizeof values);
    const VectorBits bits = __builtin_convertvector(values, VectorBits) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
  for (; i < count; i++) {
    uint16_t value;
    std::memcpy(&value, source + 2 * i, sizeof value);
    out[i] = bf16_to_f32(value);
  }
}

inline void f32_to_bf16(const float* values, int64_t count, char* target) {
  int64_t i = 0;
  for (; i < count / VECTOR * VECTOR; i += VECTOR) {
    VectorBits bits;
    std::memcpy(&bits, values + i, sizeof bits);
    const VectorBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const auto is_nan = reinterpret_cast<VectorBits>((bits & 0x7fffffff) > 0x7f800000);
    const HalfBits halves =
        __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), HalfBits);
    std::memcpy(target + 2 * i, &halves, sizeof halves);
  }
  for (; i < count; i++) {
    const uint16_t value = f32_to_bf16(values[i]);
    std::memcpy(target + 2 * i, &value, sizeof value);
  }
}

inline void f16_to_f32(const char* source, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i < count / 8 * 8; i += 8) {
    EightHalves halves;
    std::memcpy(&halves, source + 2 * i, sizeof halves);
    const EightFloats values = f16_to_f32(halves);
    std::memcpy(out + i, &values, sizeof values);
  }
#elif defined(__aarch64__)
  for (; i < count / 4 * 4; i += 4) {
    uint64_t half;
    std::memcpy(&half, source + 2 * i, sizeof half);
    vst1q_f32(out + i, vcvt_f32_f16(vcreate_f16(half)));
  }
#endif
  for (; i < count; i++) {
    uint16_t value;
    std::memcpy(&value, source + 2 * i, sizeof value);
    out[i] = f16_to_f32(value);
  }
}

inline void f32_to_f16(const float* values, int64_t count, char* target) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i < count / 8 * 8; i += 8) {
    EightFloats eight;
    std::memcpy(&eight, values + i, sizeof eight);
    const EightHalves halves = f32_to_f16(eight);
    std::memcpy(target + 2 * i, &halves, sizeof halves);
  }
#elif defined(__aarch64__)
  for (; i < count / 4 * 4; i += 4) {
    const uint64_t half =
        vget_lane_u64(vreinterpret_u64_f16(vcvt_f16_f32(vld1q_f32(values + i))), 0);
    std::memcpy(target + 2 * i, &half, sizeof half);
  }
#endif
  for (; i < count; i++) {
    const uint16_t value = f32_to_f16(values[i]);
    std::memcpy(target + 2 * i, &value, sizeof value);
  }
}

// Stores a value in a dtype, rounded to nearest.
inline void store_value(float value, int32_t dtype, void* out) {
  if (dtype == MXFP4_F32) {
    std::memcpy(out, &value, sizeof value);
    return;
  }
#if defined(__F16C__)
  const uint16_t half = hardware_f16(value);
#elif defined(__aarch64__)
  const uint16_t half = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(value))), 0);
#else
  const uint16_t half = f32_to_f16(value);
#endif
  const uint16_t bits = dtype == MXFP4_BF16 ? f32_to_bf16(value) : half;
  std::memcpy(out, &bits, sizeof bits);
}

inline int64_t dtype_bytes(int32_t dtype) { return dtype == MXFP4_F32 ? 4 : 2; }

inline const void* element(const void* values, int32_t dtype, int64_t index) {
  return static_cast<const char*>(values) + index * dtype_bytes(dtype);
}

inline void* element(void* values, int32_t dtype, int64_t index) {
  return static_cast<char*>(values) + index * dtype_bytes(dtype);
}

// Converts `count` contiguous values of a dtype to float32; any alignment.
inline void to_f32(const void* values, int32_t dtype, int64_t count, float* out) {
  if (dtype == MXFP4_F32) {
    std::memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const char* source = static_cast<const char*>(values);
  if (dtype == MXFP4_BF16) return bf16_to_f32(source, count, out);
  f16_to_f32(source, count, out);
}

// Converts float32 to a dtype, rounded to nearest.
inline void from_f32(const float* values, int32_t dtype, int64_t count, void* out) {
  if (dtype == MXFP4_F32) {
    std::memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  char* target = static_cast<char*>(out);
  if (dtype == MXFP4_BF16) return f32_to_bf16(values, count, target);
  f32_to_f16(values, count, target);
}

}  // namespace mxfp4
