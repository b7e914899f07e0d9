// What every kernel file starts from: how a kernel is exported, and how it shares its work among threads.
//
// Each .cpp file here is compiled once per instruction set (setup.py), with GRIFFIN_ISA set to its name. A kernel
//
//     KERNEL(rg_lru_forward, float)(ParallelFor pool, const float* x, int64_t B, ...) { ... }
//     EXPORT(rg_lru_forward, float)
//
// becomes the plain C function griffin_rg_lru_forward_float_avx2 (or ..._portable), which library.py finds by name. All
// of them are called alike, f(pool, values), so that calls can be kept and made again from C (abi.cpp).
// A tensor of whole numbers (positions, tokens) may hold any: no kernel leaves its memory for one. Where a number has no
// meaning the kernel is a CHECKED_KERNEL, which returns 1 + its index, and 0 when all is well.
// Everything else in a kernel file belongs in an anonymous namespace, and nothing from the C++ library that is a
// template or inline may be called: the linker would merge the copies and could run AVX2 code on a CPU without it.
#pragma once

#include "abi.h"

#ifndef GRIFFIN_ISA
#error "setup.py names the instruction set"
#endif

#define GRIFFIN_JOIN_(name, type, isa) griffin_##name##_##type##_##isa
#define GRIFFIN_JOIN(name, type, isa) GRIFFIN_JOIN_(name, type, isa)
#define KERNEL(name, type) static void kernel_##name##_##type
#define CHECKED_KERNEL(name, type) static int64_t kernel_##name##_##type
#define EXPORT(name, type)                                                                                            \
  extern "C" __attribute__((visibility("default"))) int64_t GRIFFIN_JOIN(name, type, GRIFFIN_ISA)(                    \
      ParallelFor pool, const Value* values) {                                                                        \
    return call(kernel_##name##_##type, pool, values);                                                                \
  }

namespace {

template <class T>
struct As;
template <class T>
struct As<T*> {
  static T* from(Value v) { return static_cast<T*>(v.pointer); }
};
template <>
struct As<int64_t> {
  static int64_t from(Value v) { return v.whole; }
};
template <>
struct As<float> {
  static float from(Value v) { return v.real; }
};
template <>
struct As<double> {
  static double from(Value v) { return v.precise; }
};

template <int... I>
struct Indices {};
template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I>
struct UpTo<0, I...> {
  typedef Indices<I...> Type;
};

template <class... A, int... I>
int64_t call_with(void (*kernel)(ParallelFor, A...), ParallelFor pool, const Value* values, Indices<I...>) {
  kernel(pool, As<A>::from(values[I])...);
  return 0;
}

template <class... A, int... I>
int64_t call_with(int64_t (*kernel)(ParallelFor, A...), ParallelFor pool, const Value* values, Indices<I...>) {
  return kernel(pool, As<A>::from(values[I])...);
}

template <class Result, class... A>
int64_t call(Result (*kernel)(ParallelFor, A...), ParallelFor pool, const Value* values) {
  return call_with(kernel, pool, values, typename UpTo<sizeof...(A)>::Type());
}

// Below this many elements of a pointwise formula, waking another thread costs more than it saves.
constexpr int64_t GRAIN_ELEMENTS = 8192;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
// `value`, or the nearer end of low .. high
inline int64_t within(int64_t value, int64_t low, int64_t high) { return larger(low, smaller(value, high)); }
inline int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

// Channels of one task of a kernel that runs over time: as many as `widest`, since long pieces of a row are what memory
// streams best, but two tasks per thread if 64 channels or more allow it. Channels do not mix: no result depends on it.
inline int64_t channels_per_task(int64_t rows, int64_t R, int64_t threads, int64_t widest) {
  int64_t channels = widest;
  while (threads > 1 && channels > 64 && rows * pieces(R, channels) < 2 * threads) channels /= 2;
  return channels;
}

// Run task(i) for i in [0, tasks), each of about `elements` elements. What a task computes must not depend on which
// thread runs it or on how many there are: so results are the same for any number of threads.
template <class Task>
void parallel(ParallelFor pool, int64_t tasks, int64_t elements, const Task& task) {
  const ParallelBody body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Task*>(context))(i);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&task));
  const int64_t grain = larger(1, GRAIN_ELEMENTS / larger(1, elements));
  if (pool == nullptr || tasks <= grain || pool(0, tasks, grain, body, context) != 0) body(0, tasks, context);
}

}  // namespace
