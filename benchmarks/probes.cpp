// What this machine can do at best: bytes read from memory and numbers multiplied in a second.
// probes.py compiles this file with -march=native and calls it through ctypes, after torch, so that
// both use one OpenMP runtime. Data is random throughout: units that multiply zeros draw less power
// and clock higher than they ever do in a model.
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 64;  // bytes of a vector register
#elif defined(__AVX__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
constexpr int64_t LINE = 64, CHUNK = 4 << 20, HUGE_PAGE = 2 << 20;
constexpr double UNAVAILABLE = -1;

typedef uint64_t Words __attribute__((vector_size(WIDTH)));
typedef float Floats __attribute__((vector_size(WIDTH)));
constexpr int LANES = WIDTH / sizeof(float);

// Tells the compiler that what `address` points to is read: it must be computed.
inline void keep(const void* address) { asm volatile("" : : "r"(address) : "memory"); }

struct Random {  // xorshift
  uint64_t state;
  explicit Random(uint64_t seed) : state((seed + 1) * 0x9E3779B97F4A7C15u) {}
  uint64_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  }
  float uniform() { return float(int64_t(next() >> 40) - (1 << 23)) / (1 << 23); }  // [-1, 1)
};

// Adds up [begin, begin + CHUNK), which is read as STREAMS parts side by side.
template <int STREAMS>
uint64_t read_chunk(const char* begin, int64_t ahead) {
  constexpr int64_t part = CHUNK / STREAMS;
  Words sum[LINE / WIDTH] = {};
  for (int64_t i = 0; i < part; i += LINE) {
#pragma GCC unroll 16
    for (int s = 0; s < STREAMS; ++s) {
      const char* line = begin + s * part + i;
      if (ahead) __builtin_prefetch(line + ahead);
#pragma GCC unroll 4
      for (int w = 0; w < LINE / WIDTH; ++w) sum[w] += reinterpret_cast<const Words*>(line)[w];
    }
  }
  uint64_t total = 0;
  for (const Words& words : sum)
    for (int i = 0; i < int(WIDTH / sizeof(uint64_t)); ++i) total += words[i];
  return total;
}

// Operations a second of all threads together: step() does `operations` of them, for `seconds`.
template <class Setup>
double sustained(int threads, double seconds, double operations, Setup setup) {
  double rate = 0;
#pragma omp parallel num_threads(threads) reduction(+ : rate)
  {
    auto step = setup(omp_get_thread_num());
    step();  // wakes the unit
#pragma omp barrier
    const double start = omp_get_wtime();
    double now = start;
    int64_t steps = 0;
    do {
      step();
      ++steps;
      now = omp_get_wtime();
    } while (now - start < seconds);
    rate += steps * operations / (now - start);
  }
  return rate;
}

constexpr int REPEATS = 4096;     // of a step, so that asking for the time costs nothing
constexpr int ACCUMULATORS = 10;  // enough to hide the latency, few enough for 16 registers

struct FmaStep {
  Floats acc[ACCUMULATORS], a, b, c, d;
  explicit FmaStep(int thread) {
    Random random(thread);
    for (Floats& x : acc)
      for (int i = 0; i < LANES; ++i) x[i] = random.uniform();
    for (int i = 0; i < LANES; ++i) {  // x -> a x + b -> c (a x + b) + d stays bounded: |a c| < 1
      a[i] = 0.9f + 0.05f * random.uniform(), c[i] = -0.9f + 0.05f * random.uniform();
      b[i] = random.uniform(), d[i] = random.uniform();
    }
  }
  void operator()() {
    Floats x[ACCUMULATORS];
    for (int i = 0; i < ACCUMULATORS; ++i) x[i] = acc[i];
    const Floats p = a, q = b, r = c, s = d;
    for (int repeat = 0; repeat < REPEATS; ++repeat) {
#pragma GCC unroll 16
      for (int i = 0; i < ACCUMULATORS; ++i) x[i] = x[i] * p + q;
#pragma GCC unroll 16
      for (int i = 0; i < ACCUMULATORS; ++i) x[i] = x[i] * r + s;
    }
    for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = x[i];
    keep(acc);
  }
  static constexpr double OPERATIONS = 2.0 * REPEATS * 2 * ACCUMULATORS * LANES;
};

#if defined(__AVX512BF16__)
struct DotStep {  // vdpbf16ps
  __m512 acc[ACCUMULATORS];
  __m512bh a[2], b[2];
  explicit DotStep(int thread) {
    Random random(thread);
    // No two the same, or the compiler computes one for all.
    for (__m512& x : acc) x = _mm512_set1_ps(random.uniform());
    for (int i = 0; i < 2; ++i) a[i] = values(random), b[i] = values(random);
  }
  static __m512bh values(Random& random) {
    alignas(64) float low[16], high[16];
    for (int i = 0; i < 16; ++i) low[i] = random.uniform(), high[i] = random.uniform();
    return _mm512_cvtne2ps_pbh(_mm512_load_ps(high), _mm512_load_ps(low));
  }
  void operator()() {
    __m512 x[ACCUMULATORS];
    for (int i = 0; i < ACCUMULATORS; ++i) x[i] = acc[i];
    for (int repeat = 0; repeat < REPEATS; ++repeat) {
#pragma GCC unroll 16
      for (int i = 0; i < ACCUMULATORS; ++i) x[i] = _mm512_dpbf16_ps(x[i], a[0], b[0]);
#pragma GCC unroll 16
      for (int i = 0; i < ACCUMULATORS; ++i) x[i] = _mm512_dpbf16_ps(x[i], a[1], b[1]);
    }
    for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = x[i];
    keep(acc);
  }
  static constexpr double OPERATIONS = 2.0 * REPEATS * 2 * ACCUMULATORS * 32;
};
#endif

// Products of tiles, 16 x 16 x 32 each; A and B lie in the first cache. How many tiles a product
// loads, and how many registers are in use, decides how fast it is beside another hyperthread:
//   REGISTERS    2 x 2 tiles of sums, whose operands stay in registers
//   ALL_EIGHT    2 x 2 tiles of sums, with the loads of their operands: the fewest for a product
//   FOUR         1 x 2 tiles of sums, whose right operands share a register
enum class Tiles { REGISTERS, ALL_EIGHT, FOUR };

#if defined(__AMX_BF16__)
template <Tiles KIND>
struct TileStep {
  static constexpr int DEPTH = 8;               // steps of K: 32 KiB
  static constexpr int VALUES = 512, ROW = 64;  // of a tile; bytes
  alignas(64) uint16_t a[DEPTH][2][VALUES], b[DEPTH][2][VALUES];
  explicit TileStep(int thread) {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t column_bytes[16] = {ROW, ROW, ROW, ROW, ROW, ROW, ROW, ROW};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // gcc 12's intrinsic does not say that it reads memory, and the stores above would be dropped.
    keep(&config);
    _tile_loadconfig(&config);
    Random random(thread);
    for (auto* tile : {&a[0][0][0], &b[0][0][0]})
      for (int i = 0; i < DEPTH * 2 * VALUES; ++i) {
        const float x = random.uniform();
        uint32_t bits;
        __builtin_memcpy(&bits, &x, sizeof bits);
        tile[i] = bits >> 16;
      }
    keep(a), keep(b);
    if (KIND != Tiles::FOUR) load(0);
  }
  ~TileStep() { _tile_release(); }
  TileStep(const TileStep&) = delete;
  void load(int k) {
    _tile_loadd(4, a[k][0], ROW);
    _tile_loadd(6, b[k][0], ROW);
    _tile_loadd(7, b[k][1], ROW);
    _tile_loadd(5, a[k][1], ROW);
  }
  // As many products as the others have.
  void multiply_with_four(int k) {
    for (int row : {0, 1}) {
      _tile_loadd(4, a[k][row], ROW);
      _tile_loadd(6, b[k][0], ROW);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(6, b[k][1], ROW);
      _tile_dpbf16ps(1, 4, 6);
    }
  }
  void operator()() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int repeat = 0; repeat < REPEATS; ++repeat) {
      if (KIND == Tiles::FOUR) {
        multiply_with_four(repeat % DEPTH);
        continue;
      }
      if (KIND == Tiles::ALL_EIGHT) load(repeat % DEPTH);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  static constexpr double OPERATIONS = 2.0 * REPEATS * 4 * 16 * 16 * 32;
};

template <Tiles KIND>
double multiply_tiles(int threads, double seconds) {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl's and the CPU's number
  if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) != 0) return UNAVAILABLE;
  using Step = TileStep<KIND>;
  return sustained(threads, seconds, Step::OPERATIONS, [](int t) { return Step(t); });
}
#else
template <Tiles>
double multiply_tiles(int, double) {
  return UNAVAILABLE;
}
#endif

}  // namespace

extern "C" {

// Room for `bytes` (whole chunks are used), filled with random data by the threads; or null.
char* probe_allocate(int64_t bytes, int threads) {
  const int64_t room = (bytes / HUGE_PAGE + 1) * HUGE_PAGE;
  char* data = static_cast<char*>(std::aligned_alloc(HUGE_PAGE, room));
  if (!data) return nullptr;
  madvise(data, bytes, MADV_HUGEPAGE);
#pragma omp parallel for num_threads(threads)
  for (int64_t chunk = 0; chunk < bytes / CHUNK; ++chunk) {
    Random random(chunk);
    uint64_t* words = reinterpret_cast<uint64_t*>(data + chunk * CHUNK);
    for (int64_t i = 0; i < CHUNK / int64_t(sizeof(uint64_t)); ++i) words[i] = random.next();
  }
  return data;
}

void probe_free(char* data) { std::free(data); }

// Bytes a second of one pass over all chunks; each is read as `streams` (1, 2, 4, 8 or 16) streams,
// with software prefetch `ahead` bytes ahead (0: none).
double probe_read(const char* data, int64_t bytes, int threads, int streams, int64_t ahead) {
  const int64_t chunks = bytes / CHUNK;
  const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
  {
    uint64_t sum = 0;
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const char* begin = data + chunk * CHUNK;
      sum += streams == 16  ? read_chunk<16>(begin, ahead)
             : streams == 8 ? read_chunk<8>(begin, ahead)
             : streams == 4 ? read_chunk<4>(begin, ahead)
             : streams == 2 ? read_chunk<2>(begin, ahead)
                            : read_chunk<1>(begin, ahead);
    }
    keep(&sum);
  }
  return chunks * CHUNK / (omp_get_wtime() - start);
}

// Floating-point operations a second (a multiply-add is two), sustained for `seconds`; -1 if the
// compiler's target has no such unit or the system refuses it.
double probe_f32(int threads, double seconds) {
  return sustained(threads, seconds, FmaStep::OPERATIONS, [](int t) { return FmaStep(t); });
}

double probe_avx512_bf16(int threads, double seconds) {
#if defined(__AVX512BF16__)
  return sustained(threads, seconds, DotStep::OPERATIONS, [](int t) { return DotStep(t); });
#else
  return (void)threads, (void)seconds, UNAVAILABLE;
#endif
}

// With the loads of tiles that a matmul needs, from the first cache.
double probe_amx_bf16(int threads, double seconds) {
  return std::max(multiply_tiles<Tiles::ALL_EIGHT>(threads, seconds),
                  multiply_tiles<Tiles::FOUR>(threads, seconds));
}

// On registers alone.
double probe_amx_bf16_registers(int threads, double seconds) {
  return multiply_tiles<Tiles::REGISTERS>(threads, seconds);
}
}
