// The matrix units of AMX, one function for each instruction. The path for tests has the same
// functions in plain C++, so that machines without AMX can test the kernels above them.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

#if defined(MXFP4_PATH_AMX)
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace mxfp4::amx {

// The operand of ldtilecfg: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 1,
// 18.3.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(MXFP4_PATH_AMX)

// Linux lets a process use the tile registers only after this request:
// arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
inline int request() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 0 : errno; }

inline void configure(const Configuration& configuration) {
  // gcc 12's intrinsic does not declare that it reads memory.
  asm volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
}

inline void release() { asm volatile("tilerelease"); }

template <int TILE>
inline void load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
inline void store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

// C += A B: A [rows][pairs of bfloat16], B [pairs][columns] of pairs, C [rows][columns] float32.
template <int C, int A, int B>
inline void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else

struct Units {
  Configuration configuration;
  char data[8][16][64];
};
inline thread_local Units units;

inline int request() { return 0; }
inline void configure(const Configuration& configuration) {
  units.configuration = configuration;
  std::memset(units.data, 0, sizeof units.data);
}
inline void release() { units.configuration = Configuration{}; }

template <int TILE>
inline void load(const void* rows, int64_t stride) {
  std::memset(units.data[TILE], 0, sizeof units.data[TILE]);
  for (int row = 0; row < units.configuration.rows[TILE]; row++)
    std::memcpy(units.data[TILE][row], static_cast<const char*>(rows) + row * stride,
                units.configuration.row_bytes[TILE]);
}

template <int TILE>
inline void store(void* rows, int64_t stride) {
  for (int row = 0; row < units.configuration.rows[TILE]; row++)
    std::memcpy(static_cast<char*>(rows) + row * stride, units.data[TILE][row],
                units.configuration.row_bytes[TILE]);
}

template <int TILE>
inline void zero() {
  std::memset(units.data[TILE], 0, sizeof units.data[TILE]);
}

// Like the units, this reads subnormals as zero and flushes them to zero. The units add in another
// order and round less often, so the bits may differ; the error bound is the same.
template <int C, int A, int B>
inline void multiply() {
  const auto operand = [](const char* at) {
    uint16_t value;
    std::memcpy(&value, at, sizeof value);
    return (value & 0x7f80) == 0 ? float_of(static_cast<uint32_t>(value & 0x8000) << 16)
                                 : bf16_to_f32(value);
  };
  const auto flushed = [](float value) {
    return (bits_of(value) & 0x7f800000) == 0 ? float_of(bits_of(value) & 0x80000000) : value;
  };
  const Configuration& c = units.configuration;
  for (int m = 0; m < c.rows[C]; m++) {
    for (int pair = 0; pair < c.row_bytes[A] / 4; pair++) {
      for (int n = 0; n < c.row_bytes[C] / 4; n++) {
        float sum;
        std::memcpy(&sum, &units.data[C][m][4 * n], sizeof sum);
        for (int odd = 1; odd >= 0; odd--) {
          const float a = operand(&units.data[A][m][4 * pair + 2 * odd]);
          const float b = operand(&units.data[B][pair][4 * n + 2 * odd]);
          sum = flushed(sum + flushed(a * b));
        }
        std::memcpy(&units.data[C][m][4 * n], &sum, sizeof sum);
      }
    }
  }
}

#endif

}  // namespace mxfp4::amx
