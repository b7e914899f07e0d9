// y = x W^T + b for many rows of x and int8 weights: what goes before and after PyTorch's product of 8-bit numbers.
//
//     x[n, k] ~ scale[n] (high[n, k] + low[n, k] / 254)                 high and low in -127 .. 127
//     y[n, o] = (sum over k of high q + sum over k of low q / 254) scale[n] w_scale[o] + b[o]
//
// Both sums are exact in 32 bits up to K = 2^17, so a row of y depends on no other row, tile or thread. The error of x
// is 2^-16 of its row's largest value, as in the product for few rows (integers.h) that of a block's.
#include "kernel.h"
#include "vec.h"

namespace {

typedef int8_t Eight __attribute__((vector_size(8)));

constexpr float STEPS = 254.0f;  // of low, to one step of high

// The lowest byte of each lane.
#if GRIFFIN_AVX2
INLINE Eight narrow_bytes(Int v) {
  const __m256i lowest = _mm256_set1_epi32(0x0c080400);  // of the four lanes of a half, side by side
  const __m256i fours = _mm256_shuffle_epi8((__m256i)v, lowest);
  const __m256i both = _mm256_permutevar8x32_epi32(fours, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
  Eight bytes;
  std::memcpy(&bytes, &both, sizeof bytes);
  return bytes;
}
#else
INLINE Eight narrow_bytes(Int v) { return __builtin_convertvector(v, Eight); }
#endif

INLINE void store(int8_t* p, Int v, int64_t lanes) {
  const Eight bytes = narrow_bytes(v);
  if (lanes == LANES) {
    std::memcpy(p, &bytes, sizeof bytes);
  } else {
    for (int64_t i = 0; i < lanes; ++i) p[i] = bytes[i];
  }
}

INLINE Vec load_as_float(const int32_t* p, int64_t lanes) {
  Int v = {};
  if (lanes == LANES) {
    std::memcpy(&v, p, sizeof v);
  } else {
    for (int64_t i = 0; i < lanes; ++i) v[i] = p[i];
  }
  return __builtin_convertvector(v, Vec);
}

// step(i, lanes) for 0, 8, 16 ... below count; lanes is 8 but for the last.
template <class Step>
INLINE void for_lanes(int64_t count, const Step& step) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) step(i, LANES);
  if (i < count) step(i, count - i);
}

template <class X>
void split_rows(ParallelFor pool, const X* x, int8_t* high, int8_t* low, float* scale, int64_t N, int64_t K) {
  const Vec magic = splat(12582912.0f);  // adding it rounds to a whole number, kept in the lowest bits
  parallel(pool, N, K, [&](int64_t n) {
    const X* from = x + n * K;
    Vec largest = {}, poison = {};
    for_lanes(K, [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
      const Vec v = load(from + k, lanes);
      largest = max(abs(v), largest);
      poison += v - v;  // NaN where x is not finite: so is then the scale, and the whole row of y
    });
    float top = 0.0f;
    for (int j = 0; j < LANES; ++j) top = largest[j] > top ? largest[j] : top;
    const Vec inverse = splat(top > 1e-30f ? 127.0f / top : 0.0f);  // below, it would overflow: such a row is zero
    scale[n] = top * (1.0f / 127.0f) + sum(poison);
    for_lanes(K, [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
      const Vec v = load(from + k, lanes) * inverse;
      const Vec whole = v + magic;
      const Vec rest = (v - (whole - magic)) * splat(STEPS) + magic;  // |v - whole| <= 1/2, and exact
      store(high + n * K + k, as_int(whole) - as_int(magic), lanes);
      store(low + n * K + k, as_int(rest) - as_int(magic), lanes);
    });
  });
}

// Columns first .. first + P of y, which has O; sums are (2 N, P): those of high, then those of low.
template <class X>
void join_rows(ParallelFor pool, const int32_t* sums, const float* scale, const float* w_scale, const float* bias,
               X* y, int64_t N, int64_t P, int64_t first, int64_t O) {
  parallel(pool, N, P, [&](int64_t n) {
    const int32_t* high = sums + n * P;
    const int32_t* low = sums + (N + n) * P;
    X* to = y + n * O + first;
    const Vec x_scale = splat(scale[n]);
    for_lanes(P, [&](int64_t o, int64_t lanes) __attribute__((always_inline)) {
      const Vec sum = fma(load_as_float(low + o, lanes), splat(1.0f / STEPS), load_as_float(high + o, lanes));
      const Vec scaled = sum * x_scale * load(w_scale + o, lanes);
      store(to + o, bias == nullptr ? scaled : scaled + load(bias + o, lanes), lanes);
    });
  });
}

}  // namespace

#define SPLIT_KERNELS(X)                                                                                               \
  KERNEL(split_rows, X)                                                                                                \
  (ParallelFor pool, const X* x, int8_t* high, int8_t* low, float* scale, int64_t N, int64_t K) {                     \
    split_rows(pool, x, high, low, scale, N, K);                                                                       \
  }                                                                                                                    \
  EXPORT(split_rows, X)                                                                                                \
  KERNEL(join_rows, X)                                                                                                 \
  (ParallelFor pool, const int32_t* sums, const float* scale, const float* w_scale, const float* bias, X* y,          \
   int64_t N, int64_t P, int64_t first, int64_t O) {                                                                   \
    join_rows(pool, sums, scale, w_scale, bias, y, N, P, first, O);                                                    \
  }                                                                                                                    \
  EXPORT(join_rows, X)

SPLIT_KERNELS(float)
SPLIT_KERNELS(bf16)
