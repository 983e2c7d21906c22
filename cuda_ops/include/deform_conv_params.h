// The numbers that describe one deformable convolution, computed once from the arguments.
#pragma once
#include <cstdint>
namespace dcnseg_ops {

struct DeformConvParams {
  int64_t batch, channels, height, width;     // input
  int64_t out_channels, out_height, out_width;  // output
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, offset_groups;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t out_pixels() const { return out_height * out_width; }
  int64_t positions() const { return batch * out_pixels(); }                // P over all images
  int64_t group_channels() const { return channels / groups; }              // of a convolution group
  int64_t offset_group_channels() const { return channels / offset_groups; }
  int64_t group_outputs() const { return out_channels / groups; }
  int64_t depth() const { return taps() * group_channels(); }               // K of the GEMM
};

}  // namespace dcnseg_ops
