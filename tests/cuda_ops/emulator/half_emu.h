// The 16-bit floating-point types of CUDA for kernels that run on the host.
#pragma once
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half v) {
  _Float16 value;
  std::memcpy(&value, &v, sizeof value);
  return static_cast<float>(value);
}
inline __half __float2half_rn(float v) {
  const auto value = static_cast<_Float16>(v);
  __half half;
  std::memcpy(&half, &value, sizeof half);
  return half;
}
