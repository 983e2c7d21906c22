// dcnseg's operators for CUDA tensors; the schemas are defined in cpu/ops_cpu.cpp.
//
// Kernels run on torch's current stream of the tensors' device. Memory is allocated by torch for that stream. Nothing
// synchronizes with the device, so that all calls can be captured in a CUDA graph.
#include "cuda/conv/deform_conv2d.h"
#include "cuda/torch_cuda.h"
#include "deform_conv_checks.h"
namespace dcnseg_ops {
void register_roi_operators(TorchLibraryHandle cuda);  // defined in roi/ops_roi.cu
}
using namespace dcnseg_ops;

namespace {

// Converts and checks input, offset, mask, weight and the integers after them: everything the kernels rely on.
ConvCall checked_call(Tensor input, Tensor offset, Tensor mask, Tensor weight, const StableIValue* numbers,
                      bool allow_tf32) {
  const int32_t dtype = input.dtype(), position_dtype = sum_dtype(input);
  check_argument("deform_conv2d: weight", weight, dtype, input);
  is_channels_last("deform_conv2d: input", input);
  is_channels_last("deform_conv2d: weight", weight);
  check_contiguous("deform_conv2d: offset", offset, position_dtype, input);
  check_contiguous("deform_conv2d: mask", mask, position_dtype, input);
  const DeformConvParams p = checked_params(input, offset, mask, weight, numbers);
  const cudaStream_t stream = current_stream(input);
  return {std::move(input), std::move(offset), std::move(mask), std::move(weight), p, allow_tf32, stream};
}

void deform_conv2d_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Tensor input = as_tensor(stack[0]), offset = as_tensor(stack[1]), mask = as_tensor(stack[2]);
  Tensor weight = as_tensor(stack[3]);
  const Tensor bias = as_tensor(stack[4]);
  const DeviceGuard guard(input);
  const ConvCall call = checked_call(std::move(input), std::move(offset), std::move(mask), std::move(weight), stack + 5,
                                     as_bool(stack[13]));
  check_contiguous("deform_conv2d: bias", bias, call.input.dtype(), call.input);
  check_bias(bias, call.input, call.p);
  stack[0] = from_tensor(deform_conv2d(call, bias, as_bool(stack[12]), as_bool(stack[14])));
}

void deform_conv2d_backward_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = as_tensor(stack[0]);
  Tensor input = as_tensor(stack[1]), offset = as_tensor(stack[2]), mask = as_tensor(stack[3]);
  Tensor weight = as_tensor(stack[4]);
  const DeviceGuard guard(input);
  const ConvCall call = checked_call(std::move(input), std::move(offset), std::move(mask), std::move(weight), stack + 5,
                                     as_bool(stack[16]));
  check_argument("deform_conv2d: grad", grad, call.input.dtype(), call.input);
  is_channels_last("deform_conv2d: grad", grad);
  check_grad(grad, call.input, call.p);
  const auto wanted = [](StableIValue flag, const Tensor& t, const auto& make) {
    return as_bool(flag) ? make(t) : empty_dense({0}, {1}, t.dtype(), t);
  };
  const auto contiguous = [](const Tensor& t) { return empty_contiguous({t.sizes(), t.sizes() + t.dim()}, t); };
  ConvGrads grads{wanted(stack[12], call.input, empty_like), wanted(stack[13], call.offset, contiguous),
                  wanted(stack[14], call.mask, contiguous), wanted(stack[15], call.weight, empty_like)};
  deform_conv2d_backward(call, grad, grads);
  stack[0] = from_tensor(std::move(grads.input));
  stack[1] = from_tensor(std::move(grads.offset));
  stack[2] = from_tensor(std::move(grads.mask));
  stack[3] = from_tensor(std::move(grads.weight));
}

}  // namespace

// As in cpu/ops_cpu.cpp. Call it after that of the CPU library, which defines the schemas.
extern "C" __attribute__((visibility("default"))) const char* dcnseg_register() {
  static std::string error;
  try {
    TorchLibraryHandle cuda = nullptr;  // never freed
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
