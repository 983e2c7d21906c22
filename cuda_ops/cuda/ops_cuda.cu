// dcnseg::deform_conv2d and its backward for CUDA tensors; the schemas stand in cpu/ops_cpu.cpp.
//
// Image after image and tile after tile of its output pixels: columns, one library product, next.
// The caller (dcnseg/ops/deform_conv_native.py) makes every tensor contiguous. Kernels run on
// torch's current stream; memory comes from torch's allocator, which knows that stream.
#include <algorithm>
#include "deform_conv2d.cuh"
#include "torch_c_abi.h"
using namespace dcnseg_ops;

namespace {

constexpr int64_t kColumnBytes = 256 << 20;

struct DeviceGuard {
  DeviceGuardHandle handle = nullptr;
  explicit DeviceGuard(int32_t index) { DCN_CALL(aoti_torch_create_device_guard(index, &handle)); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { aoti_torch_delete_device_guard(handle); }
};

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  DCN_CALL(aoti_torch_get_current_cuda_stream(t.device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  DCN_CHECK(error == cudaSuccess, std::string(kernel) + ": " + cudaGetErrorString(error));
}

#define DCN_RUN(kernel, n, stream, ...)                                            \
  do {                                                                             \
    if ((n) > 0) {                                                                 \
      DCN_LAUNCH((kernel), blocks_for(n), dim3(kThreads), 0, stream, __VA_ARGS__); \
      check_launch(#kernel);                                                       \
    }                                                                              \
  } while (0)

// [groups][rows][columns] on the device of `like`; strides are in numbers.
Tensor matrices(const void* data, int64_t groups, int64_t rows, int64_t columns, int64_t group_stride,
                int64_t row_stride, int64_t column_stride, const Tensor& like) {
  const int64_t sizes[3] = {groups, rows, columns}, strides[3] = {group_stride, row_stride, column_stride};
  AtenTensorHandle handle;
  DCN_CALL(aoti_torch_create_tensor_from_blob(const_cast<void*>(data), 3, sizes, strides, 0, like.dtype(),
                                              like.device_type(), like.device_index(), &handle));
  return Tensor(handle);
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  StableIValue stack[3] = {from_tensor(a), from_tensor(b),
                           from_tensor(out)};  // copies of the handles, which the call takes over
  DCN_CALL(torch_call_dispatcher("aten::bmm", "out", stack, kAbi));
  as_tensor(stack[0]);
}

template <typename T, typename A>
struct Call {
  const Tensor &input, &offset, &mask, &weight;
  DeformConvParams p;
  cudaStream_t stream;

  const T* image(int64_t b) const { return input.in<T>() + b * p.channels * p.height * p.width; }
  Positions<A> positions(int64_t b) const {
    const int64_t planes = p.offset_groups * p.taps() * p.out_pixels();
    return {offset.in<A>() + b * 2 * planes, mask.numel() ? mask.in<A>() + b * planes : nullptr};
  }
  int64_t tile() const {
    const int64_t fit = kColumnBytes / (p.channels * p.taps() * static_cast<int64_t>(sizeof(T)));
    return std::max<int64_t>(std::min(fit, p.out_pixels()), std::min<int64_t>(256, p.out_pixels()));
  }
  Tensor column_buffer() const { return empty_contiguous({p.channels * p.taps() * tile()}, input); }

  void sample(int64_t b, Range range, T* columns) const {
    const int64_t n = sample_threads(p, range);
    DCN_RUN((sample_columns<T, A>), n, stream, p, image(b), positions(b), range, n, columns);
  }
  // Views of one tile: columns [groups][K][count], the weight [groups][outputs][K], its transpose,
  // and rows of an output-like tensor [groups][outputs][count].
  Tensor columns_view(const T* columns, Range r) const {
    return matrices(columns, p.groups, p.depth(), r.count, p.depth() * r.count, r.count, 1, input);
  }
  Tensor columns_transposed(const T* columns, Range r) const {
    return matrices(columns, p.groups, r.count, p.depth(), p.depth() * r.count, 1, r.count, input);
  }
  Tensor weight_view() const {
    return matrices(weight.in<T>(), p.groups, p.group_outputs(), p.depth(), p.group_outputs() * p.depth(), p.depth(), 1,
                    input);
  }
  Tensor weight_transposed() const {
    return matrices(weight.in<T>(), p.groups, p.depth(), p.group_outputs(), p.group_outputs() * p.depth(), 1, p.depth(),
                    input);
  }
  Tensor output_view(const T* output, int64_t b, Range r) const {
    const int64_t pixels = p.out_pixels();
    return matrices(output + b * p.out_channels * pixels + r.first, p.groups, p.group_outputs(), r.count,
                    p.group_outputs() * pixels, pixels, 1, input);
  }
  template <typename F>
  void for_tiles(const F& f) const {
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t first = 0; first < p.out_pixels(); first += tile())
        f(b, Range{first, std::min(tile(), p.out_pixels() - first)});
  }

  Tensor forward(const Tensor& bias) const {
    Tensor output = empty_contiguous({p.batch, p.out_channels, p.out_height, p.out_width}, input);
    Tensor buffer = column_buffer();
    T* columns = buffer.template out<T>();
    T* out = output.template out<T>();
    for_tiles([&](int64_t b, Range range) {
      sample(b, range, columns);
      multiply(output_view(out, b, range), weight_view(), columns_view(columns, range));
    });
    const int64_t n = p.out_channels * p.out_pixels();
    if (bias.numel())
      for (int64_t b = 0; b < p.batch; ++b)
        DCN_RUN((add_bias<T>), n, stream, bias.template in<T>(), p.out_pixels(), n, out + b * n);
    return output;
  }

  void backward(const Tensor& grad, A* grad_input, A* grad_offset, A* grad_mask, A* grad_weight) const {
    Tensor buffer = column_buffer();
    Tensor product = empty_contiguous({grad_weight ? weight.numel() : 0}, weight);
    T* columns = buffer.template out<T>();
    const T* grads = grad.template in<T>();
    const int64_t planes = p.offset_groups * p.taps() * p.out_pixels();
    for_tiles([&](int64_t b, Range range) {
      if (grad_input || grad_offset || grad_mask)
        multiply(columns_view(columns, range), weight_transposed(), output_view(grads, b, range));
      if (grad_offset || grad_mask) {
        const int64_t n = position_threads(p, range);
        DCN_RUN((position_grads<T, A>), n, stream, p, image(b), positions(b), columns, range, n,
                grad_offset ? grad_offset + b * 2 * planes : nullptr, grad_mask ? grad_mask + b * planes : nullptr);
      }
      if (grad_input) {
        const int64_t n = sample_threads(p, range);
        DCN_RUN((add_to_input<T, A>), n, stream, p, positions(b), columns, range, n,
                grad_input + b * p.channels * p.height * p.width);
      }
      if (grad_weight) {
        sample(b, range, columns);
        const int64_t n = weight.numel();
        multiply(matrices(product.template in<T>(), p.groups, p.group_outputs(), p.depth(),
                          p.group_outputs() * p.depth(), p.depth(), 1, input),
                 output_view(grads, b, range), columns_transposed(columns, range));
        DCN_RUN((add_values<T, A>), n, stream, product.template in<T>(), n, grad_weight);
      }
    });
  }
};

template <typename F>
auto by_dtype(const Tensor& input, const F& f) {
  const int32_t dtype = input.dtype();
  if (dtype == aoti_torch_dtype_float32()) return f(float{}, float{});
  if (dtype == aoti_torch_dtype_float64()) return f(double{}, double{});
  if (dtype == aoti_torch_dtype_float16()) return f(__half{}, float{});
  if (dtype == aoti_torch_dtype_bfloat16()) return f(__nv_bfloat16{}, float{});
  throw std::runtime_error("deform_conv2d: expected a floating-point tensor");
}

struct Arguments {
  Tensor input, offset, mask, weight;
};

DeformConvParams params_of(const Arguments& a, const StableIValue* numbers) {
  return make_params(a.input.sizes(), a.offset.sizes(), a.weight.sizes(), numbers);
}

void deform_conv2d_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments a{as_tensor(stack[0]), as_tensor(stack[1]), as_tensor(stack[2]), as_tensor(stack[3])};
  const Tensor bias = as_tensor(stack[4]);
  const DeviceGuard guard(a.input.device_index());
  const DeformConvParams p = params_of(a, stack + 5);
  stack[0] = from_tensor(by_dtype(a.input, [&](auto value, auto sum) {
    return Call<decltype(value), decltype(sum)>{a.input, a.offset, a.mask, a.weight, p, current_stream(a.input)}
        .forward(bias);
  }));
}

// Zeroed sums for a gradient of the size of `like`, in A. `like` may have no elements.
template <typename A>
Tensor zeroed_sums(const Tensor& like, const Tensor& positions, cudaStream_t stream) {
  Tensor sums = empty_contiguous({like.numel()}, positions);  // offset has the type that sums are kept in
  if (like.numel() == 0) return sums;
  const cudaError_t error = cudaMemsetAsync(sums.out<A>(), 0, static_cast<size_t>(like.numel()) * sizeof(A), stream);
  DCN_CHECK(error == cudaSuccess, cudaGetErrorString(error));
  return sums;
}

void deform_conv2d_backward_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = as_tensor(stack[0]);
  const Arguments a{as_tensor(stack[1]), as_tensor(stack[2]), as_tensor(stack[3]), as_tensor(stack[4])};
  const DeviceGuard guard(a.input.device_index());
  const DeformConvParams p = params_of(a, stack + 5);
  const auto like = [](const Tensor& t, StableIValue wanted) {
    return as_bool(wanted) ? empty_contiguous({t.sizes(), t.sizes() + t.dim()}, t) : empty_contiguous({0}, t);
  };
  Tensor grads[4] = {like(a.input, stack[12]), like(a.offset, stack[13]), like(a.mask, stack[14]),
                     like(a.weight, stack[15])};
  by_dtype(a.input, [&](auto value, auto sum) {
    using T = decltype(value);
    using A = decltype(sum);
    const Call<T, A> call{a.input, a.offset, a.mask, a.weight, p, current_stream(a.input)};
    Tensor input_sums = zeroed_sums<A>(grads[0], a.offset, call.stream),
           weight_sums = zeroed_sums<A>(grads[3], a.offset, call.stream);
    const auto wanted = [](Tensor& t, const Tensor& asked) { return asked.numel() ? t.out<A>() : nullptr; };
    call.backward(grad, wanted(input_sums, grads[0]), wanted(grads[1], grads[1]), wanted(grads[2], grads[2]),
                  wanted(weight_sums, grads[3]));
    const int64_t inputs = grads[0].numel(), weights = grads[3].numel();
    DCN_RUN((round_values<T, A>), inputs, call.stream, input_sums.in<A>(), inputs, grads[0].out<T>());
    DCN_RUN((round_values<T, A>), weights, call.stream, weight_sums.in<A>(), weights, grads[3].out<T>());
  });
  for (int i = 0; i < 4; ++i) stack[i] = from_tensor(std::move(grads[i]));
}

}  // namespace

// As in cpu/ops_cpu.cpp; to be called after the CPU library's, which defines the schemas.
extern "C" __attribute__((visibility("default"))) const char* dcnseg_register() {
  static std::string error;
  try {
    TorchLibraryHandle cuda = nullptr;  // kept for the life of the process
    DCN_CALL(aoti_torch_library_init_impl("dcnseg", "CUDA", __FILE__, __LINE__, &cuda));
    DCN_CALL(torch_library_impl(cuda, "deform_conv2d", &deform_conv2d_boxed, kAbi));
    DCN_CALL(torch_library_impl(cuda, "deform_conv2d_backward", &deform_conv2d_backward_boxed, kAbi));
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
