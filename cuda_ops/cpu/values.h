// Element types: mapping from dtypes to C++ types; sums and conversions of arrays.
#pragma once
#include <algorithm>
#include "cpu/gemm/microkernel.h"
#include "cpu/layout.h"
#include "cpu/simd.h"
#include "torch_c_abi.h"
namespace dcnseg_ops {

// f(value of the tensor's element type).
template <typename F>
auto by_dtype(const Tensor& input, const F& f) {
  const int32_t dtype = input.dtype();
  if (dtype == aoti_torch_dtype_float32()) return f(float{});
  if (dtype == aoti_torch_dtype_float64()) return f(double{});
  if (dtype == aoti_torch_dtype_bfloat16()) return f(bf16{});
  if (dtype == aoti_torch_dtype_float16()) return f(f16{});
  throw std::runtime_error("dcnseg: expected float64, float32, bfloat16 or float16 on the CPU");
}

// f(value of the tensor's element type, value of the element type of the GEMM).
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

// values[i][j] += bias[j]
template <typename T>
DCN_CLONES void add_bias_to_rows(AccOf<T>* values, int64_t rows, int64_t columns, const T* bias) {
  for (int64_t i = 0; i < rows; ++i, values += columns)
    for (int64_t j = 0; j < columns; ++j) values[j] += load_one(bias + j);
}

// to = from, converted to another type.
template <typename F, typename T>
DCN_CLONES void convert_values(const F* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) store_one(to + i, static_cast<AccOf<T>>(load_one(from + i)));
}

template <typename A, typename T>
DCN_CLONES void add_converted(const A* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) store_one(to + i, load_one(to + i) + from[i]);
}

template <typename A>
DCN_CLONES void add_values(const A* from, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

}  // namespace dcnseg_ops
