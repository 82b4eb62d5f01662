// mxfp4_run.
#include "program.h"

#include "api.h"

extern "C" int mxfp4_run(const mxfp4_program* program, const int64_t* slots) {
  return mxfp4::Program(*program, slots).run();
}
