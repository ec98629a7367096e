// SPDX-License-Identifier: Apache-2.0
// The clipped policy-gradient loss with all its metrics in one pass, and its gradient in another.
//
// Forward: a block takes a segment of a row and sums what each token adds. What belongs to a whole
// row (a response's ratio and weight, the length to divide by) is a factor of sums over the row, so
// it can wait: the last block to finish adds the segments of each row, multiplies, and adds the
// rows. Every addition has its place, so the same input gives the same bits. Backward: each token by
// itself, with what the forward kernel has kept of its row.
//
// Expressions and their order are those of algorithms/loss/_policy_gradient.py, and slopes are those
// of PyTorch's operators: a tie gives half to either side, and 0 times infinity is NaN under a mask,
// too.
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

// What comes out, in the order of TERMS in clipped_pg.py; then three that no one else needs.
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
  const bool free = s.has(kRatioIsLogprob | kRatioIsOne) || within(ratio, s.ratio_low, s.ratio_high);
  const T share = plain == bounded ? T(0.5) : T(1);
  slope = -advantage * ((plain < bounded ? T(0) : share) + (bounded < plain || !free ? T(0) : share));
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

// Adds what a row brings to the totals, from the sums over its tokens.
template <class T>
__device__ inline void add_row(const Settings& s, const double (&sum)[kValues], double valid,
                               double reward, double* kept, long long rows,
                               double (&total)[kTotals]) {
  const double tokens = sum[kTokens], counted = tokens * valid;
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

  double factor = 1, weights = sum[kWeight] * valid, outside = sum[kOutside] * valid;
  if (s.has(kWeightOfResponse)) {
    bool beyond;
    factor = truncated(s, finite_or_zero(exp_of((T)(sum[kLogWeight] * valid))), beyond);
    weights = factor, outside = beyond ? counted : 0;
  } else if (s.has(kZeroResponses)) {
    const T mean = exp_of((T)(sum[kLogWeight] / (tokens + kEpsilon)));
    factor = within(mean, s.weight_low, s.weight_high);
    weights *= factor, outside = factor == 0 ? valid : 0;
  }
  if (!s.has(kCorrection)) factor = 1;

  const double share = s.has(kMeanOfResponses) ? valid / (tokens + kEpsilon) : valid;
  const double positive = s.has(kPositiveNll) && reward > 0 ? valid : 0;
  total[kTermLoss] += factor * loss * share;
  total[kTermKl] += sum[kKlSum] * share;
  total[kTermNll] += sum[kNll] * positive;
  total[kPositiveTokens] += tokens * positive;
  total[kTermRatio] += ratios * valid;
  total[kTermClipped] += clips * valid;
  total[kTermMultError] += sum[kMultError] * valid;
  total[kTermGenKl] += sum[kGenKl] * valid;
  total[kTermPolicyKl] += sum[kPolicyKl] * valid;
  total[kTermJs] += sum[kJs] * valid;
  total[kTermEntropy] -= sum[kEntropy] * valid;
  total[kTermWeight] += weights;
  total[kTermOutside] += outside;
  total[kTermValid] += valid;
  if (valid != 0) {
    total[kTermRatioMin] = minimum(total[kTermRatioMin], lowest);
    total[kTermRatioMax] = maximum(total[kTermRatioMax], highest);
  }
  kept[kKeptTokens * rows] = tokens, kept[kKeptFactor * rows] = factor;
  kept[kKeptRatio * rows] = ratio, kept[kKeptSlope * rows] = slope;
}

// Divides the totals by what they are means over.
template <class T>
__device__ inline void write_terms(const Settings& s, double (&total)[kTotals], double responses,
                                   double tokens, double* kept, T* terms) {
  responses += kEpsilon, tokens += kEpsilon;
  const double by_loss = s.has(kMeanOfResponses) ? responses : tokens;
  const bool clips = !s.has(kRatioIsLogprob | kRatioIsOne) && total[kTermRatioMin] <= total[kTermRatioMax];
  kept[0] = total[kPositiveTokens];
  total[kTermKl] /= by_loss;
  total[kTermNll] /= total[kPositiveTokens] + kEpsilon;
  total[kTermLoss] = total[kTermLoss] / by_loss + s.kl_coefficient * total[kTermKl] +
                     s.nll_coefficient * total[kTermNll];
  total[kTermClippedMin] = total[kTermRatioMin], total[kTermClippedMax] = total[kTermRatioMax];
  if (clips) {
    total[kTermClippedMin] = clamped(total[kTermRatioMin], s.ratio_low, s.ratio_high);
    total[kTermClippedMax] = clamped(total[kTermRatioMax], s.ratio_low, s.ratio_high);
  }
  // A weight a response, (B, 1), against the mask (B,): the product is (B, B), as in NeMo RL.
  if (s.has(kWeightOfResponse)) total[kTermWeight] *= total[kTermValid] / responses;
  else total[kTermWeight] /= tokens;
  total[kTermOutside] /= s.has(kZeroResponses) ? responses : tokens;
  for (const int term : {kTermRatio, kTermClipped, kTermMultError, kTermGenKl, kTermPolicyKl,
                         kTermJs, kTermEntropy})
    total[term] /= tokens;
  for (int term = 0; term < kTerms; ++term) terms[term] = (T)total[term];
}
