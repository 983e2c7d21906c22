// The weight of a deformable convolution as right matrices of the forward GEMM.
#pragma once
#include <cassert>
#include <vector>
#include "cpu/conv/depth_steps.h"
#include "cpu/conv/weights.h"
#include "cpu/gemm/product.h"
#include "cpu/layout.h"
#include "cpu/shared_work.h"
#include "cpu/transpose.h"
namespace dcnseg_ops {

// Some outputs of a group, the columns of a panel.
template <typename E>
struct ForwardPanel {
  int64_t first, outputs;
  const Microkernel<E>* kernel;  // of the panel

  int64_t width() const { return kernel->width; }
};

// Panels of all outputs of a group: wide panels if there is a microkernel for them, and one or two narrow ones where
// that needs fewer columns of zeros.
template <typename E>
std::vector<ForwardPanel<E>> forward_panels(int64_t outputs) {
  const Microkernel<E>& narrow = microkernel<E>();
  const Microkernel<E>* wide = wide_microkernel<E>();
  std::vector<ForwardPanel<E>> panels;
  for (int64_t first = 0; first < outputs; first += panels.back().width()) {
    const int64_t left = outputs - first;
    const bool is_wide = wide && left > narrow.width && (left <= wide->width || left > 2 * narrow.width);
    const Microkernel<E>& kernel = is_wide ? *wide : narrow;
    panels.push_back({first, std::min<int64_t>(kernel.width, left), &kernel});
  }
  return panels;
}

// Copies columns [begin, end) of the weight's rows with stride `stride` to rows places[begin] .. of a panel
// [depth][width]. Reads the rows of 16 outputs in parallel. Prefetches the next reads and writes, also of the next 16
// outputs, which may not exist.
template <typename T>
DCN_CLONES void pack_outputs(const T* rows, int64_t stride, int64_t outputs, int64_t begin, int64_t end,
                             const int32_t* places, int64_t width, T* panel) {
  constexpr int64_t kReadAhead = 64, kWrittenAhead = 32;  // columns
  for (int64_t o = 0; o < width; o += 16) {
    const int64_t n = outputs - o < 16 ? outputs - o : 16;
    const T* from = rows + o * stride;
    int64_t column = begin;
    if constexpr (sizeof(T) == 4) {
      for (; n == 16 && column + 16 <= end; column += 16) {
        const int64_t read = column + kReadAhead, written = column + kWrittenAhead;
        const T* next = from + (read < end ? read : 16 * stride + begin + read - end);
        for (int i = 0; i < 16; ++i) __builtin_prefetch(next + i * stride);
        if (written + 16 <= end)
          for (int i = 0; i < 16; ++i) __builtin_prefetch(panel + places[written + i] * width + o, 1);
        u32x16 v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] = load_bits(from + i * stride + column);
        exchange_all<8>(v);
        exchange_all<4>(v);
        exchange_all<2>(v);
        exchange_all<1>(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) store_bits(panel + places[column + i] * width + o, v[i]);
      }
    }
    const int64_t lanes = width - o < 16 ? width - o : 16;
    for (; column < end; ++column)
      for (int64_t i = 0; i < lanes; ++i)
        panel[places[column] * width + o + i] = i < n ? from[i * stride + column] : T{};
  }
}

// pack_outputs from 16-bit floats to pairs or to float; `rows` are in the order of the panel's rows.
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

// The depth index of each column of the weight's rows in memory order; `steps` are those of the first group.
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

// The weight for the forward, [group][panel][depth][width]. The steps are consecutive in the depth; for pairs each
// starts at an even index. The thread that needs a chunk of channels of a panel first packs it, so that it is in the
// cache of that thread and no thread waits for the rest.
template <typename T, typename E>
class ForwardWeight {
 public:
  // `steps`: those of the first group; the other groups have the same.
  ForwardWeight(const DeformConvParams& p, const Tensor& weight, const ChannelChunks& chunks,
                const std::vector<DepthStep>& steps)
      : p_(p),
        weight_(weight),
        chunks_(chunks),
        steps_(steps),
        panels_(forward_panels<E>(p.group_outputs())),
        places_(places_of(p, weight_, steps)),
        work_(static_cast<size_t>(p.groups * panel_count() * chunks.count)) {
    for (const DepthStep& step : steps) {
      begin_.push_back(depth_);
      depth_ += padded_depth<E>(step.size());
    }
    width_ = panels_.back().first + panels_.back().width();
    data_.get(p.groups * width_ * depth_);
  }

  int64_t panel_count() const { return static_cast<int64_t>(panels_.size()); }
  const ForwardPanel<E>& panel(int64_t index) const { return panels_[static_cast<size_t>(index)]; }
  // Number of elements of a step's part of a panel.
  int64_t part_size(int64_t index, size_t step) const {
    return padded_depth<E>(steps_[step].size()) * panel(index).width();
  }

  // Address of a step's part of a panel, packed or not.
  E* part(int64_t group, int64_t index, size_t step) {
    return begin_of(group, index) + begin_[step] * panel(index).width();
  }

  // The same, packed; `buffer` belongs to the thread.
  const E* packed(int64_t group, int64_t index, size_t step, Buffer<T>& buffer) {
    assert(group < p_.groups && index < panel_count() && step < steps_.size());
    const int64_t chunk = chunks_.index(steps_[step].channel_begin);  // of the group
    // Before the work starts, because it may throw.
    T* ordered = kIsHalf<T> ? buffer.get(panel(index).width() * p_.taps() * chunks_.channels) : nullptr;
    work_[static_cast<size_t>((group * panel_count() + index) * chunks_.count + chunk)].need(
        1, [&](int64_t) noexcept { pack(group, index, chunk, ordered); });
    return part(group, index, step);
  }

 private:
  E* begin_of(int64_t group, int64_t index) { return data_.get(0) + (group * width_ + panel(index).first) * depth_; }

  void pack(int64_t group, int64_t index, int64_t chunk, T* ordered) {
    const int64_t outputs = panel(index).outputs, width = panel(index).width();
    const T* rows = weight_.data + (group * p_.group_outputs() + panel(index).first) * p_.depth();
    E* to = begin_of(group, index);
    if constexpr (kIsHalf<T>)
      pack_halves(rows, outputs, width, chunk, to, ordered);
    else
      for_columns(chunk, [&](int64_t begin, int64_t end) {
        pack_outputs(rows, p_.depth(), outputs, begin, end, places_.data(), width, to);
      });
  }

  // Via rows in the order of the panel's rows.
  void pack_halves(const T* rows, int64_t outputs, int64_t width, int64_t chunk, E* panel, T* ordered) {
    const int64_t size = p_.taps() * (chunks_.end(chunk) - chunks_.begin(chunk));
    const int64_t first = p_.taps() * chunks_.begin(chunk);  // chunks are consecutive in the depth
    for (int64_t o = 0; o < outputs; ++o)
      for_columns(chunk, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ordered[o * size + places_[i] - first] = rows[o * p_.depth() + i];
      });
    for (size_t i = 0; i < steps_.size(); ++i) {
      if (chunks_.index(steps_[i].channel_begin) != chunk) continue;
      pack_half_outputs(ordered, size, outputs, steps_[i].size(), width, panel + begin_[i] * width);
      ordered += steps_[i].size();
    }
  }

  // f(begin, end) for the column ranges of the weight's rows, in memory order, of a chunk of the first group.
  template <typename F>
  void for_columns(int64_t chunk, const F& f) const {
    const int64_t begin = chunks_.begin(chunk), end = chunks_.end(chunk);
    if (!weight_.has_rows || chunks_.count == 1) return f(begin * p_.taps(), end * p_.taps());
    for (int64_t t = 0; t < p_.taps(); ++t) f(t * p_.group_channels() + begin, t * p_.group_channels() + end);
  }

  const DeformConvParams& p_;
  const Weight<T> weight_;
  const ChannelChunks chunks_;
  const std::vector<DepthStep>& steps_;
  const std::vector<ForwardPanel<E>> panels_;
  const std::vector<int32_t> places_;
  std::vector<SharedWork> work_;   // per chunk of a panel [group][panel][chunk]
  std::vector<int64_t> begin_;     // first depth index of each step
  int64_t depth_ = 0, width_ = 0;  // of all panels of a group
  Buffer<E> data_;
};

}  // namespace dcnseg_ops
