// What the linears share: tiles of rows of W against rows of x, and where their sums go.
#pragma once

#include "kernel.h"
#include "vec.h"

namespace {

constexpr int64_t ROWS = 16;  // rows of W of a task
#if defined(__AVX512VL__)
constexpr int64_t PASS = 4;  // rows of x that meet 4 rows of W at a time: their sums fill half of 32 registers
#else
constexpr int64_t PASS = 3;
#endif

template <int VALUE>
struct Count {
  static constexpr int value = VALUE;
};

INLINE float number(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

INLINE float as_number(float v) { return v; }
INLINE float as_number(bf16 v) { return number(v); }

struct Bias {
  const void* values;  // fp32 or bf16, or null
  bool is_bf16;

  float at(int64_t o) const {
    if (values == nullptr) return 0.0f;
    if (!is_bf16) return static_cast<const float*>(values)[o];
    return number(static_cast<const bf16*>(values)[o]);
  }
};

INLINE void put(float* y, float value) { *y = value; }
INLINE void put(bf16* y, float value) { store(y, splat(value), 1); }

// How far ahead of the bytes being used to ask for more: the next tile where rows are short, else within the row.
inline int64_t prefetch_distance(int64_t row_bytes) { return row_bytes <= 4096 ? 4 * row_bytes : 1024; }

constexpr int64_t LINE = 64;  // bytes

// What to ask memory for while sums are made: rows m with m % shares == share of M of them from `from` on.
template <class W>
struct Ahead {
  const W* from;
  int64_t share, shares;
};

// acc[m][n] += w[m] . x[n] over `count` inputs, for M rows of W, `row` apart, and N rows of x, K apart.
template <int M, int N, class W, class X>
INLINE void dots(const W* w, int64_t row, const X* x, int64_t K, int64_t count, const Ahead<W>& ahead,
                 Wide (&acc)[M][N]) {
  constexpr int64_t STEP = LINE / sizeof(W);
  int64_t k = 0;
  for (; k + STEP <= count; k += STEP) {
    for (int64_t m = ahead.share; m < M; m += ahead.shares) __builtin_prefetch(ahead.from + m * row + k);
#pragma GCC unroll 4
    for (int64_t j = k; j < k + STEP; j += WIDE) {
      Wide v[N];
      for (int n = 0; n < N; ++n) v[n] = load_wide(x + n * K + j);
      for (int m = 0; m < M; ++m) {
        const Wide weights = load_wide(w + m * row + j);
        for (int n = 0; n < N; ++n) acc[m][n] = fma(weights, v[n], acc[m][n]);
      }
    }
  }
  for (; k < count; k += WIDE) {
    const int64_t lanes = smaller(WIDE, count - k);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        acc[m][n] = fma(load_wide(w + m * row + k, lanes), load_wide(x + n * K + k, lanes), acc[m][n]);
  }
}

// Call tile(Count<M>, Count<N>, o, n) so that rows o .. o+M-1 of W meet rows n .. n+N-1 of x, every pair once.
template <class Tile>
void for_row_tiles(ParallelFor pool, int64_t O, int64_t N, int64_t K, const Tile& tile) {
  parallel(pool, pieces(O, ROWS), ROWS * K, [&](int64_t task) {
    const int64_t end = smaller(O, (task + 1) * ROWS);
    int64_t o = task * ROWS;
    const auto with_rows = [&](auto m_count) {
      int64_t n = 0;
      for (; n + PASS <= N; n += PASS) tile(m_count, Count<PASS>(), o, n);
      if (N - n == 3) tile(m_count, Count<3>(), o, n);
      if (N - n == 2) tile(m_count, Count<2>(), o, n);
      if (N - n == 1) tile(m_count, Count<1>(), o, n);
    };
    for (; o + 4 <= end; o += 4) with_rows(Count<4>());
    for (; o < end; ++o) with_rows(Count<1>());
  });
}

}  // namespace
