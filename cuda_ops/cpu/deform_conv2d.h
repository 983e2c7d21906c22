// dcnseg::deform_conv2d and dcnseg::deform_conv2d_backward for CPU tensors.
#pragma once
#include "deform_conv_params.h"
#include "torch_c_abi.h"
namespace dcnseg_ops {

// The arguments as they come from Python, checked there. `mask` and `bias` have no elements if
// absent. input and weight are contiguous or channels-last; offset and mask have the type that sums
// are kept in, and any strides.
struct DeformConvArgs {
  Tensor input, offset, mask, weight;
  DeformConvParams params;
};

Tensor deform_conv2d(const DeformConvArgs& args, const Tensor& bias, bool channels_last);

struct DeformConvGrads {
  Tensor input, offset, mask, weight;
};  // no elements if not wanted
struct WantedGrads {
  bool input, offset, mask, weight;
};
DeformConvGrads deform_conv2d_backward(const Tensor& grad, const DeformConvArgs& args, WantedGrads wanted);

}  // namespace dcnseg_ops
