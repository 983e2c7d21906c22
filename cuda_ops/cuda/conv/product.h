// Products of matrices by the cuBLAS that torch has loaded, with torch's own handle: on its current stream and
// capturable in a graph. Called directly, as torch's own products neither add 16-bit products up in float32 nor take
// tf32 where convolutions do. The library is not linked: its name has the CUDA version in it, and any will do.
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

// One matrix per convolution group, each row-major; a row may be longer in memory than it is.
template <typename T>
struct Matrices {
  T* data;
  int64_t row_stride, group_stride;  // in numbers
  bool transposed = false;           // what is multiplied is the transpose of what lies in memory
};

// c [rows][columns] = a [rows][depth] * b [depth][columns] (+ c), for each group. Sums are made in float32, or in
// float64 of float64; of numbers of float32 they are made from tf32 where that is allowed.
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
  // cuBLAS is column-major: what it is told to be transposed factors in the other order gives our product.
  const int status =
      gemm(handle, op(b.transposed), op(a.transposed), number(columns), number(rows), number(depth), &one, b.data,
           cublas::type_of<T>(), number(b.row_stride), b.group_stride, a.data, cublas::type_of<T>(),
           number(a.row_stride), a.group_stride, &beta, c.data, cublas::type_of<C>(), number(c.row_stride),
           c.group_stride, number(groups), sum, cublas::kDefaultAlgorithm);
  DCN_CHECK(status == 0, "deform_conv2d: cuBLAS failed with status " + std::to_string(status));
}

}  // namespace dcnseg_ops
