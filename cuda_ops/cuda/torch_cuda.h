// Shared by the CUDA operators: torch's device, stream and allocator, launches, and the checks of arguments that
// prevent out-of-bounds accesses in direct calls of torch.ops.dcnseg.
#pragma once
#include <string>
#include <type_traits>
#include "cuda/kernel_common.cuh"
#include "torch_c_abi.h"
namespace dcnseg_ops {

struct DeviceGuard {
  DeviceGuardHandle handle = nullptr;
  explicit DeviceGuard(const Tensor& t) { DCN_CALL(aoti_torch_create_device_guard(t.device_index(), &handle)); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { aoti_torch_delete_device_guard(handle); }
};

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  DCN_CALL(aoti_torch_get_current_cuda_stream(t.device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* what) {
  DCN_CHECK(error == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(error));
}

// Launches a kernel with n threads, or with fewer that iterate if n is very large.
#define DCN_RUN(kernel, n, stream, ...)                                            \
  do {                                                                             \
    if ((n) > 0) {                                                                 \
      DCN_LAUNCH((kernel), blocks_for(n), dim3(kThreads), 0, stream, __VA_ARGS__); \
      check_cuda(cudaGetLastError(), #kernel);                                     \
    }                                                                              \
  } while (0)

// f(value of the tensor's element type, value of the type of its sums and positions)
template <typename F>
auto by_dtype(const Tensor& t, const F& f) {
  const int32_t dtype = t.dtype();
  if (dtype == aoti_torch_dtype_float32()) return f(float{}, float{});
  if (dtype == aoti_torch_dtype_float64()) return f(double{}, double{});
  if (dtype == aoti_torch_dtype_float16()) return f(__half{}, float{});
  if (dtype == aoti_torch_dtype_bfloat16()) return f(__nv_bfloat16{}, float{});
  throw std::runtime_error("dcnseg: expected a floating-point tensor");
}

// A tensor that does not own its memory.
inline Tensor view_of(const void* data, int64_t numel, int32_t dtype, const Tensor& like) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  DCN_CALL(aoti_torch_create_tensor_from_blob(const_cast<void*>(data), 1, &numel, &stride, 0, dtype, like.device_type(),
                                              like.device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_dense(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype,
                          const Tensor& like) {
  AtenTensorHandle handle;
  DCN_CALL(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                    like.device_type(), like.device_index(), &handle));
  return Tensor(handle);
}

// A gradient of type T to which kernels add in type A. If these differ, the sums have a tensor of their own. An empty
// gradient is not needed: its sums are null.
template <typename T, typename A>
class SummedGradient {
 public:
  SummedGradient(const Tensor& gradient, cudaStream_t stream)
      : gradient_(gradient), sums_(gradient), count_(gradient.numel()), stream_(stream) {
    if (count_ == 0) return;
    if constexpr (!std::is_same_v<T, A>) sums_ = empty_dense({count_}, {1}, sum_dtype(gradient), gradient);
    check_cuda(cudaMemsetAsync(sums(), 0, static_cast<size_t>(count_) * sizeof(A), stream_), "cudaMemsetAsync");
  }
  A* sums() const { return count_ ? sums_.out<A>() : nullptr; }
  void finish() const {  // after the last addition
    if constexpr (!std::is_same_v<T, A>)
      DCN_RUN((round_values<T, A>), count_, stream_, sums_.in<A>(), count_, gradient_.out<T>());
  }

 private:
  Tensor gradient_, sums_;
  int64_t count_;
  cudaStream_t stream_;
};

// Strides of a dense [N, C, H, W] tensor.
inline std::vector<int64_t> dense_strides(const int64_t* sizes, bool channels_last) {
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  return channels_last ? std::vector<int64_t>{h * w * c, 1, w * c, c} : std::vector<int64_t>{c * h * w, h * w, w, 1};
}

// Whether a tensor has these strides; the stride of an axis of size 1 is ignored.
inline bool has_strides(const Tensor& t, const std::vector<int64_t>& strides) {
  for (size_t i = 0; i < strides.size(); ++i)
    if (t.sizes()[i] != 1 && t.strides()[i] != strides[i]) return t.numel() == 0;
  return true;
}

// Whether a [N, C, H, W] tensor is dense in the order [N, H, W, C], possibly in both orders.
inline bool lies_in_rows(const Tensor& t) { return has_strides(t, dense_strides(t.sizes(), true)); }

// Whether a tensor is channels-last; false if it is contiguous as well.
inline bool is_channels_last(const char* name, const Tensor& t) {
  DCN_CHECK(t.dim() == 4, std::string(name) + " must have four dimensions");
  if (has_strides(t, dense_strides(t.sizes(), false))) return false;
  DCN_CHECK(lies_in_rows(t), std::string(name) + " must be contiguous or channels-last");
  return true;
}

inline bool is_contiguous(const Tensor& t) {
  std::vector<int64_t> strides(static_cast<size_t>(t.dim()), 1);
  for (size_t i = strides.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * t.sizes()[i - 1];
  return has_strides(t, strides);
}

inline void check_argument(const char* name, const Tensor& t, int32_t dtype, const Tensor& input) {
  DCN_CHECK(t.dtype() == dtype, std::string(name) + " does not have the dtype that the input requires");
  DCN_CHECK(t.device_type() == input.device_type() && t.device_index() == input.device_index(),
            std::string(name) + " is not on the device of the input");
}

inline void check_contiguous(const char* name, const Tensor& t, int32_t dtype, const Tensor& input) {
  check_argument(name, t, dtype, input);
  DCN_CHECK(is_contiguous(t), std::string(name) + " must be contiguous");
}

}  // namespace dcnseg_ops
