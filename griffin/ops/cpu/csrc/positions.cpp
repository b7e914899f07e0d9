// Where the next token of each row stands, and the angles of rope there.
#include "kernel.h"

namespace {

constexpr int64_t TOKENS = 16;  // of a task

}  // namespace

// positions[b] = position[b]++;  reset[b] = positions[b] == 0. After the last int64 comes the first, as in PyTorch.
KERNEL(next_positions, float)(ParallelFor, int64_t* position, int64_t* positions, uint8_t* reset, int64_t B) {
  for (int64_t b = 0; b < B; ++b) {
    positions[b] = position[b];
    position[b] = static_cast<int64_t>(static_cast<uint64_t>(position[b]) + 1);
    reset[b] = positions[b] == 0;
  }
}
EXPORT(next_positions, float)

// cos[n, i], sin[n, i] of position[n] base^(-i / half), i < half: angles in fp64, results in fp32.
KERNEL(rope_table, float)
(ParallelFor pool, const int64_t* positions, float* cos, float* sin, int64_t N, int64_t half, double base) {
  parallel(pool, pieces(N, TOKENS), TOKENS * half * 16, [&](int64_t task) {
    for (int64_t i = 0; i < half; ++i) {
      const double frequency = __builtin_pow(base, -static_cast<double>(i) / static_cast<double>(half));
      for (int64_t n = task * TOKENS; n < smaller(N, (task + 1) * TOKENS); ++n) {
        const double angle = static_cast<double>(positions[n]) * frequency;
        cos[n * half + i] = static_cast<float>(__builtin_cos(angle));
        sin[n * half + i] = static_cast<float>(__builtin_sin(angle));
      }
    }
  });
}
EXPORT(rope_table, float)
