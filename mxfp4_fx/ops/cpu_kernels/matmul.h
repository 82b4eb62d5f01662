// mxfp4_matmul_ogs: the division of the work among threads, in one parallel region per call.
//
//   pack      all threads gather rows, convert them and pack them into tiles
//   multiply  each thread takes ranges of work. Without a scatter, the items are (expert, panel).
//             With one they are panels, and a thread computes them for one expert after the other,
//             so that a token's rows are added in the experts' order for any number of threads.
//
// `Tile` is the path's kernel, which multiplies tiles of several rows with a panel. If an expert
// has few rows, another kernel multiplies them with several panels at a time (few_rows.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "api.h"
#include "epilogue.h"
#include "f32_tile.h"
#include "numbers.h"
#include "panels.h"
#include "parallel.h"
#include "plan.h"

namespace mxfp4 {

// Panels that few rows are multiplied with at a time.
constexpr int64_t STREAMS = 4;

// Panels whose sums are finished together, if an expert has at most FEW_SUMS rows. Between panels
// no weights are read, and memory needs time to come up to speed again.
constexpr int64_t TOGETHER = 8, FEW_SUMS = 4;

// One call. `Tile` is the kernel for several rows.
template <class Tile>
class Matmul {
 public:
  explicit Matmul(const mxfp4_matmul& arguments) : m(arguments) {
    panels = panel_count(m.n);
    blocks = m.k / BLOCK;
    columns = is_gated(m) ? m.n / 2 : m.n;
    panel_columns = is_gated(m) ? LANES : PANEL_ROWS;
  }

  int run() {
    if (!is_valid(m)) return EINVAL;
    exceptional.resize(static_cast<size_t>(m.rows));
    const int64_t row_bytes = Tile::packed_bytes(m.k);
    const int64_t few = Tile::few_rows(m.x_dtype);
    for (int64_t e = 0; e < m.experts; e++) {
      const int64_t first = m.expert_offsets[e], rows = m.expert_offsets[e + 1] - first;
      if (rows)
        plan.add(e, first, rows, HAS_FEW_ROWS && rows <= few, Tile::heights(rows), row_bytes, m.k);
    }
    group_tiles =
        std::max<int64_t>(1, Tile::GROUP_BYTES / std::max<int64_t>(1, Tile::ROWS * row_bytes));
    const int64_t group_rows = std::min(group_tiles * Tile::ROWS, plan.most_rows + Tile::ROWS);

    const int threads = std::max(m.threads, 1);
    items = m.scatter_index ? panels : panels * static_cast<int64_t>(plan.experts.size());
    // Ranges are so long that packed rows are used again, and so short that all threads end
    // together.
    const int64_t together =
        plan.most_rows > FEW_SUMS ? 1 : std::min(TOGETHER, items / threads / 2);
    least_items = std::max(std::min(few ? STREAMS : together, panels), panels / (32 * threads));
    least_items = std::max<int64_t>(1, least_items);
    most_items = std::max(least_items, ceil_div(panels, 2 * threads));
    tokens = m.scatter_index ? m.rows / m.experts_per_token : 0;

    const int64_t most_sums = std::max({group_rows, STREAMS * few, TOGETHER * FEW_SUMS});
    sums_bytes = line_up(most_sums * PANEL_ROWS * static_cast<int64_t>(sizeof(float)));
    values_bytes = line_up(m.k * static_cast<int64_t>(sizeof(float)));
    results_bytes = line_up(tokens * most_items * PANEL_ROWS * static_cast<int64_t>(sizeof(float)));
    scratch_bytes =
        line_up(sizeof(typename Tile::Scratch)) + sums_bytes + values_bytes + results_bytes;
    packed = allocate(plan.packed_bytes);
    scratch = allocate(threads * scratch_bytes);
    if (!packed || !scratch) return ENOMEM;

    Cursor cursor(items, threads, least_items, most_items);
    parallel(threads, [&](int thread, int count) {
      pack(thread, count);
      clear_rows_of_nobody(thread, count);
      barrier(count);
      multiply(cursor, scratch.get() + thread * scratch_bytes);
    });
    return 0;
  }

 private:
  // The memory of one thread.
  struct Buffers {
    typename Tile::Scratch& scratch;
    float* sums;     // [rows of a group][32], or [panels][few rows][32]
    float* results;  // [tokens][columns of the range], with a scatter
  };

  const mxfp4_matmul& m;
  Plan plan;
  std::vector<uint8_t> exceptional;  // [rows], 1 for those that only float32 can multiply
  int64_t panels, blocks, columns, panel_columns;
  int64_t items, most_items, least_items, group_tiles, tokens;
  int64_t sums_bytes, values_bytes, results_bytes, scratch_bytes;
  Memory packed, scratch;

  const void* input_row(int64_t row) const {
    const int64_t at = m.gather_index ? m.gather_index[row] : row;
    return element(m.x, m.x_dtype, at * m.x_stride);
  }

  void pack(int thread, int count) {
    float* values = reinterpret_cast<float*>(scratch.get() + thread * scratch_bytes);
    const int64_t first = m.expert_offsets[0], rows = m.expert_offsets[m.experts] - first;
    const int64_t begin = first + rows * thread / count, end = first + rows * (thread + 1) / count;
    for (Expert& expert : plan.experts) {
      const int64_t from = std::max(begin, expert.first_row);
      const int64_t to = std::min(end, expert.first_row + expert.rows);
      for (int64_t row = from; row < to; row++) pack_row(expert, row - expert.first_row, values);
      // The thread that packs the last row also writes zeros for rows that the last tile lacks.
      if (expert.few || from >= to || to < expert.first_row + expert.rows) continue;
      std::memset(values, 0, static_cast<size_t>(m.k) * sizeof(float));
      const int64_t padded = expert.heights.first(expert.heights.tiles);
      for (int64_t row = expert.rows; row < padded; row++) pack_values(expert, row, values);
    }
  }

  void pack_row(Expert& expert, int64_t row, float* values) {
    to_f32(input_row(expert.first_row + row), m.x_dtype, m.k, values);
    if (pack_values(expert, row, values)) return;
    // Its tile gets zeros. What the row adds to its sums is computed apart.
    std::memset(values, 0, static_cast<size_t>(m.k) * sizeof(float));
    pack_values(expert, row, values);
    exceptional[static_cast<size_t>(expert.first_row + row)] = 1;
    __atomic_store_n(&expert.exceptional, 1, __ATOMIC_RELAXED);
  }

  // Returns whether the expert's kernel can multiply the row.
  bool pack_values(const Expert& expert, int64_t row, const float* values) {
    char* target = packed.get() + expert.packed;
    if (expert.few) {
      target += row * FewRows::bytes_of(blocks);
      RowBlock* limbs = reinterpret_cast<RowBlock*>(target);
      for (int64_t b = 0; b < blocks; b++) limbs[b] = row_block(values + b * BLOCK);
      std::memcpy(target + FewRows::values_at(blocks), values,
                  static_cast<size_t>(m.k) * sizeof(float));
      return true;
    }
    const Heights& heights = expert.heights;
    const int64_t tile = heights.tile_of(row), first = heights.first(tile);
    return Tile::pack(values, m.k, row - first, heights.rows(tile),
                      target + first * Tile::packed_bytes(m.k));
  }

  // Writes zeros for rows whose expert is not held here. With a scatter, write_results writes all.
  void clear_rows_of_nobody(int thread, int count) {
    if (m.scatter_index) return;
    const int64_t first = m.expert_offsets[0], last = m.expert_offsets[m.experts];
    for (int64_t row = thread; row < m.rows; row += count) {
      if (row >= first && row < last) continue;
      std::memset(element(m.y, m.x_dtype, row * columns), 0,
                  static_cast<size_t>(columns * dtype_bytes(m.x_dtype)));
    }
  }

  void multiply(Cursor& cursor, char* memory) {
    auto* kernel_scratch = new (memory) typename Tile::Scratch;
    float* sums = reinterpret_cast<float*>(memory + line_up(sizeof(typename Tile::Scratch)));
    float* results =
        reinterpret_cast<float*>(reinterpret_cast<char*>(sums) + sums_bytes + values_bytes);
    const Buffers buffers{*kernel_scratch, sums, results};
    int64_t begin, end;
    while (cursor.next(begin, end)) {
      if (m.scatter_index) {
        const int64_t width = (end - begin) * panel_columns;
        std::memset(buffers.results, 0, static_cast<size_t>(tokens * width) * sizeof(float));
        for (const Expert& expert : plan.experts)
          multiply_range(expert, begin, end, begin, end, buffers);
        write_results(begin, end, buffers.results);
      } else {
        while (begin < end) {
          const int64_t first = begin % panels, last = std::min(panels, first + end - begin);
          multiply_range(plan.experts[static_cast<size_t>(begin / panels)], first, last, 0, 0,
                         buffers);
          begin += last - first;
        }
      }
    }
  }

  // Computes panels [first, last) of an expert for all its rows.
  void multiply_range(const Expert& expert, int64_t first, int64_t last, int64_t range_begin,
                      int64_t range_end, const Buffers& buffers) {
    for (int64_t tile = 0; tile < expert.heights.tiles; tile += group_tiles) {
      const int64_t tiles = std::min(group_tiles, expert.heights.tiles - tile);
      const int64_t row = expert.heights.first(tile);
      const int64_t padded = expert.heights.first(tile + tiles) - row;
      const int64_t rows = std::min(padded, expert.rows - row);
      for (int64_t panel = first, count; panel < last; panel += count) {
        count = panels_at_once(expert, panel, last);
        for (int64_t p = 0; p < count; p++)
          set_biases(expert, panel + p, padded, buffers.sums + p * padded * PANEL_ROWS);
        const uint8_t* codes = m.panels + (expert.id * panels + panel) * panel_bytes(m.k);
        // The fast kernels need a first block.
        const bool is_plain = m.flags[expert.id * panels + panel] == 0 && blocks > 0;
        if (is_plain && expert.few)
          multiply_few(expert, codes, count, buffers.sums);
        else if (is_plain)
          multiply_panels(expert, tile, tiles, codes, count, panel + count < last, buffers);
        if (!is_plain || expert.exceptional)
          multiply_exceptional(expert, row, rows, codes, !is_plain, buffers.sums);
        for (int64_t p = 0; p < count; p++)
          for (int64_t r = 0; r < rows; r++)
            finish(expert.first_row + row + r, panel + p,
                   buffers.sums + (p * padded + r) * PANEL_ROWS, range_begin, range_end,
                   buffers.results);
      }
    }
  }

  // How many panels from `panel` on are finished together. Few rows are also multiplied with all of
  // them together: each is a stream from memory.
  int64_t panels_at_once(const Expert& expert, int64_t panel, int64_t last) const {
    if (expert.exceptional || !(expert.few || expert.rows <= FEW_SUMS)) return 1;
    const uint8_t* flags = m.flags + expert.id * panels + panel;
    const int64_t most = std::min(expert.few ? STREAMS : TOGETHER, last - panel);
    int64_t count = 1;
    while (count < most && !flags[0] && !flags[count]) count++;
    return count;
  }

  void set_biases(const Expert& expert, int64_t panel, int64_t rows, float* sums) const {
    alignas(LINE) float bias[PANEL_ROWS] = {};
    const int64_t first = panel * PANEL_ROWS, count = std::min(PANEL_ROWS, m.n - first);
    if (m.bias)
      to_f32(element(m.bias, m.bias_dtype, expert.id * m.n + first), m.bias_dtype, count, bias);
    for (int i = 0; i < PANEL_ROWS; i++) sums[i] = bias[2 * (i % LANES) + i / LANES];
    for (int64_t row = 1; row < rows; row++)
      std::memcpy(sums + row * PANEL_ROWS, sums, PANEL_ROWS * sizeof(float));
  }

  // All rows of an expert that has few.
  void multiply_few([[maybe_unused]] const Expert& expert, [[maybe_unused]] const uint8_t* codes,
                    [[maybe_unused]] int64_t count, [[maybe_unused]] float* sums) const {
    if constexpr (HAS_FEW_ROWS && Tile::MOST_FEW > 0) {
      const FewRows rows{packed.get() + expert.packed, FewRows::bytes_of(blocks), blocks,
                         expert.rows};
      multiply_rows<Tile::MOST_FEW>(rows, codes, count, sums, rows.count * PANEL_ROWS);
    }
  }

  // Tiles times `count` panels, one after the other; `more` says that a panel follows them.
  void multiply_panels(const Expert& expert, int64_t tile, int64_t tiles, const uint8_t* panel,
                       int64_t count, bool more, const Buffers& buffers) const {
    const char* source =
        packed.get() + expert.packed + expert.heights.first(tile) * Tile::packed_bytes(m.k);
    const Tiles rows{source, expert.heights.part(tile, tiles), blocks};
    float* sums = buffers.sums;
    for (int64_t p = 0; p < count; p++, sums += rows.heights.first(tiles) * PANEL_ROWS) {
      const uint8_t* next = panel + panel_bytes(m.k);
      Tile::multiply(rows, panel, more || p + 1 < count ? next : nullptr, sums, buffers.scratch);
      panel = next;
    }
  }

  // Multiplies any weights and activations block by block in float32, which is slow: the rows that
  // are exceptional, or all.
  void multiply_exceptional(const Expert& expert, int64_t row, int64_t rows, const uint8_t* panel,
                            bool all, float* sums) const {
    alignas(LINE) F32Block weights;
    alignas(LINE) float values[BLOCK];
    for (int64_t b = 0; b < blocks; b++) {
      decode_f32(block_codes(panel, b), block_scales(panel, b), weights);
      for (int64_t r = 0; r < rows; r++) {
        const int64_t at = expert.first_row + row + r;
        if (!all && !exceptional[static_cast<size_t>(at)]) continue;
        const char* input = static_cast<const char*>(input_row(at));
        to_f32(input + b * BLOCK * dtype_bytes(m.x_dtype), m.x_dtype, BLOCK, values);
        F32Tile::multiply_chunk<1>(values, &weights, 1, sums + r * PANEL_ROWS);
      }
    }
  }

  void finish(int64_t row, int64_t panel, const float* sums, int64_t range_begin, int64_t range_end,
              float* results) const {
    alignas(LINE) float out[PANEL_ROWS];
    const float gamma = m.gammas ? m.gammas[row] : 1.f;
    finish_row(sums, m, gamma, out);
    const int64_t first = panel * panel_columns, count = std::min(panel_columns, columns - first);
    if (m.scatter_index) {
      const int64_t token = m.scatter_index[row] / m.experts_per_token;
      const int64_t width = (range_end - range_begin) * panel_columns;
      float* result = results + token * width + (panel - range_begin) * panel_columns;
      for (int64_t i = 0; i < panel_columns; i++) result[i] += out[i];
    } else {
      from_f32(out, m.x_dtype, count, element(m.y, m.x_dtype, row * columns + first));
    }
  }

  void write_results(int64_t begin, int64_t end, const float* results) const {
    const int64_t width = (end - begin) * panel_columns, first = begin * panel_columns;
    const int64_t count = std::min(width, columns - first);
    for (int64_t token = 0; token < tokens; token++)
      from_f32(results + token * width, m.x_dtype, count,
               element(m.y, m.x_dtype, token * columns + first));
  }
};

}  // namespace mxfp4
