// The weight of a deformable convolution as right matrices of products, and its gradient back.
#pragma once
#include <vector>
#include "depth_steps.h"
#include "layout.h"
#include "panel_rows.h"
#include "product.h"
#include "transpose.h"
namespace dcnseg_ops {

// The weight [C_out, C/groups, kh, kw], contiguous or channels-last.
template <typename T>
struct Weight {
  const T* data;
  bool has_rows;  // whether an output's numbers lie [T][C/groups] already

  explicit Weight(const Tensor& t) : data(t.in<T>()), has_rows(is_channels_last(t)) {}
};

// Row [T][C/groups] of output o; `buffer` holds it where the weight lies [C/groups][T].
template <typename T>
const T* weight_row(const DeformConvParams& p, const Weight<T>& weight, int64_t o, T* buffer) {
  const T* from = weight.data + o * p.depth();
  if (weight.has_rows) return from;
  transpose_narrow(from, buffer, p.group_channels(), p.group_channels(), p.taps());
  return buffer;
}

// For the forward: per group panels [outputs of the group] x [depth], with the steps side by side in the depth.
// For pairs each step begins at an even place.
template <typename E>
struct ForwardPanels {
  std::vector<int64_t> begin;  // of each step in the depth
  int64_t depth = 0, outputs;

  ForwardPanels(const DeformConvParams& p, const std::vector<DepthStep>& steps) : outputs(p.group_outputs()) {
    for (const DepthStep& step : steps) {
      begin.push_back(depth);
      depth += Panels<E>{step.size(), outputs}.padded_depth();
    }
  }
  int64_t width() const { return Panels<E>::width(); }
  int64_t count() const { return (outputs + width() - 1) / width(); }
  int64_t panel_size() const { return depth * width(); }
  int64_t size() const { return count() * panel_size(); }
};

// Row i of a panel takes column places[i] .. of the weight's rows: [outputs][depth], `depth` apart. 16 outputs
// at a time are read from front to end, which is what memory is fastest at.
template <typename T>
DCN_CLONES void pack_outputs(const T* rows, int64_t depth, int64_t outputs, const int32_t* places, int64_t width,
                             T* panel) {
  for (int64_t o = 0; o < width; o += 16) {
    const int64_t n = outputs - o < 16 ? outputs - o : 16;
    const T* from = rows + o * depth;
    int64_t column = 0;
    if constexpr (sizeof(T) == 4) {
      for (; n == 16 && column + 16 <= depth; column += 16) {
        const int64_t ahead = column + 48 <= depth ? column + 32 : column;  // what is written next
        for (int i = 0; i < 16; ++i) __builtin_prefetch(panel + places[ahead + i] * width + o, 1);
        u32x16 v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = load_bits(from + i * depth + column);
        exchange_all<8>(v);
        exchange_all<4>(v);
        exchange_all<2>(v);
        exchange_all<1>(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) store_bits(panel + places[column + i] * width + o, v[i]);
      }
    }
    const int64_t lanes = width - o < 16 ? width - o : 16;
    for (; column < depth; ++column)
      for (int64_t i = 0; i < lanes; ++i)
        panel[places[column] * width + o + i] = i < n ? from[i * depth + column] : T{};
  }
}

// As pack_outputs from 16-bit floats to pairs or to float; `rows` are in the order of the panel's rows.
template <typename T, typename E>
DCN_CLONES void pack_half_outputs(const T* rows, int64_t depth, int64_t outputs, int64_t size, int64_t width,
                                  E* panel) {
  for (int64_t o = 0; o < width; o += 16) {
    const int64_t n = outputs - o < 16 ? outputs - o : 16;
    const T* from = rows + o * depth;
    int64_t k = 0;
    if constexpr (std::is_same_v<E, bf16>) {
      for (; n == 16 && k + 16 <= size; k += 16) {
        u32x16 v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = load_bits(from + i * depth + k);
        exchange_all<8>(v);
        exchange_all<4>(v);
        exchange_all<2>(v);
        exchange_all<1>(v);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
          const u32x16 pair = v[i] | v[i + 1] << 16;
          __builtin_memcpy(panel + ((k + i) / 2 * width + o) * 2, &pair, sizeof pair);
        }
      }
      for (; k < size; k += 2)
        for (int64_t i = 0; i < 32; ++i) {
          const bool exists = i / 2 < n && k + i % 2 < size;
          panel[(k / 2 * width + o) * 2 + i] = exists ? from[i / 2 * depth + k + i % 2] : E{0};
        }
    } else {
      for (; k < size; ++k)
        for (int64_t i = 0; i < 16 && o + i < width; ++i)
          panel[k * width + o + i] = i < n ? load_one(from + i * depth + k) : 0.0f;
    }
  }
}

// Where each column of the weight's rows, as they lie, goes in the depth; `steps` are those of the first group.
template <typename T>
std::vector<int32_t> places_of(const DeformConvParams& p, const Weight<T>& weight,
                               const std::vector<DepthStep>& steps) {
  std::vector<int32_t> places(static_cast<size_t>(p.depth()));
  int32_t place = 0;
  for (const DepthStep& step : steps)
    for (int64_t t = step.tap_begin; t < step.tap_end; ++t)
      for (int64_t c = step.channel_begin; c < step.channel_end; ++c)
        places[weight.has_rows ? t * p.group_channels() + c : c * p.taps() + t] = place++;
  return places;
}

// The weight for the forward: [group][panel][depth][width].
template <typename T, typename E>
void pack_weight_forward(const DeformConvParams& p, const Weight<T>& weight, const std::vector<DepthStep>& steps,
                         const ForwardPanels<E>& panels, E* to) {
  const int64_t width = panels.width(), count = panels.count();
  const std::vector<int32_t> places = places_of(p, weight, steps);
  parallel_ranges(p.groups * count, grain(width * p.depth()), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / count * p.group_outputs() + item % count * width;
      const int64_t n = std::min(width, p.group_outputs() - item % count * width);
      E* panel = to + item * panels.panel_size();
      const T* from = weight.data + first * p.depth();
      if constexpr (kIsHalf<T>) {
        T* rows = buffer.get(width * p.depth());
        for (int64_t o = 0; o < n; ++o)
          for (int64_t i = 0; i < p.depth(); ++i) rows[o * p.depth() + places[i]] = from[o * p.depth() + i];
        int64_t column = 0;
        for (size_t i = 0; i < steps.size(); column += steps[i++].size())
          pack_half_outputs(rows + column, p.depth(), n, steps[i].size(), width, panel + panels.begin[i] * width);
      } else {
        pack_outputs(from, p.depth(), n, places.data(), width, panel);
      }
    }
  });
}

// Where the panels of each step begin, and their size in all.
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

// For the backward: per step panels [outputs of the group] x [step.size()]; the depth is the outputs.
template <typename E>
Panels<E> column_panels(const DeformConvParams& p, const DepthStep& step) {
  return {p.group_outputs(), step.size()};
}

// Output o's numbers of a step to its panels.
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
  const int64_t pairs = (p.group_outputs() + 1) / 2;  // outputs that share a panel's rows
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

// Sums [step][outputs of the group][step.size()] to a gradient that lies as the weight does.
template <typename T>
void unpack_weight_gradient(const DeformConvParams& p, const std::vector<DepthStep>& steps, const AccOf<T>* sums,
                            const Tensor& grad) {
  T* to = grad.out<T>();
  const bool has_rows = is_channels_last(grad);
  const int64_t tap_stride = has_rows ? p.group_channels() : 1, channel_stride = has_rows ? 1 : p.taps();
  parallel_for(0, p.group_outputs(), grain(p.depth() * p.groups), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {  // the steps of one output after another: they share its lines
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
