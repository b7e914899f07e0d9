// exp, expm1, log1p and what is made of them, on eight lanes. Polynomials fitted to the reduced ranges by weighted
// least squares (relative error, equal ripples). NaN gives NaN. Measured maxima of the relative error against fp64 are
// asserted in tests/ops/test_cpu_kernels.py through functions.cpp.
#pragma once

#include "vec.h"

namespace {

// x = k ln 2 + r with |r| <= ln 2 / 2; power = 2^k; expm1_r = e^r - 1.
// k is -127 (power = 0) from x = -87.7 down and 128 (power = inf) from x = 88.4 up: no subnormals on the way.
struct Reduced {
  Vec power, expm1_r;
};

INLINE Reduced reduce(Vec x) {
  // Adding 1.5 * 2^23 rounds to a whole number, whose bits are then the lowest ones of the sum.
  const Vec magic = splat(12582912.0f);
  x = min(splat(88.7228391f), max(splat(-88.0296919f), x));
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec k = shifted - magic;
  Vec r = fma(k, splat(-0.693359375f), x);  // ln 2 in two parts: the first has 9 bits, so that k times it is exact
  r = fma(k, splat(2.12194440e-4f), r);
  Vec q = fma(r, splat(0.00139475974720f), splat(0.00836724694818f));
  q = fma(q, r, splat(0.0416662655776f));
  q = fma(q, r, splat(0.166665375233f));
  q = fma(q, r, splat(0.5f));
  const Unsigned exponent = (Unsigned)shifted - (Unsigned)magic + 127;
  return {(Vec)(exponent << 23), fma(r * r, q, r)};
}

// e^x. Zero below x = -87.7, infinite above 88.4 (a sum of power and power * expm1_r would be inf - inf there).
INLINE Vec exp(Vec x) {
  const Reduced e = reduce(x);
  return e.power * (splat(1.0f) + e.expm1_r);
}

// a = e^x and 1 - a, which does not cancel as x -> 0. For x <= 0; a = 1 and 1 - a = 0 exactly at x = 0.
struct Decay {
  Vec a, one_minus_a;
};

INLINE Decay decay(Vec x) {
  const Reduced e = reduce(x);
  const Vec scaled = e.power * e.expm1_r;
  return {e.power + scaled, (splat(1.0f) - e.power) - scaled};
}

// 1 / (1 + e^-x): exactly 0 at -inf, exactly 1 at +inf.
INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

// log(1 + u) for u in [0, 1], as 2 atanh(s) with s = u / (2 + u) <= 1/3.
INLINE Vec log1p(Vec u) {
  const Vec s = u / (splat(2.0f) + u), z = s * s;
  Vec p = fma(z, splat(0.121504671872f), splat(0.107138291001f));
  p = fma(p, z, splat(0.143084421754f));
  p = fma(p, z, splat(0.199994385242f));
  p = fma(p, z, splat(0.333333373070f));
  return fma(s + s, p * z, s + s);
}

// log(1 + e^x)
INLINE Vec softplus(Vec x) { return max(splat(0.0f), x) + log1p(exp(-abs(x))); }

// gelu_tanh(x) = x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
constexpr float GELU_2SQRT2PI = 1.59576912f, GELU_CUBIC = 0.044715f;

INLINE Vec gelu_sigmoid(Vec x) {
  return sigmoid(splat(GELU_2SQRT2PI) * fma(x * x * splat(GELU_CUBIC), x, x));
}

INLINE Vec gelu(Vec x) { return x * gelu_sigmoid(x); }

// d gelu / dx = s + x s (1 - s) 2u', given s = gelu_sigmoid(x)
INLINE Vec gelu_slope(Vec x, Vec s) {
  const Vec twice_u_slope = splat(GELU_2SQRT2PI) * fma(x * x, splat(3 * GELU_CUBIC), splat(1.0f));
  return fma(x * s * (splat(1.0f) - s), twice_u_slope, s);
}

}  // namespace
