// Shared by all CUDA kernels: element types and the types of their sums, and the assignment of work to threads.
// Independent of torch, so that the kernels also compile for the host emulation (DCN_EMULATE).
#pragma once
#include <cstdint>
#ifdef DCN_EMULATE
#include "emulator/cuda_emu.h"
#include "emulator/half_emu.h"
#include "emulator/runtime_emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DCN_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#endif
#include "hd.h"
namespace dcnseg_ops {

#ifdef DCN_EMULATE
constexpr int kThreads = 64;  // per block: each is a thread on the host
#else
constexpr int kThreads = 256;
#endif
constexpr int kWarp = 32;

// Elements have type T, their sums type A: to_sum converts T to A, Value<T>::from rounds back.
__device__ inline float to_sum(float v) { return v; }
__device__ inline double to_sum(double v) { return v; }
template <typename T>
struct Value {
  template <typename A>
  __device__ static T from(A v) {
    return v;
  }
};
__device__ inline float to_sum(__half v) { return __half2float(v); }
__device__ inline float to_sum(__nv_bfloat16 v) { return __bfloat162float(v); }
template <>
struct Value<__half> {
  __device__ static __half from(float v) { return __float2half_rn(v); }
};
template <>
struct Value<__nv_bfloat16> {
  __device__ static __nv_bfloat16 from(float v) { return __float2bfloat16_rn(v); }
};

#define DCN_FOR_EACH(i, n)                                                               \
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < (n); \
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)

inline dim3 blocks_for(int64_t n) {
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(blocks < (1 << 20) ? blocks : (1 << 20)));
}

template <typename T, typename A>
__global__ void round_values(const A* from, int64_t n, T* to) {
  DCN_FOR_EACH(i, n) to[i] = Value<T>::from(from[i]);
}

}  // namespace dcnseg_ops
