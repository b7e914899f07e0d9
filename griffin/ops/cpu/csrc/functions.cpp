// The functions of functions.h one by one, for tests of their accuracy. y[j] = f(x[j]).
#include "functions.h"
#include "kernel.h"

namespace {

template <class Function>
void map(const float* x, float* y, int64_t n, Function f) {
  for (int64_t j = 0; j < n; j += LANES) {
    const int64_t lanes = smaller(LANES, n - j);
    store(y + j, f(load(x + j, lanes)), lanes);
  }
}

}  // namespace

KERNEL(exp, float)(ParallelFor, const float* x, float* y, int64_t n) {
  map(x, y, n, [](Vec v) { return exp(v); });
}
EXPORT(exp, float)
KERNEL(one_minus_exp, float)(ParallelFor, const float* x, float* y, int64_t n) {
  map(x, y, n, [](Vec v) { return decay(v).one_minus_a; });
}
EXPORT(one_minus_exp, float)
KERNEL(log1p, float)(ParallelFor, const float* x, float* y, int64_t n) {
  map(x, y, n, [](Vec v) { return log1p(v); });
}
EXPORT(log1p, float)
KERNEL(sigmoid, float)(ParallelFor, const float* x, float* y, int64_t n) {
  map(x, y, n, [](Vec v) { return sigmoid(v); });
}
EXPORT(sigmoid, float)
KERNEL(softplus, float)(ParallelFor, const float* x, float* y, int64_t n) {
  map(x, y, n, [](Vec v) { return softplus(v); });
}
EXPORT(softplus, float)
KERNEL(gelu, float)(ParallelFor, const float* x, float* y, int64_t n) {
  map(x, y, n, [](Vec v) { return gelu(v); });
}
EXPORT(gelu, float)
