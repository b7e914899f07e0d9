// Sixteen 16-bit lanes, and rows of x as whole numbers: what int8 and int4 weights are multiplied with.
#pragma once

#include "kernel.h"
#include "vec.h"

namespace {

typedef int16_t Short __attribute__((vector_size(32)));
typedef uint16_t UShort __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

constexpr int64_t SHORTS = 16;
constexpr float LARGEST = 32767.0f;

// a[2i] b[2i] + a[2i+1] b[2i+1]
#if GRIFFIN_AVX2
INLINE Int multiply_pairs(Short a, Short b) { return (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
INLINE Short widen_bytes(Bytes v) { return (Short)_mm256_cvtepi8_epi16((__m128i)v); }
#else
INLINE Int multiply_pairs(Short a, Short b) {
  Int pairs;
  for (int i = 0; i < LANES; ++i) pairs[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return pairs;
}
INLINE Short widen_bytes(Bytes v) { return __builtin_convertvector(v, Short); }
#endif

// acc + multiply_pairs(a, b), in one instruction where there is one
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
INLINE Int add_pairs(Int acc, Short a, Short b) {
  return (Int)_mm256_dpwssd_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
}
#else
INLINE Int add_pairs(Int acc, Short a, Short b) { return acc + multiply_pairs(a, b); }
#endif

INLINE Int load_ints(const int32_t* p) {
  Int v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE Short load_shorts(const int16_t* p) {
  Short v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// `count` (1 .. 16) bytes as 16-bit lanes; the other lanes are zero.
INLINE Short load_bytes(const int8_t* p, int64_t count = SHORTS) {
  Bytes v = {};
  if (count == SHORTS) {
    std::memcpy(&v, p, sizeof v);
  } else {
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  }
  return widen_bytes(v);
}

// N rows of x, in blocks along K: x ~ scale * number, |number| <= 32767, so that the error is 2^-16 of a block's
// largest value, less than bf16 or fp32 sums lose elsewhere. `padded` is K rounded up to whole blocks and 64s.
struct Whole {
  int16_t* numbers;  // (N, padded), zero beyond K
  float* scales;     // (N, padded / block)
  int32_t* offsets;  // (N, padded / block, 8): -8 times the sums of pairs of numbers, as multiply_pairs lays them
  int64_t padded, block;

  int64_t blocks() const { return padded / block; }
};

// Bytes a Whole needs: WHOLE_BYTES of quantized.py.
INLINE Whole whole_in(void* memory, int64_t N, int64_t padded, int64_t block) {
  Whole w;
  w.padded = padded, w.block = block;
  w.offsets = static_cast<int32_t*>(memory);
  w.scales = reinterpret_cast<float*>(w.offsets + N * w.blocks() * LANES);
  w.numbers = reinterpret_cast<int16_t*>(w.scales + N * w.blocks());
  return w;
}

template <class X>
void make_whole(const X* x, int64_t N, int64_t K, const Whole& to) {
  const Vec magic = splat(12582912.0f);  // adding it rounds to a whole number, kept in the lowest bits
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t b = 0; b < to.blocks(); ++b) {
      const X* from = x + n * K + b * to.block;
      const int64_t count = larger(0, smaller(to.block, K - b * to.block));
      int16_t* numbers = to.numbers + n * to.padded + b * to.block;
      Vec largest = {}, poison = {};
      for (int64_t j = 0; j < count; j += LANES) {
        const Vec v = load(from + j, smaller(LANES, count - j));
        largest = max(abs(v), largest);
        poison += v - v;  // NaN where x is not finite: so is then the scale, and every sum
      }
      float top = 0.0f;
      for (int j = 0; j < LANES; ++j) top = largest[j] > top ? largest[j] : top;
      const float inverse = top > 1e-30f ? LARGEST / top : 0.0f;  // below, it would overflow: such a block is zero
      to.scales[n * to.blocks() + b] = top * (1.0f / LARGEST) + sum(poison);
      for (int64_t j = 0; j < to.block; j += LANES) {
        Vec v = {};
        if (j < count) v = load(from + j, smaller(LANES, count - j));
        const Int whole = as_int(fma(v, splat(inverse), magic)) - as_int(magic);
        for (int i = 0; i < LANES; ++i) numbers[j + i] = static_cast<int16_t>(whole[i]);
      }
      Int sums = {};
      Short ones;
      for (int i = 0; i < SHORTS; ++i) ones[i] = 1;
      for (int64_t j = 0; j < to.block; j += SHORTS) sums += multiply_pairs(load_shorts(numbers + j), ones);
      sums *= -8;
      std::memcpy(to.offsets + (n * to.blocks() + b) * LANES, &sums, sizeof sums);
    }
  }
}

}  // namespace
