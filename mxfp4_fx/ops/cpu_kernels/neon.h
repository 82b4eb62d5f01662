// Codes and scales in NEON's registers, for all kernels on aarch64.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace mxfp4 {

// Twice the values of the codes.
alignas(16) constexpr int8_t DOUBLED[16] = {0, 1,  2,  3,  4,  6,  8,  12,
                                            0, -1, -2, -3, -4, -6, -8, -12};

// 16 bytes of codes, such as 4 rows of 8 weights: twice the weights of the low nibbles, and of
// the high ones.
struct Doubled {
  int8x16_t low, high;

  Doubled() = default;
  inline __attribute__((always_inline)) explicit Doubled(uint8x16_t eight) {
    const int8x16_t table = vld1q_s8(DOUBLED);
    low = vqtbl1q_s8(table, vandq_u8(eight, vdupq_n_u8(15)));
    high = vqtbl1q_s8(table, vshrq_n_u8(eight, 4));
  }
};

// The upper bytes of the codes' values in float16; the lower ones are zero.
alignas(16) constexpr uint8_t HALF_FLOATS[16] = {0,    0x38, 0x3c, 0x3e, 0x40, 0x42, 0x44, 0x46,
                                                 0x80, 0xb8, 0xbc, 0xbe, 0xc0, 0xc2, 0xc4, 0xc6};

// 16 values in float16.
struct Halves {
  uint16x8_t of[2];

  // Values 4 i to 4 i + 3 in float32.
  inline __attribute__((always_inline)) float32x4_t four(int i) const {
    const float16x8_t half = vreinterpretq_f16_u16(of[i / 2]);
    return i % 2 ? vcvt_high_f32_f16(half) : vcvt_f32_f16(vget_low_f16(half));
  }
};

// The values of MXFP4's codes, one in a byte.
inline __attribute__((always_inline)) Halves halves_of_e2m1(uint8x16_t codes) {
  const uint8x16_t upper = vqtbl1q_u8(vld1q_u8(HALF_FLOATS), codes), lower = vdupq_n_u8(0);
  return {{vreinterpretq_u16_u8(vzip1q_u8(lower, upper)),
           vreinterpretq_u16_u8(vzip2q_u8(lower, upper))}};
}

// 2^-8 of the values of MXFP8's codes. NaN's become 2^-8 of 480.
inline __attribute__((always_inline)) Halves halves_of_e4m3(uint8x16_t codes) {
  const int8x16_t bytes = vreinterpretq_s8_u8(codes);
  const uint16x8_t low = vreinterpretq_u16_s16(vshll_n_s8(vget_low_s8(bytes), 7));
  const uint16x8_t high = vreinterpretq_u16_s16(vshll_high_n_s8(bytes, 7));
  const uint16x8_t bit = vdupq_n_u16(0x4000);  // another copy of the sign
  return {{vbicq_u16(low, bit), vbicq_u16(high, bit)}};
}

// Picks the dwords of a vector in KORDER.
alignas(16) constexpr uint8_t DWORDS_IN_KORDER[16] = {0, 1, 2, 3, 8,  9,  10, 11,
                                                      4, 5, 6, 7, 12, 13, 14, 15};

// Four dwords -> their first bytes, their second bytes, and so on.
inline __attribute__((always_inline)) uint8x16_t bytes_together(uint8x16_t dwords) {
  alignas(16) static constexpr uint8_t ORDER[16] = {0, 4, 8,  12, 1, 5, 9,  13,
                                                    2, 6, 10, 14, 3, 7, 11, 15};
  return vqtbl1q_u8(dwords, vld1q_u8(ORDER));
}

// Four bytes as dwords.
inline __attribute__((always_inline)) uint32x4_t four_bytes(const uint8_t* source) {
  uint32_t four;
  std::memcpy(&four, source, sizeof four);
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}

}  // namespace mxfp4
