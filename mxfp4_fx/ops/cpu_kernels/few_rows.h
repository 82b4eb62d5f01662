// Few rows times panels in exact integers (row_block.h): the fastest way while memory bounds the
// speed. Each panel is one stream, and memory is read faster in several streams at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "f32_tile.h"
#include "panels.h"
#include "row_block.h"

#if defined(__AVX512VNNI__)
#include "row_products_avx512.h"
#elif defined(__AVX2__)
#include "row_products_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "row_products_neon.h"
#endif

namespace mxfp4 {

// Rows of activations, `bytes` apart: the blocks of a row, then its values.
struct FewRows {
  const char* first;
  int64_t bytes, blocks, count;

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

// sums [panels][rows.count][32], panels `step` apart, += the rows, at most MOST, times neighbouring
// panels whose flags are 0.
template <int MOST>
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

inline __attribute__((always_inline)) void add_to(float* sums, RowVector products) {
  RowVector sum;
  std::memcpy(&sum, sums, sizeof sum);
  sum = sum + products;
  std::memcpy(sums, &sum, sizeof sum);
}

// Adds the products of a block that are not exact in integers.
inline void add_floats(const float* values, const uint8_t* codes, const uint8_t* scales,
                       float* sums) {
  for (int i = 0; i < PANEL_ROWS; i += ROW_LANES)
    add_to(sums + i, float_products(codes + i / LANES * (CODE_BYTES / 2) + i % LANES * 4, values) *
                         row_scales(scales + i));
}

// multiply_rows, where `Block` multiplies a block of all rows.
template <class Block>
void multiply_blocks(const FewRows& rows, const uint8_t* panel, int64_t panels, float* sums,
                     int64_t step) {
  const int64_t panel_bytes = ceil_div(rows.blocks, 2) * PAIR_BYTES, ahead = row_prefetch();
  for (int64_t b = 0; b < rows.blocks; b++) {
    const Block block(rows, b);
    for (int64_t p = 0; p < panels; p++) {
      const uint8_t* from = panel + p * panel_bytes;
      prefetch_block(from, b, ahead);
      block.multiply(block_codes(from, b), block_scales(from, b), sums + p * step);
    }
  }
}

#endif

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)

// A block of COUNT rows, which are multiplied together: each weight is decoded once, in registers.
template <int COUNT>
class BlockOfRows {
 public:
  BlockOfRows(const FewRows& rows, int64_t b) {
    for (int r = 0; r < COUNT; r++) {
      x_[r] = rows.block(r, b);
      values_[r] = rows.values(r, b);
      most_ = std::max(most_, x_[r]->kind);
    }
  }

  // sums [COUNT][32]
  inline __attribute__((always_inline)) void multiply(const uint8_t* codes, const uint8_t* scales,
                                                      float* sums) const {
    if (most_ == BlockKind::TWO_ZERO) return add<2>(x_, codes, scales, sums);
    if (most_ == BlockKind::ONE_ZERO) return add<1>(x_, codes, scales, sums);
    if (most_ == BlockKind::EXACT) return add<0>(x_, codes, scales, sums);
    for (int r = 0; r < COUNT; r++, sums += PANEL_ROWS) {
      if (x_[r]->kind == BlockKind::EXTREME)
        add_extreme(values_[r], codes, scales, sums);
      else if (x_[r]->kind == BlockKind::FLOAT)
        add_floats(values_[r], codes, scales, sums);
      else
        add<0, 1>({x_[r]}, codes, scales, sums);
    }
  }

 private:
  const RowBlock* x_[COUNT];
  const float* values_[COUNT];
  BlockKind most_ = BlockKind::TWO_ZERO;

  // Adds the products of an exact block of ROWS rows, whose limbs before limb FIRST are zero.
  template <int FIRST, int ROWS>
  static inline __attribute__((always_inline)) void add(const RowBlock* const (&x)[ROWS],
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
        // The unit is applied first: unit times scale may underflow although the sum does not.
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
          add_to(sums + r * PANEL_ROWS + i + v * ROW_LANES, products[r][v] * units[r] * scale);
      }
    }
  }
};

template <int MOST>
void multiply_rows(const FewRows& rows, const uint8_t* panel, int64_t panels, float* sums,
                   int64_t step) {
  if constexpr (MOST > 1)
    if (rows.count < MOST) return multiply_rows<MOST - 1>(rows, panel, panels, sums, step);
  multiply_blocks<BlockOfRows<MOST>>(rows, panel, panels, sums, step);
}

#elif defined(__AVX2__)

// A block of rows, which are multiplied one after the other: there are too few registers for more.
// Each is multiplied by the kernel of its own block's kind.
class BlockOfRows {
 public:
  BlockOfRows(const FewRows& rows, int64_t b) : rows_(rows), b_(b) {}

  // sums [count][32]
  inline __attribute__((always_inline)) void multiply(const uint8_t* codes, const uint8_t* scales,
                                                      float* sums) const {
    const CodedBlock coded(codes);
    if (rows_.count == 1 && rows_.block(0, b_)->kind == BlockKind::TWO_ZERO)
      return add<2>(coded, *rows_.block(0, b_), scales, sums);
    DecodedBlock block(coded);
    asm("" : "+m"(block));  // registers do not hold it
    for (int64_t r = 0; r < rows_.count; r++, sums += PANEL_ROWS) {
      const RowBlock& x = *rows_.block(r, b_);
      switch (x.kind) {
        case BlockKind::TWO_ZERO:
          add<2>(block, x, scales, sums);
          break;
        case BlockKind::ONE_ZERO:
          add<1>(block, x, scales, sums);
          break;
        case BlockKind::EXACT:
          add<0>(block, x, scales, sums);
          break;
        case BlockKind::FLOAT:
          add_floats(rows_.values(r, b_), codes, scales, sums);
          break;
        case BlockKind::EXTREME:
          add_extreme(rows_.values(r, b_), codes, scales, sums);
      }
    }
  }

 private:
  const FewRows& rows_;
  const int64_t b_;

  // Adds the products of an exact block of a row, whose limbs before limb FIRST are zero.
  template <int FIRST, class Block>
  static inline __attribute__((always_inline)) void add(const Block& block, const RowBlock& x,
                                                        const uint8_t* scales, float* sums) {
    RowVector products[ROW_VECTORS];
    limb_products<FIRST>(block, x, products);
    const float unit = x.unit * (FIRST == 2 ? 0x1p16f : 1.f);  // of the products
    // The unit is applied first: unit times scale may underflow although the sum does not.
#pragma GCC unroll 4
    for (int v = 0; v < ROW_VECTORS; v++)
      add_to(sums + v * ROW_LANES, products[v] * unit * row_scales(scales + v * ROW_LANES));
  }
};

template <int MOST>
void multiply_rows(const FewRows& rows, const uint8_t* panel, int64_t panels, float* sums,
                   int64_t step) {
  multiply_blocks<BlockOfRows>(rows, panel, panels, sums, step);
}

#else
constexpr bool HAS_FEW_ROWS = false;
#endif

}  // namespace mxfp4
