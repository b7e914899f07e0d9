// h_t = a_t h_{t-1} + x_t, forward and backward; contract in griffin/ops/scan.py.
//
// x, a, y (B, T, R) of type T; h0, h_last (B, R) fp32; states (B, ceil(T / 64), R) fp32; all contiguous.
// A task is one row and up to BLOCK channels: time runs inside it, vectors lie across channels, the state stays in L1.
#include "kernel.h"
#include "vec.h"

namespace {

constexpr int64_t CHUNK = 64;
constexpr int64_t BLOCK = 256;  // channels of a task, at most

template <class T>
void forward(ParallelFor pool, const T* x, const T* a, const float* h0, T* y, float* h_last, int64_t B, int64_t time,
             int64_t R, int64_t threads) {
  const int64_t block = channels_per_task(B, R, threads, BLOCK), blocks = pieces(R, block);
  parallel(pool, B * blocks, time * block, [&](int64_t task) {
    const int64_t b = task / blocks, first = task % blocks * block, n = smaller(block, R - first);
    float h[BLOCK];
    std::memcpy(h, h0 + b * R + first, n * sizeof(float));
    for (int64_t t = 0; t < time; ++t) {
      const int64_t at = (b * time + t) * R + first;
      for (int64_t c = 0; c < n; c += LANES) {
        const int64_t lanes = smaller(LANES, n - c);
        const Vec next = fma(load(a + at + c, lanes), load(h + c, lanes), load(x + at + c, lanes));
        store(h + c, next, lanes);
        store(y + at + c, next, lanes);
      }
    }
    std::memcpy(h_last + b * R + first, h, n * sizeof(float));
  });
}

// With g_t = dy_t + a_{t+1} g_{t+1}:  dx = g,  da = g h_{t-1},  dh0 = a_1 g_1.
// First over all of time, to put the state before each chunk into `states` (scratch); then chunks from the last to the
// first, the states of each recomputed: memory for states is T / 64 of them and one chunk.
template <class T>
void backward(ParallelFor pool, const T* dy, const float* dh_last, const T* x, const T* a, const float* h0,
              float* states, T* dx, T* da, float* dh0, int64_t B, int64_t time, int64_t R, int64_t threads) {
  const int64_t block = channels_per_task(B, R, threads, BLOCK), blocks = pieces(R, block);
  const int64_t chunks = pieces(time, CHUNK);
  parallel(pool, B * blocks, 2 * time * block, [&](int64_t task) {
    const int64_t b = task / blocks, first = task % blocks * block, n = smaller(block, R - first);
    float h[BLOCK], flow[BLOCK], before[CHUNK][BLOCK];  // flow = a_{t+1} g_{t+1}
    const auto step = [&](int64_t t) {
      const int64_t at = (b * time + t) * R + first;
      for (int64_t c = 0; c < n; c += LANES) {
        const int64_t lanes = smaller(LANES, n - c);
        store(h + c, fma(load(a + at + c, lanes), load(h + c, lanes), load(x + at + c, lanes)), lanes);
      }
    };
    std::memcpy(h, h0 + b * R + first, n * sizeof(float));
    for (int64_t t = 0; t < time; ++t) {
      if (t % CHUNK == 0) std::memcpy(states + (b * chunks + t / CHUNK) * R + first, h, n * sizeof(float));
      step(t);
    }
    std::memcpy(flow, dh_last + b * R + first, n * sizeof(float));
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * CHUNK, count = smaller(CHUNK, time - begin);
      std::memcpy(h, states + (b * chunks + chunk) * R + first, n * sizeof(float));
      for (int64_t j = 0; j < count; ++j) {
        std::memcpy(before[j], h, n * sizeof(float));
        step(begin + j);
      }
      for (int64_t j = count - 1; j >= 0; --j) {
        const int64_t at = (b * time + begin + j) * R + first;
        for (int64_t c = 0; c < n; c += LANES) {
          const int64_t lanes = smaller(LANES, n - c);
          const Vec g = load(dy + at + c, lanes) + load(flow + c, lanes);
          store(dx + at + c, g, lanes);
          store(da + at + c, g * load(before[j] + c, lanes), lanes);
          store(flow + c, g * load(a + at + c, lanes), lanes);
        }
      }
    }
    std::memcpy(dh0 + b * R + first, flow, n * sizeof(float));
  });
}

}  // namespace

#define LINEAR_SCAN_KERNELS(T)                                                                                        \
  KERNEL(linear_scan_forward, T)                                                                                      \
  (ParallelFor pool, const T* x, const T* a, const float* h0, T* y, float* h_last, int64_t B, int64_t time,           \
   int64_t R, int64_t threads) {                                                                                      \
    forward<T>(pool, x, a, h0, y, h_last, B, time, R, threads);                                                       \
  }                                                                                                                   \
  EXPORT(linear_scan_forward, T)                                                                                      \
  KERNEL(linear_scan_backward, T)                                                                                     \
  (ParallelFor pool, const T* dy, const float* dh_last, const T* x, const T* a, const float* h0, float* states,       \
   T* dx, T* da, float* dh0, int64_t B, int64_t time, int64_t R, int64_t threads) {                                   \
    backward<T>(pool, dy, dh_last, x, a, h0, states, dx, da, dh0, B, time, R, threads);                               \
  }                                                                                                                    \
  EXPORT(linear_scan_backward, T)

LINEAR_SCAN_KERNELS(float)
LINEAR_SCAN_KERNELS(bf16)
