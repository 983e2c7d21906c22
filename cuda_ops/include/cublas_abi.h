// The part of cuBLAS that the operators use: the type of one function and the constants it takes, as in its headers
// (cublas_api.h, library_types.h), so that the build does not need cuBLAS. A test compares them with the headers.
#pragma once
namespace dcnseg_ops {
namespace cublas {

using Gemm = int (*)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                     int a_type, int lda, long long stride_a, const void* b, int b_type, int ldb, long long stride_b,
                     const void* beta, void* c, int c_type, int ldc, long long stride_c, int batch, int compute_type,
                     int algorithm);
constexpr const char* kGemmName = "cublasGemmStridedBatchedEx";
constexpr int kPlain = 0, kTransposed = 1, kDefaultAlgorithm = -1;
constexpr int kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBfloat16 = 14;
// kSumFloat32 allows TF32 for float32 if the handle's math mode does; kSumExactFloat32 never does.
constexpr int kSumFloat32 = 68, kSumExactFloat32 = 69, kSumFloat64 = 70, kSumFromTf32 = 77;

}  // namespace cublas
}  // namespace dcnseg_ops
