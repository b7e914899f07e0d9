// One token per row attends to a ring of slots: what a decode step does.
//
//     out[b, h] = sum over s of softmax_s(q[b, h] . k[b, s, g] / sqrt(K)) v[b, s, g],   g = h / (H / G)
//
// q, out (B, H, K); k, v (B, S, G, K); position (B): slots 0 .. min(position, S - 1) hold what the token sees, the
// others are not read; a position below 0 counts as 0. T is the type of all but positions and scratch.
//
// A task is SLOTS slots of one key head, for all of its query heads: each key and value is read once. Tasks leave their
// largest score, their sum and their weighted values; these are joined in order, whatever thread they come from.
#include "functions.h"
#include "kernel.h"
#include "rows.h"

namespace {

constexpr int64_t SLOTS = 64;
constexpr int64_t VALUES = 4 * LANES;  // channels of values summed at a time

struct Ring {
  int64_t B, S, H, G, K;

  int64_t heads() const { return H / G; }
  int64_t chunks() const { return pieces(S, SLOTS); }
};

// What a task leaves for one query head: (K + 2) fp32 in scratch, at ((b, g, chunk), head).
struct Part {
  float* values;  // K of them: sum over its slots of e^(score - top) v
  float &top, &sum;
};

INLINE Part part_at(float* scratch, const Ring& r, int64_t task, int64_t head) {
  float* at = scratch + (task * r.heads() + head) * (r.K + 2);
  return {at + 2, at[0], at[1]};
}

// scores[n][s] = q[n] . k[s] / sqrt(K) for `count` slots
template <int N, class T>
INLINE void score(const T* q, const T* k, int64_t count, const Ring& r, float scale, float (&scores)[3][SLOTS]) {
  const int64_t row = r.G * r.K, ahead = prefetch_distance(r.K * sizeof(T)) / static_cast<int64_t>(sizeof(T));
  int64_t s = 0;
  for (; s + 4 <= count; s += 4) {
    Wide acc[4][N] = {};
    dots<4, N>(k + s * row, row, q, r.K, r.K, {k + s * row + ahead, 0, 1}, acc);
    for (int m = 0; m < 4; ++m)
      for (int n = 0; n < N; ++n) scores[n][s + m] = scale * sum(acc[m][n]);
  }
  for (; s < count; ++s) {
    Wide acc[1][N] = {};
    dots<1, N>(k + s * row, row, q, r.K, r.K, {k + s * row + ahead, 0, 1}, acc);
    for (int n = 0; n < N; ++n) scores[n][s] = scale * sum(acc[0][n]);
  }
}

template <int N, class T>
INLINE void attend(const T* q, const T* k, const T* v, int64_t count, const Ring& r, float* scratch, int64_t task,
                   int64_t head) {
  float scores[3][SLOTS];
  score<N>(q, k, count, r, 1.0f / __builtin_sqrtf(static_cast<float>(r.K)), scores);
  for (int n = 0; n < N; ++n) {
    float top = scores[n][0];
    for (int64_t s = 1; s < count; ++s) top = scores[n][s] > top ? scores[n][s] : top;
    Vec total = {};
    for (int64_t s = 0; s < count; s += LANES) {
      const int64_t lanes = smaller(LANES, count - s);
      const Vec e = exp(load(scores[n] + s, lanes) - splat(top));
      store(scores[n] + s, e, lanes);
      total += load(scores[n] + s, lanes);  // no more lanes than slots
    }
    const Part part = part_at(scratch, r, task, head + n);
    part.top = top, part.sum = sum(total);
  }
  int64_t c = 0;
  for (; c + VALUES <= r.K; c += VALUES) {  // several sums at a time: one alone would wait for itself
    Vec acc[N][VALUES / LANES] = {};
    for (int64_t s = 0; s < count; ++s)
      for (int64_t j = 0; j < VALUES / LANES; ++j) {
        const Vec value = load(v + s * r.G * r.K + c + j * LANES);
        for (int n = 0; n < N; ++n) acc[n][j] = fma(value, splat(scores[n][s]), acc[n][j]);
      }
    for (int n = 0; n < N; ++n)
      for (int64_t j = 0; j < VALUES / LANES; ++j)
        store(part_at(scratch, r, task, head + n).values + c + j * LANES, acc[n][j]);
  }
  for (; c < r.K; c += LANES) {
    const int64_t lanes = smaller(LANES, r.K - c);
    Vec acc[N] = {};
    for (int64_t s = 0; s < count; ++s) {
      const Vec value = load(v + s * r.G * r.K + c, lanes);
      for (int n = 0; n < N; ++n) acc[n] = fma(value, splat(scores[n][s]), acc[n]);
    }
    for (int n = 0; n < N; ++n) store(part_at(scratch, r, task, head + n).values + c, acc[n], lanes);
  }
}

template <class T>
void ring_attention(ParallelFor pool, const T* q, const T* k, const T* v, const int64_t* position, T* out,
                    float* scratch, Ring r) {
  const int64_t chunks = r.chunks(), heads = r.heads();
  const auto slots = [&](int64_t b) { return within(position[b], 0, r.S - 1) + 1; };
  parallel(pool, r.B * r.G * chunks, 2 * SLOTS * heads * r.K / 4, [&](int64_t task) {
    const int64_t chunk = task % chunks, g = task / chunks % r.G, b = task / chunks / r.G;
    const int64_t first = chunk * SLOTS, count = smaller(SLOTS, slots(b) - first);
    if (count <= 0) return;
    const int64_t at = (b * r.S + first) * r.G * r.K + g * r.K;
    const T* queries = q + (b * r.H + g * heads) * r.K;
    int64_t h = 0;
    for (; h + 3 <= heads; h += 3) attend<3>(queries + h * r.K, k + at, v + at, count, r, scratch, task, h);
    if (heads - h == 2) attend<2>(queries + h * r.K, k + at, v + at, count, r, scratch, task, h);
    if (heads - h == 1) attend<1>(queries + h * r.K, k + at, v + at, count, r, scratch, task, h);
  });
  parallel(pool, r.B * r.H, chunks * r.K, [&](int64_t row) {
    const int64_t b = row / r.H, g = row % r.H / heads, h = row % heads, used = pieces(slots(b), SLOTS);
    const int64_t task = (b * r.G + g) * chunks;
    float top = part_at(scratch, r, task, h).top, total = 0.0f;
    for (int64_t c = 1; c < used; ++c) {
      const float other = part_at(scratch, r, task + c, h).top;
      top = other > top ? other : top;
    }
    for (int64_t c = 0; c < used; ++c) {
      const Part part = part_at(scratch, r, task + c, h);
      part.top = exp(splat(part.top - top))[0];  // from here on the factor that brings it to the common largest score
      total += part.top * part.sum;
    }
    for (int64_t j = 0; j < r.K; j += LANES) {
      const int64_t lanes = smaller(LANES, r.K - j);
      Vec acc = {};
      for (int64_t c = 0; c < used; ++c) {
        const Part part = part_at(scratch, r, task + c, h);
        acc = fma(splat(part.top), load(part.values + j, lanes), acc);
      }
      store(out + row * r.K + j, acc / splat(total), lanes);
    }
  });
}

// keys[b, position[b] mod S] = k[b], values likewise: (B, S, width) and (B, width). The remainder is never negative.
template <class T>
void ring_write(ParallelFor pool, const T* k, const T* v, const int64_t* position, T* keys, T* values, int64_t B,
                int64_t S, int64_t width) {
  parallel(pool, B, width, [&](int64_t b) {
    const int64_t rest = position[b] % S, at = (b * S + (rest < 0 ? rest + S : rest)) * width;
    std::memcpy(keys + at, k + b * width, width * sizeof(T));
    std::memcpy(values + at, v + b * width, width * sizeof(T));
  });
}

}  // namespace

#define ATTENTION_KERNELS(T)                                                                                           \
  KERNEL(ring_attention, T)                                                                                            \
  (ParallelFor pool, const T* q, const T* k, const T* v, const int64_t* position, T* out, float* scratch, int64_t B,  \
   int64_t S, int64_t H, int64_t G, int64_t K) {                                                                       \
    ring_attention(pool, q, k, v, position, out, scratch, {B, S, H, G, K});                                            \
  }                                                                                                                    \
  EXPORT(ring_attention, T)                                                                                            \
  KERNEL(ring_write, T)                                                                                                \
  (ParallelFor pool, const T* k, const T* v, const int64_t* position, T* keys, T* values, int64_t B, int64_t S,       \
   int64_t width) {                                                                                                    \
    ring_write(pool, k, v, position, keys, values, B, S, width);                                                       \
  }                                                                                                                    \
  EXPORT(ring_write, T)

ATTENTION_KERNELS(float)
ATTENTION_KERNELS(bf16)
