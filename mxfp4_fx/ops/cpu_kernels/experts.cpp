// mxfp4_matmul_ogs. MXFP4_PATH_<NAME>, and the flags that the compiler gets with it (native.py),
// choose the kernel for several rows.

#include <cerrno>
#include <new>

#include "amx_tile.h"
#include "api.h"
#include "bf16_tile.h"
#include "f32_tile.h"
#include "matmul.h"
#include "neon_bf16_tile.h"

namespace mxfp4 {

// The kernel for several rows, by path and by the dtype of the activations.
static int matmul_ogs(const mxfp4_matmul& arguments) {
#if defined(MXFP4_PATH_AMX) || defined(MXFP4_PATH_AMX_EMULATED)
  switch (arguments.x_dtype) {
    case MXFP4_BF16:
      return Matmul<AmxTile<1>>(arguments).run();
    case MXFP4_F16:
      return Matmul<AmxTile<2>>(arguments).run();
    default:
      return Matmul<AmxTile<3>>(arguments).run();
  }
#elif defined(MXFP4_PATH_AVX512_BF16)
  if (arguments.x_dtype == MXFP4_BF16) return Matmul<Bf16Tile>(arguments).run();
#elif defined(MXFP4_PATH_NEON_BF16)
  if (arguments.x_dtype == MXFP4_BF16) return Matmul<NeonBf16Tile>(arguments).run();
#endif
  return Matmul<F32Tile>(arguments).run();
}

}  // namespace mxfp4

extern "C" int mxfp4_matmul_ogs(const mxfp4_matmul* arguments) {
  try {
    return mxfp4::matmul_ogs(*arguments);
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}
