// Vectors of the path's width, for code that compilers do not vectorize by themselves.
#pragma once

#include <cstdint>
#include <cstring>

namespace mxfp4 {

#if defined(__AVX512F__)
constexpr int VECTOR = 16;
#elif defined(__AVX2__)
constexpr int VECTOR = 8;
#else
constexpr int VECTOR = 4;
#endif
typedef float Vector __attribute__((vector_size(VECTOR * sizeof(float))));
typedef uint32_t VectorBits __attribute__((vector_size(VECTOR * sizeof(uint32_t))));

inline Vector vector_of(float value) { return value - Vector{}; }

inline Vector load_vector(const float* values) {
  Vector vector;
  std::memcpy(&vector, values, sizeof vector);
  return vector;
}

inline void store_vector(float* values, Vector vector) {
  std::memcpy(values, &vector, sizeof vector);
}

}  // namespace mxfp4
