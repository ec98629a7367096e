// SPDX-License-Identifier: Apache-2.0
// Log-probabilities of target tokens and entropies from rows of logits, and their gradient.
//
// One block works on one row. The forward kernel reads every logit once; the backward kernel reads
// it once and writes its gradient once, over the logit if wanted. A row may also come in pieces, one
// launch a range of columns: what a piece found waits in `maximum`, `total`, `logprobs` and
// `entropy` for the next.
#include "common.cuh"

// 16-byte loads that a thread has under way at once.
template <class T> constexpr int kUnroll = sizeof(T) == 8 ? 2 : 4;

// Blocks that a multiprocessor shall hold: 1024 threads, which leaves each 64 registers, and loads
// of 64 KiB under way, four times what keeps an H100's memory busy. Doubles take twice the registers.
template <class T, int BLOCK> constexpr int kBlocks = (sizeof(T) == 8 ? 512 : 1024) / BLOCK;
constexpr long long kIgnored = -100;  // targets with this value are left out
constexpr int kFirst = 1, kLast = 2;  // bits of `piece`: holds the row's first, its last column

// 2^x is 0 for every x down here, and 0 times this is 0, which 0 times -infinity is not.
constexpr int kLowest = -2000;

// ---- rows ---------------------------------------------------------------------------------------

// Where row `row` starts, in a tensor (outer, inner, columns) of any strides.
__device__ inline long long row_offset(long long row, long long inner, long long outer_stride,
                                       long long inner_stride) {
  return row / inner * outer_stride + row % inner * inner_stride;
}

// Bounds a logit: cap tanh(x / cap). Without SOFTCAP the logit stays as it is.
template <bool SOFTCAP, class A> struct Cap {
  A cap, inverse;
  __device__ explicit Cap(double value) : cap((A)value), inverse((A)(1 / value)) {}
  __device__ A operator()(A x) const {
    if constexpr (SOFTCAP) return cap * tanh_of(x * inverse);
    else return x;
  }
};

// ---- online softmax -----------------------------------------------------------------------------

// A row as far as it was seen, with d = (z - maximum) scale, where scale = log2(e) / temperature:
// the largest z, the sum of 2^d, and the sum of d 2^d.
template <class A> struct Softmax { A maximum, total, weighted; };

// Goes over to a larger maximum: every d falls by the same amount.
template <class A> __device__ inline void raise_maximum(Softmax<A>& row, A maximum, A scale) {
  const A change = larger((row.maximum - maximum) * scale, (A)kLowest);
  const A factor = exp2_fast(change);
  row.weighted = multiply_add(row.total, change, row.weighted) * factor;
  row.total *= factor;
  row.maximum = maximum;
}

// Takes in COUNT more of the row. One comparison with the old maximum for all of them.
template <bool ENTROPY, int COUNT, class A>
__device__ inline void add(Softmax<A>& row, const A (&z)[COUNT], A scale) {
  A top = z[0];
#pragma unroll
  for (int i = 1; i < COUNT; ++i) top = larger(top, z[i]);
  if (top > row.maximum) raise_maximum(row, top, scale);
  // Nothing but -infinity so far: any finite reference gives 2^d = 0.
  const A reference = row.maximum == minus_infinity<A>() ? (A)0 : row.maximum;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const A d = (z[i] - reference) * scale;
    const A e = exp2_fast(d);
    row.total += e;
    if constexpr (ENTROPY) row.weighted = multiply_add(e, larger(d, (A)kLowest), row.weighted);
  }
}

template <class A> __device__ inline void merge(Softmax<A>& row, Softmax<A> other, A scale) {
  const A maximum = larger(row.maximum, other.maximum);
  raise_maximum(row, maximum, scale);
  raise_maximum(other, maximum, scale);
  row.total += other.total;
  row.weighted += other.weighted;
}

// Thread 0 gets what all threads of the block have seen together.
template <int BLOCK, class A> __device__ inline void merge_block(Softmax<A>& row, A scale) {
  constexpr int kWarps = BLOCK / kWarp;
  SHARED_ARRAY(Softmax<A>, warps, kWarps);
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    Softmax<A> other;
    other.maximum = __shfl_xor_sync(kFullMask, row.maximum, lane);
    other.total = __shfl_xor_sync(kFullMask, row.total, lane);
    other.weighted = __shfl_xor_sync(kFullMask, row.weighted, lane);
    merge(row, other, scale);
  }
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = row;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) merge(row, warps[warp], scale);
}

// ---- forward ------------------------------------------------------------------------------------

// Takes in vectors start, start + BLOCK, ... of a row, one more for each of kUnroll; those beyond
// the end, which only happens where not all are INSIDE, count as -infinity.
template <class T, int BLOCK, bool ENTROPY, bool INSIDE, bool SOFTCAP, class A>
__device__ inline void add_vectors(Softmax<A>& row, const T* body, int start, int vectors,
                                   const Cap<SOFTCAP, A>& cap, A scale) {
  constexpr int W = kPerVector<T>;
  uint4 raw[kUnroll<T>];
#pragma unroll
  for (int u = 0; u < kUnroll<T>; ++u) {  // all loads first, so that they are under way together
    const int i = start + u * BLOCK;
    raw[u] = load_vector(body + (long long)(INSIDE || i < vectors ? i : 0) * W);
  }
  A z[kUnroll<T> * W];
#pragma unroll
  for (int u = 0; u < kUnroll<T>; ++u) {
    A x[W];
    unpack(raw[u], x, T{});
#pragma unroll
    for (int j = 0; j < W; ++j)
      z[u * W + j] = INSIDE || start + u * BLOCK < vectors ? cap(x[j]) : minus_infinity<A>();
  }
  add<ENTROPY>(row, z, scale);
}

// Grid: one block a row. Row r of the logits starts at row_offset(r, ...); its columns are
// `element_stride` apart and stand for tokens first_column, first_column + 1, ...
template <class T, int BLOCK, bool ENTROPY, bool SOFTCAP>
__global__ void __launch_bounds__(BLOCK, (kBlocks<T, BLOCK>))
token_logprobs_forward(const T* logits, long long inner, long long outer_stride,
                       long long inner_stride, long long element_stride, const long long* targets,
                       long long first_column, long long columns, long long vocabulary,
                       double scale_, double cap_, long long piece, Acc<T>* maximum,
                       Acc<T>* total, Acc<T>* logprobs, Acc<T>* entropy) {
  using A = Acc<T>;
  constexpr int W = kPerVector<T>;
  const long long row = blockIdx.x;
  const long long target = targets[row];
  if (target == kIgnored) {  // the whole block leaves: nothing of this row is read
    if (threadIdx.x == 0) {
      logprobs[row] = 0, maximum[row] = 0, total[row] = 1;
      if constexpr (ENTROPY) entropy[row] = 0;
    }
    return;
  }
  if (target < 0 || target >= vocabulary)
    __assertfail("a target is -100 or in [0, V)", "token_logprobs.cu", __LINE__,
                 "token_logprobs_forward", 1);

  const A scale = (A)scale_;
  const Cap<SOFTCAP, A> cap(cap_);
  const T* x = logits + row_offset(row, inner, outer_stride, inner_stride);
  const int count = (int)columns;
  // x[0 .. head) one by one up to an address divisible by 16, then vectors of W, then the rest.
  const int head = element_stride == 1 ? elements_to_alignment(x, count) : count;
  const int vectors = (count - head) / W;
  const int scalars = count - vectors * W;
  const T* body = x + head;

  Softmax<A> seen = {minus_infinity<A>(), 0, 0};
  for (int start = 0; start < vectors; start += kUnroll<T> * BLOCK) {
    if (start + kUnroll<T> * BLOCK <= vectors)
      add_vectors<T, BLOCK, ENTROPY, true>(seen, body, start + threadIdx.x, vectors, cap, scale);
    else
      add_vectors<T, BLOCK, ENTROPY, false>(seen, body, start + threadIdx.x, vectors, cap, scale);
  }
  for (int i = threadIdx.x; i < scalars; i += BLOCK) {
    const long long column = i < head ? i : i + vectors * W;
    const A z[1] = {cap(to_acc(x[column * element_stride]))};
    add<ENTROPY>(seen, z, scale);
  }
  merge_block<BLOCK>(seen, scale);
  if (threadIdx.x != 0) return;

  const long long column = target - first_column;
  A chosen = 0;
  const bool here = column >= 0 && column < columns;
  if (here) chosen = cap(to_acc(x[column * element_stride]));
  if (!(piece & kFirst)) {
    Softmax<A> before = {maximum[row], total[row], 0};
    if constexpr (ENTROPY) before.weighted = entropy[row];
    merge(seen, before, scale);
    if (!here) chosen = logprobs[row];
  }
  maximum[row] = seen.maximum, total[row] = seen.total;
  if (piece & kLast) {
    const A log_total = log2_of(seen.total);
    logprobs[row] = ((chosen - seen.maximum) * scale - log_total) * (A)kLn2;
    if constexpr (ENTROPY) entropy[row] = (log_total - seen.weighted / seen.total) * (A)kLn2;
  } else {
    logprobs[row] = chosen;
    if constexpr (ENTROPY) entropy[row] = seen.weighted;
  }
}

// ---- backward -----------------------------------------------------------------------------------

// The gradient of a logit is (a 1[v=y] - p (a + b (log p + H))) / temperature, with a and b the
// gradients of the log-probability and of the entropy H. With p = 2^d / total it is
// 2^d (constant + slope d), plus `at_target` for the target. With a cap it is multiplied by the
// derivative of cap tanh(x / cap), 1 - (z / cap)^2.
template <bool ENTROPY, bool SOFTCAP, class A> struct Gradient {
  Cap<SOFTCAP, A> cap;
  A maximum, scale, constant, slope, at_target;
  __device__ A operator()(A x, bool is_target) const {
    const A z = cap(x);
    const A d = (z - maximum) * scale;
    A factor = constant;
    if constexpr (ENTROPY) factor = multiply_add(slope, larger(d, (A)kLowest), constant);
    A result = exp2_fast(d) * factor;
    if (is_target) result += at_target;
    if constexpr (SOFTCAP) result *= 1 - z * cap.inverse * (z * cap.inverse);
    return result;
  }
};

// Grid and rows as in the forward kernel. `grad` may be `logits`. `grad_logprobs` and
// `grad_entropy` may be null; the second is not looked at without ENTROPY.
template <class T, int BLOCK, bool ENTROPY, bool SOFTCAP>
__global__ void __launch_bounds__(BLOCK, (kBlocks<T, BLOCK>))
token_logprobs_backward(const T* logits, long long inner, long long outer_stride,
                        long long inner_stride, long long element_stride, T* grad,
                        long long grad_outer_stride, long long grad_inner_stride,
                        long long grad_element_stride, const long long* targets,
                        long long first_column, long long columns, double scale_, double cap_,
                        const Acc<T>* maximum, const Acc<T>* total, const Acc<T>* entropy,
                        const Acc<T>* grad_logprobs, const Acc<T>* grad_entropy) {
  using A = Acc<T>;
  constexpr int W = kPerVector<T>;
  const long long row = blockIdx.x;
  const long long target = targets[row];
  const T* x = logits + row_offset(row, inner, outer_stride, inner_stride);
  T* g = grad + row_offset(row, inner, grad_outer_stride, grad_inner_stride);
  const int count = (int)columns;
  const int head = grad_element_stride == 1 && element_stride == 1
      ? elements_to_alignment(g, count) : count;
  const int vectors = (count - head) / W;
  const int scalars = count - vectors * W;

  if (target == kIgnored) {  // zeros, whatever the logits and the arriving gradients are
    for (int i = threadIdx.x; i < vectors; i += BLOCK)
      store_vector(g + head + (long long)i * W, uint4{0, 0, 0, 0});
    for (int i = threadIdx.x; i < scalars; i += BLOCK)
      g[(i < head ? i : i + vectors * W) * grad_element_stride] = from_acc<T>((A)0);
    return;
  }

  const A scale = (A)scale_, inverse_temperature = scale * (A)kLn2, inverse_total = 1 / total[row];
  const A a = grad_logprobs ? grad_logprobs[row] * inverse_temperature : (A)0;
  A constant = -a * inverse_total, slope = 0;
  if constexpr (ENTROPY) {
    const A b = grad_entropy[row] * inverse_temperature;
    constant -= b * inverse_total * (entropy[row] - log2_of(total[row]) * (A)kLn2);
    slope = -b * inverse_total * (A)kLn2;
  }
  const Gradient<ENTROPY, SOFTCAP, A> gradient = {
      Cap<SOFTCAP, A>(cap_), maximum[row], scale, constant, slope, a};
  const long long target_column = target - first_column;
  const int in_body = target_column >= 0 && target_column < columns ? (int)target_column - head : -1;
  const bool aligned = ((unsigned long long)(x + head) & 15) == 0;

  for (int start = threadIdx.x; start < vectors; start += kUnroll<T> * BLOCK) {
    uint4 raw[kUnroll<T>];
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u) {
      const int i = start + u * BLOCK < vectors ? start + u * BLOCK : start;
      raw[u] = load_any(x + head + (long long)i * W, aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<T>; ++u) {
      const int i = start + u * BLOCK;
      if (i >= vectors) break;
      A z[W];
      unpack(raw[u], z, T{});
#pragma unroll
      for (int j = 0; j < W; ++j)
        z[j] = gradient(z[j], i * W + j == in_body);
      store_vector(g + head + (long long)i * W, repack(z, T{}));
    }
  }
  for (int i = threadIdx.x; i < scalars; i += BLOCK) {
    const long long column = i < head ? i : i + vectors * W;
    g[column * grad_element_stride] = from_acc<T>(
        gradient(to_acc(x[column * element_stride]), column == target_column));
  }
}
