// MXFP8's codes (core/mxfp8.py) in registers.
//
// Codes are decoded in steps of one block or two, to vectors in an order of their own. A decoded
// value is 2^-7 of the code's, so that it is below 4, and a block's scale has the factor 2^7.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include "neon.h"
#endif

namespace mxfp4::mxfp8 {

constexpr int64_t BLOCK = 32;

// The values of the scale bytes times 2^7: 2^(byte - 120); 255 is NaN. Bytes from 248 on, which no
// values of float32 need, would be infinite.
inline const std::array<float, 256> SCALES = [] {
  std::array<float, 256> values{};
  for (uint32_t byte = 0; byte < 248; byte++) values[byte] = float_of((byte + 7) << 23);
  for (uint32_t byte = 248; byte < 255; byte++) values[byte] = float_of(0x7f800000);
  values[255] = float_of(0x7fc00000);
  return values;
}();

#if defined(__AVX2__)

// Byte j of each dword of codes -> vector j, whose elements are 2^-120 of the codes' values, also
// of the subnormal ones: a byte's bits are moved to those of a float32. A NaN code becomes 480.
inline __attribute__((always_inline)) void values_of_bytes(__m256i codes, __m256 (&out)[4]) {
  const __m256i bits = _mm256_set1_epi32(static_cast<int>(0x87f00000));
  const __m256i odd = _mm256_srai_epi16(codes, 4);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi32(codes, 8), 4);
  out[0] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(even, 16), bits));
  out[1] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(odd, 16), bits));
  out[2] = _mm256_castsi256_ps(_mm256_and_si256(even, bits));
  out[3] = _mm256_castsi256_ps(_mm256_and_si256(odd, bits));
}

// Looks for NaN codes, which values_of_bytes does not know, in all that it has seen.
class NanCodes {
 public:
  inline __attribute__((always_inline)) void see(__m256i codes) {
    largest_ = _mm256_max_epu8(largest_, _mm256_add_epi8(codes, codes));  // without signs
  }

  bool found() const {
    const __m256i is_nan = _mm256_cmpeq_epi8(largest_, _mm256_set1_epi8(static_cast<char>(0xfe)));
    return _mm256_movemask_epi8(is_nan) != 0;
  }

 private:
  __m256i largest_ = _mm256_setzero_si256();
};

#elif defined(__aarch64__)

// Looks for NaN codes, which halves_of_e4m3 does not know, in all that it has seen.
class NanCodes {
 public:
  inline __attribute__((always_inline)) void see(uint8x16_t codes) {
    largest_ = vmaxq_u8(largest_, vshlq_n_u8(codes, 1));  // without signs
  }

  bool found() const { return vmaxvq_u8(largest_) == 0xfe; }

 private:
  uint8x16_t largest_ = vdupq_n_u8(0);
};

#else

// No decoder leaves NaN codes to it.
struct NanCodes {
  static constexpr bool found() { return false; }
};

#endif

inline bool is_nan_code(uint8_t code) { return (code & 0x7f) == 0x7f; }

#if defined(__AVX512VBMI__)

// The lower and the upper byte of the bfloat16 of each code without its sign.
struct CodeBytes {
  alignas(64) uint8_t bytes[2][128];

  CodeBytes() {
    for (uint32_t code = 0; code < 128; code++) {
      const uint32_t exponent = code >> 3, fraction = code & 7;
      const float size = exponent ? float_of((exponent + 120) << 23 | fraction << 20)
                                  : static_cast<float>(fraction) * 0x1p-9f;
      const uint32_t bits = code == 127 ? 0x7fc00000 : bits_of(size * 0x1p-7f);
      bytes[0][code] = static_cast<uint8_t>(bits >> 16);
      bytes[1][code] = static_cast<uint8_t>(bits >> 24);
    }
  }
};
inline const CodeBytes BYTES_OF_CODES;

// Two blocks. A permutation ignores the sign's bit of its index.
class Decoder {
 public:
  static constexpr int STEP = 64, VECTORS = 4;

  inline __attribute__((always_inline)) Decoder() {
    for (int i = 0; i < 4; i++)
      tables_[i] = _mm512_load_si512(BYTES_OF_CODES.bytes[i / 2] + i % 2 * 64);
  }

  static int place(int i) { return VECTOR * (i % 16 / 8 * 2 + i % 2) + i / 16 * 4 + i % 8 / 2; }

  // The values as bfloat16: of each 16 neighbours, the first eight are in one vector, the last
  // eight in the other.
  inline __attribute__((always_inline)) void words(__m512i code, __m512i (&out)[2]) const {
    const __m512i low = _mm512_permutex2var_epi8(tables_[0], code, tables_[1]);
    const __m512i high =
        _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(tables_[2], code, tables_[3]), code,
                                  _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);  // a | (b & c)
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
  }

  inline __attribute__((always_inline)) void values(const uint8_t* codes, Vector* out) const {
    __m512i halves[2];
    words(_mm512_loadu_si512(codes), halves);
    for (int i = 0; i < 2; i++) {
      const auto both = reinterpret_cast<VectorBits>(halves[i]);
      out[2 * i] = reinterpret_cast<Vector>(both << 16);
      out[2 * i + 1] = reinterpret_cast<Vector>(both & 0xffff0000u);
    }
  }

  // What values of x, which are smaller than MOST, are multiplied by for `weights`: products are
  // those of `values`, then.
  static constexpr float FACTOR = 1, MOST = 0x1p124f;

  inline __attribute__((always_inline)) void weights(const uint8_t* codes, NanCodes&,
                                                     Vector* out) const {
    values(codes, out);
  }

  // Stores what bfloat16 holds exactly, in the order of the codes.
  static void store_bf16(const Vector* values, void* out) {
    __m512i words[2];
    for (int i = 0; i < 2; i++)
      words[i] = reinterpret_cast<__m512i>(
          reinterpret_cast<VectorBits>(values[2 * i]) >> 16 |
          (reinterpret_cast<VectorBits>(values[2 * i + 1]) & 0xffff0000u));
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(words[0], first, words[1]));
    _mm512_storeu_si512(static_cast<char*>(out) + 64,
                        _mm512_permutex2var_epi64(words[0], second, words[1]));
  }

  // Stores values in the order of the codes.
  static void store(const Vector* values, float* out) {
    const __m512i pairs = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 0, 0, 0, 0, 0, 0, 0, 0);
    for (int lane = 0; lane < 4; lane++) {
      const __m512i from = _mm512_add_epi32(pairs, _mm512_set1_epi32(4 * lane));
      for (int half = 0; half < 2; half++) {
        const __m512 eight =
            _mm512_permutex2var_ps(reinterpret_cast<__m512>(values[2 * half]), from,
                                   reinterpret_cast<__m512>(values[2 * half + 1]));
        _mm256_storeu_ps(out + 16 * lane + 8 * half, _mm512_castps512_ps256(eight));
      }
    }
  }

  static inline __attribute__((always_inline)) Vector scale(const uint8_t* scales) {
    const __m512 first = _mm512_set1_ps(SCALES[scales[0]]);
    return reinterpret_cast<Vector>(
        _mm512_mask_broadcastss_ps(first, 0xff00, _mm_set_ss(SCALES[scales[1]])));
  }

 private:
  __m512i tables_[4];
};

#elif defined(__AVX2__) && !defined(__AVX512F__)

// One block.
class Decoder {
 public:
  static constexpr int STEP = 32, VECTORS = 4;

  static int place(int i) { return VECTOR * (i % 4) + i / 4; }

  // What values of x, which are smaller than MOST, are multiplied by for `weights`: products are
  // those of `values`, then.
  static constexpr float FACTOR = 0x1p113f, MOST = 0x1p15f;

  // Leaves NaN codes to `nan_codes`.
  inline __attribute__((always_inline)) void weights(const uint8_t* codes, NanCodes& nan_codes,
                                                     Vector* out) const {
    const __m256i read = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    nan_codes.see(read);
    __m256 found[4];
    values_of_bytes(read, found);
    std::memcpy(out, found, sizeof found);
  }

  inline __attribute__((always_inline)) void values(const uint8_t* codes, Vector* out) const {
    __m256 found[4];
    values_of_bytes(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), found);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
      const auto value = reinterpret_cast<Vector>(found[j]);
      const auto is_nan = (reinterpret_cast<VectorBits>(value) & 0x7f00000u) == 0x7f00000u;
      out[j] = reinterpret_cast<Vector>(reinterpret_cast<VectorBits>(value * FACTOR) |
                                        reinterpret_cast<VectorBits>(is_nan));
    }
  }

  // Stores what bfloat16 holds exactly, in the order of the codes.
  static void store_bf16(const Vector* values, void* out) {
    __m256 eights[4];
    to_eights(values, eights);
    for (int i = 0; i < 2; i++) {
      const auto upper = [&](int at) {
        return _mm256_srli_epi32(_mm256_castps_si256(eights[at]), 16);
      };
      const __m256i words = _mm256_packus_epi32(upper(2 * i), upper(2 * i + 1));
      store_halves(words, static_cast<char*>(out) + 16 * i, static_cast<char*>(out) + 16 * i + 32);
    }
  }

  // Stores values in the order of the codes.
  static void store(const Vector* values, float* out) {
    __m256 eights[4];
    to_eights(values, eights);
    for (int i = 0; i < 4; i++)
      store_halves(_mm256_castps_si256(eights[i]), out + 4 * i, out + 4 * i + STEP / 2);
  }

  static inline __attribute__((always_inline)) Vector scale(const uint8_t* scales) {
    return reinterpret_cast<Vector>(_mm256_broadcast_ss(&SCALES[scales[0]]));
  }

 private:
  // Vector i of the result has values 4 i + [0, 4) and, in its upper half, those 16 further on.
  static void to_eights(const Vector* values, __m256 (&out)[4]) {
    const auto of = [&](int i) { return reinterpret_cast<__m256>(values[i]); };
    const __m256 pairs[2][2] = {
        {_mm256_unpacklo_ps(of(0), of(1)), _mm256_unpacklo_ps(of(2), of(3))},
        {_mm256_unpackhi_ps(of(0), of(1)), _mm256_unpackhi_ps(of(2), of(3))}};
    for (int i = 0; i < 2; i++) {
      const __m256d first = _mm256_castps_pd(pairs[i][0]), second = _mm256_castps_pd(pairs[i][1]);
      out[2 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(first, second));
      out[2 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(first, second));
    }
  }

  static void store_halves(__m256i both, void* lower, void* upper) {
    _mm_storeu_si128(static_cast<__m128i*>(lower), _mm256_castsi256_si128(both));
    _mm_storeu_si128(static_cast<__m128i*>(upper), _mm256_extracti128_si256(both, 1));
  }
};

#elif defined(__aarch64__)

// One block, in the order of the codes.
class Decoder {
 public:
  static constexpr int STEP = 32, VECTORS = STEP / VECTOR;

  static int place(int i) { return i; }

  // What values of x, which are smaller than MOST, are multiplied by for `weights`, which are 2^-8
  // of the codes' values: products are those of `values`, then, and sums of eight are finite.
  static constexpr float FACTOR = 2, MOST = 0x1p123f;

  // Leaves NaN codes to `nan_codes`.
  inline __attribute__((always_inline)) void weights(const uint8_t* codes, NanCodes& nan_codes,
                                                     Vector* out) const {
#pragma GCC unroll 2
    for (int at = 0; at < 2; at++) {
      const uint8x16_t bytes = vld1q_u8(codes + 16 * at);
      nan_codes.see(bytes);
      const Halves halves = halves_of_e4m3(bytes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) out[4 * at + i] = reinterpret_cast<Vector>(halves.four(i));
    }
  }

  inline __attribute__((always_inline)) void values(const uint8_t* codes, Vector* out) const {
#pragma GCC unroll 2
    for (int at = 0; at < 2; at++) {
      Halves halves = halves_of_e4m3(vld1q_u8(codes + 16 * at));
#pragma GCC unroll 2
      for (uint16x8_t& half : halves.of) {  // 0x7f and 0xff are NaN
        const uint16x8_t size = vdupq_n_u16(0x3f80);
        half = vorrq_u16(half, vceqq_u16(vandq_u16(half, size), size));
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const float32x4_t half = halves.four(i);
        out[4 * at + i] = reinterpret_cast<Vector>(vaddq_f32(half, half));
      }
    }
  }

  // Stores what bfloat16 holds exactly.
  static void store_bf16(const Vector* values, void* out) {
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS / 2; i++) {
      const uint16x8_t words = vuzp2q_u16(reinterpret_cast<uint16x8_t>(values[2 * i]),
                                          reinterpret_cast<uint16x8_t>(values[2 * i + 1]));
      std::memcpy(static_cast<char*>(out) + i * sizeof words, &words, sizeof words);
    }
  }

  static void store(const Vector* values, float* out) {
    std::memcpy(out, values, STEP * sizeof *out);
  }

  static Vector scale(const uint8_t* scales) { return vector_of(SCALES[scales[0]]); }
};

#else

// One block. Moving a code's bits makes a bfloat16 of 2^-120 times its value, also of a subnormal.
class Decoder {
 public:
  static constexpr int STEP = 32, VECTORS = STEP / VECTOR;

  static int place(int i) { return i / UNIT * UNIT + VECTOR * (i % 2) + i % UNIT / 2; }

  inline __attribute__((always_inline)) void values(const uint8_t* codes, Vector* out) const {
#pragma GCC unroll 4
    for (int unit = 0; unit < STEP / UNIT; unit++) {
      Codes bytes;
      std::memcpy(&bytes, codes + unit * UNIT, sizeof bytes);
      // The sign comes to bit 15, the other bits to 10:4.
      Halves halves =
          reinterpret_cast<Halves>(__builtin_convertvector(bytes, Signed)) << 4 & 0x87f0;
      halves |= reinterpret_cast<Halves>((halves & 0x7f0) == 0x7f0);  // 0x7f and 0xff are NaN
      const auto both = reinterpret_cast<VectorBits>(halves);
      out[2 * unit] = reinterpret_cast<Vector>(both << 16) * 0x1p113f;
      out[2 * unit + 1] = reinterpret_cast<Vector>(both & 0xffff0000u) * 0x1p113f;
    }
  }

  // What values of x, which are smaller than MOST, are multiplied by for `weights`: products are
  // those of `values`, then.
  static constexpr float FACTOR = 1, MOST = 0x1p127f / (4 * VECTORS);

  inline __attribute__((always_inline)) void weights(const uint8_t* codes, NanCodes&,
                                                     Vector* out) const {
    values(codes, out);
  }

  // Stores what bfloat16 holds exactly, in the order of the codes.
  static void store_bf16(const Vector* values, void* out) {
    for (int unit = 0; unit < STEP / UNIT; unit++) {
      const VectorBits words = reinterpret_cast<VectorBits>(values[2 * unit]) >> 16 |
                               (reinterpret_cast<VectorBits>(values[2 * unit + 1]) & 0xffff0000u);
      std::memcpy(static_cast<char*>(out) + unit * sizeof words, &words, sizeof words);
    }
  }

  // Stores values in the order of the codes.
  static void store(const Vector* values, float* out) {
    for (int unit = 0; unit < STEP / UNIT; unit++) {
      float even[VECTOR], odd[VECTOR];
      store_vector(even, values[2 * unit]);
      store_vector(odd, values[2 * unit + 1]);
      for (int i = 0; i < VECTOR; i++) {
        out[unit * UNIT + 2 * i] = even[i];
        out[unit * UNIT + 2 * i + 1] = odd[i];
      }
    }
  }

  static Vector scale(const uint8_t* scales) { return vector_of(SCALES[scales[0]]); }

 private:
  static constexpr int UNIT = 2 * VECTOR;

  typedef int8_t Codes __attribute__((vector_size(UNIT)));
  typedef int16_t Signed __attribute__((vector_size(UNIT * sizeof(int16_t))));
  typedef uint16_t Halves __attribute__((vector_size(UNIT * sizeof(uint16_t))));
};

#endif

constexpr int STEP = Decoder::STEP;

}  // namespace mxfp4::mxfp8
