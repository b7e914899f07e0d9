// y[n, b, j] = bias[b, j] + sum over i of x[n, b, i] w[b, i, j]: the gates of a few tokens, block by block.
//
// x, y (N, blocks, I) of type X, w (blocks, I, I) and bias (blocks, I) of type W, all contiguous. fp32 sums in the order
// of i, rounded once. A task is COLUMNS columns of one block, for all tokens: the weights are read once.
#include "kernel.h"
#include "rows.h"
#include "vec.h"

namespace {

constexpr int64_t VECS = 4, COLUMNS = VECS * LANES;

template <int N, class X, class W>
INLINE void product(const X* x, const W* w, const W* bias, X* y, int64_t stride, int64_t I, int64_t columns) {
  Vec acc[N][VECS];
  const auto lanes = [&](int64_t v) { return larger(0, smaller(LANES, columns - v * LANES)); };
  for (int64_t v = 0; v < VECS; ++v)
    for (int n = 0; n < N; ++n) acc[n][v] = lanes(v) > 0 ? load(bias + v * LANES, lanes(v)) : splat(0.0f);
  if (columns == COLUMNS) {
    for (int64_t i = 0; i < I; ++i)
      for (int64_t v = 0; v < VECS; ++v) {
        const Vec weights = load(w + i * I + v * LANES);
        for (int n = 0; n < N; ++n) acc[n][v] = fma(splat(as_number(x[n * stride + i])), weights, acc[n][v]);
      }
  } else {
    for (int64_t i = 0; i < I; ++i)
      for (int64_t v = 0; v < VECS && lanes(v) > 0; ++v) {
        const Vec weights = load(w + i * I + v * LANES, lanes(v));
        for (int n = 0; n < N; ++n) acc[n][v] = fma(splat(as_number(x[n * stride + i])), weights, acc[n][v]);
      }
  }
  for (int n = 0; n < N; ++n)
    for (int64_t v = 0; v < VECS && lanes(v) > 0; ++v) store(y + n * stride + v * LANES, acc[n][v], lanes(v));
}

template <class X, class W>
void gates(ParallelFor pool, const X* x, const W* w, const W* bias, X* y, int64_t N, int64_t blocks, int64_t I) {
  const int64_t tiles = pieces(I, COLUMNS), stride = blocks * I;
  parallel(pool, blocks * tiles, N * I * COLUMNS, [&](int64_t task) {
    const int64_t b = task / tiles, j = task % tiles * COLUMNS, columns = smaller(COLUMNS, I - j);
    const X* in = x + b * I;
    const W *weights = w + b * I * I + j, *biases = bias + b * I + j;
    X* out = y + b * I + j;
    int64_t n = 0;
    for (; n + 2 <= N; n += 2) product<2>(in + n * stride, weights, biases, out + n * stride, stride, I, columns);
    if (n < N) product<1>(in + n * stride, weights, biases, out + n * stride, stride, I, columns);
  });
}

}  // namespace

#define GATES_KERNELS(X)                                                                                              \
  KERNEL(gates_fp32, X)                                                                                               \
  (ParallelFor pool, const X* x, const float* w, const float* bias, X* y, int64_t N, int64_t blocks, int64_t I) {     \
    gates(pool, x, w, bias, y, N, blocks, I);                                                                         \
  }                                                                                                                   \
  EXPORT(gates_fp32, X)                                                                                               \
  KERNEL(gates_bf16, X)                                                                                               \
  (ParallelFor pool, const X* x, const bf16* w, const bf16* bias, X* y, int64_t N, int64_t blocks, int64_t I) {       \
    gates(pool, x, w, bias, y, N, blocks, I);                                                                         \
  }                                                                                                                   \
  EXPORT(gates_bf16, X)

GATES_KERNELS(float)
GATES_KERNELS(bf16)
