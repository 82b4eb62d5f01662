// The products of few_rows.h in AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "avx2.h"
#include "numbers.h"
#include "panels.h"
#include "row_block.h"

namespace mxfp4 {

using RowVector = __m256;
constexpr int ROW_LANES = 8;
constexpr int ROW_VECTORS = PANEL_ROWS / ROW_LANES;  // of a panel

// Keeps the order in which values are computed: the compiler would compute all products first, for
// which there are no registers.
inline __attribute__((always_inline)) void pin(__m256i& value) { asm volatile("" : "+x"(value)); }

// Four bytes in all lanes.
inline __attribute__((always_inline)) __m256i dword(const int8_t* bytes) {
  int32_t four;
  std::memcpy(&four, bytes, sizeof four);
  return _mm256_set1_epi32(four);
}

// A block of a panel, decoded where it is used: of eight output rows, weights of the low or the
// high nibbles of group g as bytes, two times their values and 12.
class CodedBlock {
 public:
  explicit CodedBlock(const uint8_t* codes) : codes_(codes) {}

  inline __attribute__((always_inline)) __m256i low(int v, int g) const {
    return bytes(_mm256_and_si256(load(v, g), nibble_));
  }
  inline __attribute__((always_inline)) __m256i high(int v, int g) const {
    return bytes(_mm256_and_si256(_mm256_srli_epi16(load(v, g), 4), nibble_));
  }

 private:
  const uint8_t* const codes_;
  const __m256i nibble_ = _mm256_set1_epi8(15);
  const __m256i table_ = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));

  inline __attribute__((always_inline)) __m256i load(int v, int g) const {
    const uint8_t* from = codes_ + v / 2 * (CODE_BYTES / 2) + v % 2 * 32 + g * LINE;
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  inline __attribute__((always_inline)) __m256i bytes(__m256i codes) const {
    return _mm256_shuffle_epi8(table_, codes);
  }
};

// The same, decoded once.
class DecodedBlock {
 public:
  inline __attribute__((always_inline)) explicit DecodedBlock(const CodedBlock& block) {
#pragma GCC unroll 4
    for (int v = 0; v < ROW_VECTORS; v++) {
#pragma GCC unroll 4
      for (int g = 0; g < 4; g++) {
        bytes_[v][g][0] = block.low(v, g);
        bytes_[v][g][1] = block.high(v, g);
      }
    }
  }
  inline __attribute__((always_inline)) __m256i low(int v, int g) const { return bytes_[v][g][0]; }
  inline __attribute__((always_inline)) __m256i high(int v, int g) const { return bytes_[v][g][1]; }

 private:
  __m256i bytes_[ROW_VECTORS][4][2];
};

// The sums of a block for the output rows of a panel and two limbs of a row of activations, of
// which the lower is zero if FIRST is 1. What is loaded of the activations is shared by all output
// rows.
template <int FIRST, class Block>
inline __attribute__((always_inline)) void add_limbs(const Block& block,
                                                     const int8_t (*limbs)[BLOCK],
                                                     __m256i (&sums)[ROW_VECTORS]) {
  // The upper limb counts 2^8 times as much as the lower.
  const __m256i factors[2] = {_mm256_set1_epi16(1), _mm256_set1_epi16(256)};
#pragma GCC unroll 2
  for (int two = 0; two < 2; two++) {
    __m256i parts[ROW_VECTORS][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const int g = 2 * two + half;
      __m256i x[2][2];
#pragma GCC unroll 2
      for (int limb = FIRST; limb < 2; limb++) {
        x[limb][0] = dword(limbs[limb] + 8 * g);
        x[limb][1] = dword(limbs[limb] + 8 * g + 4);
      }
#pragma GCC unroll 4
      for (int v = 0; v < ROW_VECTORS; v++) {
        __m256i low = block.low(v, g), high = block.high(v, g);
        pin(low), pin(high);
#pragma GCC unroll 2
        for (int limb = FIRST; limb < 2; limb++) {
          // Four products of at most 2 * 24 * 128 fit 16 bits.
          const __m256i part = _mm256_add_epi16(_mm256_maddubs_epi16(low, x[limb][0]),
                                                _mm256_maddubs_epi16(high, x[limb][1]));
          parts[v][limb] = half ? _mm256_add_epi16(parts[v][limb], part) : part;
          pin(parts[v][limb]);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < ROW_VECTORS; v++)
#pragma GCC unroll 2
      for (int limb = FIRST; limb < 2; limb++) {
        sums[v] = _mm256_add_epi32(sums[v], _mm256_madd_epi16(parts[v][limb], factors[limb]));
        pin(sums[v]);
      }
  }
}

// The sums of a block for a row of activations whose limbs before limb FIRST are zero, in units of
// limb 2 if FIRST is 2, else of limb 0.
template <int FIRST, class Block>
inline __attribute__((always_inline)) void limb_products(const Block& block, const RowBlock& x,
                                                         RowVector (&products)[ROW_VECTORS]) {
  __m256i sums[ROW_VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < ROW_VECTORS; v++) sums[v] = _mm256_set1_epi32(x.start[1]);
  add_limbs<0>(block, x.limbs + 2, sums);
#pragma GCC unroll 4
  for (int v = 0; v < ROW_VECTORS; v++) products[v] = _mm256_cvtepi32_ps(sums[v]);
  if constexpr (FIRST < 2) {
#pragma GCC unroll 4
    for (int v = 0; v < ROW_VECTORS; v++) sums[v] = _mm256_set1_epi32(x.start[0]);
    add_limbs<FIRST>(block, x.limbs, sums);
#pragma GCC unroll 4
    for (int v = 0; v < ROW_VECTORS; v++)
      products[v] =
          _mm256_fmadd_ps(products[v], _mm256_set1_ps(65536.f), _mm256_cvtepi32_ps(sums[v]));
  }
}

// The same of eight output rows in float32, from the block's values.
inline __attribute__((always_inline)) RowVector float_products(const uint8_t* codes,
                                                               const float* values) {
  __m256 sum[2] = {};
#pragma GCC unroll 4
  for (int g = 0; g < 4; g++)
    unpack_doubled(codes + 64 * g, [&](int k, __m256 doubled) {
      sum[k / 4] = _mm256_fmadd_ps(doubled, _mm256_broadcast_ss(values + 8 * g + k), sum[k / 4]);
    });
  return _mm256_mul_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_set1_ps(.5f));
}

// Scales of ROW_LANES rows as float32; they are in [SCALE_MIN, SCALE_MAX].
inline __attribute__((always_inline)) RowVector row_scales(const uint8_t* scales) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23));
}

}  // namespace mxfp4
