// to (C, R) = from (R, C) turned round, in bf16: products of bf16 sum over neighbours, and a gradient sums over rows.
#include "kernel.h"
#include "rows.h"
#include "vec.h"

namespace {

constexpr int64_t SIDE = 32;

template <class X>
void transpose(ParallelFor pool, const X* from, bf16* to, int64_t R, int64_t C) {
  const int64_t down = pieces(R, SIDE);
  parallel(pool, pieces(C, SIDE) * down, SIDE * SIDE, [&](int64_t task) {
    const int64_t c = task / down * SIDE, r = task % down * SIDE;
    const int64_t rows = smaller(SIDE, R - r), columns = smaller(SIDE, C - c);
    bf16 block[SIDE][SIDE];
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += LANES) {
        const int64_t lanes = smaller(LANES, columns - j);
        store(&block[i][j], load(from + (r + i) * C + c + j, lanes), lanes);
      }
    for (int64_t j = 0; j < columns; ++j) {
      bf16* row = to + (c + j) * R + r;
      if (rows == SIDE) {
        for (int64_t i = 0; i < SIDE; ++i) row[i] = block[i][j];
      } else {
        for (int64_t i = 0; i < rows; ++i) row[i] = block[i][j];
      }
    }
  });
}

}  // namespace

KERNEL(transpose, float)(ParallelFor pool, const float* from, bf16* to, int64_t R, int64_t C) {
  transpose(pool, from, to, R, C);
}
EXPORT(transpose, float)
KERNEL(transpose, bf16)(ParallelFor pool, const bf16* from, bf16* to, int64_t R, int64_t C) {
  transpose(pool, from, to, R, C);
}
EXPORT(transpose, bf16)
