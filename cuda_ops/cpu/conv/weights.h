// The weight as right matrices of the backward GEMMs, and the gradient of the weight.
#pragma once
#include <vector>
#include "cpu/conv/depth_steps.h"
#include "cpu/gemm/panel_rows.h"
#include "cpu/gemm/product.h"
#include "cpu/layout.h"
#include "cpu/transpose.h"
namespace dcnseg_ops {

// The weight [C_out, C/groups, kh, kw], contiguous or channels-last.
template <typename T>
struct Weight {
  const T* data;
  bool has_rows;  // whether the rows are [T][C/groups] in memory

  explicit Weight(const Tensor& t) : data(t.in<T>()), has_rows(is_channels_last(t)) {}
};

// Row [T][C/groups] of output o; `buffer` holds it if the memory order is [C/groups][T].
template <typename T>
const T* weight_row(const DeformConvParams& p, const Weight<T>& weight, int64_t o, T* buffer) {
  const T* from = weight.data + o * p.depth();
  if (weight.has_rows) return from;
  transpose_narrow(from, buffer, p.group_channels(), p.group_channels(), p.taps());
  return buffer;
}

// First element of the panels of each step, and their total size.
template <typename E>
struct StepOffsets {
  std::vector<int64_t> begin;
  int64_t size = 0;

  template <typename F>
  StepOffsets(const std::vector<DepthStep>& steps, const F& panels_of) {
    for (const DepthStep& step : steps) {
      begin.push_back(size);
      size += panels_of(step).size();
    }
  }
};

// For the backward: panels [outputs of the group] x [step.size()] per step; the depth is the outputs.
template <typename E>
Panels<E> column_panels(const DeformConvParams& p, const DepthStep& step) {
  return {p.group_outputs(), step.size()};
}

// Copies the weights of output o for a step to its panels.
template <typename T, typename E>
DCN_CLONES void pack_columns(const T* row, int64_t o, int64_t taps, int64_t tap_stride, int64_t channels,
                             const PanelRows<E>& panels) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t t = 0; t < taps; ++t, row += tap_stride)
    panels.for_runs(o, t * channels, channels, [&](int64_t i, int64_t count, const ToPanel<E>& to) DCN_INLINE_LAMBDA {
      int64_t c = 0;
      for (; c + kLanes <= count; c += kLanes) to.put(c, load(row + i + c));
      for (; c < count; ++c) to.put_one(c, load_one(row + i + c));
    });
}

// The weight for the backward: [step][panel][outputs of the group][width].
template <typename T, typename E>
void pack_weight_backward(const DeformConvParams& p, const Weight<T>& weight, const std::vector<DepthStep>& steps,
                          const StepOffsets<E>& offsets, E* to) {
  const int64_t pairs = (p.group_outputs() + 1) / 2;  // outputs that share a row of a panel
  parallel_ranges(pairs, grain(2 * p.depth() * p.groups), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer;
    T* row_buffer = buffer.get(p.depth());
    for (int64_t group = 0; group < p.groups; ++group)
      for (int64_t o = 2 * begin; o < std::min(2 * end, p.group_outputs()); ++o) {
        const T* row = weight_row(p, weight, group * p.group_outputs() + o, row_buffer);
        for (size_t i = 0; i < steps.size(); ++i) {
          const DepthStep& step = steps[i];
          if (step.channel_begin / p.group_channels() != group) continue;
          const T* from = row + step.tap_begin * p.group_channels() + step.channel_begin - group * p.group_channels();
          const Panels<E> panels = column_panels<E>(p, step);
          pack_columns(from, o, step.taps(), p.group_channels(), step.channels(),
                       PanelRows<E>{to + offsets.begin[i], panels.panel_size(), panels.width_log2()});
        }
      }
  });
}

// Copies sums [step][outputs of the group][step.size()] to a gradient in the memory format of the weight.
template <typename T>
void unpack_weight_gradient(const DeformConvParams& p, const std::vector<DepthStep>& steps, const AccOf<T>* sums,
                            const Tensor& grad) {
  T* to = grad.out<T>();
  const bool has_rows = is_channels_last(grad);
  const int64_t tap_stride = has_rows ? p.group_channels() : 1, channel_stride = has_rows ? 1 : p.taps();
  parallel_for(0, p.group_outputs(), grain(p.depth() * p.groups), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {  // all steps of an output in a row: they share cache lines
      const AccOf<T>* step_sums = sums;
      for (const DepthStep& step : steps) {
        const int64_t group = step.channel_begin / p.group_channels();
        const int64_t channel = step.channel_begin - group * p.group_channels();
        const AccOf<T>* from = step_sums + o * step.size();
        T* row =
            to + (group * p.group_outputs() + o) * p.depth() + step.tap_begin * tap_stride + channel * channel_stride;
        for (int64_t t = 0; t < step.taps(); ++t)
          for (int64_t c = 0; c < step.channels(); ++c) store_one(row + t * tap_stride + c * channel_stride, *from++);
        step_sums += p.group_outputs() * step.size();
      }
    }
  });
}

}  // namespace dcnseg_ops
