// SPDX-License-Identifier: Apache-2.0
// The conversions of common.cuh, in one block, for the tests.
#include "common.cuh"

__device__ inline unsigned narrow_portable(float x, bfloat16) { return bfloat16_bits_portable(x); }
__device__ inline unsigned narrow_portable(float x, float16) { return float16_bits_portable(x); }
__device__ inline float widen_portable(bfloat16 x) { return to_acc(x); }
__device__ inline float widen_portable(float16 x) { return to_acc_portable(x); }

// Narrows `wide` and widens `narrow`, with the portable code or what the kernels use.
template <class T, bool PORTABLE>
__global__ void convert(const float* wide, const T* narrow, long long count, T* narrowed,
                        float* widened) {
  for (long long i = threadIdx.x; i < count; i += blockDim.x) {
    narrowed[i] =
        PORTABLE ? T{(unsigned short)narrow_portable(wide[i], T{})} : from_acc<T>(wide[i]);
    widened[i] = PORTABLE ? widen_portable(narrow[i]) : to_acc(narrow[i]);
  }
}

// Unpacks vectors and packs them again.
template <class T> __global__ void repack_all(const T* from, long long vectors, T* to) {
  for (long long i = threadIdx.x; i < vectors; i += blockDim.x) {
    Acc<T> x[kPerVector<T>];
    unpack(load_vector(from + i * kPerVector<T>), x, T{});
    store_vector(to + i * kPerVector<T>, repack(x, T{}));
  }
}
