// The kernels of the deformable convolution: no torch, so that they also compile for the host
// emulation (DCN_EMULATE).
//
// All of them look at `count` output pixels from `first` on of one image. Columns are
// [C * T][count], row c * T + t: with the weight as it lies, [C_out][C/groups * T], one matrix
// product per convolution group gives the output [C_out][count]. Everything is contiguous.
//
// A thread has one pixel, one tap and some channels; neighbours have neighbouring pixels, so that
// columns, offsets and masks are read and written side by side. Indices have 64 bits throughout.
//
// Trap: add_to_input adds with atomics, in any order; its sums may differ in the last bit from run
// to run. dcnseg takes the PyTorch code where torch is told to be deterministic.
#pragma once
#include "bilinear.h"
#include "deform_conv_params.h"
#include "kernel_common.cuh"
namespace dcnseg_ops {

constexpr int64_t kChannels = 32;  // that one thread samples

template <typename A>
struct Positions {  // of one image: [2*G*T, H_out, W_out] and [G*T, H_out, W_out], or null
  const A* offset;
  const A* mask;
};

struct Range {
  int64_t first, count;
};  // output pixels

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

// Thread i of a grid over [chunks of channels][T][count]; chunks do not cross offset groups.
struct Work {
  int64_t pixel, column, t, g, channel_begin, channel_end;
};

DCN_HD int64_t chunks_per_group(const DeformConvParams& p) {
  return (p.offset_group_channels() + kChannels - 1) / kChannels;
}

__device__ inline Work work_of(const DeformConvParams& p, Range range, int64_t i) {
  Work w;
  w.column = i % range.count;
  w.pixel = range.first + w.column;
  w.t = i / range.count % p.taps();
  const int64_t chunk = i / range.count / p.taps();
  w.g = chunk / chunks_per_group(p);
  w.channel_begin = w.g * p.offset_group_channels() + chunk % chunks_per_group(p) * kChannels;
  const int64_t group_end = (w.g + 1) * p.offset_group_channels();
  w.channel_end = w.channel_begin + kChannels < group_end ? w.channel_begin + kChannels : group_end;
  return w;
}

template <typename T, typename A>
__global__ void sample_columns(DeformConvParams p, const T* input, Positions<A> positions, Range range, int64_t n,
                               T* columns) {
  DCN_FOR_EACH(i, n) {
    const Work w = work_of(p, range, i);
    const TapSample<A> sample = locate_tap(p, positions, w.g, w.t, w.pixel);
    A weight[4];
    corner_weights(sample.at.ly, sample.at.lx, sample.mask, weight);
    for (int64_t c = w.channel_begin; c < w.channel_end; ++c) {
      const T* plane = input + c * p.height * p.width;
      A sum = 0;
      for (int k = 0; k < 4; ++k) {
        const int32_t index = sample.at.index[k];
        sum += weight[k] * (index == kOutside ? A(0) : to_sum(plane[index]));
      }
      columns[(c * p.taps() + w.t) * range.count + w.column] = Value<T>::from(sum);
    }
  }
}

// Threads over [G][T][count]; grads are of one image, contiguous; null if not wanted.
template <typename T, typename A>
__global__ void position_grads(DeformConvParams p, const T* input, Positions<A> positions, const T* grad_columns,
                               Range range, int64_t n, A* grad_offset, A* grad_mask) {
  DCN_FOR_EACH(i, n) {
    const int64_t column = i % range.count, pixel = range.first + column, plane = i / range.count, g = plane / p.taps(),
                  t = plane % p.taps();
    const TapSample<A> sample = locate_tap(p, positions, g, t, pixel);
    A dot[4] = {0, 0, 0, 0};
    for (int64_t c = g * p.offset_group_channels(); c < (g + 1) * p.offset_group_channels(); ++c) {
      const A grad = to_sum(grad_columns[(c * p.taps() + t) * range.count + column]);
      for (int k = 0; k < 4; ++k) {
        const int32_t index = sample.at.index[k];
        if (index != kOutside) dot[k] += grad * to_sum(input[c * p.height * p.width + index]);
      }
    }
    A grad_y, grad_x, grad_factor;
    position_gradient(dot, sample.at.ly, sample.at.lx, sample.mask, &grad_y, &grad_x, &grad_factor);
    if (grad_offset) {
      grad_offset[2 * plane * p.out_pixels() + pixel] = grad_y;
      grad_offset[(2 * plane + 1) * p.out_pixels() + pixel] = grad_x;
    }
    if (grad_mask) grad_mask[plane * p.out_pixels() + pixel] = grad_factor;
  }
}

template <typename T, typename A>
__global__ void add_to_input(DeformConvParams p, Positions<A> positions, const T* grad_columns, Range range, int64_t n,
                             A* grad_input) {
  DCN_FOR_EACH(i, n) {
    const Work w = work_of(p, range, i);
    const TapSample<A> sample = locate_tap(p, positions, w.g, w.t, w.pixel);
    A weight[4];
    corner_weights(sample.at.ly, sample.at.lx, sample.mask, weight);
    for (int64_t c = w.channel_begin; c < w.channel_end; ++c) {
      const A grad = to_sum(grad_columns[(c * p.taps() + w.t) * range.count + w.column]);
      for (int k = 0; k < 4; ++k) {
        const int32_t index = sample.at.index[k];
        if (index != kOutside) atomicAdd(grad_input + c * p.height * p.width + index, weight[k] * grad);
      }
    }
  }
}

template <typename T, typename A>
__global__ void add_values(const T* from, int64_t n, A* to) {
  DCN_FOR_EACH(i, n) to[i] += to_sum(from[i]);
}
template <typename T>
__global__ void add_bias(const T* bias, int64_t pixels, int64_t n, T* output) {  // [C_out][pixels]
  DCN_FOR_EACH(i, n) output[i] = Value<T>::from(to_sum(output[i]) + to_sum(bias[i / pixels]));
}

inline int64_t sample_threads(const DeformConvParams& p, Range range) {
  return p.offset_groups * chunks_per_group(p) * p.taps() * range.count;
}
inline int64_t position_threads(const DeformConvParams& p, Range range) {
  return p.offset_groups * p.taps() * range.count;
}

}  // namespace dcnseg_ops
