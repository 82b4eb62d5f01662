// AVX-512 in software, for machines without it: the driver includes this before all else, and its
// kernels' intrinsics become functions of SIMDe (Debian: libsimde-dev).
#pragma once

#include <immintrin.h>
#include <omp.h>
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

namespace emulated {

template <class To, class From>
To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
struct Sixteen {
  T values[16];
};

// What SIMDe lacks.
inline __m512 cvtepi32_ps(__m512i x) {
  Sixteen<float> y;
  for (int i = 0; i < 16; i++)
    y.values[i] = static_cast<float>(cast<Sixteen<int32_t>>(x).values[i]);
  return cast<__m512>(y);
}

inline __m512i cvtepu8_epi32(__m128i x) {
  Sixteen<int32_t> y;
  for (int i = 0; i < 16; i++) y.values[i] = cast<Sixteen<uint8_t>>(x).values[i];
  return cast<__m512i>(y);
}

inline __m512 maskz_cvtph_ps(uint16_t, __m256i x) {  // of a full mask
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  return cast<__m512>(halves);
}

template <int BYTES, class To>
To maskz_loadu_epi8(uint64_t mask, const void* from) {
  char bytes[BYTES] = {};
  for (int i = 0; i < BYTES; i++)
    if (mask >> i & 1) bytes[i] = static_cast<const char*>(from)[i];
  return cast<To>(bytes);
}

inline uint16_t cmpeq_epi8_mask(__m128i a, __m128i b) {
  return static_cast<uint16_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(a, b)));
}

inline __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  Sixteen<uint32_t> y{};
  for (int i = 0; i < 16; i++)
    for (int bit = 0; bit < 32; bit++) {
      const auto of = [&](__m512i x) { return cast<Sixteen<uint32_t>>(x).values[i] >> bit & 1; };
      y.values[i] |= (table >> (4 * of(a) + 2 * of(b) + of(c)) & 1u) << bit;
    }
  return cast<__m512i>(y);
}

}  // namespace emulated

// It keeps a vector in a register, and there is none.
#define asm(...)

#undef _mm512_maskz_cvtph_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_maskz_cvtph_ps emulated::maskz_cvtph_ps
#define _mm512_maskz_loadu_epi8 emulated::maskz_loadu_epi8<64, __m512i>
#define _mm_maskz_loadu_epi8 emulated::maskz_loadu_epi8<16, __m128i>
#define _mm_cmpeq_epi8_mask emulated::cmpeq_epi8_mask
#define _mm512_ternarylogic_epi32 emulated::ternarylogic_epi32

#undef _mm512_add_epi32
#define _mm512_add_epi32 simde_mm512_add_epi32
#undef _mm512_add_ps
#define _mm512_add_ps simde_mm512_add_ps
#undef _mm512_and_si512
#define _mm512_and_si512 simde_mm512_and_si512
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 simde_mm512_broadcast_i32x4
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 simde_mm512_castps512_ps256
#undef _mm512_castsi128_si512
#define _mm512_castsi128_si512 simde_mm512_castsi128_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps simde_mm512_castsi512_ps
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps simde_mm512_dpbf16_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 simde_mm512_dpbusd_epi32
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps simde_mm512_fmadd_ps
#undef _mm512_load_ps
#define _mm512_load_ps simde_mm512_load_ps
#undef _mm512_load_si512
#define _mm512_load_si512 simde_mm512_load_si512
#undef _mm512_loadu_ps
#define _mm512_loadu_ps simde_mm512_loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 simde_mm512_loadu_si512
#undef _mm512_mask_broadcastss_ps
#define _mm512_mask_broadcastss_ps simde_mm512_mask_broadcastss_ps
#undef _mm512_mask_mov_ps
#define _mm512_mask_mov_ps simde_mm512_mask_mov_ps
#undef _mm512_maskz_permutexvar_epi8
#define _mm512_maskz_permutexvar_epi8 simde_mm512_maskz_permutexvar_epi8
#undef _mm512_mul_ps
#define _mm512_mul_ps simde_mm512_mul_ps
#undef _mm512_or_si512
#define _mm512_or_si512 simde_mm512_or_si512
#undef _mm512_permutex2var_epi64
#define _mm512_permutex2var_epi64 simde_mm512_permutex2var_epi64
#undef _mm512_permutex2var_epi8
#define _mm512_permutex2var_epi8 simde_mm512_permutex2var_epi8
#undef _mm512_permutex2var_ps
#define _mm512_permutex2var_ps simde_mm512_permutex2var_ps
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 simde_mm512_permutexvar_epi16
#undef _mm512_permutexvar_epi8
#define _mm512_permutexvar_epi8 simde_mm512_permutexvar_epi8
#undef _mm512_permutexvar_ps
#define _mm512_permutexvar_ps simde_mm512_permutexvar_ps
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 simde_mm512_set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 simde_mm512_set1_epi8
#undef _mm512_set1_ps
#define _mm512_set1_ps simde_mm512_set1_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 simde_mm512_setr_epi32
#undef _mm512_setr_epi64
#define _mm512_setr_epi64 simde_mm512_setr_epi64
#undef _mm512_setzero_ps
#define _mm512_setzero_ps simde_mm512_setzero_ps
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 simde_mm512_shuffle_epi8
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 simde_mm512_slli_epi16
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 simde_mm512_slli_epi32
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 simde_mm512_srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 simde_mm512_srli_epi32
#undef _mm512_storeu_ps
#define _mm512_storeu_ps simde_mm512_storeu_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 simde_mm512_storeu_si512
#undef _mm512_sub_epi16
#define _mm512_sub_epi16 simde_mm512_sub_epi16
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 simde_mm512_sub_epi32
#undef _mm512_subs_epu16
#define _mm512_subs_epu16 simde_mm512_subs_epu16
#undef _mm512_unpackhi_epi8
#define _mm512_unpackhi_epi8 simde_mm512_unpackhi_epi8
#undef _mm512_unpacklo_epi8
#define _mm512_unpacklo_epi8 simde_mm512_unpacklo_epi8

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1
#if defined(MXFP4_PATH_AVX512_BF16)
#define __AVX512VBMI__ 1
#define __AVX512BF16__ 1
#endif
