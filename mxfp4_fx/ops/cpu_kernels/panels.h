// The layout `cpu_panels`, in which all kernels here read an expert's MXFP4 weights, and rows of
// activations in tiles.
//
// An expert [N, K] has P = ceil(N / 32) panels of 32 output rows, and its G = K / 32 blocks form
// Q = ceil(G / 2) pairs. A panel is one stream of Q pairs. A pair is
//
//     64 bytes    scales    [block of the pair: 2][row of the panel, as `position` has it: 32]
//     512 bytes   codes of the first block    [half h: 2][group g: 4][lane r: 16][byte j: 4]
//     512 bytes   codes of the second block
//
// Half h, lane r is output row 32 p + 2 r + h of panel p, so gates (even rows) and ups (odd rows)
// of SwiGLU are in the same lane of the two halves. The row's scale is byte 16 h + r. A dword of
// group g holds eight weights of a block. Byte j has k = 8 g + KORDER[j] in its low nibble, and
// k = 8 g + 4 + KORDER[j] in its high nibble. So the low nibbles form a dword for VNNI, and a byte
// lookup that widens them to bfloat16 gives pairs of neighbours in k. AMX and vdpbf16ps read this
// order, and nothing is transposed.
//
// Padding (rows from N on, the second block of an odd last pair) has code 0 and scale 127. A
// panel's flag is 1 if one of its scale bytes is outside [SCALE_MIN, SCALE_MAX]. With bytes inside,
// every weight that is not zero is a normal bfloat16 number.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace mxfp4 {

constexpr int64_t BLOCK = 32;        // values that share a scale
constexpr int64_t PANEL_ROWS = 32;   // output rows of a panel
constexpr int64_t LANES = 16;        // of a half
constexpr int64_t SCALE_BYTES = 64;  // of a pair
constexpr int64_t CODE_BYTES = 512;  // of a block in a panel
constexpr int64_t PAIR_BYTES = SCALE_BYTES + 2 * CODE_BYTES;
constexpr int KORDER[4] = {0, 2, 1, 3};
constexpr uint8_t SCALE_MIN = 2, SCALE_MAX = 252, SCALE_PADDING = 127, SCALE_NAN = 255;

constexpr int64_t LINE = 64;  // bytes of a cache line

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t panel_count(int64_t n) { return ceil_div(n, PANEL_ROWS); }
constexpr int64_t pair_count(int64_t k) { return ceil_div(k / BLOCK, 2); }
constexpr int64_t panel_bytes(int64_t k) { return pair_count(k) * PAIR_BYTES; }

// The codes [512] and the scales [32] of a block in its panel.
inline const uint8_t* block_codes(const uint8_t* panel, int64_t block) {
  return panel + block / 2 * PAIR_BYTES + SCALE_BYTES + block % 2 * CODE_BYTES;
}
inline const uint8_t* block_scales(const uint8_t* panel, int64_t block) {
  return panel + block / 2 * PAIR_BYTES + block % 2 * PANEL_ROWS;
}

// Whether weights may be prefetched far ahead, because the first cache has room for them: 48 KiB
// (AMD's Zen 5) have, 32 KiB (Zen 4) have not. Other processors were not measured with this path.
inline bool has_room_ahead() {
#if defined(MXFP4_PATH_AVX512_BF16) && defined(_SC_LEVEL1_DCACHE_SIZE)
  static const bool has_room = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10;
  return has_room;
#else
  return false;
#endif
}

// How prefetched data is kept: in all caches, or in none but the first. A token's weights, which
// are read once, would push all else out of the caches, Python's own data too.
constexpr int KEPT = 3, READ_ONCE = 0;

// Prefetches the data `ahead` bytes behind a block, so that memory works while the block is
// computed.
template <int KEEPING = KEPT>
inline void prefetch_block(const uint8_t* panel, int64_t block, int64_t ahead) {
  const uint8_t* codes = block_codes(panel, block) + ahead;
  for (int64_t i = 0; i < CODE_BYTES; i += LINE) __builtin_prefetch(codes + i, 0, KEEPING);
  if (block % 2 == 0) __builtin_prefetch(codes - SCALE_BYTES, 0, KEEPING);
}

// Rows in tiles, the first `tall` of which have one row more than the others.
struct Heights {
  int64_t tiles, most, tall;

  // The fewest tiles of at most `most` rows, as even as they can be.
  static Heights of(int64_t rows, int64_t most) {
    const int64_t tiles = ceil_div(rows, most), height = ceil_div(rows, tiles);
    return {tiles, height, rows - tiles * (height - 1)};
  }
  // The same, of one height: rows may be missing in the last.
  static Heights equal(int64_t rows, int64_t most) {
    const Heights heights = of(rows, most);
    return {heights.tiles, heights.most, heights.tiles};
  }

  int64_t rows(int64_t tile) const { return most - (tile >= tall); }
  // The first row of a tile; of the tile behind the last, the number of all rows.
  int64_t first(int64_t tile) const { return tile * most - (tile > tall ? tile - tall : 0); }
  int64_t tile_of(int64_t row) const {
    return row < tall * most ? row / most : tall + (row - tall * most) / (most - 1);
  }
  // Tiles [tile, tile + count).
  Heights part(int64_t tile, int64_t count) const {
    const int64_t left = tall > tile ? tall - tile : 0;
    return left > 0 ? Heights{count, most, left < count ? left : count}
                    : Heights{count, most - 1, count};
  }
};

// Packed rows of activations, one tile behind the other.
struct Tiles {
  const char* packed;
  Heights heights;
  int64_t blocks;
};

}  // namespace mxfp4
