// Selects and launches the kernel of fused_forward.cuh.
#include <algorithm>
#include "cuda/conv/fused_forward.cuh"
#include "cuda/conv/fused_forward.h"
namespace dcnseg_ops {

namespace {

int device_attribute(cudaDeviceAttr attribute, const Tensor& on) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, on.device_index()), "cudaDeviceGetAttribute");
  return value;
}

bool starts_at_vector(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.in<char>()) % sizeof(uint4) == 0; }

int capability(const Tensor& on) {  // 80, 86, 90, ...
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, on) +
         device_attribute(cudaDevAttrComputeCapabilityMinor, on);
}

// Whether the machine code for this device contains wgmma. Code for sm_90a does; in code for sm_90 the kernel is empty
// and needs almost no registers, whereas its sums alone need 128.
template <typename T>
bool has_wgmma() {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, &fused_forward_kernel<T, Wgmma<T, 256>>), "cudaFuncGetAttributes");
  return attributes.numRegs >= 64;
}

template <typename T>
struct FusedCall {
  const DeformConvParams& p;
  const Tensor &input, &offset, &mask, &weight_rows, &bias, &output;
  bool channels_last;
  cudaStream_t stream;

  // As many resident blocks as the kernel is designed for, or at least one.
  template <typename Multiplier>
  FusedPlan plan() const {
    const int per_multiprocessor = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, input),
              reserved = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock, input),
              most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, input);
    const auto taps = static_cast<int32_t>(p.taps());
    const FusedPlan shared =
        plan_fused<T, Multiplier>(taps, std::min(per_multiprocessor / Multiplier::kBlocks - reserved, most));
    return shared.stages > 0 ? shared : plan_fused<T, Multiplier>(taps, most);
  }

  template <typename Multiplier>
  void run() const {
    const FusedPlan divided = plan<Multiplier>();
    DCN_CHECK(divided.stages > 0, "deform_conv2d: this device has too little shared memory");
    FusedArguments<T> a = fused_arguments<T>(p, Multiplier::kOutputs, divided);
    a.input = input.in<T>(), a.offset = offset.in<float>(), a.mask = mask.numel() ? mask.in<float>() : nullptr;
    a.weight = weight_rows.in<T>(), a.bias = bias.numel() ? bias.in<T>() : nullptr, a.output = output.out<T>();
    a.channels_last = channels_last, a.output_in_vectors = starts_at_vector(output);
    const int64_t blocks = fused_blocks(a);
    DCN_CHECK(blocks <= INT32_MAX, "deform_conv2d: the output has too many tiles");
    const auto kernel = &fused_forward_kernel<T, Multiplier>;
    const size_t bytes = FusedShared<Multiplier::kOutputs>::bytes(divided.stages, divided.round_taps);
    // Always the same limit: otherwise a concurrent call with fewer taps could lower it before this launch.
    const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, input);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
    DCN_LAUNCH(kernel, static_cast<unsigned>(blocks), kFusedThreads<Multiplier>, bytes, stream, a);
    check_cuda(cudaGetLastError(), "fused_forward_kernel");
  }

  // The narrowest tile that covers all outputs of a group, so that sampling is not repeated, or the widest one.
  void run() const {
    const int64_t outputs = p.group_outputs();
    if (capability(input) == 90 && has_wgmma<T>()) {
      if (outputs <= 64) return run<Wgmma<T, 64>>();
      if (outputs <= 128) return run<Wgmma<T, 128>>();
      return run<Wgmma<T, 256>>();
    }
    if (outputs <= 64) return run<MmaSync<T, 64>>();
    run<MmaSync<T, 128>>();
  }
};

}  // namespace

bool fused_forward_serves(const DeformConvParams& p, const Tensor& input, bool allow_tf32) {
  const bool is_half = input.dtype() == aoti_torch_dtype_bfloat16() || input.dtype() == aoti_torch_dtype_float16();
  if (!is_half && !(allow_tf32 && input.dtype() == aoti_torch_dtype_float32())) return false;
  const int64_t vector = is_half ? 8 : 4;
  return p.group_channels() % vector == 0 && p.offset_group_channels() % vector == 0 && starts_at_vector(input) &&
         fits_fused_numbers(p) && capability(input) >= 80;
}

void fused_forward(const DeformConvParams& p, const Tensor& input, const Tensor& offset, const Tensor& mask,
                   const Tensor& weight_rows, const Tensor& bias, const Tensor& output, bool channels_last,
                   cudaStream_t stream) {
  if (p.positions() == 0 || p.out_channels == 0) return;
  DCN_CHECK(starts_at_vector(weight_rows), "deform_conv2d: the weight must start at a multiple of 16 bytes");
  const auto run = [&](auto value) {
    FusedCall<decltype(value)>{p, input, offset, mask, weight_rows, bias, output, channels_last, stream}.run();
  };
  if (input.dtype() == aoti_torch_dtype_bfloat16())
    run(__nv_bfloat16{});
  else if (input.dtype() == aoti_torch_dtype_float16())
    run(__half{});
  else
    run(float{});
}

}  // namespace dcnseg_ops
