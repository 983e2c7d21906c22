// Sample positions of the taps of a deformable convolution on the CPU.
//
// Positions are indices of output pixels over all images of the batch, row-major. They are processed in blocks of at
// most kBlock: the corners and weights of each tap and offset group are computed once per block (TapPlan), vectorized
// over the positions, and shared by all channels.
//
// Functions marked DCN_CLONES are compiled once per instruction set; everything they call is inlined.
#pragma once
#include <array>
#include <vector>
#include "bilinear.h"
#include "cpu/conv/depth_steps.h"
#include "cpu/simd.h"
#include "deform_conv_params.h"
namespace dcnseg_ops {

constexpr int kBlock = 112;  // a multiple of kStrip, and of 14 and 8, the heights of the largest GEMM tiles
constexpr int kStrip = 16;   // positions per vectorized step

template <typename A>
struct Planes {  // a [B, channels, H_out, W_out] tensor with any strides; data is null if absent
  const A* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

template <typename T>
struct Sampler {
  using A = AccOf<T>;
  DeformConvParams p;
  // Channel c of pixel i, an index over all images, is at input[i * pixel_stride + c]. Null if the planes are read.
  const T* input;
  int64_t pixel_stride;
  const T* planes;  // [B, C, H, W]
  int64_t zeros;    // offset from `input` of a pixel of zeros, which corners outside the map read
  Planes<A> offset, mask;
  // The distance between chunks of channels, in elements; each chunk has its own `zeros`.
  ChannelChunks chunks{};
  int64_t chunk_stride = 0;

  // Pixel 0, which may be before the start of the copy.
  DCN_INLINE const T* from_channel(int64_t channel) const {
    if (chunk_stride) {
      const int64_t chunk = chunks.index(channel);
      channel += chunk * chunk_stride - chunks.begin(chunk);
    }
    return reinterpret_cast<const T*>(reinterpret_cast<intptr_t>(input) + channel * static_cast<int64_t>(sizeof(T)));
  }
};

// Distance between two arrays in elements, rounded towards zero, for `Sampler::zeros`. If the addresses differ by a
// fraction of an element, the result is off by less than one element, hence one more zero on each side.
template <typename T>
int64_t distance(const T* from, const T* to) {
  return (reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from)) / static_cast<int64_t>(sizeof(T));
}

template <typename A>
struct TapPlan {             // one tap and offset group at the positions of a block
  int32_t index[4][kBlock];  // pixels of the corners in their image, or kOutside
  A weight[4][kBlock];       // of the corners, times the mask
};

template <typename A>
struct TapFractions {  // additional values for the gradients of positions
  A ly[kBlock], lx[kBlock], mask[kBlock];
};

template <typename A>
struct BlockPositions {
  int count;
  int planned;                           // number of positions, rounded up to whole strips
  A y[kBlock], x[kBlock];                // of tap (0, 0), without offset
  int64_t offset[kBlock], mask[kBlock];  // index of the first channel
  int64_t first_pixel[kBlock];           // of the image
  bool is_run;                           // whether the planned offsets are contiguous, and the masks as well
};

// Whether the pixels of a channel are contiguous.
template <typename A>
DCN_INLINE bool is_run(const Planes<A>& planes, const DeformConvParams& p) {
  return !planes.data || (planes.column == 1 && planes.row == p.out_width);
}

template <typename T>
DCN_INLINE void start_block(const Sampler<T>& s, int64_t begin, int64_t end, BlockPositions<AccOf<T>>& block) {
  using A = AccOf<T>;
  const DeformConvParams& p = s.p;
  int64_t b = begin / p.out_pixels(), row = begin % p.out_pixels() / p.out_width, column = begin % p.out_width;
  block.count = static_cast<int>(end - begin);
  block.planned = (block.count + kStrip - 1) / kStrip * kStrip;
  for (int j = 0; j < block.count; ++j) {
    block.y[j] = static_cast<A>(row * p.stride_h - p.pad_h);
    block.x[j] = static_cast<A>(column * p.stride_w - p.pad_w);
    block.offset[j] = b * s.offset.batch + row * s.offset.row + column * s.offset.column;
    block.mask[j] = b * s.mask.batch + row * s.mask.row + column * s.mask.column;
    block.first_pixel[j] = b * p.height * p.width;
    if (++column == p.out_width) {
      column = 0;
      if (++row == p.out_height) {
        row = 0;
        ++b;
      }
    }
  }
  block.is_run = begin % p.out_pixels() + block.planned <= p.out_pixels() && is_run(s.offset, p) && is_run(s.mask, p);
  for (int j = block.count; j < block.planned; ++j) {
    block.y[j] = block.x[j] = 0;
    block.offset[j] = block.offset[0];
    block.mask[j] = block.mask[0];
    block.first_pixel[j] = 0;
  }
}

// `fractions` may be null.
template <typename T>
DCN_INLINE void plan_strip(const Sampler<T>& s, const BlockPositions<AccOf<T>>& block, int64_t g, int64_t t, int first,
                           TapPlan<AccOf<T>>& plan, TapFractions<AccOf<T>>* fractions) {
  using A = AccOf<T>;
  const DeformConvParams& p = s.p;
  const A tap_y = static_cast<A>(t / p.kernel_w * p.dilation_h), tap_x = static_cast<A>(t % p.kernel_w * p.dilation_w);
  const A* offset_y = s.offset.data + 2 * (g * p.taps() + t) * s.offset.channel;
  const A* offset_x = offset_y + s.offset.channel;
  const A* mask = s.mask.data ? s.mask.data + (g * p.taps() + t) * s.mask.channel : nullptr;
  A y[kStrip], x[kStrip], m[kStrip], ly[kStrip], lx[kStrip];
  for (int j = 0; j < kStrip; ++j) y[j] = block.y[first + j] + tap_y;
  for (int j = 0; j < kStrip; ++j) x[j] = block.x[first + j] + tap_x;
  for (int j = 0; j < kStrip; ++j) m[j] = A(1);
  if (block.is_run) {
    const A *run_y = offset_y + block.offset[first], *run_x = offset_x + block.offset[first];
    for (int j = 0; j < kStrip; ++j) y[j] += run_y[j];
    for (int j = 0; j < kStrip; ++j) x[j] += run_x[j];
    if (mask)
      for (int j = 0; j < kStrip; ++j) m[j] = mask[block.mask[first] + j];
  } else {
    for (int j = 0; j < kStrip; ++j) y[j] += offset_y[block.offset[first + j]];
    for (int j = 0; j < kStrip; ++j) x[j] += offset_x[block.offset[first + j]];
    if (mask)
      for (int j = 0; j < kStrip; ++j) m[j] = mask[block.mask[first + j]];
  }
  const int32_t height = static_cast<int32_t>(p.height), width = static_cast<int32_t>(p.width);
  const auto put = [&](int j, const Bilinear<A>& at) {
    for (int k = 0; k < 4; ++k) plan.index[k][first + j] = at.index[k];
    ly[j] = at.ly;
    lx[j] = at.lx;
    A weight[4];
    corner_weights(at.ly, at.lx, m[j], weight);
    for (int k = 0; k < 4; ++k) plan.weight[k][first + j] = weight[k];
  };
  if (p.border == Border::zero)  // a separate loop, which vectorizes
    for (int j = 0; j < kStrip; ++j) put(j, locate(y[j], x[j], height, width));
  else
    for (int j = 0; j < kStrip; ++j) put(j, locate_clamped(p.border, y[j], x[j], height, width));
  if (!fractions) return;
  for (int j = 0; j < kStrip; ++j) fractions->ly[first + j] = ly[j];
  for (int j = 0; j < kStrip; ++j) fractions->lx[first + j] = lx[j];
  for (int j = 0; j < kStrip; ++j) fractions->mask[first + j] = m[j];
}

// The plans of the taps and offset groups of a step, [taps][offset groups], for the positions of a block. Reused for
// many blocks of a call to reuse its memory; steps of a block with the same taps and offset groups share the plans.
template <typename T>
struct StepPlans {
  BlockPositions<AccOf<T>> block{};
  std::vector<TapPlan<AccOf<T>>> plans;
  std::vector<TapFractions<AccOf<T>>> fractions;  // the same number, or empty if not needed
  bool fractions_wanted;
  int64_t groups = 0;
  std::array<int64_t, 6> made{};  // key of the current plans

  explicit StepPlans(bool fractions_wanted) : fractions_wanted(fractions_wanted) {}

  DCN_INLINE void make(const Sampler<T>& s, const DepthStep& step, int64_t begin, int64_t end) {
    groups = step.offset_groups();
    const std::array<int64_t, 6> wanted = {begin, end, step.tap_begin, step.tap_end, step.first_offset_group(), groups};
    if (made == wanted) return;
    made = wanted;
    const size_t count = static_cast<size_t>(step.taps() * groups);
    if (plans.size() < count) plans.resize(count);
    if (fractions_wanted && fractions.size() < count) fractions.resize(count);
    start_block(s, begin, end, block);
    for (int64_t t = 0; t < step.taps(); ++t)
      for (int64_t g = 0; g < groups; ++g)
        for (int first = 0; first < block.planned; first += kStrip)
          plan_strip(s, block, step.first_offset_group() + g, step.tap_begin + t, first, plans[t * groups + g],
                     fractions_wanted ? &fractions[t * groups + g] : nullptr);
  }
  DCN_INLINE int64_t index(const DepthStep& step, const Segment& segment, int64_t t) const {
    return t * groups + segment.offset_group - step.first_offset_group();
  }
};

}  // namespace dcnseg_ops
