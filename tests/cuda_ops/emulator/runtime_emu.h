// The functions of the CUDA runtime that the operators call, on the host: launches are synchronous.
#pragma once
#include <cstddef>
#include <cstring>

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrL2CacheSize };
namespace emu {
inline int l2_cache_bytes = 1 << 20;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emu::l2_cache_bytes;
  return cudaSuccess;
}
