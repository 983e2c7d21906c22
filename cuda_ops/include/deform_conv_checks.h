// Checks of everything that the native convolutions rely on; a wrong size would be an access out of bounds. Usually
// nothing is checked before the call: dcnseg/ops/deform_conv/checks.py, which rejects the same arguments, creates the
// error message afterwards.
#pragma once
#include <algorithm>
#include <cstdint>
#include "deform_conv_params.h"
#include "torch_c_abi.h"
namespace dcnseg_ops {

// Whether a window of `taps` taps has `out` output positions along an axis of `pixels` pixels.
inline bool makes_places(int64_t out, int64_t pixels, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t most = INT32_MAX;  // products of two of these fit in 64 bits
  if (stride < 1 || pad < 0 || dilation < 1 || std::max({pixels, taps, pad, dilation}) > most) return false;
  const int64_t way =
      pixels + 2 * pad - dilation * (taps - 1) - 1;  // distance from the first position to the last one possible
  return way >= 0 && out == way / stride + 1;
}

// Sizes and dtypes of the arguments that both operators share; the caller checks memory formats.
inline DeformConvParams checked_params(const Tensor& input, const Tensor& offset, const Tensor& mask,
                                       const Tensor& weight, const StableIValue* numbers) {
  DCN_CHECK(weight.dtype() == input.dtype() && offset.dtype() == sum_dtype(input) && mask.dtype() == offset.dtype(),
            "deform_conv2d: dtypes do not match");
  DCN_CHECK(input.dim() == 4 && offset.dim() == 4 && weight.dim() == 4,
            "deform_conv2d: input, offset and weight must have four dimensions");
  const int64_t* size = weight.sizes();
  DCN_CHECK(input.sizes()[1] >= 1 && size[0] >= 1 && size[1] >= 1 && size[2] >= 1 && size[3] >= 1,
            "deform_conv2d: input and weight must have channels and taps");
  const DeformConvParams p = make_params(input.sizes(), offset.sizes(), size, numbers);
  DCN_CHECK(p.groups >= 1 && p.groups * size[1] == p.channels && p.out_channels % p.groups == 0,
            "deform_conv2d: the channels of input and weight do not match");
  DCN_CHECK(p.offset_groups >= 1 && p.channels % p.offset_groups == 0,
            "deform_conv2d: the channels of input are not divisible by the number "
            "of offset groups");
  DCN_CHECK(has_sizes(offset, {p.batch, 2 * p.offset_groups * p.taps(), p.out_height, p.out_width}),
            "deform_conv2d: offset has the wrong size");
  DCN_CHECK(mask.numel() == 0 || has_sizes(mask, {p.batch, p.offset_groups * p.taps(), p.out_height, p.out_width}),
            "deform_conv2d: mask has the wrong size");
  DCN_CHECK(p.height >= 1 && p.width >= 1, "deform_conv2d: the input has no pixels");
  DCN_CHECK(makes_places(p.out_height, p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h) &&
                makes_places(p.out_width, p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w),
            "deform_conv2d: offset does not match input, weight, stride, padding and dilation");
  DCN_CHECK(p.border >= Border::zero && p.border <= Border::dcnv1, "deform_conv2d: unknown border");
  return p;
}

inline void check_bias(const Tensor& bias, const Tensor& input, const DeformConvParams& p) {
  DCN_CHECK(bias.dtype() == input.dtype() && (bias.numel() == 0 || has_sizes(bias, {p.out_channels})),
            "deform_conv2d: bias has the wrong size or dtype");
}

inline void check_grad(const Tensor& grad, const Tensor& input, const DeformConvParams& p) {
  DCN_CHECK(grad.dtype() == input.dtype() && has_sizes(grad, {p.batch, p.out_channels, p.out_height, p.out_width}),
            "deform_conv2d: grad has the wrong size or dtype");
}

}  // namespace dcnseg_ops
