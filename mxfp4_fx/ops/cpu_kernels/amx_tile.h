// Rows times a panel on the matrix units of AMX. Operand A is a tile of rows, B the weights in
// bfloat16, C 16 x 16 float32 sums.
//
// Activations keep all their bits. A bfloat16 activation is one operand, a float16 the sum of two
// bfloat16 numbers (limbs), a float32 the sum of three; each limb is multiplied with the same
// weights. As with vdpbf16ps, the units treat subnormals as zero, so rows that have one are
// multiplied in float32.
#pragma once

#if defined(MXFP4_PATH_AMX) || defined(MXFP4_PATH_AMX_EMULATED)

#include <immintrin.h>

#include <cstdint>

#include "amx_units.h"
#include "numbers.h"
#include "panels.h"

namespace mxfp4 {

// A block of a panel as two B operands: [half][k / 2][lane][k % 2].
using AmxWeights = uint16_t[2][BLOCK / 2][LANES][2];
constexpr int64_t AMX_HALF_BYTES = sizeof(AmxWeights) / 2;

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

  inline __attribute__((always_inline)) void decode(const uint8_t* panel, int64_t block,
                                                    AmxWeights& weights) const {
    prefetch_block(panel, block, PREFETCH);
    const uint8_t* codes = block_codes(panel, block);
    const uint8_t* scales = block_scales(panel, block);
    for (int h = 0; h < 2; h++) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + h * LANES));
      const __m512i scale = _mm512_maskz_permutexvar_epi8(0x5555555555555555ull, spread,
                                                          _mm512_castsi128_si512(bytes));
      const __m512i down = _mm512_slli_epi16(_mm512_sub_epi16(largest, scale), 7);
#pragma GCC unroll 4
      for (int g = 0; g < 4; g++) {
        const __m512i eight = _mm512_loadu_si512(codes + h * (CODE_BYTES / 2) + g * LINE);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          const __m512i code = i ? _mm512_srli_epi16(eight, 4) : eight;
          const __m512i l = _mm512_permutexvar_epi8(code, low);
          const __m512i u = _mm512_permutexvar_epi8(code, high);
          // 0xca selects bits of the second operand where the first is set, else of the third.
          const __m512i even =
              _mm512_ternarylogic_epi32(low_bytes, l, _mm512_slli_epi16(u, 8), 0xca);
          const __m512i odd =
              _mm512_ternarylogic_epi32(low_bytes, _mm512_srli_epi16(l, 8), u, 0xca);
          _mm512_storeu_si512(weights[h][4 * g + 2 * i], _mm512_subs_epu16(even, down));
          _mm512_storeu_si512(weights[h][4 * g + 2 * i + 1], _mm512_subs_epu16(odd, down));
        }
      }
    }
  }

  static constexpr int64_t PREFETCH = 2048;
};

template <int LIMBS_OF_X>
struct AmxTile {
  static constexpr int ROWS = 16;
  static int one_by_one(int32_t) { return 1; }
  // Blocks of a panel that are decoded together; two such buffers fit the L2 cache.
  static constexpr int64_t CHUNK = 96;

  struct Scratch {
    AmxWeights weights[2][CHUNK];
    AmxDecoder decoder;
    // The chunk that was decoded ahead: its panel, its first block and its buffer.
    const uint8_t* panel = nullptr;
    int64_t first = 0;
    int buffer = 0;
  };

  static int64_t packed_bytes(int64_t k) {
    return LIMBS_OF_X * k * static_cast<int64_t>(sizeof(uint16_t));
  }

  // Packs row `row` into a tile of `rows` rows: [limb][k / 32][row][k % 32]. Returns whether this
  // kernel can multiply the row.
  static bool pack(const float* values, int64_t k, int64_t row, int64_t rows, char* tile) {
    uint16_t* target = reinterpret_cast<uint16_t*>(tile) + row * BLOCK;
    bool able = true;
    for (int64_t i = 0; i < k; i++) {
      float rest = values[i];
      uint16_t* at = target + i / BLOCK * BLOCK * rows + i % BLOCK;
      for (int limb = 0; limb < LIMBS_OF_X; limb++, at += k * rows) {
        const uint32_t bits = bits_of(rest);
        const bool finite = (bits & 0x7f800000) != 0x7f800000;
        // The upper half of a NaN may look like an infinity; bit 6 keeps it a NaN.
        const uint32_t upper = bits >> 16 | static_cast<uint32_t>(rest != rest) << 6;
        *at = static_cast<uint16_t>(upper);
        able &= rest == 0.f || (upper & 0x7f80) != 0;
        // Truncation is exact: each limb has the next eight bits of the rest.
        rest = finite ? rest - float_of(upper << 16) : 0.f;
      }
    }
    return able;
  }

  // sums [tiles][rows][32] += tiles times the panel. `next` is the panel of the next call, or null.
  // Its first blocks are decoded meanwhile.
  static void multiply(const Tiles& x, const uint8_t* panel, const uint8_t* next, float* sums,
                       Scratch& scratch) {
    amx::Configuration configuration;
    for (int tile = 0; tile < 8; tile++) {
      configuration.row_bytes[tile] = 64;
      configuration.rows[tile] = static_cast<uint8_t>(tile < 6 ? x.rows : 16);
    }
    amx::configure(configuration);
    if (x.tiles == 1)
      multiply_single(x, panel, sums, scratch);
    else
      multiply_many(x, panel, next, sums, scratch);
    amx::release();
  }

 private:
  // Bytes from one row of sums to the next.
  static constexpr int64_t SUMS = PANEL_ROWS * sizeof(float);

  // A limb of tile t, from block `block` on.
  static const char* tile(const Tiles& x, int64_t t, int limb, int64_t block) {
    return x.packed + (((t * LIMBS_OF_X + limb) * x.blocks + block) * x.rows) * 64;
  }

  // One tile is bound by memory. Each block is decoded into a small ring while the one before is
  // multiplied. Even and odd blocks have separate sums, so that neither waits for the other.
  static void multiply_single(const Tiles& x, const uint8_t* panel, float* sums, Scratch& scratch) {
    scratch.panel = nullptr;
    AmxWeights* ring = scratch.weights[0];
    amx::load<0>(sums, SUMS);
    amx::load<1>(sums + LANES, SUMS);
    amx::zero<2>();
    amx::zero<3>();
    scratch.decoder.decode(panel, 0, ring[0]);
    for (int64_t b = 0; b < x.blocks; b++) {
      if (b + 1 < x.blocks) scratch.decoder.decode(panel, b + 1, ring[(b + 1) % 4]);
      const char* weights = reinterpret_cast<const char*>(ring[b % 4]);
      for (int limb = 0; limb < LIMBS_OF_X; limb++) {
        if (b % 2 == 0)
          add_single<0, 1, 4, 6>(tile(x, 0, limb, b), weights);
        else
          add_single<2, 3, 5, 7>(tile(x, 0, limb, b), weights);
      }
    }
    alignas(64) float odd[ROWS * PANEL_ROWS];
    amx::store<0>(sums, SUMS);
    amx::store<1>(sums + LANES, SUMS);
    amx::store<2>(odd, SUMS);
    amx::store<3>(odd + LANES, SUMS);
    for (int64_t i = 0; i < x.rows * PANEL_ROWS; i++) sums[i] += odd[i];
  }

  template <int C0, int C1, int A, int B>
  static inline __attribute__((always_inline)) void add_single(const char* rows,
                                                               const char* weights) {
    amx::load<A>(rows, 64);
    amx::load<B>(weights, 64);
    amx::multiply<C0, A, B>();
    amx::load<B>(weights + AMX_HALF_BYTES, 64);
    amx::multiply<C1, A, B>();
  }

  // Several tiles are multiplied two at a time with both halves of the panel. These four sums stay
  // in the units for a whole chunk.
  static void multiply_many(const Tiles& x, const uint8_t* panel, const uint8_t* next, float* sums,
                            Scratch& scratch) {
    for (int64_t first = 0; first < x.blocks; first += CHUNK) {
      const int64_t count = x.blocks - first < CHUNK ? x.blocks - first : CHUNK;
      if (scratch.panel != panel || scratch.first != first) {
        for (int64_t b = 0; b < count; b++)
          scratch.decoder.decode(panel, first + b, scratch.weights[scratch.buffer][b]);
      }
      const AmxWeights* weights = scratch.weights[scratch.buffer];
      scratch.buffer ^= 1;
      const bool last = first + CHUNK >= x.blocks;
      scratch.panel = last ? next : panel;
      scratch.first = last ? 0 : first + CHUNK;
      const int64_t left = x.blocks - scratch.first;
      Ahead ahead{scratch, scratch.panel ? (left < CHUNK ? left : CHUNK) : 0,
                  ceil_div(x.tiles, 2) * LIMBS_OF_X * count};
      for (int64_t t = 0; t < x.tiles; t += 2) {
        float* sum = sums + t * x.rows * PANEL_ROWS;
        if (t + 1 < x.tiles)
          multiply_two<true>(x, t, first, count, weights, sum, ahead);
        else
          multiply_two<false>(x, t, first, count, weights, sum, ahead);
      }
      ahead.finish();
    }
  }

  // Spreads the decoding of the next chunk evenly over the steps of this one, because the units
  // multiply while the CPU does lookups.
  struct Ahead {
    Scratch& scratch;
    int64_t blocks, steps;
    int64_t decoded = 0, step = 0;

    inline __attribute__((always_inline)) void advance() {
      step++;
      while (decoded * steps < step * blocks) decode();
    }
    void finish() {
      while (decoded < blocks) decode();
    }
    inline __attribute__((always_inline)) void decode() {
      scratch.decoder.decode(scratch.panel, scratch.first + decoded,
                             scratch.weights[scratch.buffer][decoded]);
      decoded++;
    }
  };

  template <bool TWO>
  static void multiply_two(const Tiles& x, int64_t t, int64_t first, int64_t count,
                           const AmxWeights* weights, float* sums, Ahead& ahead) {
    float* second = sums + x.rows * PANEL_ROWS;
    amx::load<0>(sums, SUMS);
    amx::load<1>(sums + LANES, SUMS);
    if (TWO) {
      amx::load<2>(second, SUMS);
      amx::load<3>(second + LANES, SUMS);
    }
    for (int limb = 0; limb < LIMBS_OF_X; limb++) {
      const char* a = tile(x, t, limb, first);
      const char* b = tile(x, t + 1, limb, first);
      for (int64_t block = 0; block < count; block++) {
        const char* weight = reinterpret_cast<const char*>(weights[block]);
        amx::load<4>(a + block * x.rows * 64, 64);
        amx::load<6>(weight, 64);
        amx::multiply<0, 4, 6>();
        amx::load<7>(weight + AMX_HALF_BYTES, 64);
        amx::multiply<1, 4, 7>();
        if (TWO) {
          amx::load<5>(b + block * x.rows * 64, 64);
          amx::multiply<2, 5, 6>();
          amx::multiply<3, 5, 7>();
        }
        ahead.advance();
      }
    }
    amx::store<0>(sums, SUMS);
    amx::store<1>(sums + LANES, SUMS);
    if (TWO) {
      amx::store<2>(second, SUMS);
      amx::store<3>(second + LANES, SUMS);
    }
  }
};

}  // namespace mxfp4

#endif
