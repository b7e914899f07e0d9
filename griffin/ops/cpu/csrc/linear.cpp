// y = x W^T + b for up to 16 rows of x, W in fp32 or bf16: what a decode step does, and bound by reading W once.
//
//     y[n, o] = b[o] + sum over k of x[n, k] w[o, k]        fp32 sums, rounded once to the type of y
//
// All tensors are contiguous: x (N, K), W (O, K), b (O) or null, y (N, O). X is the type of x and y.
//
// A task is ROWS rows of W, in tiles of 4. A tile is multiplied with PASS rows of x at a time, a span of inputs after the
// other: after the first pass the span is in the cache. A sum runs over k in WIDE lanes, in one order whatever N, the
// tile or the thread: a row gives the same bits alone as in a batch.
#include "kernel.h"
#include "rows.h"
#include "vec.h"

namespace {

constexpr int64_t SPAN = 1024, MOST = 16;  // the most inputs of a pass over all rows of x; the most rows of x

// sums[n][m] += a span of M rows of W times one of N rows of x, PASS of them at a time.
template <int M, class W, class X>
INLINE void add_span(const W* w, const X* x, int64_t N, int64_t K, int64_t count, Ahead<W> ahead, Wide* sums) {
  for (int64_t n = 0; n < N; n += PASS, ++ahead.share) {
    const auto rows = [&](auto n_count) __attribute__((always_inline)) {
      constexpr int NB = decltype(n_count)::value;
      Wide part[M][NB];
      for (int m = 0; m < M; ++m)
        for (int j = 0; j < NB; ++j) part[m][j] = sums[(n + j) * M + m];
      dots<M, NB>(w, K, x + n * K, K, count, ahead, part);
      for (int m = 0; m < M; ++m)
        for (int j = 0; j < NB; ++j) sums[(n + j) * M + m] = part[m][j];
    };
    const int64_t left = smaller(N - n, PASS);
    if (left == PASS) rows(Count<PASS>());
    if (left == 3 && PASS != 3) rows(Count<3>());
    if (left == 2) rows(Count<2>());
    if (left == 1) rows(Count<1>());
  }
}

// A tile of M rows of W against all N rows of x, a span of inputs at a time: while the sums of one span are made, the
// next one comes from memory.
template <int M, class W, class X>
INLINE void tile(const W* w, const X* x, Bias bias, X* y, int64_t o, int64_t N, int64_t K, int64_t O) {
  constexpr int64_t STEP = LINE / sizeof(W);
  Wide sums[MOST * M];
  for (int64_t i = 0; i < N * M; ++i) sums[i] = Wide{};
  const int64_t passes = pieces(N, PASS), span = pieces(pieces(K, pieces(K, SPAN)), STEP) * STEP;
  for (int64_t k = 0; k < K; k += span) {
    const int64_t count = smaller(span, K - k);
    const W* next = k + span < K ? w + k + span : w + M * K;
    add_span<M>(w + k, x + k, N, K, count, {next, 0, passes}, sums);
  }
  for (int64_t n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) put(y + n * O + o + m, sum(sums[n * M + m]) + bias.at(o + m));
}

template <class W, class X>
void linear(ParallelFor pool, const X* x, const W* w, Bias bias, X* y, int64_t N, int64_t K, int64_t O) {
  parallel(pool, pieces(O, ROWS), ROWS * K, [&](int64_t task) {
    const int64_t end = smaller(O, (task + 1) * ROWS);
    int64_t o = task * ROWS;
    for (; o + 4 <= end; o += 4) tile<4>(w + o * K, x, bias, y, o, N, K, O);
    for (; o < end; ++o) tile<1>(w + o * K, x, bias, y, o, N, K, O);
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
