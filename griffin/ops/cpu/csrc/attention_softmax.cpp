// The pointwise half of local_attention: PyTorch multiplies the matrices, this does what is between the products.
//
// A block is n tokens in a row of the batch and the m keys that any of them sees: scores (G, n, r, m) with r = H / G
// query heads to a key head, fp32, contiguous. Token t of the block sees columns [begin, end) of its r rows:
//
//     begin = first[t] - left, end = own + t + 1
//
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
  int64_t lse;         // its place in lse (n, G, r)
};

template <class F>
void for_rows(ParallelFor pool, const Block& o, const int64_t* first, const F& f) {
  parallel(pool, o.G * o.n, o.r * o.m, [&](int64_t task) {
    const int64_t t = task % o.n, g = task / o.n;
    const int64_t begin = first[t] - o.left, end = o.own + t + 1;
    for (int64_t h = 0; h < o.r; ++h) f(Row{(task * o.r + h) * o.m, begin, end, (t * o.G + g) * o.r + h});
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

// scores -> softmax(scale scores);  lse = log of the sum of e^(scale score)
void forward(ParallelFor pool, float* scores, const int64_t* first, float* lse, float scale, Block o) {
  for_rows(pool, o, first, [&](const Row& row) {
    float* p = scores + row.at;
    zero_outside(p, row.begin, row.end, o.m);
    const float top = largest(p + row.begin, row.end - row.begin);
    Vec sums = {};
    for_columns(row.begin, row.end, [&](int64_t c, int64_t lanes) {
      store(p + c, exp((load(p + c, lanes) - splat(top)) * splat(scale)), lanes);
      sums += load(p + c, lanes);  // no more lanes than columns
    });
    const float total = sum(sums);
    lse[row.lse] = top * scale + __builtin_logf(total);
    const Vec share = splat(1.0f / total);
    for_columns(row.begin, row.end, [&](int64_t c, int64_t lanes) {
      store(p + c, load(p + c, lanes) * share, lanes);
    });
  });
}

// With P = e^(scale score - lse):  scores -> P,  dP -> scale P (dP - sum of P dP), the gradient of the scores.
void backward(ParallelFor pool, float* scores, float* dp, const int64_t* first, const float* lse, float scale,
              Block o) {
  for_rows(pool, o, first, [&](const Row& row) {
    float* p = scores + row.at;
    float* d = dp + row.at;
    zero_outside(p, row.begin, row.end, o.m);
    zero_outside(d, row.begin, row.end, o.m);
    const Vec log_sum = splat(lse[row.lse]);
    Vec sums = {};
    for_columns(row.begin, row.end, [&](int64_t c, int64_t lanes) {
      store(p + c, exp(fma(load(p + c, lanes), splat(scale), -log_sum)), lanes);
      sums = fma(load(p + c, lanes), load(d + c, lanes), sums);
    });
    const Vec mean = splat(sum(sums));
    for_columns(row.begin, row.end, [&](int64_t c, int64_t lanes) {
      store(d + c, load(p + c, lanes) * splat(scale) * (load(d + c, lanes) - mean), lanes);
    });
  });
}

}  // namespace

KERNEL(attention_softmax_forward, float)
(ParallelFor pool, float* scores, const int64_t* first, float* lse, float scale, int64_t left, int64_t own, int64_t G,
 int64_t n, int64_t r, int64_t m) {
  forward(pool, scores, first, lse, scale, {left, own, G, n, r, m});
}
EXPORT(attention_softmax_forward, float)

KERNEL(attention_softmax_backward, float)
(ParallelFor pool, float* scores, float* dp, const int64_t* first, const float* lse, float scale, int64_t left,
 int64_t own, int64_t G, int64_t n, int64_t r, int64_t m) {
  backward(pool, scores, dp, first, lse, scale, {left, own, G, n, r, m});
}
EXPORT(attention_softmax_backward, float)
