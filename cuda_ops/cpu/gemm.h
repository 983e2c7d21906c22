// Products of row-major matrices by torch's own routines; `groups` independent ones side by side.
//
// For float32 without groups a 1x1 convolution over a channels-last "picture" of the rows is
// called, not mm: oneDNN's convolution runs at the rate of the dense convolution, while mm goes
// to a BLAS that took 2.1 times as long on an AMD machine (P = 1024, K = 4608, N = 512:
// 12.9 ms against 26.5). In bfloat16 both reach the same code; mm needs no memory of its own.
#pragma once
#include <type_traits>
#include "layout.h"
#include "simd.h"
#include "torch_c_abi.h"
namespace dcnseg_ops {

template <typename T>
int32_t dtype_of() {
  if constexpr (std::is_same_v<T, float>)
    return aoti_torch_dtype_float32();
  else if constexpr (std::is_same_v<T, double>)
    return aoti_torch_dtype_float64();
  else
    return aoti_torch_dtype_bfloat16();
}

template <typename T>
Tensor borrow(const T* data, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorHandle h;
  DCN_CALL(aoti_torch_create_tensor_from_blob(const_cast<T*>(data), static_cast<int64_t>(sizes.size()), sizes.data(),
                                              strides.data(), 0, dtype_of<T>(), aoti_torch_device_type_cpu(), 0, &h));
  return Tensor(h);
}

// A product: `data` points into a scratch buffer or into the tensor that torch made.
template <typename T>
struct Product {
  const T* data;
  Tensor owner;
};

inline Tensor conv1x1(const Tensor& input, const Tensor& weight) {
  // A dilation means nothing to a single tap, but without one torch leaves 1x1 convolutions to its
  // BLAS when it runs on one thread (51 ms instead of 24 for P = 1056, K = 4608, N = 512).
  const int64_t one[2] = {1, 1}, zero[2] = {0, 0}, dilation[2] = {2, 2};
  AtenTensorHandle h;
  DCN_CALL(
      aoti_torch_cpu_convolution(input.get(), weight.get(), nullptr, one, 2, zero, 2, dilation, 2, 0, zero, 2, 1, &h));
  return Tensor(h);
}

// Sizes too small for a convolution are left to mm: there the memory format is ambiguous, too.
template <typename T>
bool prefers_convolution(int64_t m, int64_t k, int64_t n, int64_t groups) {
  return std::is_same_v<T, float> && groups == 1 && m >= 16 && k >= 16 && n >= 16;
}

template <typename T>
void batched(const Tensor& out, const Tensor& a, const Tensor& b, int64_t groups) {
  if (groups == 1)
    DCN_CALL(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  else
    DCN_CALL(aoti_torch_cpu_bmm_out(out.get(), a.get(), b.get()));
}

// [groups, rows, cols] with a row stride and a column stride; two dimensions if groups == 1.
template <typename T>
Tensor matrices(const T* data, int64_t groups, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  if (groups == 1) return borrow(data, {rows, cols}, {row_stride, col_stride});
  return borrow(data, {groups, rows, cols}, {rows * cols, row_stride, col_stride});
}

// out [m, n] = a [m, k] * b^T, b [n, k], per group. `scratch` is allocated for `capacity` if needed.
template <typename T>
Product<T> multiply_rows(const T* a, const T* b, Buffer<T>& scratch, int64_t capacity, int64_t groups, int64_t m,
                         int64_t k, int64_t n) {
  if (prefers_convolution<T>(m, k, n, groups)) {
    Tensor out = conv1x1(borrow(a, {1, k, 1, m}, {k * m, 1, k * m, k}), borrow(b, {n, k, 1, 1}, {k, 1, 1, 1}));
    const int64_t* stride = out.strides();
    if (stride[1] == 1 && stride[3] == n) {
      const T* data = out.in<T>();
      return {data, std::move(out)};
    }
  }
  T* data = scratch.get(capacity);
  Tensor out = matrices<T>(data, groups, m, n, n, 1);
  batched<T>(out, matrices(a, groups, m, k, k, 1), matrices(b, groups, k, n, 1, k), groups);
  return {data, std::move(out)};
}

// out [n, k] = g^T * a, g [m, n], a [m, k], per group. For the convolution `a` is an NCHW picture
// of m channels and k pixels, and g^T [n, m] its weight.
template <typename T>
Product<T> multiply_columns(const T* g, const T* g_transposed, const T* a, Buffer<T>& scratch, int64_t capacity,
                            int64_t groups, int64_t m, int64_t k, int64_t n) {
  if (prefers_convolution<T>(m, k, n, groups)) {
    Tensor out = conv1x1(borrow(a, {1, m, 1, k}, {m * k, k, k, 1}), borrow(g_transposed, {n, m, 1, 1}, {m, 1, 1, 1}));
    const int64_t* stride = out.strides();
    if (stride[1] == k && stride[3] == 1) {
      const T* data = out.in<T>();
      return {data, std::move(out)};
    }
  }
  T* data = scratch.get(capacity);
  Tensor out = matrices<T>(data, groups, n, k, k, 1);
  batched<T>(out, matrices(g, groups, n, m, 1, n), matrices(a, groups, m, k, k, 1), groups);
  return {data, std::move(out)};
}

}  // namespace dcnseg_ops
