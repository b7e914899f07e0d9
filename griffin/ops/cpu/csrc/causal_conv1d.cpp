// y_t = bias + sum over s < N of weight[N-1-s] x_{t-s}, not across resets; contract in griffin/ops/conv.py.
//
// x, y (B, T, R) and state, last (B, N-1, R) of type T, weight (R, N) and bias (R) fp32, reset (B, T) bytes or null,
// all contiguous; 1 <= N <= 8. The input j < 0 is state[N-1+j]. Token t uses x_{t-s} if no
// token of (t-s, t] is a reset. The forward pass takes packed rows too: with offsets (B + 1), what is (B, T, ...) is
// (1, T, ...).
//
// A task is SPAN tokens (of all rows, forward; of one, backward) and BLOCK channels.
#include "kernel.h"
#include "packed.h"
#include "vec.h"

namespace {

constexpr int64_t SPAN = 64, BLOCK = 128, MAX_TAPS = 8;

// The weights of `n` channels, tap by tap: taps[k][c] = weight[c, k]. Unused lanes are zero.
INLINE void transpose(const float* weight, int64_t n, int64_t N, float (*taps)[BLOCK]) {
  for (int64_t k = 0; k < N; ++k) {
    for (int64_t c = 0; c < n; ++c) taps[k][c] = weight[c * N + k];
    for (int64_t c = n; c % LANES != 0; ++c) taps[k][c] = 0.0f;
  }
}

template <class T>
struct Inputs {
  const T* x;
  const T* state;
  int64_t T_, R, N;

  const T* row(int64_t b, int64_t t) const {
    return t >= 0 ? x + (b * T_ + t) * R : state + (b * (N - 1) + (N - 1 + t)) * R;
  }
};

template <class T>
int64_t forward(ParallelFor pool, const T* x, const float* weight, const float* bias, const T* state,
                const uint8_t* reset, const int64_t* offsets, T* y, T* last, int64_t B, int64_t time, int64_t R,
                int64_t N) {
  const Tokens tokens{offsets, B, time};
  if (const int64_t wrong = tokens.wrong()) return wrong;
  const int64_t blocks = pieces(R, BLOCK), spans = pieces(tokens.all(), SPAN);
  // Input j, counted among the tokens of all rows, of a row b that begins at token `begin`.
  const auto input = [&](int64_t b, int64_t begin, int64_t j) {
    return j >= begin ? x + j * R : state + (b * (N - 1) + (N - 1 + j - begin)) * R;
  };
  const auto starts = [&](int64_t begin, int64_t t) { return reset != nullptr && t >= begin && reset[t]; };
  parallel(pool, spans * blocks, SPAN * BLOCK / 2, [&](int64_t task) {
    const int64_t span = task / blocks, first = task % blocks * BLOCK, n = smaller(BLOCK, R - first);
    float taps[MAX_TAPS][BLOCK];
    transpose(weight + first * N, n, N, taps);
    int64_t b = tokens.row_of(span * SPAN, 0), begin = tokens.begin(b);
    for (int64_t t = span * SPAN; t < smaller((span + 1) * SPAN, tokens.all()); ++t) {
      if (t >= tokens.end(b)) b = tokens.row_of(t, b), begin = tokens.begin(b);
      int64_t reach = 0;  // how many earlier inputs count
      while (reach < N - 1 && !starts(begin, t - reach)) ++reach;
      const T* rows[MAX_TAPS];
      for (int64_t s = 0; s <= reach; ++s) rows[s] = input(b, begin, t - s) + first;
      T* out = y + t * R + first;
      if (N == 4 && reach == 3) {
        for (int64_t c = 0; c < n; c += LANES) {
          const int64_t lanes = smaller(LANES, n - c);
          Vec sum = fma(load(taps[3] + c), load(rows[0] + c, lanes), load(bias + first + c, lanes));
          sum = fma(load(taps[2] + c), load(rows[1] + c, lanes), sum);
          sum = fma(load(taps[1] + c), load(rows[2] + c, lanes), sum);
          sum = fma(load(taps[0] + c), load(rows[3] + c, lanes), sum);
          store(out + c, sum, lanes);
        }
      } else {
        for (int64_t c = 0; c < n; c += LANES) {
          const int64_t lanes = smaller(LANES, n - c);
          Vec sum = load(bias + first + c, lanes);
          for (int64_t s = 0; s <= reach; ++s) sum = fma(load(taps[N - 1 - s] + c), load(rows[s] + c, lanes), sum);
          store(out + c, sum, lanes);
        }
      }
    }
    for (b = 0; b < B; ++b) {  // what the rows leave that end in this span
      if (larger(0, tokens.end(b) - 1) / SPAN != span) continue;
      bool dropped = false;  // a reset comes after this input
      for (int64_t k = N - 2; k >= 0; --k) {
        const int64_t t = tokens.end(b) - (N - 1) + k;
        T* out = last + (b * (N - 1) + k) * R + first;
        if (dropped) {
          std::memset(out, 0, n * sizeof(T));
        } else {
          std::memcpy(out, input(b, tokens.begin(b), t) + first, n * sizeof(T));
        }
        dropped = dropped || starts(tokens.begin(b), t);
      }
    }
  });
  return 0;
}

// Input j gives to y_{j+s}, s = 0 .. N-1, until a reset after j or the end of time; if it is the end, also to `last`:
//     dx_j = sum_s weight[N-1-s] dy_{j+s} (+ dlast_j)    dweight[N-1-s] = sum_j dy_{j+s} x_j    dbias = sum_t dy_t
// shares (B * spans, N + 1, R) fp32 is scratch: each task sums its part of dweight and dbias into its own place, and
// these are added in order at the end.
template <class T>
void backward(ParallelFor pool, const T* dy, const T* dlast, const T* x, const float* weight, const T* state,
              const uint8_t* reset, T* dx, float* shares, float* dweight, float* dbias, T* dstate, int64_t B,
              int64_t time, int64_t R, int64_t N) {
  const int64_t blocks = pieces(R, BLOCK), spans = pieces(time, SPAN);
  const Inputs<T> inputs{x, state, time, R, N};
  parallel(pool, B * spans * blocks, SPAN * BLOCK, [&](int64_t task) {
    const int64_t b = task / (spans * blocks), span = task / blocks % spans, begin = span * SPAN;
    const int64_t first = task % blocks * BLOCK, n = smaller(BLOCK, R - first);
    const uint8_t* starts = reset == nullptr ? nullptr : reset + b * time;
    float taps[MAX_TAPS][BLOCK], sums[MAX_TAPS + 1][BLOCK] = {};
    transpose(weight + first * N, n, N, taps);
    // The first task of a row also has the inputs that came in `state`.
    for (int64_t j = begin == 0 ? 1 - N : begin; j < smaller(begin + SPAN, time); ++j) {
      int64_t reach = 0;  // y_{j+s} uses input j for s <= reach, where j + s is a token
      for (int64_t t = j + 1; reach < N - 1 && t < time && !(starts != nullptr && t >= 0 && starts[t]); ++t) ++reach;
      const bool kept = reach < N - 1 && j + reach + 1 == time;
      const int64_t from = larger(0, -j);
      const T* in = inputs.row(b, j) + first;
      const auto flow_at = [&](int64_t s, int64_t c) { return dy + (b * time + j + s) * R + first + c; };
      const T* to_last = kept ? dlast + (b * (N - 1) + (j - (time - (N - 1)))) * R + first : nullptr;
      T* out = (j >= 0 ? dx + (b * time + j) * R : dstate + (b * (N - 1) + (N - 1 + j)) * R) + first;
      for (int64_t c = 0; c < n; c += LANES) {
        const int64_t lanes = smaller(LANES, n - c);
        const Vec input = load(in + c, lanes);
        Vec sum = kept ? load(to_last + c, lanes) : splat(0.0f);
        if (N == 4 && from == 0 && reach == 3) {
          for (int64_t s = 0; s < 4; ++s) {
            const Vec flow = load(flow_at(s, c), lanes);
            sum = fma(load(taps[3 - s] + c), flow, sum);
            store(sums[3 - s] + c, fma(flow, input, load(sums[3 - s] + c)));
          }
        } else {
          for (int64_t s = from; s <= reach; ++s) {
            const Vec flow = load(flow_at(s, c), lanes);
            sum = fma(load(taps[N - 1 - s] + c), flow, sum);
            store(sums[N - 1 - s] + c, fma(flow, input, load(sums[N - 1 - s] + c)));
          }
        }
        if (j >= 0) store(sums[N] + c, load(sums[N] + c) + load(flow_at(0, c), lanes));
        store(out + c, sum, lanes);
      }
    }
    for (int64_t k = 0; k <= N; ++k) {
      std::memcpy(shares + ((b * spans + span) * (N + 1) + k) * R + first, sums[k], n * sizeof(float));
    }
  });
  parallel(pool, blocks, B * spans * (N + 1) * BLOCK, [&](int64_t block) {
    const int64_t first = block * BLOCK, n = smaller(BLOCK, R - first);
    for (int64_t k = 0; k <= N; ++k) {
      for (int64_t c = first; c < first + n; c += LANES) {
        const int64_t lanes = smaller(LANES, first + n - c);
        Vec sum = splat(0.0f);
        for (int64_t share = 0; share < B * spans; ++share) sum += load(shares + (share * (N + 1) + k) * R + c, lanes);
        for (int64_t i = 0; i < lanes; ++i) (k == N ? dbias[c + i] : dweight[(c + i) * N + k]) = sum[i];
      }
    }
  });
}

}  // namespace

#define CAUSAL_CONV1D_KERNELS(T)                                                                                      \
  CHECKED_KERNEL(causal_conv1d_forward, T)                                                                            \
  (ParallelFor pool, const T* x, const float* weight, const float* bias, const T* state, const uint8_t* reset,        \
   const int64_t* offsets, T* y, T* last, int64_t B, int64_t time, int64_t R, int64_t N) {                            \
    return forward<T>(pool, x, weight, bias, state, reset, offsets, y, last, B, time, R, N);                          \
  }                                                                                                                   \
  EXPORT(causal_conv1d_forward, T)                                                                                    \
  KERNEL(causal_conv1d_backward, T)                                                                                   \
  (ParallelFor pool, const T* dy, const T* dlast, const T* x, const float* weight, const T* state,                    \
   const uint8_t* reset, T* dx, float* shares, float* dweight, float* dbias, T* dstate, int64_t B, int64_t time,      \
   int64_t R, int64_t N) {                                                                                            \
    backward<T>(pool, dy, dlast, x, weight, state, reset, dx, shares, dweight, dbias, dstate, B, time, R, N);         \
  }                                                                                                                    \
  EXPORT(causal_conv1d_backward, T)

CAUSAL_CONV1D_KERNELS(float)
CAUSAL_CONV1D_KERNELS(bf16)
