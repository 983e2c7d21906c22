// A 16-bit element type (bfloat16) for the emulated kernels, whose sums are float, so that elements and sums have
// different types. Include it after a .cuh file.
#pragma once
namespace dcnseg_ops {

using Half = __nv_bfloat16;

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
