// Element by element: how such a formula is shared among threads.
#pragma once

#include "kernel.h"
#include "vec.h"

namespace {

constexpr int64_t BLOCK = 2048;  // elements of a task

// task(j, lanes) for every vector of n elements
template <class Task>
INLINE void pointwise(ParallelFor pool, int64_t n, const Task& task) {
  parallel(pool, pieces(n, BLOCK), BLOCK, [&](int64_t block) {
    const int64_t end = smaller(n, (block + 1) * BLOCK);
    for (int64_t j = block * BLOCK; j < end; j += LANES) task(j, smaller(LANES, end - j));
  });
}

}  // namespace
