// dcnseg::deform_conv2d and dcnseg::deform_conv2d_backward for CPU tensors.
#pragma once
#include "cpu/conv/tap_plans.h"
#include "cpu/layout.h"
#include "deform_conv_checks.h"
#include "deform_conv_params.h"
#include "torch_c_abi.h"
namespace dcnseg_ops {

// Arguments as passed by Python; `params` is the result of checked_params(...). `mask` and `bias` are empty if absent.
// input and weight are contiguous or channels-last; offset and mask have the type of the sums and any strides.
struct DeformConvArgs {
  Tensor input, offset, mask, weight;
  DeformConvParams params;
};

inline void check_density(const DeformConvArgs& a) {
  const auto is_dense = [](const Tensor& t) { return is_contiguous(t) || is_channels_last(t); };
  DCN_CHECK(is_dense(a.input) && is_dense(a.weight),
            "deform_conv2d: input and weight must be contiguous or channels-last");
}

template <typename A>
Planes<A> planes_of(const Tensor& t) {
  if (t.numel() == 0) return {};
  const Strides4 s(t);
  return {t.in<A>(), s.s[0], s.s[1], s.s[2], s.s[3]};
}

Tensor deform_conv2d(const DeformConvArgs& args, const Tensor& bias, bool channels_last);

struct DeformConvGrads {
  Tensor input, offset, mask, weight;
};  // empty if not needed
struct WantedGrads {
  bool input, offset, mask, weight;
};
DeformConvGrads deform_conv2d_backward(const Tensor& grad, const DeformConvArgs& args, WantedGrads wanted);

}  // namespace dcnseg_ops
