// How Python and the kernels meet.
#pragma once

#include <cstdint>

// torch_parallel_for of libtorch_cpu, or null to run on the calling thread. Calls f on pieces of [begin, end), each at
// least `grain` long, on torch's thread pool.
extern "C" {
typedef void (*ParallelBody)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);
}

// One argument of a kernel, as library.py packs it.
union Value {
  void* pointer;
  int64_t whole;
  float real;
  double precise;
};

// Gives 0, or of a CHECKED_KERNEL 1 + the index of the first whole number that is out of range.
typedef int64_t (*Exported)(ParallelFor pool, const Value* values);
