// Parameters of a deformable convolution, computed from the arguments.
#pragma once
#include <cstdint>
#include <stdexcept>
#include "bilinear.h"
#include "hd.h"
namespace dcnseg_ops {

struct DeformConvParams {
  int64_t batch, channels, height, width;       // input
  int64_t out_channels, out_height, out_width;  // output
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, offset_groups;
  Border border;

  DCN_HD int64_t taps() const { return kernel_h * kernel_w; }
  DCN_HD int64_t out_pixels() const { return out_height * out_width; }
  DCN_HD int64_t positions() const { return batch * out_pixels(); }    // P, over all images
  DCN_HD int64_t group_channels() const { return channels / groups; }  // of a convolution group
  DCN_HD int64_t offset_group_channels() const { return channels / offset_groups; }
  DCN_HD int64_t group_outputs() const { return out_channels / groups; }
  DCN_HD int64_t depth() const { return taps() * group_channels(); }  // K of the GEMM
};

// From the sizes of input, offset and weight, and the seven integers of the schemas.
inline DeformConvParams make_params(const int64_t* in, const int64_t* out, const int64_t* w, const uint64_t* numbers) {
  const auto number = [&](int i) { return static_cast<int64_t>(numbers[i]); };
  DeformConvParams p{};
  p.batch = in[0], p.channels = in[1], p.height = in[2], p.width = in[3];
  p.out_channels = w[0], p.out_height = out[2], p.out_width = out[3];
  p.kernel_h = w[2], p.kernel_w = w[3];
  p.stride_h = number(0), p.stride_w = number(1);
  p.pad_h = number(2), p.pad_w = number(3);
  p.dilation_h = number(4), p.dilation_w = number(5);
  p.border = static_cast<Border>(number(6));
  p.groups = p.channels / w[1];
  p.offset_groups = out[1] / (2 * p.taps());
  // Pixel indices of an image are 32-bit; all other indices are 64-bit.
  if (p.height * p.width >= INT32_MAX - 2 * p.width)
    throw std::runtime_error("deform_conv2d: an image of the input has 2^31 pixels or more");
  return p;
}

}  // namespace dcnseg_ops
