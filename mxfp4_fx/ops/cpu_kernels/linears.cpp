// mxfp4_linears.
#include "api.h"
#include "linear.h"
#include "linear_neon.h"

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
