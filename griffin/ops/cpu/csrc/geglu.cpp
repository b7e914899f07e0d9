// y = gelu_tanh(gate) up, element by element; contract in griffin/ops/gated.py. All (n) of type T, contiguous.
#include "elementwise.h"
#include "functions.h"

namespace {

template <class T>
void forward(ParallelFor pool, const T* gate, const T* up, T* y, int64_t n) {
  pointwise(pool, n, [&](int64_t j, int64_t lanes) {
    store(y + j, gelu(load(gate + j, lanes)) * load(up + j, lanes), lanes);
  });
}

// dup = dy gelu(gate);  dgate = dy up gelu'(gate)
template <class T>
void backward(ParallelFor pool, const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
  pointwise(pool, n, [&](int64_t j, int64_t lanes) {
    const Vec g = load(dy + j, lanes), x = load(gate + j, lanes), s = gelu_sigmoid(x);
    store(dup + j, g * (x * s), lanes);
    store(dgate + j, g * load(up + j, lanes) * gelu_slope(x, s), lanes);
  });
}

}  // namespace

#define GEGLU_KERNELS(T)                                                                                              \
  KERNEL(geglu_forward, T)(ParallelFor pool, const T* gate, const T* up, T* y, int64_t n) {                           \
    forward<T>(pool, gate, up, y, n);                                                                                 \
  }                                                                                                                   \
  EXPORT(geglu_forward, T)                                                                                            \
  KERNEL(geglu_backward, T)                                                                                           \
  (ParallelFor pool, const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {                          \
    backward<T>(pool, dy, gate, up, dgate, dup, n);                                                                   \
  }                                                                                                                    \
  EXPORT(geglu_backward, T)

GEGLU_KERNELS(float)
GEGLU_KERNELS(bf16)
