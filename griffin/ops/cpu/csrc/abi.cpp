// What the loader asks before it uses a kernel. Compiled once, for any CPU.
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Add one whenever a kernel's signature or meaning changes, here and in library.py: a stale build is then refused.
EXPORT int32_t griffin_abi_version() { return 2; }

// The instruction set this CPU and this build offer: the suffix of the kernels to call.
EXPORT const char* griffin_instructions() {
#if defined(GRIFFIN_HAS_AVX2)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return "avx2";
#endif
  return "portable";
}
