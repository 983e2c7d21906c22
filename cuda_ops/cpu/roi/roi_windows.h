// The pixels that a bin of a region of interest averages, and their weights.
//
// The samples of a bin form a grid, so that the weights are separable: pixel (y, x) has the weight rows[y].weight *
// columns[x].weight. Samples that share pixels read them once: 3 x 3 samples one pixel apart read 4 x 4 pixels instead
// of 36 corners. In a bin of whole pixels (BinSource) all weights are 1.
//
// Not vectorized, compiled for the baseline instruction set, and independent of torch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>
#include "bilinear.h"
#include "roi_samples.h"
namespace dcnseg_ops {

struct RoiShape {
  int64_t batch, channels, height, width;  // input
  int64_t rois, kh, kw;
  int64_t group_h = 1, group_w = 1;  // position-sensitive: bin (i, j) has its own channels

  int64_t pixels() const { return height * width; }
  int64_t bins() const { return kh * kw; }
  int64_t cells() const { return group_h * group_w; }
  int64_t outputs() const { return channels / cells(); }  // output channels
  int64_t cell_of(int64_t bin) const { return bin / kw * group_h / kh * group_w + bin % kw * group_w / kw; }
};

template <typename A>
struct Tap {  // a row or a column
  int32_t index;
  A weight, slope;  // slope: derivative of the weight with respect to the shift
};

template <typename A>
struct Taps {  // in the order of their indices
  const Tap<A>* data;
  int64_t count;
};

// The value of a bin is the weighted sum divided by `divisor`: NaN if the bin is invalid.
template <typename A>
struct Window {
  Taps<A> rows, columns;
  A divisor;
  DCN_HD bool is_empty() const { return rows.count == 0 || columns.count == 0; }
};

// All windows of a box (and class). Its memory grows to the largest box and is reused.
template <typename A>
class BoxPlan {
 public:
  void start(int64_t bin_columns, bool is_shared) {
    bin_columns_ = bin_columns;
    is_shared_ = is_shared;
    begin_ = 0;
    taps_.clear();
    rows_.clear();
    columns_.clear();
    divisors_.clear();
  }

  // Appends an axis of a bin: put() its taps, then end it.
  void put(int32_t index, A weight, A slope) {
    for (size_t back = 1; back <= 2 && begin_ + back <= taps_.size(); ++back) {
      Tap<A>& tap = taps_[taps_.size() - back];
      if (tap.index != index) continue;
      tap.weight += weight;
      tap.slope += slope;
      return;
    }
    taps_.push_back({index, weight, slope});
  }
  void drop_zero_weights() {
    const auto begin = taps_.begin() + static_cast<std::ptrdiff_t>(begin_);
    taps_.erase(std::remove_if(begin, taps_.end(), [](const Tap<A>& tap) { return tap.weight == A(0); }), taps_.end());
  }
  void end_rows() { end(rows_); }
  void end_columns() { end(columns_); }
  void add_divisor(A divisor) { divisors_.push_back(divisor); }

  int64_t bytes() const {
    return static_cast<int64_t>(taps_.size() * sizeof(Tap<A>) + (rows_.size() + columns_.size()) * sizeof(Span) +
                                divisors_.size() * sizeof(A));
  }

  Window<A> window(int64_t bin) const {
    const A divisor = divisors_[static_cast<size_t>(bin)];
    if (divisor != divisor) return {{nullptr, 0}, {nullptr, 0}, divisor};
    return {taps(rows_[static_cast<size_t>(is_shared_ ? bin / bin_columns_ : bin)]),
            taps(columns_[static_cast<size_t>(is_shared_ ? bin % bin_columns_ : bin)]), divisor};
  }

 private:
  struct Span {
    size_t begin, end;
  };
  void end(std::vector<Span>& spans) {
    spans.push_back({begin_, taps_.size()});
    begin_ = taps_.size();
  }
  Taps<A> taps(const Span& span) const {
    return {taps_.data() + span.begin, static_cast<int64_t>(span.end - span.begin)};
  }

  std::vector<Tap<A>> taps_;
  std::vector<Span> rows_, columns_;  // per bin, or, if shared, per row and column of bins
  std::vector<A> divisors_;
  size_t begin_ = 0;
  int64_t bin_columns_ = 1;
  bool is_shared_ = true;
};

// Bins of whole pixels, int32 [R, 1 + 2*kh + 2*kw]: image or -1, row begins, row ends, column begins, column ends.
struct BinSource {
  const int32_t* data;
  int64_t kh, kw;

  int64_t classes() const { return 1; }
  const int32_t* box(int64_t r) const { return data + r * (1 + 2 * kh + 2 * kw); }
  int64_t image(int64_t r) const { return box(r)[0]; }
  int64_t rows(int64_t r, int64_t i) const { return std::max<int64_t>(0, int64_t(box(r)[1 + kh + i]) - box(r)[1 + i]); }
  int64_t columns(int64_t r, int64_t j) const {
    const int32_t* begins = box(r) + 1 + 2 * kh;
    return std::max<int64_t>(0, int64_t(begins[kw + j]) - begins[j]);
  }
  double reads(int64_t r) const {  // approximate number of pixels per channel
    int64_t y = 0, x = 0;
    for (int64_t i = 0; i < kh; ++i) y += rows(r, i);
    for (int64_t j = 0; j < kw; ++j) x += columns(r, j);
    return image(r) < 0 ? 0 : double(y) * double(x);
  }

  template <typename A>
  void plan(int64_t r, int64_t, BoxPlan<A>& plan) const {
    plan.start(kw, true);
    const bool is_bad = image(r) < 0;
    const int32_t *row_begins = box(r) + 1, *column_begins = row_begins + 2 * kh;
    for (int64_t i = 0; i < kh && !is_bad; ++i) {
      for (int64_t y = 0; y < rows(r, i); ++y) plan.put(row_begins[i] + static_cast<int32_t>(y), 1, 0);
      plan.end_rows();
    }
    for (int64_t j = 0; j < kw && !is_bad; ++j) {
      for (int64_t x = 0; x < columns(r, j); ++x) plan.put(column_begins[j] + static_cast<int32_t>(x), 1, 0);
      plan.end_columns();
    }
    for (int64_t i = 0; i < kh; ++i)
      for (int64_t j = 0; j < kw; ++j) {
        const A pixels = static_cast<A>(rows(r, i) * columns(r, j));
        plan.add_divisor(is_bad ? std::numeric_limits<A>::quiet_NaN() : std::max(pixels, A(1)));
      }
  }
};

// Samples, [R, 1 + 3*kh + 3*kw]: image or -1; firsts, steps and counts of the rows, then of the columns. `shift` is
// [R, 2*classes, part_h, part_w], x and then y of each class, or null.
template <typename A>
struct SampleSource {
  const A *data, *shift;
  RoiShape shape;
  int64_t class_count, part_h, part_w;
  Border border;

  int64_t classes() const { return class_count; }
  const A* box(int64_t r) const { return data + r * (1 + 3 * shape.kh + 3 * shape.kw); }
  int64_t image(int64_t r) const { return static_cast<int64_t>(box(r)[0]); }
  int64_t part_of(int64_t bin) const {
    return bin / shape.kw * part_h / shape.kh * part_w + bin % shape.kw * part_w / shape.kw;
  }
  int64_t shift_index(int64_t r, int64_t class_index, int64_t bin) const {  // of x; that of y is part_h * part_w higher
    return (r * class_count + class_index) * 2 * part_h * part_w + part_of(bin);
  }
  double reads(int64_t r) const {
    double y = 0, x = 0;
    for (int64_t i = 0; i < shape.kh; ++i) y += std::min(double(rows(r, i, 0).count), double(shape.height));
    for (int64_t j = 0; j < shape.kw; ++j) x += std::min(double(columns(r, j, 0).count), double(shape.width));
    return image(r) < 0 ? 0 : 2 * y * x;
  }

  void plan(int64_t r, int64_t class_index, BoxPlan<A>& plan) const {
    plan.start(shape.kw, shift == nullptr);
    if (image(r) < 0)
      for (int64_t bin = 0; bin < shape.bins(); ++bin) plan.add_divisor(std::numeric_limits<A>::quiet_NaN());
    else if (shift)
      plan_shifted(r, class_index, plan);
    else
      plan_grid(r, plan);
  }

 private:
  SampleAxis<A> axis(const A* firsts, int64_t bins, int64_t i, A moved) const {
    const A count = firsts[2 * bins + i];
    return {firsts[i], firsts[bins + i], count > 0 ? count : A(0), moved};
  }
  SampleAxis<A> rows(int64_t r, int64_t i, A moved) const { return axis(box(r) + 1, shape.kh, i, moved); }
  SampleAxis<A> columns(int64_t r, int64_t j, A moved) const {
    return axis(box(r) + 1 + 3 * shape.kh, shape.kw, j, moved);
  }

  A divisor(const SampleAxis<A>& y, const SampleAxis<A>& x, A valid_y, A valid_x) const {
    if (y.count == 0 || x.count == 0) return 1;
    if (!std::isfinite(y.shift) || !std::isfinite(x.shift)) return std::numeric_limits<A>::quiet_NaN();
    return std::max(A(1), border == Border::mxnet ? valid_y * valid_x : y.count * x.count);
  }

  void plan_shifted(int64_t r, int64_t class_index, BoxPlan<A>& plan) const {
    for (int64_t bin = 0; bin < shape.bins(); ++bin) {
      const A* moved = shift + shift_index(r, class_index, bin);
      const SampleAxis<A> y = rows(r, bin / shape.kw, moved[part_h * part_w]), x = columns(r, bin % shape.kw, moved[0]);
      const A valid_y = put_axis(y, shape.height, plan);
      plan.end_rows();
      const A valid_x = put_axis(x, shape.width, plan);
      plan.end_columns();
      plan.add_divisor(divisor(y, x, valid_y, valid_x));
    }
  }

  // Without shifts, the bins of a row share their rows. A border of zeros then samples whole pixels (eq. 6 of Dai et
  // al. with zero offsets), and a neighbor with weight 0 is not read.
  void plan_grid(int64_t r, BoxPlan<A>& plan) const {
    std::vector<A> valid_y, valid_x;
    for (int64_t i = 0; i < shape.kh; ++i) {
      valid_y.push_back(put_axis(rows(r, i, 0), shape.height, plan));
      if (border == Border::zero) plan.drop_zero_weights();
      plan.end_rows();
    }
    for (int64_t j = 0; j < shape.kw; ++j) {
      valid_x.push_back(put_axis(columns(r, j, 0), shape.width, plan));
      if (border == Border::zero) plan.drop_zero_weights();
      plan.end_columns();
    }
    for (int64_t i = 0; i < shape.kh; ++i)
      for (int64_t j = 0; j < shape.kw; ++j)
        plan.add_divisor(divisor(rows(r, i, 0), columns(r, j, 0), valid_y[i], valid_x[j]));
  }

  // Puts the taps of the valid samples of an axis; returns the number of valid samples.
  A put_axis(const SampleAxis<A>& axis, int64_t size, BoxPlan<A>& plan) const {
    if (size == 0 || !std::isfinite(axis.shift)) return 0;
    const SampleRange range = valid_samples(border, axis, static_cast<int32_t>(size));
    const int64_t count = range.end - range.begin;
    // Sorted by position, so that taps that share a pixel are consecutive.
    const auto at = [&](int64_t k) { return axis.at(axis.step < 0 ? range.end - 1 - k : range.begin + k); };
    for (int64_t k = 0, next; k < count; k = next) {
      const A position = at(k);
      next = end_of_run(k, count, at);
      const A n = static_cast<A>(next - k);
      // On a map of width 1, corners 0 and 2 are the rows above and below.
      const Bilinear<A> s = locate(border, position, A(0), static_cast<int32_t>(size), 1);
      if (s.index[0] != kOutside) plan.put(s.index[0], (A(1) - s.ly) * n, -n);
      if (s.index[2] != kOutside) plan.put(s.index[2], s.ly * n, n);
    }
    return static_cast<A>(count);
  }

  // The first k in (begin, end] whose position differs from that of `begin`: with a step of 0, or below the rounding
  // error of positions, very many samples have the same position.
  template <typename F>
  static int64_t end_of_run(int64_t begin, int64_t end, const F& at) {
    const A position = at(begin);
    int64_t low = begin + 1;
    if (low == end || at(low) != position) return low;
    while (low < end) {
      const int64_t middle = low + (end - low) / 2;
      if (at(middle) == position)
        low = middle + 1;
      else
        end = middle;
    }
    return low;
  }
};

}  // namespace dcnseg_ops
