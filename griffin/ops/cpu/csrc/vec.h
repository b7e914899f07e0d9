// Eight fp32 lanes: loads and stores of fp32 and bf16, and the few operations that differ between instruction sets.
// + - * / and comparisons are the compiler's own vector operators (GCC and Clang): portable where there is no AVX2.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define GRIFFIN_AVX2 1
#else
#include <cmath>
#define GRIFFIN_AVX2 0
#endif

#define INLINE static inline __attribute__((always_inline, unused))

namespace {

constexpr int64_t LANES = 8;
typedef float Vec __attribute__((vector_size(32)));
typedef int32_t Int __attribute__((vector_size(32)));
typedef uint32_t Unsigned __attribute__((vector_size(32)));
typedef uint16_t Half __attribute__((vector_size(16)));

struct bf16 {
  uint16_t bits;  // the upper half of an fp32
};

INLINE Vec splat(float v) { return Vec{v, v, v, v, v, v, v, v}; }
INLINE Int as_int(Vec v) { return (Int)v; }
INLINE Vec as_float(Int v) { return (Vec)v; }

#if GRIFFIN_AVX2
INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE Vec sqrt(Vec a) { return (Vec)_mm256_sqrt_ps((__m256)a); }
// The second argument where either is NaN: put the value that may be NaN there, and NaN goes through.
INLINE Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE Half narrow(Unsigned v) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x08);
  return (Half)_mm256_castsi256_si128(packed);
}
INLINE Unsigned widen(Half v) { return (Unsigned)_mm256_cvtepu16_epi32((__m128i)v); }
#else
INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
INLINE Vec sqrt(Vec a) {
  for (int i = 0; i < LANES; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
INLINE Half narrow(Unsigned v) { return __builtin_convertvector(v, Half); }
INLINE Unsigned widen(Half v) { return __builtin_convertvector(v, Unsigned); }
#endif

INLINE Vec abs(Vec v) { return as_float(as_int(v) & 0x7fffffff); }

INLINE float sum(Vec v) {  // always in this order
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

INLINE Vec from_bits(Half v) { return (Vec)(widen(v) << 16); }

INLINE Half to_bits(Vec v) {  // to nearest, ties to even; NaN stays NaN
  const Unsigned bits = (Unsigned)v;
  const Unsigned rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Unsigned is_nan = (Unsigned)(v != v);
  return narrow(rounded | (0x7fc0 & is_nan));
}

// `lanes` (1 .. 8) values from any address; the other lanes are zero.
INLINE Vec load(const float* p, int64_t lanes = LANES) {
  Vec v = {};
  if (lanes == LANES) {
    std::memcpy(&v, p, sizeof v);
  } else {
    for (int64_t i = 0; i < lanes; ++i) v[i] = p[i];
  }
  return v;
}

INLINE Vec load(const bf16* p, int64_t lanes = LANES) {
  Half v = {};
  if (lanes == LANES) {
    std::memcpy(&v, p, sizeof v);
  } else {
    for (int64_t i = 0; i < lanes; ++i) v[i] = p[i].bits;
  }
  return from_bits(v);
}

INLINE void store(float* p, Vec v, int64_t lanes = LANES) {
  if (lanes == LANES) {
    std::memcpy(p, &v, sizeof v);
  } else {
    for (int64_t i = 0; i < lanes; ++i) p[i] = v[i];
  }
}

INLINE void store(bf16* p, Vec v, int64_t lanes = LANES) {
  const Half bits = to_bits(v);
  if (lanes == LANES) {
    std::memcpy(p, &bits, sizeof bits);
  } else {
    for (int64_t i = 0; i < lanes; ++i) p[i].bits = bits[i];
  }
}

typedef float Quad __attribute__((vector_size(16)));

// The widest fp32 vector the instruction set has, for sums of products: sixteen lanes where there is AVX-512, else a Vec.
#if defined(__AVX512F__)
constexpr int64_t WIDE = 16;
typedef float Wide __attribute__((vector_size(64)));
typedef uint32_t WideUnsigned __attribute__((vector_size(64)));

INLINE Wide fma(Wide a, Wide b, Wide c) { return (Wide)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

INLINE float sum(Wide v) {
  Vec halves[2];
  std::memcpy(halves, &v, sizeof v);
  return sum(halves[0] + halves[1]);
}

INLINE __mmask16 first(int64_t lanes) { return static_cast<__mmask16>((1u << lanes) - 1); }

// Shuffles that keep every lane: GCC 12 warns of the plain ones.
template <int HOW>
INLINE Wide quarters(Wide a, Wide b) {
  return (Wide)_mm512_maskz_shuffle_f32x4(first(WIDE), (__m512)a, (__m512)b, HOW);
}
template <int HOW>
INLINE Wide within_quarters(Wide a, Wide b) {
  return (Wide)_mm512_maskz_shuffle_ps(first(WIDE), (__m512)a, (__m512)b, HOW);
}

// to[n][m] = sum(v[m][n]), each in the order of `sum`: lanes 8 apart first, then 4, 2 and 1.
INLINE void sum_16(const Wide (&v)[4][4], Quad* to) {
  Wide four[4], two[2];
  for (int m = 0; m < 4; ++m) {
    const Wide low = quarters<0x44>(v[m][0], v[m][1]) + quarters<0xee>(v[m][0], v[m][1]);
    const Wide high = quarters<0x44>(v[m][2], v[m][3]) + quarters<0xee>(v[m][2], v[m][3]);
    four[m] = quarters<0x88>(low, high) + quarters<0xdd>(low, high);  // a quarter for each n
  }
  for (int i = 0; i < 2; ++i)
    two[i] = within_quarters<0x44>(four[2 * i], four[2 * i + 1]) + within_quarters<0xee>(four[2 * i], four[2 * i + 1]);
  const Wide sums = within_quarters<0x88>(two[0], two[1]) + within_quarters<0xdd>(two[0], two[1]);
  std::memcpy(to, &sums, sizeof sums);
}

INLINE Wide load_wide(const float* p, int64_t lanes = WIDE) {
  return (Wide)(lanes == WIDE ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first(lanes), p));
}

INLINE Wide load_wide(const bf16* p, int64_t lanes = WIDE) {
  const __m256i v = lanes == WIDE ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                  : _mm256_maskz_loadu_epi16(first(lanes), p);
  return (Wide)((WideUnsigned)_mm512_maskz_cvtepu16_epi32(first(WIDE), v) << 16);  // the plain one warns in GCC 12
}
#else
constexpr int64_t WIDE = LANES;
typedef Vec Wide;

INLINE void sum_16(const Wide (&v)[4][4], Quad* to) {
  for (int n = 0; n < 4; ++n) to[n] = Quad{sum(v[0][n]), sum(v[1][n]), sum(v[2][n]), sum(v[3][n])};
}

template <class T>
INLINE Wide load_wide(const T* p, int64_t lanes = WIDE) {
  return load(p, lanes);
}
#endif

}  // namespace
