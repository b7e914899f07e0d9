// y = x W^T + b for up to 16 rows of x, W in whole numbers, and W widened to fp32 for more rows.
//
//     int8:  w[o, k] = scale[o] q[o, k],               q in -127 .. 127, one byte each: (O, K)
//     int4:  w[o, k] = scale[o, k / G] (q[o, k] - 8),  q in 0 .. 15, G = 32, 64 or 128 inputs to a scale
//
// int4 lies in blocks of 64 inputs, 32 bytes: the j-th 16-bit word (little-endian) holds inputs j, 16 + j, 32 + j and
// 48 + j of the block, lowest bits first, so that a mask and a shift give 16 neighbours. K is padded to whole blocks
// and groups: q is (O, padded / 2), scale (O, padded / G) bf16.
//
// x becomes 16-bit whole numbers (integers.h): products and sums within a block of 128 inputs (int8) or a group (int4)
// are then exact in 32 bits, 16 to an instruction where fp32 has 8 after a conversion.
#include "integers.h"
#include "rows.h"

namespace {

constexpr int64_t BLOCK = 128;   // inputs to a scale of x, for int8
constexpr int64_t PACKED = 64;   // inputs in 32 bytes of int4

INLINE void add_scaled(Vec& total, Int part, float scale) {
  total = fma(__builtin_convertvector(part, Vec), splat(scale), total);
}

template <int M, int N>
INLINE void dots_int8(const int8_t* w, int64_t K, const Whole& x, int64_t first, int64_t ahead, Vec (&total)[M][N]) {
  const int16_t* numbers = x.numbers + first * x.padded;
  for (int64_t begin = 0; begin < K; begin += BLOCK) {
    Int part[M][N] = {};
    const int64_t end = smaller(K, begin + BLOCK);
    int64_t k = begin;
    for (int m = 0; m < M; ++m) {
      soon(w + m * K + k + ahead);
      soon(w + m * K + k + ahead + 64);
    }
    for (; k + SHORTS <= end; k += SHORTS) {
      Short v[N];
      for (int n = 0; n < N; ++n) v[n] = load_shorts(numbers + n * x.padded + k);
      for (int m = 0; m < M; ++m) {
        const Short weights = load_bytes(w + m * K + k);
        for (int n = 0; n < N; ++n) part[m][n] = add_pairs(part[m][n], weights, v[n]);
      }
    }
    if (k < end) {
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
          const Short weights = load_bytes(w + m * K + k, end - k);
          part[m][n] = add_pairs(part[m][n], weights, load_shorts(numbers + n * x.padded + k));
        }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        add_scaled(total[m][n], part[m][n], x.scales[(first + n) * x.blocks() + begin / BLOCK]);
      }
  }
}

template <class X>
void linear_int8(ParallelFor pool, const X* x, const int8_t* w, const float* scale, Bias bias, X* y, void* memory,
                 int64_t N, int64_t K, int64_t O) {
  const Whole whole = whole_in(memory, N, pieces(K, BLOCK) * BLOCK, BLOCK);
  make_whole(x, N, K, whole);
  const int64_t ahead = prefetch_distance(K);
  for_row_tiles(pool, O, N, K, [&](auto m_count, auto n_count, int64_t o, int64_t n) {
    constexpr int M = decltype(m_count)::value, NB = decltype(n_count)::value;
    Vec total[M][NB] = {};
    dots_int8<M, NB>(w + o * K, K, whole, n, ahead, total);
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NB; ++j) put(y + (n + j) * O + o + m, sum(total[m][j]) * scale[o + m] + bias.at(o + m));
  });
}

INLINE UShort load_packed(const uint8_t* p) {
  UShort v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Inputs 16 part .. 16 part + 15 of a block.
template <int PART>
INLINE Short nibbles(UShort packed) {
  return (Short)(PART == 3 ? packed >> 12 : (packed >> (4 * PART)) & 15);
}

typedef int16_t EightShorts __attribute__((vector_size(16)));

INLINE Vec low_half(Short v) {
  EightShorts half;
  std::memcpy(&half, &v, sizeof half);
  return __builtin_convertvector(half, Vec);
}

INLINE Vec high_half(Short v) {
  EightShorts half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof half, sizeof half);
  return __builtin_convertvector(half, Vec);
}

// The first `count` (1 .. 16, or more) of inputs 16 PART .. 16 PART + 15 of a block, in fp32, to block + 16 PART.
template <int PART>
INLINE void widen_part(UShort packed, Vec scale, float* block, int64_t count) {
  const Short q = nibbles<PART>(packed) - 8;
  float* to = block + PART * SHORTS;
  store(to, scale * low_half(q), smaller(LANES, count));
  if (count > LANES) store(to + LANES, scale * high_half(q), smaller(LANES, count - LANES));
}

// part[n] += inputs 16 FIRST .. 16 LAST - 1 of one block of a row of W, times those of x.
template <int FIRST, int LAST, int N>
INLINE void add_block(const uint8_t* w, const int16_t* numbers, int64_t padded, Int (&part)[N]) {
  const UShort packed = load_packed(w);
  const auto add = [&](auto index) __attribute__((always_inline)) {
    constexpr int PART = decltype(index)::value;
    if (PART < FIRST || PART >= LAST) return;
    const Short q = nibbles<PART>(packed);
    for (int n = 0; n < N; ++n) {
      part[n] = add_pairs(part[n], q, load_shorts(numbers + n * padded + PART * SHORTS));
    }
  };
  add(Count<0>());
  add(Count<1>());
  add(Count<2>());
  add(Count<3>());
}

// Row by row within a group: side by side, the sums of four rows do not fit the registers.
template <int G, int M, int N>
INLINE void dots_int4(const uint8_t* w, const bf16* w_scales, const Whole& x, int64_t first, int64_t ahead,
                      Vec (&total)[M][N]) {
  const int64_t blocks = x.blocks(), padded = x.padded, row = padded / 2;
  const int16_t* numbers = x.numbers + first * padded;
  const int32_t* offsets = x.offsets + first * blocks * LANES;
  const float* x_scales = x.scales + first * blocks;
  for (int64_t k = 0; k < padded; k += G < PACKED ? PACKED : G) {
    for (int m = 0; m < M; ++m) {
      const uint8_t* from = w + m * row + k / 2;
      Int part[N];
      const auto start = [&](int64_t g) __attribute__((always_inline)) {  // with -8 sum(x): q - 8 instead of q
        for (int n = 0; n < N; ++n) part[n] = load_ints(offsets + (n * blocks + g) * LANES);
      };
      const auto finish = [&](int64_t g) __attribute__((always_inline)) {
        const float scale = number(w_scales[m * blocks + g]);
        for (int n = 0; n < N; ++n) add_scaled(total[m][n], part[n], scale * x_scales[n * blocks + g]);
      };
      soon(from + ahead);
      start(k / G);
      if (G == 32) {
        add_block<0, 2>(from, numbers + k, padded, part);
        finish(k / G);
        start(k / G + 1);
        add_block<2, 4>(from, numbers + k, padded, part);
        finish(k / G + 1);
      } else {
        add_block<0, 4>(from, numbers + k, padded, part);
        if (G == 128) add_block<0, 4>(from + 32, numbers + k + PACKED, padded, part);
        finish(k / G);
      }
    }
  }
}

template <int G, class X>
void linear_int4(ParallelFor pool, const X* x, const uint8_t* w, const bf16* scale, Bias bias, X* y, void* memory,
                 int64_t N, int64_t K, int64_t O) {
  constexpr int64_t UNIT = G > PACKED ? G : PACKED;
  const Whole whole = whole_in(memory, N, pieces(K, UNIT) * UNIT, G);
  make_whole(x, N, K, whole);
  const int64_t row = whole.padded / 2, ahead = prefetch_distance(row);
  for_row_tiles(pool, O, N, K, [&](auto m_count, auto n_count, int64_t o, int64_t n) {
    constexpr int M = decltype(m_count)::value, NB = decltype(n_count)::value;
    constexpr int STEP = M > 2 && NB > 1 ? 2 : M;  // more sums than that do not fit the registers
    for (int64_t first = o; first < o + M; first += STEP) {
      Vec total[STEP][NB] = {};
      dots_int4<G, STEP, NB>(w + first * row, scale + first * whole.blocks(), whole, n, ahead, total);
      for (int m = 0; m < STEP; ++m)
        for (int j = 0; j < NB; ++j) put(y + (n + j) * O + first + m, sum(total[m][j]) + bias.at(first + m));
    }
  });
}

template <class X>
void linear_int4(int64_t group, ParallelFor pool, const X* x, const uint8_t* w, const bf16* scale, Bias bias, X* y,
                 void* memory, int64_t N, int64_t K, int64_t O) {
  if (group == 32) linear_int4<32>(pool, x, w, scale, bias, y, memory, N, K, O);
  if (group == 64) linear_int4<64>(pool, x, w, scale, bias, y, memory, N, K, O);
  if (group == 128) linear_int4<128>(pool, x, w, scale, bias, y, memory, N, K, O);
}

}  // namespace

#define QUANTIZED_KERNELS(X)                                                                                           \
  KERNEL(linear_int8, X)                                                                                               \
  (ParallelFor pool, const X* x, const int8_t* w, const float* scale, const void* bias, int64_t bias_is_bf16, X* y,   \
   void* memory, int64_t N, int64_t K, int64_t O) {                                                                    \
    linear_int8(pool, x, w, scale, {bias, bias_is_bf16 != 0}, y, memory, N, K, O);                                     \
  }                                                                                                                    \
  EXPORT(linear_int8, X)                                                                                               \
  KERNEL(linear_int4, X)                                                                                               \
  (ParallelFor pool, const X* x, const uint8_t* w, const bf16* scale, const void* bias, int64_t bias_is_bf16, X* y,   \
   void* memory, int64_t N, int64_t K, int64_t O, int64_t group) {                                                     \
    linear_int4(group, pool, x, w, scale, {bias, bias_is_bf16 != 0}, y, memory, N, K, O);                              \
  }                                                                                                                    \
  EXPORT(linear_int4, X)

QUANTIZED_KERNELS(float)
QUANTIZED_KERNELS(bf16)

// to[o, k] = w[o, k] in fp32, for O rows.
KERNEL(widen_int8, float)
(ParallelFor pool, const int8_t* w, const float* scale, float* to, int64_t O, int64_t K) {
  parallel(pool, O, K, [&](int64_t o) {
    for (int64_t k = 0; k < K; ++k) to[o * K + k] = scale[o] * w[o * K + k];
  });
}
EXPORT(widen_int8, float)
KERNEL(widen_int4, float)
(ParallelFor pool, const uint8_t* w, const bf16* scale, float* to, int64_t O, int64_t K, int64_t padded,
 int64_t group) {
  parallel(pool, O, K, [&](int64_t o) {
    const bf16* scales = scale + o * (padded / group);
    for (int64_t k = 0; k < K; k += PACKED) {
      const UShort packed = load_packed(w + (o * padded + k) / 2);
      const Vec left = splat(number(scales[k / group])), right = splat(number(scales[(k + 32) / group]));
      float* at = to + o * K + k;
      if (k + PACKED <= K) {
        widen_part<0>(packed, left, at, SHORTS);
        widen_part<1>(packed, left, at, SHORTS);
        widen_part<2>(packed, right, at, SHORTS);
        widen_part<3>(packed, right, at, SHORTS);
      } else {
        widen_part<0>(packed, left, at, K - k);
        if (k + SHORTS < K) widen_part<1>(packed, left, at, K - k - SHORTS);
        if (k + 2 * SHORTS < K) widen_part<2>(packed, right, at, K - k - 2 * SHORTS);
        if (k + 3 * SHORTS < K) widen_part<3>(packed, right, at, K - k - 3 * SHORTS);
      }
    }
  });
}
EXPORT(widen_int4, float)
