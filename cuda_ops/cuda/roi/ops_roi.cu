// The RoI operators for CUDA tensors; the schemas are defined in cpu/ops_cpu.cpp.
//
// The input and the gradient of the output are contiguous or channels-last; the format of the output is given by a
// flag. The contents of boxes are known only on the device and checked there (roi_common.cuh); sizes and dtypes are
// checked here.
#include <algorithm>
#include <limits>
#include "cuda/roi/deform_roi_pool.cuh"
#include "cuda/roi/roi_pool.cuh"
#include "cuda/torch_cuda.h"
using namespace dcnseg_ops;

namespace {

Tensor empty_as(const Tensor& t, bool channels_last) {
  return empty_dense({t.sizes(), t.sizes() + 4}, dense_strides(t.sizes(), channels_last), t.dtype(), t);
}

Tensor empty_output(const RoiParams& p, int32_t dtype, const Tensor& input) {
  const std::vector<int64_t> sizes{p.boxes, p.out_channels, p.kernel_h, p.kernel_w};
  return empty_dense(sizes, dense_strides(sizes.data(), p.channels_last), dtype, input);
}

// From the input, the four integers of the schemas and the format of the output.
RoiParams make_roi_params(const Tensor& input, int64_t boxes, int64_t kh, int64_t kw, int64_t group_h, int64_t group_w,
                          bool channels_last) {
  const bool input_last = is_channels_last("input", input);
  const int64_t *sizes = input.sizes(), channels = sizes[1];
  DCN_CHECK(kh >= 1 && kw >= 1 && group_h >= 1 && group_w >= 1, "bins and groups must be at least 1");
  DCN_CHECK(std::max({kh, kw, group_h, group_w}) < (1 << 30), "there are too many bins");
  DCN_CHECK(channels % (group_h * group_w) == 0, "the channels of the input are not divisible by the groups");
  const double pixels = static_cast<double>(sizes[2]) * static_cast<double>(sizes[3]);
  DCN_CHECK(pixels < std::numeric_limits<int32_t>::max(), "a map of the input has 2^31 pixels or more");
  DCN_CHECK(sizes[2] < (1 << 30) && sizes[3] < (1 << 30), "the input is too high or too wide");
  RoiParams p{};
  p.batch = sizes[0];
  p.height = static_cast<int32_t>(sizes[2]);
  p.width = static_cast<int32_t>(sizes[3]);
  p.boxes = boxes;
  p.out_channels = channels / (group_h * group_w);
  p.kernel_h = kh, p.kernel_w = kw, p.group_h = group_h, p.group_w = group_w;
  p.input = dense_layout(channels, sizes[2] * sizes[3], input_last);
  p.output = dense_layout(p.out_channels, p.bins(), channels_last);
  p.channels_last = channels_last;
  return p;
}

// `rows` are bins or samples: [boxes, width].
void check_rows(const char* name, const Tensor& rows, int64_t width, int32_t dtype, const Tensor& input) {
  check_contiguous(name, rows, dtype, input);
  DCN_CHECK(has_sizes(rows, {rows.dim() > 0 ? rows.sizes()[0] : 0, width}), std::string(name) + " has the wrong size");
}

RoiParams window_params(const Tensor& input, const Tensor& bins, int64_t kh, int64_t kw, int64_t group_h,
                        int64_t group_w, bool channels_last) {
  DCN_CHECK(bins.dim() == 2, "bins must have two dimensions");
  const RoiParams p = make_roi_params(input, bins.sizes()[0], kh, kw, group_h, group_w, channels_last);
  check_rows("bins", bins, 1 + 2 * kh + 2 * kw, aoti_torch_dtype_int32(), input);
  return p;
}

void check_grad(const RoiParams& p, const Tensor& grad, const Tensor& input) {
  check_argument("grad", grad, input.dtype(), input);
  DCN_CHECK(has_sizes(grad, {p.boxes, p.out_channels, p.kernel_h, p.kernel_w}), "grad has the wrong size");
}

void roi_pool_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor input = as_tensor(stack[0]), bins = as_tensor(stack[1]);
  const DeviceGuard guard(input);
  const RoiParams p = window_params(input, bins, as_int(stack[2]), as_int(stack[3]), 1, 1, as_bool(stack[4]));
  Tensor output = empty_output(p, input.dtype(), input), argmax = empty_output(p, aoti_torch_dtype_int32(), input);
  by_dtype(input, [&](auto value, auto sum) {
    using T = decltype(value);
    DCN_RUN((roi_max_forward<T, decltype(sum)>), p.outputs(), current_stream(input), p, input.in<T>(),
            bins.in<int32_t>(), output.out<T>(), argmax.out<int32_t>());
  });
  stack[0] = from_tensor(std::move(output));
  stack[1] = from_tensor(std::move(argmax));
}

void roi_pool_backward_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = as_tensor(stack[0]), input = as_tensor(stack[1]), bins = as_tensor(stack[2]),
               argmax = as_tensor(stack[3]);
  const DeviceGuard guard(input);
  const bool channels_last = is_channels_last("grad", grad);
  const RoiParams p = window_params(input, bins, grad.sizes()[2], grad.sizes()[3], 1, 1, channels_last);
  check_grad(p, grad, input);
  check_argument("argmax", argmax, aoti_torch_dtype_int32(), input);
  DCN_CHECK(has_sizes(argmax, {p.boxes, p.out_channels, p.kernel_h, p.kernel_w}) &&
                has_strides(argmax, dense_strides(grad.sizes(), channels_last)),
            "argmax must have the size and the memory format of grad");
  Tensor grad_input = empty_as(input, is_channels_last("input", input));
  by_dtype(input, [&](auto value, auto sum) {
    using T = decltype(value);
    using A = decltype(sum);
    const SummedGradient<T, A> sums(grad_input, current_stream(input));
    if (sums.sums())
      DCN_RUN((roi_max_backward<T, A>), p.outputs(), current_stream(input), p, grad.in<T>(), bins.in<int32_t>(),
              argmax.in<int32_t>(), sums.sums());
    sums.finish();
  });
  stack[0] = from_tensor(std::move(grad_input));
}

void roi_avg_pool_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor input = as_tensor(stack[0]), bins = as_tensor(stack[1]);
  const DeviceGuard guard(input);
  const RoiParams p = window_params(input, bins, as_int(stack[2]), as_int(stack[3]), as_int(stack[4]), as_int(stack[5]),
                                    as_bool(stack[6]));
  Tensor output = empty_output(p, input.dtype(), input);
  by_dtype(input, [&](auto value, auto sum) {
    using T = decltype(value);
    DCN_RUN((roi_mean_forward<T, decltype(sum)>), p.outputs(), current_stream(input), p, input.in<T>(),
            bins.in<int32_t>(), output.out<T>());
  });
  stack[0] = from_tensor(std::move(output));
}

void roi_avg_pool_backward_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = as_tensor(stack[0]), input = as_tensor(stack[1]), bins = as_tensor(stack[2]);
  const DeviceGuard guard(input);
  const RoiParams p = window_params(input, bins, as_int(stack[3]), as_int(stack[4]), as_int(stack[5]), as_int(stack[6]),
                                    is_channels_last("grad", grad));
  check_grad(p, grad, input);
  Tensor grad_input = empty_as(input, is_channels_last("input", input));
  by_dtype(input, [&](auto value, auto sum) {
    using T = decltype(value);
    using A = decltype(sum);
    const SummedGradient<T, A> sums(grad_input, current_stream(input));
    if (sums.sums())
      DCN_RUN((roi_mean_backward<T, A>), p.outputs(), current_stream(input), p, grad.in<T>(), bins.in<int32_t>(),
              sums.sums());
    sums.finish();
  });
  stack[0] = from_tensor(std::move(grad_input));
}

// Integers: kh, kw, group_h, group_w, border.
DeformRoiParams deform_params(const Tensor& input, const Tensor& samples, const Tensor& shift,
                              const StableIValue* numbers, bool channels_last) {
  DCN_CHECK(samples.dim() == 2, "samples must have two dimensions");
  const int64_t kh = as_int(numbers[0]), kw = as_int(numbers[1]), border = as_int(numbers[4]);
  DeformRoiParams d{};
  d.roi = make_roi_params(input, samples.sizes()[0], kh, kw, as_int(numbers[2]), as_int(numbers[3]), channels_last);
  check_rows("samples", samples, 1 + 3 * kh + 3 * kw, sum_dtype(input), input);
  check_contiguous("shift", shift, sum_dtype(input), input);
  DCN_CHECK(border >= 0 && border <= static_cast<int64_t>(Border::mxnet), "unknown border");
  d.border = static_cast<Border>(border);
  d.classes = d.part_h = d.part_w = 1;
  if (shift.numel() == 0) return d;
  DCN_CHECK(shift.dim() == 4, "shift must have four dimensions");
  const int64_t* sizes = shift.sizes();
  d.classes = sizes[1] / 2, d.part_h = sizes[2], d.part_w = sizes[3];
  DCN_CHECK(sizes[0] == d.roi.boxes && sizes[1] % 2 == 0, "shift must be [boxes, 2 * classes, parts, parts]");
  DCN_CHECK(d.roi.out_channels % d.classes == 0, "the output channels are not divisible by the classes of shift");
  DCN_CHECK(std::max(d.part_h, d.part_w) < (1 << 30), "there are too many parts");
  return d;
}

template <typename A>
RoiPositions<A> positions_of(const Tensor& samples, const Tensor& shift) {
  return {samples.in<A>(), shift.numel() ? shift.in<A>() : nullptr};
}

void deform_roi_pool_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor input = as_tensor(stack[0]), samples = as_tensor(stack[1]), shift = as_tensor(stack[2]);
  const DeviceGuard guard(input);
  const DeformRoiParams d = deform_params(input, samples, shift, stack + 3, as_bool(stack[8]));
  Tensor output = empty_output(d.roi, input.dtype(), input);
  by_dtype(input, [&](auto value, auto sum) {
    using T = decltype(value);
    using A = decltype(sum);
    const int64_t n = deform_roi_threads(d);
    DCN_RUN((deform_roi_forward<T, A>), n, current_stream(input), d, input.in<T>(), positions_of<A>(samples, shift), n,
            output.out<T>());
  });
  stack[0] = from_tensor(std::move(output));
}

void deform_roi_pool_backward_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = as_tensor(stack[0]), input = as_tensor(stack[1]), samples = as_tensor(stack[2]),
               shift = as_tensor(stack[3]);
  const DeviceGuard guard(input);
  const DeformRoiParams d = deform_params(input, samples, shift, stack + 4, is_channels_last("grad", grad));
  check_grad(d.roi, grad, input);
  Tensor grad_input =
      as_bool(stack[9]) ? empty_as(input, is_channels_last("input", input)) : empty_contiguous({0}, input);
  Tensor grad_shift = as_bool(stack[10]) ? empty_contiguous({shift.sizes(), shift.sizes() + shift.dim()}, shift)
                                         : empty_contiguous({0}, shift);
  by_dtype(input, [&](auto value, auto sum) {
    using T = decltype(value);
    using A = decltype(sum);
    const RoiPositions<A> positions = positions_of<A>(samples, shift);
    const SummedGradient<T, A> sums(grad_input, current_stream(input));
    const int64_t n = deform_roi_threads(d), shifts = shift_positions(d);
    if (sums.sums())
      DCN_RUN((deform_roi_input_grads<T, A>), n, current_stream(input), d, grad.in<T>(), positions, n, sums.sums());
    sums.finish();
    if (grad_shift.numel())
      DCN_RUN((deform_roi_shift_grads<T, A>), kWarp * shifts, current_stream(input), d, grad.in<T>(), input.in<T>(),
              positions, shifts, grad_shift.out<A>());
  });
  stack[0] = from_tensor(std::move(grad_input));
  stack[1] = from_tensor(std::move(grad_shift));
}

}  // namespace

namespace dcnseg_ops {

void register_roi_operators(TorchLibraryHandle cuda) {
  DCN_CALL(torch_library_impl(cuda, "roi_pool", &roi_pool_boxed, kAbi));
  DCN_CALL(torch_library_impl(cuda, "roi_pool_backward", &roi_pool_backward_boxed, kAbi));
  DCN_CALL(torch_library_impl(cuda, "roi_avg_pool", &roi_avg_pool_boxed, kAbi));
  DCN_CALL(torch_library_impl(cuda, "roi_avg_pool_backward", &roi_avg_pool_backward_boxed, kAbi));
  DCN_CALL(torch_library_impl(cuda, "deform_roi_pool", &deform_roi_pool_boxed, kAbi));
  DCN_CALL(torch_library_impl(cuda, "deform_roi_pool_backward", &deform_roi_pool_backward_boxed, kAbi));
}

}  // namespace dcnseg_ops
