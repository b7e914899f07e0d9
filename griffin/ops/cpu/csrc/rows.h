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

struct Added {  // where sums are added to
  float value;
};
INLINE void put(Added* y, float value) { y->value += value; }

// Four sums of a row of y, and four of the next, `row` further on.
INLINE void put(float* y, int64_t row, Quad one, Quad two) {
  std::memcpy(y, &one, sizeof one);
  std::memcpy(y + row, &two, sizeof two);
}
INLINE void put(Added* y, int64_t row, Quad one, Quad two) {
  Quad before[2];
  std::memcpy(before, y, sizeof one);
  std::memcpy(before + 1, y + row, sizeof two);
  put(&y->value, row, before[0] + one, before[1] + two);
}
INLINE void put(bf16* y, int64_t row, Quad one, Quad two) {
  bf16 both[LANES];
  store(both, Vec{one[0], one[1], one[2], one[3], two[0], two[1], two[2], two[3]});
  std::memcpy(y, both, sizeof both / 2);
  std::memcpy(y + row, both + 4, sizeof both / 2);
}

// How far ahead of the bytes being used to ask for more: by whole tiles where rows are short, else within the row.
inline int64_t prefetch_distance(int64_t row_bytes) {
  return row_bytes <= 4096 ? pieces(3072, 4 * larger(1, row_bytes)) * 4 * row_bytes : 2048;
}

constexpr int64_t LINE = 64;  // bytes

INLINE void soon(const void* address) { __builtin_prefetch(address, 0, 2); }

// What to ask memory for while sums are made: rows m with m % shares == share of M of them from `from` on. It is asked
// for as far as the second cache: a core can wait for two dozen lines to reach its first one, and for twice as many
// that the second fetches.
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
    for (int64_t m = ahead.share; m < M; m += ahead.shares) soon(ahead.from + m * row + k);
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

#if defined(__AVX512BF16__)
// The same of bf16 with bf16: an instruction takes 32 inputs, two products to a lane.
template <int M, int N>
INLINE void dots(const bf16* w, int64_t row, const bf16* x, int64_t K, int64_t count, const Ahead<bf16>& ahead,
                 Wide (&acc)[M][N]) {
  constexpr int64_t STEP = LINE / sizeof(bf16);
  const auto load_pairs = [](const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); };
  const auto add = [&](auto load, int64_t k) __attribute__((always_inline)) {
    __m512bh v[N];
    for (int n = 0; n < N; ++n) v[n] = load(x + n * K + k);
    for (int m = 0; m < M; ++m) {
      const __m512bh weights = load(w + m * row + k);
      for (int n = 0; n < N; ++n) acc[m][n] = (Wide)_mm512_dpbf16_ps((__m512)acc[m][n], weights, v[n]);
    }
  };
  int64_t k = 0;
  for (; k + STEP <= count; k += STEP) {
    for (int64_t m = ahead.share; m < M; m += ahead.shares) soon(ahead.from + m * row + k);
    add(load_pairs, k);
  }
  if (k < count) {
    const __mmask32 some = (1u << (count - k)) - 1;
    add([&](const bf16* p) { return (__m512bh)_mm512_maskz_loadu_epi16(some, p); }, k);
  }
}
#endif

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
