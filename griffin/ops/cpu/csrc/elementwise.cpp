// What stands between the larger kernels: sums, copies, other dtypes, the cap of the logits. All contiguous, (n).
#include "elementwise.h"
#include "functions.h"

namespace {

// y = x + z
template <class T>
void add(ParallelFor pool, const T* x, const T* z, T* y, int64_t n) {
  pointwise(pool, n, [&](int64_t j, int64_t lanes) { store(y + j, load(x + j, lanes) + load(z + j, lanes), lanes); });
}

template <class From, class To>
void convert(ParallelFor pool, const From* x, To* y, int64_t n) {
  pointwise(pool, n, [&](int64_t j, int64_t lanes) { store(y + j, load(x + j, lanes), lanes); });
}

}  // namespace

#define ADD_KERNEL(T)                                                                                                 \
  KERNEL(add, T)(ParallelFor pool, const T* x, const T* z, T* y, int64_t n) { add(pool, x, z, y, n); }                \
  EXPORT(add, T)

ADD_KERNEL(float)
ADD_KERNEL(bf16)

// The type is that of y.
KERNEL(convert, float)(ParallelFor pool, const bf16* x, float* y, int64_t n) { convert(pool, x, y, n); }
EXPORT(convert, float)
KERNEL(convert, bf16)(ParallelFor pool, const float* x, bf16* y, int64_t n) { convert(pool, x, y, n); }
EXPORT(convert, bf16)

KERNEL(copy, float)(ParallelFor, const char* from, char* to, int64_t bytes) { std::memcpy(to, from, bytes); }
EXPORT(copy, float)

// y = cap tanh(x / cap) = cap e / (e + 2) with e = e^(2 x / cap) - 1, which does not cancel near 0
KERNEL(soft_cap, float)(ParallelFor pool, const float* x, float* y, int64_t n, float cap) {
  const Vec top = splat(20.0f);  // tanh is +-1 from 9.1 on
  pointwise(pool, n, [&](int64_t j, int64_t lanes) {
    const Vec u = load(x + j, lanes) / splat(cap);
    const Reduced p = reduce(max(-top, min(top, u + u)));
    const Vec e = fma(p.power, p.expm1_r, p.power - splat(1.0f));
    store(y + j, splat(cap) * (e / (e + splat(2.0f))), lanes);
  });
}
EXPORT(soft_cap, float)
