// Sampling of the columns on the CPU, vectorized over the channels of channels-last pixels.
//
// Columns are written in memory order, all taps of one position at a time; the other order took twice as long at 64
// channels.
#pragma once
#include "cpu/conv/tap_plans.h"
#include "cpu/transpose.h"
namespace dcnseg_ops {

template <typename T>
struct Corners {
  const T* row[4];  // channels of the corner's pixel, or zeros
  AccOf<T> weight[4];

  DCN_INLINE Corners after(int64_t channels) const {
    return {{row[0] + channels, row[1] + channels, row[2] + channels, row[3] + channels},
            {weight[0], weight[1], weight[2], weight[3]}};
  }
};

// The channels of pixels, starting at `channel`. A copy of the values, which stores cannot alias.
template <typename T>
struct PixelRows {
  intptr_t first, stride, zeros;  // in bytes

  DCN_INLINE PixelRows(const Sampler<T>& s, int64_t channel)
      : first(reinterpret_cast<intptr_t>(s.from_channel(channel))),
        stride(s.pixel_stride * static_cast<intptr_t>(sizeof(T))),
        zeros(first + s.zeros * static_cast<intptr_t>(sizeof(T))) {}

  // The corners of position j, whose image starts at `first_pixel`.
  DCN_INLINE Corners<T> corners(const TapPlan<AccOf<T>>& plan, int64_t first_pixel, int j) const {
    const auto row = [&](int k) DCN_INLINE_LAMBDA {
      const int32_t index = plan.index[k][j];
      return reinterpret_cast<const T*>(index == kOutside ? zeros : first + (first_pixel + index) * stride);
    };
    return {{row(0), row(1), row(2), row(3)},
            {plan.weight[0][j], plan.weight[1][j], plan.weight[2][j], plan.weight[3][j]}};
  }
};

// Blends four rows of n channels; `to` receives vectors and the remaining scalars.
template <typename T, typename To>
DCN_INLINE void blend(const Corners<T>& c, int64_t n, const To& to) {
  constexpr int kLanes = Simd<T>::kLanes;
  const T *r0 = c.row[0], *r1 = c.row[1], *r2 = c.row[2], *r3 = c.row[3];
#if defined(__x86_64__)
  // Without this, GCC addresses each row relative to another one, with four times as many instructions.
  asm("" : "+r"(r0), "+r"(r1), "+r"(r2), "+r"(r3));
#endif
  const AccOf<T> w0 = c.weight[0], w1 = c.weight[1], w2 = c.weight[2], w3 = c.weight[3];
  const auto put = [&](int64_t i) DCN_INLINE_LAMBDA {
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

// Columns of positions [begin, end), at most one block, to rows [end - begin][step.size()] with a stride of `stride`
// elements.
template <typename T, typename E>
DCN_CLONES void sample_rows(const Sampler<T>& s, const DepthStep& step, int64_t begin, int64_t end, StepPlans<T>& plans,
                            E* rows, int64_t stride) {
  plans.make(s, step, begin, end);
  const int64_t taps = step.taps(), channels = step.channels(), groups = plans.groups;
  for (const Segment& segment : step.segments) {
    const TapPlan<AccOf<T>>* first_plan = &plans.plans[plans.index(step, segment, 0)];
    const PixelRows<T> pixels(s, segment.begin);
    const int64_t n = segment.end - segment.begin;
    E* to = rows + segment.begin - step.channel_begin;
    for (int j = 0; j < plans.block.count; ++j, to += stride) {
      const TapPlan<AccOf<T>>* plan = first_plan;
      E* row = to;
      const int64_t first_pixel = plans.block.first_pixel[j];
      for (int64_t t = 0; t < taps; ++t, plan += groups, row += channels)
        blend(pixels.corners(*plan, first_pixel, j), n, ToRow<E>{row});
    }
  }
}

// sample_rows from the planes of a contiguous input, for maps that are too large to copy.
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

}  // namespace dcnseg_ops
