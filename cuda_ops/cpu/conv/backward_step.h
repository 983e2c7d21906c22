// Gradients of positions and input from the column gradients of a step. The columns themselves are sampled again for
// the gradient of the weight.
#pragma once
#include "cpu/conv/sampling.h"
#include "cpu/gemm/panel_rows.h"
#include "cpu/scratch.h"
namespace dcnseg_ops {

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

// Outputs of a step. A null pointer means that the output is not needed.
template <typename T, typename E>
struct BackwardPass {
  using A = AccOf<T>;
  const A* grad_columns = nullptr;  // rows of the block with stride `grad_stride`
  int64_t grad_stride = 0;
  // Sums over the channels with stride `plane_stride`: planes [planes][2] of (dy, dx), then [planes] of the mask.
  // Position 0 is `first_position`.
  A* position_sums = nullptr;
  int64_t plane_stride = 0, first_position = 0;
  int64_t first_plane = 0, planes = 0;  // range of the planes [G*T] that are kept
  bool mask_wanted = false;
  A* input_sums = nullptr;  // channel c of pixel i is at [i * sums_stride + c]
  int64_t sums_stride = 0;
  A* waste = nullptr;  // receives the gradients of corners outside the map: as many elements as the step has channels
  PanelRows<E> samples{};  // output of the sampled columns
};

template <typename A>
struct BlockDots {
  A of[4][kBlock];
};

template <typename T, typename E>
DCN_INLINE void add_position_sums(const TapFractions<AccOf<T>>& at, const BlockDots<AccOf<T>>& dots, int64_t first,
                                  int count, int64_t plane, const BackwardPass<T, E>& pass) {
  using A = AccOf<T>;
  A grad_y[kBlock], grad_x[kBlock], grad_mask[kBlock];
  for (int j = 0; j < kBlock; ++j) {
    const A dot[4] = {dots.of[0][j], dots.of[1][j], dots.of[2][j], dots.of[3][j]};
    position_gradient(dot, at.ly[j], at.lx[j], at.mask[j], &grad_y[j], &grad_x[j], &grad_mask[j]);
  }
  A* to = pass.position_sums + first - pass.first_position;
  A *to_y = to + 2 * (plane - pass.first_plane) * pass.plane_stride, *to_x = to_y + pass.plane_stride;
  for (int j = 0; j < count; ++j) to_y[j] += grad_y[j];
  for (int j = 0; j < count; ++j) to_x[j] += grad_x[j];
  if (!pass.mask_wanted) return;
  A* to_mask = to + (2 * pass.planes + plane - pass.first_plane) * pass.plane_stride;
  for (int j = 0; j < count; ++j) to_mask[j] += grad_mask[j];
}

// For position j, whose row of the columns is `position`, and one tap; `column` is the first one of the segment.
template <typename T, typename E>
DCN_INLINE void backward_tap(const PixelRows<T>& pixels, const Segment& segment, const TapPlan<AccOf<T>>& plan,
                             int64_t first_pixel, int j, int64_t position, int64_t column,
                             const BackwardPass<T, E>& pass, BlockDots<AccOf<T>>& dots) {
  using A = AccOf<T>;
  const int64_t n = segment.end - segment.begin;
  const A* grad = pass.grad_columns ? pass.grad_columns + position * pass.grad_stride + column : nullptr;
  const Corners<T> corners = pixels.corners(plan, first_pixel, j);
  if (pass.samples.data)
    pass.samples.for_runs(position, column, n, [&](int64_t i, int64_t count, const ToPanel<E>& to) DCN_INLINE_LAMBDA {
      blend(corners.after(i), count, to);
    });
  if (pass.position_sums) {
    A dot[4] = {0, 0, 0, 0};
    dot_corners(corners, n, grad, dot);
    for (int k = 0; k < 4; ++k) dots.of[k][j] += dot[k];
  }
  if (pass.input_sums) {
    A* row[4];
    for (int k = 0; k < 4; ++k)
      row[k] = plan.index[k][j] == kOutside
                   ? pass.waste
                   : pass.input_sums + (plan.index[k][j] + first_pixel) * pass.sums_stride + segment.begin;
    add_to_corners(grad, n, corners.weight, row);
  }
}

template <typename T, typename E>
DCN_CLONES void backward_step(const Sampler<T>& s, const DepthStep& step, int64_t begin, int64_t end,
                              StepPlans<T>& plans, const BackwardPass<T, E>& pass_of_step) {
  using A = AccOf<T>;
  const BackwardPass<T, E> pass = pass_of_step;  // a local copy, which stores cannot alias
  const int64_t taps = step.taps(), groups = step.offset_groups();
  Buffer<BlockDots<A>> buffer;
  BlockDots<A>* dots = buffer.get(taps * groups);
  for (int64_t first = begin; first < end; first += kBlock) {
    plans.make(s, step, first, first + kBlock < end ? first + kBlock : end);
    for (int64_t i = 0; i < taps * groups; ++i) dots[i] = {};
    for (const Segment& segment : step.segments) {
      const PixelRows<T> pixels(s, segment.begin);
      const int64_t group = plans.index(step, segment, 0), column = segment.begin - step.channel_begin;
      for (int j = 0; j < plans.block.count; ++j)
        for (int64_t t = 0; t < taps; ++t)
          backward_tap(pixels, segment, plans.plans[t * groups + group], plans.block.first_pixel[j], j,
                       first + j - begin, t * step.channels() + column, pass, dots[t * groups + group]);
    }
    if (!pass.position_sums) continue;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t g = 0; g < groups; ++g)
        add_position_sums(plans.fractions[t * groups + g], dots[t * groups + g], first, plans.block.count,
                          (step.first_offset_group() + g) * s.p.taps() + step.tap_begin + t, pass);
  }
}

}  // namespace dcnseg_ops
