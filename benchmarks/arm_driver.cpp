// A matmul of MXFP4 weights as often as asked, for benchmarks.arm to count instructions. Arguments:
// the dtype (api.h), rows of activations, times.
#include "kernels.cpp"

#include <cstdlib>
#include <random>
#include <vector>

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const int32_t dtype = std::atoi(arguments[1]);
  const int64_t rows = std::atoi(arguments[2]), n = 4096, k = 256;
  std::vector<float> values(static_cast<size_t>(rows * k));
  std::mt19937 generator(1);
  for (float& value : values) value = std::normal_distribution<float>()(generator);
  std::vector<char> x(values.size() * 4), y(static_cast<size_t>(rows * n) * 4);
  mxfp4::from_f32(values.data(), dtype, rows * k, x.data());
  const std::vector<uint8_t> blocks(n * k / 2, 0x35), scales(n * k / 32, 127);
  std::vector<uint8_t> panels(static_cast<size_t>(mxfp4::panel_count(n) * mxfp4::panel_bytes(k)));
  std::vector<uint8_t> flags(static_cast<size_t>(mxfp4::panel_count(n)));
  mxfp4_swizzle(blocks.data(), scales.data(), 1, n, k, 2, 1, panels.data(), flags.data(), 1);
  const int32_t offsets[2] = {0, static_cast<int32_t>(rows)};
  mxfp4_matmul m{};
  m.x = x.data(), m.panels = panels.data(), m.flags = flags.data(), m.expert_offsets = offsets;
  m.y = y.data(), m.x_rows = m.rows = rows, m.x_stride = m.k = k, m.n = n;
  m.experts = m.experts_per_token = m.threads = 1, m.x_dtype = m.bias_dtype = dtype;
  for (int times = std::atoi(arguments[3]); times > 0; times--)
    if (mxfp4_matmul_ogs(&m)) return 1;
}
