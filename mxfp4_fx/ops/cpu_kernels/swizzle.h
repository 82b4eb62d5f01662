// Checkpoint order <-> `cpu_panels` (panels.h).
//
// In both orders a dword has eight neighbours along K, but the nibbles have another order. A block
// of a panel is 32 rows of 4 dwords in checkpoint order, and 8 lines of 16 dwords in `cpu_panels`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "panels.h"
#include "parallel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mxfp4 {

constexpr int64_t BLOCK_BYTES = BLOCK / 2;  // codes of a block in checkpoint order
constexpr int64_t BLOCK_DWORDS = BLOCK_BYTES / 4;

// A block of a panel in checkpoint order, and in `cpu_panels`.
using RowDwords = uint32_t[PANEL_ROWS][BLOCK_DWORDS];
using LaneDwords = uint32_t[2][BLOCK_DWORDS][LANES];

// Checkpoint order <-> the order of panels.h. The permutation reverses the three bits of a nibble's
// position: it swaps nibbles 1 and 4, and nibbles 3 and 6.
inline uint32_t reorder_nibbles(uint32_t dword) {
  const uint32_t differences = (dword ^ dword >> 12) & 0xf0f0;
  return dword ^ differences ^ differences << 12;
}

// Where the rows of an expert are: row 2 p + h is the expert's row `pair` p + `odd` h in memory.
struct RowOrder {
  int64_t pair, odd;

  int64_t at(int64_t row) const { return pair * (row / 2) + odd * (row % 2); }
};

// Writes the padding after the last block if K / 32 is odd.
inline void pad_block(uint8_t* scales, uint8_t* codes) {
  std::memset(scales, SCALE_PADDING, PANEL_ROWS);
  std::memset(codes, 0, CODE_BYTES);
}

// The scales of some neighbouring blocks as a panel holds them, one line for each block.
constexpr int64_t GROUP_BLOCKS = 8;
using ScaleLines = uint8_t[GROUP_BLOCKS][PANEL_ROWS];

// The smallest and the largest scale of a panel, row by row.
struct ScaleRange {
  uint8_t lowest[PANEL_ROWS], highest[PANEL_ROWS];

  ScaleRange() {
    std::memset(lowest, SCALE_PADDING, sizeof lowest);
    std::memset(highest, SCALE_PADDING, sizeof highest);
  }
  void add(const ScaleLines& lines) {
    for (const auto& line : lines) {
      for (int64_t row = 0; row < PANEL_ROWS; row++) {
        lowest[row] = std::min(lowest[row], line[row]);
        highest[row] = std::max(highest[row], line[row]);
      }
    }
  }
  // The panel's flag.
  uint8_t is_outside() const {
    return *std::min_element(lowest, lowest + PANEL_ROWS) < SCALE_MIN ||
           *std::max_element(highest, highest + PANEL_ROWS) > SCALE_MAX;
  }
};

// Scales of `count` blocks -> lines; the lines and rows that are missing are padding.
inline void swizzle_scales(const uint8_t* scales, RowOrder order, int64_t rows, int64_t blocks,
                           int64_t count, ScaleLines& lines) {
  std::memset(lines, SCALE_PADDING, sizeof lines);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t block = 0; block < count; block++)
      lines[block][row % 2 * LANES + row / 2] = scales[order.at(row) * blocks + block];
}

inline void swizzle_codes(const uint8_t* codes, RowOrder order, int64_t rows, int64_t blocks,
                          uint8_t* out) {
  alignas(64) RowDwords by_row;
  alignas(64) LaneDwords by_lane;
  if (rows < PANEL_ROWS) std::memset(by_row, 0, sizeof by_row);
  for (int64_t row = 0; row < rows; row++)
    std::memcpy(by_row[row], codes + order.at(row) * blocks * BLOCK_BYTES, BLOCK_BYTES);
  for (int64_t lane = 0; lane < LANES; lane++)
    for (int64_t half = 0; half < 2; half++)
      for (int64_t group = 0; group < BLOCK_DWORDS; group++)
        by_lane[half][group][lane] = reorder_nibbles(by_row[2 * lane + half][group]);
  std::memcpy(out, by_lane, CODE_BYTES);
}

#if defined(__AVX2__)

// The same for panels without missing rows, in AVX2. A panel is stored past the caches: nothing
// reads it soon, and an ordinary store would first read the line that it overwrites.
inline void store_past(uint8_t* out, __m256i value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(out), value);
}

inline __m256i reorder_nibbles(__m256i dwords) {
  const __m256i moved = _mm256_xor_si256(dwords, _mm256_srli_epi32(dwords, 12));
  const __m256i differences = _mm256_and_si256(moved, _mm256_set1_epi32(0xf0f0));
  return _mm256_xor_si256(_mm256_xor_si256(dwords, differences),
                          _mm256_slli_epi32(differences, 12));
}

// Eight lanes of a half: rows from `codes` on, `stride` bytes apart -> out[group].
inline void eight_lanes(const uint8_t* codes, int64_t stride, __m256i* out) {
  __m256i two[4];  // lanes i and i + 4
  for (int i = 0; i < 4; i++) {
    const auto* low = reinterpret_cast<const __m128i*>(codes + i * stride);
    const auto* high = reinterpret_cast<const __m128i*>(codes + (i + 4) * stride);
    two[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                     _mm_loadu_si128(high), 1);
  }
  const __m256i a = _mm256_unpacklo_epi32(two[0], two[1]);
  const __m256i b = _mm256_unpacklo_epi32(two[2], two[3]);
  const __m256i c = _mm256_unpackhi_epi32(two[0], two[1]);
  const __m256i d = _mm256_unpackhi_epi32(two[2], two[3]);
  out[0] = reorder_nibbles(_mm256_unpacklo_epi64(a, b));
  out[1] = reorder_nibbles(_mm256_unpackhi_epi64(a, b));
  out[2] = reorder_nibbles(_mm256_unpacklo_epi64(c, d));
  out[3] = reorder_nibbles(_mm256_unpackhi_epi64(c, d));
}

inline void swizzle_whole_codes(const uint8_t* codes, RowOrder order, int64_t blocks,
                                uint8_t* out) {
  const int64_t row = blocks * BLOCK_BYTES, stride = order.pair * row;
  for (int64_t half = 0; half < 2; half++) {
    __m256i first[BLOCK_DWORDS], second[BLOCK_DWORDS];
    eight_lanes(codes + half * order.odd * row, stride, first);
    eight_lanes(codes + half * order.odd * row + LANES / 2 * stride, stride, second);
    for (int64_t group = 0; group < BLOCK_DWORDS; group++, out += LINE) {
      store_past(out, first[group]);
      store_past(out + LINE / 2, second[group]);
    }
  }
}

// Scales of GROUP_BLOCKS blocks -> lines.
inline void swizzle_whole_scales(const uint8_t* scales, RowOrder order, int64_t blocks,
                                 ScaleLines& lines) {
  for (int half = 0; half < 2; half++) {
    __m128i rows[8], next[8];
    for (int i = 0; i < 8; i++) {
      const uint8_t* low = scales + (i * order.pair + half * order.odd) * blocks;
      const uint8_t* high = low + LANES / 2 * order.pair * blocks;
      rows[i] = _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)),
                                  _mm_loadl_epi64(reinterpret_cast<const __m128i*>(high)));
    }
    // That and three more such steps, each of which interleaves i and i + 4, transpose.
    for (int step = 0; step < 3; step++) {
      for (int i = 0; i < 4; i++) {
        next[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 4]);
        next[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 4]);
      }
      std::memcpy(rows, next, sizeof rows);
    }
    for (int64_t block = 0; block < GROUP_BLOCKS; block++)
      _mm_store_si128(reinterpret_cast<__m128i*>(lines[block] + half * LANES), rows[block]);
  }
}

inline uint8_t swizzle_whole_panel(const uint8_t* codes, const uint8_t* scales, RowOrder order,
                                   int64_t blocks, uint8_t* panel) {
  // The next panel's rows are the next memory, in one place or in two. The hardware's prefetcher
  // does not help, because they are read in pieces of 16 bytes. Several streams are faster than
  // one; each has four rows.
  constexpr int64_t STREAMS = CODE_BYTES / LINE;
  const int64_t row_bytes = blocks * BLOCK_BYTES;
  const int64_t second = (order.pair == 2 ? LANES : order.odd) * row_bytes;
  const uint8_t* next = codes + LANES * order.pair * row_bytes;
  ScaleRange range;
  alignas(64) ScaleLines lines;
  for (int64_t block = 0; block < blocks; block++) {
    uint8_t* pair = panel + block / 2 * PAIR_BYTES;
    if (block % GROUP_BLOCKS == 0) {
      const int64_t left = blocks - block;
      if (left >= GROUP_BLOCKS)
        swizzle_whole_scales(scales + block, order, blocks, lines);
      else
        swizzle_scales(scales + block, order, PANEL_ROWS, blocks, left, lines);
      range.add(lines);
    }
    if (block % 2 == 0) {
      const auto* two = reinterpret_cast<const __m256i*>(lines[block % GROUP_BLOCKS]);
      store_past(pair, two[0]);
      store_past(pair + SCALE_BYTES / 2, two[1]);
    }
    for (int64_t i = 0; i < STREAMS / 2; i++) {
      const uint8_t* ahead = next + (i * blocks + block) * LINE;
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + second, 0, 2);
    }
    swizzle_whole_codes(codes + block * BLOCK_BYTES, order, blocks,
                        pair + SCALE_BYTES + block % 2 * CODE_BYTES);
  }
  if (blocks % 2) std::memset(panel + panel_bytes(blocks * BLOCK) - CODE_BYTES, 0, CODE_BYTES);
  _mm_sfence();  // other threads will read the panel
  return range.is_outside();
}

#endif

// Swizzles `rows` rows of `blocks` blocks each into a panel; returns the panel's flag. Its first
// row is at `codes` and `scales`, which is row 0 of the order. It writes each byte once: another
// thread may compute with the panel while it is made again from the same values.
inline uint8_t swizzle_panel(const uint8_t* codes, const uint8_t* scales, RowOrder order,
                             int64_t rows, int64_t blocks, uint8_t* panel) {
#if defined(__AVX2__)
  if (rows == PANEL_ROWS && reinterpret_cast<uintptr_t>(panel) % sizeof(__m256i) == 0)
    return swizzle_whole_panel(codes, scales, order, blocks, panel);
#endif
  ScaleRange range;
  alignas(64) ScaleLines lines;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t in_group = block % GROUP_BLOCKS;
    if (in_group == 0) {
      const int64_t count = std::min(GROUP_BLOCKS, blocks - block);
      swizzle_scales(scales + block, order, rows, blocks, count, lines);
      range.add(lines);
    }
    uint8_t* pair = panel + block / 2 * PAIR_BYTES;
    if (block % 2 == 0) std::memcpy(pair, lines[in_group], SCALE_BYTES);
    swizzle_codes(codes + block * BLOCK_BYTES, order, rows, blocks,
                  pair + SCALE_BYTES + block % 2 * CODE_BYTES);
  }
  if (blocks % 2) std::memset(panel + panel_bytes(blocks * BLOCK) - CODE_BYTES, 0, CODE_BYTES);
  return range.is_outside();
}

inline void unswizzle_panel(const uint8_t* panel, int64_t rows, int64_t blocks, uint8_t* codes,
                            uint8_t* scales) {
  alignas(64) RowDwords by_row;
  alignas(64) LaneDwords by_lane;
  for (int64_t block = 0; block < blocks; block++) {
    const uint8_t* pair = panel + block / 2 * PAIR_BYTES;
    const uint8_t* scale = pair + block % 2 * PANEL_ROWS;
    std::memcpy(by_lane, pair + SCALE_BYTES + block % 2 * CODE_BYTES, CODE_BYTES);
    for (int64_t lane = 0; lane < LANES; lane++)
      for (int64_t half = 0; half < 2; half++)
        for (int64_t group = 0; group < BLOCK_DWORDS; group++)
          by_row[2 * lane + half][group] = reorder_nibbles(by_lane[half][group][lane]);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t at = row * blocks + block;
      std::memcpy(codes + at * BLOCK_BYTES, by_row[row], BLOCK_BYTES);
      scales[at] = scale[row % 2 * LANES + row / 2];
    }
  }
}

// Calls body(panel, first_row, rows) for all panels of all experts. `panel` and `first_row`, the
// place of the panel's first row in memory, count across experts.
template <class F>
void for_each_panel(int64_t experts, int64_t n, RowOrder order, int threads, F body) {
  const int64_t panels = panel_count(n);
  Cursor cursor(experts * panels, threads);
  parallel(threads, [&](int, int) {
    int64_t begin, end;
    while (cursor.next(begin, end)) {
      for (int64_t panel = begin; panel < end; panel++) {
        const int64_t row = panel % panels * PANEL_ROWS;
        body(panel, panel / panels * n + order.at(row), std::min(PANEL_ROWS, n - row));
      }
    }
  });
}

}  // namespace mxfp4
