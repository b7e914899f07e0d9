// Channel pairs (i, i + n) of each head turned by the table's angle, i < n; contract in griffin/ops/rope.py.
//
//     y_i = x_i cos_i - x_{i+n} sin_i    y_{i+n} = x_{i+n} cos_i + x_i sin_i    (inverse: with -sin)
//
// x, y (N, H, K) of type T, cos, sin (N, n) fp32, N = B T, all contiguous. A task is one token.
#include "kernel.h"
#include "vec.h"

namespace {

template <class T>
void turn(ParallelFor pool, const T* x, const float* cos, const float* sin, T* y, int64_t N, int64_t H, int64_t K,
          int64_t n, bool inverse) {
  const Vec sign = splat(inverse ? -1.0f : 1.0f);
  parallel(pool, N, H * K / 2, [&](int64_t token) {
    for (int64_t h = 0; h < H; ++h) {
      const T* in = x + (token * H + h) * K;
      T* out = y + (token * H + h) * K;
      for (int64_t i = 0; i < n; i += LANES) {
        const int64_t lanes = smaller(LANES, n - i);
        const Vec c = load(cos + token * n + i, lanes), s = sign * load(sin + token * n + i, lanes);
        const Vec first = load(in + i, lanes), second = load(in + n + i, lanes);
        store(out + i, first * c - second * s, lanes);
        store(out + n + i, second * c + first * s, lanes);
      }
      std::memcpy(out + 2 * n, in + 2 * n, (K - 2 * n) * sizeof(T));
    }
  });
}

}  // namespace

#define ROPE_KERNELS(T)                                                                                               \
  KERNEL(rope, T)                                                                                                     \
  (ParallelFor pool, const T* x, const float* cos, const float* sin, T* y, int64_t N, int64_t H, int64_t K,           \
   int64_t n, int64_t inverse) {                                                                                      \
    turn<T>(pool, x, cos, sin, y, N, H, K, n, inverse);                                                               \
  }                                                                                                                    \
  EXPORT(rope, T)

ROPE_KERNELS(float)
ROPE_KERNELS(bf16)
