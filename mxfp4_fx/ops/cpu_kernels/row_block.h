// A block of activations in exact integers, which few_rows.h multiplies.
//
// It becomes fixed-point numbers of 32 bits. Each has four signed bytes (limbs), and its value is
// (limb 0 + 2^8 limb 1 + 2^16 limb 2 + 2^24 limb 3) times a power of two. A weight w becomes a
// byte: 2 w + 12 where the dot product of bytes needs unsigned weights, and then the sums' starting
// values subtract what the 12 adds; 2 w elsewhere. The sum of two limbs is exact before it becomes
// float32.
//
// Some blocks are not exact in that form, because one value is tiny beside a large one. They are
// multiplied in float32, also directly from the codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "numbers.h"
#include "panels.h"

namespace mxfp4 {

constexpr int LIMBS = 4;

// How many lower limbs are zero. bfloat16 has 8 bits: without zeros among the limbs, values of a
// block are 2^15 times apart.
enum class BlockKind : int32_t { TWO_ZERO, ONE_ZERO, EXACT, FLOAT, EXTREME };

// A block of activations. Dword 2 g of a limb is multiplied with the low nibbles of group g, dword
// 2 g + 1 with the high ones.
struct RowBlock {
  int8_t limbs[LIMBS][BLOCK];
  int32_t start[LIMBS / 2];  // of the sums of limbs 0 and 1, and of limbs 2 and 3
  float unit;                // half of limb 0's unit, because weights count in halves
  BlockKind kind;
};

// In this range, products with codes and sums of them neither overflow nor underflow.
constexpr float ROW_SMALLEST = 0x1p-90f, ROW_LARGEST = 0x1p89f;

inline bool is_moderate(float value) {  // false for a NaN
  const float size = std::fabs(value);
  return size == 0 || (size >= ROW_SMALLEST && size <= ROW_LARGEST);
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

// Arranges limbs for smmla: each two in four parts of eight bytes, and a part of the upper limb
// follows that of the lower. A part has the low or the high nibbles of two groups.
inline void arrange_for_smmla(RowBlock& block) {
  int8_t old[LIMBS][BLOCK];
  std::memcpy(old, block.limbs, sizeof old);
  for (int limb = 0; limb < LIMBS; limb++) {
    int8_t* to = block.limbs[limb / 2 * 2] + 8 * (limb % 2);
    for (int part = 0; part < 4; part++)
      for (int group = 0; group < 2; group++)
        std::memcpy(to + 16 * part + 4 * group,
                    old[limb] + 16 * (part / 2) + 8 * group + 4 * (part % 2), 4);
  }
}

#endif

// All loops have a fixed length, no branch and only integer reductions, so that the compiler
// vectorizes them.
inline RowBlock row_block(const float* values) {
  RowBlock block{};
  uint32_t largest = 0, smallest = UINT32_MAX;  // of the magnitudes' bits; `smallest` is less 1
  for (int k = 0; k < BLOCK; k++) {
    const uint32_t size = bits_of(values[k]) & 0x7fffffff;
    largest = std::max(largest, size);
    smallest = std::min(smallest, size - 1);  // a zero wraps around and does not count
  }
  if (largest == 0) return block;  // TWO_ZERO
  if (smallest < bits_of(ROW_SMALLEST) - 1 || largest > bits_of(ROW_LARGEST)) {
    block.kind = BlockKind::EXTREME;
    return block;
  }
  // All are below 2^exponent, and by so much that limb 3 has room for a carry.
  const int exponent = static_cast<int>((largest + (1 << 17)) >> 23) - 126;
  const float scale = float_of(static_cast<uint32_t>(127 + 31 - exponent) << 23);
  int32_t fixed[BLOCK], inexact = 0;
  for (int k = 0; k < BLOCK; k++) {
    const float scaled = values[k] * scale;
    fixed[k] = static_cast<int32_t>(scaled);
    inexact |= static_cast<float>(fixed[k]) != scaled;
  }
  if (inexact) {
    block.kind = BlockKind::FLOAT;
    return block;
  }
  int32_t low = 0;
  for (int k = 0; k < BLOCK; k++) low |= fixed[k] & 0xffff;
  block.kind = low & 0xff ? BlockKind::EXACT : low ? BlockKind::ONE_ZERO : BlockKind::TWO_ZERO;
  for (int g = 0; g < BLOCK; g += 4) std::swap(fixed[g + 1], fixed[g + 2]);  // KORDER
  for (int limb = 0; limb < LIMBS; limb++) {
    int32_t sum = 0;
    for (int i = 0; i < BLOCK; i++) {
      const int32_t byte = static_cast<int8_t>(fixed[i]);
      block.limbs[limb][i] = static_cast<int8_t>(byte);
      fixed[i] = (fixed[i] - byte) >> 8;
      sum += byte;
    }
    block.start[limb / 2] -= 12 * (limb % 2 ? 256 * sum : sum);
  }
#if defined(__ARM_FEATURE_MATMUL_INT8)
  arrange_for_smmla(block);
#endif
  block.unit = float_of(static_cast<uint32_t>(127 - 32 + exponent) << 23);
  return block;
}

}  // namespace mxfp4
