// mxfp4_init_weights, mxfp4_swizzle, mxfp4_unswizzle, mxfp4_quantize, mxfp4_huge_pages,
// mxfp8_quantize, mxfp8_dequantize. This unit is a library of its own, and a part of the one with
// all functions.

#include <algorithm>
#include <cerrno>
#include <cstdint>

#include "api.h"
#include "mxfp8.h"
#include "quantize.h"
#include "swizzle.h"
#include "weights_test.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

extern "C" int mxfp4_init_weights(int32_t forked) {
  if (forked) mxfp4::forked = true;
  return mxfp4::WeightsTest().passes() ? 0 : EDOM;
}

extern "C" int mxfp4_swizzle(const uint8_t* blocks, const uint8_t* scales, int64_t experts,
                             int64_t n, int64_t k, int64_t pair, int64_t odd, uint8_t* panels,
                             uint8_t* flags, int32_t threads) {
  using namespace mxfp4;
  const int64_t row_blocks = k / BLOCK;
  const RowOrder order{pair, odd};
  for_each_panel(experts, n, order, threads, [&](int64_t panel, int64_t first_row, int64_t rows) {
    const int64_t block = first_row * row_blocks;
    flags[panel] = swizzle_panel(blocks + block * BLOCK_BYTES, scales + block, order, rows,
                                 row_blocks, panels + panel * panel_bytes(k));
  });
  return 0;
}

extern "C" int mxfp4_unswizzle(const uint8_t* panels, int64_t experts, int64_t n, int64_t k,
                               uint8_t* blocks, uint8_t* scales, int32_t threads) {
  using namespace mxfp4;
  const int64_t row_blocks = k / BLOCK;
  for_each_panel(experts, n, {2, 1}, threads, [&](int64_t panel, int64_t first_row, int64_t rows) {
    const int64_t block = first_row * row_blocks;
    unswizzle_panel(panels + panel * panel_bytes(k), rows, row_blocks, blocks + block * BLOCK_BYTES,
                    scales + block);
  });
  return 0;
}

extern "C" int mxfp4_quantize(const void* source, int32_t dtype, int64_t experts, int64_t n,
                              int64_t k, int64_t stride_e, int64_t pair, int64_t odd,
                              int64_t stride_k, uint8_t* panels, uint8_t* flags, int32_t threads) {
  using namespace mxfp4;
  const int64_t count = panel_count(n), groups = ceil_div(count, GROUP_PANELS);
  Cursor cursor(experts * groups, threads);
  parallel(threads, [&](int, int) {
    int64_t begin, end;
    while (cursor.next(begin, end)) {
      for (int64_t group = begin; group < end; group++) {
        const int64_t expert = group / groups, panel = group % groups * GROUP_PANELS;
        const int64_t row = panel * PANEL_ROWS, at = expert * count + panel;
        const void* values = element(source, dtype, expert * stride_e);
        quantize_group({values, dtype, k, pair, odd, stride_k}, row,
                       std::min(GROUP_PANELS * PANEL_ROWS, n - row), panels + at * panel_bytes(k),
                       flags + at);
      }
    }
  });
  return 0;
}

extern "C" void mxfp4_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t address = reinterpret_cast<uintptr_t>(start);
  const uintptr_t first = (address + page - 1) / page * page;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

extern "C" void mxfp8_quantize(const void* source, int32_t dtype, int64_t n, int64_t k,
                               int64_t stride, uint8_t* codes, uint8_t* scales, int32_t threads) {
  mxfp4::mxfp8::quantize(source, dtype, n, k, stride, codes, scales, threads);
}

extern "C" void mxfp8_dequantize(const uint8_t* codes, const uint8_t* scales, int64_t n, int64_t k,
                                 int32_t dtype, void* values, int32_t threads) {
  mxfp4::mxfp8::dequantize(codes, scales, n, k, dtype, values, threads);
}
