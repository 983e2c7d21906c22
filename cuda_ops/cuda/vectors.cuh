// Vectors of adjacent elements that are read, written or added at once. Independent of torch (see kernel_common.cuh).
#pragma once
#include "cuda/kernel_common.cuh"
namespace dcnseg_ops {

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T v[N];
};

template <typename T, int N>
__device__ inline Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <typename T, int N>
__device__ inline void store(T* to, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

template <typename T, int N>
__device__ inline Vector<T, N> zeros() {
  Vector<T, N> vector;
  for (int i = 0; i < N; ++i) vector.v[i] = Value<T>::from(decltype(to_sum(T{}))(0));
  return vector;
}

// Whether one instruction adds N elements of this type to global memory.
template <int N, typename A>
DCN_HD constexpr bool adds_at_once() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return N == 4 && sizeof(A) == 4;
#else
  return false;
#endif
}

// Atomically adds N elements to global memory. The distance of `to` from the start of the allocation is a multiple of
// N elements.
template <int N, typename A>
__device__ inline void add_to_memory(A* to, const A* values) {
  if constexpr (adds_at_once<N, A>()) {
#if defined(__CUDACC__)
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
                 : "memory");
#endif
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) atomicAdd(to + i, values[i]);
  }
}

}  // namespace dcnseg_ops
