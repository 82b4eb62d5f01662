// Programs: a small graph's kernels, one after the other, in one call (ops/program.py).
//
// Between two kernels of a decoded token Python, and torch's dispatch, take longer than what lies
// between them: norms, rotations and sums of a few thousand values. So those are instructions too.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "numbers.h"
#include "parallel.h"

namespace mxfp4 {

// Computes an elementwise instruction, or a mean, on the calling thread: in float32, each result
// rounded to its dtype, as PyTorch does without a compiler.
class Elementwise {
 public:
  explicit Elementwise(const mxfp4_elementwise& given) : given_(given) {}

  void run() const {
    const DefaultArithmetic arithmetic;
    const int64_t* sizes = given_.sizes;
    for (int64_t i = 0; i < sizes[0]; i++)
      for (int64_t j = 0; j < sizes[1]; j++)
        for (int64_t k = 0; k < sizes[2]; k++) row(i, j, k);
  }

 private:
  static constexpr int64_t CHUNK = 512;
  const mxfp4_elementwise& given_;

  void row(int64_t i, int64_t j, int64_t k) const {
    const auto start = [&](const int64_t (&strides)[4]) {
      return i * strides[0] + j * strides[1] + k * strides[2];
    };
    const int64_t a = start(given_.a_strides), b = start(given_.b_strides);
    const int64_t out = start(given_.out_strides), size = given_.sizes[3];
    if (given_.operation == MXFP4_MEAN) return mean(a, out, size);
    float left[CHUNK], right[CHUNK];
    for (int64_t at = 0; at < size; at += CHUNK) {
      const int64_t count = std::min(CHUNK, size - at);
      load(given_.a, given_.a_dtype, a + at * given_.a_strides[3], given_.a_strides[3], count,
           left);
      if (given_.b != nullptr)
        load(given_.b, given_.b_dtype, b + at * given_.b_strides[3], given_.b_strides[3], count,
             right);
      else
        std::fill(right, right + count, given_.scalar);
      compute(left, right, count);
      store(left, out + at * given_.out_strides[3], count);
    }
  }

  void mean(int64_t a, int64_t out, int64_t size) const {
    double sum = 0;
    float values[CHUNK];
    for (int64_t at = 0; at < size; at += CHUNK) {
      const int64_t count = std::min(CHUNK, size - at);
      load(given_.a, given_.a_dtype, a + at * given_.a_strides[3], given_.a_strides[3], count,
           values);
      double sums[8] = {};
      int64_t i = 0;
      for (; i + 8 <= count; i += 8)
        for (int64_t lane = 0; lane < 8; lane++)
          sums[lane] += static_cast<double>(values[i + lane]);
      for (; i < count; i++) sum += static_cast<double>(values[i]);
      for (const double part : sums) sum += part;
    }
    const float result = static_cast<float>(sum / static_cast<double>(size));
    store(&result, out, 1);
  }

  void compute(float* left, const float* right, int64_t count) const {
    switch (given_.operation) {
      case MXFP4_ADD:
        for (int64_t i = 0; i < count; i++) left[i] += right[i];
        break;
      case MXFP4_SUB:
        for (int64_t i = 0; i < count; i++) left[i] -= right[i];
        break;
      case MXFP4_MUL:
        for (int64_t i = 0; i < count; i++) left[i] *= right[i];
        break;
      case MXFP4_RSQRT:
        for (int64_t i = 0; i < count; i++) left[i] = 1.0f / std::sqrt(left[i]);
        break;
      default:  // MXFP4_COPY
        break;
    }
  }

  static void load(const void* values, int32_t dtype, int64_t first, int64_t stride, int64_t count,
                   float* out) {
    if (stride == 1) return to_f32(element(values, dtype, first), dtype, count, out);
    if (stride == 0) {
      to_f32(element(values, dtype, first), dtype, 1, out);
      return std::fill(out + 1, out + count, out[0]);
    }
    for (int64_t i = 0; i < count; i++)
      to_f32(element(values, dtype, first + i * stride), dtype, 1, out + i);
  }

  void store(const float* values, int64_t first, int64_t count) const {
    const int32_t dtype = given_.out_dtype;
    const int64_t stride = given_.out_strides[3];
    if (stride == 1 || count == 1)
      return from_f32(values, dtype, count, element(given_.out, dtype, first));
    for (int64_t i = 0; i < count; i++)
      from_f32(values + i, dtype, 1, element(given_.out, dtype, first + i * stride));
  }
};

class Program {
 public:
  Program(const mxfp4_program& given, const int64_t* slots)
      : given_(given), slots_(slots), code_(reinterpret_cast<char*>(slots[MXFP4_CODE_SLOT])) {}

  int run() {
    link();
    for (int64_t at = slots_[MXFP4_FIRST_SLOT]; at < slots_[MXFP4_END_SLOT];) {
      const auto* header = reinterpret_cast<const mxfp4_instruction*>(code_ + at);
      if (const int status = execute(header->kind, code_ + at + sizeof *header)) return status;
      at += header->bytes;
    }
    return 0;
  }

 private:
  const mxfp4_program& given_;
  const int64_t* slots_;
  char* code_;  // this call's own copy, in which instructions get their pointers

  void link() {
    std::memcpy(code_, given_.code, static_cast<size_t>(given_.code_bytes));
    for (int64_t i = 0; i < given_.links; i++) {
      const mxfp4_link& link = given_.link[i];
      const int64_t value = slots_[link.slot] + link.offset;
      std::memcpy(code_ + link.position, &value, sizeof value);
    }
  }

  int execute(int32_t kind, char* arguments) const {
    const auto threads = static_cast<int32_t>(slots_[MXFP4_THREADS_SLOT]);
    const auto given = [&](auto* operands) {
      operands->threads = threads;
      return operands;
    };
    switch (kind) {
      case MXFP4_MATMUL_OGS:
        return mxfp4_matmul_ogs(given(reinterpret_cast<mxfp4_matmul*>(arguments)));
      case MXFP4_ROUTING:
        return mxfp4_routing(given(reinterpret_cast<mxfp4_router*>(arguments)));
      case MXFP4_ATTENTION:
        return mxfp4_attention_with_sinks(given(reinterpret_cast<mxfp4_attention*>(arguments)));
      case MXFP4_LINEARS:
        mxfp4_linears(given(reinterpret_cast<mxfp4_linear_group*>(arguments)));
        return 0;
      case MXFP8_LINEARS:
        return mxfp8_linears(given(reinterpret_cast<mxfp4_linear_group*>(arguments)));
      default:
        Elementwise(*reinterpret_cast<const mxfp4_elementwise*>(arguments)).run();
        return 0;
    }
  }
};

}  // namespace mxfp4
