// A self-test of the weights' functions on this machine, as this compiler has built them: bytes
// that panels.h defines, and conversions of values that MXFP4 and MXFP8 have.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "panels.h"
#include "parallel.h"

namespace mxfp4 {

// Cold functions are optimized for size, which takes the compiler a fraction of the time.
class WeightsTest {
 public:
  __attribute__((cold)) bool passes() {
    const DefaultArithmetic arithmetic;
    for (auto& byte : blocks_) byte = static_cast<uint8_t>(random());
    for (int64_t block = 0; block < N * GROUPS; block++) {
      blocks_[block * BLOCK / 2] |= 7;  // the largest value decides the scale of a block of values
      scales_[block] = static_cast<uint8_t>(120 + random() % 16);
    }
    scales_[0] = SCALE_MIN - 1;  // flags the first panel; its block has subnormal values
    return swizzle_passes() && quantize_passes() && mxfp8_passes();
  }

 private:
  // A panel of all rows and one that has padding; the last pair has one block.
  static constexpr int64_t N = 48, GROUPS = 3, K = GROUPS * BLOCK, PANELS = 2;
  static_assert(panel_count(N) == PANELS && pair_count(K) == 2);

  uint8_t blocks_[N * K / 2], scales_[N * GROUPS];
  alignas(LINE) uint8_t panels_[PANELS * panel_bytes(K)];
  uint8_t flags_[PANELS];
  uint32_t state_ = 1;

  uint32_t random() { return state_ = state_ * 1664525 + 1013904223, state_ >> 8; }

  // Element k of row n.
  int code(int64_t n, int64_t k) const {
    const uint8_t byte = blocks_[(n * K + k) / 2];
    return k % 2 ? byte >> 4 : byte & 15;
  }

  // Follows the words of panels.h.
  __attribute__((cold)) bool swizzle_passes() {
    uint8_t expected[sizeof panels_] = {};
    for (int64_t at = 0; at < PANELS * pair_count(K); at++)
      std::memset(expected + at * PAIR_BYTES, SCALE_PADDING, SCALE_BYTES);
    for (int64_t n = 0; n < N; n++) {
      uint8_t* panel = expected + n / PANEL_ROWS * panel_bytes(K);
      const int64_t half = n % 2, lane = n % PANEL_ROWS / 2;
      for (int64_t block = 0; block < GROUPS; block++) {
        uint8_t* pair = panel + block / 2 * PAIR_BYTES;
        pair[block % 2 * PANEL_ROWS + half * LANES + lane] = scales_[n * GROUPS + block];
        uint8_t* codes = pair + SCALE_BYTES + block % 2 * CODE_BYTES + half * (CODE_BYTES / 2);
        for (int64_t group = 0; group < 4; group++) {
          for (int64_t j = 0; j < 4; j++) {
            const int64_t k = block * BLOCK + group * 8 + KORDER[j];
            codes[(group * LANES + lane) * 4 + j] =
                static_cast<uint8_t>(code(n, k) | code(n, k + 4) << 4);
          }
        }
      }
    }
    if (mxfp4_swizzle(blocks_, scales_, 1, N, K, 2, 1, panels_, flags_, 1)) return false;
    if (std::memcmp(panels_, expected, sizeof expected) != 0) return false;
    if (flags_[0] != 1 || flags_[1] != 0) return false;
    uint8_t blocks[sizeof blocks_], scales[sizeof scales_];
    if (mxfp4_unswizzle(panels_, 1, N, K, blocks, scales, 1)) return false;
    return std::memcmp(blocks, blocks_, sizeof blocks) == 0 &&
           std::memcmp(scales, scales_, sizeof scales) == 0;
  }

  // The values of the codes, by table 5 of OCP Microscaling v1.0, give the same panels.
  __attribute__((cold)) bool quantize_passes() {
    float values[N * K];
    for (int64_t n = 0; n < N; n++) {
      for (int64_t k = 0; k < K; k++) {
        const int size = code(n, k) & 7;
        const int halves = size < 5 ? size : size == 5 ? 6 : size == 6 ? 8 : 12;
        const float value = static_cast<float>(halves) * (code(n, k) & 8 ? -.5f : .5f);
        values[n * K + k] = std::ldexp(value, scales_[(n * K + k) / BLOCK] - 127);
      }
    }
    alignas(LINE) uint8_t panels[sizeof panels_];
    uint8_t flags[sizeof flags_];
    if (mxfp4_quantize(values, MXFP4_F32, 1, N, K, N * K, 2 * K, K, 1, panels, flags, 1))
      return false;
    return std::memcmp(panels, panels_, sizeof panels) == 0 &&
           std::memcmp(flags, flags_, sizeof flags) == 0;
  }

  // Multiples of 1/8 up to 7/8, three blocks of them in a row, are MXFP8 values.
  __attribute__((cold)) bool mxfp8_passes() {
    constexpr int64_t rows = 11;
    float values[rows * K], again[rows * K];
    uint8_t codes[rows * K], scales[rows * GROUPS];
    for (float& value : values) value = static_cast<float>(random() % 15) / 8 - .875f;
    mxfp8_quantize(values, MXFP4_F32, rows, K, K, codes, scales, 1);
    mxfp8_dequantize(codes, scales, rows, K, MXFP4_F32, again, 1);
    for (int64_t i = 0; i < rows * K; i++)
      if (again[i] != values[i]) return false;
    return true;
  }
};

}  // namespace mxfp4
