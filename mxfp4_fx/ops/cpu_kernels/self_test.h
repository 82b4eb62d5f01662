// A self-test of the kernels on this machine, as this compiler has built them. It computes a small
// problem whose sums are exact in float32 in any order, so every bit of the result is known. The
// weights' functions, whose panels it takes, have passed weights_test.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "api.h"
#include "numbers.h"
#include "panels.h"

namespace mxfp4 {

// Cold functions are optimized for size, which takes the compiler a fraction of the time.
class SelfTest {
 public:
  // Tests few rows and several tiles, in every dtype. All scales are 1.
  __attribute__((cold)) bool passes() {
    for (auto& byte : blocks_) byte = static_cast<uint8_t>(random());
    mxfp4_swizzle(blocks_.data(), scales_.data(), 1, N, K, 2, 1, panels_.data(), flags_.data(), 1);
    for (const int32_t dtype : {MXFP4_F32, MXFP4_BF16, MXFP4_F16}) {
      for (const int64_t rows : {1, 5, 41})
        if (!passes(dtype, rows)) return false;
      if (!linears_pass(dtype) || !mxfp8_passes(dtype)) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t N = 64, K = 96;

  std::vector<uint8_t> blocks_ = std::vector<uint8_t>(N * K / 2);
  std::vector<uint8_t> scales_ = std::vector<uint8_t>(N * K / BLOCK, 127);
  std::vector<uint8_t> panels_ = std::vector<uint8_t>(panel_count(N) * panel_bytes(K));
  std::vector<uint8_t> flags_ = std::vector<uint8_t>(panel_count(N));
  uint32_t state_ = 1;

  uint32_t random() { return state_ = state_ * 1664525 + 1013904223, state_ >> 8; }

  // A random number below 1 with all of the dtype's significant bits, or 15 for float32. Products
  // are then multiples of 2^-16, and the magnitudes of a sum's products add up to less than 2^8.
  __attribute__((cold)) float activation(int32_t dtype) {
    const int bits = dtype == MXFP4_BF16 ? 8 : dtype == MXFP4_F16 ? 11 : 15;
    const auto size = static_cast<float>(random() % (1 << bits));
    return std::ldexp(random() & 1 ? size : -size, -bits);
  }

  // Follows table 5 of OCP Microscaling v1.0 and not the kernels' table, which it tests.
  __attribute__((cold)) float weight(int64_t n, int64_t k) const {
    const uint8_t byte = blocks_[static_cast<size_t>((n * K + k) / 2)];
    const int code = k % 2 ? byte >> 4 : byte & 15, size = code & 7;
    const int halves = size < 5 ? size : size == 5 ? 6 : size == 6 ? 8 : 12;
    return static_cast<float>(halves) * (code & 8 ? -.5f : .5f);
  }

  __attribute__((cold)) bool passes(int32_t dtype, int64_t rows) {
    std::vector<float> values(static_cast<size_t>(rows * K)), sums;
    for (float& value : values) value = activation(dtype);
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t n = 0; n < N; n++) {
        float sum = 0;
        for (int64_t k = 0; k < K; k++)
          sum += values[static_cast<size_t>(row * K + k)] * weight(n, k);
        sums.push_back(sum);
      }
    }
    const auto bytes = [&](size_t count) {
      return count * static_cast<size_t>(dtype_bytes(dtype));
    };
    std::vector<char> x(bytes(values.size())), y(bytes(sums.size())), expected(y.size());
    from_f32(values.data(), dtype, static_cast<int64_t>(values.size()), x.data());
    from_f32(sums.data(), dtype, static_cast<int64_t>(sums.size()), expected.data());

    const std::vector<float> bias(N);
    const int32_t offsets[2] = {0, static_cast<int32_t>(rows)};
    mxfp4_matmul m{};
    m.x = x.data();
    m.panels = panels_.data();
    m.flags = flags_.data();
    m.bias = bias.data();
    m.expert_offsets = offsets;
    m.y = y.data();
    m.x_rows = m.rows = rows;
    m.x_stride = m.k = K;
    m.n = N;
    m.experts = m.experts_per_token = m.threads = 1;
    m.x_dtype = dtype;
    m.bias_dtype = MXFP4_F32;
    return mxfp4_matmul_ogs(&m) == 0 && y == expected;
  }

  // One linear of 1 to 5 rows, with a remainder of rows and of columns. Weights are multiples of
  // 1/8 below 1, so that products are multiples of 2^-18, and their sums below 2^6.
  __attribute__((cold)) bool linears_pass(int32_t dtype) {
    constexpr int64_t rows_of_weight = 11, columns = 50, most = 5;
    std::vector<float> values(most * columns), weights(rows_of_weight * columns);
    for (float& value : values) value = activation(dtype);
    for (float& weight : weights) weight = static_cast<float>(random() % 15) / 8 - .875f;
    const auto in_dtype = [&](const std::vector<float>& numbers) {
      std::vector<char> bytes(numbers.size() * static_cast<size_t>(dtype_bytes(dtype)));
      from_f32(numbers.data(), dtype, static_cast<int64_t>(numbers.size()), bytes.data());
      return bytes;
    };
    const std::vector<char> x = in_dtype(values), weight = in_dtype(weights);
    for (int64_t rows = 1; rows <= most; rows++) {
      std::vector<float> sums;
      for (int64_t row = 0; row < rows; row++) {
        for (int64_t n = 0; n < rows_of_weight; n++) {
          float sum = 0;
          for (int64_t k = 0; k < columns; k++)
            sum += values[static_cast<size_t>(row * columns + k)] *
                   weights[static_cast<size_t>(n * columns + k)];
          sums.push_back(sum);
        }
      }
      const std::vector<char> expected = in_dtype(sums);
      std::vector<char> y(expected.size());
      struct {
        mxfp4_linear_group group;
        mxfp4_linear linear;
      } const arguments{{x.data(), rows, columns, columns, 1, dtype, 1},
                        {weight.data(), nullptr, y.data(), rows_of_weight, columns}};
      mxfp4_linears(&arguments.group);
      if (y != expected) return false;
    }
    return true;
  }

  // The same with weights in MXFP8, three blocks of them, which are multiples of 1/8 up to 7/8:
  // weights_test.h has tested that these keep their values.
  __attribute__((cold)) bool mxfp8_passes(int32_t dtype) {
    constexpr int64_t rows_of_weight = 11, columns = 96, few = 5, most = 17;
    std::vector<float> values(most * columns), weights(rows_of_weight * columns);
    for (float& value : values) value = activation(dtype);
    for (float& weight : weights) weight = static_cast<float>(random() % 15) / 8 - .875f;
    std::vector<uint8_t> codes(weights.size()), scales(weights.size() / 32);
    mxfp8_quantize(weights.data(), MXFP4_F32, rows_of_weight, columns, columns, codes.data(),
                   scales.data(), 1);
    std::vector<float> sums;
    for (int64_t row = 0; row < most; row++) {
      for (int64_t n = 0; n < rows_of_weight; n++) {
        float sum = 0;
        for (int64_t k = 0; k < columns; k++)
          sum += values[static_cast<size_t>(row * columns + k)] *
                 weights[static_cast<size_t>(n * columns + k)];
        sums.push_back(sum);
      }
    }
    std::vector<char> x(values.size() * static_cast<size_t>(dtype_bytes(dtype)));
    std::vector<char> expected(sums.size() * static_cast<size_t>(dtype_bytes(dtype)));
    from_f32(values.data(), dtype, most * columns, x.data());
    from_f32(sums.data(), dtype, most * rows_of_weight, expected.data());
    for (const int64_t rows : {int64_t{1}, int64_t{2}, few, most}) {
      std::vector<char> y(expected.size() / most * static_cast<size_t>(rows));
      struct {
        mxfp4_linear_group group;
        mxfp8_linear linear;
      } const arguments{{x.data(), rows, columns, columns, 1, dtype, 1},
                        {codes.data(), scales.data(), nullptr, y.data(), rows_of_weight}};
      if (mxfp8_linears(&arguments.group) != 0) return false;
      if (!std::equal(y.begin(), y.end(), expected.begin())) return false;
    }
    return true;
  }
};

}  // namespace mxfp4
