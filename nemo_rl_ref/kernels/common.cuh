// SPDX-License-Identifier: Apache-2.0
// What the kernels share: 16-bit floats, 16-byte loads and stores, sums over a block.
//
// Only what NVRTC knows by itself is used, no header of CUDA's, so that a Python package is all that
// compiles this. Where a PTX instruction is faster, the portable code beside it computes the same
// bits; tests execute the portable code on the CPU and compare the two on a GPU.
#pragma once

// Memory of a block. The harness that runs kernels on the CPU has its own.
#ifndef SHARED_ARRAY
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
#endif

// ---- 16-bit floats ------------------------------------------------------------------------------

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };

// Sums are taken in float32, of double in double.
template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <class T> using Acc = typename Accumulator<T>::type;

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }

// A bfloat16 is the upper half of a float32.
__device__ inline float to_acc(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline float to_acc_portable(float16 x) {
  const unsigned sign = (unsigned)(x.bits & 0x8000) << 16;
  const unsigned exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  if (exponent == 0)  // zero or subnormal: a multiple of 2^-24, exact in float32
    return __uint_as_float(sign | __float_as_uint((float)mantissa * 5.9604644775390625e-8f));
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

__device__ inline float to_acc(float16 x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return to_acc_portable(x);
#endif
}

// Round to nearest, ties to even. NaN stays NaN: 0x7fff, as the instruction gives it.
__device__ inline unsigned bfloat16_bits_portable(float x) {
  const unsigned u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

__device__ inline unsigned float16_bits_portable(float x) {
  const unsigned bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000, u = bits & 0x7fffffff;
  if (u > 0x7f800000u) return 0x7fff;
  if (u >= 0x47800000u) return sign | 0x7c00;  // 65536 and more
  if (u < 0x38800000u)  // below 2^-14: adding 1/2 rounds to multiples of 2^-24
    return sign | (__float_as_uint(__uint_as_float(u) + 0.5f) - 0x3f000000u);
  return sign | (u + 0xfff + ((u >> 13) & 1) - 0x38000000u) >> 13;
}

// Two numbers in one 32-bit word, the first in its lower half.
__device__ inline unsigned pack(float low, float high, bfloat16) {
#ifdef __CUDA_ARCH__
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return bfloat16_bits_portable(low) | bfloat16_bits_portable(high) << 16;
#endif
}

__device__ inline unsigned pack(float low, float high, float16) {
#ifdef __CUDA_ARCH__
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return float16_bits_portable(low) | float16_bits_portable(high) << 16;
#endif
}

template <class T> __device__ inline T from_acc(Acc<T> x);
template <> __device__ inline float from_acc<float>(float x) { return x; }
template <> __device__ inline double from_acc<double>(double x) { return x; }
template <> __device__ inline bfloat16 from_acc<bfloat16>(float x) {
  return {(unsigned short)pack(x, 0.0f, bfloat16{})};
}
template <> __device__ inline float16 from_acc<float16>(float x) {
  return {(unsigned short)pack(x, 0.0f, float16{})};
}

// ---- 16 bytes at a time -------------------------------------------------------------------------

template <class T> constexpr int kPerVector = 16 / (int)sizeof(T);

__device__ inline void unpack(uint4 v, float* x, float) {
  x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
  x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
__device__ inline void unpack(uint4 v, double* x, double) {
  x[0] = __hiloint2double((int)v.y, (int)v.x), x[1] = __hiloint2double((int)v.w, (int)v.z);
}
template <class T> __device__ inline void unpack(uint4 v, float* x, T) {  // the 16-bit types
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = to_acc(T{(unsigned short)words[i]});
    x[2 * i + 1] = to_acc(T{(unsigned short)(words[i] >> 16)});
  }
}

__device__ inline uint4 repack(const float* x, float) {
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
          __float_as_uint(x[3])};
}
__device__ inline uint4 repack(const double* x, double) {
  return {(unsigned)__double2loint(x[0]), (unsigned)__double2hiint(x[0]),
          (unsigned)__double2loint(x[1]), (unsigned)__double2hiint(x[1])};
}
template <class T> __device__ inline uint4 repack(const float* x, T type) {
  return {pack(x[0], x[1], type), pack(x[2], x[3], type), pack(x[4], x[5], type),
          pack(x[6], x[7], type)};
}

// How many elements lie before the first one at a multiple of 16 bytes, at most `count`.
template <class T> __device__ inline int elements_to_alignment(const T* p, int count) {
  const int bytes = (int)(-(unsigned long long)p & 15);
  const int elements = bytes / (int)sizeof(T);
  return elements < count ? elements : count;
}

// Each byte is used once: keep it out of the way of what the caches hold (.cs, "streaming").
template <class T> __device__ inline uint4 load_vector(const T* p) {
  return __ldcs(reinterpret_cast<const uint4*>(p));
}
template <class T> __device__ inline void store_vector(T* p, uint4 v) {
  __stcs(reinterpret_cast<uint4*>(p), v);
}

// The same from an address that need not be divisible by 16, element by element.
template <class T> __device__ inline uint4 load_any(const T* p, bool aligned) {
  if (aligned) return load_vector(p);
  union { T elements[kPerVector<T>]; uint4 vector; } v;
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) v.elements[i] = p[i];
  return v.vector;
}

// ---- functions ----------------------------------------------------------------------------------

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

template <class A> __device__ inline A minus_infinity() { return (A)__uint_as_float(0xff800000u); }

// 2^x. The float32 instruction errs by 2 units in the last place; results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}
__device__ inline double exp2_fast(double x) { return exp2(x); }
__device__ inline float log2_of(float x) { return log2f(x); }
__device__ inline double log2_of(double x) { return log2(x); }
__device__ inline float tanh_of(float x) { return tanhf(x); }
__device__ inline double tanh_of(double x) { return tanh(x); }
// The larger one; a NaN loses against a number.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }
__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Stops the program with a message, as a failed assert does.
extern "C" __device__ void __assertfail(const char* condition, const char* file, unsigned line,
                                        const char* function, unsigned long char_size);
