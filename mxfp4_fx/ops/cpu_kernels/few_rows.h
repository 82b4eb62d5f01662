// Few rows times panels in exact integers: the fastest way while memory bounds the speed. Each
// panel is one stream, and memory is read faster in several streams at a time.
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

// Rows of activations, `bytes` apart: the blocks of a row, then its values.
struct FewRows {
  const char* first;
  int64_t bytes, blocks;

  static int64_t values_at(int64_t blocks) {
    return ceil_div(blocks * static_cast<int64_t>(sizeof(RowBlock)), LINE) * LINE;
  }
  static int64_t bytes_of(int64_t blocks) {
    return values_at(blocks) + blocks * BLOCK * static_cast<int64_t>(sizeof(float));
  }
  const RowBlock* block(int64_t row, int64_t b) const {
    return reinterpret_cast<const RowBlock*>(first + row * bytes) + b;
  }
  const float* values(int64_t row, int64_t b) const {
    return reinterpret_cast<const float*>(first + row * bytes + values_at(blocks)) + b * BLOCK;
  }
};

// sums [panels][ROWS][32], panels `step` apart, += ROWS rows times neighbouring panels whose flags
// are 0.
template <int ROWS>
void multiply_rows(const FewRows& rows, const uint8_t* panel, int64_t panels, float* sums,
                   int64_t step);

#if defined(__AVX2__)
constexpr bool HAS_FEW_ROWS = true;

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

// The sums of a block for 16 or 8 output rows and each of ROWS rows of activations. Codes of group
// g are at codes + 64 g.
template <int ROWS>
inline __attribute__((always_inline)) void limb_products(const uint8_t* codes,
                                                         const RowBlock* const (&x)[ROWS],
                                                         RowVector (&products)[ROWS]) {
#if defined(__AVX512VNNI__)
  const __m512i table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
#if !defined(__AVX512VBMI__)
  const __m512i nibble = _mm512_set1_epi8(15);
#endif
  __m512i sum[ROWS][LIMBS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
    for (int limb = 0; limb < LIMBS; limb++) sum[r][limb] = _mm512_set1_epi32(x[r]->start[limb]);
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
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 3
      for (int limb = 0; limb < LIMBS; limb++) {
        __m512i& into = sum[r][limb];
        into = _mm512_dpbusd_epi32(into, low, _mm512_set1_epi32(dword(*x[r], limb, 2 * g)));
        into = _mm512_dpbusd_epi32(into, high, _mm512_set1_epi32(dword(*x[r], limb, 2 * g + 1)));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
    const __m512i lower = _mm512_add_epi32(_mm512_slli_epi32(sum[r][1], 8), sum[r][0]);
    products[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][2]), _mm512_set1_ps(65536.f),
                                  _mm512_cvtepi32_ps(lower));
  }
#else
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i sum[ROWS][LIMBS];
  for (int r = 0; r < ROWS; r++)
    for (int limb = 0; limb < LIMBS; limb++) sum[r][limb] = _mm256_set1_epi32(x[r]->start[limb]);
#pragma GCC unroll 2
  for (int two = 0; two < 2; two++) {
    __m256i weights[4];
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
      const __m256i eight =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 64 * (2 * two + g)));
      weights[2 * g] = _mm256_shuffle_epi8(table, _mm256_and_si256(eight, nibble));
      weights[2 * g + 1] =
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(eight, 4), nibble));
    }
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 3
      for (int limb = 0; limb < LIMBS; limb++) {
        // Four products of at most 2 * 24 * 128 fit 16 bits.
        __m256i part = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
          part = _mm256_add_epi16(
              part,
              _mm256_maddubs_epi16(weights[i], _mm256_set1_epi32(dword(*x[r], limb, 4 * two + i))));
        sum[r][limb] = _mm256_add_epi32(sum[r][limb], _mm256_madd_epi16(part, ones));
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    const __m256i lower = _mm256_add_epi32(_mm256_slli_epi32(sum[r][1], 8), sum[r][0]);
    products[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][2]), _mm256_set1_ps(65536.f),
                                  _mm256_cvtepi32_ps(lower));
  }
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

// How far ahead weights of a panel are prefetched, in bytes.
inline int64_t row_prefetch() { return has_room_ahead() ? 4096 : 1024; }

// Adds the products of a block with values that may overflow or underflow in the fast kernels, are
// infinite or NaN.
inline void add_extreme(const float* values, const uint8_t* codes, const uint8_t* scales,
                        float* sums) {
  alignas(LINE) F32Block weights;
  decode_f32(codes, scales, weights);
  F32Tile::multiply_chunk<1>(values, &weights, 1, sums);
}

// Adds the products of a block of one row, of any kind, to its sums.
inline void add_any_block(const RowBlock* x, const float* values, const uint8_t* codes,
                          const uint8_t* scales, float* sums) {
  if (x->kind == BlockKind::EXTREME) return add_extreme(values, codes, scales, sums);
  for (int i = 0; i < PANEL_ROWS; i += ROW_LANES, sums += ROW_LANES) {
    const uint8_t* part = codes + i / LANES * (CODE_BYTES / 2) + i % LANES * 4;
    RowVector sum, products[1];
    if (x->kind == BlockKind::EXACT) {
      limb_products<1>(part, {x}, products);
      products[0] = products[0] * x->unit;
    } else {
      products[0] = float_products(part, values);
    }
    std::memcpy(&sum, sums, sizeof sum);
    sum = sum + products[0] * row_scales(scales + i);
    std::memcpy(sums, &sum, sizeof sum);
  }
}

template <int ROWS>
void multiply_rows(const FewRows& rows, const uint8_t* panel, int64_t panels, float* sums,
                   int64_t step) {
  const int64_t panel_bytes = ceil_div(rows.blocks, 2) * PAIR_BYTES, ahead = row_prefetch();
  for (int64_t b = 0; b < rows.blocks; b++) {
    const RowBlock* x[ROWS];
    bool exact = true;
    for (int r = 0; r < ROWS; r++) {
      x[r] = rows.block(r, b);
      exact &= x[r]->kind == BlockKind::EXACT;
    }
    for (int64_t p = 0; p < panels; p++) {
      const uint8_t* codes = block_codes(panel + p * panel_bytes, b);
      const uint8_t* scales = block_scales(panel + p * panel_bytes, b);
      float* to = sums + p * step;
      prefetch_block(panel + p * panel_bytes, b, ahead);
      if (__builtin_expect(!exact, 0)) {
        for (int r = 0; r < ROWS; r++)
          add_any_block(x[r], rows.values(r, b), codes, scales, to + r * PANEL_ROWS);
        continue;
      }
      for (int i = 0; i < PANEL_ROWS; i += ROW_LANES) {
        RowVector products[ROWS];
        limb_products<ROWS>(codes + i / LANES * (CODE_BYTES / 2) + i % LANES * 4, x, products);
        const RowVector scale = row_scales(scales + i);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
          RowVector sum;
          std::memcpy(&sum, to + r * PANEL_ROWS + i, sizeof sum);
          // The unit is applied first: unit times scale may underflow although the sum does not.
          sum = sum + products[r] * x[r]->unit * scale;
          std::memcpy(to + r * PANEL_ROWS + i, &sum, sizeof sum);
        }
      }
    }
  }
}

#else
constexpr bool HAS_FEW_ROWS = false;
#endif

}  // namespace mxfp4
