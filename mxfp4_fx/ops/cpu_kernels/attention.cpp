// mxfp4_attention_with_sinks.
#include "attention.h"

#include <cerrno>
#include <new>

#include "api.h"

namespace mxfp4 {

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
