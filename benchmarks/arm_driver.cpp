// A product of weights, twice, for benchmarks.arm to count the instructions of the second.
// Arguments: the weights (experts, linear or mxfp8), the dtype (api.h), rows of activations.
#include "experts.cpp"
#include "linears.cpp"
#include "linears_mxfp8.cpp"
#include "weights.cpp"

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

// What is counted is between the calls of these two, whose names the emulator writes.
extern "C" __attribute__((noinline)) void counting_begins() { asm volatile(""); }
extern "C" __attribute__((noinline)) void counting_ends() { asm volatile(""); }

namespace {

// Returns whether a product, which returns an error's number or 0, was computed twice.
template <class Product>
bool twice(Product product) {
  if (product()) return false;
  counting_begins();
  const int error = product();
  counting_ends();
  return !error;
}

constexpr int64_t N = 4096, K = 256;

// Everything that a product takes, made of random numbers.
struct Problem {
  int32_t dtype;
  int64_t rows;
  std::vector<char> x, y;

  Problem(int32_t dtype, int64_t rows)
      : dtype(dtype), rows(rows), x(random(rows * K)), y(bytes(rows * N)) {}

  size_t bytes(int64_t count) const {
    return static_cast<size_t>(count * mxfp4::dtype_bytes(dtype));
  }

  std::vector<char> random(int64_t count) const {
    static std::mt19937 generator(1);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = std::normal_distribution<float>()(generator);
    std::vector<char> result(bytes(count));
    mxfp4::from_f32(values.data(), dtype, count, result.data());
    return result;
  }

  mxfp4_linear_group group() const { return {x.data(), rows, K, K, 1, dtype, 1}; }

  bool experts() {
    const std::vector<uint8_t> blocks(N * K / 2, 0x35), scales(N * K / 32, 127);
    std::vector<uint8_t> panels(static_cast<size_t>(mxfp4::panel_count(N) * mxfp4::panel_bytes(K)));
    std::vector<uint8_t> flags(static_cast<size_t>(mxfp4::panel_count(N)));
    mxfp4_swizzle(blocks.data(), scales.data(), 1, N, K, 2, 1, panels.data(), flags.data(), 1);
    const int32_t offsets[2] = {0, static_cast<int32_t>(rows)};
    mxfp4_matmul m{};
    m.x = x.data(), m.panels = panels.data(), m.flags = flags.data(), m.expert_offsets = offsets;
    m.y = y.data(), m.x_rows = m.rows = rows, m.x_stride = m.k = K, m.n = N;
    m.experts = m.experts_per_token = m.threads = 1, m.x_dtype = m.bias_dtype = dtype;
    return twice([&] { return mxfp4_matmul_ogs(&m); });
  }

  bool linear() {
    const std::vector<char> weight(bytes(N * K));
    const struct {
      mxfp4_linear_group group;
      mxfp4_linear linear;
    } a{group(), {weight.data(), nullptr, y.data(), N, K}};
    return twice([&] { return mxfp4_linears(&a.group), 0; });
  }

  bool mxfp8() {
    const std::vector<uint8_t> codes(N * K, 0x35), scales(N * K / 32, 127);
    const struct {
      mxfp4_linear_group group;
      mxfp8_linear linear;
    } a{group(), {codes.data(), scales.data(), nullptr, y.data(), N}};
    return twice([&] { return mxfp8_linears(&a.group); });
  }
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const std::string weights = arguments[1];
  Problem problem(std::atoi(arguments[2]), std::atoi(arguments[3]));
  if (weights == "experts") return problem.experts() ? 0 : 1;
  if (weights == "linear") return problem.linear() ? 0 : 1;
  return weights == "mxfp8" && problem.mxfp8() ? 0 : 2;
}
