// mxfp4_init.
#include <cerrno>
#include <new>

#include "api.h"
#include "self_test.h"

#if defined(MXFP4_PATH_AMX)
#include "amx_units.h"
#endif

extern "C" int mxfp4_init(int32_t forked) {
  if (const int status = mxfp4_init_weights(forked)) return status;
#if defined(MXFP4_PATH_AMX)
  if (const int status = mxfp4::amx::request()) return status;
#endif
  try {
    return mxfp4::SelfTest().passes() ? 0 : EDOM;
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}
