// dcnseg::deform_conv2d and its backward for CUDA tensors.
#pragma once
#include "cuda/torch_cuda.h"
#include "deform_conv_params.h"
namespace dcnseg_ops {

// Checked arguments. input and weight are contiguous or channels-last; offset and mask are contiguous and have the type
// that sums are kept in; a mask with no elements is none.
struct ConvCall {
  Tensor input, offset, mask, weight;
  DeformConvParams p;
  bool allow_tf32;
  cudaStream_t stream;
};

// With `fused`, the kernel that keeps columns inside the chip is taken where it serves.
Tensor deform_conv2d(const ConvCall& call, const Tensor& bias, bool channels_last, bool fused);

struct ConvGrads {  // shaped as what they are gradients of, or without elements where not wanted
  Tensor input, offset, mask, weight;
};

// Fills the gradients. grad, and those of input and weight, are contiguous or channels-last; the others contiguous.
void deform_conv2d_backward(const ConvCall& call, const Tensor& grad, const ConvGrads& grads);

}  // namespace dcnseg_ops
