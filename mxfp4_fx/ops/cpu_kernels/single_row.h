// One row times a panel in exact integers: the fastest way while memory bounds the speed.
//
// A block of activations becomes fixed-point numbers of 24 bits. Each has three signed bytes
// (limbs), and its value is (limb 0 + 2^8 limb 1 + 2^16 limb 2) times a power of two. A weight w
// becomes the byte 2 w + 12, because the dot product of bytes needs unsigned weights. The sums'
// starting values subtract what the 12 adds. A block's sum is exact before it becomes float32.
//
// Some blocks are not exact in that form: one value may be tiny beside a large one, or a float32
// may use all its bits. They are multiplied in float32, also directly from the codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "f32_tile.h"
#include "numbers.h"
#include "panels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mxfp4 {

constexpr int LIMBS = 3;

enum class BlockKind : int32_t { EXACT, FLOAT, EXTREME };

// A block of activations. Dword 2 g of a limb is multiplied with the low nibbles of group g, dword
// 2 g + 1 with the high ones.
struct RowBlock {
  int8_t limbs[LIMBS][BLOCK];
  int32_t start[LIMBS];
  float unit;  // half of limb 0's unit, because weights count in halves
  BlockKind kind;
};

// In this range, products with codes and sums of them neither overflow nor underflow.
constexpr float ROW_SMALLEST = 0x1p-100f, ROW_LARGEST = 0x1p90f;

inline bool is_moderate(float value) {  // false for a NaN
  const float size = std::fabs(value);
  return size == 0 || (size >= ROW_SMALLEST && size <= ROW_LARGEST);
}

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
  if (largest == 0) return block;  // EXACT
  if (smallest < bits_of(ROW_SMALLEST) - 1 || largest > bits_of(ROW_LARGEST)) {
    block.kind = BlockKind::EXTREME;
    return block;
  }
  const int exponent = static_cast<int>(largest >> 23) - 126;  // all are below 2^exponent
  const float scale = float_of(static_cast<uint32_t>(127 + 22 - exponent) << 23);
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
  for (int g = 0; g < BLOCK; g += 4) std::swap(fixed[g + 1], fixed[g + 2]);  // KORDER
  for (int limb = 0; limb < LIMBS; limb++) {
    int32_t sum = 0;
    for (int i = 0; i < BLOCK; i++) {
      const int32_t byte = limb + 1 < LIMBS ? static_cast<int8_t>(fixed[i]) : fixed[i];
      block.limbs[limb][i] = static_cast<int8_t>(byte);
      fixed[i] = (fixed[i] - byte) >> 8;
      sum += byte;
    }
    block.start[limb] = -12 * sum;
  }
  block.unit = float_of(static_cast<uint32_t>(127 - 23 + exponent) << 23);
  return block;
}

// sums [32] += values [K] times a panel whose flag is 0.
inline void multiply_row(const RowBlock* row, const float* values, const uint8_t* panel,
                         int64_t blocks, float* sums);

#if defined(__AVX2__)
constexpr bool HAS_ROW_KERNEL = true;

// Four contiguous bytes of a limb.
inline int32_t dword(const RowBlock& x, int limb, int index) {
  int32_t four;
  std::memcpy(&four, x.limbs[limb] + 4 * index, sizeof four);
  return four;
}

#if defined(__AVX512VNNI__)
using RowVector = __m512;
#else
using RowVector = __m256;
#endif
constexpr int ROW_LANES = sizeof(RowVector) / sizeof(float);

// The sums of a block for 16 or 8 output rows: codes of group g are at codes + 64 g.
inline __attribute__((always_inline)) RowVector limb_products(const uint8_t* codes,
                                                              const RowBlock& x) {
#if defined(__AVX512VNNI__)
  const __m512i table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
#if !defined(__AVX512VBMI__)
  const __m512i nibble = _mm512_set1_epi8(15);
#endif
  __m512i sum[LIMBS];
  for (int limb = 0; limb < LIMBS; limb++) sum[limb] = _mm512_set1_epi32(x.start[limb]);
#pragma GCC unroll 4
  for (int g = 0; g < 4; g++) {
    const __m512i eight = _mm512_loadu_si512(codes + 64 * g);
#if defined(__AVX512VBMI__)
    // This lookup reads six bits and the table repeats, so no mask is needed.
    const __m512i low = _mm512_permutexvar_epi8(eight, table);
    const __m512i high = _mm512_permutexvar_epi8(_mm512_srli_epi16(eight, 4), table);
#else
    const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(eight, nibble));
    const __m512i high =
        _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(eight, 4), nibble));
#endif
#pragma GCC unroll 3
    for (int limb = 0; limb < LIMBS; limb++) {
      sum[limb] = _mm512_dpbusd_epi32(sum[limb], low, _mm512_set1_epi32(dword(x, limb, 2 * g)));
      sum[limb] =
          _mm512_dpbusd_epi32(sum[limb], high, _mm512_set1_epi32(dword(x, limb, 2 * g + 1)));
    }
  }
  const __m512i lower = _mm512_add_epi32(_mm512_slli_epi32(sum[1], 8), sum[0]);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[2]), _mm512_set1_ps(65536.f),
                         _mm512_cvtepi32_ps(lower));
#else
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i sum[LIMBS];
  for (int limb = 0; limb < LIMBS; limb++) sum[limb] = _mm256_set1_epi32(x.start[limb]);
#pragma GCC unroll 2
  for (int two = 0; two < 2; two++) {
    // Four products of at most 2 * 24 * 128 fit 16 bits.
    __m256i part[LIMBS];
#pragma GCC unroll 2
    for (int g = 2 * two; g < 2 * two + 2; g++) {
      const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 64 * g));
      const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(eight, nibble));
      const __m256i high =
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(eight, 4), nibble));
#pragma GCC unroll 3
      for (int limb = 0; limb < LIMBS; limb++) {
        const __m256i products = _mm256_add_epi16(
            _mm256_maddubs_epi16(low, _mm256_set1_epi32(dword(x, limb, 2 * g))),
            _mm256_maddubs_epi16(high, _mm256_set1_epi32(dword(x, limb, 2 * g + 1))));
        part[limb] = g == 2 * two ? products : _mm256_add_epi16(part[limb], products);
      }
    }
    for (int limb = 0; limb < LIMBS; limb++)
      sum[limb] = _mm256_add_epi32(sum[limb], _mm256_madd_epi16(part[limb], ones));
  }
  const __m256i lower = _mm256_add_epi32(_mm256_slli_epi32(sum[1], 8), sum[0]);
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[2]), _mm256_set1_ps(65536.f),
                         _mm256_cvtepi32_ps(lower));
#endif
}

// The same in float32, from the block's values.
inline __attribute__((always_inline)) RowVector float_products(const uint8_t* codes,
                                                               const float* values) {
#if defined(__AVX512VNNI__)
  const __m512 table = _mm512_loadu_ps(E2M1);
  __m512 sum[2] = {};
#pragma GCC unroll 4
  for (int g = 0; g < 4; g++) {
    const __m512i eight = _mm512_loadu_si512(codes + 64 * g);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      // The lookup reads the four low bits of a dword.
      const __m512i code = _mm512_srli_epi32(eight, static_cast<unsigned>(4 * i));
      const __m512 value = _mm512_set1_ps(values[8 * g + KORDER[i / 2] + 4 * (i % 2)]);
      sum[i % 2] = _mm512_fmadd_ps(_mm512_permutexvar_ps(code, table), value, sum[i % 2]);
    }
  }
  return _mm512_add_ps(sum[0], sum[1]);
#else
  const __m256 table = _mm256_loadu_ps(E2M1);
  const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000));
  __m256 sum[2] = {};
#pragma GCC unroll 4
  for (int g = 0; g < 4; g++) {
    const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 64 * g));
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      // The lookup reads the three low bits of a dword; the fourth is the sign.
      const __m256 size = _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(eight, 4 * i));
      const __m256i negative = _mm256_and_si256(_mm256_slli_epi32(eight, 28 - 4 * i), sign);
      const __m256 weight = _mm256_xor_ps(size, _mm256_castsi256_ps(negative));
      const __m256 value = _mm256_set1_ps(values[8 * g + KORDER[i / 2] + 4 * (i % 2)]);
      sum[i % 2] = _mm256_fmadd_ps(weight, value, sum[i % 2]);
    }
  }
  return _mm256_add_ps(sum[0], sum[1]);
#endif
}

// Scales of ROW_LANES rows as float32; they are in [SCALE_MIN, SCALE_MAX].
inline __attribute__((always_inline)) RowVector row_scales(const uint8_t* scales) {
#if defined(__AVX512VNNI__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23));
#else
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23));
#endif
}

// How far ahead weights are prefetched, in bytes.
constexpr int64_t ROW_PREFETCH = 2048;

// Adds the products of a block with values that may overflow or underflow in the fast kernels, are
// infinite or NaN.
inline void add_extreme(const float* values, const uint8_t* codes, const uint8_t* scales,
                        RowVector* sum) {
  alignas(LINE) F32Block weights;
  alignas(LINE) float sums[PANEL_ROWS];
  decode_f32(codes, scales, weights);
  std::memcpy(sums, sum, sizeof sums);
  F32Tile::multiply_chunk<1>(values, &weights, 1, sums);
  std::memcpy(sum, sums, sizeof sums);
}

inline void multiply_row(const RowBlock* row, const float* values, const uint8_t* panel,
                         int64_t blocks, float* sums) {
  constexpr int PARTS = PANEL_ROWS / ROW_LANES;
  RowVector sum[PARTS];
  for (int p = 0; p < PARTS; p++) std::memcpy(&sum[p], sums + p * ROW_LANES, sizeof sum[p]);
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* codes = block_codes(panel, b);
    const uint8_t* scales = block_scales(panel, b);
    prefetch_block(panel, b, ROW_PREFETCH);
    if (row[b].kind == BlockKind::EXTREME) {
      add_extreme(values + b * BLOCK, codes, scales, sum);
      continue;
    }
    for (int p = 0; p < PARTS; p++) {
      const int position = p * ROW_LANES;
      const uint8_t* part = codes + position / LANES * (CODE_BYTES / 2) + position % LANES * 4;
      // The unit is applied first: unit times scale may underflow although the sum does not.
      const RowVector products = __builtin_expect(row[b].kind == BlockKind::EXACT, 1)
                                     ? limb_products(part, row[b]) * row[b].unit
                                     : float_products(part, values + b * BLOCK);
      sum[p] = sum[p] + products * row_scales(scales + position);
    }
  }
  for (int p = 0; p < PARTS; p++) std::memcpy(sums + p * ROW_LANES, &sum[p], sizeof sum[p]);
}

#else
constexpr bool HAS_ROW_KERNEL = false;
#endif

}  // namespace mxfp4
