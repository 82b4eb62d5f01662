// Weights from MXFP4 codes in AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "panels.h"

namespace mxfp4 {

// Codes of eight output rows, eight weights of each -> calls use(k, twice the rows' weights k).
template <class Use>
inline __attribute__((always_inline)) void unpack_doubled(const uint8_t* codes, Use&& use) {
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i halves[2] = {eight, _mm256_srli_epi16(eight, 4)};
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const __m256i bytes = _mm256_shuffle_epi8(table, _mm256_and_si256(halves[half], nibble));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m256i at_top = j < 3 ? _mm256_slli_epi32(bytes, 24 - 8 * j) : bytes;
      use(KORDER[j] + 4 * half, _mm256_cvtepi32_ps(_mm256_srai_epi32(at_top, 24)));
    }
  }
}

}  // namespace mxfp4
