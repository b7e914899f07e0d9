// y = x W^T + b for up to 16 rows of x, W in fp32 or bf16: what a decode step does, and bound by reading W once.
//
//     y[n, o] = b[o] + sum over k of x[n, k] w[o, k]        fp32 sums, rounded once to the type of y
//
// All tensors are contiguous: x (N, K), W (O, K), b (O) or null, y (N, O). X is the type of x and y.
//
// A task is ROWS rows of W. Each tile of 4 of them is multiplied with 3 rows of x at a time: after the first pass those
// rows of W are in the cache. A sum runs over k in eight lanes, in one order whatever N, the tile or the thread: a row
// gives the same bits alone as in a batch.
#include "kernel.h"
#include "rows.h"
#include "vec.h"

namespace {

template <class W, class X>
void linear(ParallelFor pool, const X* x, const W* w, Bias bias, X* y, int64_t N, int64_t K, int64_t O) {
  const int64_t ahead = prefetch_distance(K * sizeof(W));
  for_row_tiles(pool, O, N, K, [&](auto m_count, auto n_count, int64_t o, int64_t n) {
    constexpr int M = decltype(m_count)::value, NB = decltype(n_count)::value;
    Vec acc[M][NB] = {};
    dots<M, NB>(w + o * K, K, x + n * K, K, ahead, acc);
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NB; ++j) put(y + (n + j) * O + o + m, sum(acc[m][j]) + bias.at(o + m));
  });
}

}  // namespace

#define LINEAR_KERNELS(X)                                                                                              \
  KERNEL(linear_fp32, X)                                                                                               \
  (ParallelFor pool, const X* x, const float* w, const void* bias, int64_t bias_is_bf16, X* y, int64_t N, int64_t K,  \
   int64_t O) {                                                                                                        \
    linear(pool, x, w, {bias, bias_is_bf16 != 0}, y, N, K, O);                                                         \
  }                                                                                                                    \
  EXPORT(linear_fp32, X)                                                                                               \
  KERNEL(linear_bf16, X)                                                                                               \
  (ParallelFor pool, const X* x, const bf16* w, const void* bias, int64_t bias_is_bf16, X* y, int64_t N, int64_t K,   \
   int64_t O) {                                                                                                        \
    linear(pool, x, w, {bias, bias_is_bf16 != 0}, y, N, K, O);                                                         \
  }                                                                                                                    \
  EXPORT(linear_bf16, X)

LINEAR_KERNELS(float)
LINEAR_KERNELS(bf16)
