// Linears whose weights are MXFP8 (mxfp8.h): few rows of activations times codes that are decoded
// on the fly. Activations are arranged once a call, in the order in which codes are decoded. A
// block's scale is applied to sums of a step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "api.h"
#include "linear.h"
#include "mxfp8.h"
#include "mxfp8_linear_neon.h"
#include "numbers.h"
#include "panels.h"
#include "parallel.h"
#include "vectors.h"

namespace mxfp4::mxfp8 {

// How codes are prefetched. One row of x reads FAR_STREAMS only where there is room ahead.
constexpr int FAR_STREAMS = 4;
template <int S, int T>
constexpr int KEEPING = S == FAR_STREAMS && T == 1 ? READ_ONCE : KEPT;

// Weights of `Linears` (linear.h); x is float32 in the order of `arrange`.
struct Weights {
  using Linear = mxfp8_linear;
  static constexpr int64_t BYTES = 1;
#if defined(__AVX512F__)
  static constexpr int MOST = 3, STREAMS = 8;
#else
  static constexpr int MOST = 2, STREAMS = 4;
#endif
  static constexpr int FAR_STREAMS = mxfp8::FAR_STREAMS;

  template <int S, int T>
  static void multiply(const mxfp4_linear_group& a, const Linear& weight, int64_t n, int64_t apart,
                       int64_t row, Vector (&sums)[S][T]) {
    const int64_t blocks = a.k / BLOCK, w_stride = apart * a.k, s_stride = apart * blocks;
    const uint8_t* codes = weight.codes + n * a.k;
    const uint8_t* scales = weight.scales + n * blocks;
    const float* x = static_cast<const float*>(a.x) + row * a.x_stride;
    const Decoder decoder;
    const int64_t ahead = has_room_ahead() ? 2048 : 512;  // bytes
    const int64_t whole = a.k / STEP * STEP;
    for (int64_t at = 0; at < whole; at += STEP) {
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
        __builtin_prefetch(codes + s * w_stride + at + ahead, 0, (KEEPING<S, T>));
        multiply_step(decoder, codes + s * w_stride + at, scales + s * s_stride + at / BLOCK,
                      x + at, a.x_stride, sums[s]);
      }
    }
    if (whole < a.k) {  // a step that zeros complete
      for (int s = 0; s < S; s++) {
        uint8_t rest[STEP] = {}, scale[STEP / BLOCK] = {};
        std::memcpy(rest, codes + s * w_stride + whole, static_cast<size_t>(a.k - whole));
        std::memcpy(scale, scales + s * s_stride + whole / BLOCK,
                    static_cast<size_t>((a.k - whole) / BLOCK));
        multiply_step(decoder, rest, scale, x + whole, a.x_stride, sums[s]);
      }
    }
  }

 private:
  template <int T>
  static inline __attribute__((always_inline)) void multiply_step(const Decoder& decoder,
                                                                  const uint8_t* codes,
                                                                  const uint8_t* scales,
                                                                  const float* x, int64_t x_stride,
                                                                  Vector (&sums)[T]) {
    Vector values[Decoder::VECTORS];
    decoder.values(codes, values);
    const Vector scale = Decoder::scale(scales);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      Vector sum = values[0] * load_vector(x + t * x_stride);
#pragma GCC unroll 8
      for (int v = 1; v < Decoder::VECTORS; v++)
        sum = sum + values[v] * load_vector(x + t * x_stride + v * VECTOR);
      sums[t] = sums[t] + sum * scale;
    }
  }
};

#if defined(MXFP4_PATH_AVX512_BF16)

// The same with products of bfloat16; x is bfloat16 in the order of `Decoder::words`.
//
// Products are exact. But vdpbf16ps makes zeros of subnormal numbers and of subnormal results. So
// no value of x may be below SMALLEST but zero: then products, and sums of them, are multiples of
// 2^-126, because values have 8 bits and those of codes are multiples of 2^-16.
struct Bf16Weights {
  using Linear = mxfp8_linear;
  static constexpr int64_t BYTES = 1;
  static constexpr int MOST = 4, STREAMS = 4, FAR_STREAMS = mxfp8::FAR_STREAMS;
  static constexpr uint16_t SMALLEST = (127 - 103) << 7;  // 2^-103 in bfloat16

  template <int S, int T>
  static void multiply(const mxfp4_linear_group& a, const Linear& weight, int64_t n, int64_t apart,
                       int64_t row, Vector (&sums)[S][T]) {
    const int64_t blocks = a.k / BLOCK, w_stride = apart * a.k, s_stride = apart * blocks;
    const uint8_t* codes = weight.codes + n * a.k;
    const uint8_t* scales = weight.scales + n * blocks;
    const uint16_t* x = static_cast<const uint16_t*>(a.x) + row * a.x_stride;
    const Decoder decoder;
    const int64_t ahead = has_room_ahead() ? 2048 : 512;  // bytes
    for (int64_t block = 0; block < blocks; block += CHUNK) {
      const int count = static_cast<int>(std::min<int64_t>(CHUNK, blocks - block));
      __m512 factors[S];
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
        const uint8_t* from = scales + s * s_stride + block;
        __builtin_prefetch(from + ahead / BLOCK);
        factors[s] = scales_of(from, count);
      }
      int64_t at = block * BLOCK;
      __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
      for (int i = 0; i < count / 2; i++, at += STEP) {
#pragma GCC unroll 8
        for (int s = 0; s < S; s++) {
          const uint8_t* from = codes + s * w_stride + at;
          __builtin_prefetch(from + ahead, 0, (KEEPING<S, T>));
          multiply_step(decoder, _mm512_loadu_si512(from), _mm512_permutexvar_ps(lanes, factors[s]),
                        x + at, a.x_stride, sums[s]);
        }
        lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(2));
      }
      if (count % 2 == 0) continue;
      for (int s = 0; s < S; s++)  // zeros complete the last step
        multiply_step(decoder, _mm512_maskz_loadu_epi8(0xffffffff, codes + s * w_stride + at),
                      _mm512_permutexvar_ps(lanes, factors[s]), x + at, a.x_stride, sums[s]);
    }
  }

 private:
  static constexpr int64_t CHUNK = 16;  // blocks whose scales are read at once

  template <int T>
  static inline __attribute__((always_inline)) void multiply_step(const Decoder& decoder,
                                                                  __m512i codes, __m512 scale,
                                                                  const uint16_t* x,
                                                                  int64_t x_stride,
                                                                  Vector (&sums)[T]) {
    __m512i weights[2];
    decoder.words(codes, weights);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++, x += x_stride) {
      __m512 dot =
          _mm512_dpbf16_ps(_mm512_setzero_ps(), pairs(weights[0]), pairs(_mm512_loadu_si512(x)));
      dot = _mm512_dpbf16_ps(dot, pairs(weights[1]), pairs(_mm512_loadu_si512(x + STEP / 2)));
      sums[t] =
          reinterpret_cast<Vector>(_mm512_fmadd_ps(dot, scale, reinterpret_cast<__m512>(sums[t])));
    }
  }

  static inline __attribute__((always_inline)) __m512bh pairs(__m512i words) {
    return (__m512bh)words;
  }

  // SCALES of so many bytes.
  static inline __attribute__((always_inline)) __m512 scales_of(const uint8_t* bytes, int count) {
    const __m128i read = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1 << count) - 1), bytes);
    const __m512i exponents = _mm512_cvtepu8_epi32(_mm_adds_epu8(read, _mm_set1_epi8(7)));
    const __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(exponents, 23));
    const __mmask16 is_nan = _mm_cmpeq_epi8_mask(read, _mm_set1_epi8(-1));
    return _mm512_mask_mov_ps(scales, is_nan, _mm512_set1_ps(SCALES[255]));
  }
};

// Arranges a row of bfloat16. Returns whether `Bf16Weights` multiplies it.
inline bool arrange_bf16(const uint16_t* row, int64_t k, uint16_t* out) {
  uint16_t too_small = 0;
  for (int64_t i = 0; i < k; i++) {
    const uint16_t size = row[i] & 0x7fff;
    too_small |= (size != 0) & (size < Bf16Weights::SMALLEST);
  }
  constexpr int64_t HALF = 8;  // of 16 neighbours
  for (int64_t i = 0; i < k; i += 2 * HALF) {
    uint16_t* to = out + i / STEP * STEP + i % STEP / 2;
    std::memcpy(to, row + i, HALF * sizeof *row);
    std::memcpy(to + STEP / 2, row + i + HALF, HALF * sizeof *row);
  }
  return !too_small;
}

#endif

// Rows of x as float32 in the order of a decoder, completed by zeros to whole steps.
inline std::vector<float> arrange(const mxfp4_linear_group& a) {
  const DefaultArithmetic arithmetic;
  const int64_t padded = whole_steps(a.k);
  std::vector<float> all(static_cast<size_t>(a.rows * padded));
  for (int64_t row = 0; row < a.rows; row++) {
    for (int64_t block = 0; block < a.k; block += BLOCK) {
      float values[BLOCK];
      to_f32(element(a.x, a.dtype, row * a.x_stride + block), a.dtype, BLOCK, values);
      float* out = all.data() + row * padded + block / STEP * STEP;
      const int first = static_cast<int>(block % STEP);
      for (int i = 0; i < BLOCK; i++) out[Decoder::place(first + i)] = values[i];
    }
  }
  return all;
}

// Multiplies in float32. Results begin at row `first` of y.
inline void multiply_f32(const mxfp4_linear_group& arguments, const void* weights, int64_t first) {
  const std::vector<float> x = arrange(arguments);
  mxfp4_linear_group group = arguments;
  group.x = x.data();
  group.x_stride = whole_steps(group.k);
#if defined(__aarch64__)
  Linears<NeonWeights>(group, weights, first).run();
#else
  Linears<Weights>(group, weights, first).run();
#endif
}

#if defined(MXFP4_PATH_AVX512_BF16)

// Multiplies each row by the kernel that it would have alone, neighbours with the same one at once.
inline void multiply_bf16(const mxfp4_linear_group& arguments, const void* weights) {
  const int64_t padded = whole_steps(arguments.k), rows = arguments.rows;
  std::vector<uint16_t> x(static_cast<size_t>(rows * padded));
  std::vector<char> in_bf16(static_cast<size_t>(rows));
  const auto row_of = [&](int64_t row) {
    return static_cast<const uint16_t*>(arguments.x) + row * arguments.x_stride;
  };
  for (int64_t row = 0; row < rows; row++)
    in_bf16[row] = arrange_bf16(row_of(row), arguments.k, x.data() + row * padded);
  for (int64_t row = 0, next; row < rows; row = next) {
    for (next = row + 1; next < rows && in_bf16[next] == in_bf16[row];) next++;
    mxfp4_linear_group group = arguments;
    group.rows = next - row;
    group.x = row_of(row);
    if (!in_bf16[row]) {
      multiply_f32(group, weights, row);
      continue;
    }
    group.x = x.data() + row * padded;
    group.x_stride = padded;
    Linears<Bf16Weights>(group, weights, row).run();
  }
}

#endif

inline void multiply(const mxfp4_linear_group& arguments) {
#if defined(MXFP4_PATH_AVX512_BF16)
  if (arguments.dtype == MXFP4_BF16) return multiply_bf16(arguments, &arguments + 1);
#endif
  multiply_f32(arguments, &arguments + 1, 0);
}

}  // namespace mxfp4::mxfp8
