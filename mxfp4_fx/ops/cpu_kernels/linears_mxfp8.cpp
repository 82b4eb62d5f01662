// mxfp8_linears.
#include <cerrno>
#include <new>

#include "api.h"
#include "mxfp8_linear.h"

extern "C" int mxfp8_linears(const mxfp4_linear_group* arguments) {
  try {
    mxfp4::mxfp8::multiply(*arguments);
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
  return 0;
}
