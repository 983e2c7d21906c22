// Sample positions of the taps of a deformable convolution, and the spots that a block of the sampling kernels
// computes once for all channels. Independent of torch (see kernel_common.cuh).
//
// A spot is one position, one tap and one offset group; spot i of a range is (position * T + t) * G + g. The channels
// of its offset group are contiguous in the input, [B, H, W, C], at each of its four corners, and in the columns,
// [groups][positions][T][C/groups], in which a convolution group ends only between vectors.
#pragma once
#include "bilinear.h"
#include "cuda/kernel_common.cuh"
#include "deform_conv_params.h"
namespace dcnseg_ops {

template <typename A>
struct Positions {  // of one image: [2*G*T, H_out, W_out] and [G*T, H_out, W_out], or null
  const A* offset;
  const A* mask;
};

struct Range {
  int64_t first, count;
};  // output pixels, of one image or over several

// Those of image b, where `all` starts with image 0.
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

// The sample position of tap t of offset group g for output pixel `pixel`.
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

constexpr int kSpots = 32;  // per block

template <typename A>
struct Spot {
  int64_t corner[4];  // first channel of each corner in the input, or kOutside
  int64_t column;     // position and tap of the range: position * T + t
  int64_t channel;    // first channel of the offset group
  int64_t mask_at;    // index of the gradient of the mask,
  int64_t y_at;       // and of that of the offset's y; that of x is one plane further
  A weight[4], ly, lx, mask;
};

template <typename A>
__device__ inline Spot<A> make_spot(const DeformConvParams& p, const Positions<A>& positions, Range range, int64_t i) {
  const int64_t g = i % p.offset_groups, t = i / p.offset_groups % p.taps();
  const int64_t position = range.first + i / p.offset_groups / p.taps();
  const int64_t b = position / p.out_pixels(), pixel = position % p.out_pixels();
  const TapSample<A> sample = locate_tap(p, positions_of_image(p, positions, b), g, t, pixel);
  Spot<A> spot;
  spot.column = i / p.offset_groups;
  spot.channel = g * p.offset_group_channels();
  const int64_t image = b * p.height * p.width;
  for (int k = 0; k < 4; ++k) {
    const int32_t index = sample.at.index[k];
    spot.corner[k] = index == kOutside ? kOutside : (image + index) * p.channels + spot.channel;
  }
  const int64_t plane = (b * p.offset_groups + g) * p.taps() + t;
  spot.mask_at = plane * p.out_pixels() + pixel;
  spot.y_at = 2 * plane * p.out_pixels() + pixel;
  spot.ly = sample.at.ly, spot.lx = sample.at.lx, spot.mask = sample.mask;
  corner_weights(spot.ly, spot.lx, spot.mask, spot.weight);
  return spot;
}

DCN_HD int64_t spots_of(const DeformConvParams& p, Range range) { return range.count * p.taps() * p.offset_groups; }
inline dim3 blocks_of_spots(const DeformConvParams& p, Range range) {
  return dim3(static_cast<unsigned>((spots_of(p, range) + kSpots - 1) / kSpots));
}

// Computes the spots of the block and returns their number. All threads must take part.
template <typename A>
__device__ inline int make_spots(const DeformConvParams& p, const Positions<A>& positions, Range range,
                                 Spot<A>* spots) {
  const int64_t first = blockIdx.x * static_cast<int64_t>(kSpots), left = spots_of(p, range) - first;
  const int count = left < kSpots ? static_cast<int>(left) : kSpots;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < count) spots[thread] = make_spot(p, positions, range, first + thread);
  __syncthreads();
  return count;
}

// The address of the columns of input channel `channel` for position and tap `column`.
__device__ inline int64_t column_at(const DeformConvParams& p, int64_t positions, int64_t column, int64_t channel) {
  if (p.groups == 1) return column * p.channels + channel;
  const int64_t size = p.group_channels(), group = channel / size;
  return (group * positions * p.taps() + column) * size + channel % size;
}

}  // namespace dcnseg_ops
