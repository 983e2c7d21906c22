// A number of 16 bits (bfloat16) for the emulated kernels, whose sums are float: so that values and
// sums have different types, as most often on a GPU. To be included after a .cuh file.
#pragma once
#include <cstring>
namespace dcnseg_ops {

struct Half {
  uint16_t bits;
};
inline float to_sum(Half v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <>
struct Value<Half> {
  static Half from(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    if (v != v) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};

template <typename T>
using SumOf = decltype(to_sum(T{}));

template <typename T, typename S>
T convert(S v) {
  return Value<T>::from(static_cast<SumOf<T>>(v));
}
inline double to_number(int32_t v) { return v; }
template <typename T>
double to_number(T v) {
  return to_sum(v);
}

}  // namespace dcnseg_ops
