// SPDX-License-Identifier: Apache-2.0
// Generalized advantage estimation as a scan along time: one pass over memory, no loop over tokens.
//
// From right to left a row carries (v, y) of the nearest unmasked token so far, (0, 0) at its end.
// With c = gamma lambda and f = gamma (1 - lambda), an unmasked token with reward r and value V
// makes of it
//
//     y' = r + f v + c y,   v' = V,   advantage = y' - V,   return = y'
//
// and a masked one leaves it alone: advantage = y - v, return = y - v + V. A run of tokens does the
// same with other numbers, so neighboring runs can be joined in any order:
//
//     y' = a + d (f v + c y),   v' = V of the leftmost unmasked token
//
// where d = c^(n-1) for n unmasked tokens. One block takes a row, in tiles from the right. A thread
// joins its tokens, a warp its lanes with shuffles, the first warp the runs of the tile. The states
// come down the same way. Sums and powers are double, which powers of c near 1 need.
#include "common.cuh"

constexpr int kTokens = 4;    // neighboring tokens that a thread has in each part of a tile
constexpr int kParts = 4;     // of a tile
constexpr int kMostWarps = 4; // of a block; one warp joins kParts * kMostWarps runs, at most 32

template <class T> struct State { T v; double y; };
template <class T> struct Run { T v; double a, d; };  // d < 0: no unmasked token

// ---- joining runs -------------------------------------------------------------------------------

struct Discount {
  double f, c;

  __device__ double next(double v, double y) const { return f * v + c * y; }

  // What a run makes of the state that comes from its right.
  template <class T> __device__ State<T> enter(const Run<T>& run, const State<T>& state) const {
    if (run.d < 0) return state;
    return {run.v, run.a + run.d * next(state.v, state.y)};
  }

  template <class T> __device__ Run<T> join(const Run<T>& left, const Run<T>& right) const {
    if (left.d < 0) return right;
    if (right.d < 0) return left;
    return {left.v, left.a + left.d * next(right.v, right.a), left.d * c * right.d};
  }

  // The run of this lane and of all lanes to its right.
  template <class T> __device__ Run<T> join_lanes(Run<T> run, int lane) const {
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const Run<T> right = {__shfl_down_sync(kFullMask, run.v, by),
                            __shfl_down_sync(kFullMask, run.a, by),
                            __shfl_down_sync(kFullMask, run.d, by)};
      if (lane + by < kWarp) run = join(run, right);
    }
    return run;
  }
};

// The run of the lanes to the right of this one, from what join_lanes has returned.
template <class T> __device__ inline Run<T> right_of(const Run<T>& run, int lane) {
  Run<T> right = {__shfl_down_sync(kFullMask, run.v, 1), __shfl_down_sync(kFullMask, run.a, 1),
                  __shfl_down_sync(kFullMask, run.d, 1)};
  if (lane == kWarp - 1) right.d = -1;
  return right;
}

// ---- a thread's tokens --------------------------------------------------------------------------

// Moved 16 bytes at a time, a mask of bytes 4.
template <class T> struct Words { using type = uint4; };
template <> struct Words<unsigned char> { using type = unsigned; };
template <class T> union Tokens {
  T x[kTokens];
  typename Words<T>::type words[sizeof(T) * kTokens / sizeof(typename Words<T>::type)];
};

template <class T> __device__ inline bool aligned(const T* p) {
  return (unsigned long long)p % sizeof(typename Words<T>::type) == 0;
}

// Tokens after the end of the row are 0: masked.
template <class T>
__device__ inline void load(const T* row, int t, int steps, bool vector, T (&x)[kTokens]) {
  using Word = typename Words<T>::type;
  if (vector && t + kTokens <= steps) {
    Tokens<T> tokens;
#pragma unroll
    for (unsigned i = 0; i < sizeof tokens / sizeof(Word); ++i)
      tokens.words[i] = __ldcs(reinterpret_cast<const Word*>(row + t) + i);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) x[i] = tokens.x[i];
  } else {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) x[i] = t + i < steps ? row[t + i] : T(0);
  }
}

template <class T>
__device__ inline void store(T* row, int t, int steps, bool vector, const T (&x)[kTokens]) {
  using Word = typename Words<T>::type;
  if (vector && t + kTokens <= steps) {
    const Tokens<T> tokens = {{x[0], x[1], x[2], x[3]}};
#pragma unroll
    for (unsigned i = 0; i < sizeof tokens / sizeof(Word); ++i)
      __stcs(reinterpret_cast<Word*>(row + t) + i, tokens.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      if (t + i < steps) row[t + i] = x[i];
  }
}

// ---- the kernel ---------------------------------------------------------------------------------

// Grid: one block a row, of 32 to 128 threads. A row has fewer than 2^31 - 2048 tokens and starts
// `..._stride` elements after the row before. Lambda of row b is lambdas[b], or `lambda` where
// that is null.
template <class T, class M>
__global__ void __launch_bounds__(kMostWarps * kWarp, sizeof(T) == 4 ? 4 : 2)
gae(const T* __restrict__ rewards, const T* __restrict__ values, const M* __restrict__ mask,
    const double* __restrict__ lambdas, T* __restrict__ advantages, T* __restrict__ returns,
    long long steps_, long long rewards_stride, long long values_stride, long long mask_stride,
    double gamma, double lambda) {
  SHARED_ARRAY(Run<T>, runs, kParts * kMostWarps);
  SHARED_ARRAY(State<T>, states, kParts * kMostWarps);
  const long long row = blockIdx.x;
  const int steps = (int)steps_, threads = blockDim.x, thread = threadIdx.x;
  const int warps = threads / kWarp, warp = thread / kWarp, lane = thread % kWarp;
  rewards += row * rewards_stride, values += row * values_stride, mask += row * mask_stride;
  advantages += row * steps, returns += row * steps;
  if (lambdas) lambda = lambdas[row];
  const Discount discount = {gamma * (1 - lambda), gamma * lambda};
  const bool vector = aligned(rewards) && aligned(values) && aligned(mask) &&
                      aligned(advantages) && aligned(returns);

  const int tile = kParts * kTokens * threads;
  State<T> carried = {T(0), 0};  // of the first warp: what the tiles to the right have left
  for (int start = (steps - 1) / tile * tile; start >= 0; start -= tile) {
    T r[kParts][kTokens], v[kParts][kTokens];
    unsigned unmasked = 0;  // one bit a token
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int t = start + kTokens * (part * threads + thread);
      M m[kTokens];
      load(rewards, t, steps, vector, r[part]);
      load(values, t, steps, vector, v[part]);
      load(mask, t, steps, vector, m);
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
        unmasked |= (unsigned)(m[i] != M(0)) << (kTokens * part + i);
    }

    Run<T> right[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Run<T> run = {T(0), 0, -1};
#pragma unroll
      for (int i = kTokens - 1; i >= 0; --i)
        if (unmasked >> (kTokens * part + i) & 1)
          run = discount.join({v[part][i], (double)r[part][i], 1}, run);
      run = discount.join_lanes(run, lane);
      if (lane == 0) runs[part * warps + warp] = run;
      right[part] = right_of(run, lane);
    }
    __syncthreads();

    if (warp == 0) {
      Run<T> run = {T(0), 0, -1};
      if (lane < kParts * warps) run = runs[lane];
      run = discount.join_lanes(run, lane);
      const State<T> state = discount.enter(right_of(run, lane), carried);
      if (lane < kParts * warps) states[lane] = state;
      const Run<T> whole_tile = {__shfl_sync(kFullMask, run.v, 0), __shfl_sync(kFullMask, run.a, 0),
                                 __shfl_sync(kFullMask, run.d, 0)};
      carried = discount.enter(whole_tile, carried);
    }
    __syncthreads();

#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int t = start + kTokens * (part * threads + thread);
      State<T> state = discount.enter(right[part], states[part * warps + warp]);
      T advantage[kTokens], result[kTokens];
#pragma unroll
      for (int i = kTokens - 1; i >= 0; --i) {
        const bool counts = unmasked >> (kTokens * part + i) & 1;
        if (counts) state = {v[part][i], r[part][i] + discount.next(state.v, state.y)};
        const double difference = state.y - state.v;
        advantage[i] = (T)difference;
        result[i] = (T)(counts ? state.y : difference + v[part][i]);
      }
      store(advantages, t, steps, vector, advantage);
      store(returns, t, steps, vector, result);
    }
  }
}
