// Rows times a panel on the matrix units of AMX. Operand A is a tile of rows, B the weights in
// bfloat16, C 16 x 16 float32 sums.
//
// Blocks of weights are decoded into the first cache, a chunk at a time, and multiplied from there
// with one tile of rows after the other, while the next chunk is decoded. Four of the eight tile
// registers are in use: both halves' sums, the rows, and half a block. All eight would save loads,
// but cores have few spare registers to rename tiles to, and hyperthreads share them: where the
// other thread works too, a product with its loads takes four times as long with eight registers in
// use, and twice as long with four.
//
// Activations keep all their bits. A bfloat16 activation is one operand, a float16 the sum of two
// bfloat16 numbers (limbs), a float32 the sum of three; each limb is multiplied with the same
// weights. As with vdpbf16ps, the units treat subnormals as zero, so rows that have one are
// multiplied in float32.
#pragma once

#if defined(MXFP4_PATH_AMX) || defined(MXFP4_PATH_AMX_EMULATED)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "amx_units.h"
#include "numbers.h"
#include "panels.h"

namespace mxfp4 {

// A block of a panel as two B operands: [half][k / 2][lane][k % 2].
using AmxWeights = uint16_t[2][BLOCK / 2][LANES][2];

// Decodes codes to bfloat16 with byte lookups; CPUs with AMX do one lookup a cycle.
struct AmxDecoder {
  __m512i low, high, low_bytes, spread, largest;

  AmxDecoder() {
    // The low and the high byte of each code's bfloat16 times 2^125. The tables repeat four times,
    // because the lookup reads six bits, and the upper two belong to another code. Scaling then
    // subtracts from the exponent. The subtraction saturates, so that zero stays zero.
    alignas(64) uint8_t lows[64], highs[64], lanes[64];
    for (int i = 0; i < 64; i++) {
      const uint32_t value = i & 7 ? bits_of(E2M1[i & 15] * 0x1p125f) >> 16 : 0;
      lows[i] = static_cast<uint8_t>(value);
      highs[i] = static_cast<uint8_t>(value >> 8);
      lanes[i] = static_cast<uint8_t>(i >> 2);
    }
    low = _mm512_load_si512(lows);
    high = _mm512_load_si512(highs);
    low_bytes = _mm512_set1_epi16(0xff);
    spread = _mm512_load_si512(lanes);
    largest = _mm512_set1_epi16(SCALE_MAX);
  }

  // 252 less the scale bytes of 16 rows, as bfloat16 exponents, for both values of a pair.
  inline __attribute__((always_inline)) __m512i exponents_down(const uint8_t* scales) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    const __m512i scale =
        _mm512_maskz_permutexvar_epi8(0x5555555555555555ull, spread, _mm512_castsi128_si512(bytes));
    return _mm512_slli_epi16(_mm512_sub_epi16(largest, scale), 7);
  }

  // Group g of a half: 64 bytes of codes -> eight weights of each of 16 rows.
  inline __attribute__((always_inline)) void decode(const uint8_t* codes, int g, __m512i down,
                                                    uint16_t (*weights)[LANES][2]) const {
    __builtin_prefetch(codes + g * LINE + PREFETCH);
    const __m512i eight = _mm512_loadu_si512(codes + g * LINE);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const __m512i code = i ? _mm512_srli_epi16(eight, 4) : eight;
      const __m512i l = _mm512_permutexvar_epi8(code, low);
      const __m512i u = _mm512_permutexvar_epi8(code, high);
      // 0xca selects bits of the second operand where the first is set, else of the third.
      const __m512i even = _mm512_ternarylogic_epi32(low_bytes, l, _mm512_slli_epi16(u, 8), 0xca);
      const __m512i odd = _mm512_ternarylogic_epi32(low_bytes, _mm512_srli_epi16(l, 8), u, 0xca);
      _mm512_storeu_si512(weights[4 * g + 2 * i], _mm512_subs_epu16(even, down));
      _mm512_storeu_si512(weights[4 * g + 2 * i + 1], _mm512_subs_epu16(odd, down));
    }
  }

  // Half h of a block.
  inline __attribute__((always_inline)) void decode_half(const uint8_t* panel, int64_t block, int h,
                                                         AmxWeights& weights) const {
    const uint8_t* scales = block_scales(panel, block) + h * LANES;
    __builtin_prefetch(scales + PREFETCH);
    const __m512i down = exponents_down(scales);
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++)
      decode(block_codes(panel, block) + h * (CODE_BYTES / 2), g, down, weights[h]);
  }

  static constexpr int64_t PREFETCH = 2048;
};

template <int LIMBS_OF_X>
struct AmxTile {
  static constexpr int ROWS = 16;
  // Bytes of an expert's packed rows that are multiplied with one panel after the other; they
  // should fit the L2 cache.
  static constexpr int64_t GROUP_BYTES = 1280 << 10;
  // Up to so many rows of an expert are faster in few_rows.h's integers; at most MOST_FEW.
  static constexpr int MOST_FEW = 2;
  static int few_rows(int32_t dtype) { return dtype == MXFP4_F32 ? 1 : 2; }
  // Blocks of a panel that are decoded together; two such buffers fit the L1 cache, beside a tile.
  static constexpr int64_t CHUNK = 4;

  struct Scratch {
    AmxWeights weights[2][CHUNK];
    AmxDecoder decoder;
    // The chunk that was decoded ahead: its panel, its first block and its buffer.
    const uint8_t* panel = nullptr;
    int64_t first = 0;
    int buffer = 0;
  };

  static Heights heights(int64_t rows) { return Heights::equal(rows, ROWS); }
  static int64_t packed_bytes(int64_t k) {
    return LIMBS_OF_X * k * static_cast<int64_t>(sizeof(uint16_t));
  }

  // Packs row `row` into a tile of `rows` rows: [limb][k / 32][row][k % 32]. Returns whether this
  // kernel can multiply the row.
  static bool pack(const float* values, int64_t k, int64_t row, int64_t rows, char* tile) {
    uint16_t* target = reinterpret_cast<uint16_t*>(tile) + row * BLOCK;
    uint32_t unable = 0;
    for (int64_t b = 0; b < k / BLOCK; b++, values += BLOCK, target += BLOCK * rows) {
      float rest[BLOCK];
      std::memcpy(rest, values, sizeof rest);
      for (int limb = 0; limb < LIMBS_OF_X; limb++) {
        uint16_t* at = target + limb * k * rows;
        for (int64_t i = 0; i < BLOCK; i++) {
          const uint32_t bits = bits_of(rest[i]);
          const bool finite = (bits & 0x7f800000) != 0x7f800000;
          // The upper half of a NaN may look like an infinity; bit 6 keeps it a NaN.
          const uint32_t upper = bits >> 16 | static_cast<uint32_t>(rest[i] != rest[i]) << 6;
          at[i] = static_cast<uint16_t>(upper);
          unable |= static_cast<uint32_t>(rest[i] != 0.f) & ((upper & 0x7f80) == 0);
          // Truncation is exact: each limb has the next eight bits of the rest.
          const float next = rest[i] - float_of(upper << 16);
          rest[i] = finite ? next : 0.f;
        }
      }
    }
    return !unable;
  }

  // sums [tiles][rows][32] += tiles times the panel. `next` is the panel of the next call, or null.
  // Its first blocks are decoded meanwhile.
  static void multiply(const Tiles& x, const uint8_t* panel, const uint8_t* next, float* sums,
                       Scratch& scratch) {
    amx::Configuration configuration;
    for (int tile = 0; tile < 4; tile++) {
      configuration.row_bytes[tile] = 64;
      configuration.rows[tile] = static_cast<uint8_t>(tile == WEIGHTS ? BLOCK / 2 : x.heights.most);
    }
    amx::configure(configuration);
    if (x.heights.tiles == 1)
      multiply_one_tile(x, panel, sums, scratch);
    else
      multiply_tiles(x, panel, next, sums, scratch);
    amx::release();
  }

 private:
  // The tile registers: sums of the first and the second half, rows, weights.
  enum Register { FIRST, SECOND, ROWS_OF_X, WEIGHTS };
  // Bytes from one row of sums to the next.
  static constexpr int64_t SUMS = PANEL_ROWS * sizeof(float);

  // A limb of tile t, from block `block` on.
  static const char* tile(const Tiles& x, int64_t t, int limb, int64_t block) {
    return x.packed + (((t * LIMBS_OF_X + limb) * x.blocks + block) * x.heights.most) * 64;
  }

  static inline __attribute__((always_inline)) void load_sums(const float* sums) {
    amx::load<FIRST>(sums, SUMS);
    amx::load<SECOND>(sums + LANES, SUMS);
  }
  static inline __attribute__((always_inline)) void store_sums(float* sums) {
    amx::store<FIRST>(sums, SUMS);
    amx::store<SECOND>(sums + LANES, SUMS);
  }

  // One tile: decoding takes longer than multiplying. Each block is decoded while the one before is
  // multiplied.
  static void multiply_one_tile(const Tiles& x, const uint8_t* panel, float* sums,
                                Scratch& scratch) {
    AmxWeights* ring = scratch.weights[0];
    scratch.panel = nullptr;
    load_sums(sums);
    for (int h = 0; h < 2; h++) scratch.decoder.decode_half(panel, 0, h, ring[0]);
    for (int64_t b = 0; b < x.blocks; b++) {
      const AmxWeights& weights = ring[b % CHUNK];
      if (b + 1 < x.blocks) {
        AmxWeights& next = ring[(b + 1) % CHUNK];
        amx::load<ROWS_OF_X>(tile(x, 0, 0, b), 64);
        multiply_and_decode<FIRST>(weights, panel, b + 1, next, scratch.decoder);
        multiply_and_decode<SECOND>(weights, panel, b + 1, next, scratch.decoder);
      } else {
        multiply_block(tile(x, 0, 0, b), weights, [] {});
      }
      for (int limb = 1; limb < LIMBS_OF_X; limb++)
        multiply_block(tile(x, 0, limb, b), weights, [] {});
    }
    store_sums(sums);
  }

  // Adds the products of the loaded rows with a half of a block, and decodes the same half of block
  // `next`: a quarter between two instructions of the units, because the CPU looks only so far
  // ahead for work.
  template <int HALF>
  static inline __attribute__((always_inline)) void multiply_and_decode(const AmxWeights& weights,
                                                                        const uint8_t* panel,
                                                                        int64_t next,
                                                                        AmxWeights& next_weights,
                                                                        const AmxDecoder& decoder) {
    const uint8_t* scales = block_scales(panel, next) + HALF * LANES;
    const uint8_t* codes = block_codes(panel, next) + HALF * (CODE_BYTES / 2);
    auto* to = next_weights[HALF];
    __builtin_prefetch(scales + AmxDecoder::PREFETCH);
    const __m512i down = decoder.exponents_down(scales);
    decoder.decode(codes, 0, down, to);
    amx::load<WEIGHTS>(weights[HALF], 64);
    decoder.decode(codes, 1, down, to);
    decoder.decode(codes, 2, down, to);
    amx::multiply<HALF, ROWS_OF_X, WEIGHTS>();
    decoder.decode(codes, 3, down, to);
  }

  // Adds the products of a tile with a block; calls between() after each product.
  template <class F>
  static inline __attribute__((always_inline)) void multiply_block(const char* rows,
                                                                   const AmxWeights& weights,
                                                                   F between) {
    amx::load<ROWS_OF_X>(rows, 64);
    amx::load<WEIGHTS>(weights[0], 64);
    amx::multiply<FIRST, ROWS_OF_X, WEIGHTS>();
    between();
    amx::load<WEIGHTS>(weights[1], 64);
    amx::multiply<SECOND, ROWS_OF_X, WEIGHTS>();
    between();
  }

  // Several tiles: a chunk is decoded while the one before is multiplied with all tiles.
  static void multiply_tiles(const Tiles& x, const uint8_t* panel, const uint8_t* next, float* sums,
                             Scratch& scratch) {
    for (int64_t first = 0; first < x.blocks; first += CHUNK) {
      const int64_t count = std::min(CHUNK, x.blocks - first);
      if (scratch.panel != panel || scratch.first != first) {
        for (int64_t b = 0; b < count; b++)
          for (int h = 0; h < 2; h++)
            scratch.decoder.decode_half(panel, first + b, h, scratch.weights[scratch.buffer][b]);
      }
      const AmxWeights* weights = scratch.weights[scratch.buffer];
      scratch.buffer ^= 1;
      const bool last = first + CHUNK >= x.blocks;
      scratch.panel = last ? next : panel;
      scratch.first = last ? 0 : first + CHUNK;
      Ahead ahead{scratch, scratch.panel ? 2 * std::min(CHUNK, x.blocks - scratch.first) : 0,
                  2 * x.heights.tiles * LIMBS_OF_X * count};
      for (int64_t t = 0; t < x.heights.tiles; t++) {
        float* to = sums + t * x.heights.most * PANEL_ROWS;
        load_sums(to);
        for (int limb = 0; limb < LIMBS_OF_X; limb++) {
          const char* rows = tile(x, t, limb, first);
          for (int64_t b = 0; b < count; b++, rows += x.heights.most * 64)
            multiply_block(rows, weights[b], [&] { ahead.advance(); });
        }
        store_sums(to);
      }
      ahead.finish();
    }
  }

  // Spreads the decoding of the next chunk, in halves of blocks, evenly over the products with this
  // one.
  struct Ahead {
    Scratch& scratch;
    int64_t halves, products;
    int64_t decoded = 0, product = 0;

    inline __attribute__((always_inline)) void advance() {
      product++;
      while (decoded * products < product * halves) decode();
    }
    void finish() {
      while (decoded < halves) decode();
    }
    inline __attribute__((always_inline)) void decode() {
      scratch.decoder.decode_half(scratch.panel, scratch.first + decoded / 2, decoded % 2,
                                  scratch.weights[scratch.buffer][decoded / 2]);
      decoded++;
    }
  };
};

}  // namespace mxfp4

#endif
