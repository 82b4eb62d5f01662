// The plan of a call: the experts that have rows, the tiles of their rows, and the places of the
// packed tiles.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "api.h"
#include "few_rows.h"
#include "panels.h"

namespace mxfp4 {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

inline int64_t line_up(int64_t bytes) { return ceil_div(bytes, LINE) * LINE; }

// Returns null if there is no memory left.
inline Memory allocate(int64_t bytes) {
  const auto size = static_cast<size_t>(std::max(line_up(bytes), LINE));
  return Memory(static_cast<char*>(std::aligned_alloc(LINE, size)));
}

// An expert that has rows.
struct Expert {
  int64_t id;
  int64_t first_row, rows;  // among the rows sorted by expert
  Heights heights;          // of its tiles
  int64_t packed;           // offset in bytes of the first tile; tiles are contiguous
  bool few;                 // rows are multiplied by few_rows.h
  int exceptional;          // 1 if only float32 can multiply one of the rows of its tiles
};

struct Plan {
  std::vector<Expert> experts;
  int64_t packed_bytes = 0;
  int64_t most_rows = 0;  // of one expert

  // Adds an expert whose rows form tiles of `row_bytes` a row, unless they are `few`.
  void add(int64_t id, int64_t first_row, int64_t rows, bool few, Heights heights,
           int64_t row_bytes, int64_t k) {
    Expert expert{};
    expert.id = id;
    expert.first_row = first_row;
    expert.rows = rows;
    expert.few = few;
    expert.heights = few ? Heights{1, rows, 1} : heights;
    expert.packed = packed_bytes;
    packed_bytes += line_up(few ? rows * FewRows::bytes_of(k / BLOCK)
                                : heights.first(heights.tiles) * row_bytes);
    most_rows = std::max(most_rows, rows);
    experts.push_back(expert);
  }
};

// Whether every index points into its tensor.
inline bool is_valid(const mxfp4_matmul& m) {
  const int64_t outputs = m.scatter_index ? m.rows : 0;
  int64_t previous = 0;
  for (int64_t e = 0; e <= m.experts; e++) {
    const int64_t offset = m.expert_offsets[e];
    if (offset < previous || offset > m.rows) return false;
    previous = offset;
  }
  for (int64_t r = m.expert_offsets[0]; r < m.expert_offsets[m.experts]; r++) {
    if (m.gather_index && (m.gather_index[r] < 0 || m.gather_index[r] >= m.x_rows)) return false;
    if (m.scatter_index && (m.scatter_index[r] < 0 || m.scatter_index[r] >= outputs)) return false;
  }
  return m.gather_index || m.x_rows >= m.rows;
}

}  // namespace mxfp4
