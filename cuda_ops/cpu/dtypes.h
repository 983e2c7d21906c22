// From a tensor's dtype to the types that the code is compiled for.
#pragma once
#include "microkernel.h"
#include "torch_c_abi.h"
namespace dcnseg_ops {

// f(value of the tensor's type).
template <typename F>
auto by_dtype(const Tensor& input, const F& f) {
  const int32_t dtype = input.dtype();
  if (dtype == aoti_torch_dtype_float32()) return f(float{});
  if (dtype == aoti_torch_dtype_float64()) return f(double{});
  if (dtype == aoti_torch_dtype_bfloat16()) return f(bf16{});
  if (dtype == aoti_torch_dtype_float16()) return f(f16{});
  throw std::runtime_error("dcnseg: expected float64, float32, bfloat16 or float16 on the CPU");
}

// f(value of the tensor's type, value of the type that products are computed from).
template <typename F>
auto by_product_types(const Tensor& input, const F& f) {
  return by_dtype(input, [&](auto value) {
    using T = decltype(value);
    if constexpr (std::is_same_v<T, bf16>)
      return has_bf16_products() ? f(value, bf16{}) : f(value, float{});
    else
      return f(value, AccOf<T>{});
  });
}

}  // namespace dcnseg_ops
