// SPDX-License-Identifier: Apache-2.0
// The clipped policy-gradient loss with all its metrics in one pass, and its gradient in another.
//
// Forward: a block takes a segment of a row and sums what each token adds. What belongs to a whole
// row (a response's ratio and weight, the length to divide by) is a factor of sums over the row, so
// it can wait: the last block to finish adds the segments of each row, multiplies, and adds the
// rows. Every addition has its place, so the same input gives the same bits. Backward: each token
// by itself, with what the forward kernel has kept of its row.
//
// Expressions and their order are those of algorithms/loss/_policy_gradient.py, and slopes are
// those of PyTorch's operators: a tie gives half to either side, and 0 times infinity is NaN under
// a mask, too.
#include "common.cuh"

constexpr int kThreads = 256;   // of a block, at most
constexpr double kEpsilon = 1e-8;  // added to counts, as masked_mean does

// Bits of `flags`; clipped_pg.py has the same list.
enum Flag {
  kRatioOfResponse = 1, kRatioIsLogprob = 2, kRatioIsOne = 4, kCispo = 8, kDualClip = 16,
  kKl = 32, kKl1 = 64, kKl2 = 128, kKlInputClamp = 256, kKlOutputClamp = 512, kKlWeighted = 1024,
  kCorrection = 2048, kWeightOfResponse = 4096, kClampWeights = 8192, kZeroWeights = 16384,
  kZeroResponses = 32768, kMeanOfResponses = 65536, kPositiveNll = 131072,
};

// What is summed over the tokens of a segment, each times the token's mask.
enum Sum {
  kLoss, kLossBelow, kKlSum, kNll, kRatio, kClipped, kMultError, kGenKl, kPolicyKl, kJs, kWeight,
  kOutside, kEntropy, kLogRatio, kLogWeight, kTokens, kSums, kLowest = kSums, kHighest, kValues,
};

// What comes out, in the order of TERMS in _clipped_pg_terms.py; then three that no one else needs.
enum Term {
  kTermLoss, kTermRatio, kTermRatioMin, kTermRatioMax, kTermClipped, kTermClippedMin,
  kTermClippedMax, kTermKl, kTermMultError, kTermGenKl, kTermPolicyKl, kTermJs, kTermWeight,
  kTermOutside, kTermValid, kTermEntropy, kTermNll, kTerms,
  kPositiveTokens = kTerms, kTotals,
};

// What is kept of each row for the backward kernel, `rows` numbers each, after kHeader numbers.
enum Kept { kKeptTokens, kKeptFactor, kKeptRatio, kKeptSlope, kKept };
constexpr int kHeader = 1;  // the number of tokens of positive examples

struct Settings {
  int flags;
  double ratio_low, ratio_high, dual_limit, kl_input, kl_output, weight_low, weight_high;
  double kl_coefficient, nll_coefficient;
  __device__ bool has(int bits) const { return (flags & bits) != 0; }
};

// ---- functions through which NaN goes as in PyTorch ---------------------------------------------

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

template <class T> __device__ inline bool is_finite(T x) { return x - x == 0; }
template <class T> __device__ inline T finite_or_zero(T x) { return is_finite(x) ? x : T(0); }
template <class T> __device__ inline T clamped(T x, double low, double high) {
  return x < (T)low ? (T)low : x > (T)high ? (T)high : x;
}
template <class T> __device__ inline bool within(T x, double low, double high) {
  return x >= (T)low && x <= (T)high;
}
template <class T> __device__ inline T maximum(T a, T b) { return a >= b || a != a ? a : b; }
template <class T> __device__ inline T minimum(T a, T b) { return a <= b || a != a ? a : b; }

// ---- one token ----------------------------------------------------------------------------------

// What is read of it.
template <class T> struct Token {
  T logprob, prev, generation, reference, advantage, policy, mask;
};

// Its ratio and what it is clipped to. That of a whole response comes later: 1 until then.
template <class T>
__device__ inline void ratio_of(const Settings& s, T logprob, T prev, T& ratio, T& clipped) {
  if (s.has(kRatioIsLogprob)) ratio = clipped = logprob;
  else if (s.has(kRatioIsOne)) ratio = clipped = exp_of(logprob - logprob);
  else if (s.has(kRatioOfResponse)) ratio = clipped = 1;
  else ratio = exp_of(logprob - prev), clipped = clamped(ratio, s.ratio_low, s.ratio_high);
}

// Its loss, and the slope of the loss in the ratio.
template <class T>
__device__ inline T surrogate(const Settings& s, T advantage, T ratio, T clipped, T& slope) {
  const T plain = -advantage * ratio, bounded = -advantage * clipped;
  const bool free =
      s.has(kRatioIsLogprob | kRatioIsOne) || within(ratio, s.ratio_low, s.ratio_high);
  const T share = plain == bounded ? T(0.5) : T(1);
  const T of_plain = plain < bounded ? T(0) : share;
  const T of_bounded = bounded < plain || !free ? T(0) : share;
  slope = -advantage * (of_plain + of_bounded);
  T loss = maximum(plain, bounded);
  if (s.has(kDualClip) && advantage < 0) {
    const T limit = -advantage * (T)s.dual_limit;
    slope *= loss > limit ? T(0) : loss == limit ? T(0.5) : T(1);
    loss = minimum(loss, limit);
  }
  return loss;
}

// A weight after truncation, and whether it was outside the bounds.
template <class T> __device__ inline T truncated(const Settings& s, T weight, bool& outside) {
  outside = s.has(kClampWeights | kZeroWeights) && !within(weight, s.weight_low, s.weight_high);
  if (s.has(kClampWeights)) return clamped(weight, s.weight_low, s.weight_high);
  return outside ? T(0) : weight;
}

// k1, k2 or k3 of r = log(reference / policy), and the slope in r.
template <class T> __device__ inline T kl_of(const Settings& s, T r, T& slope) {
  if (s.has(kKl1)) return slope = -1, -r;
  if (s.has(kKl2)) return slope = r, r * r / 2;
  slope = exp_of(r) - 1;
  return slope - r;
}

// The KL term, and its slope in the log-probability.
template <class T>
__device__ inline T kl_term(const Settings& s, T logprob, T reference, T generation, T& slope) {
  const T raw = exp_of(logprob - (s.has(kKlWeighted) ? generation : logprob));
  const T weight = finite_or_zero(raw);
  T r = reference - logprob;
  bool free = true;
  if (s.has(kKlInputClamp)) {
    free = within(r, -s.kl_input, s.kl_input);
    r = clamped(r, -s.kl_input, s.kl_input);
  }
  T of_r;
  const T estimate = kl_of(s, r, of_r);
  T value = weight * estimate;
  bool passes = true;
  if (s.has(kKlOutputClamp)) {
    passes = within(value, -s.kl_output, s.kl_output);
    value = clamped(value, -s.kl_output, s.kl_output);
  }
  const T of_weight = passes && free && is_finite(raw) ? estimate : T(0);
  slope = of_weight * raw - (free ? (passes ? T(1) : T(0)) * weight * of_r : T(0));
  return value;
}

// ---- a row --------------------------------------------------------------------------------------

// A number from a tensor whose dtype is told at run time.
__device__ inline double number(const void* p, long long dtype, long long i) {
  switch (dtype) {
    case 0: return ((const float*)p)[i];
    case 1: return ((const double*)p)[i];
    case 2: return (double)((const long long*)p)[i];
    case 3: return ((const int*)p)[i];
    default: return ((const unsigned char*)p)[i];
  }
}

// What a row adds to the terms, from the sums over its tokens: `out` takes it, `stride` apart.
template <class T>
__device__ inline void finish_row(const Settings& s, const double (&sum)[kValues], double valid,
                                  double reward, double* kept, long long rows,
                                  volatile double* out, long long stride) {
  const double tokens = sum[kTokens];
  double loss = sum[kLoss], ratios = sum[kRatio], clips = sum[kClipped];
  double lowest = sum[kLowest], highest = sum[kHighest], ratio = 1, slope = 0;
  if (s.has(kRatioOfResponse)) {
    // One ratio for all tokens. What a token loses is proportional to its advantage, which
    // sum[kLoss] has where it is not negative and sum[kLossBelow] where it is.
    ratio = exp_of((T)(sum[kLogRatio] / (tokens + kEpsilon)));
    const double clipped = clamped((T)ratio, s.ratio_low, s.ratio_high);
    double up, down;
    loss = surrogate(s, 1.0, ratio, clipped, up) * sum[kLoss];
    loss -= surrogate(s, -1.0, ratio, clipped, down) * sum[kLossBelow];
    slope = up * sum[kLoss] - down * sum[kLossBelow];
    ratios = ratio * tokens, clips = clipped * tokens;
    if (lowest == 1) lowest = highest = ratio;  // else no token counts
  }
  if (valid == 0) lowest = -minus_infinity<double>(), highest = minus_infinity<double>();

  double factor = 1, weights = sum[kWeight] * valid, outside = sum[kOutside] * valid;
  if (s.has(kWeightOfResponse)) {
    bool beyond;
    factor = truncated(s, finite_or_zero(exp_of((T)(sum[kLogWeight] * valid))), beyond);
    weights = factor, outside = beyond ? tokens * valid : 0;
  } else if (s.has(kZeroResponses)) {
    const T mean = exp_of((T)(sum[kLogWeight] / (tokens + kEpsilon)));
    factor = within(mean, s.weight_low, s.weight_high);
    weights *= factor, outside = factor == 0 ? valid : 0;
  }
  if (!s.has(kCorrection)) factor = 1;
  kept[kKeptTokens * rows] = tokens, kept[kKeptFactor * rows] = factor;
  kept[kKeptRatio * rows] = ratio, kept[kKeptSlope * rows] = slope;

  const double share = s.has(kMeanOfResponses) ? valid / (tokens + kEpsilon) : valid;
  const double positive = s.has(kPositiveNll) && reward > 0 ? valid : 0;
  out[kTermLoss * stride] = factor * loss * share;
  out[kTermKl * stride] = sum[kKlSum] * share;
  out[kTermNll * stride] = sum[kNll] * positive;
  out[kPositiveTokens * stride] = tokens * positive;
  out[kTermRatio * stride] = ratios * valid;
  out[kTermClipped * stride] = clips * valid;
  out[kTermMultError * stride] = sum[kMultError] * valid;
  out[kTermGenKl * stride] = sum[kGenKl] * valid;
  out[kTermPolicyKl * stride] = sum[kPolicyKl] * valid;
  out[kTermJs * stride] = sum[kJs] * valid;
  out[kTermEntropy * stride] = -sum[kEntropy] * valid;
  out[kTermWeight * stride] = weights;
  out[kTermOutside * stride] = outside;
  out[kTermValid * stride] = valid;
  out[kTermRatioMin * stride] = lowest;
  out[kTermRatioMax * stride] = highest;
  out[kTermClippedMin * stride] = lowest;  // clipped by write_terms: clipping keeps the order
  out[kTermClippedMax * stride] = highest;
}

// Divides the totals by what they are means over.
template <class T>
__device__ inline void write_terms(const Settings& s, const double* total, double responses,
                                   double tokens, double* kept, T* terms) {
  responses += kEpsilon, tokens += kEpsilon;
  const double positives = total[kPositiveTokens];
  const double by_loss = s.has(kMeanOfResponses) ? responses : tokens;
  const double kl = total[kTermKl] / by_loss, nll = total[kTermNll] / (positives + kEpsilon);
#pragma unroll
  for (int term = 0; term < kTerms; ++term) terms[term] = (T)(total[term] / tokens);
  terms[kTermLoss] =
      (T)(total[kTermLoss] / by_loss + s.kl_coefficient * kl + s.nll_coefficient * nll);
  terms[kTermKl] = (T)kl;
  terms[kTermNll] = (T)nll;
  terms[kTermValid] = (T)total[kTermValid];
  if (s.has(kZeroResponses)) terms[kTermOutside] = (T)(total[kTermOutside] / responses);
  // A weight a response, (B, 1), against the mask (B,): the product is (B, B), as in NeMo RL.
  if (s.has(kWeightOfResponse))
    terms[kTermWeight] = (T)(total[kTermWeight] * total[kTermValid] / responses);
  double lowest = total[kTermRatioMin], highest = total[kTermRatioMax];
  terms[kTermRatioMin] = (T)lowest, terms[kTermRatioMax] = (T)highest;
  if (!s.has(kRatioIsLogprob | kRatioIsOne) && lowest <= highest) {  // else empty, or NaN
    lowest = clamped((T)lowest, s.ratio_low, s.ratio_high);
    highest = clamped((T)highest, s.ratio_low, s.ratio_high);
  }
  terms[kTermClippedMin] = (T)lowest, terms[kTermClippedMax] = (T)highest;
  kept[0] = positives;
}

// ---- the forward kernel -------------------------------------------------------------------------

// Two partial results of a sum, a minimum or a maximum.
__device__ inline double merged(double a, double b, bool lowest, bool highest) {
  return lowest ? minimum(a, b) : highest ? maximum(a, b) : a + b;
}

template <class T> __device__ inline T merge_lanes(T x, bool lowest, bool highest) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) {
    const T other = __shfl_down_sync(kFullMask, x, by);
    x = lowest ? minimum(x, other) : highest ? maximum(x, other) : x + other;
  }
  return x;
}

// Grid: `segments` blocks a row, each for `length` tokens of it; 32 to 256 threads. Tensors are
// (rows, steps) with rows `..._stride` elements apart. `reference` is read with kKl only;
// `unfiltered` may be null: `logprobs` then. `partial` holds kValues numbers a block; `arrived` is
// 0 before and after; `kept` is kHeader + kKept * rows numbers; `terms` are kTerms. With FLAGS the
// compiler knows what is asked for; with -1 `flags` tells.
template <class T, class M, int FLAGS>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 1)
clipped_pg_forward(
    const T* __restrict__ logprobs, const T* __restrict__ prev, const T* __restrict__ generation,
    const T* __restrict__ reference, const T* __restrict__ advantages,
    const T* __restrict__ unfiltered, const M* __restrict__ mask, long long logprobs_stride,
    long long prev_stride, long long generation_stride, long long reference_stride,
    long long advantages_stride, long long unfiltered_stride, long long mask_stride,
    const void* sample_mask, long long sample_mask_dtype, const void* rewards,
    long long rewards_dtype, const void* responses, long long responses_dtype, const void* tokens,
    long long tokens_dtype, long long rows, long long steps, long long segments, long long length,
    double* partial_, unsigned* arrived, double* kept, T* terms, long long flags, double ratio_low,
    double ratio_high, double dual_limit, double kl_input, double kl_output, double weight_low,
    double weight_high, double kl_coefficient, double nll_coefficient) {
  const Settings s = {FLAGS < 0 ? (int)flags : FLAGS, ratio_low, ratio_high, dual_limit, kl_input,
                      kl_output, weight_low, weight_high, kl_coefficient, nll_coefficient};
  constexpr int kMostWarps = kThreads / kWarp;
  SHARED_ARRAY(double, warp_values, kValues * kMostWarps);
  SHARED_ARRAY(double, totals, kTotals);
  SHARED_ARRAY(int, last, 1);
  volatile double* const partial = partial_;
  const int thread = threadIdx.x, threads = blockDim.x;
  const int warps = threads / kWarp, warp = thread / kWarp, lane = thread % kWarp;
  const long long row = blockIdx.x / segments, segment = blockIdx.x % segments;
  const T valid = (T)number(sample_mask, sample_mask_dtype, row);
  logprobs += row * logprobs_stride, prev += row * prev_stride;
  generation += row * generation_stride, advantages += row * advantages_stride;
  mask += row * mask_stride;
  if (s.has(kKl)) reference += row * reference_stride;
  if (unfiltered) unfiltered += row * unfiltered_stride;

  T sum[kSums] = {}, lowest = -minus_infinity<T>(), highest = minus_infinity<T>();
  const int end = (int)((segment + 1) * length < steps ? (segment + 1) * length : steps);
  const auto fetch = [&](int t) {
    Token<T> x = {};
    if (t >= end) return x;
    x.logprob = logprobs[t], x.prev = prev[t], x.generation = generation[t];
    x.advantage = advantages[t], x.mask = (T)mask[t];
    if (s.has(kKl)) x.reference = reference[t], x.policy = unfiltered ? unfiltered[t] : x.logprob;
    return x;
  };
  Token<T> next = fetch((int)(segment * length) + thread);
  for (int t = (int)(segment * length) + thread; t < end; t += threads) {
    const Token<T> now = next;
    next = fetch(t + threads);  // on its way while this one is worked on
    const T logprob = now.logprob, before = now.prev, drawn = now.generation, a = now.advantage;
    const T m = now.mask;
    T ratio, clipped, unused;
    ratio_of(s, logprob, before, ratio, clipped);

    const T log_weight = before - drawn;
    const T distance = log_weight < 0 ? -log_weight : log_weight;
    const T above = exp_of(distance), below = exp_of(-distance);
    const T raw_weight = log_weight < 0 ? below : above;
    const T inverse = log_weight < 0 ? above : below;
    T weight = 1;
    if (s.has(kWeightOfResponse)) {
      sum[kLogWeight] += log_weight * m;
    } else {
      bool outside;
      weight = truncated(s, finite_or_zero(raw_weight), outside);
      sum[kWeight] += weight * m;
      sum[kOutside] += outside ? m : T(0);
      if (s.has(kZeroResponses)) sum[kLogWeight] += finite_or_zero(log_weight) * m;
    }
    if (s.has(kRatioOfResponse)) {
      sum[kLogRatio] += (logprob - before) * m;
      sum[kLoss] += (a < 0 ? T(0) : a) * m;
      sum[kLossBelow] += (a < 0 ? a : T(0)) * m;
    } else {
      T loss = s.has(kCispo) ? -a * clipped * logprob : surrogate(s, a, ratio, clipped, unused);
      if (s.has(kCorrection)) loss *= weight;
      sum[kLoss] += loss * m;
      sum[kRatio] += ratio * m;
      sum[kClipped] += clipped * m;
    }
    if (s.has(kKl)) sum[kKlSum] += kl_term(s, now.policy, now.reference, drawn, unused) * m;
    if (s.has(kPositiveNll)) sum[kNll] -= logprob * m;

    T gen_kl = -log_weight, policy_kl = log_weight;
    if (s.has(kKl2)) gen_kl = policy_kl = log_weight * log_weight / 2;
    else if (!s.has(kKl1)) gen_kl += raw_weight - 1, policy_kl += inverse - 1;
    sum[kGenKl] += gen_kl * m;
    sum[kPolicyKl] += policy_kl * m;
    // The mean of two k3 against the mixture (p + q) / 2 is log cosh(log(p / q) / 2).
    sum[kJs] += (distance / 2 + log_of(T(0.5) + T(0.5) * below)) * m;
    // exp(distance * counted), which is 1 for a masked token, or NaN
    const T counted = m * valid;
    const T error = counted == 1 ? above : counted == 0 ? 1 + distance * counted
                                                        : exp_of(distance * counted);
    sum[kMultError] += error * m;
    sum[kEntropy] += exp_of(logprob - drawn) * logprob * m;
    sum[kTokens] += m;
    if (m != 0) lowest = minimum(lowest, ratio), highest = maximum(highest, ratio);
  }

#pragma unroll
  for (int value = 0; value < kValues; ++value) {
    const bool low = value == kLowest, high = value == kHighest;
    const T own = low ? lowest : high ? highest : sum[value < kSums ? value : 0];
    const T of_warp = merge_lanes(own, low, high);
    if (lane == 0) warp_values[value * kMostWarps + warp] = of_warp;
  }
  __syncthreads();
  if (thread < kValues) {
    double x = warp_values[thread * kMostWarps];
    for (int other = 1; other < warps; ++other)
      x = merged(x, warp_values[thread * kMostWarps + other], thread == kLowest,
                 thread == kHighest);
    partial[thread * (long long)gridDim.x + blockIdx.x] = x;
    __threadfence();
  }
  __syncthreads();
  if (thread == 0) last[0] = atomicAdd(arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last[0]) return;

  // The last block. All others have written what they found.
  __threadfence();
  for (long long r = thread; r < rows; r += threads) {
    double values[kValues];
#pragma unroll
    for (int value = 0; value < kValues; ++value) {
      volatile const double* const p = partial + value * (long long)gridDim.x + r * segments;
      values[value] = p[0];
#pragma unroll 1
      for (int other = 1; other < segments; ++other)
        values[value] = merged(values[value], p[other], value == kLowest, value == kHighest);
    }
    const double reward = rewards ? number(rewards, rewards_dtype, r) : 0;
    finish_row<T>(s, values, number(sample_mask, sample_mask_dtype, r), reward, kept + kHeader + r,
                  rows, partial + r * segments, gridDim.x);
  }
  __syncthreads();
  for (int term = warp; term < kTotals; term += warps) {
    const bool low = term == kTermRatioMin || term == kTermClippedMin;
    const bool high = term == kTermRatioMax || term == kTermClippedMax;
    double x = low ? -minus_infinity<double>() : high ? minus_infinity<double>() : 0;
    for (long long r = lane; r < rows; r += kWarp)
      x = merged(x, partial[term * (long long)gridDim.x + r * segments], low, high);
    x = merge_lanes(x, low, high);
    if (lane == 0) totals[term] = x;
  }
  __syncthreads();
  if (thread == 0) {
    write_terms(s, totals, responses ? number(responses, responses_dtype, 0) : 1,
                tokens ? number(tokens, tokens_dtype, 0) : 1, kept, terms);
    *arrived = 0;
  }
}

// ---- the backward kernel ------------------------------------------------------------------------

// Grid and arguments as in the forward kernel. `grad_terms` are the gradients of the terms, of
// which the loss, the KL and the NLL count. `grad_unfiltered` may be null.
template <class T, class M, int FLAGS>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 4 : 1)
clipped_pg_backward(
    const T* __restrict__ grad_terms, const double* __restrict__ kept,
    const T* __restrict__ logprobs, const T* __restrict__ prev, const T* __restrict__ generation,
    const T* __restrict__ reference, const T* __restrict__ advantages,
    const T* __restrict__ unfiltered, const M* __restrict__ mask, long long logprobs_stride,
    long long prev_stride, long long generation_stride, long long reference_stride,
    long long advantages_stride, long long unfiltered_stride, long long mask_stride,
    const void* sample_mask, long long sample_mask_dtype, const void* rewards,
    long long rewards_dtype, const void* responses, long long responses_dtype, const void* tokens,
    long long tokens_dtype, long long rows, long long steps, long long segments, long long length,
    T* __restrict__ grad, T* __restrict__ grad_unfiltered, long long flags, double ratio_low,
    double ratio_high, double dual_limit, double kl_input, double kl_output, double weight_low,
    double weight_high, double kl_coefficient, double nll_coefficient) {
  const Settings s = {FLAGS < 0 ? (int)flags : FLAGS, ratio_low, ratio_high, dual_limit, kl_input,
                      kl_output, weight_low, weight_high, kl_coefficient, nll_coefficient};
  const long long row = blockIdx.x / segments, segment = blockIdx.x % segments;
  logprobs += row * logprobs_stride, prev += row * prev_stride;
  generation += row * generation_stride, advantages += row * advantages_stride;
  mask += row * mask_stride, grad += row * steps;
  if (s.has(kKl)) reference += row * reference_stride;
  if (unfiltered) unfiltered += row * unfiltered_stride;
  if (grad_unfiltered) grad_unfiltered += row * steps;

  const double valid = number(sample_mask, sample_mask_dtype, row);
  const double own_tokens = kept[kHeader + kKeptTokens * rows + row] + kEpsilon;
  const double all_tokens = (tokens ? number(tokens, tokens_dtype, 0) : 1) + kEpsilon;
  const double all_responses = (responses ? number(responses, responses_dtype, 0) : 1) + kEpsilon;
  const double share =
      s.has(kMeanOfResponses) ? valid / own_tokens / all_responses : valid / all_tokens;
  const bool positive = s.has(kPositiveNll) && number(rewards, rewards_dtype, row) > 0;
  const double of_loss = grad_terms[kTermLoss];
  const double factor = kept[kHeader + kKeptFactor * rows + row];
  const T loss_scale = (T)(of_loss * share * factor);
  const T row_slope = (T)(of_loss * share * factor * kept[kHeader + kKeptSlope * rows + row] *
                          kept[kHeader + kKeptRatio * rows + row] / own_tokens);
  const T kl_scale = (T)((of_loss * s.kl_coefficient + grad_terms[kTermKl]) * share);
  const T nll_scale = positive ? (T)((of_loss * s.nll_coefficient + grad_terms[kTermNll]) * valid /
                                     (kept[0] + kEpsilon)) : T(0);

  const int end = (int)((segment + 1) * length < steps ? (segment + 1) * length : steps);
  const bool weighted = s.has(kCorrection) && !s.has(kWeightOfResponse);
  const auto fetch = [&](int t) {
    Token<T> x = {};
    if (t >= end) return x;
    x.logprob = logprobs[t], x.advantage = advantages[t], x.mask = (T)mask[t];
    if (weighted || !s.has(kRatioIsLogprob | kRatioIsOne | kRatioOfResponse)) x.prev = prev[t];
    if (weighted || s.has(kKlWeighted)) x.generation = generation[t];
    if (s.has(kKl)) x.reference = reference[t], x.policy = unfiltered ? unfiltered[t] : x.logprob;
    return x;
  };
  Token<T> next = fetch((int)(segment * length) + threadIdx.x);
  for (int t = (int)(segment * length) + threadIdx.x; t < end; t += blockDim.x) {
    const Token<T> now = next;
    next = fetch(t + blockDim.x);  // on its way while this one is worked on
    const T logprob = now.logprob, a = now.advantage, m = now.mask;
    T g;
    if (s.has(kRatioOfResponse)) {
      g = row_slope * m;
    } else {
      T ratio, clipped, slope;
      ratio_of(s, logprob, now.prev, ratio, clipped);
      surrogate(s, a, ratio, clipped, slope);
      T scale = loss_scale * m;
      if (weighted) {
        bool outside;
        scale *= truncated(s, finite_or_zero(exp_of(now.prev - now.generation)), outside);
      }
      if (s.has(kCispo)) g = scale * (-a * clipped);
      else g = scale * slope * (s.has(kRatioIsLogprob) ? T(1) : ratio);
    }
    if (s.has(kKl)) {
      T slope;
      kl_term(s, now.policy, now.reference, now.generation, slope);
      const T of_kl = kl_scale * m * slope;
      if (!unfiltered) g += of_kl;
      else if (grad_unfiltered) grad_unfiltered[t] = of_kl;
    }
    if (positive) g -= nll_scale * m;
    grad[t] = g;
  }
}
