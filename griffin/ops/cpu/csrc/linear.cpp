// y = x W^T + b, W in fp32 or bf16, for any number of rows of x: one of them is bound by reading W once, hundreds by
// the products.
//
//     y[n, o] = b[o] + sum over k of x[n, k] w[o, k]        fp32 sums, rounded once to the type of y
//
// All tensors are contiguous: x (N, K), W (O, K), b (O) or null, y (N, O). X is the type of x.
//
// A task is ROWS rows of W and as many rows of x as half of a core's cache holds. W goes through it in tiles of 4 rows,
// each against SOME rows of x, PASS at a time, a span of inputs after the other: after the first pass the span of W is in
// the nearest cache. A sum runs over k in WIDE lanes, in one order whatever N, the tile or the thread: a row gives the
// same bits alone as among any others.
#include "kernel.h"
#include "rows.h"
#include "vec.h"

namespace {

constexpr int64_t SPAN = 1024;        // the most inputs of a pass, where a tile of W is larger than NEAREST
constexpr int64_t SOME = 16;          // the most rows of x that take turns at a tile, a span after the other
constexpr int64_t NEAREST = 24 << 10;  // bytes of a tile that stay in the nearest cache beside x
constexpr int64_t CACHED = 1 << 19;   // bytes of x that stay in the next one while W goes by

// Call use(Count<N>, n) for every pass over rows n .. n + N - 1 of `rows` rows of x.
template <class Use>
INLINE void passes_over(int64_t rows, const Use& use) {
  int64_t n = 0;
  for (; n + PASS <= rows; n += PASS) use(Count<PASS>(), n);
  if (rows - n == 3 && PASS != 3) use(Count<3>(), n);
  if (rows - n == 2) use(Count<2>(), n);
  if (rows - n == 1) use(Count<1>(), n);
}

// y[n][m] = the sum of acc[m][n] + b[m]
template <int M, int N, class Y>
INLINE void finish(const Wide (&acc)[M][N], const Bias& bias, int64_t o, Y* y, int64_t O) {
  if constexpr (M == 4 && N == 4) {
    Quad four[4], biases;
    for (int m = 0; m < 4; ++m) biases[m] = bias.at(o + m);
    sum_16(acc, four);
    for (int64_t n = 0; n < 4; n += 2) put(y + n * O + o, O, four[n] + biases, four[n + 1] + biases);
  } else {
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) put(y + n * O + o + m, sum(acc[m][n]) + bias.at(o + m));
  }
}

// Rows o .. o + M - 1 of W against N rows of x. While the sums of one tile or span are made, the next one comes.
template <int M, class W, class X, class Y>
INLINE void tile(const W* w, const X* x, const Bias& bias, Y* y, int64_t o, int64_t N, int64_t K, int64_t O) {
  constexpr int64_t STEP = LINE / sizeof(W);
  const int64_t passes = pieces(N, PASS);
  w += o * K;
  if (M * K * static_cast<int64_t>(sizeof(W)) <= NEAREST || N <= PASS) {
    passes_over(N, [&](auto n_count, int64_t n) __attribute__((always_inline)) {
      constexpr int NB = decltype(n_count)::value;
      Wide acc[M][NB] = {};
      dots<M, NB>(w, K, x + n * K, K, K, {w + M * K, n / PASS, passes}, acc);
      finish(acc, bias, o, y + n * O, O);
    });
    return;
  }
  const int64_t span = pieces(pieces(K, pieces(K, SPAN)), STEP) * STEP;
  for (int64_t first = 0; first < N; first += SOME) {
    Wide sums[SOME][M];  // of a pass over rows n ..: acc[m][j] at sums[n] + m * NB + j
    for (int64_t k = 0; k < K; k += span) {
      const W* next = k + span < K ? w + k + span : w + M * K;
      passes_over(smaller(SOME, N - first), [&](auto n_count, int64_t n) __attribute__((always_inline)) {
        constexpr int NB = decltype(n_count)::value;
        Wide acc[M][NB] = {};
        if (k > 0) std::memcpy(acc, sums[n], sizeof acc);
        const int64_t row = first + n;
        dots<M, NB>(w + k, K, x + row * K + k, K, smaller(span, K - k), {next, row / PASS, passes}, acc);
        std::memcpy(sums[n], acc, sizeof acc);
        if (k + span >= K) finish(acc, bias, o, y + row * O, O);
      });
    }
  }
}

template <class W, class X, class Y>
void linear(ParallelFor pool, const X* x, const W* w, Bias bias, Y* y, int64_t N, int64_t K, int64_t O) {
  const int64_t most = larger(SOME, CACHED / larger(1, K * static_cast<int64_t>(sizeof(X))));
  const int64_t rows = pieces(pieces(N, larger(1, pieces(N, most))), SOME) * SOME, panels = pieces(O, ROWS);  // alike
  parallel(pool, pieces(N, larger(1, rows)) * panels, ROWS * K * smaller(N, rows), [&](int64_t task) {
    const int64_t first = task / panels * rows, count = smaller(rows, N - first);
    const int64_t end = smaller(O, (task % panels + 1) * ROWS);
    int64_t o = task % panels * ROWS;
    for (; o + 4 <= end; o += 4) tile<4>(w, x + first * K, bias, y + first * O, o, count, K, O);
    for (; o < end; ++o) tile<1>(w, x + first * K, bias, y + first * O, o, count, K, O);
  });
}

}  // namespace

#define LINEAR_KERNEL(name, X, W, Y)                                                                                   \
  KERNEL(name, X)                                                                                                      \
  (ParallelFor pool, const X* x, const W* w, const void* bias, int64_t bias_is_bf16, Y* y, int64_t N, int64_t K,      \
   int64_t O) {                                                                                                        \
    linear(pool, x, w, {bias, bias_is_bf16 != 0}, y, N, K, O);                                                         \
  }                                                                                                                    \
  EXPORT(name, X)

LINEAR_KERNEL(linear_fp32, float, float, float)
LINEAR_KERNEL(linear_bf16, float, bf16, float)
LINEAR_KERNEL(linear_fp32, bf16, float, bf16)
LINEAR_KERNEL(linear_bf16, bf16, bf16, bf16)
LINEAR_KERNEL(linear_wide, bf16, bf16, float)  // sums as they are: logits, and gradients of fp32 weights
LINEAR_KERNEL(linear_add, bf16, bf16, Added)   // added to what y holds
