// Generated RoI poolings, and the formulas as plain loops in double, for the programs in this folder.
//
// Everything here has the order [N, C, H, W], regardless of the memory format that is tested.
#pragma once
#include <algorithm>
#include "bilinear.h"
#include "random_case.h"

using namespace dcnseg_ops;

struct RoiCase {
  int64_t batch, out_channels, height, width, boxes, kernel_h, kernel_w, group_h, group_w, classes, part_h, part_w;
  Border border;
  bool shifted;
  std::vector<double> input, grad, samples, shift;
  std::vector<int32_t> bins;

  int64_t channels() const { return out_channels * group_h * group_w; }
  int64_t cells() const { return kernel_h * kernel_w; }
  int64_t outputs() const { return boxes * out_channels * cells(); }
  int64_t pixel(int64_t b, int64_t c, int64_t y, int64_t x) const {
    return ((b * channels() + c) * height + y) * width + x;
  }
  int64_t output(int64_t r, int64_t c, int64_t i, int64_t j) const {
    return ((r * out_channels + c) * kernel_h + i) * kernel_w + j;
  }
  int64_t channel(int64_t c, int64_t i, int64_t j) const {
    return (c * group_h + i * group_h / kernel_h) * group_w + j * group_w / kernel_w;
  }
  int64_t shift_x(int64_t r, int64_t c, int64_t i, int64_t j) const {
    const int64_t klass = c * classes / out_channels;
    return ((r * 2 * classes + 2 * klass) * part_h + i * part_h / kernel_h) * part_w + j * part_w / kernel_w;
  }
};

// Firsts, steps and counts along one axis: the pixels of bins.
static void append_pixels(std::vector<double>& samples, int64_t kernel, int64_t size) {
  std::vector<double> counts;
  for (int64_t i = 0; i < kernel; ++i) {
    samples.push_back(pick(0, int(size) - 1));
    counts.push_back(pick(0, int(size - samples.back())));
  }
  samples.insert(samples.end(), static_cast<size_t>(kernel), 1.0);
  samples.insert(samples.end(), counts.begin(), counts.end());
}

// The same for arbitrary samples. Positions are often exactly at the limits of borders.
static void append_axis(std::vector<double>& samples, int64_t kernel, int64_t size) {
  std::vector<double> steps;
  for (int64_t i = 0; i < kernel; ++i) {
    const double first[] = {size * normal(), pick(-8, 4 * int(size) + 8) / 4.0, -1e6 + pick(0, 9), -1e30, 1e30};
    samples.push_back(first[pick(0, 9) ? pick(0, 1) : pick(0, 4)]);
  }
  for (int64_t i = 0; i < kernel; ++i) {
    const double step[] = {0.25, 1, 0.1 + std::fabs(normal()), -0.5, 0};
    steps.push_back(step[pick(0, 4)]);
  }
  samples.insert(samples.end(), steps.begin(), steps.end());
  for (int64_t i = 0; i < kernel; ++i) {
    const double count[] = {0, 1, 2, 3, 4, 9, 2e6, 1e30};
    samples.push_back(count[pick(0, steps[i] == 0 ? 5 : 7)]);
  }
}

// Begins and ends of bins along one axis, one in eight of them empty.
static void append_edges(std::vector<int32_t>& bins, int64_t kernel, int size, bool wild) {
  std::vector<int32_t> ends;
  for (int64_t i = 0; i < kernel; ++i) {
    const int begin = pick(0, size - 1), end = pick(0, 7) ? pick(begin + 1, size) : pick(0, begin);
    const bool is_wild = wild && pick(0, 9) == 0;
    bins.push_back(is_wild ? INT32_MIN : begin);
    ends.push_back(is_wild ? INT32_MAX : end);
  }
  bins.insert(bins.end(), ends.begin(), ends.end());
}

// `wild`: also bins outside the map and images that do not exist (otherwise at most -1), which the GPU kernels must
// tolerate because they are not checked before.
static RoiCase generate_rois(bool wild) {
  RoiCase c{};
  const auto size = [] { return pick(0, 3) ? pick(1, 9) : 1; };
  c.batch = wild && pick(0, 9) == 0 ? 0 : pick(1, 3), c.height = size(), c.width = size();
  c.boxes = pick(0, 9) ? pick(1, 5) : 0, c.kernel_h = pick(1, 3), c.kernel_w = pick(1, 3);
  const bool grouped = pick(0, 2) == 0, fits = pick(0, 1);
  c.group_h = !grouped ? 1 : fits ? c.kernel_h : pick(1, 4), c.group_w = !grouped ? 1 : fits ? c.kernel_w : pick(1, 4);
  c.classes = pick(1, 3), c.out_channels = c.classes * (pick(0, 5) ? pick(1, 6) : pick(20, 40));
  c.part_h = pick(0, 1) ? c.kernel_h : pick(1, 4), c.part_w = pick(0, 1) ? c.kernel_w : pick(1, 4);
  c.border = static_cast<Border>(pick(0, 2));
  c.shifted = pick(0, 2) != 0;
  if (!c.shifted) c.classes = c.part_h = c.part_w = 1;
  c.input = values_with_odd_ones(c.batch * c.channels() * c.height * c.width);
  c.grad = values_with_odd_ones(c.outputs());
  const double odd_images[] = {-1, NAN, 1e30, double(c.batch), INFINITY};
  const auto image = [&](bool odd) { return odd ? -1 : pick(0, std::max(0, int(c.batch) - 1)); };
  for (int64_t r = 0; r < c.boxes; ++r) {
    const bool odd = pick(0, 5) == 0;
    c.bins.push_back(wild && odd ? (pick(0, 1) ? int32_t(c.batch) : INT32_MIN) : image(odd));
    append_edges(c.bins, c.kernel_h, int(c.height), wild);
    append_edges(c.bins, c.kernel_w, int(c.width), wild);
    c.samples.push_back(wild && odd ? odd_images[pick(0, 4)] : image(odd));
    const auto append = c.border == Border::zero && !c.shifted ? append_pixels : append_axis;
    append(c.samples, c.kernel_h, c.height);
    append(c.samples, c.kernel_w, c.width);
  }
  const auto quarter = [] { return pick(-12, 12) / 4.0; };
  for (int64_t i = 0; c.shifted && i < c.boxes * 2 * c.classes * c.part_h * c.part_w; ++i)
    c.shift.push_back(pick(0, 1) ? quarter() : normal_or_odd(10));
  return c;
}

struct ExpectedRois {
  std::vector<double> output, argmax, input, shift;

  explicit ExpectedRois(const RoiCase& c)
      : output(c.outputs()), argmax(c.outputs(), -1), input(c.input.size()), shift(c.shift.size()) {}
};

template <typename F>  // f(r, c, i, j)
static void for_outputs(const RoiCase& k, const F& f) {
  for (int64_t r = 0; r < k.boxes; ++r)
    for (int64_t c = 0; c < k.out_channels; ++c)
      for (int64_t i = 0; i < k.kernel_h; ++i)
        for (int64_t j = 0; j < k.kernel_w; ++j) f(r, c, i, j);
}

// The pixels of bin (i, j) of box r, clipped to the map; `bad` without an image.
struct Bin {
  bool bad;
  int64_t image, top, bottom, left, right;
};
static Bin bin_of(const RoiCase& k, int64_t r, int64_t i, int64_t j) {
  const int32_t* row = k.bins.data() + r * (1 + 2 * k.kernel_h + 2 * k.kernel_w);
  const auto clip = [](int32_t v, int64_t most) { return std::min<int64_t>(std::max<int64_t>(v, 0), most); };
  const int32_t *rows = row + 1, *columns = row + 1 + 2 * k.kernel_h;
  return {row[0] < 0 || row[0] >= k.batch, row[0],
          clip(rows[i], k.height),         clip(rows[k.kernel_h + i], k.height),
          clip(columns[j], k.width),       clip(columns[k.kernel_w + j], k.width)};
}

static ExpectedRois expect_max(const RoiCase& k) {
  ExpectedRois e(k);
  for_outputs(k, [&](int64_t r, int64_t c, int64_t i, int64_t j) {
    const Bin bin = bin_of(k, r, i, j);
    const int64_t at = k.output(r, c, i, j);
    if (bin.bad) e.output[at] = NAN;
    for (int64_t y = bin.top; y < bin.bottom && !bin.bad; ++y)
      for (int64_t x = bin.left; x < bin.right; ++x) {
        const double v = k.input[k.pixel(bin.image, c, y, x)];
        const bool is_first = e.argmax[at] < 0, is_found = std::isnan(e.output[at]);
        if (!is_first && (is_found || !(std::isnan(v) || v > e.output[at]))) continue;
        e.output[at] = v;
        e.argmax[at] = double(y * k.width + x);
      }
    if (e.argmax[at] >= 0) e.input[k.pixel(bin.image, c, 0, int64_t(e.argmax[at]))] += k.grad[at];
  });
  return e;
}

static ExpectedRois expect_mean(const RoiCase& k) {
  ExpectedRois e(k);
  for_outputs(k, [&](int64_t r, int64_t c, int64_t i, int64_t j) {
    const Bin bin = bin_of(k, r, i, j);
    const int64_t at = k.output(r, c, i, j);
    if (bin.bad) e.output[at] = NAN;
    if (bin.bad || bin.bottom <= bin.top || bin.right <= bin.left) return;
    const double pixels = double((bin.bottom - bin.top) * (bin.right - bin.left));
    for (int64_t y = bin.top; y < bin.bottom; ++y)
      for (int64_t x = bin.left; x < bin.right; ++x) {
        const int64_t pixel = k.pixel(bin.image, k.channel(c, i, j), y, x);
        e.output[at] += k.input[pixel];
        e.input[pixel] += k.grad[at] / pixels;
      }
    e.output[at] /= pixels;
  });
  return e;
}

// The valid positions among the samples of one bin along one axis, computed in A as the operators do.
template <typename A>
static std::vector<A> valid_positions(Border border, A first, A step, A count, A shift, int64_t size) {
  std::vector<A> valid;
  // Of many samples only those near the map are evaluated.
  const double middle = step == 0 ? 0 : -(double(first) + double(shift)) / double(step);
  const double begin = std::max(0.0, std::floor(middle) - 2000),
               end = std::min(double(count), std::floor(middle) + 2000);
  for (double i = begin; i < end && i < 1e15; ++i) {
    volatile A product = A(int64_t(i)) * step;
    const A sum = first + product, v = sum + shift;
    const bool ok = border == Border::zero   ? v >= -1 && v < size
                    : border == Border::mmcv ? v >= -1 && v <= size
                                             : v >= A(-0.5) && v <= A(size) - A(0.5);
    if (ok) valid.push_back(v);
  }
  return valid;
}

// One axis of a bilinear sample: two pixels (-1: none), their weights, and the derivatives of the weights.
template <typename A>
struct AxisSample {
  int64_t pixel[2];
  double weight[2], slope[2];

  AxisSample(Border border, A v, int64_t size) {
    const bool clamped = border != Border::zero && (v < 0 || v >= size - 1);
    if (border != Border::zero) v = std::min(std::max(v, A(0)), A(size - 1));
    const A low = std::floor(v), fraction = v - low;
    weight[0] = A(1) - fraction, weight[1] = fraction;
    for (int k = 0; k < 2; ++k) {
      pixel[k] = int64_t(low) + k;
      slope[k] = clamped ? 0 : k ? 1 : -1;
      if (clamped) pixel[k] = int64_t(low);  // both are the pixel at the border
      if (pixel[k] < 0 || pixel[k] >= size) pixel[k] = -1;
    }
  }
};

template <typename A>
static ExpectedRois expect_deform(const RoiCase& k) {
  ExpectedRois e(k);
  const int64_t stride = 1 + 3 * k.kernel_h + 3 * k.kernel_w, parts = k.part_h * k.part_w;
  const auto is_bad = [&](int64_t r) { return !(k.samples[r * stride] >= 0 && k.samples[r * stride] < k.batch); };
  for (size_t i = 0; i < e.shift.size(); ++i)
    if (is_bad(int64_t(i) / (2 * k.classes * parts))) e.shift[i] = NAN;
  for_outputs(k, [&](int64_t r, int64_t c, int64_t i, int64_t j) {
    const int64_t at = k.output(r, c, i, j), at_x = k.shifted ? k.shift_x(r, c, i, j) : 0, at_y = at_x + parts;
    const double *row = k.samples.data() + r * stride, *ys = row + 1 + i, *xs = row + 1 + 3 * k.kernel_h + j;
    const A shift_x = k.shifted ? A(k.shift[at_x]) : A(0), shift_y = k.shifted ? A(k.shift[at_y]) : A(0);
    const A count_y = A(ys[2 * k.kernel_h]), count_x = A(xs[2 * k.kernel_w]);
    if (is_bad(r)) {
      e.output[at] = NAN;
      return;
    }
    if (!std::isfinite(shift_x) || !std::isfinite(shift_y)) {
      if (count_y >= 1 && count_x >= 1) e.output[at] = e.shift[at_x] = e.shift[at_y] = NAN;
      return;
    }
    const auto rows = valid_positions(k.border, A(ys[0]), A(ys[k.kernel_h]), count_y, shift_y, k.height);
    const auto columns = valid_positions(k.border, A(xs[0]), A(xs[k.kernel_w]), count_x, shift_x, k.width);
    if (rows.empty() || columns.empty()) return;
    const double divisor =
        k.border == Border::mxnet ? double(rows.size() * columns.size()) : std::max(double(count_y * count_x), 1.0);
    const double grad = k.grad[at] / divisor;
    double sum = 0;
    for (const A position_y : rows)
      for (const A position_x : columns) {
        const AxisSample<A> y(k.border, position_y, k.height), x(k.border, position_x, k.width);
        double slope_y = 0, slope_x = 0;
        for (int corner = 0; corner < 4; ++corner) {
          const int v = corner / 2, h = corner % 2;
          if (y.pixel[v] < 0 || x.pixel[h] < 0) continue;
          const int64_t pixel = k.pixel(int64_t(row[0]), k.channel(c, i, j), y.pixel[v], x.pixel[h]);
          const double weight = y.weight[v] * x.weight[h];
          if (!k.shifted && k.border == Border::zero && weight == 0) continue;  // whole pixels are averaged
          sum += weight * k.input[pixel];
          e.input[pixel] += weight * grad;
          slope_y += y.slope[v] * x.weight[h] * k.input[pixel];
          slope_x += x.slope[h] * y.weight[v] * k.input[pixel];
        }
        if (k.shifted) {
          e.shift[at_y] += grad * slope_y;
          e.shift[at_x] += grad * slope_x;
        }
      }
    e.output[at] = sum / divisor;
  });
  return e;
}
