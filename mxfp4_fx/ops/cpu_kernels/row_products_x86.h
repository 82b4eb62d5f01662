// The products of few_rows.h in AVX2, and in AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "panels.h"
#include "row_block.h"

namespace mxfp4 {

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

// The sums of SHORT blocks count in units of limb 0, as all.
constexpr float SHORT_UNIT = 1;

// Vectors of output rows that are computed together.
template <int ROWS>
constexpr int row_vectors() {
  return 1;
}

// The sums of a block for 16 or 8 output rows and each of ROWS rows of activations, whose limbs
// before limb FIRST are zero. Codes of group g are at codes + 64 g.
template <int FIRST, int ROWS>
inline __attribute__((always_inline)) void limb_products(const uint8_t* codes,
                                                         const RowBlock* const (&x)[ROWS],
                                                         RowVector (&products)[ROWS][1]) {
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
    for (int limb = FIRST; limb < LIMBS; limb++)
      sum[r][limb] = _mm512_set1_epi32(x[r]->start[limb]);
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
      for (int limb = FIRST; limb < LIMBS; limb++) {
        __m512i& into = sum[r][limb];
        into = _mm512_dpbusd_epi32(into, low, _mm512_set1_epi32(dword(*x[r], limb, 2 * g)));
        into = _mm512_dpbusd_epi32(into, high, _mm512_set1_epi32(dword(*x[r], limb, 2 * g + 1)));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
    __m512i lower = _mm512_slli_epi32(sum[r][1], 8);
    if (FIRST == 0) lower = _mm512_add_epi32(lower, sum[r][0]);
    products[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][2]), _mm512_set1_ps(65536.f),
                                     _mm512_cvtepi32_ps(lower));
  }
#else
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i sum[ROWS][LIMBS];
  for (int r = 0; r < ROWS; r++)
    for (int limb = FIRST; limb < LIMBS; limb++)
      sum[r][limb] = _mm256_set1_epi32(x[r]->start[limb]);
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
      for (int limb = FIRST; limb < LIMBS; limb++) {
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
    __m256i lower = _mm256_slli_epi32(sum[r][1], 8);
    if (FIRST == 0) lower = _mm256_add_epi32(lower, sum[r][0]);
    products[r][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][2]), _mm256_set1_ps(65536.f),
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

}  // namespace mxfp4
