// The RG-LRU after its gate matmuls, forward and backward. The formulas are those of griffin/ops/rg_lru.py:
//
//     r = sigmoid(ga)   i = sigmoid(gx)   a = exp(-8 softplus(p) r)   s = sqrt(1 - a^2)
//     h_t = a h_{t-1} + s i x          at a reset: h_t = i x if unscaled, else s i x
//
// All tensors are contiguous: x, gates, y (B, T, R); p (R); h0, h_last (B, R) fp32; chunk_states (B, ceil(T / 64), R)
// fp32; reset (B, T) bytes or null. T is the type of x and what has its shape: float or bf16. The forward pass takes packed
// rows too: with offsets (B + 1), what is (B, T, ...) is (1, T, ...), and chunk_states is null.
//
// A task is one row and up to BLOCK channels: time runs inside it, vectors lie across channels, the state stays in L1.
#include "functions.h"
#include "kernel.h"
#include "packed.h"

namespace {

constexpr int64_t CHUNK = 64;  // tokens between two kept states; CHUNK of griffin/ops/scan.py
constexpr int64_t BLOCK = 256;  // channels of a task, at most: what the backward pass keeps of a chunk is 330 KB then
constexpr float C = 8.0f;

struct Gates {
  Vec r, i, a, s;
};

// rate = -8 softplus(p)
INLINE Gates gates(Vec input_gate, Vec recurrent_gate, Vec rate) {
  const Vec r = sigmoid(recurrent_gate);
  const Decay d = decay(rate * r);
  // 1 - a^2 = (1 - a) (1 + a) keeps every digit as a -> 1.
  return {r, sigmoid(input_gate), d.a, sqrt(d.one_minus_a * (splat(1.0f) + d.a))};
}

INLINE void rates(const float* p, int64_t n, float* rate) {
  for (int64_t c = 0; c < n; c += LANES) store(rate + c, splat(-C) * softplus(load(p + c, smaller(LANES, n - c))));
}

struct Shape {
  int64_t B, T, R, threads;

  int64_t channels() const { return channels_per_task(B, R, threads, BLOCK); }
};

template <class T>
int64_t forward(ParallelFor pool, const T* x, const T* input_gate, const T* recurrent_gate, const float* p,
                const float* h0, const uint8_t* reset, const int64_t* offsets, T* y, float* h_last,
                float* chunk_states, Shape shape, bool unscaled) {
  const Tokens tokens{offsets, shape.B, shape.T};
  if (const int64_t wrong = tokens.wrong()) return wrong;
  const int64_t R = shape.R, chunks = pieces(shape.T, CHUNK);
  // Packed rows may be of any length: threads share channels then, as if it were one row.
  const int64_t block = tokens.packed() ? channels_per_task(1, R, shape.threads, BLOCK) : shape.channels();
  const int64_t blocks = pieces(R, block), tasks = shape.B * blocks;
  parallel(pool, tasks, tokens.all() * blocks / larger(1, tasks) * block, [&](int64_t task) {
    const int64_t b = tokens.packed() ? task % shape.B : task / blocks;
    const int64_t first = (tokens.packed() ? task / shape.B : task % blocks) * block, n = smaller(block, R - first);
    const int64_t begin = tokens.begin(b), end = tokens.end(b);
    float rate[BLOCK], h[BLOCK];
    rates(p + first, n, rate);
    for (int64_t c = 0; c < n; c += LANES) store(h + c, load(h0 + b * R + first + c, smaller(LANES, n - c)));
    for (int64_t t = begin; t < end; ++t) {
      if (chunk_states != nullptr && (t - begin) % CHUNK == 0)
        std::memcpy(chunk_states + (b * chunks + (t - begin) / CHUNK) * R + first, h, n * sizeof(float));
      const bool starts = reset != nullptr && reset[t];
      const int64_t at = t * R + first;
      for (int64_t c = 0; c < n; c += LANES) {
        const int64_t lanes = smaller(LANES, n - c);
        const Gates g = gates(load(input_gate + at + c, lanes), load(recurrent_gate + at + c, lanes), load(rate + c));
        const Vec ix = g.i * load(x + at + c, lanes);
        const Vec next = starts ? (unscaled ? ix : g.s * ix) : fma(g.a, load(h + c), g.s * ix);
        store(h + c, next);
        store(y + at + c, next, lanes);
      }
    }
    std::memcpy(h_last + b * R + first, h, n * sizeof(float));
  });
  return 0;
}

// What one chunk of one task keeps between its two passes, whole vectors even where fewer channels are left.
struct Kept {
  float r[CHUNK][BLOCK], i[CHUNK][BLOCK], a[CHUNK][BLOCK], s[CHUNK][BLOCK], before[CHUNK][BLOCK];
};

// The least divisor in the gradient of s, as in griffin/ops/rg_lru.py: without a bound it would be 0 in padding.
constexpr float LEAST = 1e-18f;

// With g_t = dy_t + a_{t+1} g_{t+1} and m the factor of i x:
//     dx = g m i    d_input_gate = g m x i (1 - i)    d_recurrent_gate = rate r (1 - r) dlog_a
//     dlog_a = g h_{t-1} a - 2 a^2 g i x / max(2 s, 1 / bound)    (a reset drops the first term, and if unscaled both)
//     dp = -8 sigmoid(p) sum(r dlog_a)    dh0 = a_1 g_1
// Chunks from the last to the first: the states of each are recomputed from the one kept before it.
// dp_rows (B, R) fp32 is scratch: each task sums its own row of it, and the rows are added in order at the end.
template <class T>
void backward(ParallelFor pool, const T* dy, const float* dh_last, const T* x, const T* input_gate,
              const T* recurrent_gate, const float* p, const float* chunk_states, const uint8_t* reset, T* dx,
              T* d_input_gate, T* d_recurrent_gate, float* dp_rows, float* dp, float* dh0, Shape shape, float bound,
              bool unscaled) {
  const int64_t block = shape.channels(), blocks = pieces(shape.R, block), chunks = pieces(shape.T, CHUNK), R = shape.R;
  const Vec one = splat(1.0f), least = max(splat(LEAST), splat(1.0f / bound));
  parallel(pool, shape.B * blocks, 2 * shape.T * block, [&](int64_t task) {
    const int64_t b = task / blocks, first = task % blocks * block, n = smaller(block, R - first);
    float rate[BLOCK], h[BLOCK], flow[BLOCK], total[BLOCK] = {}, part[BLOCK];  // flow = a_{t+1} g_{t+1}
    Kept kept;
    rates(p + first, n, rate);
    for (int64_t c = 0; c < n; c += LANES) store(flow + c, load(dh_last + b * R + first + c, smaller(LANES, n - c)));
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * CHUNK, count = smaller(CHUNK, shape.T - begin);
      const float* state = chunk_states + (b * chunks + chunk) * R + first;
      for (int64_t c = 0; c < n; c += LANES) store(h + c, load(state + c, smaller(LANES, n - c)));
      for (int64_t j = 0; j < count; ++j) {
        const bool starts = reset != nullptr && reset[b * shape.T + begin + j];
        const int64_t at = (b * shape.T + begin + j) * R + first;
        for (int64_t c = 0; c < n; c += LANES) {
          const int64_t lanes = smaller(LANES, n - c);
          const Gates g = gates(load(input_gate + at + c, lanes), load(recurrent_gate + at + c, lanes), load(rate + c));
          const Vec ix = g.i * load(x + at + c, lanes), before = load(h + c);
          store(kept.r[j] + c, g.r);
          store(kept.i[j] + c, g.i);
          store(kept.a[j] + c, g.a);
          store(kept.s[j] + c, g.s);
          store(kept.before[j] + c, before);
          store(h + c, starts ? (unscaled ? ix : g.s * ix) : fma(g.a, before, g.s * ix));
        }
      }
      for (int64_t c = 0; c < n; c += LANES) store(part + c, splat(0.0f));
      for (int64_t j = count - 1; j >= 0; --j) {
        const bool starts = reset != nullptr && reset[b * shape.T + begin + j];
        const int64_t at = (b * shape.T + begin + j) * R + first;
        for (int64_t c = 0; c < n; c += LANES) {
          const int64_t lanes = smaller(LANES, n - c);
          const Vec r = load(kept.r[j] + c), i = load(kept.i[j] + c), a = load(kept.a[j] + c), s = load(kept.s[j] + c);
          const Vec g = load(dy + at + c, lanes) + load(flow + c), xi = i * load(x + at + c, lanes);
          const Vec gm = starts && unscaled ? g : g * s;
          store(dx + at + c, gm * i, lanes);
          store(d_input_gate + at + c, gm * xi * (one - i), lanes);
          const Vec carried = g * a;
          Vec dlog_a = splat(0.0f);
          if (!starts) dlog_a = carried * load(kept.before[j] + c);
          if (!(starts && unscaled)) dlog_a -= (carried * a * xi) * (splat(2.0f) / max(least, s + s));
          store(d_recurrent_gate + at + c, load(rate + c) * r * (one - r) * dlog_a, lanes);
          store(part + c, fma(r, dlog_a, load(part + c)));
          store(flow + c, starts ? splat(0.0f) : carried);
        }
      }
      for (int64_t c = 0; c < n; c += LANES) store(total + c, load(total + c) + load(part + c));
    }
    std::memcpy(dh0 + b * R + first, flow, n * sizeof(float));
    std::memcpy(dp_rows + b * R + first, total, n * sizeof(float));
  });
  for (int64_t c = 0; c < R; c += LANES) {
    const int64_t lanes = smaller(LANES, R - c);
    Vec total = splat(0.0f);
    for (int64_t b = 0; b < shape.B; ++b) total += load(dp_rows + b * R + c, lanes);
    store(dp + c, splat(-C) * sigmoid(load(p + c, lanes)) * total, lanes);
  }
}

}  // namespace

#define RG_LRU_KERNELS(T)                                                                                             \
  CHECKED_KERNEL(rg_lru_forward, T)                                                                                   \
  (ParallelFor pool, const T* x, const T* input_gate, const T* recurrent_gate, const float* p, const float* h0,       \
   const uint8_t* reset, const int64_t* offsets, T* y, float* h_last, float* chunk_states, int64_t B, int64_t time,   \
   int64_t R, int64_t unscaled, int64_t threads) {                                                                    \
    return forward<T>(pool, x, input_gate, recurrent_gate, p, h0, reset, offsets, y, h_last, chunk_states,            \
                      {B, time, R, threads}, unscaled);                                                               \
  }                                                                                                                   \
  EXPORT(rg_lru_forward, T)                                                                                           \
  KERNEL(rg_lru_backward, T)                                                                                          \
  (ParallelFor pool, const T* dy, const float* dh_last, const T* x, const T* input_gate, const T* recurrent_gate,     \
   const float* p, const float* chunk_states, const uint8_t* reset, T* dx, T* d_input_gate, T* d_recurrent_gate,      \
   float* dp_rows, float* dp, float* dh0, int64_t B, int64_t time, int64_t R, float bound, int64_t unscaled,          \
   int64_t threads) {                                                                                                 \
    backward<T>(pool, dy, dh_last, x, input_gate, recurrent_gate, p, chunk_states, reset, dx, d_input_gate,           \
                d_recurrent_gate, dp_rows, dp, dh0, {B, time, R, threads}, bound, unscaled);                          \
  }                                                                                                                    \
  EXPORT(rg_lru_backward, T)

RG_LRU_KERNELS(float)
RG_LRU_KERNELS(bf16)
