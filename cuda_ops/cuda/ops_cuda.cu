// dcnseg::deform_conv2d and its backward for CUDA tensors; the schemas stand in cpu/ops_cpu.cpp.
//
// Image after image and tile after tile of its output pixels: columns, one library product, next.
// The caller (dcnseg/ops/deform_conv_native.py) makes every tensor contiguous. Kernels run on
// torch's current stream; memory comes from torch's allocator, which knows that stream.
#include <algorithm>
#include "deform_conv2d.cuh"
#include "deform_conv_checks.h"
#include "ops_roi.h"
#include "torch_cuda.h"
using namespace dcnseg_ops;

namespace {

constexpr int64_t kColumnBytes = 256 << 20;

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

struct Arguments {
  Tensor input, offset, mask, weight;
};

// Everything the kernels rely on.
DeformConvParams contiguous_params(const Arguments& a, const StableIValue* numbers) {
  const int32_t dtype = a.input.dtype(), position_dtype = sum_dtype(a.input);
  check_contiguous("deform_conv2d: input", a.input, dtype, a.input);
  check_contiguous("deform_conv2d: offset", a.offset, position_dtype, a.input);
  check_contiguous("deform_conv2d: mask", a.mask, position_dtype, a.input);
  check_contiguous("deform_conv2d: weight", a.weight, dtype, a.input);
  return checked_params(a.input, a.offset, a.mask, a.weight, numbers);
}

void deform_conv2d_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments a{as_tensor(stack[0]), as_tensor(stack[1]), as_tensor(stack[2]), as_tensor(stack[3])};
  const Tensor bias = as_tensor(stack[4]);
  const DeviceGuard guard(a.input);
  const DeformConvParams p = contiguous_params(a, stack + 5);
  check_contiguous("deform_conv2d: bias", bias, a.input.dtype(), a.input);
  check_bias(bias, a.input, p);
  stack[0] = from_tensor(by_dtype(a.input, [&](auto value, auto sum) {
    return Call<decltype(value), decltype(sum)>{a.input, a.offset, a.mask, a.weight, p, current_stream(a.input)}
        .forward(bias);
  }));
}

void deform_conv2d_backward_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = as_tensor(stack[0]);
  const Arguments a{as_tensor(stack[1]), as_tensor(stack[2]), as_tensor(stack[3]), as_tensor(stack[4])};
  const DeviceGuard guard(a.input);
  const DeformConvParams p = contiguous_params(a, stack + 5);
  check_contiguous("deform_conv2d: grad", grad, a.input.dtype(), a.input);
  check_grad(grad, a.input, p);
  const auto like = [](const Tensor& t, StableIValue wanted) {
    return as_bool(wanted) ? empty_contiguous({t.sizes(), t.sizes() + t.dim()}, t) : empty_contiguous({0}, t);
  };
  Tensor grads[4] = {like(a.input, stack[12]), like(a.offset, stack[13]), like(a.mask, stack[14]),
                     like(a.weight, stack[15])};
  by_dtype(a.input, [&](auto value, auto sum) {
    using T = decltype(value);
    using A = decltype(sum);
    const Call<T, A> call{a.input, a.offset, a.mask, a.weight, p, current_stream(a.input)};
    const SummedGradient<T, A> input(grads[0], call.stream), weight(grads[3], call.stream);
    const auto wanted = [](const Tensor& t) { return t.numel() ? t.out<A>() : nullptr; };
    call.backward(grad, input.sums(), wanted(grads[1]), wanted(grads[2]), weight.sums());
    input.finish();
    weight.finish();
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
    register_roi_operators(cuda);
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
