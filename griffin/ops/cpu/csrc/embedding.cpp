// Rows of a table: y[n] = E[token[n]] rounded to X, times scale, rounded again. Contract in griffin/ops/embedding.py.
//
// E is (V, K) in fp32, bf16 or int8 (with a scale per row), or packed int4 as in quantized.cpp. tokens (N) are in
// 0 .. V - 1: else nothing is written. y (N, K) of type X. A task is one token.
#include "integers.h"
#include "rows.h"

namespace {

template <class X, class Row>
int64_t gather(ParallelFor pool, const int64_t* tokens, X* y, int64_t N, int64_t K, int64_t V, float scale,
               const Row& row) {
  for (int64_t n = 0; n < N; ++n)
    if (tokens[n] < 0 || tokens[n] >= V) return n + 1;
  parallel(pool, N, K, [&](int64_t n) {
    for (int64_t k = 0; k < K; k += LANES) {
      const int64_t lanes = smaller(LANES, K - k);
      store(y + n * K + k, row(tokens[n], k, lanes), lanes);
      if (scale != 1.0f) store(y + n * K + k, load(y + n * K + k, lanes) * splat(scale), lanes);
    }
  });
  return 0;
}

}  // namespace

#define EMBEDDING_KERNELS(X)                                                                                          \
  CHECKED_KERNEL(embed_fp32, X)                                                                                       \
  (ParallelFor pool, const int64_t* tokens, const float* table, X* y, int64_t N, int64_t K, int64_t V, float scale) { \
    return gather(pool, tokens, y, N, K, V, scale,                                                                    \
           [&](int64_t v, int64_t k, int64_t lanes) { return load(table + v * K + k, lanes); });                      \
  }                                                                                                                   \
  EXPORT(embed_fp32, X)                                                                                               \
  CHECKED_KERNEL(embed_bf16, X)                                                                                       \
  (ParallelFor pool, const int64_t* tokens, const bf16* table, X* y, int64_t N, int64_t K, int64_t V, float scale) {  \
    return gather(pool, tokens, y, N, K, V, scale,                                                                    \
           [&](int64_t v, int64_t k, int64_t lanes) { return load(table + v * K + k, lanes); });                      \
  }                                                                                                                   \
  EXPORT(embed_bf16, X)                                                                                               \
  CHECKED_KERNEL(embed_int8, X)                                                                                       \
  (ParallelFor pool, const int64_t* tokens, const int8_t* q, const float* scales, X* y, int64_t N, int64_t K,         \
   int64_t V, float scale) {                                                                                          \
    return gather(pool, tokens, y, N, K, V, scale, [&](int64_t v, int64_t k, int64_t lanes) {                         \
      Vec row = {};                                                                                                   \
      for (int64_t j = 0; j < lanes; ++j) row[j] = scales[v] * q[v * K + k + j];                                      \
      return row;                                                                                                     \
    });                                                                                                               \
  }                                                                                                                   \
  EXPORT(embed_int8, X)                                                                                               \
  CHECKED_KERNEL(embed_int4, X)                                                                                       \
  (ParallelFor pool, const int64_t* tokens, const uint8_t* q, const bf16* scales, X* y, int64_t N, int64_t K,         \
   int64_t padded, int64_t group, int64_t V, float scale) {                                                           \
    return gather(pool, tokens, y, N, K, V, scale, [&](int64_t v, int64_t k, int64_t lanes) {                         \
      const int64_t in_block = k % 64;                                                                                \
      const uint8_t* words = q + v * padded / 2 + (k - in_block) / 2;                                                 \
      Vec row = {};                                                                                                   \
      for (int64_t j = 0; j < lanes; ++j) {                                                                           \
        const int64_t word = (in_block + j) % 16, place = (in_block + j) / 16;                                        \
        const int bits = words[2 * word + place / 2] >> (place % 2 * 4) & 15;                                         \
        row[j] = number(scales[v * (padded / group) + k / group]) * static_cast<float>(bits - 8);                     \
      }                                                                                                               \
      return row;                                                                                                     \
    });                                                                                                               \
  }                                                                                                                   \
  EXPORT(embed_int4, X)

EMBEDDING_KERNELS(float)
EMBEDDING_KERNELS(bf16)
