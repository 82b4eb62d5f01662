// The products of few_rows.h in AVX-512 with VNNI.
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

using RowVector = __m512;
constexpr int ROW_LANES = 16;

// Vectors of output rows that are computed together.
template <int ROWS>
constexpr int row_vectors() {
  return 1;
}

// The sums of a block for 16 output rows and each of ROWS rows of activations, whose limbs
// before limb FIRST are zero, in units of limb 2 if FIRST is 2, else of limb 0. Codes of group g
// are at codes + 64 g.
template <int FIRST, int ROWS>
inline __attribute__((always_inline)) void limb_products(const uint8_t* codes,
                                                         const RowBlock* const (&x)[ROWS],
                                                         RowVector (&products)[ROWS][1]) {
  const __m512i table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
#if !defined(__AVX512VBMI__)
  const __m512i nibble = _mm512_set1_epi8(15);
#endif
  __m512i sum[ROWS][LIMBS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int limb = FIRST / 2 * 2; limb < LIMBS; limb++)
      sum[r][limb] = _mm512_set1_epi32(limb % 2 ? 0 : x[r]->start[limb / 2]);
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
#pragma GCC unroll 4
      for (int limb = FIRST; limb < LIMBS; limb++) {
        __m512i& into = sum[r][limb];
        into = _mm512_dpbusd_epi32(into, low, _mm512_set1_epi32(dword(*x[r], limb, 2 * g)));
        into = _mm512_dpbusd_epi32(into, high, _mm512_set1_epi32(dword(*x[r], limb, 2 * g + 1)));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
    const auto two_limbs = [&](int low) {
      const __m512i upper = _mm512_slli_epi32(sum[r][low + 1], 8);
      return _mm512_cvtepi32_ps(_mm512_add_epi32(upper, sum[r][low]));
    };
    products[r][0] = two_limbs(2);
    if (FIRST < 2)
      products[r][0] = _mm512_fmadd_ps(products[r][0], _mm512_set1_ps(65536.f), two_limbs(0));
  }
}

// The same in float32, from the block's values.
inline __attribute__((always_inline)) RowVector float_products(const uint8_t* codes,
                                                               const float* values) {
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
}

// Scales of ROW_LANES rows as float32; they are in [SCALE_MIN, SCALE_MAX].
inline __attribute__((always_inline)) RowVector row_scales(const uint8_t* scales) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23));
}

}  // namespace mxfp4
