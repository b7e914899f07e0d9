// y = x rstd (1 + weight), rstd = 1 / sqrt(mean(x^2) + eps); contract in griffin/ops/norm.py.
//
// x, y (N, D) of type T, weight (D) and rstd (N) fp32, all contiguous. A task is a few whole rows.
#include "kernel.h"
#include "vec.h"

namespace {

constexpr int64_t ROWS = 16;  // of a backward task: what they give to dweight is summed before it is written

// sum over c of f(c, lanes), four vectors at a time so that additions need not wait for each other
template <class F>
INLINE float sum_over(int64_t n, const F& f) {
  Vec sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * LANES <= n; c += 4 * LANES) {
    for (int64_t k = 0; k < 4; ++k) sums[k] += f(c + k * LANES, LANES);
  }
  for (; c < n; c += LANES) sums[0] += f(c, smaller(LANES, n - c));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void forward(ParallelFor pool, const T* x, const float* weight, T* y, float* rstd, int64_t N, int64_t D, float eps) {
  parallel(pool, N, D / 2, [&](int64_t row) {
    const T* in = x + row * D;
    const float squares = sum_over(D, [&](int64_t c, int64_t lanes) {
      const Vec v = load(in + c, lanes);
      return v * v;
    });
    const float scale = 1.0f / __builtin_sqrtf(squares / (float)D + eps);
    rstd[row] = scale;
    for (int64_t c = 0; c < D; c += LANES) {
      const int64_t lanes = smaller(LANES, D - c);
      const Vec normed = load(in + c, lanes) * splat(scale);
      store(y + row * D + c, normed * (splat(1.0f) + load(weight + c, lanes)), lanes);
    }
  });
}

// With n = x rstd and u = dy (1 + weight):  dx = rstd (u - n mean(u n)),  dweight = sum over rows of dy n.
// shares (ceil(N / ROWS), D) fp32 is scratch: each task's part of dweight; they are added in order at the end.
template <class T>
void backward(ParallelFor pool, const T* dy, const T* x, const float* weight, const float* rstd, T* dx, float* shares,
              float* dweight, int64_t N, int64_t D) {
  const int64_t tasks = pieces(N, ROWS);
  parallel(pool, tasks, ROWS * D, [&](int64_t task) {
    float* share = shares + task * D;
    for (int64_t row = task * ROWS; row < smaller(N, (task + 1) * ROWS); ++row) {
      const T* in = x + row * D;
      const T* flow = dy + row * D;
      const Vec scale = splat(rstd[row]);
      const float products = sum_over(D, [&](int64_t c, int64_t lanes) {
        return load(flow + c, lanes) * (splat(1.0f) + load(weight + c, lanes)) * (load(in + c, lanes) * scale);
      });
      const Vec mean = splat(products / (float)D);
      for (int64_t c = 0; c < D; c += LANES) {
        const int64_t lanes = smaller(LANES, D - c);
        const Vec normed = load(in + c, lanes) * scale, g = load(flow + c, lanes);
        store(dx + row * D + c, scale * (g * (splat(1.0f) + load(weight + c, lanes)) - normed * mean), lanes);
        const Vec so_far = row == task * ROWS ? splat(0.0f) : load(share + c, lanes);
        store(share + c, fma(g, normed, so_far), lanes);
      }
    }
  });
  parallel(pool, pieces(D, 64), tasks * 64, [&](int64_t block) {
    const int64_t end = smaller(D, (block + 1) * 64);
    for (int64_t c = block * 64; c < end; c += LANES) {
      const int64_t lanes = smaller(LANES, end - c);
      Vec sum = splat(0.0f);
      for (int64_t task = 0; task < tasks; ++task) sum += load(shares + task * D + c, lanes);
      store(dweight + c, sum, lanes);
    }
  });
}

}  // namespace

#define RMS_NORM_KERNELS(T)                                                                                           \
  KERNEL(rms_norm_forward, T)                                                                                         \
  (ParallelFor pool, const T* x, const float* weight, T* y, float* rstd, int64_t N, int64_t D, float eps) {           \
    forward<T>(pool, x, weight, y, rstd, N, D, eps);                                                                  \
  }                                                                                                                   \
  EXPORT(rms_norm_forward, T)                                                                                         \
  KERNEL(rms_norm_backward, T)                                                                                        \
  (ParallelFor pool, const T* dy, const T* x, const float* weight, const float* rstd, T* dx, float* shares,           \
   float* dweight, int64_t N, int64_t D) {                                                                            \
    backward<T>(pool, dy, x, weight, rstd, dx, shares, dweight, N, D);                                                \
  }                                                                                                                    \
  EXPORT(rms_norm_backward, T)

RMS_NORM_KERNELS(float)
RMS_NORM_KERNELS(bf16)
