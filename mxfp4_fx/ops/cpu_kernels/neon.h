// Codes and scales in NEON's registers, for all kernels on aarch64.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace mxfp4 {

// Twice the values of the codes.
alignas(16) constexpr int8_t DOUBLED[16] = {0, 1,  2,  3,  4,  6,  8,  12,
                                            0, -1, -2, -3, -4, -6, -8, -12};

// 16 bytes of codes, which are 4 rows of 8 weights: twice the weights of the low nibbles, and of
// the high ones.
struct Doubled {
  int8x16_t low, high;

  Doubled() = default;
  inline __attribute__((always_inline)) explicit Doubled(const uint8_t* codes) {
    const int8x16_t table = vld1q_s8(DOUBLED);
    const uint8x16_t eight = vld1q_u8(codes);
    low = vqtbl1q_s8(table, vandq_u8(eight, vdupq_n_u8(15)));
    high = vqtbl1q_s8(table, vshrq_n_u8(eight, 4));
  }
};

// Half of byte j of each dword, in float32.
inline __attribute__((always_inline)) float32x4_t halved(int8x16_t bytes, int j) {
  const int32x4_t upper = vshlq_s32(vreinterpretq_s32_s8(bytes), vdupq_n_s32(24 - 8 * j));
  return vcvtq_n_f32_s32(vshrq_n_s32(upper, 24), 1);
}

// Four bytes as dwords.
inline __attribute__((always_inline)) uint32x4_t four_bytes(const uint8_t* source) {
  uint32_t four;
  std::memcpy(&four, source, sizeof four);
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}

}  // namespace mxfp4
