// What the loader asks before it uses a kernel. Compiled once, for any CPU.
#include "abi.h"

#define PLAIN extern "C" __attribute__((visibility("default")))

// Add one whenever a kernel's signature or meaning changes, here and in library.py: a stale build is then refused.
PLAIN int32_t griffin_abi_version() { return 8; }

// The instruction set this CPU and this build offer: the suffix of the kernels to call.
PLAIN const char* griffin_instructions() {
#if defined(GRIFFIN_IS_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
    return __builtin_cpu_supports("avx512bf16") ? "avx512bf16" : "avx512";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return "avx2";
#endif
  return "portable";
}

// Calls of kernels that were kept (record.py), made again one after the other. Gives 0, or 1 + the number of the first
// call that refused its whole numbers, which ends it.
struct Call {
  Exported kernel;
  const Value* values;
};

PLAIN int64_t griffin_replay(ParallelFor pool, const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (calls[i].kernel(pool, calls[i].values) != 0) return i + 1;
  return 0;
}
