// Rows times a panel in float32 FMAs, on every path; the compiler contracts a * b + c to an FMA.
// This kernel is right for all scale bytes and all activations. The faster kernels leave the panels
// and rows that they cannot multiply to it.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "panels.h"
#include "vectors.h"

#if defined(__AVX2__)
#include "avx2.h"
#elif defined(__aarch64__)
#include "neon.h"
#endif

namespace mxfp4 {

constexpr int PANEL_VECTORS = PANEL_ROWS / VECTOR;

// The bits of 2^(b - 127). Bit 22 makes them the subnormal 2^-127 for byte 0 and NaN for byte 255.
inline uint32_t scale_bits(uint32_t byte) {
  return byte << 23 | static_cast<uint32_t>(byte == 0 || byte == SCALE_NAN) << 22;
}

// Weight k of row `position` (16 h + r, see panels.h) is values[k][position].
using F32Block = float[BLOCK][PANEL_ROWS];

// Codes [512] and scales [32] of a block in a panel -> its weights in float32, exact or infinite.
inline void decode_f32(const uint8_t* codes, const uint8_t* scales, F32Block& values) {
  alignas(64) float factors[PANEL_ROWS];
  for (int i = 0; i < PANEL_ROWS; i++) factors[i] = float_of(scale_bits(scales[i]));
#if defined(__AVX512F__)
  const __m512 table = _mm512_loadu_ps(E2M1);
  for (int h = 0; h < 2; h++) {
    const __m512 factor = _mm512_load_ps(factors + LANES * h);
    for (int g = 0; g < 4; g++) {
      const __m512i eight = _mm512_loadu_si512(codes + 256 * h + 64 * g);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        // The lookup reads the four low bits of a dword.
        const __m512i code = _mm512_srli_epi32(eight, static_cast<unsigned>(4 * i));
        const __m512 weight = _mm512_mul_ps(_mm512_permutexvar_ps(code, table), factor);
        _mm512_storeu_ps(&values[8 * g + KORDER[i / 2] + 4 * (i % 2)][LANES * h], weight);
      }
    }
  }
#elif defined(__AVX2__)
  for (int i = 0; i < PANEL_ROWS; i += 8) {
    const uint8_t* part = codes + i / LANES * (CODE_BYTES / 2) + i % LANES * 4;
    const __m256 factor = _mm256_mul_ps(_mm256_load_ps(factors + i), _mm256_set1_ps(.5f));
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++)
      unpack_doubled(part + 64 * g, [&](int k, __m256 doubled) {
        _mm256_storeu_ps(&values[8 * g + k][i], _mm256_mul_ps(doubled, factor));
      });
  }
#elif defined(__aarch64__)
  for (int q = 0; q < 8; q++) {  // four rows
    const float32x4_t factor = vld1q_f32(factors + 4 * q);
    for (int g = 0; g < 4; g++) {
      const uint8x16_t eight =
          bytes_together(vld1q_u8(codes + 256 * (q / 4) + 64 * g + 16 * (q % 4)));
      const Halves low = halves_of_e2m1(vandq_u8(eight, vdupq_n_u8(15)));
      const Halves high = halves_of_e2m1(vshrq_n_u8(eight, 4));
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        float* to = &values[8 * g + KORDER[j]][4 * q];
        vst1q_f32(to, vmulq_f32(low.four(j), factor));
        vst1q_f32(to + 4 * PANEL_ROWS, vmulq_f32(high.four(j), factor));
      }
    }
  }
#else
  for (int h = 0; h < 2; h++) {
    for (int g = 0; g < 4; g++) {
      for (int r = 0; r < LANES; r++) {
        const float factor = factors[LANES * h + r];
        for (int j = 0; j < 4; j++) {
          const uint8_t byte = codes[256 * h + 64 * g + 4 * r + j];
          values[8 * g + KORDER[j]][LANES * h + r] = E2M1[byte & 15] * factor;
          values[8 * g + 4 + KORDER[j]][LANES * h + r] = E2M1[byte >> 4] * factor;
        }
      }
    }
  }
#endif
}

struct F32Tile {
  // The most rows of a tile. The sums of WHOLE rows with a whole panel fit the registers, those of
  // more rows with half a panel.
#if defined(__AVX512F__)
  static constexpr int ROWS = 12, WHOLE = 12;
#elif defined(__AVX2__)
  static constexpr int ROWS = 6, WHOLE = 3;
#elif defined(__aarch64__)
  static constexpr int ROWS = 5, WHOLE = 2;
#else
  static constexpr int ROWS = 1, WHOLE = 1;
#endif
  // Blocks that are decoded at a time and multiplied with all tiles; they fit the L1 cache.
  static constexpr int64_t CHUNK = 4;
  // Bytes of an expert's packed rows that are multiplied with one panel after the other. They
  // should fit the L2 cache. On AVX2, decoding a panel once more takes longer than reading the L3
  // cache.
#if defined(__AVX2__) && !defined(__AVX512F__)
  static constexpr int64_t GROUP_BYTES = 2048 << 10;
#else
  static constexpr int64_t GROUP_BYTES = 512 << 10;
#endif
  // Up to so many rows of an expert are faster in few_rows.h's integers, in which values of 16 bits
  // are exact; at most MOST_FEW.
  static constexpr int MOST_FEW = 6;
  static int few_rows(int32_t dtype) {
#if defined(__AVX512F__)
    return dtype == MXFP4_F32 ? 3 : 6;
#else
    return dtype == MXFP4_F32 ? 1 : 6;
#endif
  }
  struct Scratch {
    F32Block weights[CHUNK];
  };

  static Heights heights(int64_t rows) { return Heights::of(rows, ROWS); }
  static int64_t packed_bytes(int64_t k) { return k * static_cast<int64_t>(sizeof(float)); }

  // Packs row `row` into a tile of `rows` rows: value k goes to k * rows + row. Returns true: this
  // kernel can multiply every row.
  static bool pack(const float* values, int64_t k, int64_t row, int64_t rows, char* tile) {
    float* target = reinterpret_cast<float*>(tile) + row;
    for (int64_t i = 0; i < k; i++) target[i * rows] = values[i];
    return true;
  }

  // sums [tiles][rows][32] += tiles times the panel.
  static void multiply(const Tiles& x, const uint8_t* panel, const uint8_t*, float* sums,
                       Scratch& scratch) {
    for (int64_t block = 0; block < x.blocks; block += CHUNK) {
      const int64_t count = CHUNK < x.blocks - block ? CHUNK : x.blocks - block;
      for (int64_t b = 0; b < count; b++) {
        prefetch_block(panel, block + b, PREFETCH);
        decode_f32(block_codes(panel, block + b), block_scales(panel, block + b),
                   scratch.weights[b]);
      }
      multiply_tiles(x, block, count, scratch.weights, sums);
    }
  }

  // sums [tiles][rows][32] += `count` blocks of all tiles, from `block` on, times weights.
  static void multiply_tiles(const Tiles& x, int64_t block, int64_t count, const F32Block* weights,
                             float* sums) {
    for (int64_t t = 0; t < x.heights.tiles; t++) {
      const int64_t rows = x.heights.rows(t), row = x.heights.first(t);
      const char* tile = x.packed + (row * x.blocks + rows * block) * packed_bytes(BLOCK);
      multiply_rows(static_cast<int>(rows), reinterpret_cast<const float*>(tile), weights, count,
                    sums + row * PANEL_ROWS);
    }
  }

  // sums [N][32] += values [blocks * 32][N] times weights.
  template <int N>
  static void multiply_chunk(const float* x, const F32Block* weights, int64_t blocks, float* sums) {
    // So many vectors of a row's sums fit the registers.
    constexpr int V = N > WHOLE ? PANEL_VECTORS / 2 : PANEL_VECTORS;
    for (int first = 0; first < PANEL_ROWS; first += V * VECTOR)
      multiply_columns<N, V>(x, &weights[0][0][first], blocks, sums + first);
  }

 private:
  static constexpr int64_t PREFETCH = 1536;

  // V vectors of each row's sums. Inlined into a large function, they would not stay in registers.
  template <int N, int V>
  static __attribute__((noinline)) void multiply_columns(const float* x, const float* weight,
                                                         int64_t blocks, float* sums) {
    Vector sum[N][V];
    for (int n = 0; n < N; n++)
      for (int v = 0; v < V; v++) sum[n][v] = load_vector(sums + n * PANEL_ROWS + v * VECTOR);
    for (int64_t k = 0; k < blocks * BLOCK; k++, x += N, weight += PANEL_ROWS) {
      // The fewer operands are kept in registers, and the others are read once each.
      if constexpr (N <= V) {
        Vector values[N];
        for (int n = 0; n < N; n++) values[n] = vector_of(x[n]);
        for (int v = 0; v < V; v++) {
          const Vector one = load_vector(weight + v * VECTOR);
          for (int n = 0; n < N; n++) sum[n][v] = sum[n][v] + values[n] * one;
        }
      } else {
        Vector ones[V];
        for (int v = 0; v < V; v++) ones[v] = load_vector(weight + v * VECTOR);
        for (int n = 0; n < N; n++) {
          const Vector value = vector_of(x[n]);
          for (int v = 0; v < V; v++) sum[n][v] = sum[n][v] + value * ones[v];
        }
      }
    }
    for (int n = 0; n < N; n++)
      for (int v = 0; v < V; v++) store_vector(sums + n * PANEL_ROWS + v * VECTOR, sum[n][v]);
  }

  template <int N = ROWS>
  static void multiply_rows(int rows, const float* x, const F32Block* weights, int64_t blocks,
                            float* sums) {
    if constexpr (N > 0) {
      if (rows == N)
        multiply_chunk<N>(x, weights, blocks, sums);
      else
        multiply_rows<N - 1>(rows, x, weights, blocks, sums);
    }
  }
};

}  // namespace mxfp4
