// Where the taps of a deformable convolution sample. No torch (see kernel_common.cuh).
#pragma once
#include "bilinear.h"
#include "deform_conv_params.h"
#include "kernel_common.cuh"
namespace dcnseg_ops {

template <typename A>
struct Positions {  // of one image: [2*G*T, H_out, W_out] and [G*T, H_out, W_out], or null
  const A* offset;
  const A* mask;
};

struct Range {
  int64_t first, count;
};  // output pixels, of one image or over several

// Those of image b, where `all` begin with image 0.
template <typename A>
DCN_HD Positions<A> positions_of_image(const DeformConvParams& p, const Positions<A>& all, int64_t b) {
  const int64_t planes = p.offset_groups * p.taps() * p.out_pixels();
  return {all.offset + 2 * b * planes, all.mask ? all.mask + b * planes : nullptr};
}

template <typename A>
struct TapSample {
  Bilinear<A> at;
  A mask;
};

// Where tap t of offset group g samples for output pixel `pixel`.
template <typename A>
__device__ inline TapSample<A> locate_tap(const DeformConvParams& p, const Positions<A>& positions, int64_t g,
                                          int64_t t, int64_t pixel) {
  const int64_t plane = g * p.taps() + t, pixels = p.out_pixels();
  const A y = static_cast<A>(pixel / p.out_width * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h) +
              positions.offset[2 * plane * pixels + pixel];
  const A x = static_cast<A>(pixel % p.out_width * p.stride_w - p.pad_w + t % p.kernel_w * p.dilation_w) +
              positions.offset[(2 * plane + 1) * pixels + pixel];
  TapSample<A> sample;
  sample.at = locate(p.border, y, x, static_cast<int32_t>(p.height), static_cast<int32_t>(p.width));
  sample.mask = positions.mask ? positions.mask[plane * pixels + pixel] : A(1);
  return sample;
}

}  // namespace dcnseg_ops
