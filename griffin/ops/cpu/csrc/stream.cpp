// Reads memory as fast as it comes: the limit that kernels bound by memory are measured against.
#include "kernel.h"
#include "vec.h"

// totals[i] = a sum of the words of the i-th 64 KB; bytes is a multiple of that.
KERNEL(stream, float)(ParallelFor pool, const int32_t* p, int32_t* totals, int64_t bytes) {
  constexpr int64_t PIECE = 1 << 16;
  parallel(pool, bytes / PIECE, PIECE, [&](int64_t task) {
    const char* from = reinterpret_cast<const char*>(p) + task * PIECE;
    Int acc[4] = {};
    for (int64_t at = 0; at < PIECE; at += 128) {
      for (int j = 0; j < 4; ++j) {
        __builtin_prefetch(from + at + 32 * j + 1024);
        Int v;
        std::memcpy(&v, from + at + 32 * j, sizeof v);
        acc[j] += v;
      }
    }
    const Int all = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    int32_t total = 0;
    for (int j = 0; j < LANES; ++j) total ^= all[j];
    totals[task] = total;
  });
}
EXPORT(stream, float)
