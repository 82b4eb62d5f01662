// Rows times a panel with bfloat16 products and float32 sums (bfmmla), on ARM.
//
// An instruction multiplies two rows of activations with two rows of weights, four neighbours in k
// of each. A product of a bfloat16 activation and an MXFP4 weight is exact. Additions round to odd,
// whose error is below one unit in the last place, and not half of one. Subnormal numbers are read
// as zero and subnormal results flushed to zero, so rows with extreme values are multiplied in
// float32.
#pragma once

#if defined(MXFP4_PATH_NEON_BF16)

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "neon.h"
#include "numbers.h"
#include "panels.h"
#include "row_block.h"

namespace mxfp4 {

struct NeonBf16Tile {
  // The most rows of a tile whose sums fit the registers, beside the operands.
  static constexpr int ROWS = 8;
  // Bytes of an expert's packed rows that are multiplied with one panel after the other; they
  // should fit the L2 cache.
  static constexpr int64_t GROUP_BYTES = 512 << 10;
  // From four rows on, bfmmla takes fewer instructions than the integers of few_rows.h.
  static constexpr int MOST_FEW = 3;
  static int few_rows(int32_t) { return MOST_FEW; }
  // Blocks that are decoded at a time and multiplied with all tiles; they fit the L1 cache.
  static constexpr int64_t CHUNK = 8;
  // A block of a panel: [k / 4][row of the panel, as panels.h has it][k % 4, in KORDER].
  using Weights = uint16_t[BLOCK / 4][PANEL_ROWS][4];
  struct Scratch {
    Weights weights[CHUNK];
  };

  static Heights heights(int64_t rows) { return Heights::of(rows, ROWS); }
  static int64_t packed_bytes(int64_t k) { return k * static_cast<int64_t>(sizeof(uint16_t)); }

  // Packs row `row` into a tile of `rows` rows: [k / 4][rows][k % 4, in KORDER]. The values must be
  // bfloat16 numbers. Returns whether this kernel can multiply them.
  static bool pack(const float* values, int64_t k, int64_t row, int64_t rows, char* tile) {
    uint16_t* target = reinterpret_cast<uint16_t*>(tile) + 4 * row;
    bool moderate = true;
    for (int64_t i = 0; i < k; i += 4, target += 4 * rows) {
      for (int j = 0; j < 4; j++) {
        const float value = values[i + KORDER[j]];
        moderate &= is_moderate(value);
        target[j] = static_cast<uint16_t>(bits_of(value) >> 16);
      }
    }
    return moderate;
  }

  // sums [tiles][rows][32] += tiles times the panel.
  static void multiply(const Tiles& x, const uint8_t* panel, const uint8_t*, float* sums,
                       Scratch& scratch) {
    for (int64_t first = 0; first < x.blocks; first += CHUNK) {
      const int64_t count = x.blocks - first < CHUNK ? x.blocks - first : CHUNK;
      for (int64_t b = 0; b < count; b++) {
        prefetch_block(panel, first + b, PREFETCH);
        decode(block_codes(panel, first + b), block_scales(panel, first + b), scratch.weights[b]);
      }
      for (int64_t t = 0; t < x.heights.tiles; t++) {
        const int64_t rows = x.heights.rows(t), row = x.heights.first(t);
        const char* tile = x.packed + (row * x.blocks + rows * first) * packed_bytes(BLOCK);
        multiply_rows(static_cast<int>(rows), reinterpret_cast<const uint16_t*>(tile),
                      scratch.weights, count, sums + row * PANEL_ROWS);
      }
    }
  }

 private:
  static constexpr int64_t PREFETCH = 1536;

  // The bytes of each code's bfloat16 times 2^125. Scaling subtracts from the exponent, and it
  // saturates, so that zero stays zero.
  alignas(16) static constexpr uint8_t LOWER[16] = {0, 0x80, 0, 0x40, 0x80, 0xc0, 0, 0x40,
                                                    0, 0x80, 0, 0x40, 0x80, 0xc0, 0, 0x40};
  alignas(16) static constexpr uint8_t UPPER[16] = {0, 0x7d, 0x7e, 0x7e, 0x7e, 0x7e, 0x7f, 0x7f,
                                                    0, 0xfd, 0xfe, 0xfe, 0xfe, 0xfe, 0xff, 0xff};

  // 252 less the scales of 4 rows, as bfloat16 exponents: rows 0 and 1, rows 2 and 3, each four
  // times.
  static inline __attribute__((always_inline)) uint16x8x2_t exponents_down(const uint8_t* scales) {
    const uint32x4_t down = vsubq_u32(vdupq_n_u32(SCALE_MAX), four_bytes(scales));
    const uint32x4_t twice = vorrq_u32(vshlq_n_u32(down, 7), vshlq_n_u32(down, 23));
    return {vreinterpretq_u16_u32(vzip1q_u32(twice, twice)),
            vreinterpretq_u16_u32(vzip2q_u32(twice, twice))};
  }

  static void decode(const uint8_t* codes, const uint8_t* scales, Weights& weights) {
    const uint8x16_t lower = vld1q_u8(LOWER), upper = vld1q_u8(UPPER), nibble = vdupq_n_u8(15);
    for (int row = 0; row < PANEL_ROWS; row += 4) {
      const uint16x8x2_t down = exponents_down(scales + row);
      const uint8_t* source = codes + row / LANES * (CODE_BYTES / 2) + row % LANES * 4;
#pragma GCC unroll 4
      for (int g = 0; g < 4; g++) {
        const uint8x16_t eight = vld1q_u8(source + LINE * g);
#pragma GCC unroll 2
        for (int high = 0; high < 2; high++) {
          const uint8x16_t code = high ? vshrq_n_u8(eight, 4) : vandq_u8(eight, nibble);
          const uint8x16_t low = vqtbl1q_u8(lower, code), up = vqtbl1q_u8(upper, code);
          uint16_t* to = weights[2 * g + high][row];
          vst1q_u16(to, vqsubq_u16(vreinterpretq_u16_u8(vzip1q_u8(low, up)), down.val[0]));
          vst1q_u16(to + 8, vqsubq_u16(vreinterpretq_u16_u8(vzip2q_u8(low, up)), down.val[1]));
        }
      }
    }
  }

  template <int N = ROWS>
  static void multiply_rows(int rows, const uint16_t* x, const Weights* weights, int64_t blocks,
                            float* sums) {
    if constexpr (N > 0) {
      if (rows == N)
        multiply_chunk<N>(x, weights, blocks, sums);
      else
        multiply_rows<N - 1>(rows, x, weights, blocks, sums);
    }
  }

  // sums [N][32] += values [blocks * 8][N][4] times weights, two rows of x and eight of weights at
  // a time.
  template <int N>
  static void multiply_chunk(const uint16_t* x, const Weights* weights, int64_t blocks,
                             float* sums) {
    constexpr int PAIRS = (N + 1) / 2, WIDE = 4;
    for (int row = 0; row < PANEL_ROWS; row += 2 * WIDE) {
      float32x4_t sum[PAIRS][WIDE];  // of each: [row of x][row of weights]
      for (int p = 0; p < PAIRS; p++) {
        for (int w = 0; w < WIDE; w++) {
          const float* from = sums + 2 * p * PANEL_ROWS + row + 2 * w;
          const bool is_pair = 2 * p + 1 < N;
          sum[p][w] =
              vcombine_f32(vld1_f32(from), is_pair ? vld1_f32(from + PANEL_ROWS) : vdup_n_f32(0));
        }
      }
      const uint16_t* values = x;
      const uint16_t* weight = &weights[0][0][row][0];
      for (int64_t i = 0; i < blocks * BLOCK / 4; i++, values += 4 * N, weight += 4 * PANEL_ROWS) {
        bfloat16x8_t eight[WIDE];
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; w++) eight[w] = vreinterpretq_bf16_u16(vld1q_u16(weight + 8 * w));
#pragma GCC unroll 4
        for (int p = 0; p < PAIRS; p++) {
          const uint16x8_t pair = 2 * p + 1 < N
                                      ? vld1q_u16(values + 8 * p)
                                      : vcombine_u16(vld1_u16(values + 8 * p), vdup_n_u16(0));
#pragma GCC unroll 4
          for (int w = 0; w < WIDE; w++)
            sum[p][w] = vbfmmlaq_f32(sum[p][w], vreinterpretq_bf16_u16(pair), eight[w]);
        }
      }
      for (int p = 0; p < PAIRS; p++) {
        for (int w = 0; w < WIDE; w++) {
          float* to = sums + 2 * p * PANEL_ROWS + row + 2 * w;
          vst1_f32(to, vget_low_f32(sum[p][w]));
          if (2 * p + 1 < N) vst1_f32(to + PANEL_ROWS, vget_high_f32(sum[p][w]));
        }
      }
    }
  }
};

}  // namespace mxfp4

#endif
