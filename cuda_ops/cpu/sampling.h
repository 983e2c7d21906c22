// The sampled columns of a deformable convolution and their derivatives, on the CPU.
//
// Positions p count output pixels over all images of the batch, row-major. A tile of them has
// columns [groups][tile][T][C/groups]: per convolution group the left matrix of a GEMM.
// Work goes in blocks of kBlock positions. Where the taps sample is worked out once per block and
// offset group (TapPlan), vectorised over the positions; the channels then share it, vectorised
// over the channels of the channels-last input. The columns are walked in the order they lie in
// memory: tap after tap of one position (the other way round took twice as long at 64 channels).
//
// Functions marked DCN_CLONES are compiled once per instruction set; all they call is inlined.
#pragma once
#include <vector>
#include "bilinear.h"
#include "deform_conv_params.h"
#include "simd.h"
namespace dcnseg_ops {

constexpr int kBlock = 32;

template <typename A>
struct Planes {  // a [B, channels, H_out, W_out] tensor of any strides; data is null if absent
  const A* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

// Channels [begin, end) that lie in one convolution group and one offset group.
struct Segment {
  int64_t begin, end, group, offset_group;
};

template <typename T>
struct Sampler {
  using A = AccOf<T>;
  DeformConvParams p;
  const T* input;  // [B, H, W, C]
  const T* zeros;  // C of them: what a corner outside the map reads
  Planes<A> offset, mask;
  std::vector<Segment> segments;
};

template <typename A>
struct TapPlan {             // of one tap and one offset group at the positions of a block
  int64_t first[4][kBlock];  // number of the corner's first channel in the input, or kOutside
  A weight[4][kBlock];       // of the corners, times the mask
  A ly[kBlock], lx[kBlock], mask[kBlock];
};

template <typename A>
struct BlockPositions {
  int count;
  A y[kBlock], x[kBlock];                // of tap (0, 0), undisplaced
  int64_t offset[kBlock], mask[kBlock];  // where their first channel lies
  int32_t image[kBlock];                 // first pixel of the image
  bool is_run;                           // whether the block's offsets lie one after another, and so do its masks
};

// Whether the pixels of a channel lie one after another.
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
  for (int j = 0; j < block.count; ++j) {
    block.y[j] = static_cast<A>(row * p.stride_h - p.pad_h);
    block.x[j] = static_cast<A>(column * p.stride_w - p.pad_w);
    block.offset[j] = b * s.offset.batch + row * s.offset.row + column * s.offset.column;
    block.mask[j] = b * s.mask.batch + row * s.mask.row + column * s.mask.column;
    block.image[j] = static_cast<int32_t>(b * p.height * p.width);
    if (++column == p.out_width) {
      column = 0;
      if (++row == p.out_height) {
        row = 0;
        ++b;
      }
    }
  }
  block.is_run = block.count == kBlock && begin % p.out_pixels() + kBlock <= p.out_pixels() && is_run(s.offset, p) &&
                 is_run(s.mask, p);
  for (int j = block.count; j < kBlock; ++j) {  // the vector loops run over all of the block
    block.y[j] = block.x[j] = 0;
    block.offset[j] = block.offset[0];
    block.mask[j] = block.mask[0];
    block.image[j] = 0;
  }
}

template <typename T>
DCN_INLINE void plan_tap(const Sampler<T>& s, const BlockPositions<AccOf<T>>& block, int64_t g, int64_t t,
                         TapPlan<AccOf<T>>& plan) {
  using A = AccOf<T>;
  const DeformConvParams& p = s.p;
  const A tap_y = static_cast<A>(t / p.kernel_w * p.dilation_h), tap_x = static_cast<A>(t % p.kernel_w * p.dilation_w);
  const A* offset_y = s.offset.data + 2 * (g * p.taps() + t) * s.offset.channel;
  const A* offset_x = offset_y + s.offset.channel;
  A y[kBlock], x[kBlock];
  if (block.is_run) {
    const A *run_y = offset_y + block.offset[0], *run_x = offset_x + block.offset[0];
    for (int j = 0; j < kBlock; ++j) y[j] = block.y[j] + tap_y + run_y[j];
    for (int j = 0; j < kBlock; ++j) x[j] = block.x[j] + tap_x + run_x[j];
  } else {
    for (int j = 0; j < kBlock; ++j) y[j] = block.y[j] + tap_y + offset_y[block.offset[j]];
    for (int j = 0; j < kBlock; ++j) x[j] = block.x[j] + tap_x + offset_x[block.offset[j]];
  }
  const int32_t height = static_cast<int32_t>(p.height), width = static_cast<int32_t>(p.width);
  int32_t index[4][kBlock];
  const auto put = [&](int j, const Bilinear<A>& at) {
    for (int k = 0; k < 4; ++k) index[k][j] = at.index[k];
    plan.ly[j] = at.ly;
    plan.lx[j] = at.lx;
  };
  if (p.border == Border::zero)  // a loop of its own, which vectorises
    for (int j = 0; j < kBlock; ++j) put(j, locate(y[j], x[j], height, width));
  else
    for (int j = 0; j < kBlock; ++j) put(j, locate_clamped(p.border, y[j], x[j], height, width));
  for (int k = 0; k < 4; ++k)
    for (int j = 0; j < kBlock; ++j) {
      const int64_t first = (int64_t(index[k][j]) + block.image[j]) * p.channels;
      plan.first[k][j] = index[k][j] == kOutside ? kOutside : first;
    }
  const A* mask = s.mask.data ? s.mask.data + (g * p.taps() + t) * s.mask.channel : nullptr;
  for (int j = 0; j < kBlock; ++j) plan.mask[j] = mask ? mask[block.mask[j]] : A(1);
  for (int j = 0; j < kBlock; ++j) {
    A weight[4];
    corner_weights(plan.ly[j], plan.lx[j], plan.mask[j], weight);
    for (int k = 0; k < 4; ++k) plan.weight[k][j] = weight[k];
  }
}

template <typename T>
struct Corners {
  const T* row[4];  // channels of the corner's pixel, or zeros
  AccOf<T> weight[4];
};

template <typename T>
DCN_INLINE Corners<T> corners_of(const Sampler<T>& s, const TapPlan<AccOf<T>>& plan, int j) {
  Corners<T> c;
  for (int k = 0; k < 4; ++k) {
    const int64_t first = plan.first[k][j];
    c.row[k] = first == kOutside ? s.zeros : s.input + first;
    c.weight[k] = plan.weight[k][j];
  }
  return c;
}

template <typename T>
DCN_INLINE int64_t column_index(const DeformConvParams& p, const Segment& segment, int64_t tile, int64_t position,
                                int64_t t) {
  const int64_t first = segment.begin - segment.group * p.group_channels();
  return ((segment.group * tile + position) * p.taps() + t) * p.group_channels() + first;
}

// out = the blend of four rows, n channels.
template <typename T>
DCN_INLINE void blend(const Corners<T>& c, int64_t first, int64_t n, T* out) {
  constexpr int kLanes = Simd<T>::kLanes;
  const T *r0 = c.row[0] + first, *r1 = c.row[1] + first, *r2 = c.row[2] + first, *r3 = c.row[3] + first;
  const AccOf<T> w0 = c.weight[0], w1 = c.weight[1], w2 = c.weight[2], w3 = c.weight[3];
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + kLanes <= n; i += kLanes)
    store(out + i, w0 * load(r0 + i) + w1 * load(r1 + i) + w2 * load(r2 + i) + w3 * load(r3 + i));
  for (; i < n; ++i)
    store_one(out + i, w0 * load_one(r0 + i) + w1 * load_one(r1 + i) + w2 * load_one(r2 + i) + w3 * load_one(r3 + i));
}

template <typename T>
using Plans = std::vector<TapPlan<AccOf<T>>>;  // [T][G]

template <typename T>
DCN_INLINE void plan_block(const Sampler<T>& s, int64_t begin, int64_t end, BlockPositions<AccOf<T>>& block,
                           Plans<T>& plans) {
  start_block(s, begin, end, block);
  for (int64_t t = 0; t < s.p.taps(); ++t)
    for (int64_t g = 0; g < s.p.offset_groups; ++g) plan_tap(s, block, g, t, plans[t * s.p.offset_groups + g]);
}

// Columns of positions [begin, end), which lie in the tile that starts at `tile_begin`.
template <typename T>
DCN_CLONES void sample_columns(const Sampler<T>& s, int64_t tile_begin, int64_t tile, int64_t begin, int64_t end,
                               T* columns) {
  const DeformConvParams& p = s.p;
  BlockPositions<AccOf<T>> block;
  Plans<T> plans(static_cast<size_t>(p.taps() * p.offset_groups));
  for (int64_t first = begin; first < end; first += kBlock) {
    plan_block(s, first, first + kBlock < end ? first + kBlock : end, block, plans);
    for (int j = 0; j < block.count; ++j)
      for (int64_t t = 0; t < p.taps(); ++t)
        for (const Segment& segment : s.segments)
          blend(corners_of(s, plans[t * p.offset_groups + segment.offset_group], j), segment.begin,
                segment.end - segment.begin, columns + column_index<T>(p, segment, tile, first + j - tile_begin, t));
  }
}

// dot[k] += sum of (column gradient) * (value of corner k) over n channels.
template <typename T>
DCN_INLINE void dot_corners(const Corners<T>& c, int64_t first, int64_t n, const T* grad, AccOf<T> dot[4]) {
  constexpr int kLanes = Simd<T>::kLanes;
  const T *r0 = c.row[0] + first, *r1 = c.row[1] + first, *r2 = c.row[2] + first, *r3 = c.row[3] + first;
  VecOf<T> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecOf<T> g = load(grad + i);
    s0 += g * load(r0 + i);
    s1 += g * load(r1 + i);
    s2 += g * load(r2 + i);
    s3 += g * load(r3 + i);
  }
  const Quad<AccOf<T>> sums = sum_lanes(s0, s1, s2, s3);
  for (int k = 0; k < 4; ++k) dot[k] += sums.of[k];
  for (; i < n; ++i) {
    const AccOf<T> g = load_one(grad + i);
    dot[0] += g * load_one(r0 + i);
    dot[1] += g * load_one(r1 + i);
    dot[2] += g * load_one(r2 + i);
    dot[3] += g * load_one(r3 + i);
  }
}

template <typename T>
struct PositionGrads {  // contiguous [B, 2*G*T, H_out, W_out] and [B, G*T, H_out, W_out]; null: not wanted
  AccOf<T>* offset = nullptr;
  AccOf<T>* mask = nullptr;
};

// To the planes of tap t and offset group g, from the dot products of a block.
template <typename T>
DCN_INLINE void write_position_grads(const Sampler<T>& s, const TapPlan<AccOf<T>>& plan,
                                     const AccOf<T> (&dots)[4][kBlock], int64_t first, int count, int64_t g, int64_t t,
                                     const PositionGrads<T>& out) {
  using A = AccOf<T>;
  const DeformConvParams& p = s.p;
  A grad_y[kBlock], grad_x[kBlock], grad_mask[kBlock];
  for (int j = 0; j < kBlock; ++j) {
    const A dot[4] = {dots[0][j], dots[1][j], dots[2][j], dots[3][j]};
    position_gradient(dot, plan.ly[j], plan.lx[j], plan.mask[j], &grad_y[j], &grad_x[j], &grad_mask[j]);
  }
  for (int64_t j = 0; j < count;) {  // pixels of one image after another
    const int64_t b = (first + j) / p.out_pixels(), pixel = (first + j) % p.out_pixels();
    const int64_t plane = (b * p.offset_groups + g) * p.taps() + t;
    const int64_t n = count - j < p.out_pixels() - pixel ? count - j : p.out_pixels() - pixel;
    for (int64_t i = 0; out.offset && i < n; ++i) out.offset[2 * plane * p.out_pixels() + pixel + i] = grad_y[j + i];
    for (int64_t i = 0; out.offset && i < n; ++i)
      out.offset[(2 * plane + 1) * p.out_pixels() + pixel + i] = grad_x[j + i];
    for (int64_t i = 0; out.mask && i < n; ++i) out.mask[plane * p.out_pixels() + pixel + i] = grad_mask[j + i];
    j += n;
  }
}

template <typename A>
struct BlockDots {
  A of[4][kBlock];
};

// Gradients of offset and mask at positions [begin, end) from the gradients of the tile's columns.
template <typename T>
DCN_CLONES void position_grads(const Sampler<T>& s, int64_t tile_begin, int64_t tile, int64_t begin, int64_t end,
                               const T* grad_columns, const PositionGrads<T>& out) {
  using A = AccOf<T>;
  const DeformConvParams& p = s.p;
  BlockPositions<A> block;
  Plans<T> plans(static_cast<size_t>(p.taps() * p.offset_groups));
  std::vector<BlockDots<A>> dots(plans.size());
  for (int64_t first = begin; first < end; first += kBlock) {
    plan_block(s, first, first + kBlock < end ? first + kBlock : end, block, plans);
    for (size_t i = 0; i < dots.size(); ++i) dots[i] = {};
    for (int j = 0; j < block.count; ++j)
      for (int64_t t = 0; t < p.taps(); ++t)
        for (const Segment& segment : s.segments) {
          const int64_t i = t * p.offset_groups + segment.offset_group;
          A dot[4] = {0, 0, 0, 0};
          dot_corners(corners_of(s, plans[i], j), segment.begin, segment.end - segment.begin,
                      grad_columns + column_index<T>(p, segment, tile, first + j - tile_begin, t), dot);
          for (int k = 0; k < 4; ++k) dots[i].of[k][j] += dot[k];
        }
    for (int64_t t = 0; t < p.taps(); ++t)
      for (int64_t g = 0; g < p.offset_groups; ++g)
        write_position_grads(s, plans[t * p.offset_groups + g], dots[t * p.offset_groups + g].of, first, block.count, g,
                             t, out);
  }
}

template <typename T>
DCN_INLINE void add_to_corners(const T* grad, int64_t n, const AccOf<T> weight[4], AccOf<T>* const row[4]) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecOf<T> v = load(grad + i);
    for (int k = 0; k < 4; ++k) store(row[k] + i, load(row[k] + i) + weight[k] * v);
  }
  for (; i < n; ++i)
    for (int k = 0; k < 4; ++k) row[k][i] += weight[k] * load_one(grad + i);
}

// grad_input += weight * column gradient at the four corners, for channels [channel_begin,
// channel_end) of a whole tile. Threads split the channels, so each sum has one order whatever
// their number. `waste` takes what falls outside the map: channel_end - channel_begin numbers.
template <typename T>
DCN_CLONES void scatter_columns(const Sampler<T>& s, int64_t tile_begin, int64_t tile, int64_t channel_begin,
                                int64_t channel_end, const T* grad_columns, AccOf<T>* grad_input, AccOf<T>* waste) {
  using A = AccOf<T>;
  const DeformConvParams& p = s.p;
  const int64_t tile_end = tile_begin + tile;
  BlockPositions<A> block;
  Plans<T> plans(static_cast<size_t>(p.taps() * p.offset_groups));
  for (int64_t first = tile_begin; first < tile_end; first += kBlock) {
    plan_block(s, first, first + kBlock < tile_end ? first + kBlock : tile_end, block, plans);
    for (int j = 0; j < block.count; ++j)
      for (int64_t t = 0; t < p.taps(); ++t)
        for (const Segment& segment : s.segments) {
          const int64_t lo = segment.begin > channel_begin ? segment.begin : channel_begin;
          const int64_t n = (segment.end < channel_end ? segment.end : channel_end) - lo;
          if (n <= 0) continue;
          const TapPlan<A>& plan = plans[t * p.offset_groups + segment.offset_group];
          const T* grad =
              grad_columns + column_index<T>(p, segment, tile, first + j - tile_begin, t) + (lo - segment.begin);
          A weight[4], *row[4];
          for (int k = 0; k < 4; ++k) {
            const int64_t at = plan.first[k][j];
            row[k] = at == kOutside ? waste : grad_input + at + lo;
            weight[k] = plan.weight[k][j];
          }
          add_to_corners(grad, n, weight, row);
        }
  }
}

}  // namespace dcnseg_ops
