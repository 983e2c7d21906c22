// Generated convolutions, and the formula as plain loops in double, for the programs in this folder.
#pragma once
#include <algorithm>
#include <numeric>
#include "bilinear.h"
#include "deform_conv_params.h"
#include "random_case.h"

using namespace dcnseg_ops;

struct Convolution {
  DeformConvParams p{};
  std::vector<double> input, offset, mask, grad_columns;
};

// Kernels up to 3x3 in every third case, otherwise up to 9x9, or a line of up to 33 taps.
static void pick_kernel(DeformConvParams& p) {
  p.kernel_h = pick(1, 3), p.kernel_w = pick(1, 3);
  const int kind = pick(0, 5);
  if (kind < 2) p.kernel_h = pick(4, 9), p.kernel_w = pick(4, 9);
  if (kind == 2) p.kernel_h = 1, p.kernel_w = pick(4, 33);
  if (kind == 3) p.kernel_h = pick(4, 33), p.kernel_w = 1;
}

// Groups and offset groups; in two of three cases neither divides the other. Each range of channels between their
// boundaries is a multiple of `multiple`.
static void pick_groups(DeformConvParams& p, int multiple) {
  p.groups = pick(1, 2), p.offset_groups = pick(1, 3);
  if (pick(0, 2)) do
      p.groups = pick(3, 6), p.offset_groups = pick(2, 12);
    while (p.groups % p.offset_groups == 0 || p.offset_groups % p.groups == 0);
  const int64_t times = multiple > 1 ? multiple * pick(1, 3) : pick(0, 5) ? pick(1, 12) : pick(33, 36);
  p.channels = std::lcm(p.groups, p.offset_groups) * (pick(0, 2) ? multiple : times);
}

static int64_t columns_of(const DeformConvParams& p) { return p.positions() * p.taps() * p.channels; }

// The sizes of a convolution with one output per group.
static DeformConvParams pick_sizes(int multiple) {
  DeformConvParams p{};
  pick_groups(p, multiple);
  pick_kernel(p);
  p.batch = pick(1, 3), p.out_channels = p.groups;
  const int side = pick(0, 1) ? 9 : 3;
  p.height = pick(0, 3) ? pick(1, side) : 1, p.width = pick(0, 3) ? pick(1, side) : 1;
  p.border = pick(0, 2) ? Border::zero : Border::dcnv1;
  p.stride_h = pick(1, 2), p.stride_w = pick(1, 3), p.dilation_h = pick(1, 2), p.dilation_w = pick(1, 3);
  const auto pick_pad = [](int64_t kernel, int64_t dilation) {
    const int least = static_cast<int>(dilation * (kernel - 1) / 2 + 1);  // for a map of one pixel
    return pick(least, std::max(least, pick(0, 1) ? 5 : 1));
  };
  p.pad_h = pick_pad(p.kernel_h, p.dilation_h), p.pad_w = pick_pad(p.kernel_w, p.dilation_w);
  p.out_height = (p.height + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  return p;
}

// A convolution with limits on the numbers of columns and of spots (one tap of one offset group at one position). The
// channels of each group are a multiple of `multiple`, as vectors require.
[[maybe_unused]] static Convolution generate(int multiple = 1, int64_t max_columns = 1 << 18,
                                             int64_t max_spots = INT64_MAX) {
  Convolution c;
  DeformConvParams& p = c.p;
  do p = pick_sizes(multiple);
  while (columns_of(p) > max_columns || p.positions() * p.taps() * p.offset_groups > max_spots);
  const int64_t planes = p.offset_groups * p.taps();
  c.input = values_with_odd_ones(p.batch * p.channels * p.height * p.width);
  for (int64_t i = 0; i < p.batch * 2 * planes * p.out_pixels(); ++i) c.offset.push_back(normal_or_odd(10));
  // Infinity times a weight of 0 is NaN; the order of the multiplications is not specified.
  for (int64_t i = 0; i < p.batch * planes * p.out_pixels(); ++i) c.mask.push_back(pick(0, 49) ? normal() : NAN);
  // Finite: whether a gradient times a pixel outside the map is NaN or 0 is not specified either.
  for (int64_t i = 0; i < p.positions() * p.taps() * p.channels; ++i) c.grad_columns.push_back(normal());
  return c;
}

// The expected results. Values are rounded to the type of the operator; positions are computed in A, as in the
// operator. `input_at(b, c, y, x)` and `column_at(b, pixel, c, t)` are their indices.
struct Expected {
  std::vector<double> columns, offset, mask, input;
};

template <typename A, typename I, typename C>
static Expected expect(const DeformConvParams& p, const std::vector<double>& input, const std::vector<A>& offset,
                       const std::vector<A>& mask, const std::vector<double>& grad_columns, I input_at, C column_at) {
  Expected e{std::vector<double>(grad_columns.size()), std::vector<double>(offset.size()),
             std::vector<double>(mask.size()), std::vector<double>(input.size())};
  const int64_t pixels = p.out_pixels();
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int64_t t = 0; t < p.taps(); ++t)
        for (int64_t c = 0; c < p.channels; ++c) {
          const int64_t g = c / p.offset_group_channels(), column = column_at(b, pixel, c, t);
          const int64_t plane = (b * p.offset_groups + g) * p.taps() + t;
          const double m = mask[plane * pixels + pixel], g_column = grad_columns[column];
          const A y = A(pixel / p.out_width * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h) +
                      offset[2 * plane * pixels + pixel];
          const A x = A(pixel % p.out_width * p.stride_w - p.pad_w + t % p.kernel_w * p.dilation_w) +
                      offset[(2 * plane + 1) * pixels + pixel];
          const bool bad = !std::isfinite(y) || !std::isfinite(x), replicates = p.border == Border::dcnv1;
          const bool valid = !bad && (!replicates || (y >= 0 && y < p.height && x >= 0 && x < p.width));
          double value = bad ? NAN : 0, grad = value, dy = bad ? NAN : 0, dx = bad ? NAN : 0;
          // dcnv1: positions after the last row and column are replaced by these.
          const bool at_bottom = replicates && y >= p.height - 1, at_right = replicates && x >= p.width - 1;
          const A fy = at_bottom ? A(p.height - 1) : std::floor(y), fx = at_right ? A(p.width - 1) : std::floor(x);
          const A ly = at_bottom ? A(0) : y - fy, lx = at_right ? A(0) : x - fx;
          for (int corner = 0; corner < 4 && valid; ++corner) {
            const double row = at_bottom ? fy : fy + corner / 2, col = at_right ? fx : fx + corner % 2;
            if (row < 0 || row >= p.height || col < 0 || col >= p.width) continue;
            const int64_t at = input_at(b, c, int64_t(row), int64_t(col));
            const double v = input[at], wy = corner / 2 ? ly : 1 - ly, wx = corner % 2 ? lx : 1 - lx;
            value += wy * wx * v;
            grad += wy * wx * v * g_column;
            dy += (at_bottom ? 0 : corner / 2 ? wx : -wx) * v * g_column;
            dx += (at_right ? 0 : corner % 2 ? wy : -wy) * v * g_column;
            e.input[at] += m * wy * wx * g_column;
          }
          e.columns[column] = m * value;
          e.mask[plane * pixels + pixel] += grad;
          e.offset[2 * plane * pixels + pixel] += m * dy;
          e.offset[(2 * plane + 1) * pixels + pixel] += m * dx;
        }
  return e;
}
