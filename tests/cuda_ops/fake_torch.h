// The part of torch's C ABI that the CPU operators call, so that complete operators run without torch under the
// sanitizers: tensors in buffers of exactly their size, and parallel_for on real threads.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>
#include "torch_c_abi.h"

enum FakeDtype : int32_t { kFloat32, kFloat64, kFloat16, kBfloat16, kInt32 };

struct AtenTensorOpaque {
  std::vector<int64_t> sizes, strides;
  int32_t dtype;
  std::shared_ptr<void> memory;
};

static uint32_t fake_threads = 1;

static size_t bytes_of(int32_t dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat16 || dtype == kBfloat16 ? 2 : 4;
}

extern "C" {
int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_dtype_float16() { return kFloat16; }
int32_t aoti_torch_dtype_bfloat16() { return kBfloat16; }
int32_t aoti_torch_dtype_float32() { return kFloat32; }
int32_t aoti_torch_dtype_float64() { return kFloat64; }
int32_t aoti_torch_dtype_int32() { return kInt32; }

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t) {
  delete t;
  return 0;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle t, AtenTensorHandle* out) {
  *out = new AtenTensorOpaque(*t);
  return 0;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* out) {
  *out = static_cast<int64_t>(t->sizes.size());
  return 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t* out) {
  *out = 1;
  for (int64_t n : t->sizes) *out *= n;
  return 0;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t** out) {
  *out = t->sizes.data();
  return 0;
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t** out) {
  *out = t->strides.data();
  return 0;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* out) {
  *out = t->dtype;
  return 0;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* out) {
  *out = 0;
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* out) {
  *out = 0;
  return 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t, int32_t, AtenTensorHandle* out) {
  *out = new AtenTensorOpaque{{sizes, sizes + dim}, {strides, strides + dim}, dtype, nullptr};
  int64_t count = 1;
  for (int64_t i = 0; i < dim; ++i) count = sizes[i] == 0 ? 0 : count + (count ? (sizes[i] - 1) * strides[i] : 0);
  void* data = nullptr;
  if (posix_memalign(&data, 64, static_cast<size_t>(count) * bytes_of(dtype)) != 0) return 1;
  (*out)->memory = std::shared_ptr<void>(data, std::free);
  return 0;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle t, void** out) {
  *out = t->memory.get();
  return 0;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle t, const void** out) {
  *out = t->memory.get();
  return 0;
}
AOTITorchError torch_get_num_threads(uint32_t* out) {
  *out = fake_threads;
  return 0;
}
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*),
                                  void* context) {
  if (begin >= end) return 0;
  const int64_t most = (end - begin + grain - 1) / grain, parts = std::min<int64_t>(most, fake_threads);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; ++i)
    threads.emplace_back(f, begin + i * (end - begin) / parts, begin + (i + 1) * (end - begin) / parts, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
}

static dcnseg_ops::Tensor fake_tensor(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                      int32_t dtype) {
  AtenTensorHandle t = nullptr;
  aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, 0, 0, &t);
  return dcnseg_ops::Tensor(t);
}
