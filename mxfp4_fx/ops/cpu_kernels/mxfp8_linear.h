// Linears whose weights are MXFP8 (mxfp8_decoder.h): few rows of activations times codes that are
// decoded on the fly. Activations are arranged once a call, in the order in which codes are
// decoded. A block's scale is applied to sums of a step.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "api.h"
#include "linear.h"
#include "mxfp8_decoder.h"
#include "mxfp8_tile.h"
#include "numbers.h"
#include "panels.h"
#include "parallel.h"
#include "vectors.h"

namespace mxfp4::mxfp8 {

// How codes are prefetched. One row of x reads FAR_STREAMS only where there is room ahead.
#if defined(MXFP4_PATH_AVX512_BF16)
constexpr int FAR_STREAMS = 4;
#else
constexpr int FAR_STREAMS = 1;  // never: no room is known
#endif
template <int S, int T>
constexpr int KEEPING = (FAR_STREAMS > 1) && (S == FAR_STREAMS) && (T == 1) ? READ_ONCE : KEPT;

// Weights of `Linears` (linear.h); x is float32 as `arrange_f32` has it: the rows' first steps,
// STEP apart, then their next steps, x_stride further on.
struct Weights {
  using Linear = mxfp8_linear;
  static constexpr int64_t BYTES = 1;
#if defined(__AVX512F__)
  static constexpr int MOST = 3;
  static constexpr int streams(int) { return 8; }
  static constexpr int group(int64_t) { return 8; }
#elif defined(__AVX2__)
  static constexpr int MOST = 4;
  static constexpr int streams(int t) { return t <= 2 ? 4 : 2; }
  // All rows of x at once need no weights that the cache has.
  static constexpr int group(int64_t rows) {
    return rows <= MOST ? streams(static_cast<int>(rows)) : 8;
  }
#else
  static constexpr int MOST = 2;
  static constexpr int streams(int t) { return t == MOST ? 4 : 8; }
  static constexpr int group(int64_t) { return 8; }
#endif
  static constexpr int FAR_STREAMS = mxfp8::FAR_STREAMS;

  template <int S, int T>
  static void multiply(const mxfp4_linear_group& a, const Linear& weight, int64_t n, int64_t apart,
                       int64_t row, Vector (&sums)[S][T]) {
    const int64_t blocks = a.k / BLOCK, w_stride = apart * a.k, s_stride = apart * blocks;
    const uint8_t* codes = weight.codes + n * a.k;
    const uint8_t* scales = weight.scales + n * blocks;
    const float* x = static_cast<const float*>(a.x) + row * STEP;
    const Decoder decoder;
    NanCodes nan_codes;
    Vector sum[S][T] = {};  // in registers: all indices are constants
    const int64_t ahead = has_room_ahead() ? 2048 : AHEAD;
    const int64_t whole = a.k / STEP * STEP;
    for (int64_t at = 0; at < whole; at += STEP, x += a.x_stride) {
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
#if defined(__AVX2__) && !defined(__AVX512F__)
        // x is read again for each row of the weight: registers do not hold it.
        if (T > 1) asm("" : "+r"(x));
#endif
        __builtin_prefetch(codes + s * w_stride + at + ahead, 0, (KEEPING<S, T>));
        multiply_step(decoder, nan_codes, codes + s * w_stride + at,
                      scales + s * s_stride + at / BLOCK, x, sum[s]);
      }
    }
    if (STEP > BLOCK && whole < a.k) {  // a step that zeros complete
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) {
        uint8_t rest[STEP] = {}, scale[STEP / BLOCK] = {};
        std::memcpy(rest, codes + s * w_stride + whole, static_cast<size_t>(a.k - whole));
        std::memcpy(scale, scales + s * s_stride + whole / BLOCK,
                    static_cast<size_t>((a.k - whole) / BLOCK));
        multiply_step(decoder, nan_codes, rest, scale, x, sum[s]);
      }
    }
    std::memcpy(sums, sum, sizeof sums);
    if (nan_codes.found())
      for (int s = 0; s < S; s++)
        if (std::any_of(codes + s * w_stride, codes + s * w_stride + a.k, is_nan_code))
          for (Vector& value : sums[s]) value = vector_of(SCALES[SCALE_NAN]);
  }

 private:
  static constexpr int64_t AHEAD = 512;  // bytes

  template <int T>
  static inline __attribute__((always_inline)) void multiply_step(
      const Decoder& decoder, NanCodes& nan_codes, const uint8_t* codes, const uint8_t* scales,
      const float* x, Vector (&sums)[T]) {
    Vector values[Decoder::VECTORS];
    decoder.weights(codes, nan_codes, values);
    const Vector scale = Decoder::scale(scales);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      Vector sum = values[0] * load_vector(x + t * STEP);
#pragma GCC unroll 8
      for (int v = 1; v < Decoder::VECTORS; v++)
        sum = sum + values[v] * load_vector(x + t * STEP + v * VECTOR);
      sums[t] = sums[t] + sum * scale;
    }
  }
};

inline int64_t whole_steps(int64_t k) { return (k + STEP - 1) / STEP * STEP; }

#if defined(MXFP4_PATH_AVX512_BF16)

// The same with products of bfloat16; x is bfloat16 in the order of `Decoder::words`.
//
// Products are exact. But vdpbf16ps makes zeros of subnormal numbers and of subnormal results. So
// no value of x may be below SMALLEST but zero: then products, and sums of them, are multiples of
// 2^-126, because values have 8 bits and those of codes are multiples of 2^-16.
struct Bf16Weights {
  using Linear = mxfp8_linear;
  static constexpr int64_t BYTES = 1;
  static constexpr int MOST = 4, FAR_STREAMS = mxfp8::FAR_STREAMS;
  static constexpr int streams(int t) { return t == MOST ? 4 : 8; }
  static constexpr int group(int64_t) { return 8; }
  static constexpr uint16_t SMALLEST = (127 - 103) << 7;  // 2^-103 in bfloat16
  // 2^123: from there on, sums of products may overflow before their scale is applied.
  static constexpr uint16_t LARGEST = (127 + 123) << 7;

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
  uint16_t extreme = 0;
  for (int64_t i = 0; i < k; i++) {
    const uint16_t size = row[i] & 0x7fff;
    extreme |= ((size != 0) & (size < Bf16Weights::SMALLEST)) | (size >= Bf16Weights::LARGEST);
  }
  constexpr int64_t HALF = 8;  // of 16 neighbours
  for (int64_t i = 0; i < k; i += 2 * HALF) {
    uint16_t* to = out + i / STEP * STEP + i % STEP / 2;
    std::memcpy(to, row + i, HALF * sizeof *row);
    std::memcpy(to + STEP / 2, row + i + HALF, HALF * sizeof *row);
  }
  return !extreme;
}

#endif

// Arranges a row of x as float32 in the order of a decoder, its steps `stride` apart, without the
// zeros that complete the last. Returns whether `Weights` multiplies the row: whether no product
// overflows or loses bits.
inline bool arrange_f32(const void* row, int32_t dtype, int64_t k, int64_t stride, float* out) {
  constexpr float LEAST = 0x1p-109f;  // products of 2^-17 are normal numbers
  bool fits = true;
  for (int64_t block = 0; block < k; block += BLOCK, row = element(row, dtype, BLOCK)) {
    float values[BLOCK];
    to_f32(row, dtype, BLOCK, values);
    for (float value : values) {
      const float size = std::fabs(value);
      fits &= (size == 0) | ((size >= LEAST) & (size < Decoder::MOST));
    }
    float* to = out + block / STEP * stride;
    const int first = static_cast<int>(block % STEP);
    for (int i = 0; i < BLOCK; i++) to[Decoder::place(first + i)] = values[i] * Decoder::FACTOR;
  }
  return fits;
}

// Calls `run` for each range of neighbours that are equal.
template <class F>
void for_equal(const std::vector<char>& flags, F run) {
  const auto count = static_cast<int64_t>(flags.size());
  for (int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && flags[end] == flags[begin];) end++;
    run(begin, end);
  }
}

inline const void* row_of(const mxfp4_linear_group& a, int64_t row) {
  return element(a.x, a.dtype, row * a.x_stride);
}

// Multiplies in float32. Results begin at row `first` of y. A row is multiplied alone as beside
// others.
inline void multiply_f32(const mxfp4_linear_group& arguments, const void* weights, int64_t first) {
  const int64_t stride = arguments.rows * STEP;
  std::vector<float> x(static_cast<size_t>(arguments.rows * whole_steps(arguments.k)));
  std::vector<char> fits(static_cast<size_t>(arguments.rows));
  {
    const DefaultArithmetic arithmetic;
    for (int64_t row = 0; row < arguments.rows; row++)
      fits[row] = arrange_f32(row_of(arguments, row), arguments.dtype, arguments.k, stride,
                              x.data() + row * STEP);
  }
  for_equal(fits, [&](int64_t row, int64_t next) {
    mxfp4_linear_group group = arguments;
    if (fits[row]) {
      group.rows = next - row;
      group.x = x.data() + row * STEP;
      group.x_stride = stride;
      return Linears<Weights>(group, weights, first + row).run();
    }
    for (group.rows = 1; row < next; row++) {
      group.x = row_of(arguments, row);
      ManyRows(group, weights, first + row).run();
    }
  });
}

#if defined(MXFP4_PATH_AVX512_BF16)

// Multiplies each row by the kernel that it would have alone, neighbours with the same one at once.
inline void multiply_bf16(const mxfp4_linear_group& arguments, const void* weights) {
  const int64_t padded = whole_steps(arguments.k), rows = arguments.rows;
  std::vector<uint16_t> x(static_cast<size_t>(rows * padded));
  std::vector<char> in_bf16(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; row++)
    in_bf16[row] = arrange_bf16(static_cast<const uint16_t*>(row_of(arguments, row)), arguments.k,
                                x.data() + row * padded);
  for_equal(in_bf16, [&](int64_t row, int64_t next) {
    mxfp4_linear_group group = arguments;
    group.rows = next - row;
    group.x = row_of(arguments, row);
    if (!in_bf16[row]) return multiply_f32(group, weights, row);
    group.x = x.data() + row * padded;
    group.x_stride = padded;
    Linears<Bf16Weights>(group, weights, row).run();
  });
}

#endif

// Up to so many rows of x are multiplied with codes in registers; more with a decoded panel. ARM's
// number is of the fewest instructions (benchmarks/arm.py).
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t FEW_ROWS = 4;
#elif defined(__aarch64__)
constexpr int64_t FEW_ROWS = 2;
#else
constexpr int64_t FEW_ROWS = 16;
#endif

inline void multiply(const mxfp4_linear_group& arguments) {
  if (arguments.rows > FEW_ROWS) return ManyRows(arguments, &arguments + 1).run();
#if defined(MXFP4_PATH_AVX512_BF16)
  if (arguments.dtype == MXFP4_BF16) return multiply_bf16(arguments, &arguments + 1);
#endif
  multiply_f32(arguments, &arguments + 1, 0);
}

}  // namespace mxfp4::mxfp8
