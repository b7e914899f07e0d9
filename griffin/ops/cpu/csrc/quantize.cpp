// A weight in 4 bits; formula and layout in griffin/ops/quantized.py, whose quantize_int4 is the definition.
//
// w (O, K) of type W; q (O, P / 2) bytes; scale (O, P / G); all contiguous, P as there. A task is one row.
#include "kernel.h"
#include "rows.h"
#include "vec.h"

namespace {

constexpr int64_t PACKED = 64;        // inputs in 32 bytes, 16 words of 4 numbers
constexpr float MAGIC = 12582912.0f;  // 1.5 2^23: adding and subtracting it rounds to nearest, ties to even
typedef float Four __attribute__((vector_size(16)));
typedef double Wider __attribute__((vector_size(32)));

INLINE Vec rounded(Vec v) {
  const Vec whole = (v + splat(MAGIC)) - splat(MAGIC);
  return min(max(whole, splat(-8.0f)), splat(7.0f));
}

INLINE float as_bf16(float v) { return from_bits(to_bits(splat(v)))[0]; }

// The value of largest magnitude, the first of several; NaN where one is not finite.
template <int G>
INLINE float largest(const float* values) {
  Vec top = {};
  Int finite = Int{} - 1;
  for (int i = 0; i < G; i += LANES) {
    const Vec v = abs(load(values + i));
    finite &= (Int)(v < splat(__builtin_inff()));
    top = max(top, v);
  }
  float most = 0.0f;
  for (int i = 0; i < LANES; ++i) {
    if (!finite[i]) return __builtin_nanf("");
    if (top[i] > most) most = top[i];
  }
  for (int i = 0; i < G; ++i)
    if (__builtin_fabsf(values[i]) == most) return values[i];
  return 0.0f;
}

// Of the scales tried the one with the least squared error, summed in fp64; the first of several.
template <int G>
INLINE float best_scale(const float* values, const float* factors, int64_t count) {
  const float most = largest<G>(values);
  if (most != most) return most;
  float best = 0.0f;
  double least = __builtin_inf();
  for (int64_t i = 0; i < count; ++i) {
    const float scale = as_bf16(most * factors[i]);
    const Vec step = splat(scale == 0.0f ? 1.0f : scale);
    Wider total = {};
    for (int k = 0; k < G; k += LANES) {
      const Vec v = load(values + k), off = rounded(v / step) * splat(scale) - v;
      Four halves[2];
      std::memcpy(halves, &off, sizeof off);
      const Wider low = __builtin_convertvector(halves[0], Wider), high = __builtin_convertvector(halves[1], Wider);
      total += low * low + high * high;
    }
    const double error = (total[0] + total[1]) + (total[2] + total[3]);
    if (error < least) least = error, best = scale;
  }
  return best;
}

template <int G, class W>
void quantize(ParallelFor pool, const W* w, const float* factors, uint8_t* q, bf16* scale, int64_t count, int64_t O,
              int64_t K) {
  constexpr int64_t UNIT = G > PACKED ? G : PACKED;
  const int64_t padded = pieces(K, UNIT) * UNIT;
  parallel(pool, O, count * K, [&](int64_t o) {
    for (int64_t k = 0; k < padded; k += UNIT) {
      float values[UNIT] = {};
      int32_t numbers[UNIT];
      for (int64_t i = 0; i < UNIT && k + i < K; i += LANES)
        store(values + i, load(w + o * K + k + i, smaller(LANES, K - k - i)));
      for (int64_t first = 0; first < UNIT; first += G) {
        const float best = best_scale<G>(values + first, factors, count);
        store(scale + (o * padded + k + first) / G, splat(best), 1);
        const Vec step = splat(best == 0.0f ? 1.0f : best);
        for (int64_t i = first; i < first + G; i += LANES) {
          const Int number = __builtin_convertvector(rounded(load(values + i) / step) + splat(8.0f), Int);
          std::memcpy(numbers + i, &number, sizeof number);
        }
      }
      for (int64_t i = 0; i < UNIT; i += PACKED) {
        uint8_t* to = q + (o * padded + k + i) / 2;
        for (int64_t j = 0; j < PACKED / 4; ++j) {
          const int32_t* n = numbers + i + j;
          to[2 * j] = static_cast<uint8_t>(n[0] | n[16] << 4);
          to[2 * j + 1] = static_cast<uint8_t>(n[32] | n[48] << 4);
        }
      }
    }
  });
}

}  // namespace

#define QUANTIZE_KERNELS(W)                                                                                            \
  KERNEL(quantize_int4, W)                                                                                             \
  (ParallelFor pool, const W* w, const float* factors, uint8_t* q, bf16* scale, int64_t count, int64_t O, int64_t K,  \
   int64_t group) {                                                                                                    \
    if (group == 32) quantize<32>(pool, w, factors, q, scale, count, O, K);                                            \
    if (group == 64) quantize<64>(pool, w, factors, q, scale, count, O, K);                                            \
    if (group == 128) quantize<128>(pool, w, factors, q, scale, count, O, K);                                          \
  }                                                                                                                    \
  EXPORT(quantize_int4, W)

QUANTIZE_KERNELS(float)
QUANTIZE_KERNELS(bf16)
