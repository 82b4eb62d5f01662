// Values of any strides -> `cpu_panels`, bit for bit as formats.quantize does.
//
// It computes with 16-bit integers, and the 32 rows of a panel are the lanes. A value becomes the
// upper half of its float32, whose last bit is set if the lower half was not zero. So the later
// rounding to the two significant bits of E2M1 still sees on which side of a midpoint the value
// was. A bfloat16 value needs no change.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "numbers.h"
#include "panels.h"
#include "parallel.h"
#include "swizzle.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mxfp4 {

// Panels whose blocks are read together. Where rows are neighbours in memory (the [E, K, N]
// parameter of a model), each piece that is read then has 256 bytes or more.
constexpr int64_t GROUP_PANELS = 4;

// The values of a block in a panel.
using BlockValues = uint16_t[BLOCK][PANEL_ROWS];

// Fields of the upper half of a float32.
constexpr int FRACTION_BITS = 7, EXPONENT_BIAS = 127;
constexpr int SIGN = 0x8000, MAGNITUDE = 0x7fff, INFINITE = 0x7f80;

inline uint16_t upper_half(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>(bits >> 16 | static_cast<uint32_t>((bits & 0xffff) != 0));
}

// The scale byte of a block: the smallest b for which 6 * 2^(b - 127) is not below the block's
// largest magnitude. It is the magnitude's exponent less 2, plus 1 if the fraction is over a half.
inline int scale_of(int largest) {
  const int half = 1 << (FRACTION_BITS - 1);
  return std::max(((largest + half - 1) >> FRACTION_BITS) - 2, 0);
}

// In blocks with a scale below LEAST_NORMAL_SCALE, some subnormal values have a code other than
// zero. Such blocks are multiplied by 2^UP before they are encoded, so that all values are normal.
constexpr int LEAST_NORMAL_SCALE = 3, UP = 64;

inline uint16_t moved_up(uint16_t value) {
  const int magnitude = value & MAGNITUDE;
  const int normal = magnitude + (UP << FRACTION_BITS);
  const float subnormal = static_cast<float>(magnitude) * 0x1p-69f;  // of 2^-133 each, times 2^UP
  const int moved = magnitude < 1 << FRACTION_BITS ? bits_of(subnormal) >> 16 : normal;
  return static_cast<uint16_t>((value & SIGN) | moved);
}

// The E2M1 code of a normal value or zero. Subtracting `down` divides the value by the scale: it is
// the difference of their exponents, at the exponent's bits. All steps use 16 bits, so that the
// compiler does not widen them.
inline int code_of(uint16_t value, int16_t down) {
  const auto scaled = static_cast<int16_t>((value & MAGNITUDE) - down);  // 6 at most
  // From 1 on, E2M1 is the exponent and one bit of the fraction, rounded to nearest, ties to even.
  const int shift = FRACTION_BITS - 1, odd = scaled >> shift & 1;
  const auto rounded = static_cast<int16_t>(scaled + (1 << (shift - 1)) - 1 + odd);
  const int large = (rounded >> shift) - 2 * (EXPONENT_BIAS - 1);
  // Below 1, E2M1 is a multiple of 1/2.
  const int small = (scaled > 0x3e80) + (scaled >= 0x3f40);  // above 1/4, from 3/4 on
  return std::max(large, small) | (value & SIGN) >> 12;
}

// The values of a block -> its scale bytes [32] and codes [512]. Returns whether a scale byte is
// outside [SCALE_MIN, SCALE_MAX].
inline bool encode_block(BlockValues& values, uint8_t* scales, uint8_t* codes) {
  uint16_t largest[PANEL_ROWS] = {};
  for (int k = 0; k < BLOCK; k++)
    for (int row = 0; row < PANEL_ROWS; row++)
      largest[row] = std::max<uint16_t>(largest[row], values[k][row] & MAGNITUDE);

  // Per row: `down` is the scale for code_of, `bytes` the scale for the panel, `keep` a mask of the
  // codes, which is 0 to make them zero. All have 16 bits, so that the compiler vectorizes the
  // loop.
  int16_t down[PANEL_ROWS];
  uint16_t keep[PANEL_ROWS], bytes[PANEL_ROWS];
  uint16_t outside = 0, small = 0;
  for (int row = 0; row < PANEL_ROWS; row++) {
    const int top = std::min<int>(largest[row], INFINITE);
    const int scale = top == 0 ? EXPONENT_BIAS : scale_of(top);
    const int byte = top == INFINITE ? SCALE_NAN : scale;
    down[row] = static_cast<int16_t>((scale - EXPONENT_BIAS) * (1 << FRACTION_BITS));
    keep[row] = top == INFINITE ? 0 : 0xffff;
    bytes[row] = static_cast<uint16_t>(byte);
    outside = static_cast<uint16_t>(outside | (byte < SCALE_MIN) | (byte > SCALE_MAX));
    small = static_cast<uint16_t>(small | (scale < LEAST_NORMAL_SCALE));
  }
  for (int lane = 0; lane < LANES; lane++) {
    scales[lane] = static_cast<uint8_t>(bytes[2 * lane]);
    scales[LANES + lane] = static_cast<uint8_t>(bytes[2 * lane + 1]);
  }
  if (small) {
    for (int row = 0; row < PANEL_ROWS; row++) {
      if (bytes[row] >= LEAST_NORMAL_SCALE) continue;
      for (int k = 0; k < BLOCK; k++) values[k][row] = moved_up(values[k][row]);
      down[row] = static_cast<int16_t>(down[row] + (UP << FRACTION_BITS));
    }
  }

  for (int group = 0; group < 4; group++) {
    // A row's eight codes in the order of panels.h, as the two halves of a dword.
    alignas(64) uint16_t low[PANEL_ROWS], high[PANEL_ROWS];
    const auto* eight = values + 8 * group;
    for (int row = 0; row < PANEL_ROWS; row++) {
      const auto code = [&](int k) { return code_of(eight[k][row], down[row]); };
      const int a = code(0) | code(4) << 4 | code(2) << 8 | code(6) << 12;
      const int b = code(1) | code(5) << 4 | code(3) << 8 | code(7) << 12;
      low[row] = static_cast<uint16_t>(a & keep[row]);
      high[row] = static_cast<uint16_t>(b & keep[row]);
    }
    // Rows 2 r and 2 r + 1 are neighbours here, but belong to halves 0 and 1 of the panel.
    uint32_t halves[2][LANES];
    for (int lane = 0; lane < LANES; lane++) {
      uint32_t lows, highs;
      std::memcpy(&lows, low + 2 * lane, sizeof lows);
      std::memcpy(&highs, high + 2 * lane, sizeof highs);
      halves[0][lane] = (lows & 0xffff) | highs << 16;
      halves[1][lane] = lows >> 16 | (highs & 0xffff0000);
    }
    for (int half = 0; half < 2; half++)
      std::memcpy(codes + half * CODE_BYTES / 2 + group * 64, halves[half], sizeof halves[half]);
  }
  return outside;
}

// A panel's values of one block, [row][column].
using RowValues = uint16_t[PANEL_ROWS][BLOCK];

inline void transpose(const RowValues& rows, BlockValues& block) {
#if defined(__AVX2__)
  for (int r = 0; r < PANEL_ROWS; r += 8) {
    for (int k = 0; k < BLOCK; k += 16) {
      // Three steps, each of which interleaves rows i and i + 4, transpose both halves' 8 x 8.
      __m256i lines[8], next[8];
      for (int i = 0; i < 8; i++)
        lines[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(&rows[r + i][k]));
      for (int step = 0; step < 3; step++) {
        for (int i = 0; i < 4; i++) {
          next[2 * i] = _mm256_unpacklo_epi16(lines[i], lines[i + 4]);
          next[2 * i + 1] = _mm256_unpackhi_epi16(lines[i], lines[i + 4]);
        }
        std::memcpy(lines, next, sizeof lines);
      }
      for (int i = 0; i < 8; i++) {
        auto* low = reinterpret_cast<__m128i*>(&block[k + i][r]);
        auto* high = reinterpret_cast<__m128i*>(&block[k + 8 + i][r]);
        _mm_storeu_si128(low, _mm256_castsi256_si128(lines[i]));
        _mm_storeu_si128(high, _mm256_extracti128_si256(lines[i], 1));
      }
    }
  }
#else
  // Two rows at a time (little-endian).
  for (int r = 0; r < PANEL_ROWS; r += 2) {
    for (int k = 0; k < BLOCK; k++) {
      const uint32_t two = rows[r][k] | static_cast<uint32_t>(rows[r + 1][k]) << 16;
      std::memcpy(&block[k][r], &two, sizeof two);
    }
  }
#endif
}

// One expert's values and their strides: row 2 p + h is at pair p + odd h.
struct Source {
  const void* values;
  int32_t dtype;
  int64_t k, pair, odd, stride_k;

  // Whether blocks of several panels are read together, because their rows are neighbours.
  bool has_lines() const { return pair == 2 && odd == 1; }
  bool has_half_lines() const { return pair == 1; }

  // Reads the block at column `first` of the panels with rows `row` to `row + rows - 1`. The last
  // panel's missing rows are zero.
  void read(int64_t row, int64_t rows, int64_t first, BlockValues* blocks) const {
    if (rows % PANEL_ROWS) std::memset(blocks[rows / PANEL_ROWS], 0, sizeof *blocks);
    if (has_lines())
      read_lines(row, rows, first, blocks);
    else if (has_half_lines())
      read_half_lines(row, rows, first, blocks);
    else
      for (int64_t r = 0; r < rows; r += PANEL_ROWS)
        read_rows(row + r, std::min(PANEL_ROWS, rows - r), first, blocks[r / PANEL_ROWS]);
  }

 private:
  const void* at(int64_t row, int64_t column) const {
    return element(values, dtype, row / 2 * pair + row % 2 * odd + column * stride_k);
  }

  // Converts contiguous values.
  inline __attribute__((always_inline)) void convert(const void* source, int64_t count,
                                                     uint16_t* out) const {
    if (dtype == MXFP4_BF16) {
      std::memcpy(out, source, static_cast<size_t>(count) * sizeof *out);
    } else if (dtype == MXFP4_F32) {
      const auto* floats = static_cast<const float*>(source);
      for (int64_t i = 0; i < count; i++) out[i] = upper_half(floats[i]);
    } else {
      float floats[PANEL_ROWS];
      to_f32(source, dtype, count, floats);
      for (int64_t i = 0; i < count; i++) out[i] = upper_half(floats[i]);
    }
  }

  // Prefetches values of the next block. They are in as many pages as it has columns or rows, too
  // many for the hardware's prefetcher. They go to the L2 cache, because L1 has no room. Always
  // inlined, because GCC drops calls of a function that only prefetches.
  inline __attribute__((always_inline)) void prefetch(int64_t row, int64_t column,
                                                      int64_t count) const {
    if (column >= k) return;
    const char* line = static_cast<const char*>(at(row, column));
    for (int64_t i = 0; i < count * dtype_bytes(dtype); i += 64) __builtin_prefetch(line + i, 0, 2);
  }

  // Reads rows that are neighbours in memory. Prefetching all lines at once is faster than one by
  // one.
  void read_lines(int64_t row, int64_t rows, int64_t first, BlockValues* blocks) const {
    for (int64_t i = 0; i < BLOCK; i++) prefetch(row, first + BLOCK + i, rows);
    for (int64_t i = 0; i < BLOCK; i++) {
      for (int64_t r = 0; r < rows; r += PANEL_ROWS) {
        const void* line = at(row + r, first + i);
        uint16_t* out = blocks[r / PANEL_ROWS][i];
        if (rows - r >= PANEL_ROWS)
          convert(line, PANEL_ROWS, out);  // a constant count, so the compiler needs no loop
        else
          convert(line, rows - r, out);
      }
    }
  }

  // Reads gates that are neighbours in memory, and ups that are.
  void read_half_lines(int64_t row, int64_t rows, int64_t first, BlockValues* blocks) const {
    const int64_t pairs = rows / 2;
    for (int64_t half = 0; half < 2; half++)
      for (int64_t i = 0; i < BLOCK; i++) prefetch(row + half, first + BLOCK + i, pairs);
    const char* gate = static_cast<const char*>(at(row, first));
    const char* up = static_cast<const char*>(at(row + 1, first));
    const int64_t size = dtype_bytes(dtype), step = stride_k * size;
    for (int64_t i = 0; i < BLOCK; i++, gate += step, up += step) {
      for (int64_t p = 0; p < pairs; p += LANES) {
        uint16_t gates[LANES], ups[LANES];
        const int64_t count = pairs - p;
        if (count >= LANES) {
          convert(gate + p * size, LANES, gates);
          convert(up + p * size, LANES, ups);
        } else {
          std::memset(gates, 0, sizeof gates);
          std::memset(ups, 0, sizeof ups);
          convert(gate + p * size, count, gates);
          convert(up + p * size, count, ups);
        }
        uint32_t both[LANES];  // little-endian
        for (int r = 0; r < LANES; r++) both[r] = gates[r] | static_cast<uint32_t>(ups[r]) << 16;
        std::memcpy(blocks[p / LANES][i], both, sizeof both);
      }
    }
  }

  void read_rows(int64_t row, int64_t rows, int64_t first, BlockValues& block) const {
    alignas(64) RowValues by_row;
    if (rows < PANEL_ROWS) std::memset(by_row, 0, sizeof by_row);
    for (int64_t r = 0; r < rows; r++) {
      if (stride_k == 1) {
        prefetch(row + r, first + BLOCK, BLOCK);
        convert(at(row + r, first), BLOCK, by_row[r]);
      } else {
        for (int64_t i = 0; i < BLOCK; i++) convert(at(row + r, first + i), 1, by_row[r] + i);
      }
    }
    transpose(by_row, block);
  }
};

// Quantizes the panels with rows `row` to `row + rows - 1`, at most GROUP_PANELS of them.
inline void quantize_panels(const Source& source, int64_t row, int64_t rows, uint8_t* target,
                            uint8_t* flags) {
  alignas(64) BlockValues values[GROUP_PANELS];
  const int64_t panels = panel_count(rows), stride = panel_bytes(source.k);
  const int64_t blocks = source.k / BLOCK;
  // Flags are stored at the end: another thread may compute with the panels while they are made
  // again from the same values.
  uint8_t outside[GROUP_PANELS] = {};
  for (int64_t block = 0; block < blocks; block++) {
    source.read(row, rows, block * BLOCK, values);
    for (int64_t panel = 0; panel < panels; panel++) {
      uint8_t* pair = target + panel * stride + block / 2 * PAIR_BYTES;
      const int64_t second = block % 2;
      outside[panel] |= encode_block(values[panel], pair + second * PANEL_ROWS,
                                     pair + SCALE_BYTES + second * CODE_BYTES);
    }
  }
  std::memcpy(flags, outside, static_cast<size_t>(panels));
  if (blocks % 2) {
    for (int64_t panel = 0; panel < panels; panel++) {
      uint8_t* pair = target + (panel + 1) * stride - PAIR_BYTES;
      pad_block(pair + PANEL_ROWS, pair + SCALE_BYTES + CODE_BYTES);
    }
  }
}

// The same, one panel after the other where that is faster.
inline void quantize_group(const Source& source, int64_t row, int64_t rows, uint8_t* target,
                           uint8_t* flags) {
  if (source.has_lines() || source.has_half_lines())
    return quantize_panels(source, row, rows, target, flags);
  for (int64_t r = 0; r < rows; r += PANEL_ROWS, target += panel_bytes(source.k), flags++)
    quantize_panels(source, row + r, std::min(PANEL_ROWS, rows - r), target, flags);
}

}  // namespace mxfp4
