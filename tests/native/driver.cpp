// Runs the kernels of ops/cpu_kernels over many small problems and holds them against plain loops
// in double. tests/test_sanitizers.py builds it with AddressSanitizer and
// UndefinedBehaviorSanitizer: every buffer here has exactly the size that its tensor has, so that a
// byte too far is an error.
#include "attention.cpp"
#include "experts.cpp"
#include "kernels.cpp"
#include "linears.cpp"
#include "linears_mxfp8.cpp"
#include "program.cpp"
#include "routing.cpp"
#include "weights.cpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

namespace {

std::mt19937_64 generator(1);

int64_t random_int(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Values of a dtype, with what they mean in double.
struct Values {
  int32_t dtype;
  std::vector<char> bytes;
  std::vector<double> numbers;

  Values(int32_t dtype, int64_t count, double size)
      : dtype(dtype), bytes(static_cast<size_t>(count * mxfp4::dtype_bytes(dtype))) {
    std::normal_distribution<float> normal(0.f, static_cast<float>(size));
    for (int64_t i = 0; i < count; i++) {
      float value = normal(generator);
      mxfp4::from_f32(&value, dtype, 1, mxfp4::element(bytes.data(), dtype, i));
      mxfp4::to_f32(mxfp4::element(bytes.data(), dtype, i), dtype, 1, &value);
      numbers.push_back(value);
    }
  }
};

// MXFP4 weights [E, N, K] in checkpoint order, in the layout of the kernels, and in double.
struct Weights {
  std::vector<uint8_t> blocks, scales, panels, flags;
  std::vector<double> numbers;

  Weights(int64_t experts, int64_t n, int64_t k, bool all_scales)
      : blocks(static_cast<size_t>(experts * n * k / 2)),
        scales(static_cast<size_t>(experts * n * k / 32)),
        panels(static_cast<size_t>(experts * mxfp4::panel_count(n) * mxfp4::panel_bytes(k))),
        flags(static_cast<size_t>(experts * mxfp4::panel_count(n))) {
    for (auto& byte : blocks) byte = static_cast<uint8_t>(random_int(0, 255));
    for (auto& byte : scales)
      byte = static_cast<uint8_t>(all_scales ? random_int(0, 255) : random_int(119, 124));
    for (size_t i = 0; i < 2 * blocks.size(); i++) {
      const int code = i % 2 ? blocks[i / 2] >> 4 : blocks[i / 2] & 15;
      const uint8_t scale = scales[i / 32];
      numbers.push_back(scale == 255
                            ? NAN
                            : static_cast<double>(mxfp4::E2M1[code]) * std::ldexp(1., scale - 127));
    }
    const int threads = static_cast<int>(random_int(1, 3));
    require(mxfp4_swizzle(blocks.data(), scales.data(), experts, n, k, 2, 1, panels.data(),
                          flags.data(), threads) == 0,
            "swizzle");
    std::vector<uint8_t> back(blocks.size()), back_scales(scales.size());
    require(mxfp4_unswizzle(panels.data(), experts, n, k, back.data(), back_scales.data(),
                            threads) == 0,
            "unswizzle");
    require(back == blocks && back_scales == scales, "unswizzle undoes swizzle");
    if (n % 2) return;
    // The same rows with all gates before all ups.
    for (int64_t row = 0; row < experts * n; row++) {
      const int64_t at = row / n * n + row % n / 2 + row % 2 * (n / 2);
      std::copy_n(&blocks[row * k / 2], k / 2, &back[at * k / 2]);
      std::copy_n(&scales[row * k / 32], k / 32, &back_scales[at * k / 32]);
    }
    std::vector<uint8_t> again(panels.size()), again_flags(flags.size());
    require(mxfp4_swizzle(back.data(), back_scales.data(), experts, n, k, 1, n / 2, again.data(),
                          again_flags.data(), threads) == 0,
            "swizzle pairs");
    require(again == panels && again_flags == flags, "pairs make the same panels");
  }
};

// Routes of [T, A] by plain loops.
struct Routes {
  std::vector<float> gammas;
  std::vector<int32_t> gather, scatter, offsets;

  Routes(int64_t rows, int64_t experts)
      : gammas(static_cast<size_t>(rows)),
        gather(gammas.size()),
        scatter(gammas.size()),
        offsets(static_cast<size_t>(experts + 1)) {}
};

Routes random_routes(int64_t tokens, int64_t experts, int64_t per_token) {
  Routes routes(tokens * per_token, experts);
  const int32_t dtype = static_cast<int32_t>(random_int(0, 2));
  const int threads = static_cast<int>(random_int(1, 3));
  if (random_int(0, 1)) {
    const int64_t stride = experts + random_int(0, 3);
    const Values logits(dtype, std::max<int64_t>(0, (tokens - 1) * stride + experts), 1.);
    // Half of the calls hold all experts, the others as many of a range that begins elsewhere.
    const int64_t first = random_int(0, 1) ? 0 : random_int(-1, experts);
    const mxfp4_router router{logits.bytes.data(),
                              routes.gammas.data(),
                              routes.gather.data(),
                              routes.scatter.data(),
                              routes.offsets.data(),
                              tokens,
                              stride,
                              experts,
                              per_token,
                              experts,
                              first,
                              dtype,
                              threads};
    require(mxfp4_routing(&router) == 0, "routing");
    require(first || routes.offsets.back() == tokens * per_token, "every row has an expert");
  } else {
    std::vector<int64_t> ids(static_cast<size_t>(tokens * per_token));
    for (auto& id : ids) id = random_int(-1, experts);  // some are somebody else's
    const Values weights(dtype, tokens * per_token, 1.);
    require(mxfp4_routing_routes(ids.data(), MXFP4_I64, weights.bytes.data(), dtype, tokens,
                                 per_token, experts, 0, routes.gammas.data(), routes.gather.data(),
                                 routes.scatter.data(), routes.offsets.data(), threads) == 0,
            "routing of given routes");
  }
  std::vector<int32_t> sorted = routes.scatter;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 0; i < sorted.size(); i++)
    require(sorted[i] == static_cast<int32_t>(i), "the slots are a permutation");
  return routes;
}

void check_matmul() {
  const int64_t experts = random_int(1, 5), per_token = random_int(1, experts);
  const int64_t tokens = random_int(0, 3) ? random_int(0, 9) : random_int(30, 90);
  const int64_t panels = random_int(0, 7) ? 1 : 5;  // times so many columns
  const int64_t n = panels * (random_int(0, 1) ? random_int(1, 40) * 2 : random_int(1, 80));
  const int64_t k = 32 * random_int(1, 7);
  const bool gather = random_int(0, 1), scatter = random_int(0, 1), gammas = random_int(0, 1);
  const bool gated = n % 2 == 0 && random_int(0, 1), all_scales = random_int(0, 3) == 0;
  const bool relu2 = !gated && random_int(0, 3) == 0;
  const int32_t dtype = static_cast<int32_t>(random_int(0, 2));
  const int64_t rows = tokens * per_token, x_rows = gather ? tokens : rows;
  const int64_t columns = gated ? n / 2 : n;

  const Weights weights(experts, n, k, all_scales);
  const Routes routes = random_routes(tokens, experts, per_token);
  const int64_t stride = k + random_int(0, 3);
  // Some units of bfloat16 make zeros of such numbers, which float32 has.
  const bool tiny = random_int(0, 3) == 0;
  const Values x(dtype, std::max<int64_t>(0, (x_rows - 1) * stride + k), tiny ? 0x1p-125 : 1.);
  const Values bias(dtype, experts * n, 1.);
  const bool biased = !tiny && random_int(0, 3) > 0;
  const int64_t y_rows = scatter ? tokens : rows;
  std::vector<char> y(static_cast<size_t>(y_rows * columns * mxfp4::dtype_bytes(dtype)));

  mxfp4_matmul m{};
  m.x = x.bytes.data();
  m.panels = weights.panels.data();
  m.flags = weights.flags.data();
  m.bias = biased ? bias.bytes.data() : nullptr;
  m.expert_offsets = routes.offsets.data();
  m.gather_index = gather ? routes.gather.data() : nullptr;
  m.scatter_index = scatter ? routes.scatter.data() : nullptr;
  m.gammas = gammas ? routes.gammas.data() : nullptr;
  m.y = y.data();
  m.x_rows = x_rows;
  m.x_stride = stride;
  m.rows = rows;
  m.experts = experts;
  m.n = n;
  m.k = k;
  m.experts_per_token = per_token;
  m.x_dtype = m.bias_dtype = dtype;
  m.activation = relu2 ? MXFP4_RELU2 : MXFP4_NONE;
  if (gated) m.activation = random_int(0, 1) ? MXFP4_SWIGLU : MXFP4_GEGLU_TANH;
  m.alpha = 1.702f;
  m.limit = 7.f;
  m.up_offset = static_cast<float>(random_int(0, 1));
  m.threads = 1;
  require(mxfp4_matmul_ogs(&m) == 0, "matmul_ogs");
  std::vector<char> again = y;
  m.threads = static_cast<int32_t>(random_int(2, 4));
  require(mxfp4_matmul_ogs(&m) == 0, "matmul_ogs with threads");
  require(again == y, "any number of threads gives the same bits");
  if (all_scales || m.activation) return;  // the Python tests hold these against the oracle

  // Values, and by how much float32 may miss them: a term meets a product, K + A additions and a
  // gamma, each of which is off by 2^-24 of it at most. Twice that is more than enough.
  std::vector<double> expected(static_cast<size_t>(y_rows * columns)), sizes(expected.size());
  for (int64_t e = 0; e < experts; e++) {
    for (int64_t row = routes.offsets[e]; row < routes.offsets[e + 1]; row++) {
      const double gamma = gammas ? routes.gammas[row] : 1;
      const int64_t to = scatter ? routes.scatter[row] / per_token : row;
      for (int64_t i = 0; i < n; i++) {
        double sum = biased ? bias.numbers[e * n + i] : 0, size = std::fabs(sum);
        for (int64_t j = 0; j < k; j++) {
          const double term = weights.numbers[(e * n + i) * k + j] *
                              x.numbers[(gather ? routes.gather[row] : row) * stride + j];
          sum += term;
          size += std::fabs(term);
        }
        expected[to * n + i] += sum * gamma;
        sizes[to * n + i] += size * std::fabs(gamma);
      }
    }
  }
  const double result = dtype == MXFP4_BF16 ? 0x1p-8 : dtype == MXFP4_F16 ? 0x1p-11 : 0x1p-24;
  for (size_t i = 0; i < expected.size(); i++) {
    float value;
    mxfp4::to_f32(mxfp4::element(y.data(), dtype, static_cast<int64_t>(i)), dtype, 1, &value);
    // Subnormal sums are multiples of 2^-149, and subnormal results of 2^-133 or 2^-24.
    const double terms = static_cast<double>(k + per_token + 2);
    const double bound = terms * (0x1p-23 * sizes[i] + 0x1p-149);
    const double least = dtype == MXFP4_BF16 ? 0x1p-134 : dtype == MXFP4_F16 ? 0x1p-25 : 0x1p-150;
    const double rounding = std::max(result * (std::fabs(expected[i]) + bound), least);
    require(std::fabs(value - expected[i]) <= bound + rounding, "a value");
  }
}

// Many values at once have the bits that each has alone: ties, NaNs, infinities, subnormals.
void check_conversions() {
  std::vector<float> values;
  for (uint32_t upper = 0; upper < 0x10000; upper += 37)
    for (const uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      values.push_back(mxfp4::float_of(upper << 16 | lower));
  const auto count = static_cast<int64_t>(values.size());
  std::vector<uint16_t> together(values.size());
  mxfp4::from_f32(values.data(), MXFP4_BF16, count, together.data());
  std::vector<float> back(values.size());
  mxfp4::to_f32(together.data(), MXFP4_BF16, count, back.data());
  for (size_t i = 0; i < values.size(); i++) {
    require(together[i] == mxfp4::f32_to_bf16(values[i]), "to bfloat16");
    require(mxfp4::bits_of(back[i]) == uint32_t{together[i]} << 16, "from bfloat16");
  }
}

// Rows whose results are those of small values beside a large one, which meets zeros. Sums are
// exact on every path. With a step of 2^-21 or 2^-30 the values are those of the lower limbs
// (row_block.h), with 2^-36 the block is multiplied in float32. float16 has the first step only.
void check_small_values(float step, float large = 1) {
  const int64_t n = 40, k = 64, most = 7;
  std::vector<uint8_t> blocks(n * k / 2), scales(n * k / 32, 137);
  std::vector<uint8_t> panels(mxfp4::panel_count(n) * mxfp4::panel_bytes(k));
  std::vector<uint8_t> flags(mxfp4::panel_count(n));
  for (size_t i = 0; i < blocks.size(); i++)
    blocks[i] = static_cast<uint8_t>(random_int(0, 255) & (i % 16 ? 0xff : 0xf0));
  mxfp4_swizzle(blocks.data(), scales.data(), 1, n, k, 2, 1, panels.data(), flags.data(), 1);
  std::vector<float> values(most * k), sums(most * n);
  for (size_t i = 0; i < values.size(); i++)
    values[i] = i % 32 ? static_cast<float>(random_int(-127, 127)) * step : large;
  for (int64_t i = 0; i < most * n; i++) {
    for (int64_t j = 0; j < k; j++) {
      const uint8_t byte = blocks[(i % n * k + j) / 2];
      sums[i] += values[i / n * k + j] * mxfp4::E2M1[j % 2 ? byte >> 4 : byte & 15] * 1024;
    }
  }
  for (const int32_t dtype : {MXFP4_F32, MXFP4_BF16, MXFP4_F16}) {
    if (dtype == MXFP4_F16 && step < 0x1p-24f) continue;
    const auto in_dtype = [&](const std::vector<float>& from, int64_t count) {
      std::vector<char> bytes(static_cast<size_t>(count * mxfp4::dtype_bytes(dtype)));
      mxfp4::from_f32(from.data(), dtype, count, bytes.data());
      return bytes;
    };
    for (int64_t rows = 1; rows <= most; rows++) {
      const std::vector<char> x = in_dtype(values, rows * k), expected = in_dtype(sums, rows * n);
      std::vector<char> y(expected.size());
      const int32_t offsets[2] = {0, static_cast<int32_t>(rows)};
      mxfp4_matmul m{};
      m.x = x.data(), m.panels = panels.data(), m.flags = flags.data(), m.y = y.data();
      m.expert_offsets = offsets, m.x_rows = m.rows = rows, m.x_stride = m.k = k, m.n = n;
      m.experts = m.experts_per_token = m.threads = 1, m.x_dtype = m.bias_dtype = dtype;
      require(mxfp4_matmul_ogs(&m) == 0 && y == expected, "a sum of small values");
    }
  }
}

void check_linears() {
  const int32_t dtype = static_cast<int32_t>(random_int(0, 2));
  const int64_t rows = random_int(1, 9), k = random_int(1, 150), x_stride = k + random_int(0, 3);
  const Values x(dtype, (rows - 1) * x_stride + k, 1.);
  struct {
    mxfp4_linear_group group;
    mxfp4_linear linears[3];
  } a{{x.bytes.data(), rows, x_stride, k, random_int(1, 3), dtype, 1}, {}};
  std::vector<Values> weights, biases;
  std::vector<std::vector<char>> results;
  for (int64_t i = 0; i < a.group.count; i++) {
    const int64_t n = random_int(1, 60), stride = k + random_int(0, 3);
    weights.emplace_back(dtype, (n - 1) * stride + k, 1.);
    biases.emplace_back(dtype, n, 1.);
    results.emplace_back(static_cast<size_t>(rows * n * mxfp4::dtype_bytes(dtype)));
    a.linears[i] = {nullptr, nullptr, nullptr, n, stride};
  }
  for (int64_t i = 0; i < a.group.count; i++) {
    a.linears[i].weight = weights[i].bytes.data();
    a.linears[i].bias = random_int(0, 1) ? biases[i].bytes.data() : nullptr;
    a.linears[i].y = results[i].data();
  }
  mxfp4_linears(&a.group);
  const double u = dtype == MXFP4_BF16 ? 0x1p-8 : dtype == MXFP4_F16 ? 0x1p-11 : 0x1p-24;
  for (int64_t i = 0; i < a.group.count; i++) {
    const mxfp4_linear& linear = a.linears[i];
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t n = 0; n < linear.n; n++) {
        double sum = linear.bias ? biases[i].numbers[n] : 0, size = std::fabs(sum);
        for (int64_t j = 0; j < k; j++) {
          const double term =
              weights[i].numbers[n * linear.stride + j] * x.numbers[row * x_stride + j];
          sum += term;
          size += std::fabs(term);
        }
        float value;
        mxfp4::to_f32(mxfp4::element(linear.y, dtype, row * linear.n + n), dtype, 1, &value);
        const double bound = static_cast<double>(k + 1) * 0x1p-23 * size;
        const double rounding = std::max(u * (std::fabs(sum) + bound), 0x1p-25);  // of subnormals
        require(std::fabs(value - sum) <= bound + rounding, "a linear");
      }
    }
  }
}

void check_mxfp8() {
  const int32_t dtype = static_cast<int32_t>(random_int(0, 2));
  const int64_t rows = random_int(0, 3) ? random_int(1, 12) : random_int(15, 60);
  const int64_t n = random_int(1, 60), k = 32 * random_int(1, 20);
  const int64_t x_stride = k + random_int(0, 3), stride = k + random_int(0, 3);
  const bool tiny = random_int(0, 3) == 0;
  const Values x(dtype, (rows - 1) * x_stride + k, tiny ? 0x1p-125 : 1.),
      weight(dtype, (n - 1) * stride + k, 1.);
  std::vector<uint8_t> codes(static_cast<size_t>(n * k)), scales(codes.size() / 32);
  mxfp8_quantize(weight.bytes.data(), dtype, n, k, stride, codes.data(), scales.data(), 1);
  std::vector<float> values(codes.size());
  mxfp8_dequantize(codes.data(), scales.data(), n, k, MXFP4_F32, values.data(), 1);
  for (int64_t i = 0; i < n * k; i++) {
    const double exact = weight.numbers[i / k * stride + i % k];
    const double step = std::ldexp(1., scales[i / 32] - 127 - 10);
    require(std::fabs(values[i] - exact) <= std::max(std::fabs(exact) / 16, step),
            "an MXFP8 value");
  }
  std::vector<char> in_dtype(codes.size() * static_cast<size_t>(mxfp4::dtype_bytes(dtype)));
  mxfp8_dequantize(codes.data(), scales.data(), n, k, dtype, in_dtype.data(), 1);
  std::vector<char> rounded(in_dtype.size());
  mxfp4::from_f32(values.data(), dtype, n * k, rounded.data());
  require(in_dtype == rounded, "MXFP8 values in another dtype");
  std::vector<char> y(static_cast<size_t>(rows * n * mxfp4::dtype_bytes(dtype)));
  struct {
    mxfp4_linear_group group;
    mxfp8_linear linear;
  } a{{x.bytes.data(), rows, x_stride, k, 1, dtype, 1},
      {codes.data(), scales.data(), nullptr, y.data(), n}};
  require(mxfp8_linears(&a.group) == 0, "a linear in MXFP8 returns 0");
  const std::vector<char> by_one_thread = y;
  a.group.threads = static_cast<int32_t>(random_int(2, 4));
  require(mxfp8_linears(&a.group) == 0, "a linear in MXFP8 with threads returns 0");
  require(by_one_thread == y, "any number of threads gives the same bits");
  const double u = dtype == MXFP4_BF16 ? 0x1p-8 : dtype == MXFP4_F16 ? 0x1p-11 : 0x1p-24;
  for (int64_t i = 0; i < rows * n; i++) {
    double sum = 0, size = 0;
    for (int64_t j = 0; j < k; j++) {
      const double term = x.numbers[i / n * x_stride + j] * values[i % n * k + j];
      sum += term;
      size += std::fabs(term);
    }
    float value;
    mxfp4::to_f32(mxfp4::element(y.data(), dtype, i), dtype, 1, &value);
    // Subnormal sums are multiples of 2^-149.
    const double bound = static_cast<double>(k + 1) * (0x1p-23 * size + 0x1p-149);
    const double least = dtype == MXFP4_BF16 ? 0x1p-134 : dtype == MXFP4_F16 ? 0x1p-25 : 0x1p-150;
    const double rounding = std::max(u * (std::fabs(sum) + bound), least);
    require(std::fabs(value - sum) <= bound + rounding, "a linear in MXFP8");
  }
}

// y of so many rows of x, which are all the same, times rows of one block of MXFP8 weights.
std::vector<float> of_blocks(const std::vector<uint8_t>& codes, const std::vector<uint8_t>& scales,
                             const std::vector<float>& row, int64_t rows) {
  const auto n = static_cast<int64_t>(scales.size());
  std::vector<float> x, y(static_cast<size_t>(rows * n));
  for (int64_t i = 0; i < rows; i++) x.insert(x.end(), row.begin(), row.end());
  struct {
    mxfp4_linear_group group;
    mxfp8_linear linear;
  } const a{{x.data(), rows, 32, 32, 1, MXFP4_F32, 1},
            {codes.data(), scales.data(), nullptr, y.data(), n}};
  require(mxfp8_linears(&a.group) == 0, "a linear of one block returns 0");
  return y;
}

// Every code, 32 in a row of a weight; sums are exact. Two rows have a NaN, or zeros for it: what
// decodes several rows at once leaves all that have one to others.
void check_mxfp8_codes(int64_t rows, bool with_nan) {
  std::vector<uint8_t> codes(256), scales(8, 127);
  std::vector<float> values(256);
  std::iota(codes.begin(), codes.end(), uint8_t{0});
  if (!with_nan) codes[127] = codes[255] = 0;
  mxfp8_dequantize(codes.data(), scales.data(), 8, 32, MXFP4_F32, values.data(), 1);
  float sums[8] = {};
  for (int i = 0; i < 256; i++) {
    const int code = codes[i], exponent = code >> 3 & 15, fraction = code & 7;
    const float size = exponent ? std::ldexp(8.f + fraction, exponent - 10) : fraction * 0x1p-9f;
    const float value = (code & 127) == 127 ? NAN : code & 128 ? -size : size;
    require(std::isnan(value) ? std::isnan(values[i]) : values[i] == value, "a code");
    sums[i / 32] += value;
  }
  const std::vector<float> y = of_blocks(codes, scales, std::vector<float>(32, 1.f), rows);
  for (size_t i = 0; i < y.size(); i++)
    require(std::isnan(sums[i % 8]) ? std::isnan(y[i]) : y[i] == sums[i % 8], "a sum of codes");
}

// Every scale that a float32 needs, and NaN, in eight rows each, as many as are decoded at once; a
// product is exact.
void check_mxfp8_scales(int64_t rows) {
  constexpr int LARGEST = 247, NOT_A_NUMBER = 255, ONE = 0x38;
  std::vector<uint8_t> scales;
  for (int scale = 0; scale <= LARGEST; scale++)
    scales.insert(scales.end(), 8, static_cast<uint8_t>(scale));
  scales.insert(scales.end(), 8, NOT_A_NUMBER);
  std::vector<float> row(32, 0.f);
  row[random_int(0, 31)] = 1;
  const auto y = of_blocks(std::vector<uint8_t>(32 * scales.size(), ONE), scales, row, rows);
  for (size_t i = 0; i < y.size(); i++) {
    const int scale = scales[i % scales.size()];
    require(scale == NOT_A_NUMBER ? std::isnan(y[i]) : y[i] == std::ldexp(1.f, scale - 127),
            "a product with a scale");
  }
}

// The largest code times the largest values that are multiplied without care, and 1 times the
// smallest: neither products nor sums overflow or lose bits.
void check_mxfp8_limits(int64_t rows) {
  using mxfp4::mxfp8::Decoder;
  constexpr uint8_t LARGEST_CODE = 0x7e, ONE = 0x38;  // 448, 1
  const float largest = std::nextafter(Decoder::MOST, 0.f);
  const auto large = of_blocks(std::vector<uint8_t>(32, LARGEST_CODE), {127 - 20},
                               std::vector<float>(32, largest), rows);
  for (const float y : large) {
    const double exact = 32. * 448 * std::ldexp(static_cast<double>(largest), -20);
    require(std::fabs(y - exact) <= 32 * 0x1p-24 * exact, "a sum of large products");
  }
  std::vector<float> row(32, 0.f);
  row[random_int(0, 31)] = 0x1p-109f;
  for (const float y : of_blocks(std::vector<uint8_t>(32, ONE), {127}, row, rows))
    require(y == 0x1p-109f, "a product with a small value");
}

// So many rows that their tiles are multiplied in groups: the same bits as those of some alone.
void check_groups_of_tiles() {
  constexpr int64_t N = 32, K = 4096, ROWS = 150, ALONE = 7;
  const Values x(MXFP4_F32, ROWS * K, 1.), weight(MXFP4_F32, N * K, 1.);
  std::vector<uint8_t> panels(static_cast<size_t>(mxfp4::panel_count(N) * mxfp4::panel_bytes(K)));
  std::vector<uint8_t> flags(1), codes(N * K), scales(N * K / 32);
  mxfp4_quantize(weight.bytes.data(), MXFP4_F32, 1, N, K, N * K, 2 * K, K, 1, panels.data(),
                 flags.data(), 1);
  mxfp8_quantize(weight.bytes.data(), MXFP4_F32, N, K, K, codes.data(), scales.data(), 1);
  const auto multiply = [&](int64_t first, int64_t rows, bool in_mxfp8) {
    std::vector<float> y(static_cast<size_t>(rows * N));
    const void* from = mxfp4::element(x.bytes.data(), MXFP4_F32, first * K);
    const int32_t offsets[2] = {0, static_cast<int32_t>(rows)};
    struct {
      mxfp4_linear_group group;
      mxfp8_linear linear;
    } const linear{{from, rows, K, K, 1, MXFP4_F32, 1},
                   {codes.data(), scales.data(), nullptr, y.data(), N}};
    mxfp4_matmul m{};
    m.x = from, m.panels = panels.data(), m.flags = flags.data(), m.expert_offsets = offsets;
    m.y = y.data(), m.x_rows = m.rows = rows, m.x_stride = m.k = K, m.n = N;
    m.experts = m.experts_per_token = m.threads = 1;
    require((in_mxfp8 ? mxfp8_linears(&linear.group) : mxfp4_matmul_ogs(&m)) == 0, "many rows");
    return y;
  };
  for (const bool in_mxfp8 : {false, true}) {
    const int64_t some = in_mxfp8 ? mxfp4::mxfp8::FEW_ROWS + 1 : ALONE;
    const std::vector<float> all = multiply(0, ROWS, in_mxfp8);
    for (int64_t first = 0; first + some <= ROWS; first += some) {
      const std::vector<float> alone = multiply(first, some, in_mxfp8);
      require(std::equal(alone.begin(), alone.end(), all.begin() + first * N),
              "rows of a group of tiles");
    }
  }
}

void check_attention() {
  const int32_t dtype = static_cast<int32_t>(random_int(0, 2));
  mxfp4_attention a{};
  a.dtype = dtype;
  a.batch = random_int(1, 2), a.key_heads = random_int(1, 2), a.keys = random_int(1, 300);
  a.heads = a.key_heads * random_int(1, 6), a.size = 32 * random_int(1, 3);
  a.threads = 1, a.scale = .25f;
  const int64_t gap = random_int(0, 3);
  a.key_token = a.value_token = a.size + gap, a.query_head = a.size, a.sinks_stride = 1;
  a.query_batch = a.heads * a.size;
  a.key_head = a.value_head = (a.keys - 1) * a.key_token + a.size;
  a.key_batch = a.value_batch = a.key_heads * a.key_head;
  const Values query(dtype, a.batch * a.query_batch, 1.), key(dtype, a.batch * a.key_batch, 1.);
  const Values value(dtype, a.batch * a.key_batch, 1.), sinks(dtype, a.heads, 1.);
  const Values mask(dtype, a.keys, 1.);  // one for all
  std::vector<char> result(
      static_cast<size_t>(a.batch * a.query_batch * mxfp4::dtype_bytes(dtype)));
  a.query = query.bytes.data(), a.key = key.bytes.data(), a.value = value.bytes.data();
  a.sinks = sinks.bytes.data(), a.result = result.data();
  const bool is_masked = random_int(0, 1);
  a.mask = is_masked ? mask.bytes.data() : nullptr;
  require(mxfp4_attention_with_sinks(&a) == 0, "attention");
  const double u = dtype == MXFP4_BF16 ? 0x1p-8 : dtype == MXFP4_F16 ? 0x1p-11 : 0x1p-24;
  for (int64_t row = 0; row < a.batch * a.heads; row++) {
    const int64_t head = row % a.heads;
    const int64_t first = row / a.heads * a.key_batch + head / (a.heads / a.key_heads) * a.key_head;
    double total = std::exp(sinks.numbers[head]), error = 0;
    std::vector<double> sums(a.size), sizes(a.size);
    for (int64_t t = 0; t < a.keys; t++) {
      double logit = 0, terms = 0;
      for (int64_t i = 0; i < a.size; i++) {
        const double term =
            query.numbers[row * a.size + i] * key.numbers[first + t * a.key_token + i] * .25;
        logit += term, terms += std::fabs(term);
      }
      if (is_masked) logit += mask.numbers[t], terms += std::fabs(mask.numbers[t]);
      error = std::max(error, terms + std::fabs(logit));  // of a logit, in roundings
      total += std::exp(logit);
      for (int64_t i = 0; i < a.size; i++) {
        const double term = std::exp(logit) * value.numbers[first + t * a.key_token + i];
        sums[i] += term, sizes[i] += std::fabs(term);
      }
    }
    // Each logit and the maximum is rounded, then exponentials (2 ulp) and both sums.
    const double relative = 0x1p-24 * (2 * (a.size + 3) * error + 2 * (a.keys + 20));
    for (int64_t i = 0; i < a.size; i++) {
      float found;
      mxfp4::to_f32(mxfp4::element(result.data(), dtype, row * a.size + i), dtype, 1, &found);
      const double bound = 2 * relative * sizes[i] / total;
      const double rounding = std::max(u * (std::fabs(sums[i] / total) + bound), 0x1p-25);
      require(std::fabs(found - sums[i] / total) <= bound + rounding, "an attention");
    }
  }
}

void check_quantize() {
  const int64_t experts = random_int(0, 3), n = random_int(1, 80), k = 32 * random_int(1, 5);
  const int32_t dtype = static_cast<int32_t>(random_int(0, 2));
  const Values source(dtype, experts * n * k, 1.);
  const bool transposed = random_int(0, 1), pairs = n % 2 == 0 && random_int(0, 1);
  const int64_t row = transposed ? 1 : k;
  std::vector<uint8_t> panels(
      static_cast<size_t>(experts * mxfp4::panel_count(n) * mxfp4::panel_bytes(k)));
  std::vector<uint8_t> flags(static_cast<size_t>(experts * mxfp4::panel_count(n)));
  require(mxfp4_quantize(source.bytes.data(), dtype, experts, n, k, n * k, pairs ? row : 2 * row,
                         pairs ? n / 2 * row : row, transposed ? n : 1, panels.data(), flags.data(),
                         static_cast<int>(random_int(1, 3))) == 0,
          "quantize");
  mxfp4_huge_pages(panels.data(), static_cast<int64_t>(panels.size()));
}

// Tiles of rows, and parts of them: as many rows as there are, evenly.
void check_heights() {
  for (int64_t rows = 1; rows <= 60; rows++) {
    for (int64_t most = 1; most <= 12; most++) {
      const auto all = mxfp4::Heights::of(rows, most);
      require(all.tiles == (rows + most - 1) / most, "the fewest tiles");
      require(all.first(all.tiles) == rows, "rows of all tiles");
      const auto equal = mxfp4::Heights::equal(rows, most);
      require(equal.rows(all.tiles - 1) == all.most && equal.first(all.tiles) >= rows,
              "equal tiles");
      for (int64_t row = 0; row < rows; row++)
        require(equal.tile_of(row) == row / all.most, "the equal tile of a row");
      for (int64_t t = 0; t < all.tiles; t++) {
        require(all.rows(t) == all.most || all.rows(t) == all.most - 1, "even tiles");
        require(all.first(t + 1) - all.first(t) == all.rows(t), "a tile behind the other");
        for (int64_t row = all.first(t); row < all.first(t + 1); row++)
          require(all.tile_of(row) == t, "the tile of a row");
        for (int64_t count = 1; t + count <= all.tiles; count++) {
          const auto part = all.part(t, count);
          for (int64_t i = 0; i <= count; i++)
            require(part.first(i) == all.first(t + i) - all.first(t), "tiles of a part");
        }
      }
    }
  }
}

void check_bad_indices() {
  const Weights weights(2, 32, 32, false);
  const Values x(MXFP4_F32, 2 * 32, 1.), bias(MXFP4_F32, 2 * 32, 1.);
  std::vector<float> y(2 * 32);
  for (int wrong = 0; wrong < 4; wrong++) {
    std::vector<int32_t> offsets{0, 1, 2}, gather{0, 1}, scatter{0, 1};
    if (wrong == 0) gather[1] = 2;
    if (wrong == 1) scatter[0] = -1;
    if (wrong == 2) offsets[2] = 3;
    if (wrong == 3) offsets[1] = -1;
    mxfp4_matmul m{};
    m.x = x.bytes.data();
    m.panels = weights.panels.data();
    m.flags = weights.flags.data();
    m.bias = bias.bytes.data();
    m.expert_offsets = offsets.data();
    m.gather_index = gather.data();
    m.scatter_index = scatter.data();
    m.y = y.data();
    m.x_rows = m.rows = 2;
    m.x_stride = m.n = m.k = 32;
    m.experts = 2;
    m.experts_per_token = m.threads = 1;
    require(mxfp4_matmul_ogs(&m) == EINVAL, "an index outside its tensor is refused");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  require(mxfp4_init(0) == 0, "init");
  check_bad_indices();
  check_heights();
  check_small_values(0x1p-21f);
  check_small_values(0x1p-30f);
  check_small_values(0x1p-36f);
  check_small_values(mxfp4::ROW_SMALLEST, mxfp4::ROW_LARGEST);
  check_conversions();
  for (const int64_t rows : {1, 2, 3, 4, 20}) {
    check_mxfp8_codes(rows, true);
    check_mxfp8_codes(rows, false);
    check_mxfp8_scales(rows);
    check_mxfp8_limits(rows);
  }
  check_groups_of_tiles();
  for (int round = 0; round < rounds; round++) {
    check_matmul();
    check_quantize();
  }
  for (int round = 0; round < rounds; round++) check_linears();
  for (int round = 0; round < rounds; round++) check_mxfp8();
  for (int round = 0; round < rounds; round++) check_attention();
  std::printf("%d rounds\n", rounds);
}
