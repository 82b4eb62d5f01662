// Many rows of activations times MXFP8 weights (mxfp8_decoder.h). A panel, 32 rows of a weight, is
// decoded to float32 some blocks at a time, and f32_tile.h multiplies these with all rows of x.
// Right for all codes, scales and activations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "api.h"
#include "f32_tile.h"
#include "linear.h"
#include "mxfp8_decoder.h"
#include "numbers.h"
#include "panels.h"
#include "parallel.h"
#include "plan.h"
#include "vectors.h"

namespace mxfp4::mxfp8 {

// A panel of a weight. Beyond the weight's last row, it repeats that.
class Panel {
 public:
  Panel(const mxfp8_linear& weight, int64_t first, int64_t k) {
    for (int64_t i = 0; i < PANEL_ROWS; i++) {
      const int64_t row = std::min(first + i, weight.n - 1);
      codes_[i] = weight.codes + row * k;
      scales_[i] = weight.scales + row * (k / BLOCK);
    }
  }

  // The values of some blocks, exact or infinite.
  void decode(int64_t block, int64_t count, F32Block* values) const {
#if defined(__AVX2__) || defined(__aarch64__)
    // All blocks of some rows at once: in large powers of two apart, more lines than the first
    // cache keeps.
    for (int row = 0; row < PANEL_ROWS; row += TOGETHER) {
      const int end = row + TOGETHER;
      for (int i = row; i < end; i++)
        for (int64_t at = 0; at < count * BLOCK; at += LINE)
          __builtin_prefetch(codes_[i] + (block + 2 * count) * BLOCK + at, 0, 2);
      for (int64_t b = 0; b < count; b++)
        if (!decode_rows(block + b, row, values[b])) decode_any(block + b, row, end, values[b]);
    }
#else
    for (int64_t b = 0; b < count; b++) decode_any(block + b, 0, PANEL_ROWS, values[b]);
#endif
  }

 private:
  const uint8_t* codes_[PANEL_ROWS];
  const uint8_t* scales_[PANEL_ROWS];

  // Some rows of a block, in any codes and scales.
  void decode_any(int64_t block, int begin, int end, F32Block& values) const {
    for (int row = begin; row < end; row++) {
      uint8_t codes[STEP] = {};
      Vector vectors[Decoder::VECTORS];
      float in_order[STEP];
      std::memcpy(codes, codes_[row] + block * BLOCK, BLOCK);
      Decoder().values(codes, vectors);
      Decoder::store(vectors, in_order);
      const float scale = float_of(scale_bits(scales_[row][block]));
      for (int k = 0; k < BLOCK; k++) values[k][row] = in_order[k] * 0x1p7f * scale;
    }
  }

#if defined(__AVX2__)
  static constexpr int TOGETHER = 8;

  // So many rows of a block. Returns false for NaN codes and for scales above 2^7.
  bool decode_rows(int64_t block, int row, F32Block& values) const {
    uint64_t scales = 0;
    for (int i = 7; i >= 0; i--) scales = scales << 8 | scales_[row + i][block];
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(scales)));
    // The scales times 2^120.
    const __m256 factor =
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(bytes, _mm256_set1_epi32(120)), 23));
    NanCodes nan_codes;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      __m256i fours[4];
      transpose(codes_ + row, block * BLOCK + half * BLOCK / 2, fours);
#pragma GCC unroll 4
      for (int d = 0; d < 4; d++) {
        nan_codes.see(fours[d]);
        __m256 found[4];
        values_of_bytes(fours[d], found);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
          _mm256_storeu_ps(&values[half * BLOCK / 2 + 4 * d + j][row],
                           _mm256_mul_ps(found[j], factor));
      }
    }
    const __m256i is_large = _mm256_cmpgt_epi32(bytes, _mm256_set1_epi32(134));
    return _mm256_testz_si256(is_large, is_large) && !nan_codes.found();
  }

  // Four dwords of each of eight rows -> of each dword those of all rows.
  static void transpose(const uint8_t* const* rows, int64_t at, __m256i (&out)[4]) {
    const auto half = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + at));
    };
    __m256i in[4];
    for (int i = 0; i < 4; i++)
      in[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(half(i)), half(i + 4), 1);
    const __m256i a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpacklo_epi32(in[2], in[3]);
    const __m256i c = _mm256_unpackhi_epi32(in[0], in[1]), d = _mm256_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm256_unpacklo_epi64(a, b);
    out[1] = _mm256_unpackhi_epi64(a, b);
    out[2] = _mm256_unpacklo_epi64(c, d);
    out[3] = _mm256_unpackhi_epi64(c, d);
  }
#elif defined(__aarch64__)
  static constexpr int TOGETHER = 4;

  // So many rows of a block. Returns false for NaN codes and for scales above 2^119.
  bool decode_rows(int64_t block, int row, F32Block& values) const {
    uint8_t scales[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) scales[i] = scales_[row + i][block];
    const uint32x4_t bytes = four_bytes(scales);
    // The scales times 2^8.
    const auto factor = vreinterpretq_f32_u32(vshlq_n_u32(vaddq_u32(bytes, vdupq_n_u32(8)), 23));
    NanCodes nan_codes;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      uint8x16_t fours[4];
      transpose(codes_ + row, block * BLOCK + half * BLOCK / 2, fours);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        nan_codes.see(fours[i]);
        const Halves found = halves_of_e4m3(fours[i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
          vst1q_f32(&values[half * BLOCK / 2 + 4 * i + j][row], vmulq_f32(found.four(j), factor));
      }
    }
    return vmaxvq_u32(bytes) <= 246 && !nan_codes.found();
  }

  // 16 bytes of each of four rows -> the first bytes of all rows, and so on.
  static void transpose(const uint8_t* const* rows, int64_t at, uint8x16_t (&out)[4]) {
    uint8x16_t in[4];
    for (int i = 0; i < 4; i++) in[i] = vld1q_u8(rows[i] + at);
    const uint8x16_t even[2] = {vzip1q_u8(in[0], in[2]), vzip2q_u8(in[0], in[2])};
    const uint8x16_t odd[2] = {vzip1q_u8(in[1], in[3]), vzip2q_u8(in[1], in[3])};
    for (int i = 0; i < 2; i++) {
      out[2 * i] = vzip1q_u8(even[i], odd[i]);
      out[2 * i + 1] = vzip2q_u8(even[i], odd[i]);
    }
  }
#endif
};

class ManyRows {
 public:
  // Rows [first, first + arguments.rows) of y are those of x.
  ManyRows(const mxfp4_linear_group& arguments, const void* weights, int64_t first = 0)
      : a_(arguments), weights_(static_cast<const mxfp8_linear*>(weights)), first_(first) {
    heights_ = F32Tile::heights(a_.rows);
    row_bytes_ = F32Tile::packed_bytes(a_.k);
    group_ = std::clamp<int64_t>(GROUP_BYTES / (heights_.most * row_bytes_), 1, heights_.tiles);
    sums_bytes_ = line_up(group_ * heights_.most * PANEL_ROWS * sizeof(float));
    scratch_bytes_ = line_up(sizeof(F32Tile::Scratch)) + std::max(sums_bytes_, line_up(row_bytes_));
  }

  void run() {
    int64_t panels = 0;
    for (int64_t i = 0; i < a_.count; i++) panels += panel_count(weights_[i].n);
    const int64_t products = panels * PANEL_ROWS * a_.k * a_.rows;
    const int threads = static_cast<int>(std::clamp<int64_t>(products / ENOUGH, 1, a_.threads));
    packed_ = allocate(a_.rows * row_bytes_);
    scratch_ = allocate(threads * scratch_bytes_);
    if (!packed_ || !scratch_) throw std::bad_alloc();
    Cursor cursor(panels, threads);
    parallel(threads, [&](int thread, int count) {
      char* memory = scratch_.get() + thread * scratch_bytes_;
      auto* scratch = new (memory) F32Tile::Scratch;
      float* floats = reinterpret_cast<float*>(memory + line_up(sizeof *scratch));
      pack(thread, count, floats);
      barrier(count);
      int64_t begin, end;
      while (cursor.next(begin, end)) {
        int64_t first = 0;  // panel of the weight
        for (int64_t i = 0; i < a_.count; i++) {
          const int64_t next = first + panel_count(weights_[i].n);
          for (int64_t p = std::max(begin, first); p < std::min(end, next); p++)
            multiply(weights_[i], (p - first) * PANEL_ROWS, *scratch, floats);
          first = next;
        }
      }
    });
  }

 private:
  // Packed rows that are multiplied with one panel after the other. They are read in order, so that
  // the third cache is near enough; and a panel is decoded for each group.
  static constexpr int64_t GROUP_BYTES = 2 << 20;
  // Products for which another thread pays.
  static constexpr int64_t ENOUGH = 256 << 10;

  void pack(int thread, int count, float* values) {
    for (int64_t row = a_.rows * thread / count; row < a_.rows * (thread + 1) / count; row++) {
      const int64_t tile = heights_.tile_of(row), first = heights_.first(tile);
      to_f32(element(a_.x, a_.dtype, row * a_.x_stride), a_.dtype, a_.k, values);
      F32Tile::pack(values, a_.k, row - first, heights_.rows(tile),
                    packed_.get() + first * row_bytes_);
    }
  }

  // The panel from row n on, times all rows.
  void multiply(const mxfp8_linear& weight, int64_t n, F32Tile::Scratch& scratch,
                float* sums) const {
    const Panel panel(weight, n, a_.k);
    const int64_t blocks = a_.k / BLOCK;
    for (int64_t tile = 0; tile < heights_.tiles; tile += group_) {
      const int64_t count = std::min(group_, heights_.tiles - tile), row = heights_.first(tile);
      const Tiles x{packed_.get() + row * row_bytes_, heights_.part(tile, count), blocks};
      std::memset(sums, 0, static_cast<size_t>(sums_bytes_));
      for (int64_t block = 0; block < blocks; block += F32Tile::CHUNK) {
        const int64_t chunk = std::min(F32Tile::CHUNK, blocks - block);
        panel.decode(block, chunk, scratch.weights);
        F32Tile::multiply_tiles(x, block, chunk, scratch.weights, sums);
      }
      store(weight, n, row, x.heights.first(count), sums);
    }
  }

  void store(const mxfp8_linear& weight, int64_t n, int64_t row, int64_t rows, float* sums) const {
    const int64_t columns = std::min(PANEL_ROWS, weight.n - n);
    float bias[PANEL_ROWS] = {};
    if (weight.bias != nullptr) to_f32(element(weight.bias, a_.dtype, n), a_.dtype, columns, bias);
    for (const int64_t last = row + rows; row < last; row++, sums += PANEL_ROWS) {
      for (int64_t i = 0; i < PANEL_ROWS; i++) sums[i] += bias[i];
      from_f32(sums, a_.dtype, columns, element(weight.y, a_.dtype, (first_ + row) * weight.n + n));
    }
  }

  const mxfp4_linear_group& a_;
  const mxfp8_linear* const weights_;
  const int64_t first_;
  Heights heights_;
  int64_t row_bytes_, group_, sums_bytes_, scratch_bytes_;
  Memory packed_, scratch_;
};

}  // namespace mxfp4::mxfp8
