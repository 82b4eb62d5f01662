// Rows times a panel with bfloat16 products and float32 sums (vdpbf16ps).
//
// A product of a bfloat16 activation and an MXFP4 weight is exact. But vdpbf16ps reads subnormal
// numbers as zero and flushes subnormal results to zero: an underflow has an error of 2^-126, in
// float32 one of 2^-150. So rows with extreme values are multiplied in float32.
//
// With one or two tiles, each tile decodes the weights for itself, in registers: lookups and
// products run on different units of the CPU. More tiles share a buffer of decoded weights, and the
// next chunk is decoded while the first tile is multiplied.
#pragma once

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include <cstdint>

#include "f32_tile.h"
#include "few_rows.h"
#include "numbers.h"
#include "panels.h"

namespace mxfp4 {

struct Bf16Tile {
  // The most rows of a tile whose sums fit the registers, beside a row of the panel and the table.
  static constexpr int ROWS = 12;
  // Bytes of an expert's packed rows that are multiplied with one panel after the other; they
  // should fit the L2 cache.
  static constexpr int64_t GROUP_BYTES = 512 << 10;
  static constexpr int MOST_FEW = 0;
  static int few_rows(int32_t) { return 0; }
  // Blocks of a buffer: two buffers and the rows they are multiplied with fit L1 and L2.
  static constexpr int64_t CHUNK = 8;
  // A block of a panel in the buffer: [half][k / 2][lane][k % 2].
  using Weights = uint16_t[2][BLOCK / 2][LANES][2];
  struct Scratch {
    Weights weights[2][CHUNK];
  };

  static Heights heights(int64_t rows) { return Heights::equal(rows, ROWS); }
  static int64_t packed_bytes(int64_t k) { return k * static_cast<int64_t>(sizeof(uint16_t)); }

  // Packs row `row` into a tile of `rows` rows: the pair k, k + 1 goes to k * rows + 2 * row. The
  // values must be bfloat16 numbers. Returns whether this kernel can multiply them.
  static bool pack(const float* values, int64_t k, int64_t row, int64_t rows, char* tile) {
    uint32_t* target = reinterpret_cast<uint32_t*>(tile) + row;
    bool moderate = true;
    for (int64_t i = 0; i < k / 2; i++) {
      const float low = values[2 * i], high = values[2 * i + 1];
      moderate &= is_moderate(low) && is_moderate(high);
      target[i * rows] = bits_of(low) >> 16 | (bits_of(high) & 0xffff0000);
    }
    return moderate;
  }

  // sums [tiles][rows][32] += tiles times the panel.
  static void multiply(const Tiles& x, const uint8_t* panel, const uint8_t*, float* sums,
                       Scratch& scratch) {
    multiply_rows(x, panel, sums, scratch);
  }

 private:
  // How far ahead weights are prefetched, in bytes.
  static constexpr int64_t PREFETCH = 3072, DIRECT_PREFETCH = 8192;

  template <int N = ROWS>
  static void multiply_rows(const Tiles& x, const uint8_t* panel, float* sums, Scratch& scratch) {
    if constexpr (N > 0) {
      if (x.heights.most != N)
        multiply_rows<N - 1>(x, panel, sums, scratch);
      else if (x.heights.tiles <= 2)
        for (int64_t t = 0; t < x.heights.tiles; t++)
          multiply_direct<N>(tile<N>(x, t, 0), panel, x.blocks, sums + t * N * PANEL_ROWS);
      else
        multiply_buffered<N>(x, panel, sums, scratch);
    }
  }

  // Tile t from block `block` on: [k / 2][N] pairs of values.
  template <int N>
  static const int32_t* tile(const Tiles& x, int64_t t, int64_t block) {
    return reinterpret_cast<const int32_t*>(x.packed) + (t * x.blocks + block) * (BLOCK / 2) * N;
  }

  // The sums of a tile, in registers.
  template <int N>
  struct Sums {
    __m512 of[N][2];  // row, half

    inline __attribute__((always_inline)) explicit Sums(const float* sums) {
      for (int n = 0; n < N; n++)
        for (int h = 0; h < 2; h++) of[n][h] = _mm512_loadu_ps(sums + n * PANEL_ROWS + h * LANES);
    }
    inline __attribute__((always_inline)) void store(float* sums) const {
      for (int n = 0; n < N; n++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(sums + n * PANEL_ROWS + h * LANES, of[n][h]);
    }
    // Adds the products of N pairs of values with the rows of weights of both halves.
    inline __attribute__((always_inline)) void add(const int32_t* pairs, __m512i first,
                                                   __m512i second) {
#pragma GCC unroll 12
      for (int n = 0; n < N; n++) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(pairs[n]);
        of[n][0] = _mm512_dpbf16_ps(of[n][0], pair, (__m512bh)first);
        of[n][1] = _mm512_dpbf16_ps(of[n][1], pair, (__m512bh)second);
      }
    }
  };

  // Each code's bfloat16, and the same times 2^125. Both tables have each code twice, because the
  // lookup reads five bits.
  // clang-format off
  alignas(64) static constexpr uint16_t VALUES[32] = {
      0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
      0, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,
      0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
      0, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
  alignas(64) static constexpr uint16_t LARGE_VALUES[32] = {
      0, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40,
      0, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40,
      0, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40,
      0, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40};
  // clang-format on

  // 64 bytes of codes have eight weights of each of 16 rows. Nibble i of each 16-bit word is a
  // weight of pair pair_of(i) of neighbours in k.
  static constexpr int pair_of(int i) { return i / 2 + i % 2 * 2; }
  static inline __attribute__((always_inline)) __m512i look_up(__m512i eight, int i,
                                                               const uint16_t* table) {
    const __m512i code = i ? _mm512_srli_epi16(eight, static_cast<unsigned>(4 * i)) : eight;
    return _mm512_permutexvar_epi16(code, _mm512_load_si512(table));
  }

  // The same with scales. Scaling subtracts from the exponent. The subtraction saturates, so that
  // zero stays zero.
  static inline __attribute__((always_inline)) __m512i decode(__m512i eight, int i, __m512i down) {
    return _mm512_subs_epu16(look_up(eight, i, LARGE_VALUES), down);
  }

  // 252 less the scale bytes of 16 rows, as bfloat16 exponents, for both values of a pair.
  static inline __attribute__((always_inline)) __m512i exponents_down(const uint8_t* scales) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    const __m512i down =
        _mm512_sub_epi32(_mm512_set1_epi32(SCALE_MAX), _mm512_cvtepu8_epi32(bytes));
    return _mm512_or_si512(_mm512_slli_epi32(down, 7), _mm512_slli_epi32(down, 23));
  }

  // Multiplies one row with weights without their scales, and the sums of each block with the
  // scales. Memory bounds the speed. It is read fastest line after line, each once; where the first
  // cache is small, by the hardware's prefetcher alone. The empty asm keeps compilers from reading
  // a line again for each shift. Each result has four sums, because a product waits for the one
  // before it in a sum.
  static void multiply_row(const int32_t* x, const uint8_t* panel, int64_t blocks, float* sums) {
    const bool has_room = has_room_ahead();
    Sums<1> sum(sums);
    for (int64_t b = 0; b < blocks; b++, x += BLOCK / 2) {
      const uint8_t* codes = block_codes(panel, b);
      const uint8_t* scales = block_scales(panel, b);
      if (has_room) prefetch_block<READ_ONCE>(panel, b, DIRECT_PREFETCH);
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++, codes += CODE_BYTES / 2) {
        __m512 part[4] = {};
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) {
          __m512i eight = _mm512_loadu_si512(codes + g * LINE);
          asm("" : "+v"(eight));
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(x[4 * g + pair_of(i)]);
            part[i] = _mm512_dpbf16_ps(part[i], pair, (__m512bh)look_up(eight, i, VALUES));
          }
        }
        const __m512 total =
            _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
        sum.of[0][h] = _mm512_fmadd_ps(total, row_scales(scales + h * LANES), sum.of[0][h]);
      }
    }
    sum.store(sums);
  }

  // The same for a tile. Its halves share the loads of x.
  template <int N>
  static void multiply_direct(const int32_t* x, const uint8_t* panel, int64_t blocks, float* sums) {
    if constexpr (N == 1) return multiply_row(x, panel, blocks, sums);
    Sums<N> sum(sums);
    for (int64_t b = 0; b < blocks; b++, x += BLOCK / 2 * N) {
      const uint8_t* codes = block_codes(panel, b);
      const uint8_t* scales = block_scales(panel, b);
      prefetch_block(panel, b, DIRECT_PREFETCH);
      __m512 part[N][2] = {};
#pragma GCC unroll 4
      for (int g = 0; g < 4; g++) {
        const __m512i first = _mm512_loadu_si512(codes + g * LINE);
        const __m512i second = _mm512_loadu_si512(codes + CODE_BYTES / 2 + g * LINE);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const __m512bh weights[2] = {(__m512bh)look_up(first, i, VALUES),
                                       (__m512bh)look_up(second, i, VALUES)};
#pragma GCC unroll 12
          for (int n = 0; n < N; n++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(x[(4 * g + pair_of(i)) * N + n]);
            part[n][0] = _mm512_dpbf16_ps(part[n][0], pair, weights[0]);
            part[n][1] = _mm512_dpbf16_ps(part[n][1], pair, weights[1]);
          }
        }
      }
      for (int h = 0; h < 2; h++) {
        const __m512 scale = row_scales(scales + h * LANES);
#pragma GCC unroll 12
        for (int n = 0; n < N; n++) sum.of[n][h] = _mm512_fmadd_ps(part[n][h], scale, sum.of[n][h]);
      }
    }
    sum.store(sums);
  }

  template <int N>
  static void multiply_buffered(const Tiles& x, const uint8_t* panel, float* sums,
                                Scratch& scratch) {
    for (int64_t b = 0; b < CHUNK && b < x.blocks; b++)
      for (int g = 0; g < 8; g++) decode_group(panel, b, g, scratch.weights[0][b]);
    int buffer = 0;
    for (int64_t first = 0; first < x.blocks; first += CHUNK, buffer ^= 1) {
      const int64_t count = x.blocks - first < CHUNK ? x.blocks - first : CHUNK;
      const Weights* weights = scratch.weights[buffer];
      multiply_chunk<N>(tile<N>(x, 0, first), weights, count, sums, panel, first + CHUNK, x.blocks,
                        scratch.weights[buffer ^ 1]);
      for (int64_t t = 1; t < x.heights.tiles; t++)
        multiply_chunk<N>(tile<N>(x, t, first), weights, count, sums + t * N * PANEL_ROWS, panel, 0,
                          0, nullptr);
    }
  }

  // Group g of half h is number 4 h + g.
  static inline __attribute__((always_inline)) void decode_group(const uint8_t* panel,
                                                                 int64_t block, int group,
                                                                 Weights& out) {
    const int h = group / 4, g = group % 4;
    const uint8_t* codes = block_codes(panel, block) + group * LINE;
    __builtin_prefetch(codes + PREFETCH);
    const __m512i eight = _mm512_loadu_si512(codes);
    const __m512i down = exponents_down(block_scales(panel, block) + h * LANES);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      _mm512_storeu_si512(out[h][4 * g + pair_of(i)], decode(eight, i, down));
  }

  // Multiplies a tile with `count` blocks of the buffer. Meanwhile it decodes the blocks [next,
  // end) into `ahead`.
  template <int N>
  static void multiply_chunk(const int32_t* x, const Weights* weights, int64_t count, float* sums,
                             const uint8_t* panel, int64_t next, int64_t end, Weights* ahead) {
    Sums<N> sum(sums);
    for (int64_t b = 0; b < count; b++) {
      for (int group = 0; group < 8; group++) {
        if (next + b < end) decode_group(panel, next + b, group, ahead[b]);
#pragma GCC unroll 2
        for (int pair = 2 * group; pair < 2 * group + 2; pair++, x += N)
          sum.add(x, _mm512_loadu_si512(weights[b][0][pair]),
                  _mm512_loadu_si512(weights[b][1][pair]));
      }
    }
    sum.store(sums);
  }
};

}  // namespace mxfp4

#endif
