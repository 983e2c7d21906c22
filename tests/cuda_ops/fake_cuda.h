// The functions of torch and cuBLAS that the CUDA operators call, in addition to fake_torch.h, so that complete
// operators run on the host: kernels in the emulator, the GEMM of cuBLAS as plain loops. Programs must be linked with
// -rdynamic, because the GEMM is looked up by name.
#pragma once
#include <map>
#include <string>
#include "cuda/kernel_common.cuh"
#include "fake_torch.h"

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);
static std::map<std::string, Boxed> fake_operators;  // as registered

template <typename T>
static double fake_number(const void* data, int64_t at) {
  return static_cast<double>(dcnseg_ops::to_sum(static_cast<const T*>(data)[at]));
}
static double fake_number_of(int type, const void* data, int64_t at) {
  if (type == 0) return fake_number<float>(data, at);
  if (type == 1) return fake_number<double>(data, at);
  return type == 2 ? fake_number<__half>(data, at) : fake_number<__nv_bfloat16>(data, at);
}
static void fake_store(int type, void* data, int64_t at, double value) {
  if (type == 0) static_cast<float*>(data)[at] = static_cast<float>(value);
  if (type == 1) static_cast<double*>(data)[at] = value;
  if (type == 2) static_cast<__half*>(data)[at] = __float2half_rn(static_cast<float>(value));
  if (type == 14) static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(static_cast<float>(value));
}

extern "C" {
int32_t aoti_torch_device_type_cuda() { return 0; }
AOTITorchError aoti_torch_create_tensor_from_blob(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides,
                                                  int64_t, int32_t dtype, int32_t, int32_t, AtenTensorHandle* out) {
  const std::shared_ptr<void> borrowed(data, [](void*) {});
  *out = new AtenTensorOpaque{{sizes, sizes + dim}, {strides, strides + dim}, dtype, borrowed};
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
AOTITorchError torch_get_current_cuda_blas_handle(void**) { return 0; }
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle*) {
  return 0;
}
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, Boxed call, uint64_t) {
  fake_operators[name] = call;
  return 0;
}

// Column-major, as documented by cuBLAS: c [m][n] = alpha * op(a) [m][k] * op(b) [k][n] + beta * c.
__attribute__((visibility("default"))) int cublasGemmStridedBatchedEx(
    void*, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
    long long stride_a, const void* b, int b_type, int ldb, long long stride_b, const void* beta, void* c, int c_type,
    int ldc, long long stride_c, int batch, int compute_type, int) {
  constexpr int kInvalidValue = 7;
  if (lda < (op_a ? k : m) || ldb < (op_b ? n : k) || ldc < m || a_type != b_type) return kInvalidValue;
  if ((compute_type == 70) != (a_type == 1) || (c_type != a_type && c_type != 0)) return kInvalidValue;
  const int factor_type = compute_type == 70 ? 1 : 0;
  const double times = fake_number_of(factor_type, alpha, 0), before = fake_number_of(factor_type, beta, 0);
  for (int64_t g = 0; g < batch; ++g)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < m; ++i) {
        const int64_t at = g * stride_c + j * ldc + i;
        double sum = before == 0 ? 0 : before * fake_number_of(c_type, c, at);
        for (int64_t l = 0; l < k; ++l)
          sum += times * fake_number_of(a_type, a, g * stride_a + (op_a ? i * lda + l : l * lda + i)) *
                 fake_number_of(b_type, b, g * stride_b + (op_b ? l * ldb + j : j * ldb + l));
        fake_store(c_type, c, at, sum);
      }
  return 0;
}
}
