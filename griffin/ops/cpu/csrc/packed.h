// Where the tokens of each row lie: of rows of one length T one after another, or, of packed rows (griffin/ops/packed.py),
// where `offsets` (B + 1) says. T counts the tokens of one row, or of all packed rows.
#pragma once

#include "kernel.h"

namespace {

struct Tokens {
  const int64_t* offsets;  // null: rows of one length
  int64_t B, T;

  bool packed() const { return offsets != nullptr; }
  int64_t all() const { return packed() ? T : B * T; }
  int64_t begin(int64_t b) const { return packed() ? offsets[b] : b * T; }
  int64_t end(int64_t b) const { return packed() ? offsets[b + 1] : (b + 1) * T; }

  // Whose token t is, b or a later row: rows without tokens are passed by.
  int64_t row_of(int64_t t, int64_t b) const {
    while (t >= end(b)) ++b;
    return b;
  }

  // 0, or 1 + the index of the first offset that does not rise from 0 to T.
  int64_t wrong() const {
    if (!packed()) return 0;
    for (int64_t b = 0; b <= B; ++b) {
      if (offsets[b] < (b == 0 ? 0 : offsets[b - 1]) || offsets[b] > T) return 1 + b;
    }
    return offsets[0] != 0 ? 1 : offsets[B] != T ? 1 + B : 0;
  }
};

}  // namespace
