// mxfp4_swizzle and mxfp4_unswizzle: checkpoint order <-> `cpu_panels` (panels.h).
//
// In both orders a dword has eight neighbours along K, but the nibbles have another order. A block
// of a panel is 32 rows of 4 dwords in checkpoint order, and 8 lines of 16 dwords in `cpu_panels`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "panels.h"
#include "parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
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

// Whether the scale sets its panel's flag.
inline bool is_outside(uint8_t scale) { return scale < SCALE_MIN || scale > SCALE_MAX; }

// Writes the padding after the last block if K / 32 is odd.
inline void pad_block(uint8_t* scales, uint8_t* codes) {
  std::memset(scales, SCALE_PADDING, PANEL_ROWS);
  std::memset(codes, 0, CODE_BYTES);
}

// Swizzles `rows` rows of `blocks` blocks each into a panel; returns the panel's flag.
inline uint8_t swizzle_panel(const uint8_t* codes, const uint8_t* scales, int64_t rows,
                             int64_t blocks, uint8_t* panel) {
  alignas(64) RowDwords by_row = {};
  alignas(64) LaneDwords by_lane;
  bool outside = false;
  for (int64_t block = 0; block < blocks; block++) {
    uint8_t* pair = panel + block / 2 * PAIR_BYTES;
    uint8_t* scale = pair + block % 2 * PANEL_ROWS;
    std::memset(scale, SCALE_PADDING, PANEL_ROWS);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t at = row * blocks + block;
      std::memcpy(by_row[row], codes + at * BLOCK_BYTES, BLOCK_BYTES);
      scale[row % 2 * LANES + row / 2] = scales[at];
      outside |= is_outside(scales[at]);
    }
    for (int64_t lane = 0; lane < LANES; lane++)
      for (int64_t half = 0; half < 2; half++)
        for (int64_t group = 0; group < BLOCK_DWORDS; group++)
          by_lane[half][group][lane] = reorder_nibbles(by_row[2 * lane + half][group]);
    std::memcpy(pair + SCALE_BYTES + block % 2 * CODE_BYTES, by_lane, CODE_BYTES);
  }
  if (blocks % 2) {
    uint8_t* pair = panel + blocks / 2 * PAIR_BYTES;
    pad_block(pair + PANEL_ROWS, pair + SCALE_BYTES + CODE_BYTES);
  }
  return outside;
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

// Calls body(panel, first_row, rows) for all panels of all experts. `panel` and `first_row` count
// across experts.
template <class F>
void for_each_panel(int64_t experts, int64_t n, int threads, F body) {
  const int64_t panels = panel_count(n);
  Cursor cursor(experts * panels, threads);
  parallel(threads, [&](int, int) {
    int64_t begin, end;
    while (cursor.next(begin, end)) {
      for (int64_t panel = begin; panel < end; panel++) {
        const int64_t row = panel % panels * PANEL_ROWS;
        body(panel, panel / panels * n + row, std::min(PANEL_ROWS, n - row));
      }
    }
  });
}

}  // namespace mxfp4

extern "C" int mxfp4_swizzle(const uint8_t* blocks, const uint8_t* scales, int64_t experts,
                             int64_t n, int64_t k, uint8_t* panels, uint8_t* flags,
                             int32_t threads) {
  using namespace mxfp4;
  const int64_t row_blocks = k / BLOCK;
  for_each_panel(experts, n, threads, [&](int64_t panel, int64_t first_row, int64_t rows) {
    const int64_t block = first_row * row_blocks;
    flags[panel] = swizzle_panel(blocks + block * BLOCK_BYTES, scales + block, rows, row_blocks,
                                 panels + panel * panel_bytes(k));
  });
  return 0;
}

extern "C" int mxfp4_unswizzle(const uint8_t* panels, int64_t experts, int64_t n, int64_t k,
                               uint8_t* blocks, uint8_t* scales, int32_t threads) {
  using namespace mxfp4;
  const int64_t row_blocks = k / BLOCK;
  for_each_panel(experts, n, threads, [&](int64_t panel, int64_t first_row, int64_t rows) {
    const int64_t block = first_row * row_blocks;
    unswizzle_panel(panels + panel * panel_bytes(k), rows, row_blocks, blocks + block * BLOCK_BYTES,
                    scales + block);
  });
  return 0;
}

extern "C" void mxfp4_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t address = reinterpret_cast<uintptr_t>(start);
  const uintptr_t first = (address + page - 1) / page * page;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}
