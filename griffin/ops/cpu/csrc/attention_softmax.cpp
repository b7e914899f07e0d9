// The pointwise half of local_attention: PyTorch multiplies the matrices, this does what is between the products.
//
// A block is n tokens in a row of the batch and the m keys that any of them sees: scores (G, n, r, m) with r = H / G
// query heads to a key head, fp32, contiguous. Token t of the block sees columns [begin, end) of its r rows:
//
//     begin = first[t] - left, end = own + t + 1
//
// (at least column 0, at most its own).
// first (n): the first key each token sees; left: the key of column 0; own: the column of the block's first token.
// Outside of [begin, end) nothing is read and zeros are written. A task is one token and one key head.
#include "functions.h"
#include "kernel.h"

namespace {

struct Block {
  int64_t left, own, G, n, r, m;
};

struct Row {
  int64_t at;          // of its column 0
  int64_t begin, end;  // the columns it sees
};

template <class F>
void for_rows(ParallelFor pool, const Block& o, const int64_t* first, const F& f) {
  parallel(pool, o.G * o.n, o.r * o.m, [&](int64_t task) {
    const int64_t t = task % o.n, end = o.own + t + 1;
    const int64_t begin = within(first[t], o.left, o.left + end - 1) - o.left;
    for (int64_t row = task * o.r; row < (task + 1) * o.r; ++row) f(Row{row * o.m, begin, end});
  });
}

INLINE void zero_outside(float* row, int64_t begin, int64_t end, int64_t m) {
  std::memset(row, 0, begin * sizeof(float));
  std::memset(row + end, 0, (m - end) * sizeof(float));
}

// f(c, lanes) over the columns [begin, end), whole vectors first
template <class F>
INLINE void for_columns(int64_t begin, int64_t end, const F& f) {
  int64_t c = begin;
  for (; c + LANES <= end; c += LANES) f(c, LANES);
  if (c < end) f(c, end - c);
}

INLINE float largest(const float* p, int64_t n) {
  float top = p[0];
  int64_t c = 0;
  if (n >= 4 * LANES) {
    Vec tops[4];
    for (int k = 0; k < 4; ++k) tops[k] = load(p + k * LANES);
    for (c = 4 * LANES; c + 4 * LANES <= n; c += 4 * LANES)
      for (int k = 0; k < 4; ++k) tops[k] = max(tops[k], load(p + c + k * LANES));
    const Vec all = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    for (int64_t i = 0; i < LANES; ++i) top = all[i] > top ? all[i] : top;
  }
  for (; c < n; ++c) top = p[c] > top ? p[c] : top;
  return top;
}

// scores -> P = softmax(scale scores)
void forward(ParallelFor pool, float* scores, const int64_t* first, float scale, Block o) {
  for_rows(pool, o, first, [&](const Row& row) {
    float* p = scores + row.at;
    zero_outside(p, row.begin, row.end, o.m);
    const float top = largest(p + row.begin, row.end - row.begin);
    Vec total = {};
    for_columns(row.begin, row.end, [&](int64_t c, int64_t lanes) {
      store(p + c, exp((load(p + c, lanes) - splat(top)) * splat(scale)), lanes);
      total += load(p + c, lanes);  // no more lanes than columns
    });
    const Vec share = splat(1.0f / sum(total));
    for_columns(row.begin, row.end,
                [&](int64_t c, int64_t lanes) { store(p + c, load(p + c, lanes) * share, lanes); });
  });
}

// scores -> P, as above;  dP -> scale P (dP - sum of P dP), the gradient of the scores. P is computed again, and not as
// e^(scale score - a kept logarithm of the sum): rounding that would leave sum P = 1 + error, and dP times the error.
void backward(ParallelFor pool, float* scores, float* dp, const int64_t* first, float scale, Block o) {
  for_rows(pool, o, first, [&](const Row& row) {
    float* p = scores + row.at;
    float* d = dp + row.at;
    zero_outside(p, row.begin, row.end, o.m);
    zero_outside(d, row.begin, row.end, o.m);
    const float top = largest(p + row.begin, row.end - row.begin);
    Vec total = {}, flow = {};
    for_columns(row.begin, row.end, [&](int64_t c, int64_t lanes) {
      store(p + c, exp((load(p + c, lanes) - splat(top)) * splat(scale)), lanes);
      total += load(p + c, lanes);
      flow = fma(load(p + c, lanes), load(d + c, lanes), flow);
    });
    const float inverse = 1.0f / sum(total);
    const Vec share = splat(inverse), mean = splat(sum(flow) * inverse);
    for_columns(row.begin, row.end, [&](int64_t c, int64_t lanes) {
      const Vec v = load(p + c, lanes) * share;
      store(p + c, v, lanes);
      store(d + c, v * splat(scale) * (load(d + c, lanes) - mean), lanes);
    });
  });
}

}  // namespace

KERNEL(attention_softmax_forward, float)
(ParallelFor pool, float* scores, const int64_t* first, float scale, int64_t left, int64_t own, int64_t G, int64_t n,
 int64_t r, int64_t m) {
  forward(pool, scores, first, scale, {left, own, G, n, r, m});
}
EXPORT(attention_softmax_forward, float)

KERNEL(attention_softmax_backward, float)
(ParallelFor pool, float* scores, float* dp, const int64_t* first, float scale, int64_t left, int64_t own, int64_t G,
 int64_t n, int64_t r, int64_t m) {
  backward(pool, scores, dp, first, scale, {left, own, G, n, r, m});
}
EXPORT(attention_softmax_backward, float)
