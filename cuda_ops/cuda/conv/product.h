// GEMM by the cuBLAS library that torch has loaded, with torch's handle: on its current stream and capturable in a
// graph. Called directly, because torch's own matrix products neither accumulate 16-bit products in float32 nor use
// TF32 by the setting for convolutions. The library is not linked: its name contains the CUDA version, and any version
// works.
#pragma once
#include <dlfcn.h>
#include <limits>
#include "cublas_abi.h"
#include "cuda/torch_cuda.h"
namespace dcnseg_ops {

namespace cublas {
inline Gemm find() {
  void* found = dlsym(RTLD_DEFAULT, kGemmName);
  for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
    if (found) break;
    if (void* library = dlopen(name, RTLD_NOLOAD | RTLD_LAZY)) found = dlsym(library, kGemmName);
  }
  DCN_CHECK(found, "deform_conv2d: torch has loaded no cuBLAS 12 or 13");
  return reinterpret_cast<Gemm>(found);
}

template <typename T>
constexpr int type_of() {
  if (std::is_same_v<T, float>) return kFloat32;
  if (std::is_same_v<T, double>) return kFloat64;
  return std::is_same_v<T, __half> ? kFloat16 : kBfloat16;
}
}  // namespace cublas

// One row-major matrix per convolution group with a row stride.
template <typename T>
struct Matrices {
  T* data;
  int64_t row_stride, group_stride;  // in elements
  bool transposed = false;           // whether the operand is the transpose of the matrix in memory
};

// c [rows][columns] = a [rows][depth] * b [depth][columns] (+ c), for each group. Sums are float32, or float64 for
// float64; float32 is multiplied as TF32 if that is allowed.
template <typename T, typename C>
void multiply(int64_t groups, int64_t rows, int64_t columns, int64_t depth, const Matrices<const T>& a,
              const Matrices<const T>& b, const Matrices<C>& c, bool add, bool allow_tf32) {
  static const cublas::Gemm gemm = cublas::find();
  void* handle = nullptr;
  DCN_CALL(torch_get_current_cuda_blas_handle(&handle));
  const auto number = [](int64_t n) {
    DCN_CHECK(n <= std::numeric_limits<int>::max(), "deform_conv2d: a matrix has 2^31 rows or columns");
    return static_cast<int>(n);
  };
  using Factor = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Factor one = 1, beta = add ? Factor(1) : Factor(0);
  constexpr bool kIsFloat = std::is_same_v<T, float>;
  const int sum = std::is_same_v<T, double> ? cublas::kSumFloat64
                  : !kIsFloat               ? cublas::kSumFloat32
                  : allow_tf32              ? cublas::kSumFromTf32
                                            : cublas::kSumExactFloat32;
  const auto op = [](bool transposed) { return transposed ? cublas::kTransposed : cublas::kPlain; };
  // cuBLAS is column-major: the transposed factors in reverse order give the row-major product.
  const int status =
      gemm(handle, op(b.transposed), op(a.transposed), number(columns), number(rows), number(depth), &one, b.data,
           cublas::type_of<T>(), number(b.row_stride), b.group_stride, a.data, cublas::type_of<T>(),
           number(a.row_stride), a.group_stride, &beta, c.data, cublas::type_of<C>(), number(c.row_stride),
           c.group_stride, number(groups), sum, cublas::kDefaultAlgorithm);
  DCN_CHECK(status == 0, "deform_conv2d: cuBLAS failed with status " + std::to_string(status));
}

}  // namespace dcnseg_ops
