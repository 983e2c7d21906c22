// dcnseg::deform_conv2d and its backward for CUDA tensors.
#pragma once
#include "cuda/torch_cuda.h"
#include "deform_conv_params.h"
namespace dcnseg_ops {

// Checked arguments. input and weight are contiguous or channels-last; offset and mask are contiguous and have the
// type of sums; an empty mask means None.
struct ConvCall {
  Tensor input, offset, mask, weight;
  DeformConvParams p;
  bool allow_tf32;
  cudaStream_t stream;
};

// With `fused`, the fused kernel is used if it supports the call.
Tensor deform_conv2d(const ConvCall& call, const Tensor& bias, bool channels_last, bool fused);

struct ConvGrads {  // shaped like the arguments, or empty if not needed
  Tensor input, offset, mask, weight;
};

// Computes the gradients. grad, and those of input and weight, are contiguous or channels-last; the others contiguous.
void deform_conv2d_backward(const ConvCall& call, const Tensor& grad, const ConvGrads& grads);

}  // namespace dcnseg_ops
