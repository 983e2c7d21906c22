// The sampled columns of a deformable convolution and their derivatives, on the CPU.
//
// Positions count output pixels over all images of the batch, row-major. They are taken in blocks of at most
// kBlock: where the taps sample is worked out once per block, tap and offset group (TapPlan), vectorised over the
// positions; the channels then share it, vectorised over the channels of channels-last pixels. Columns are
// walked in the order they lie in memory, tap after tap of one position (the other way round took twice as long
// at 64 channels).
//
// Functions marked DCN_CLONES are compiled once per instruction set; all they call is inlined.
#pragma once
#include <vector>
#include "bilinear.h"
#include "deform_conv_params.h"
#include "depth_steps.h"
#include "simd.h"
#include "transpose.h"
namespace dcnseg_ops {

constexpr int kBlock = 112;  // a multiple of kStrip and of the products' tiles
constexpr int kStrip = 16;   // positions that are planned together, in vectors

template <typename A>
struct Planes {  // a [B, channels, H_out, W_out] tensor of any strides; data is
                 // null if absent
  const A* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

template <typename T>
struct Sampler {
  using A = AccOf<T>;
  DeformConvParams p;
  // Channel c of pixel i, counted over all images, lies at input[i * pixel_stride + c]. Null where the input is
  // read from its planes.
  const T* input;
  int64_t pixel_stride;
  const T* planes;  // [B, C, H, W]
  int64_t zeros;    // as many of them as channels, counted from `input`: what a corner outside reads
  Planes<A> offset, mask;

  // In pixel 0, which may lie before the copy that `input` counts from.
  DCN_INLINE const T* from_channel(int64_t channel) const {
    return reinterpret_cast<const T*>(reinterpret_cast<intptr_t>(input) + channel * static_cast<int64_t>(sizeof(T)));
  }
};

// From one array to another, in numbers, rounded towards zero: as an offset for `Sampler::zeros`. An array whose
// address is no multiple of its numbers' size ends up beside the other's start, hence a zero more on each side.
template <typename T>
int64_t distance(const T* from, const T* to) {
  return (reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from)) / static_cast<int64_t>(sizeof(T));
}

template <typename A>
struct TapPlan {             // of one tap and one offset group at the positions of a block
  int32_t index[4][kBlock];  // of the corners' pixels in their image, or kOutside
  int64_t row[4][kBlock];    // where the channels of that pixel lie, counted from the input, or the zeros
  A weight[4][kBlock];       // of the corners, times the mask
  A ly[kBlock], lx[kBlock], mask[kBlock];
};

template <typename A>
struct BlockPositions {
  int count;
  int planned;                           // the count, rounded up to whole strips
  A y[kBlock], x[kBlock];                // of tap (0, 0), undisplaced
  int64_t offset[kBlock], mask[kBlock];  // where their first channel lies
  int64_t first_pixel[kBlock];           // of the image
  bool is_run;                           // whether all the planned offsets lie one after another, and so the masks
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

template <typename T>
DCN_INLINE void plan_strip(const Sampler<T>& s, const BlockPositions<AccOf<T>>& block, int64_t g, int64_t t, int first,
                           TapPlan<AccOf<T>>& plan) {
  using A = AccOf<T>;
  const DeformConvParams& p = s.p;
  const A tap_y = static_cast<A>(t / p.kernel_w * p.dilation_h), tap_x = static_cast<A>(t % p.kernel_w * p.dilation_w);
  const A* offset_y = s.offset.data + 2 * (g * p.taps() + t) * s.offset.channel;
  const A* offset_x = offset_y + s.offset.channel;
  const A* mask = s.mask.data ? s.mask.data + (g * p.taps() + t) * s.mask.channel : nullptr;
  A y[kStrip], x[kStrip], m[kStrip];
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
    plan.ly[first + j] = at.ly;
    plan.lx[first + j] = at.lx;
    plan.mask[first + j] = m[j];
    A weight[4];
    corner_weights(at.ly, at.lx, m[j], weight);
    for (int k = 0; k < 4; ++k) plan.weight[k][first + j] = weight[k];
  };
  if (p.border == Border::zero)  // a loop of its own, which vectorises
    for (int j = 0; j < kStrip; ++j) put(j, locate(y[j], x[j], height, width));
  else
    for (int j = 0; j < kStrip; ++j) put(j, locate_clamped(p.border, y[j], x[j], height, width));
  const int64_t stride = s.pixel_stride, zeros = s.zeros;
  for (int k = 0; k < 4; ++k)
    for (int j = first; j < first + kStrip; ++j) {
      const int64_t row = (plan.index[k][j] + block.first_pixel[j]) * stride;
      plan.row[k][j] = plan.index[k][j] == kOutside ? zeros : row;
    }
}

// The plans of a step's taps and offset groups, [taps][offset groups], for the positions of a block. One is
// kept for many blocks, for its memory.
template <typename T>
struct StepPlans {
  BlockPositions<AccOf<T>> block;
  std::vector<TapPlan<AccOf<T>>> plans;
  int64_t groups;

  DCN_INLINE void make(const Sampler<T>& s, const DepthStep& step, int64_t begin, int64_t end) {
    groups = step.offset_groups();
    if (plans.size() < static_cast<size_t>(step.taps() * groups)) plans.resize(step.taps() * groups);
    start_block(s, begin, end, block);
    for (int64_t t = 0; t < step.taps(); ++t)
      for (int64_t g = 0; g < groups; ++g)
        for (int first = 0; first < block.planned; first += kStrip)
          plan_strip(s, block, step.first_offset_group() + g, step.tap_begin + t, first, plans[t * groups + g]);
  }
  DCN_INLINE int64_t index(const DepthStep& step, const Segment& segment, int64_t t) const {
    return t * groups + segment.offset_group - step.first_offset_group();
  }
};

template <typename T>
struct Corners {
  const T* row[4];  // channels of the corner's pixel, or zeros
  AccOf<T> weight[4];
};

// Of position j; `from` is the first channel wanted, of pixel 0.
template <typename T>
DCN_INLINE Corners<T> corners_of(const T* from, const TapPlan<AccOf<T>>& plan, int j) {
  const intptr_t input = reinterpret_cast<intptr_t>(from);
  const auto row = [&](int k) {
    return reinterpret_cast<const T*>(input + plan.row[k][j] * static_cast<intptr_t>(sizeof(T)));
  };
  return {{row(0), row(1), row(2), row(3)},
          {plan.weight[0][j], plan.weight[1][j], plan.weight[2][j], plan.weight[3][j]}};
}

// Blends four rows of n channels; `to` takes vectors and the numbers left over.
template <typename T, typename To>
DCN_INLINE void blend(const Corners<T>& c, int64_t n, const To& to) {
  constexpr int kLanes = Simd<T>::kLanes;
  const T *r0 = c.row[0], *r1 = c.row[1], *r2 = c.row[2], *r3 = c.row[3];
#if defined(__x86_64__)
  // GCC else addresses each row by its distance from another one, in four times as many instructions.
  asm("" : "+r"(r0), "+r"(r1), "+r"(r2), "+r"(r3));
#endif
  const AccOf<T> w0 = c.weight[0], w1 = c.weight[1], w2 = c.weight[2], w3 = c.weight[3];
  const auto put = [&](int64_t i) __attribute__((always_inline)) {
    to.put(i, w0 * load(r0 + i) + w1 * load(r1 + i) + w2 * load(r2 + i) + w3 * load(r3 + i));
  };
  int64_t i = 0;
#pragma GCC unroll 1
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    put(i);
    put(i + kLanes);
    put(i + 2 * kLanes);
    put(i + 3 * kLanes);
  }
#pragma GCC unroll 1
  for (; i + kLanes <= n; i += kLanes) put(i);
  for (; i < n; ++i)
    to.put_one(i, w0 * load_one(r0 + i) + w1 * load_one(r1 + i) + w2 * load_one(r2 + i) + w3 * load_one(r3 + i));
}

template <typename E>
struct ToRow {
  E* row;
  DCN_INLINE void put(int64_t i, VecOf<E> v) const { store(row + i, v); }
  DCN_INLINE void put_one(int64_t i, AccOf<E> v) const { store_one(row + i, v); }
};

// Columns of positions [begin, end), a block at most, to rows [end - begin][step.size()], `stride` numbers apart.
template <typename T, typename E>
DCN_CLONES void sample_rows(const Sampler<T>& s, const DepthStep& step, int64_t begin, int64_t end, StepPlans<T>& plans,
                            E* rows, int64_t stride) {
  plans.make(s, step, begin, end);
  const int64_t taps = step.taps(), channels = step.channels(), groups = plans.groups;
  for (const Segment& segment : step.segments) {
    const TapPlan<AccOf<T>>* first_plan = &plans.plans[plans.index(step, segment, 0)];
    const T* input = s.from_channel(segment.begin);
    E* to = rows + segment.begin - step.channel_begin;
    for (int j = 0; j < plans.block.count; ++j, to += stride) {
      const TapPlan<AccOf<T>>* plan = first_plan;
      E* row = to;
      for (int64_t t = 0; t < taps; ++t, plan += groups, row += channels)
        blend(corners_of(input, *plan, j), segment.end - segment.begin, ToRow<E>{row});
    }
  }
}

// As `sample_rows`, from the planes of a contiguous input: for maps too large to be copied.
template <typename T, typename E>
DCN_CLONES void sample_rows_of_planes(const Sampler<T>& s, const DepthStep& step, int64_t begin, int64_t end,
                                      StepPlans<T>& plans, E* rows, int64_t stride) {
  using A = AccOf<T>;
  constexpr int kChannels = 16;
  const int64_t plane = s.p.height * s.p.width;
  E columns[kChannels][kBlock];
  plans.make(s, step, begin, end);
  for (int64_t t = 0; t < step.taps(); ++t)
    for (const Segment& segment : step.segments) {
      const TapPlan<A>& plan = plans.plans[plans.index(step, segment, t)];
      for (int64_t c = segment.begin; c < segment.end; c += kChannels) {
        const int n = static_cast<int>(segment.end - c < kChannels ? segment.end - c : kChannels);
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < plans.block.count; ++j) {
            const T* from = s.planes + plans.block.first_pixel[j] * s.p.channels + (c + i) * plane;
            A sum = 0;
            for (int k = 0; k < 4; ++k) {
              const int32_t index = plan.index[k][j];
              sum += plan.weight[k][j] * (index == kOutside ? A(0) : load_one(from + index));
            }
            store_one(&columns[i][j], sum);
          }
        transpose_block(&columns[0][0], kBlock, rows + t * step.channels() + c - step.channel_begin, stride, n,
                        plans.block.count);
      }
    }
}

// dot[k] += sum of (column gradient) * (value of corner k) over n channels.
template <typename T>
DCN_INLINE void dot_corners(const Corners<T>& c, int64_t n, const AccOf<T>* grad, AccOf<T> dot[4]) {
  constexpr int kLanes = Simd<T>::kLanes;
  const T *r0 = c.row[0], *r1 = c.row[1], *r2 = c.row[2], *r3 = c.row[3];
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

template <typename A>
DCN_INLINE void add_to_corners(const A* grad, int64_t n, const A weight[4], A* const row[4]) {
  constexpr int kLanes = Simd<A>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecOf<A> v = load(grad + i);
    for (int k = 0; k < 4; ++k) store(row[k] + i, load(row[k] + i) + weight[k] * v);
  }
  for (; i < n; ++i)
    for (int k = 0; k < 4; ++k) row[k][i] += weight[k] * grad[i];
}

// Puts the columns of one position into panels [panel][positions][width]; for pairs into [panel][positions /
// 2][width][2], where an even position clears its neighbour's place.
template <typename E>
struct ToPanels {
  E* data;
  int64_t panel_size;
  int width_log2;            // a division takes as long as blending two vectors
  int64_t position, column;  // `column` of channel 0

  DCN_INLINE E* at(int64_t i) const {
    const int64_t k = column + i, panel = k >> width_log2, lane = k & ((int64_t(1) << width_log2) - 1);
    if constexpr (std::is_same_v<E, bf16>)
      return data + panel * panel_size + (((position >> 1) << width_log2) + lane) * 2;
    return data + panel * panel_size + (position << width_log2) + lane;
  }
  DCN_INLINE void put(int64_t i, VecOf<E> v) const {
    constexpr int kLanes = Simd<E>::kLanes;
    const int64_t width = int64_t(1) << width_log2;
    if (((column + i) & (width - 1)) + kLanes > width) {  // over the edge of a panel
      for (int lane = 0; lane < kLanes; ++lane) put_one(i + lane, v[lane]);
      return;
    }
    E* to = at(i);
    if constexpr (std::is_same_v<E, bf16>) {
      const u32x16 upper = round_to_upper_half(v);
      u32x16 both = upper >> 16;
      if (position & 1) {
        __builtin_memcpy(&both, to, sizeof both);
        both |= upper;
      }
      __builtin_memcpy(to, &both, sizeof both);
    } else {
      store(to, v);
    }
  }
  DCN_INLINE void put_one(int64_t i, AccOf<E> v) const {
    E* to = at(i);
    if constexpr (std::is_same_v<E, bf16>) {
      if ((position & 1) == 0) to[1] = E{};
      to += position & 1;
    }
    store_one(to, v);
  }
};

// What is made of a step's column gradients. What is null is not wanted.
template <typename T, typename E>
struct BackwardPass {
  using A = AccOf<T>;
  const A* grad_columns = nullptr;  // rows of the block, `grad_stride` apart
  int64_t grad_stride = 0;
  // Sums over the channels, planes [planes][2] of (dy, dx), then [planes] of the mask, `plane_stride` apart;
  // position 0 is `first_position`.
  A* position_sums = nullptr;
  int64_t plane_stride = 0, first_position = 0;
  int64_t first_plane = 0, planes = 0;  // of those planes [G*T] that are kept
  bool mask_wanted = false;
  A* input_sums = nullptr;  // channel c of pixel i lies at [i * sums_stride + c]
  int64_t sums_stride = 0;
  A* waste = nullptr;    // takes what falls outside the map: as many numbers as the step has channels
  E* samples = nullptr;  // panels of the columns themselves
  int64_t panel_size = 0;
  int panel_width_log2 = 0;
};

template <typename A>
struct BlockDots {
  A of[4][kBlock];
};

template <typename T, typename E>
DCN_INLINE void add_position_sums(const TapPlan<AccOf<T>>& plan, const BlockDots<AccOf<T>>& dots, int64_t first,
                                  int count, int64_t plane, const BackwardPass<T, E>& pass) {
  using A = AccOf<T>;
  A grad_y[kBlock], grad_x[kBlock], grad_mask[kBlock];
  for (int j = 0; j < kBlock; ++j) {
    const A dot[4] = {dots.of[0][j], dots.of[1][j], dots.of[2][j], dots.of[3][j]};
    position_gradient(dot, plan.ly[j], plan.lx[j], plan.mask[j], &grad_y[j], &grad_x[j], &grad_mask[j]);
  }
  A* to = pass.position_sums + first - pass.first_position;
  A *to_y = to + 2 * (plane - pass.first_plane) * pass.plane_stride, *to_x = to_y + pass.plane_stride;
  for (int j = 0; j < count; ++j) to_y[j] += grad_y[j];
  for (int j = 0; j < count; ++j) to_x[j] += grad_x[j];
  if (!pass.mask_wanted) return;
  A* to_mask = to + (2 * pass.planes + plane - pass.first_plane) * pass.plane_stride;
  for (int j = 0; j < count; ++j) to_mask[j] += grad_mask[j];
}

template <typename T, typename E>
DCN_CLONES void backward_step(const Sampler<T>& s, const DepthStep& step, int64_t begin, int64_t end,
                              StepPlans<T>& plans, const BackwardPass<T, E>& pass) {
  using A = AccOf<T>;
  std::vector<BlockDots<A>> dots(step.taps() * step.offset_groups());
  for (int64_t first = begin; first < end; first += kBlock) {
    plans.make(s, step, first, first + kBlock < end ? first + kBlock : end);
    for (auto& d : dots) d = {};
    for (int j = 0; j < plans.block.count; ++j) {
      const int64_t position = first + j - begin;
      for (int64_t t = 0; t < step.taps(); ++t)
        for (const Segment& segment : step.segments) {
          const int64_t i = plans.index(step, segment, t), n = segment.end - segment.begin;
          const int64_t column = t * step.channels() + segment.begin - step.channel_begin;
          const A* grad = pass.grad_columns ? pass.grad_columns + position * pass.grad_stride + column : nullptr;
          const TapPlan<A>& plan = plans.plans[i];
          const Corners<T> corners = corners_of(s.from_channel(segment.begin), plan, j);
          if (pass.samples)
            blend(corners, n, ToPanels<E>{pass.samples, pass.panel_size, pass.panel_width_log2, position, column});
          if (pass.position_sums) {
            A dot[4] = {0, 0, 0, 0};
            dot_corners(corners, n, grad, dot);
            for (int k = 0; k < 4; ++k) dots[i].of[k][j] += dot[k];
          }
          if (pass.input_sums) {
            A* row[4];
            for (int k = 0; k < 4; ++k) {
              const int64_t pixel = plan.index[k][j] + plans.block.first_pixel[j];
              row[k] = plan.index[k][j] == kOutside ? pass.waste
                                                    : pass.input_sums + pixel * pass.sums_stride + segment.begin;
            }
            add_to_corners(grad, n, corners.weight, row);
          }
        }
    }
    if (!pass.position_sums) continue;
    for (int64_t t = 0; t < step.taps(); ++t)
      for (int64_t g = 0; g < plans.groups; ++g)
        add_position_sums(plans.plans[t * plans.groups + g], dots[t * plans.groups + g], first, plans.block.count,
                          (step.first_offset_group() + g) * s.p.taps() + step.tap_begin + t, pass);
  }
}

}  // namespace dcnseg_ops
