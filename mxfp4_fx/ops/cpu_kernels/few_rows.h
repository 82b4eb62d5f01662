// Few rows times panels in exact integers (row_block.h): the fastest way while memory bounds the
// speed. Each panel is one stream, and memory is read faster in several streams at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "f32_tile.h"
#include "panels.h"
#include "row_block.h"

#if defined(__AVX2__)
#include "row_products_x86.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "row_products_neon.h"
#endif

namespace mxfp4 {

// Rows of activations, `bytes` apart: the blocks of a row, then its values.
struct FewRows {
  const char* first;
  int64_t bytes, blocks;

  static int64_t values_at(int64_t blocks) {
    return ceil_div(blocks * static_cast<int64_t>(sizeof(RowBlock)), LINE) * LINE;
  }
  static int64_t bytes_of(int64_t blocks) {
    return values_at(blocks) + blocks * BLOCK * static_cast<int64_t>(sizeof(float));
  }
  const RowBlock* block(int64_t row, int64_t b) const {
    return reinterpret_cast<const RowBlock*>(first + row * bytes) + b;
  }
  const float* values(int64_t row, int64_t b) const {
    return reinterpret_cast<const float*>(first + row * bytes + values_at(blocks)) + b * BLOCK;
  }
};

// sums [panels][ROWS][32], panels `step` apart, += ROWS rows times neighbouring panels whose flags
// are 0.
template <int ROWS>
void multiply_rows(const FewRows& rows, const uint8_t* panel, int64_t panels, float* sums,
                   int64_t step);

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool HAS_FEW_ROWS = true;

// How far ahead weights of a panel are prefetched, in bytes.
inline int64_t row_prefetch() { return has_room_ahead() ? 4096 : 1024; }

// Adds the products of a block with values that may overflow or underflow in the fast kernels, are
// infinite or NaN.
inline void add_extreme(const float* values, const uint8_t* codes, const uint8_t* scales,
                        float* sums) {
  alignas(LINE) F32Block weights;
  decode_f32(codes, scales, weights);
  F32Tile::multiply_chunk<1>(values, &weights, 1, sums);
}

// Adds the products of a block of one row, of any kind, to its sums.
inline void add_any_block(const RowBlock* x, const float* values, const uint8_t* codes,
                          const uint8_t* scales, float* sums) {
  if (x->kind == BlockKind::EXTREME) return add_extreme(values, codes, scales, sums);
  for (int i = 0; i < PANEL_ROWS; i += ROW_LANES, sums += ROW_LANES) {
    const uint8_t* part = codes + i / LANES * (CODE_BYTES / 2) + i % LANES * 4;
    RowVector sum, products[1][1];
    if (x->kind <= BlockKind::EXACT) {
      limb_products<0>(part, {x}, products);
      products[0][0] = products[0][0] * x->unit;
    } else {
      products[0][0] = float_products(part, values);
    }
    std::memcpy(&sum, sums, sizeof sum);
    sum = sum + products[0][0] * row_scales(scales + i);
    std::memcpy(sums, &sum, sizeof sum);
  }
}

// Adds the products of an exact block of ROWS rows, whose limbs before limb FIRST are zero.
template <int FIRST, int ROWS>
inline __attribute__((always_inline)) void add_block(const RowBlock* const (&x)[ROWS],
                                                     const uint8_t* codes, const uint8_t* scales,
                                                     float* sums) {
  constexpr int V = row_vectors<ROWS>();
  float units[ROWS];  // of what limb_products sums
  for (int r = 0; r < ROWS; r++) units[r] = x[r]->unit * (FIRST == 2 ? 0x1p16f : 1.f);
  for (int i = 0; i < PANEL_ROWS; i += V * ROW_LANES) {
    RowVector products[ROWS][V];
    limb_products<FIRST>(codes + i / LANES * (CODE_BYTES / 2) + i % LANES * 4, x, products);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const RowVector scale = row_scales(scales + i + v * ROW_LANES);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) {
        float* at = sums + r * PANEL_ROWS + i + v * ROW_LANES;
        RowVector sum;
        std::memcpy(&sum, at, sizeof sum);
        // The unit is applied first: unit times scale may underflow although the sum does not.
        sum = sum + products[r][v] * units[r] * scale;
        std::memcpy(at, &sum, sizeof sum);
      }
    }
  }
}

template <int ROWS>
void multiply_rows(const FewRows& rows, const uint8_t* panel, int64_t panels, float* sums,
                   int64_t step) {
  const int64_t panel_bytes = ceil_div(rows.blocks, 2) * PAIR_BYTES, ahead = row_prefetch();
  for (int64_t b = 0; b < rows.blocks; b++) {
    const RowBlock* x[ROWS];
    BlockKind most = BlockKind::TWO_ZERO;
    for (int r = 0; r < ROWS; r++) {
      x[r] = rows.block(r, b);
      most = std::max(most, x[r]->kind);
    }
    for (int64_t p = 0; p < panels; p++) {
      const uint8_t* codes = block_codes(panel + p * panel_bytes, b);
      const uint8_t* scales = block_scales(panel + p * panel_bytes, b);
      float* to = sums + p * step;
      prefetch_block(panel + p * panel_bytes, b, ahead);
      if (most == BlockKind::TWO_ZERO)
        add_block<2>(x, codes, scales, to);
      else if (most == BlockKind::ONE_ZERO)
        add_block<1>(x, codes, scales, to);
      else if (most == BlockKind::EXACT)
        add_block<0>(x, codes, scales, to);
      else
        for (int r = 0; r < ROWS; r++)
          add_any_block(x[r], rows.values(r, b), codes, scales, to + r * PANEL_ROWS);
    }
  }
}

#else
constexpr bool HAS_FEW_ROWS = false;
#endif

}  // namespace mxfp4
