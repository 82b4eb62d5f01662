// The only translation unit of the library; see api.h. MXFP4_PATH_<NAME> and the compiler's flags
// select the instruction-set path (native.py).
#include "amx_tile.h"
#include "api.h"
#include "attention.h"
#include "bf16_tile.h"
#include "f32_tile.h"
#include "linear.h"
#include "linear_neon.h"
#include "matmul.h"
#include "mxfp8.h"
#include "mxfp8_linear.h"
#include "neon_bf16_tile.h"
#include "program.h"
#include "quantize.h"
#include "routing.h"
#include "self_test.h"
#include "swizzle.h"

#include <new>

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

template <class Values>
static int attention_with_sinks(const mxfp4_attention& arguments) {
  if (!Attention<Values>::takes(arguments.size)) return ENOTSUP;
  try {
    Attention<Values>(arguments).run();
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
  return 0;
}

}  // namespace mxfp4

extern "C" int mxfp4_attention_with_sinks(const mxfp4_attention* arguments) {
  switch (arguments->dtype) {
    case MXFP4_BF16:
      return mxfp4::attention_with_sinks<mxfp4::Bf16Values>(*arguments);
    case MXFP4_F16:
      return mxfp4::attention_with_sinks<mxfp4::F16Values>(*arguments);
    default:
      return mxfp4::attention_with_sinks<mxfp4::F32Values>(*arguments);
  }
}

extern "C" int mxfp4_matmul_ogs(const mxfp4_matmul* arguments) {
  try {
    return mxfp4::matmul_ogs(*arguments);
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}

extern "C" void mxfp4_linears(const mxfp4_linear_group* arguments) {
  switch (arguments->dtype) {
    case MXFP4_BF16:
      return mxfp4::Linears<mxfp4::Held<mxfp4::Bf16Values>>(*arguments, arguments + 1).run();
    case MXFP4_F16:
      return mxfp4::Linears<mxfp4::Held<mxfp4::F16Values>>(*arguments, arguments + 1).run();
    default:
      return mxfp4::Linears<mxfp4::Held<mxfp4::F32Values>>(*arguments, arguments + 1).run();
  }
}

extern "C" int mxfp4_run(const mxfp4_program* program, const int64_t* slots) {
  return mxfp4::Program(*program, slots).run();
}

extern "C" int mxfp8_linears(const mxfp4_linear_group* arguments) {
  try {
    mxfp4::mxfp8::multiply(*arguments);
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
  return 0;
}

extern "C" void mxfp8_quantize(const void* source, int32_t dtype, int64_t n, int64_t k,
                               int64_t stride, uint8_t* codes, uint8_t* scales, int32_t threads) {
  mxfp4::mxfp8::quantize(source, dtype, n, k, stride, codes, scales, threads);
}

extern "C" void mxfp8_dequantize(const uint8_t* codes, const uint8_t* scales, int64_t n, int64_t k,
                                 int32_t dtype, void* values, int32_t threads) {
  mxfp4::mxfp8::dequantize(codes, scales, n, k, dtype, values, threads);
}

extern "C" int mxfp4_init(int32_t forked) {
  if (forked) mxfp4::forked = true;
#if defined(MXFP4_PATH_AMX)
  if (const int status = mxfp4::amx::request()) return status;
#endif
  try {
    return mxfp4::SelfTest().passes() ? 0 : EDOM;
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}
